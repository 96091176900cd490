//! Rows computed in f32, a block at a time, and rounded when a block is done.
//!
//! A loop over f32 alone becomes better vector code than one that converts as well, and whole blocks are rounded by the processor's own
//! instructions. Where a value takes a long chain of operations, several short loops over a block are faster than one long one: more of
//! their elements are under way at a time.
//!
//! Invariant: each element is computed by itself and rounded once, so where blocks begin changes no bit.

use crate::device::cpu::Isa;
use crate::device::cpu::vector::narrow;
use crate::dtype::{Dtype, Element};
use std::ops::Range;

/// Elements of a block. Some blocks of f32 stay in the first-level cache.
pub const BLOCK: usize = 512;

/// Room for blocks of up to two results. It starts at a cache line, or half of all vectors would lie in two.
#[repr(align(64))]
pub struct Blocks {
    space: [[f32; BLOCK]; 2],
    isa: Isa,
}

impl Blocks {
    pub fn new(isa: Isa) -> Blocks {
        Blocks { space: [[0.0; BLOCK]; 2], isa }
    }

    /// Fills `out`: `compute` is told which elements, and where to put them.
    #[inline(always)]
    pub fn fill<T: Element>(&mut self, out: &mut [T], compute: impl Fn(Range<usize>, &mut [f32])) {
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            let range = block * BLOCK..block * BLOCK + out.len();
            if T::DTYPE == Dtype::F32 {
                compute(range, bytemuck::cast_slice_mut(out));
                continue;
            }
            let wide = &mut self.space[0][..out.len()];
            compute(range, wide);
            narrow(self.isa, wide, out);
        }
    }

    /// Fills `row` with what becomes of it: `compute` is told which elements, where to put them, and what stood there.
    #[inline(always)]
    pub fn change<T: Element>(&mut self, row: &mut [T], compute: impl Fn(Range<usize>, &mut [f32], &[T])) {
        for (block, row) in row.chunks_mut(BLOCK).enumerate() {
            let range = block * BLOCK..block * BLOCK + row.len();
            let wide = &mut self.space[0][..row.len()];
            compute(range, wide, row);
            narrow(self.isa, wide, row);
        }
    }

    /// `change` of two rows of one length.
    #[inline(always)]
    pub fn change_two<T: Element>(
        &mut self,
        first: &mut [T],
        second: &mut [T],
        compute: impl Fn(Range<usize>, [&mut [f32]; 2], [&[T]; 2]),
    ) {
        assert_eq!(first.len(), second.len(), "two rows of one length");
        for (block, (first, second)) in first.chunks_mut(BLOCK).zip(second.chunks_mut(BLOCK)).enumerate() {
            let range = block * BLOCK..block * BLOCK + first.len();
            let [wide_first, wide_second] = &mut self.space;
            let (wide_first, wide_second) = (&mut wide_first[..first.len()], &mut wide_second[..second.len()]);
            compute(range, [&mut *wide_first, &mut *wide_second], [first, second]);
            narrow(self.isa, wide_first, first);
            narrow(self.isa, wide_second, second);
        }
    }

    /// Puts other values in the place of those of `row`.
    #[inline(always)]
    pub fn update<T: Element>(&mut self, row: &mut [T], change: impl Fn(&mut [f32])) {
        for row in row.chunks_mut(BLOCK) {
            if T::DTYPE == Dtype::F32 {
                change(bytemuck::cast_slice_mut(row));
                continue;
            }
            let wide = &mut self.space[0][..row.len()];
            convert(row, wide);
            change(wide);
            narrow(self.isa, wide, row);
        }
    }
}

/// A row as f32: itself, or converted into `space`, which becomes as long.
#[inline(always)]
pub fn widened<'a, T: Element>(row: &'a [T], space: &'a mut Vec<f32>) -> &'a [f32] {
    if T::DTYPE == Dtype::F32 {
        return bytemuck::cast_slice(row);
    }
    space.resize(row.len(), 0.0);
    convert(row, space);
    space
}

#[inline(always)]
fn convert<T: Element>(from: &[T], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn every_element_is_met_once_in_every_block() {
        for length in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7] {
            let numbers: Vec<f32> = (0..length).map(|i| i as f32 + 0.3).collect();
            let rounded: Vec<bf16> = numbers.iter().map(|&x| Element::from_f32(x)).collect();
            let mut blocks = Blocks::new(Isa::detect());
            let (mut first, mut second, mut wide) = (vec![bf16::ZERO; length], vec![bf16::ZERO; length], vec![0f32; length]);
            blocks.fill(&mut first, |range, out| out.copy_from_slice(&numbers[range]));
            blocks.fill(&mut wide, |range, out| out.copy_from_slice(&numbers[range]));
            assert_eq!((&first, &wide), (&rounded, &numbers), "{length}");
            blocks.change_two(&mut first, &mut second, |range, [first, second], [was, _]| {
                assert!(was.iter().zip(&rounded[range.clone()]).all(|(was, number)| was == number), "{range:?}");
                first.fill(0.0);
                second.copy_from_slice(&numbers[range]);
            });
            assert!(first.iter().all(|x| *x == bf16::ZERO) && second == rounded, "{length}");
            blocks.change(&mut first, |range, first, was| {
                assert!(was.iter().all(|x| *x == bf16::ZERO), "{range:?}");
                first.copy_from_slice(&numbers[range]);
            });
            assert_eq!(first, rounded, "{length}");
            blocks.update(&mut second, |row| row.iter_mut().for_each(|x| *x *= 2.0));
            let mut space = Vec::new();
            assert!(widened(&second, &mut space).iter().zip(&rounded).all(|(x, y)| *x == 2.0 * y.to_f32()), "{length}");
        }
    }
}
