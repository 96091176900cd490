//! How two checkpoints, or folders of Hugging Face weights, differ.
//!
//! Invariant: numbers are compared by their bits, so equal means that training goes on equally.

use crate::checkpoint::boxes::{converted, slabs};
use crate::checkpoint::folder;
use crate::checkpoint::import::HuggingFace;
use crate::checkpoint::index::{INDEX, Kind};
use crate::checkpoint::load::Checkpoint;
use crate::dtype::Dtype;
use crate::plan::layout::Piece;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Elements that are compared at once.
const SLAB: usize = 8 << 20;

pub struct Difference {
    /// Whether every tensor is on both sides with the same numbers.
    pub equal: bool,
    pub text: String,
}

enum Side {
    Checkpoint(Checkpoint),
    HuggingFace(HuggingFace),
}

type Listing = BTreeMap<String, (Vec<usize>, Dtype)>;

impl Side {
    fn open(path: &Path) -> Result<Side> {
        if folder::exists(&path.join(INDEX)).unwrap_or(false) {
            return Ok(Side::Checkpoint(Checkpoint::open(path)?));
        }
        let opened = HuggingFace::open(path).map(Side::HuggingFace);
        opened.with_context(|| format!("{} is neither a checkpoint nor a folder of Hugging Face weights", path.display()))
    }

    fn listing(&self, kind: Kind) -> Result<Listing> {
        match self {
            Side::Checkpoint(checkpoint) => {
                Ok(checkpoint.tensors(kind).map(|(name, tensor)| (name.to_owned(), (tensor.shape.clone(), tensor.dtype))).collect())
            }
            Side::HuggingFace(folder) => {
                folder.names().map(|name| folder.find(name).map(|(shape, dtype)| (name.to_owned(), (shape.to_vec(), dtype)))).collect()
            }
        }
    }

    fn read(&self, kind: Kind, piece: &Piece, dtype: Dtype) -> Result<Vec<u8>> {
        let mut bytes = vec![0; piece.flat.end * dtype.bytes()];
        let pieces = std::slice::from_ref(piece);
        match self {
            Side::Checkpoint(checkpoint) => checkpoint.read(kind, pieces, dtype, &mut bytes)?,
            Side::HuggingFace(folder) => folder.read(pieces, dtype, &mut bytes)?,
        }
        Ok(bytes)
    }

    /// The kind that stands for the model's weights: what an export writes.
    fn weights(&self) -> Kind {
        match self {
            Side::Checkpoint(checkpoint) if checkpoint.has(Kind::Master) => Kind::Master,
            _ => Kind::Weights,
        }
    }
}

/// Compares two checkpoints in all their kinds. With Hugging Face weights on a side, what the other would export is compared.
///
/// Where the dtypes of a tensor differ, the wider one is rounded to the narrower first, as an export does.
pub fn diff(left: &Path, right: &Path) -> Result<Difference> {
    let (left, right) = (Side::open(left)?, Side::open(right)?);
    let mut lines = Vec::new();
    let pairs: Vec<(Kind, Kind)> = match (&left, &right) {
        (Side::Checkpoint(left), Side::Checkpoint(right)) => {
            lines.extend(facts(left, right));
            Kind::ALL.into_iter().filter(|kind| left.has(*kind) || right.has(*kind)).map(|kind| (kind, kind)).collect()
        }
        _ => vec![(left.weights(), right.weights())],
    };
    let (mut compared, mut different) = (0, 0);
    for kinds in pairs {
        let (ours, theirs) = (left.listing(kinds.0)?, right.listing(kinds.1)?);
        let names: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
        for name in names {
            compared += 1;
            let line = match (ours.get(name), theirs.get(name)) {
                (Some(_), None) => Some("only on the left".to_owned()),
                (None, Some(_)) => Some("only on the right".to_owned()),
                (Some((ours, _)), Some((theirs, _))) if ours != theirs => {
                    Some(format!("shape {ours:?} on the left, {theirs:?} on the right"))
                }
                (Some((shape, ours)), Some((_, theirs))) => compare(&left, &right, kinds, name, shape, (*ours, *theirs))?,
                (None, None) => None,
            };
            if let Some(line) = line {
                different += 1;
                lines.push(format!("{:<10}  {name}: {line}", kinds.0));
            }
        }
    }
    lines.push(match different {
        0 => format!("all {compared} tensors are equal"),
        _ => format!("{different} of {compared} tensors differ"),
    });
    lines.push(String::new());
    Ok(Difference { equal: different == 0, text: lines.join("\n") })
}

/// What differs beside the tensors. It is told, and does not make checkpoints unequal.
fn facts(left: &Checkpoint, right: &Checkpoint) -> Vec<String> {
    let (left, right) = (&left.index.facts, &right.index.facts);
    let rows = [
        ("step", left.step.to_string(), right.step.to_string()),
        ("tokens", left.tokens.to_string(), right.tokens.to_string()),
        ("seed", left.seed.to_string(), right.seed.to_string()),
        ("geometry", format!("{:?}", left.geometry), format!("{:?}", right.geometry)),
        ("state", left.state.to_string(), right.state.to_string()),
    ];
    let mut lines: Vec<String> =
        rows.iter().filter(|(_, left, right)| left != right).map(|(name, left, right)| format!("{name}: {left} | {right}")).collect();
    if left.config != right.config {
        lines.push("the configurations differ".to_owned());
    }
    lines
}

/// What differs in a tensor that both sides have in the same shape; None: nothing.
fn compare(left: &Side, right: &Side, kinds: (Kind, Kind), name: &str, shape: &[usize], dtypes: (Dtype, Dtype)) -> Result<Option<String>> {
    let dtype = common(dtypes.0, dtypes.1);
    let (mut different, mut elements, mut largest) = (0u64, 0u64, 0f32);
    for slab in slabs(name, shape, SLAB)? {
        elements += slab.flat.len() as u64;
        let (ours, theirs) = (left.read(kinds.0, &slab, dtype)?, right.read(kinds.1, &slab, dtype)?);
        if ours == theirs {
            continue;
        }
        let unequal = |(x, y): &(&[u8], &[u8])| x != y;
        different += ours.chunks_exact(dtype.bytes()).zip(theirs.chunks_exact(dtype.bytes())).filter(unequal).count() as u64;
        if dtype == Dtype::U32 {
            continue;
        }
        let (ours, theirs) = (converted(&ours, dtype, Dtype::F32)?, converted(&theirs, dtype, Dtype::F32)?);
        for (x, y) in ours.chunks_exact(4).zip(theirs.chunks_exact(4)) {
            let (x, y): (f32, f32) = (bytemuck::pod_read_unaligned(x), bytemuck::pod_read_unaligned(y));
            let apart = if x.to_bits() == y.to_bits() { 0.0 } else { (x - y).abs() };
            // A difference that is no number stays the largest.
            largest = if largest.is_nan() || apart <= largest { largest } else { apart };
        }
    }
    if different == 0 {
        return Ok(None);
    }
    let rounded = if dtypes.0 == dtypes.1 { String::new() } else { format!(", compared as {dtype}") };
    Ok(Some(format!("{different} of {elements} elements differ, by {largest:e} at most{rounded}")))
}

/// The dtype in which two can be compared.
fn common(left: Dtype, right: Dtype) -> Dtype {
    match (left, right) {
        (left, right) if left == right => left,
        (Dtype::F32, narrow) | (narrow, Dtype::F32) => narrow,
        _ => Dtype::F32,
    }
}
