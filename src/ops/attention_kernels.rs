//! Attention on a GPU: which kernels of `cuda/attention_forward.cu` and `cuda/attention_backward.cu`, how many blocks, how much shared memory.
//!
//! Invariant: the numbers here are those that the kernels are written for; none of them but the width of a head changes a result.

use crate::args;
use crate::device::Device;
use crate::device::gpu::Gpu;
use crate::device::gpu::driver::Grid;
use crate::device::gpu::kernel;
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dtype::Dtype;
use crate::ops::attention::{Heads, Mask};
use std::f64::consts::LOG2_E;

/// The widest head that kernels are made for.
const WIDEST: usize = 256;
/// The longest sequence: kernels count positions, also a little beyond the end, in 32 bits with a sign.
const MOST_ROWS: usize = 1 << 30;
/// Rows of a block of `dots`, and those that share bounds.
const ROWS: usize = 32;
/// Rows of all tiles of the f32 kernels.
const FMA_ROWS: usize = 32;
const FMA_THREADS: u32 = 256;
/// What keys and values of blocks that run side by side may take of the L2 cache, which has 40 MiB or more.
const SECTION_BYTES: usize = 16 << 20;

/// A call of attention, for kernels.
pub struct Kernels<'a> {
    pub gpu: &'a Gpu,
    pub qkv: View<'a>,
    pub heads: Heads,
    pub mask: Mask<'a>,
}

/// What the backward pass makes of the rows first, and reads in tiles.
pub struct Rows {
    /// f32[heads x rows, 2]: lse in base 2, sum of dout o.
    pub rows: Tensor,
    /// u32[sequences x 32 rows, 2]: least and greatest first key.
    pub bounds: Tensor,
}

impl Rows {
    /// None on a CPU.
    pub fn new(device: &Device, n: usize, heads: Heads, t: usize) -> Option<Rows> {
        let rows = device.gpu_scratch([heads.query * n, 2], Dtype::F32)?;
        let bounds = device.gpu_scratch([n / t * t.div_ceil(ROWS), 2], Dtype::U32)?;
        Some(Rows { rows, bounds })
    }
}

/// A kernel's blocks: the rows of a tile, and its threads and shared memory.
struct Tiles {
    rows: usize,
    threads: u32,
    shared_bytes: usize,
}

