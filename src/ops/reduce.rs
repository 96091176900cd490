//! Sums over rows of tokens, sums in a tree, and a search for what is not finite.
//!
//! The chunk rule. A gradient that is a sum over tokens rests in a buffer of `chunks` rows, f32. The n = sequences * t rows of an
//! operand are whole sequences of t rows; each is cut into `chunks` equal consecutive parts; part k is summed over its rows in order,
//! in f32, from zero, and that sum is added to row k of the buffer, one sequence after the other.
//!
//! Invariant: a sum depends on its terms and on the rule above alone: not on threads, not on how sequences are grouped into calls, not on
//! which rank holds which part. A GPU (`cuda/reduce.cu`) adds the rows of a part in another order, which the length of a part decides.

use crate::args;
use crate::device::Device;
use crate::device::gpu::driver::Grid;
use crate::device::gpu::kernel;
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::ops::chunks::GpuChunks;
use crate::ops::elementwise::accumulate_row;
use crate::ops::rows::{Rows, over_rows};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSlice;
use std::ops::Range;

/// Columns summed at a time: their sums stay in the first-level cache.
const BLOCK: usize = 256;

/// dw[k] += sum of the rows of part k of dy: the gradient of a bias. dw f32 [chunks, c], dy [n, c].
pub fn sum_rows(dw: ViewMut<'_>, dy: View<'_>, t: usize) {
    let columns = dy.shape().columns();
    check_chunks(&dw, dy.shape().rows(), columns, t);
    let chunks = GpuChunks::new(&dw, dy, t);
    match dy.device() {
        Device::Cpu(_) => dispatch!(dy.dtype(), T => {
            let values = dy.slice::<T>();
            add_by_chunks(dw, dy.shape().rows(), t, #[inline(always)] |row, columns_read, sums| {
                accumulate_row(sums, &values[row * columns..][columns_read]);
            });
        }),
        Device::Gpu(gpu) => chunks.add(gpu, dw, "reduce_sum_rows", &args![dy]),
        Device::Dry(_) => {}
    }
}

/// The chunk rule on the CPU, for any term: `add_row(row, columns, sums)` adds what `row` gives to `columns`.
pub(super) fn add_by_chunks(mut dw: ViewMut<'_>, n: usize, t: usize, add_row: impl Fn(usize, Range<usize>, &mut [f32]) + Sync) {
    let (chunks, columns) = (dw.shape().rows(), dw.shape().columns());
    let part = t / chunks;
    let Device::Cpu(cpu) = dw.device() else { return };
    let out = Rows::new(dw.slice_mut::<f32>(), 1);
    over_rows(
        cpu,
        chunks * columns,
        n / chunks,
        out,
        #[inline(always)]
        |range, out| {
            let mut sums = [0f32; BLOCK];
            let (mut start, mut rest) = (range.start, out.elements);
            while start < range.end {
                let (chunk, column) = (start / columns, start % columns);
                let count = BLOCK.min(columns - column).min(range.end - start);
                let (dw, after) = rest.split_at_mut(count);
                let sums = &mut sums[..count];
                for sequence in 0..n / t {
                    sums.fill(0.0);
                    let first = sequence * t + chunk * part;
                    for row in first..first + part {
                        add_row(row, column..column + count, sums);
                    }
                    for (dw, sum) in dw.iter_mut().zip(&*sums) {
                        *dw += sum;
                    }
                }
                (start, rest) = (start + count, after);
            }
        },
    );
}

/// That `dw` can hold, by the chunk rule, the gradient of something `columns` wide that met `n` rows.
pub(super) fn check_chunks(dw: &ViewMut<'_>, n: usize, columns: usize, t: usize) {
    let chunks = dw.shape().rows();
    assert_eq!(dw.shape().columns(), columns, "a gradient {} of rows of {columns}", dw.shape());
    assert_eq!(dw.dtype(), Dtype::F32, "gradients rest in f32");
    assert!(t > 0 && n.is_multiple_of(t), "{n} rows are not whole sequences of {t}");
    assert!(chunks > 0 && t.is_multiple_of(chunks), "sequences of {t} rows in {chunks} equal parts");
}

/// The sum of the rows in the balanced binary tree: adjacent pairs are added, an odd one passes up. dw f32 [chunks, c] -> f32 [c].
pub fn tree_rows(dw: View<'_>) -> Tensor {
    let (chunks, columns) = (dw.shape().rows(), dw.shape().columns());
    assert!(chunks > 0 && chunks < 1 << 24, "a tree over {chunks} rows");
    assert_eq!(dw.dtype(), Dtype::F32, "gradients rest in f32");
    let mut total = dw.device().empty([columns], Dtype::F32);
    match dw.device() {
        Device::Cpu(cpu) => {
            let values = dw.slice::<f32>();
            over_rows(
                cpu,
                columns,
                chunks,
                Rows::new(total.view_mut().into_slice::<f32>(), 1),
                #[inline(always)]
                |range, total| {
                    let mut terms = vec![0f32; chunks];
                    for (column, total) in range.zip(total.elements) {
                        for (chunk, term) in terms.iter_mut().enumerate() {
                            *term = values[chunk * columns + column];
                        }
                        *total = tree(&mut terms);
                    }
                },
            );
        }
        Device::Gpu(gpu) => {
            gpu.launch("reduce_tree_rows", Grid::blocks(columns.div_ceil(256), 256), &args![total.view_mut(), dw, chunks, columns]);
        }
        Device::Dry(_) => {}
    }
    total
}

/// The sum of `terms` in the balanced binary tree. Leaves partial sums behind in them.
pub(super) fn tree(terms: &mut [f32]) -> f32 {
    let mut count = terms.len();
    while count > 1 {
        for pair in 0..count / 2 {
            terms[pair] = terms[2 * pair] + terms[2 * pair + 1];
        }
        if count % 2 == 1 {
            terms[count / 2] = terms[count - 1];
        }
        count = count.div_ceil(2);
    }
    terms.first().copied().unwrap_or(0.0)
}

/// The index of the first element that is infinite or not a number.
pub fn first_nonfinite(x: View<'_>) -> Option<usize> {
    const PART: usize = 1 << 16;
    let count = x.shape().numel();
    // On a GPU, what each block finds: two halves of an index.
    let grid = Grid::over(count, 1 << 14, 256);
    let mut least = x.device().gpu_scratch([grid.blocks[0] as usize, 2], Dtype::U32);
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let values = x.slice::<T>();
            let find = |(part, values): (usize, &[T])| nonfinite_in(values).map(|i| part * PART + i);
            if values.len() <= PART { find((0, values)) } else { cpu.install(|| values.par_chunks(PART).enumerate().find_map_first(find)) }
        }),
        Device::Gpu(gpu) => {
            let least = least.as_mut().expect("scratch of a GPU");
            gpu.launch(&kernel("reduce_first_nonfinite", x.dtype()), grid, &args![least.view_mut(), x, count]);
            let found = least.to_vec::<u32>();
            let found = found.as_chunks::<2>().0.iter().map(|&[low, high]| low as usize | (high as usize) << 32).min();
            found.filter(|&index| index < count)
        }
        Device::Dry(_) => None,
    }
}

fn nonfinite_in<T: Element>(values: &[T]) -> Option<usize> {
    // First whether there is one at all: that loop has no exit, so it becomes vector code.
    let any = values.iter().fold(false, |any, x| any | !x.to_f32().is_finite());
    if any { values.iter().position(|x| !x.to_f32().is_finite()) } else { None }
}
