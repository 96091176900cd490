//! Products of blocks small enough for one thread and its caches, for ops that are made of many of them.
//!
//! Invariant: the same chains as in `micro`: sums depend on K and on what they resume alone. Which sums are computed, and which terms that
//! are zero are left out, is decided for groups of eight rows, on every processor the same.
#![allow(unsafe_code)]

use crate::device::cpu::micro::{Micro, ROWS, Sums, Tile, Unit};
use crate::device::cpu::pack::{ANY, Along, Operand, RowPanels, pack, pack_rows};
use crate::device::cpu::{Cpu, Isa};
use crate::dtype::{Dtype, Element};
use std::ops::Range;

/// Columns of sums are padded to a multiple of this, which is a whole number of vectors on every machine.
pub const PAD: usize = 16;

/// How blocks of one dtype are multiplied on one processor.
#[derive(Clone, Copy)]
pub struct Blocks {
    isa: Isa,
    micro: Micro,
    /// The most rows and vectors of a tile.
    rows: usize,
    vectors: usize,
}

/// An A.
#[derive(Clone, Copy)]
pub enum Left<'a, T> {
    Plain(Operand<'a, T>),
    /// Units: that of row r at step u lies at `u * stride + r`.
    Units {
        units: &'a [u32],
        stride: usize,
    },
}

/// What of a product is needed, or not zero, where a diagonal cuts it: rows of the block count from the same place as its other side, but
/// for `shift`.
#[derive(Clone, Copy)]
pub enum Seen {
    All,
    /// Of row r, columns up to `r + shift` are needed: more may be written, or not.
    Columns {
        shift: usize,
    },
    /// In row r of A, elements after `r + shift` are zero.
    Until {
        shift: usize,
    },
    /// In row r of A, elements before `r - shift` are zero.
    From {
        shift: usize,
    },
}

impl Seen {
    /// The columns and the elements along K that a group of rows takes.
    fn of(self, rows: Range<usize>, n: usize, k: usize) -> (usize, Range<usize>) {
        match self {
            Seen::All => (n, 0..k),
            Seen::Columns { shift } => (n.min(rows.end + shift), 0..k),
            Seen::Until { shift } => (n, 0..k.min(rows.end + shift)),
            // Pairs stay together.
            Seen::From { shift } => (n, rows.start.saturating_sub(shift) / 2 * 2..k),
        }
    }
}

impl Blocks {
    /// For products with all their columns.
    pub fn new(cpu: &Cpu, dtype: Dtype) -> Blocks {
        let micro = Micro::new(cpu.isa(), dtype);
        Blocks { isa: cpu.isa(), micro, rows: micro.rows, vectors: micro.vectors }
    }

    /// For products that a diagonal cuts: tiles are narrow, and groups of eight rows are one or two of them.
    pub fn narrow(cpu: &Cpu, dtype: Dtype) -> Blocks {
        let all = Blocks::new(cpu, dtype);
        Blocks { rows: if all.rows < ROWS { ROWS / 2 } else { ROWS }, vectors: all.vectors.min(2), ..all }
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
        for panel in self.panels(padded / lanes) {
            let width = panel.len() * lanes;
            let present = (panel.start * lanes).min(columns)..(panel.end * lanes).min(columns);
            let to = &mut to[panel.start * lanes * steps..][..width * steps];
            lowest = lowest.min(pack(self.isa, self.micro.unit, b, present, 0..k, width, to));
        }
        Packed { units: &to[..padded * steps], columns: padded, steps, lowest }
    }

    /// The vectors of each panel, as even as they can be.
    fn panels(&self, vectors: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let count = vectors.div_ceil(self.vectors);
        (0..count).map(move |panel| panel * vectors / count..(panel + 1) * vectors / count)
    }

