//! Tables of vectors, looked up by token and by position.
//!
//! ```text
//! forward             y[i] = table[ids[i] - first], zero where the id is not in this part of the vocabulary
//! backward            dw[ids[i] - first] += dy[i]
//! positions_forward   x[i] += table[positions[i]]         positions_backward  dw[positions[i]] += dx[i]
//! ```
//!
//! table and y have one dtype; dw is f32.
//!
//! Invariant: a row of dw takes its terms in the order of the rows of dy. Threads own rows of dw. On a GPU (`cuda/embedding.cu`) bits are the
//! same.

use crate::args;
use crate::device::Device;
use crate::device::gpu::driver::Grid;
use crate::device::gpu::{Gpu, kernel};
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dispatch;
use crate::dtype::Dtype;
use crate::ops::elementwise::{accumulate_row, add_to_row};
use crate::ops::rows::{Rows, over_rows};

/// Of `cuda/embedding.cu`: threads of a block, which are eight warps; rows whose gradients are sorted at once, and how many of them a
/// block of that kernel sorts; columns of a gradient that a warp takes.
const THREADS: u32 = 256;
const WARPS: usize = 8;
const CHUNK: usize = 8192;
const SORTED_BY_BLOCK: usize = 64;
const SUMMED_BY_WARP: usize = 128;

/// ids u32 [n], table [v_local, c]: the vectors of ids `first..first + v_local` -> [n, c]
pub fn forward(ids: View<'_>, table: View<'_>, first: usize) -> Tensor {
    let (n, columns, local) = (ids.shape().numel(), table.shape().columns(), table.shape().rows());
    assert_eq!(ids.dtype(), Dtype::U32, "ids are u32");
    let mut y = table.device().empty([n, columns], table.dtype());
    match table.device() {
        Device::Cpu(cpu) => dispatch!(table.dtype(), T => {
            let (ids, table) = (ids.slice::<u32>(), table.slice::<T>());
            over_rows(cpu, n, columns, Rows::new(y.view_mut().into_slice::<T>(), columns), #[inline(always)] |rows, y| {
                for (id, y) in ids[rows].iter().zip(y.each()) {
                    match local_row(*id, first, local) {
                        Some(row) => y.copy_from_slice(&table[row * columns..][..columns]),
                        None => y.fill(T::default()),
                    }
                }
            });
        }),
        Device::Gpu(gpu) => {
            let (slabs, grid) = looked_up_in_slabs(n, columns, table.dtype());
            let arguments = args![y.view_mut(), ids, table, n, columns, first, local, slabs];
            gpu.launch(&kernel("embedding_forward", table.dtype()), grid, &arguments);
        }
        Device::Dry(_) => {}
    }
    y
}

/// Warps for each row on a GPU: each takes 2048 bytes of it; and the grid.
fn looked_up_in_slabs(n: usize, columns: usize, dtype: Dtype) -> (usize, Grid) {
    let slabs = (columns * dtype.bytes()).div_ceil(2048);
    (slabs, Grid::blocks((n * slabs).div_ceil(WARPS), THREADS))
}

/// f32 rows that gradients are added to.
pub struct RowSums<'a> {
    pub view: ViewMut<'a>,
    /// Of each row whether nothing was added yet: what stands there counts as zero then, whatever it is. On the CPU alone.
    pub fresh: Option<&'a mut [u32]>,
}

impl<'a> From<ViewMut<'a>> for RowSums<'a> {
    fn from(view: ViewMut<'a>) -> RowSums<'a> {
        RowSums { view, fresh: None }
    }
}

/// dw f32 [v_local, c] += the rows of dy [n, c] at their ids
pub fn backward<'a>(dw: impl Into<RowSums<'a>>, dy: View<'_>, ids: View<'_>, first: usize) {
    let RowSums { view: mut dw, fresh } = dw.into();
    let (columns, local) = (dy.shape().columns(), dw.shape().rows());
    assert!(local < u32::MAX as usize - 1, "a table of {local} rows");
    assert_eq!(dw.shape().columns(), columns, "a gradient {} of rows {}", dw.shape(), dy.shape());
    assert_eq!(ids.shape().numel(), dy.shape().rows(), "an id for each row");
    assert_eq!((dw.dtype(), ids.dtype()), (Dtype::F32, Dtype::U32), "gradients rest in f32, ids are u32");
    assert!(fresh.as_ref().is_none_or(|fresh| fresh.len() == local && !dy.device().is_gpu()), "a number for each row, on the CPU");
    // On a GPU, rows in the order of their ids, and those ids.
    let scratch = || dy.device().gpu_scratch([ids.shape().numel().min(CHUNK)], Dtype::U32);
    let mut sorted = scratch().zip(scratch()).map(<[Tensor; 2]>::from);
    match dy.device() {
        Device::Cpu(cpu) => dispatch!(dy.dtype(), T => {
            let (ids, dy) = (ids.slice::<u32>(), dy.slice::<T>());
            // Every part looks at all ids and takes those of its own rows: looking is cheap beside adding a row.
            let cost = (ids.len() * columns).div_ceil(local.max(1));
            let out = (Rows::new(dw.slice_mut::<f32>(), columns), fresh.map(|fresh| Rows::new(fresh, 1)));
            over_rows(cpu, local, cost, out, #[inline(always)] |rows, (dw, mut fresh)| {
                for (id, dy) in ids.iter().zip(dy.chunks_exact(columns)) {
                    let Some(row) = local_row(*id, first + rows.start, rows.len()) else { continue };
                    let dw = &mut dw.elements[row * columns..][..columns];
                    if fresh.as_mut().is_some_and(|fresh| std::mem::take(&mut fresh.elements[row]) != 0) {
                        dw.fill(0.0);
                    }
                    accumulate_row(dw, dy);
                }
            });
        }),
        Device::Gpu(gpu) => {
            let sorted = sorted.as_mut().expect("scratch of a GPU");
            for start in (0..ids.shape().numel()).step_by(CHUNK) {
                let rows = start..(start + CHUNK).min(ids.shape().numel());
                add_on_gpu(gpu, dw.again(), dy.rows(rows.clone()), ids.part(rows.clone(), [rows.len()]), first, sorted);
            }
        }
        Device::Dry(_) => {}
    }
}

