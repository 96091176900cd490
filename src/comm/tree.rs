//! The canonical reduction over ranks: a balanced binary tree over rank order, for any number of ranks.
//!
//! Neighbours are added in pairs, then neighbouring pairs, and so on; an odd one out passes up unchanged. Seen from the top, the left
//! subtree has the largest power of two smaller than `n` leaves. Aligned subtrees of a power of two ranks are therefore nodes of the tree
//! of all ranks: whoever adds them up beforehand gets the same bits.
//!
//! Invariant: each node is one f32 addition rounded to the tensor's dtype, so the result depends on the inputs and their order alone.

use crate::comm::Reduction;
use crate::dtype::{Dtype, Element, Stored};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Elements reduced at a time: the whole tree over a block happens in the first-level cache, so each input is read from memory once.
const BLOCK: usize = 1024;

/// `out` becomes the reduction of `inputs`, which are in rank order and as long as `out`. All are bytes of elements of `dtype`, aligned.
///
/// A maximum with a NaN on either side is a NaN. Sums of u32 do not exist: no rounding rule of ours fits them.
pub fn reduce(out: &mut [u8], inputs: &[&[u8]], dtype: Dtype, reduction: Reduction) {
    match (dtype, reduction) {
        (Dtype::F32, Reduction::Sum) => typed::<f32>(out, inputs, add::<f32>),
        (Dtype::Bf16, Reduction::Sum) => typed::<bf16>(out, inputs, add::<bf16>),
        (Dtype::F16, Reduction::Sum) => typed::<f16>(out, inputs, add_f16),
        (Dtype::U32, Reduction::Sum) => panic!("a sum over ranks is of floating-point numbers, not u32"),
        (Dtype::F32, Reduction::Max) => typed::<f32>(out, inputs, larger_float::<f32>),
        (Dtype::Bf16, Reduction::Max) => typed::<bf16>(out, inputs, larger_float::<bf16>),
        (Dtype::F16, Reduction::Max) => typed::<f16>(out, inputs, larger_float::<f16>),
        (Dtype::U32, Reduction::Max) => typed::<u32>(out, inputs, larger_u32),
    }
}

/// A node of the tree over a block: `left` becomes the combination of `left` and `right`.
type Node<T> = fn(left: &mut [T], right: &[T]);

fn typed<T: Stored>(out: &mut [u8], inputs: &[&[u8]], node: Node<T>) {
    assert!(!inputs.is_empty(), "a reduction over no ranks");
    let out: &mut [T] = bytemuck::cast_slice_mut(out);
    let inputs: Vec<&[T]> = inputs.iter().map(|input| bytemuck::cast_slice(input)).collect();
    for (rank, input) in inputs.iter().enumerate() {
        assert_eq!(input.len(), out.len(), "elements of rank {rank} and of the reduction");
    }
    // A path from the root to a leaf keeps one block aside for each right turn.
    let depth = inputs.len().next_power_of_two().trailing_zeros() as usize;
    let mut aside = vec![T::default(); depth * BLOCK];
    for (i, block) in out.chunks_mut(BLOCK).enumerate() {
        subtree(block, &inputs, i * BLOCK, &mut aside, node);
    }
}

/// `out` becomes the reduction of `inputs` from element `start` on.
fn subtree<T: Stored>(out: &mut [T], inputs: &[&[T]], start: usize, aside: &mut [T], node: Node<T>) {
    let leaf = |rank: usize| &inputs[rank][start..start + out.len()];
    if inputs.len() == 1 {
        let only = leaf(0);
        out.copy_from_slice(only);
        return;
    }
    let half = inputs.len().next_power_of_two() / 2;
    if inputs.len() - half == 1 {
        subtree(out, &inputs[..half], start, aside, node);
        let last = &inputs[half][start..start + out.len()];
        node(out, last);
    } else {
        subtree(out, &inputs[..half], start, aside, node);
        let (right, deeper) = aside.split_at_mut(BLOCK);
        let right = &mut right[..out.len()];
        subtree(right, &inputs[half..], start, deeper, node);
        node(out, right);
    }
}

