//! Products of blocks small enough for one thread and its caches, for ops that are made of many of them.
//!
//! Invariant: the same chains as in `micro`: sums depend on K and on what they resume alone.
#![allow(unsafe_code)]

use crate::device::cpu::micro::{Micro, Sums, Tile};
use crate::device::cpu::pack::{ANY, Along, Operand, RowPanels, pack, pack_rows};
use crate::device::cpu::{Cpu, Isa};
use crate::dtype::{Dtype, Element};

/// Columns of sums are padded to a multiple of this, which is a whole number of vectors on every machine.
pub const PAD: usize = 16;

/// How blocks of one dtype are multiplied on one processor.
#[derive(Clone, Copy)]
pub struct Blocks {
    isa: Isa,
    micro: Micro,
}

impl Blocks {
    pub fn new(cpu: &Cpu, dtype: Dtype) -> Blocks {
        Blocks { isa: cpu.isa(), micro: Micro::new(cpu.isa(), dtype) }
    }

    /// Units that `pack` writes for a B of `k` by `columns`, and that `multiply` may need for an A of `columns` rows by `k`.
    pub fn units(&self, columns: usize, k: usize) -> usize {
        self.micro.unit.count(k) * columns.next_multiple_of(PAD)
    }

    /// `k` elements and what is missing to whole units: an A whose rows go on with zeros need not be packed for a broken unit.
    pub fn whole(&self, k: usize) -> usize {
        k.next_multiple_of(self.micro.unit.elements())
    }

    /// Packs a B of `k` by `columns` into `to`, padded with columns of zeros.
    pub fn pack<'a, T: Element>(&self, b: &Operand<'_, T>, columns: usize, k: usize, to: &'a mut [u32]) -> Packed<'a> {
        b.check(columns, k);
        let (steps, lanes) = (self.micro.unit.count(k), self.micro.lanes);
        let padded = columns.next_multiple_of(PAD);
        let mut lowest = ANY;
        for panel in self.micro.panels(padded / lanes) {
            let width = panel.len() * lanes;
            let present = (panel.start * lanes).min(columns)..(panel.end * lanes).min(columns);
            let to = &mut to[panel.start * lanes * steps..][..width * steps];
            lowest = lowest.min(pack(self.isa, self.micro.unit, b, present, 0..k, width, to));
        }
        Packed { units: &to[..padded * steps], columns: padded, steps, lowest }
    }

    /// C[m, n] from A[m, k] and the first k rows and n columns of `b`. The rows of C are `stride` apart; they are written beyond n, up to
    /// the columns of `b` at most. `scratch` has the `units` of A.
    pub fn multiply<T: Element>(&self, a: &Operand<'_, T>, b: Packed<'_>, dims: [usize; 3], c: Sum<'_>, scratch: &mut [u32]) {
        self.multiply_until(a, b, dims, c, scratch, |_| dims[1]);
    }

    /// The same, where rows before `row` need their first `until(row)` columns only: more than these may be written, or not.
    pub fn multiply_until<T: Element>(
        &self,
        a: &Operand<'_, T>,
        b: Packed<'_>,
        [m, n, k]: [usize; 3],
        c: Sum<'_>,
        scratch: &mut [u32],
        until: impl Fn(usize) -> usize,
    ) {
        let Sum { sums, how, stride } = c;
        let (steps, lanes) = (self.micro.unit.count(k), self.micro.lanes);
        a.check(m, k);
        assert!(steps <= b.steps && n <= b.columns, "{k} x {n} of a packed {} units x {}", b.steps, b.columns);
        assert!(b.columns <= stride && sums.len() >= (m - 1) * stride + b.columns, "{} sums for {m} rows of {stride}", sums.len());
        let sums = sums.as_mut_ptr();
        let in_place = k.is_multiple_of(self.micro.unit.elements()) && self.micro.unit.lies_in_memory(T::DTYPE) && a.along == Along::K;
        let mut lowest = b.lowest + ANY;
        if !in_place {
            assert!(scratch.len() >= m * steps, "{} units of scratch for {m} x {steps}", scratch.len());
            let panels = RowPanels { unit: self.micro.unit, height: self.micro.rows, steps, first: 0 };
            lowest = b.lowest + pack_rows(self.isa, panels, a, 0..m, 0..k, &mut scratch[..m * steps]);
        }
        let packed = scratch.as_ptr();
        for panel in self.micro.panels(b.columns / lanes).take_while(|panel| panel.start * lanes < n) {
            let columns = b.units[panel.start * lanes * b.steps..].as_ptr();
            for row in (0..m).step_by(self.micro.rows) {
                let rows = self.micro.rows.min(m - row);
                if panel.start * lanes >= until(row + rows) {
                    continue;
                }
                let (a, a_row, a_unit) = if in_place {
                    (a.data[a.index(row, 0)..].as_ptr().cast(), a.stride * size_of::<T>(), 4)
                } else {
                    (packed.wrapping_add(row * steps).cast(), 4, 4 * rows)
                };
                let c = sums.wrapping_add(row * stride + panel.start * lanes);
                let tile = Tile { units: steps, a, a_row, a_unit, b: columns, c, c_row: stride, sums: how, lowest };
                // SAFETY: A, B and C have all rows, columns and units of this tile (checked above), and `micro` fits this processor.
                unsafe { self.micro.run(rows, panel.len(), &tile) };
            }
        }
    }
}

/// A packed B: `[steps]` units of `columns` columns, panel after panel.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    units: &'a [u32],
    columns: usize,
    steps: usize,
    /// See `pack`.
    lowest: u32,
}

/// Where the sums of a product lie, and what becomes of them.
pub struct Sum<'a> {
    pub sums: &'a mut [f32],
    pub stride: usize,
    pub how: Sums,
}

/// A buffer that is handed out piece by piece, each piece at the start of a cache line.
pub struct Buffer<'a>(&'a mut [u32]);

impl<'a> Buffer<'a> {
    pub fn new(units: &'a mut [u32]) -> Buffer<'a> {
        Buffer(units)
    }

    pub fn units(&mut self, count: usize) -> &'a mut [u32] {
        let all = std::mem::take(&mut self.0);
        assert!(count.next_multiple_of(16) <= all.len(), "{count} units of {} that are left", all.len());
        let (piece, rest) = all.split_at_mut(count.next_multiple_of(16));
        self.0 = rest;
        &mut piece[..count]
    }

    pub fn floats(&mut self, count: usize) -> &'a mut [f32] {
        bytemuck::cast_slice_mut(self.units(count))
    }

    pub fn elements<T: Element>(&mut self, count: usize) -> &'a mut [T] {
        &mut bytemuck::cast_slice_mut(self.units((count * size_of::<T>()).div_ceil(4)))[..count]
    }
}
