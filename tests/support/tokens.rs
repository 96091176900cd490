//! Tokens that are a function of (step, row), for runs that need no corpus.

use ferrotron::data::loader::Batch;
use ferrotron::rng::Stream;

/// Rows of the step, each a function of (step, row).
pub fn batch(step: u64, rows: &[usize], t: usize, vocabulary: usize) -> Batch {
    let stream = Stream::new(3, "tokens");
    let token = |row: usize, i: usize| {
        let draw = stream.uniform((step * 1_000 + row as u64) * 10_000 + i as u64);
        // Small ids are more frequent: there is something to learn.
        (draw * draw * vocabulary as f64) as u32
    };
    let each = |offset: usize| rows.iter().flat_map(|&row| (0..t).map(move |i| token(row, i + offset))).collect();
    Batch {
        rows: rows.to_vec(),
        seq_len: t,
        inputs: each(0),
        targets: each(1),
        positions: rows.iter().flat_map(|_| 0..t as u32).collect(),
        starts: vec![0; rows.len() * t],
    }
}
