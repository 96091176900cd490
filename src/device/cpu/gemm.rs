//! Matrix products, blocked for caches and spread over threads: C[m, n] from A[m, k] and B[k, n].
//!
//! K is walked in passes; in a pass, B is packed in chunks of columns that all threads share, and tasks of some rows of A and some
//! panels of B compute tiles. Sums of a pass that does not finish its chains wait in f32.
//!
//! Invariant: an element of C is made of chains (see `micro`) that depend on K and `segment` alone. `product` is one chain over all of K.
//! `accumulate` adds one chain for each segment to C, in order.
#![allow(unsafe_code)]

use crate::device::cpu::micro::{COLUMNS, Micro, ROWS, Rounded, Sums, Tile, Unit};
use crate::device::cpu::pack::{ANY, Along, Operand, RowPanels, can_cross, pack, pack_across, pack_rows};
use crate::device::cpu::pages::Pages;
use crate::device::cpu::{Cpu, Isa, few, vector};
use crate::dtype::{Dtype, Element};
use std::ops::Range;

/// Units of packed B that all threads share: 4 MiB, so that it lies in the last-level cache together with what streams by.
const CHUNK_UNITS: usize = 1 << 20;
/// Units of A that a task packs for itself: 256 KiB, in its L2 and on its stack.
const BLOCK_UNITS: usize = 1 << 16;
/// Units along K of one pass, so that eight rows of A fit into `BLOCK_UNITS`.
const PASS_UNITS: usize = BLOCK_UNITS / ROWS / 2;
/// Units along K of one pass where sums may wait anywhere.
const NEAR_UNITS: usize = 1024;
/// Elements along K of one pass of `product`: a product of narrow numbers over a longer K needs `waiting` sums.
pub const PASS_ELEMENTS: usize = PASS_UNITS;
/// Units behind each packed panel, of which the first notes the lowest exponent in it.
const NOTE_UNITS: usize = 16;
/// A buffer for packed columns of B.
#[derive(Debug)]
pub struct Panels(Pages);

/// Units that begin at a cache line.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u32; 16]);

impl Default for Panels {
    fn default() -> Panels {
        Panels(Pages::zeroed(CHUNK_UNITS * 4))
    }
}

impl Panels {
    pub fn units(&mut self) -> &mut [u32] {
        bytemuck::cast_slice_mut(self.0.bytes_mut())
    }
}

/// The stretch of K of one pass: its chains, and how they begin and end.
struct Pass<'a> {
    /// Each is one chain, or a piece of the one chain of a `product`.
    pieces: &'a [Range<usize>],
    /// Sums of an earlier pass, or those that are added to, are there.
    resume: bool,
    last: bool,
}

/// Where a product goes.
enum Sink<'a, T> {
    Write { out: *mut T, waiting: *mut f32, bias: Option<&'a [T]> },
    Add { out: *mut f32 },
}

/// One call: what every task knows.
struct Product<'a, T> {
    isa: Isa,
    micro: Micro,
    a: Operand<'a, T>,
    b: Operand<'a, T>,
    rows: usize,
    columns: usize,
    sink: Sink<'a, T>,
}

/// SAFETY: the pointers of a sink are written by tasks, and no two tasks share an element of C.
unsafe impl<T: Sync> Sync for Product<'_, T> {}

/// Whether `product` into `dtype` over `k` elements needs `waiting` sums.
pub fn needs_waiting(dtype: Dtype, k: usize) -> bool {
    dtype != Dtype::F32 && k > PASS_ELEMENTS
}

/// out[m, n] = A[m, k] B[k, n] (+ bias[n]), one chain for each element, rounded once. `waiting` is f32 [m, n] where `needs_waiting`.
pub fn product<T: Element>(
    cpu: &Cpu,
    a: Operand<'_, T>,
    b: Operand<'_, T>,
    [m, n, k]: [usize; 3],
    bias: Option<&[T]>,
    waiting: Option<&mut [f32]>,
    out: &mut [T],
) {
    assert_eq!(out.len(), m * n, "an output of {m} x {n}");
    assert!(bias.is_none_or(|bias| bias.len() == n), "a bias for {n} columns");
    assert!(k > 0, "a sum over at least one product");
    if m == 0 || n == 0 {
        return;
    }
    a.check(m, k);
    b.check(n, k);
    if m <= ROWS {
        return few::product(cpu, a, b, [m, n, k], bias, out);
    }
    let out: *mut T = out.as_mut_ptr();
    let waiting = match waiting {
        Some(waiting) => {
            assert_eq!(waiting.len(), m * n, "waiting sums for {m} x {n}");
            waiting.as_mut_ptr()
        }
        None => {
            assert!(!needs_waiting(T::DTYPE, k), "{k} products are more than one pass");
            out.cast()
        }
    };
    let micro = Micro::new(cpu.isa, T::DTYPE);
    // Sums of f32 wait in the output itself, so its passes can be as short as the caches like.
    let most = if T::DTYPE == Dtype::F32 { NEAR_UNITS } else { PASS_UNITS };
    let count = micro.unit.count(k).div_ceil(most);
    // Pieces of one length but for the last, whole pairs all of them.
    let step = k.div_ceil(count).next_multiple_of(2);
    let product = Product { isa: cpu.isa, micro, a, b, rows: m, columns: n, sink: Sink::Write { out, waiting, bias } };
    for start in (0..k).step_by(step) {
        let piece = start..k.min(start + step);
        product.run(cpu, &Pass { resume: start > 0, last: piece.end == k, pieces: std::slice::from_ref(&piece) });
    }
}