/// Rows of f32 whose number is not 0 become zero.
pub fn clear(mut rows: ViewMut<'_>, fresh: &[u32]) {
    let columns = rows.shape().columns();
    if let Device::Cpu(cpu) = rows.device() {
        over_rows(cpu, fresh.len(), columns, Rows::new(rows.slice_mut::<f32>(), columns), |range, rows| {
            let fresh = rows.each().zip(&fresh[range]).filter(|(_, fresh)| **fresh != 0);
            fresh.for_each(|(row, _)| row.fill(0.0));
        });
    }
}

/// sums [n, c] += rows [n, c], both f32, where the number of a row is 0.
pub fn add_rows(mut sums: ViewMut<'_>, rows: View<'_>, fresh: &[u32]) {
    let columns = rows.shape().columns();
    assert_eq!((sums.shape(), sums.dtype(), fresh.len()), (rows.shape(), rows.dtype(), rows.shape().rows()), "rows of one table");
    if let Device::Cpu(cpu) = rows.device() {
        let rows = rows.slice::<f32>();
        // Few rows are added to.
        over_rows(
            cpu,
            fresh.len(),
            1,
            Rows::new(sums.slice_mut::<f32>(), columns),
            #[inline(always)]
            |range, sums| {
                for ((row, sum), fresh) in range.clone().zip(sums.each()).zip(&fresh[range]) {
                    if *fresh == 0 {
                        accumulate_row(sum, &rows[row * columns..][..columns]);
                    }
                }
            },
        );
    }
}

/// `backward` on a GPU, of at most `CHUNK` rows. `sorted`: room for their order and their ids.
fn add_on_gpu(gpu: &Gpu, dw: ViewMut<'_>, dy: View<'_>, ids: View<'_>, first: usize, sorted: &mut [Tensor; 2]) {
    let (n, columns, local) = (ids.shape().numel(), dw.shape().columns(), dw.shape().rows());
    let slabs = columns.div_ceil(SUMMED_BY_WARP);
    let rows = u32::try_from(n).expect("a chunk of rows");
    let [order, keys] = sorted;
    let blocks = Grid::blocks(n.div_ceil(SORTED_BY_BLOCK), THREADS);
    gpu.launch("embedding_sort", blocks, &args![order.view_mut(), keys.view_mut(), ids, rows, first, local]);
    let blocks = Grid::blocks((n * slabs).div_ceil(WARPS), THREADS);
    let arguments = args![dw, dy, order.view(), keys.view(), rows, columns, slabs];
    gpu.launch(&kernel("embedding_backward", dy.dtype()), blocks, &arguments);
}

/// x [n, c] += table[positions]. table [p, c], positions u32 [n]. Fails where a position is not in the table.
pub fn positions_forward(mut x: ViewMut<'_>, table: View<'_>, positions: View<'_>) {
    let (n, columns, most) = (x.shape().rows(), x.shape().columns(), table.shape().rows());
    assert_eq!(table.shape().columns(), columns, "positions {} for rows {}", table.shape(), x.shape());
    assert_eq!(table.dtype(), x.dtype(), "positions and rows");
    assert_eq!((positions.shape().numel(), positions.dtype()), (n, Dtype::U32), "a u32 position for each row");
    match table.device() {
        Device::Cpu(cpu) => dispatch!(table.dtype(), T => {
            let (table, positions) = (table.slice::<T>(), positions.slice::<u32>());
            over_rows(cpu, n, columns, Rows::new(x.slice_mut::<T>(), columns), #[inline(always)] |rows, x| {
                for (position, x) in positions[rows].iter().zip(x.each()) {
                    assert!((*position as usize) < most, "position {position} of a table of {most}");
                    add_to_row(x, &table[*position as usize * columns..][..columns]);
                }
            });
        }),
        Device::Gpu(gpu) => {
            let (slabs, grid) = looked_up_in_slabs(n, columns, table.dtype());
            gpu.launch(&kernel("embedding_positions_forward", table.dtype()), grid, &args![&x, positions, table, n, columns, most, slabs]);
        }
        Device::Dry(_) => {}
    }
}

/// dw f32 [p, c] += the rows of dx [n, c] at their positions
pub fn positions_backward(dw: ViewMut<'_>, dx: View<'_>, positions: View<'_>) {
    backward(dw, dx, positions, 0);
}

fn local_row(id: u32, first: usize, local: usize) -> Option<usize> {
    (id as usize).checked_sub(first).filter(|&row| row < local)
}
