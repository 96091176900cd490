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
//! Invariant: a row of dw takes its terms in the order of the rows of dy. Threads own rows of dw.

use crate::device::Device;
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dispatch;
use crate::dtype::Dtype;
use crate::ops::elementwise::{accumulate_row, add_to_row};
use crate::ops::rows::{Rows, over_rows};

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
        Device::Gpu(_) => panic!("not yet on a GPU"),
        Device::Dry(_) => {}
    }
    y
}

/// dw f32 [v_local, c] += the rows of dy [n, c] at their ids
pub fn backward(mut dw: ViewMut<'_>, dy: View<'_>, ids: View<'_>, first: usize) {
    let (columns, local) = (dy.shape().columns(), dw.shape().rows());
    assert_eq!(dw.shape().columns(), columns, "a gradient {} of rows {}", dw.shape(), dy.shape());
    assert_eq!(ids.shape().numel(), dy.shape().rows(), "an id for each row");
    assert_eq!((dw.dtype(), ids.dtype()), (Dtype::F32, Dtype::U32), "gradients rest in f32, ids are u32");
    match dy.device() {
        Device::Cpu(cpu) => dispatch!(dy.dtype(), T => {
            let (ids, dy) = (ids.slice::<u32>(), dy.slice::<T>());
            // Every part looks at all ids and takes those of its own rows: looking is cheap beside adding a row.
            let cost = (ids.len() * columns).div_ceil(local.max(1));
            over_rows(cpu, local, cost, Rows::new(dw.slice_mut::<f32>(), columns), #[inline(always)] |rows, dw| {
                for (id, dy) in ids.iter().zip(dy.chunks_exact(columns)) {
                    if let Some(row) = local_row(*id, first + rows.start, rows.len()) {
                        accumulate_row(&mut dw.elements[row * columns..][..columns], dy);
                    }
                }
            });
        }),
        Device::Gpu(_) => panic!("not yet on a GPU"),
        Device::Dry(_) => {}
    }
}

/// x [n, c] += table[positions]. table [p, c], positions u32 [n]
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
        Device::Gpu(_) => panic!("not yet on a GPU"),
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