/// out[m, n] += A[m, k] B[k, n]: one chain for each of `segments` of K, added to `out` in order. `fresh`: `out` counts as zero, and is
/// not read.
pub fn accumulate<T: Element>(
    cpu: &Cpu,
    a: Operand<'_, T>,
    b: Operand<'_, T>,
    [m, n, k]: [usize; 3],
    segments: &[Range<usize>],
    out: &mut [f32],
    fresh: bool,
) {
    assert_eq!(out.len(), m * n, "an output of {m} x {n}");
    if m == 0 || n == 0 || k == 0 {
        if fresh {
            out.fill(0.0);
        }
        return;
    }
    a.check(m, k);
    b.check(n, k);
    let micro = Micro::new(cpu.isa, T::DTYPE);
    let product = Product { isa: cpu.isa, micro, a, b, rows: m, columns: n, sink: Sink::Add { out: out.as_mut_ptr() } };
    let mut left = segments;
    let mut resume = !fresh;
    while let Some(first) = left.first() {
        let mut units = micro.unit.count(first.len());
        assert!(units <= PASS_UNITS && first.end <= k, "a segment of {units} units that ends at {} of {k}", first.end);
        let mut taken = 1;
        for next in &left[1..] {
            units += micro.unit.count(next.len());
            if units > PASS_UNITS / 4 {
                break;
            }
            taken += 1;
        }
        product.run(cpu, &Pass { pieces: &left[..taken], resume, last: true });
        (left, resume) = (&left[taken..], true);
    }
}

