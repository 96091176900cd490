//! Initial weights as a function of (seed, public name, place in the public tensor).
//!
//! Invariant: the value of a weight does not depend on any layout or machine, because nothing but its place in the global tensor goes in,
//! and vector instructions of any width give the same bits.

use crate::device::cpu::Isa;
use crate::device::cpu::widest::widest;
use crate::plan::catalog::{Start, Unit};
use crate::plan::layout::{Piece, Places};
use crate::rng::{PAIRS, Stream};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

/// Elements that one task of the thread pool writes at least: whole blocks of pairs.
const GRAIN: usize = 128 * 2 * PAIRS;

/// Writes the initial values of `pieces` to their places in `flat`.
pub fn fill(isa: Isa, seed: u64, unit: &Unit, pieces: &[Piece], flat: &mut [f32]) {
    for piece in pieces {
        // Entries that share a public tensor start alike.
        let entry = unit.entries.iter().find(|entry| entry.name == piece.name).expect("a piece belongs to an entry of its unit");
        let out = &mut flat[piece.flat.clone()];
        match entry.start {
            Start::One => out.fill(1.0),
            Start::Zero => out.fill(0.0),
            Start::Normal(deviation) => Normals { isa, stream: Stream::new(seed, &piece.name), deviation }.fill(piece, out),
        }
    }
}

/// Element i of a public tensor is normal i of its stream, times the deviation.
struct Normals {
    isa: Isa,
    stream: Stream,
    deviation: f64,
}

impl Normals {
    fn fill(&self, piece: &Piece, out: &mut [f32]) {
        let Places { first, length, near, far } = piece.places();
        let length = length as usize;
        if near != 1 {
            self.transposed(first, near, length, out);
        } else if length == out.len() {
            out.par_chunks_mut(GRAIN).enumerate().for_each(|(chunk, out)| self.run(first + (chunk * GRAIN) as u64, out));
        } else {
            let rows = out.par_chunks_mut(length).with_min_len(GRAIN.div_ceil(length));
            rows.enumerate().for_each(|(row, out)| self.run(first + row as u64 * far, out));
        }
    }

    /// Elements `first`, `first` + 1, ... of the public tensor.
    fn run(&self, first: u64, mut out: &mut [f32]) {
        let Normals { isa, stream, deviation } = self;
        let (mut even, mut odd) = ([0.0; PAIRS], [0.0; PAIRS]);
        let (mut pair, mut before) = (first / 2, (first % 2) as usize);
        widest(
            *isa,
            #[inline(always)]
            || {
                while !out.is_empty() {
                    let mut block = [0f32; 2 * PAIRS];
                    stream.normal_pairs(
                        #[inline(always)]
                        |lane| pair + lane as u64,
                        &mut even,
                        &mut odd,
                    );
                    for lane in 0..PAIRS {
                        block[2 * lane] = (even[lane] * deviation) as f32;
                        block[2 * lane + 1] = (odd[lane] * deviation) as f32;
                    }
                    let now = out.split_off_mut(..out.len().min(2 * PAIRS - before)).expect("no more than there is");
                    now.copy_from_slice(&block[before..before + now.len()]);
                    (pair, before) = (pair + PAIRS as u64, 0);
                }
            },
        );
    }

    /// A box whose columns lie in `out` as lines of `length` elements: neighbours in a line are `columns` apart in the public tensor.
    fn transposed(&self, first: u64, columns: u64, length: usize, out: &mut [f32]) {
        let least = GRAIN.div_ceil(2 * length);
        if columns % 2 == 1 {
            // The two of a pair are in different lines here and there.
            let lines = out.par_chunks_mut(length).with_min_len(least);
            return lines.enumerate().for_each(|(line, out)| self.line(first + line as u64, columns, out));
        }
        let alone = (first % 2) as usize;
        let (before, pairs) = out.split_at_mut(alone * length);
        self.line(first, columns, before);
        pairs.par_chunks_mut(2 * length).with_min_len(least).enumerate().for_each(|(pair, out)| {
            let first = first + (alone + 2 * pair) as u64;
            match out.split_at_mut_checked(length) {
                Some((even, odd)) if !odd.is_empty() => self.lines(first, columns, even, odd),
                _ => self.line(first, columns, out),
            }
        });
    }