impl Kernels<'_> {
    pub fn forward(&self, o: ViewMut<'_>, lse: ViewMut<'_>) {
        let Kernels { gpu, qkv, heads, mask } = self;
        let d = self.width();
        let tiles = if self.is_f32() {
            self.fma(3, 1)
        } else {
            let keys = [(96, 64), (128, 48), (256, 32)];
            let keys = keys.iter().find(|(widest, _)| d <= *widest).expect("widths end at 256").1;
            Tiles { rows: 128, threads: if d <= 128 { 128 } else { 256 }, shared_bytes: (128 + 3 * keys) * d * 2 }
        };
        let [t, query, kv, dim, window] = self.geometry();
        let (grid, section) = self.grid(&tiles, heads.query, 1);
        let arguments = args![&o, &lse, *qkv, mask.starts, t, query, kv, dim, window, section, self.scales()[1]];
        gpu.launch(&self.name("attention_forward"), grid, &arguments);
    }

    pub fn backward(&self, dqkv: ViewMut<'_>, dout: View<'_>, o: View<'_>, lse: View<'_>, given: &mut Rows) {
        let Kernels { gpu, qkv, heads, mask } = self;
        let d = self.width();
        let [t, query, kv, dim, window] = self.geometry();
        let blocks = self.sequences() * mask.t.div_ceil(ROWS) * heads.query;
        let (rows, bounds) = (given.rows.view_mut(), given.bounds.view_mut());
        let arguments = args![&rows, &bounds, dout, o, lse, mask.starts, t, query, kv, dim, window];
        gpu.launch(&kernel("attention_backward_dots", qkv.dtype()), Grid::blocks(blocks, 256), &arguments);

        let [scale, binary] = self.scales();
        // Keys, queries of a step, threads; beyond 128 columns a block has half of them.
        let (keys, queries, threads) = if d <= 64 {
            (128, 32, 128)
        } else if d <= 128 {
            (128, 64, 256)
        } else {
            (64, 32, 128)
        };
        let stage = 2 * queries * d * 2 + queries * 12 + 128;
        let tiles = Tiles { rows: keys, threads, shared_bytes: 2 * keys * d * 2 + 2 * stage };
        let tiles = if self.is_f32() { self.fma(4, 2) } else { tiles };
        let parts = if d <= 128 || self.is_f32() { 1 } else { 2 };
        let (grid, section) = self.grid(&tiles, heads.kv, parts);
        let (rows, bounds) = (given.rows.view(), given.bounds.view());
        let arguments = args![&dqkv, dout, *qkv, rows, bounds, mask.starts, t, query, kv, dim, window, section, scale, binary];
        gpu.launch(&self.name("attention_backward_keys"), grid, &arguments);

        let (queries, keys) = (if d <= 128 { 128 } else { 64 }, if d <= 64 { 64 } else { 32 });
        let tiles = Tiles { rows: queries, threads: 128, shared_bytes: 2 * (queries + keys) * d * 2 };
        let tiles = if self.is_f32() { self.fma(4, 2) } else { tiles };
        let (grid, section) = self.grid(&tiles, heads.query, 1);
        let arguments = args![&dqkv, dout, *qkv, rows, mask.starts, t, query, kv, dim, window, section, scale, binary];
        gpu.launch(&self.name("attention_backward_queries"), grid, &arguments);
    }

    fn is_f32(&self) -> bool {
        self.qkv.dtype() == Dtype::F32
    }

    fn sequences(&self) -> usize {
        self.qkv.shape().rows() / self.mask.t
    }

    /// The kernels' width of a head: columns beyond its own are zeros.
    fn width(&self) -> usize {
        let dim = self.heads.dim;
        assert!(dim <= WIDEST, "heads of {dim} columns: on a GPU, attention has kernels for heads of up to {WIDEST}");
        let widths: &[usize] = if self.is_f32() { &[64, 128, WIDEST] } else { &[32, 64, 96, 128, WIDEST] };
        widths.iter().copied().find(|&width| dim <= width).expect("it is at most the widest")
    }

    fn name(&self, pass: &str) -> String {
        kernel(&format!("{pass}_{}", self.width()), self.qkv.dtype())
    }

    /// t, query, kv, dim, window, as kernels have them.
    fn geometry(&self) -> [u32; 5] {
        let Mask { t, window, .. } = self.mask;
        assert!(t <= MOST_ROWS, "sequences of {t} rows: on a GPU, attention has kernels for up to {MOST_ROWS}");
        [t, self.heads.query, self.heads.kv, self.heads.dim, window.unwrap_or(t).min(t)].map(|count| count as u32)
    }

    /// What scores are multiplied by, and what makes powers of two of them.
    fn scales(&self) -> [f32; 2] {
        let scale = 1.0 / (self.heads.dim as f64).sqrt();
        [scale as f32, (scale * LOG2_E) as f32]
    }

    /// The blocks of a kernel of f32, with so many tiles of rows and of weights in shared memory.
    fn fma(&self, tiles: usize, weights: usize) -> Tiles {
        let floats = FMA_ROWS * (tiles * (self.width() + 4) + weights * (FMA_ROWS + 4));
        Tiles { rows: FMA_ROWS, threads: FMA_THREADS, shared_bytes: floats * 4 }
    }

    /// Blocks for all tiles of `heads` heads in `parts` each, of all sequences; and how many lanes make a section.
    fn grid(&self, tiles: &Tiles, heads: usize, parts: usize) -> (Grid, u32) {
        let lanes = self.sequences() * heads * parts;
        let of_key_head = 2 * self.mask.t * self.heads.dim * self.qkv.dtype().bytes();
        let section = (SECTION_BYTES / of_key_head).max(1) * (heads / self.heads.kv) * parts;
        let grid = Grid::blocks(lanes * self.mask.t.div_ceil(tiles.rows), tiles.threads);
        let shared_bytes = u32::try_from(tiles.shared_bytes).expect("a block has less than 160 KiB");
        (grid.with_shared(shared_bytes), section.min(lanes).max(1) as u32)
    }
}
