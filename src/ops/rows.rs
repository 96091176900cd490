//! How the CPU paths of ops are split over threads: by rows of what they write.
//!
//! Invariant: every row is written by exactly one call of `work`, which gets it whole.

use crate::device::cpu::widest::widest;
use crate::device::cpu::{Cpu, Isa};
use crate::dtype::Stored;
use std::ops::Range;
use std::slice::ChunksExactMut;

/// Elements that are worth handing to another thread.
const WORTHWHILE: usize = 8192;
/// Cuts fall on multiples of this many rows where there are enough of them, so that parts start on whole cache lines and vectors.
const ALIGNMENT: usize = 64;

/// What a part of the work writes: something that can be cut between two rows.
pub trait Split: Send + Sized {
    /// The rows before `row`, and the others.
    fn split(self, row: usize) -> (Self, Self);
}

/// Rows of `columns` elements.
pub struct Rows<'a, T> {
    pub elements: &'a mut [T],
    columns: usize,
}

impl<'a, T: Stored> Rows<'a, T> {
    pub fn new(elements: &'a mut [T], columns: usize) -> Rows<'a, T> {
        assert!(columns > 0 && elements.len().is_multiple_of(columns), "{} elements in rows of {columns}", elements.len());
        Rows { elements, columns }
    }

    pub fn each(self) -> ChunksExactMut<'a, T> {
        self.elements.chunks_exact_mut(self.columns)
    }
}

impl<T: Stored> Split for Rows<'_, T> {
    fn split(self, row: usize) -> (Self, Self) {
        let (before, after) = self.elements.split_at_mut(row * self.columns);
        (Rows { elements: before, columns: self.columns }, Rows { elements: after, columns: self.columns })
    }
}

impl<A: Split, B: Split> Split for (A, B) {
    fn split(self, row: usize) -> (Self, Self) {
        let (a, b) = (self.0.split(row), self.1.split(row));
        ((a.0, b.0), (a.1, b.1))
    }
}

impl<A: Split> Split for Option<A> {
    fn split(self, row: usize) -> (Self, Self) {
        self.map(|all| all.split(row)).unzip()
    }
}

/// Calls `work` on consecutive ranges that tile `0..rows`, each with its share of `out`. `cost`: elements touched for one row.
/// A closure marked `#[inline(always)]` becomes vector code.
pub fn over_rows<S: Split>(cpu: &Cpu, rows: usize, cost: usize, out: S, work: impl Fn(Range<usize>, S) + Sync) {
    let parts = (rows * cost / WORTHWHILE).min(cpu.threads() * 4);
    if parts <= 1 || cpu.threads() == 1 {
        halve(cpu.isa(), 0..rows, rows, out, &work);
    } else {
        cpu.install(|| halve(cpu.isa(), 0..rows, rows.div_ceil(parts), out, &work));
    }
}

fn halve<S: Split>(isa: Isa, rows: Range<usize>, most: usize, out: S, work: &(impl Fn(Range<usize>, S) + Sync)) {
    if rows.len() <= most {
        return widest(
            isa,
            #[inline(always)]
            || work(rows, out),
        );
    }
    let half = rows.len() / 2;
    let half = if half > ALIGNMENT { half.next_multiple_of(ALIGNMENT).min(rows.len()) } else { half };
    let (before, after) = out.split(half);
    let middle = rows.start + half;
    rayon::join(|| halve(isa, rows.start..middle, most, before, work), || halve(isa, middle..rows.end, most, after, work));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_written_once_by_its_own_index() {
        for threads in [1, 2, 3] {
            let cpu = Cpu::new(threads);
            for rows in [0, 1, 2, 63, 64, 65, 1000] {
                let (mut wide, mut narrow) = (vec![0u32; rows * 3], vec![0u32; rows]);
                over_rows(&cpu, rows, 5000, (Rows::new(&mut wide, 3), Rows::new(&mut narrow, 1)), |range, (wide, narrow)| {
                    for ((row, wide), narrow) in range.zip(wide.each()).zip(narrow.elements) {
                        wide.iter_mut().for_each(|x| *x += row as u32 + 1);
                        *narrow += row as u32 + 1;
                    }
                });
                assert!(narrow.iter().enumerate().all(|(row, &x)| x == row as u32 + 1));
                assert!(wide.iter().enumerate().all(|(i, &x)| x == (i / 3) as u32 + 1));
            }
        }
    }
}
