//! What a checkpoint holds, as text for people.
//!
//! Invariant: equal checkpoints give equal texts; everything but the folder's name comes from the index.

use crate::checkpoint::folder::mebibytes;
use crate::checkpoint::index::Kind;
use crate::checkpoint::load::Checkpoint;

/// Facts first, then sums by kind, then a table of all tensors.
pub fn inspect(checkpoint: &Checkpoint) -> String {
    let index = &checkpoint.index;
    let facts = &index.facts;
    let geometry = &facts.geometry;
    let mut lines = vec![
        format!("checkpoint   {}", checkpoint.folder().display()),
        format!("step         {}", facts.step),
        format!("tokens       {}", facts.tokens),
        format!("seed         {}", facts.seed),
        format!("geometry     shards {}, lanes {}, order {}", geometry.shards, geometry.lanes, geometry.order),
        format!("incarnation  {}", index.incarnation),
        format!("state        {}", facts.state),
        format!("files        {} of {}", index.files.len(), mebibytes(index.bytes())),
    ];
    for kind in Kind::ALL.into_iter().filter(|kind| checkpoint.has(*kind)) {
        let (mut tensors, mut elements, mut bytes) = (0, 0, 0);
        for (_, tensor) in checkpoint.tensors(kind) {
            tensors += 1;
            bytes += tensor.bytes();
            elements += tensor.bytes() / tensor.dtype.bytes() as u64;
        }
        lines.push(format!("{kind:<12} {tensors} tensors, {elements} elements, {}", mebibytes(bytes)));
    }
    lines.push(String::new());
    lines.push(format!("{:<10}  {:<5}  {:>16}  {:>5}  name", "kind", "dtype", "shape", "boxes"));
    for kind in Kind::ALL {
        for (name, tensor) in checkpoint.tensors(kind) {
            let shape = format!("{:?}", tensor.shape);
            lines.push(format!("{kind:<10}  {:<5}  {shape:>16}  {:>5}  {name}", tensor.dtype.name(), tensor.boxes.len()));
        }
    }
    lines.push(String::new());
    lines.join("\n")
}
