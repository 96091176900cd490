//! Sums over rows by the chunk rule (reduce.rs) on a GPU: `cuda/chunks.cuh`.
//!
//! Two passes: sums of blocks of at most `ROWS` rows of a part, and then, part by part, the sum of those.
//!
//! Invariant: the order of a column's additions depends on the rows of a part alone, not on how many parts a call has.

use crate::args;
use crate::device::gpu::driver::{Argument, Grid};
use crate::device::gpu::{Gpu, kernel};
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dtype::Dtype;

/// SUM_ROWS, SUM_THREADS and WARP of `cuda/chunks.cuh`.
const ROWS: usize = 64;
const THREADS: u32 = 256;
const WARP: usize = 32;

/// One such sum.
pub(super) struct GpuChunks {
    /// f32 [blocks of rows, c]. None where the device is not a GPU, and needs none.
    partials: Option<Tensor>,
    /// Of what is summed.
    dtype: Dtype,
    sequences: usize,
    /// Rows of a chunk of one sequence.
    part: usize,
}

impl GpuChunks {
    /// Takes the room that a sum of terms from the rows of x [n, c], in sequences of t, into dw f32 [chunks, c] needs on a GPU.
    pub(super) fn new(dw: &ViewMut<'_>, x: View<'_>, t: usize) -> GpuChunks {
        let (sequences, chunks) = (x.shape().rows() / t, dw.shape().rows());
        let part = t / chunks;
        let partials = dw.device().gpu_scratch([sequences * chunks * part.div_ceil(ROWS), dw.shape().columns()], Dtype::F32);
        GpuChunks { partials, dtype: x.dtype(), sequences, part }
    }

    /// dw += the sum. The kernel `pass` sums blocks of rows: it takes the partial sums, c, the rows of a part, and then `operands`.
    pub(super) fn add(self, gpu: &Gpu, dw: ViewMut<'_>, pass: &str, operands: &[Argument]) {
        let mut partials = self.partials.expect("a GPU has room for partial sums");
        let (chunks, c) = (dw.shape().rows(), dw.shape().columns());
        let mut arguments = args![partials.view_mut(), c, self.part].to_vec();
        arguments.extend(operands);
        let tile = WARP * 16 / self.dtype.bytes();
        gpu.launch(&kernel(pass, self.dtype), grid(partials.shape().rows(), c.div_ceil(tile)), &arguments);
        let blocks = self.part.div_ceil(ROWS);
        gpu.launch("chunks_combine", grid(c.div_ceil(WARP), chunks), &args![&dw, partials.view(), self.sequences, blocks, c]);
    }
}

fn grid(across: usize, down: usize) -> Grid {
    assert!(down < 1 << 16, "{down} rows of blocks: a grid has at most 65535");
    let Grid { blocks: [across, ..], .. } = Grid::blocks(across, THREADS);
    Grid { blocks: [across, down as u32, 1], threads: THREADS, shared_bytes: 0 }
}