impl<T: Element> Product<'_, T> {
    fn run(&self, cpu: &Cpu, pass: &Pass<'_>) {
        let units = pass.units(self.micro.unit);
        let width = self.micro.lanes * self.micro.vectors;
        let panels = self.columns.div_ceil(width);
        let slot = units * width + NOTE_UNITS;
        let most = CHUNK_UNITS / slot;
        let chunk = panels.div_ceil(panels.div_ceil(most));
        let rows_of_task = (BLOCK_UNITS / units).clamp(self.micro.rows, 128) / self.micro.rows * self.micro.rows;
        let row_tasks = self.rows.div_ceil(rows_of_task);
        let mut shared = cpu.take_panels();
        for first in (0..panels).step_by(chunk) {
            let panels = first..panels.min(first + chunk);
            let buffer = &mut shared.units()[..panels.len() * slot];
            cpu.for_rows(buffer, slot, 1, |index, buffer| {
                self.pack_panels(pass, panels.start + index, slot, buffer);
            });
            let column_tasks = (4 * cpu.threads()).div_ceil(row_tasks).min(panels.len());
            let panels_of_task = panels.len().div_ceil(column_tasks);
            cpu.parallel(row_tasks * column_tasks, |task| {
                let (row, column) = (task % row_tasks * rows_of_task, panels.start + task / row_tasks * panels_of_task);
                let rows = row..self.rows.min(row + rows_of_task);
                let mine = column..panels.end.min(column + panels_of_task);
                if !mine.is_empty() {
                    let packed = &buffer[(mine.start - panels.start) * slot..(mine.end - panels.start) * slot];
                    self.task(pass, rows, mine, packed);
                }
            });
        }
        cpu.give_panels(shared);
    }

    /// The columns of a panel of B, and how wide it is packed: whole vectors.
    fn panel_columns(&self, panel: usize) -> (Range<usize>, usize) {
        let (lanes, vectors) = (self.micro.lanes, self.columns.div_ceil(self.micro.lanes));
        let vectors = self.micro.panels(vectors).nth(panel).expect("a panel of this product");
        (vectors.start * lanes..self.columns.min(vectors.end * lanes), vectors.len() * lanes)
    }

    /// Packs the panels from `first` on, as many as `buffer` has slots for.
    fn pack_panels(&self, pass: &Pass<'_>, first: usize, slot: usize, buffer: &mut [u32]) {
        let all: Vec<_> = (first..first + buffer.len() / slot).map(|panel| self.panel_columns(panel)).collect();
        if !can_cross(self.isa, self.micro.unit, &self.b) || all.iter().any(|(columns, width)| columns.len() != *width) {
            for (panel, to) in (first..).zip(buffer.chunks_exact_mut(slot)) {
                self.pack_panel(pass, panel, to);
            }
            return;
        }
        let mut begin = 0;
        for piece in pass.pieces {
            let count = self.micro.unit.count(piece.len());
            let places = all.iter().zip(buffer.chunks_exact_mut(slot));
            let mut places: Vec<_> = places
                .map(|((columns, width), to)| {
                    to[slot - NOTE_UNITS] = ANY;
                    (columns.clone(), &mut to[begin * width..(begin + count) * width])
                })
                .collect();
            pack_across(self.micro.unit, &self.b, piece.clone(), &mut places);
            begin += count;
        }
    }

    fn pack_panel(&self, pass: &Pass<'_>, panel: usize, to: &mut [u32]) {
        let (columns, width) = self.panel_columns(panel);
        let (mut to, note) = to.split_at_mut(to.len() - NOTE_UNITS);
        note[0] = ANY;
        for piece in pass.pieces {
            let (now, later) = to.split_at_mut(self.micro.unit.count(piece.len()) * width);
            note[0] = note[0].min(pack(self.isa, self.micro.unit, &self.b, columns.clone(), piece.clone(), width, now));
            to = later;
        }
    }

    /// All tiles of `rows` and `panels`; `packed` holds those panels.
    fn task(&self, pass: &Pass<'_>, rows: Range<usize>, panels: Range<usize>, packed: &[u32]) {
        let units = pass.units(self.micro.unit);
        let slot = packed.len() / panels.len();
        let mut block;
        assert!(rows.len() * units <= BLOCK_UNITS || self.reads_in_place(pass), "{} rows of {units} units", rows.len());
        let tiles: Vec<Rows> = if self.reads_in_place(pass) {
            let start = |row| self.a.data[self.a.index(row, pass.pieces[0].start)..].as_ptr().cast();
            let row_bytes = self.a.stride * size_of::<T>();
            self.tiles(&rows).map(|tile| Rows { at: start(tile.start), row: row_bytes, unit: 4, rows: tile, lowest: ANY }).collect()
        } else {
            block = [Line([0; 16]); BLOCK_UNITS / 16];
            let to = &mut bytemuck::cast_slice_mut::<Line, u32>(&mut block)[..rows.len() * units];
            let mut panels = RowPanels { unit: self.micro.unit, height: self.micro.rows, steps: units, first: 0 };
            let mut lowest = ANY;
            for piece in pass.pieces {
                lowest = lowest.min(pack_rows(self.isa, panels, &self.a, rows.clone(), piece.clone(), to));
                panels.first += self.micro.unit.count(piece.len());
            }
            let start = |row| to[(row - rows.start) * units..].as_ptr().cast();
            self.tiles(&rows).map(|tile| Rows { at: start(tile.start), row: 4, unit: 4 * tile.len(), rows: tile, lowest }).collect()
        };
        let mut near = [0f32; ROWS * COLUMNS];
        for panel in panels.clone() {
            let (columns, packed_width) = self.panel_columns(panel);
            let packed = &packed[(panel - panels.start) * slot..][..slot];
            for tile in &tiles {
                self.tile(pass, tile, columns.clone(), packed_width, packed, &mut near);
            }
        }
    }

    fn tiles(&self, rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<T> {
        let (height, end) = (self.micro.rows, rows.end);
        rows.clone().step_by(height).map(move |row| row..end.min(row + height))
    }

    /// Whether tiles can read rows of A where they lie: units are runs of memory, and the last pair is whole.
    fn reads_in_place(&self, pass: &Pass<'_>) -> bool {
        let unit = self.micro.unit;
        let whole = unit.elements() == 1 || (pass.pieces.len() == 1 && pass.pieces[0].len().is_multiple_of(unit.elements()));
        whole && unit.lies_in_memory(T::DTYPE) && self.a.along == Along::K
    }

    /// `near`: room for the sums of one tile.
    fn tile(
        &self,
        pass: &Pass<'_>,
        a: &Rows,
        columns: Range<usize>,
        packed_width: usize,
        packed: &[u32],
        near: &mut [f32; ROWS * COLUMNS],
    ) {
        let vectors = packed_width / self.micro.lanes;
        let whole = columns.len() == packed_width;
        let place = a.rows.start * self.columns + columns.start;
        let floats: Option<*mut f32> = match self.sink {
            Sink::Add { out } => Some(out),
            Sink::Write { waiting, .. } if !pass.last => Some(waiting),
            Sink::Write { out, bias: None, .. } if T::DTYPE == Dtype::F32 => Some(out.cast()),
            Sink::Write { .. } => None,
        };
        let sums = match self.sink {
            Sink::Add { .. } if pass.resume => Sums::Add,
            Sink::Add { .. } => Sums::Begin,
            Sink::Write { .. } if pass.resume => Sums::Resume,
            Sink::Write { .. } => Sums::Store,
        };
        let lowest = a.lowest + packed[packed.len() - NOTE_UNITS];
        let near: *mut f32 = near.as_mut_ptr();
        let (a_at, b) = (a.at, packed.as_ptr());
        let at = Tile { units: 0, a: a_at, a_row: a.row, a_unit: a.unit, b, c: near, c_row: packed_width, sums, rounded: None, lowest };
        // SAFETY: packed panels and rows of A hold all units of the pass; C is written in the rows and columns of this tile only, which
        // belong to this task, and in whole vectors only where they exist.
        unsafe {
            match floats {
                Some(floats) if whole => self.chains(pass, a, vectors, Tile { c: floats.add(place), c_row: self.columns, ..at }),
                Some(floats) => {
                    let far = floats.add(place);
                    if pass.resume {
                        copy(far, self.columns, near, packed_width, a.rows.len(), columns.len());
                    }
                    self.chains(pass, a, vectors, at);
                    copy(near, packed_width, far, self.columns, a.rows.len(), columns.len());
                }
                None => {
                    let Sink::Write { out, waiting, bias } = self.sink else { unreachable!("sums are added in f32") };
                    if whole && T::DTYPE == Dtype::Bf16 {
                        let bias = bias.map(|bias| bias[columns.clone()].as_ptr().cast());
                        let rounded = Some(Rounded { out: out.add(place).cast(), row: self.columns, bias });
                        // The earlier sums, if any, are read where they wait.
                        let c = if pass.resume { waiting.add(place) } else { near };
                        return self.chains(pass, a, vectors, Tile { c, c_row: self.columns, rounded, ..at });
                    }
                    if pass.resume {
                        copy(waiting.add(place), self.columns, near, packed_width, a.rows.len(), columns.len());
                    }
                    self.chains(pass, a, vectors, at);
                    let bias = bias.map(|bias| &bias[columns.clone()]);
                    for row in 0..a.rows.len() {
                        let sums = std::slice::from_raw_parts(near.add(row * packed_width), columns.len());
                        let to = std::slice::from_raw_parts_mut(out.add(place + row * self.columns), columns.len());
                        vector::finish(self.isa, sums, bias, to);
                    }
                }
            }
        }
    }

    /// The chains of a pass, one after the other.
    ///
    /// # Safety
    /// `tile` must point at the operands of the whole pass and at sums that this call alone uses.
    unsafe fn chains(&self, pass: &Pass<'_>, a: &Rows, vectors: usize, mut tile: Tile) {
        for piece in pass.pieces {
            tile.units = self.micro.unit.count(piece.len());
            // SAFETY: what the caller vouches for; the processor has what `micro` needs, since it was made for this processor's `isa`.
            unsafe { self.micro.run(a.rows.len(), vectors, &tile) };
            if tile.sums == Sums::Begin {
                tile.sums = Sums::Add;
            }
            tile.a = tile.a.wrapping_add(tile.units * tile.a_unit);
            tile.b = tile.b.wrapping_add(tile.units * vectors * self.micro.lanes);
        }
    }
}

/// Rows of A of one tile, as `Tile` wants them.
struct Rows {
    at: *const u8,
    row: usize,
    unit: usize,
    rows: Range<usize>,
    /// See `pack`.
    lowest: u32,
}

impl Pass<'_> {
    fn units(&self, unit: Unit) -> usize {
        self.pieces.iter().map(|piece| unit.count(piece.len())).sum()
    }
}

/// Copies a small matrix.
///
/// # Safety
/// Both must have `rows` rows of `columns` elements and not overlap.
unsafe fn copy(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize, rows: usize, columns: usize) {
    for row in 0..rows {
        // SAFETY: what the caller vouches for.
        unsafe { std::ptr::copy_nonoverlapping(from.add(row * from_stride), to.add(row * to_stride), columns) };
    }
}