fn add<T: Element>(left: &mut [T], right: &[T]) {
    for (a, b) in left.iter_mut().zip(right) {
        *a = T::from_f32(a.to_f32() + b.to_f32());
    }
}

/// The same as `add::<f16>`; whole blocks are converted at once, which the `half` crate does with the processor's own instructions.
fn add_f16(left: &mut [f16], right: &[f16]) {
    let (mut a, mut b) = ([0f32; BLOCK], [0f32; BLOCK]);
    let (a, b) = (&mut a[..left.len()], &mut b[..left.len()]);
    left.convert_to_f32_slice(a);
    right.convert_to_f32_slice(b);
    add(a, b);
    left.convert_from_f32_slice(a);
}

fn larger_float<T: Element>(left: &mut [T], right: &[T]) {
    for (a, b) in left.iter_mut().zip(right) {
        let (x, y) = (a.to_f32(), b.to_f32());
        *a = if x > y || x.is_nan() { *a } else { *b };
    }
}

fn larger_u32(left: &mut [u32], right: &[u32]) {
    for (a, b) in left.iter_mut().zip(right) {
        *a = (*a).max(*b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// The definition, level by level: adjacent pairs are combined, the odd one passes up.
    fn levels<T: Element>(mut row: Vec<T>) -> T {
        while row.len() > 1 {
            row = row
                .chunks(2)
                .map(|pair| if pair.len() == 2 { T::from_f32(pair[0].to_f32() + pair[1].to_f32()) } else { pair[0] })
                .collect();
        }
        row[0]
    }

    fn reduced<T: Stored>(inputs: &[Vec<T>], reduction: Reduction) -> Vec<T> {
        let mut out = vec![T::default(); inputs[0].len()];
        let bytes: Vec<&[u8]> = inputs.iter().map(|input| bytemuck::cast_slice(input)).collect();
        reduce(bytemuck::cast_slice_mut(&mut out), &bytes, T::DTYPE, reduction);
        out
    }

    fn check_sum<T: Element>() {
        for ranks in 1..=17 {
            let length = 2 * BLOCK + 77;
            let stream = Stream::new(ranks as u64, "tree");
            let value = |rank: usize, i: usize| T::from_f32(stream.normal((rank * length + i) as u64) as f32);
            let inputs: Vec<Vec<T>> = (0..ranks).map(|rank| (0..length).map(|i| value(rank, i)).collect()).collect();
            let expected: Vec<T> = (0..length).map(|i| levels(inputs.iter().map(|input| input[i]).collect())).collect();
            assert_eq!(reduced(&inputs, Reduction::Sum), expected, "{} over {ranks} ranks", T::DTYPE);
        }
    }

    #[test]
    fn sums_are_the_tree_level_by_level() {
        check_sum::<f32>();
        check_sum::<bf16>();
        check_sum::<f16>();
    }

    #[test]
    fn aligned_subtrees_are_nodes_of_the_whole_tree() {
        let stream = Stream::new(7, "subtrees");
        for (ranks, together) in [(8, 2), (8, 4), (12, 4), (6, 2), (7, 2), (5, 4)] {
            let inputs: Vec<Vec<f32>> = (0..ranks).map(|rank| (0..50).map(|i| stream.normal(rank * 50 + i) as f32).collect()).collect();
            let partial: Vec<Vec<f32>> = inputs.chunks(together).map(|part| reduced(part, Reduction::Sum)).collect();
            assert_eq!(reduced(&partial, Reduction::Sum), reduced(&inputs, Reduction::Sum), "{ranks} ranks, {together} at a time");
        }
    }

    #[test]
    fn maxima_keep_nan() {
        let inputs = [vec![1.0, f32::NAN, 3.0, f32::NEG_INFINITY], vec![2.0, 5.0, f32::NAN, 0.0], vec![0.5, 9.0, 9.0, -1.0]];
        let out = reduced(&inputs, Reduction::Max);
        assert!(out[0] == 2.0 && out[1].is_nan() && out[2].is_nan() && out[3] == 0.0, "{out:?}");
        assert_eq!(reduced(&[vec![1u32, u32::MAX], vec![3, 4]], Reduction::Max), [3, u32::MAX]);
    }
}
