//! Rearranging: ranges of columns side by side, ranges of rows one below the other, blocks in another order. Copies, bit for bit.

use crate::args;
use crate::device::Device;
use crate::device::gpu::Gpu;
use crate::device::gpu::driver::Grid;
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dispatch;
use std::ops::Range;

/// x [n, k] -> the columns `ranges` of it, side by side.
pub fn columns(x: View<'_>, ranges: &[Range<usize>]) -> Tensor {
    let (n, k) = (x.shape().rows(), x.shape().columns());
    let width: usize = ranges.iter().map(Range::len).sum();
    let mut y = x.device().empty([n, width], x.dtype());
    match x.device() {
        Device::Cpu(_) => dispatch!(x.dtype(), T => {
            let from = x.slice::<T>();
            for (to, row) in y.view_mut().into_slice::<T>().chunks_exact_mut(width.max(1)).zip(from.chunks_exact(k)) {
                let mut at = 0;
                for range in ranges {
                    to[at..at + range.len()].copy_from_slice(&row[range.clone()]);
                    at += range.len();
                }
            }
        }),
        Device::Gpu(gpu) => {
            let mut at = 0;
            for range in ranges.iter().filter(|range| n > 0 && !range.is_empty()) {
                let to = y.view_mut().part(at..n * width, [n * width - at]);
                let from = x.part(range.start..n * k, [n * k - range.start]);
                copy_blocks(gpu, to, from, [n, 1, range.len()], [width, 0], [k, 0]);
                at += range.len();
            }
        }
        Device::Dry(_) => {}
    }
    y
}

/// x [n, k] -> the rows `ranges` of it, one below the other.
pub fn rows(x: View<'_>, ranges: &[Range<usize>]) -> Tensor {
    let height = ranges.iter().map(Range::len).sum();
    let mut y = x.device().empty([height, x.shape().columns()], x.dtype());
    let mut at = 0;
    for range in ranges {
        y.view_mut().rows(at..at + range.len()).copy_from(x.rows(range.clone()));
        at += range.len();
    }
    y
}

/// x [n, k] seen as `outer` x `inner` blocks of rows -> the same blocks, `inner` x `outer`.
pub fn swap_blocks(x: View<'_>, outer: usize, inner: usize) -> Tensor {
    let n = x.shape().rows();
    assert_eq!(n % (outer * inner), 0, "{n} rows in {outer} x {inner} blocks");
    let height = n / (outer * inner);
    let mut y = x.device().empty(x.shape(), x.dtype());
    if let Device::Gpu(gpu) = x.device() {
        let block = height * x.shape().columns();
        copy_blocks(gpu, y.view_mut(), x, [outer, inner, block], [block, outer * block], [inner * block, block]);
        return y;
    }
    for a in 0..outer {
        for b in 0..inner {
            let (from, to) = ((a * inner + b) * height, (b * outer + a) * height);
            y.view_mut().rows(to..to + height).copy_from(x.rows(from..from + height));
        }
    }
    y
}

/// On a GPU, copies `outer` x `inner` blocks of elements with one launch. `to_steps` and `from_steps`: elements from one outer index to
/// the next and from one inner index to the next.
fn copy_blocks(
    gpu: &Gpu,
    to: ViewMut<'_>,
    from: View<'_>,
    [outer, inner, block]: [usize; 3],
    to_steps: [usize; 2],
    from_steps: [usize; 2],
) {
    let size = from.dtype().bytes();
    let grid = Grid::over(outer * inner * block * size, 256 * 16, 256);
    let [bytes, to_outer, to_inner, from_outer, from_inner] =
        [block, to_steps[0], to_steps[1], from_steps[0], from_steps[1]].map(|elements| elements * size);
    gpu.launch("select_blocks", grid, &args![to, from, outer, inner, bytes, to_outer, to_inner, from_outer, from_inner]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_rows_and_blocks() {
        let device = Device::cpu(1);
        let x = Tensor::from_slice(&device, [4, 3], &[0.0f32, 1.0, 2.0, 10.0, 11.0, 12.0, 20.0, 21.0, 22.0, 30.0, 31.0, 32.0]);
        assert_eq!(columns(x.view(), &[2..3, 0..1]).to_vec::<f32>(), [2.0, 0.0, 12.0, 10.0, 22.0, 20.0, 32.0, 30.0]);
        assert_eq!(rows(x.view(), &[3..4, 0..1]).to_vec::<f32>(), [30.0, 31.0, 32.0, 0.0, 1.0, 2.0]);
        let swapped = swap_blocks(x.view(), 2, 2);
        assert_eq!(swapped.to_vec::<f32>(), [0.0, 1.0, 2.0, 20.0, 21.0, 22.0, 10.0, 11.0, 12.0, 30.0, 31.0, 32.0]);
        assert_eq!(swap_blocks(swapped.view(), 2, 2).to_vec::<f32>(), x.to_vec::<f32>());
    }
}
