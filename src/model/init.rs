//! Initial weights as a function of (seed, public name, place in the public tensor).
//!
//! Invariant: the value of a weight does not depend on any layout, because nothing but its place in the global tensor goes in.

use crate::plan::catalog::{Start, Unit};
use crate::plan::layout::Piece;
use crate::rng::Stream;
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

/// Elements that one task of the thread pool writes.
const GRAIN: usize = 1 << 14;

/// Writes the initial values of `pieces` to their places in `flat`.
pub fn fill(seed: u64, unit: &Unit, pieces: &[Piece], flat: &mut [f32]) {
    for piece in pieces {
        // Entries that share a public tensor start alike.
        let entry = unit.entries.iter().find(|entry| entry.name == piece.name).expect("a piece belongs to an entry of its unit");
        let out = &mut flat[piece.flat.clone()];
        match entry.start {
            Start::One => out.fill(1.0),
            Start::Zero => out.fill(0.0),
            Start::Normal(deviation) => normal(&Stream::new(seed, &piece.name), deviation, piece, out),
        }
    }
}

fn normal(stream: &Stream, deviation: f64, piece: &Piece, out: &mut [f32]) {
    let columns = *piece.shape.last().expect("a tensor has dims") as u64;
    let (row, column) = match piece.start[..] {
        [column] => (0, column),
        [row, column] => (row, column),
        _ => unreachable!("pieces have one or two dims"),
    };
    // The dim that runs fastest in our flat run: columns of the public tensor, or its rows where it is transposed.
    let fast = if piece.transposed { piece.size[0] } else { *piece.size.last().expect("a box has dims") };
    out.par_chunks_mut(GRAIN).enumerate().for_each(|(chunk, out)| {
        for (i, value) in out.iter_mut().enumerate() {
            let at = chunk * GRAIN + i;
            let (slow, fast) = (at / fast, at % fast);
            let (i, j) = if piece.transposed { (fast, slow) } else { (slow, fast) };
            let index = (row + i) as u64 * columns + (column + j) as u64;
            *value = (stream.normal(index) * deviation) as f32;
        }
    });
}
