//! Runs whose numbers are known: tensors whose every element is a function of its position, cut over ranks in a given way.

use ferrotron::checkpoint::index::{Facts, Geometry, Kind};
use ferrotron::checkpoint::load::Checkpoint;
use ferrotron::checkpoint::save::{Options, Shard, Writer};
use ferrotron::dtype::{Dtype, Element};
use ferrotron::plan::layout::Piece;
use half::{bf16, f16};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A folder of its own for a test, removed at the end.
pub struct Scratch(pub PathBuf);

static SCRATCHES: AtomicU64 = AtomicU64::new(0);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        let number = SCRATCHES.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("ferrotron-{name}-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a scratch folder");
        Scratch(folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The value of an element: small enough in magnitude to be exact in every dtype, different from step to step and kind to kind.
pub fn value(kind: Kind, step: u64, name: &str, index: usize) -> f32 {
    let seed = name.bytes().fold(step * 31 + kind as u64 * 7, |sum, byte| sum * 131 % 1_000_003 + u64::from(byte));
    ((seed + index as u64 * 2_654_435_761) % 255) as f32 - 127.0
}

pub fn facts(step: u64) -> Facts {
    let geometry = Geometry { shards: 2, lanes: 4, order: "lanes".to_owned() };
    let state = serde_json::json!({ "loss_scale": 1024.5, "good_steps": 3 });
    Facts { step, tokens: step * 1000, seed: 1, geometry, state, config: "[run]\nseed = 1\n".to_owned() }
}

/// The flat buffer that holds the pieces: their values, and a mark wherever there is no piece.
pub fn flat(kind: Kind, step: u64, dtype: Dtype, pieces: &[Piece], elements: usize) -> Vec<u8> {
    let mut numbers = vec![-999.0; elements];
    for piece in pieces {
        let (rows, columns) = if piece.size.len() == 2 { (piece.size[0], piece.size[1]) } else { (1, piece.size[0]) };
        let (row, column) = if piece.size.len() == 2 { (piece.start[0], piece.start[1]) } else { (0, piece.start[0]) };
        let width = *piece.shape.last().expect("a dim");
        for i in 0..rows {
            for j in 0..columns {
                let at = if piece.transposed { j * rows + i } else { i * columns + j };
                numbers[piece.flat.start + at] = value(kind, step, &piece.name, (row + i) * width + column + j);
            }
        }
    }
    encode(&numbers, dtype)
}

pub fn encode(numbers: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::Bf16 => numbers.iter().flat_map(|&x| <bf16 as Element>::from_f32(x).to_le_bytes()).collect(),
        Dtype::F16 => numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::U32 => numbers.iter().flat_map(|&x| (x as u32).to_le_bytes()).collect(),
    }
}

/// What every rank holds: pieces, and the length of the buffer they lie in.
pub type Cut = Vec<(Vec<Piece>, usize)>;

/// The same three tensors cut over 1, 2, 3, 4, 6 or 12 ranks: two matrices by rows and by columns, one of them transposed, and a vector.
pub fn simple_cut(ranks: usize) -> Cut {
    (0..ranks)
        .map(|rank| {
            let piece = |name: &str, shape: [usize; 2], start: [usize; 2], size: [usize; 2], transposed, at: usize| Piece {
                name: name.to_owned(),
                shape: shape.to_vec(),
                start: start.to_vec(),
                size: size.to_vec(),
                transposed,
                flat: at..at + size[0] * size[1],
            };
            let part = 12 / ranks;
            let by_rows = piece("model.up.weight", [12, 6], [part * rank, 0], [part, 6], false, 0);
            let by_columns = piece("h.0.c_attn.weight", [5, 12], [0, part * rank], [5, part], true, 6 * part);
            let norm = (rank == 0).then(|| Piece {
                name: "norm.weight".to_owned(),
                shape: vec![7],
                start: vec![0],
                size: vec![7],
                transposed: false,
                flat: 11 * part + 1..11 * part + 8,
            });
            ([by_rows, by_columns].into_iter().chain(norm).collect(), 11 * part + 9)
        })
        .collect()
}

pub fn shards(cut: &Cut, rank: usize, step: u64, kinds: &[(Kind, Dtype)]) -> Vec<Shard> {
    let (pieces, elements) = &cut[rank];
    let shard =
        |&(kind, dtype): &(Kind, Dtype)| Shard { kind, dtype, pieces: pieces.clone(), bytes: flat(kind, step, dtype, pieces, *elements) };
    kinds.iter().map(shard).collect()
}

pub const KINDS: [(Kind, Dtype); 4] =
    [(Kind::Weights, Dtype::Bf16), (Kind::Master, Dtype::F32), (Kind::ExpAvg, Dtype::F32), (Kind::ExpAvgSq, Dtype::F32)];

pub fn options(checkpoints: &Path, rank: usize, world: usize) -> Options {
    let deadline = Duration::from_secs(20);
    Options { checkpoints: checkpoints.to_owned(), rank, world, incarnation: 0, keep: 0, deadline }
}

pub fn writers(checkpoints: &Path, world: usize, change: impl Fn(&mut Options)) -> Vec<Writer> {
    (0..world)
        .map(|rank| {
            let mut options = options(checkpoints, rank, world);
            change(&mut options);
            Writer::new(options).expect("a writer")
        })
        .collect()
}

/// All ranks save a step and wait for it.
pub fn save(writers: &mut [Writer], cut: &Cut, step: u64) -> Vec<anyhow::Result<()>> {
    for (rank, writer) in writers.iter_mut().enumerate() {
        writer.save(facts(step), shards(cut, rank, step, &KINDS)).expect("arguments are sound");
    }
    writers.iter_mut().map(Writer::finish).collect()
}

pub fn save_well(writers: &mut [Writer], cut: &Cut, step: u64) {
    for result in save(writers, cut, step) {
        result.expect("a save with nothing in its way");
    }
}

/// Fails unless the checkpoint reads as the state of `step`, cut this way, in its own dtypes.
pub fn check(checkpoint: &Checkpoint, cut: &Cut, step: u64) {
    assert_eq!(checkpoint.index.facts, facts(step));
    for (kind, dtype) in KINDS {
        for (pieces, elements) in cut {
            let mut out = encode(&vec![-999.0; *elements], dtype);
            checkpoint.read(kind, pieces, dtype, &mut out).expect("a sound checkpoint");
            assert!(out == flat(kind, step, dtype, pieces, *elements), "{kind} of step {step}");
        }
    }
}