    /// C[m, n] from A[m, k] and the first k rows and n columns of `b`. The rows of C are `stride` apart; they are written beyond n, up to
    /// the columns of `b` at most. `scratch` has the `units` of A.
    pub fn multiply<T: Element>(&self, a: &Left<'_, T>, b: Packed<'_>, [m, n, k]: [usize; 3], c: Sum<'_>, scratch: &mut [u32], seen: Seen) {
        let Sum { sums, how, stride } = c;
        let (unit, lanes) = (self.micro.unit, self.micro.lanes);
        let steps = unit.count(k);
        assert!(m <= ROWS || ROWS.is_multiple_of(self.rows), "{m} rows in tiles of {}", self.rows);
        assert!(steps <= b.steps && n <= b.columns, "{k} x {n} of a packed {} units x {}", b.steps, b.columns);
        assert!(b.columns <= stride && sums.len() >= (m - 1) * stride + b.columns, "{} sums for {m} rows of {stride}", sums.len());
        let sums = sums.as_mut_ptr();
        let rows = self.left(a, m, k, scratch);
        let lowest = b.lowest + rows.lowest;
        for panel in self.panels(b.columns / lanes).take_while(|panel| panel.start * lanes < n) {
            let columns = b.units[panel.start * lanes * b.steps..].as_ptr();
            for group in (0..m).step_by(ROWS) {
                let (until, ks) = seen.of(group..m.min(group + ROWS), n, k);
                if panel.start * lanes >= until {
                    continue;
                }
                let (first, units) = (unit.count(ks.start), unit.count(ks.end) - unit.count(ks.start));
                let b = columns.wrapping_add(first * panel.len() * lanes);
                for row in (group..m.min(group + ROWS)).step_by(self.rows) {
                    let height = self.rows.min(m - row).min(group + ROWS - row);
                    let (a, a_unit) = rows.at(row, first, height);
                    let c = sums.wrapping_add(row * stride + panel.start * lanes);
                    let tile = Tile { units, a, a_row: rows.row, a_unit, b, c, c_row: stride, sums: how, rounded: None, lowest };
                    // SAFETY: A, B and C have all rows, columns and units of this tile (checked above and by `left`), and `micro` fits
                    // this processor.
                    unsafe { self.micro.run(height, panel.len(), &tile) };
                }
            }
        }
    }

    /// Where tiles find the units of an A: where it stands, or packed into `scratch`.
    fn left<T: Element>(&self, a: &Left<'_, T>, m: usize, k: usize, scratch: &mut [u32]) -> Rows {
        let unit = self.micro.unit;
        let steps = unit.count(k);
        let a = match a {
            Left::Units { units, stride } => {
                assert!(m <= *stride && units.len() >= (steps - 1) * stride + m, "{} units for {m} x {steps}", units.len());
                return Rows { start: units.as_ptr().cast(), row: 4, unit: Distance::Bytes(4 * stride), lowest: ANY };
            }
            Left::Plain(a) => a,
        };
        a.check(m, k);
        let (start, bytes) = (a.data.as_ptr().cast(), a.stride * size_of::<T>());
        match a.along {
            Along::K if unit.lies_in_memory(T::DTYPE) && k.is_multiple_of(unit.elements()) => {
                Rows { start, row: bytes, unit: Distance::Bytes(4), lowest: ANY }
            }
            Along::X if unit.lies_in_memory(T::DTYPE) && unit == Unit::Single => {
                Rows { start, row: 4, unit: Distance::Bytes(bytes), lowest: ANY }
            }
            _ => {
                assert!(scratch.len() >= m * steps, "{} units of scratch for {m} x {steps}", scratch.len());
                let panels = RowPanels { unit, height: self.rows, steps, first: 0 };
                let lowest = pack_rows(self.isa, panels, a, 0..m, 0..k, &mut scratch[..m * steps]);
                Rows { start: scratch.as_ptr().cast(), row: 4, unit: Distance::Panels(steps), lowest }
            }
        }
    }
}

/// The units of an A.
struct Rows {
    start: *const u8,
    /// Bytes from row to row.
    row: usize,
    unit: Distance,
    /// See `pack`.
    lowest: u32,
}

/// From unit to unit.
enum Distance {
    Bytes(usize),
    /// Panels of rows with so many steps, each as wide as a tile is high.
    Panels(usize),
}

impl Rows {
    /// Where a tile of `height` rows begins, and the bytes from unit to unit.
    fn at(&self, row: usize, step: usize, height: usize) -> (*const u8, usize) {
        match self.unit {
            Distance::Bytes(unit) => (self.start.wrapping_add(row * self.row + step * unit), unit),
            Distance::Panels(steps) => (self.start.wrapping_add(4 * (row * steps + step * height)), 4 * height),
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