    /// Two lines side by side, of which the first has even elements and the second the odd ones after them.
    fn lines(&self, first: u64, step: u64, left: &mut [f32], right: &mut [f32]) {
        let Normals { isa, stream, deviation } = self;
        let (mut even, mut odd) = ([0.0; PAIRS], [0.0; PAIRS]);
        let mut pair = first / 2;
        widest(
            *isa,
            #[inline(always)]
            || {
                for (left, right) in left.chunks_mut(PAIRS).zip(right.chunks_mut(PAIRS)) {
                    stream.normal_pairs(
                        #[inline(always)]
                        |lane| pair + lane as u64 * (step / 2),
                        &mut even,
                        &mut odd,
                    );
                    left.iter_mut().zip(&even).for_each(|(out, normal)| *out = (normal * deviation) as f32);
                    right.iter_mut().zip(&odd).for_each(|(out, normal)| *out = (normal * deviation) as f32);
                    pair += PAIRS as u64 * (step / 2);
                }
            },
        );
    }

    /// Elements `first`, `first` + `step`, ...
    fn line(&self, mut first: u64, step: u64, out: &mut [f32]) {
        let Normals { isa, stream, deviation } = self;
        let (mut even, mut odd) = ([0.0; PAIRS], [0.0; PAIRS]);
        widest(
            *isa,
            #[inline(always)]
            || {
                for out in out.chunks_mut(PAIRS) {
                    stream.normal_pairs(
                        #[inline(always)]
                        |lane| (first + lane as u64 * step) / 2,
                        &mut even,
                        &mut odd,
                    );
                    for (lane, out) in out.iter_mut().enumerate() {
                        let normal = if (first + lane as u64 * step).is_multiple_of(2) { even[lane] } else { odd[lane] };
                        *out = (normal * deviation) as f32;
                    }
                    first += PAIRS as u64 * step;
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A box of a tensor of `shape`, from `start`.
    fn piece(shape: [usize; 2], start: [usize; 2], size: [usize; 2], transposed: bool) -> Piece {
        let name = "h.0.weight".to_string();
        Piece { name, shape: shape.to_vec(), start: start.to_vec(), size: size.to_vec(), transposed, flat: 0..size[0] * size[1] }
    }

    #[test]
    fn every_box_at_every_level_has_the_values_of_its_places() {
        let stream = Stream::new(5, "h.0.weight");
        let boxes = [
            ([3, 50_001], [0, 0], [3, 50_001]),
            ([700, 96], [3, 0], [650, 96]),
            ([9, 301], [2, 7], [5, 290]),
            ([64, 300], [1, 5], [60, 133]),
            ([200, 41], [3, 4], [190, 30]),
            ([1, 1], [0, 0], [1, 1]),
        ];
        for (shape, start, size) in boxes {
            for transposed in [false, true] {
                let piece = piece(shape, start, size, transposed);
                for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|&isa| isa <= Isa::detect()) {
                    let mut out = vec![f32::NAN; size[0] * size[1]];
                    Normals { isa, stream, deviation: 0.02 }.fill(&piece, &mut out);
                    for (at, out) in out.iter().enumerate() {
                        let (i, j) = if transposed { (at % size[0], at / size[0]) } else { (at / size[1], at % size[1]) };
                        let index = ((start[0] + i) * shape[1] + start[1] + j) as u64;
                        let expected = (stream.normal(index) * 0.02) as f32;
                        assert_eq!(out.to_bits(), expected.to_bits(), "{piece:?}, {isa:?}, element {i}, {j}");
                    }
                }
            }
        }
    }
}
