//! Gradients of heads that virtual shards share: one sum for all copies of a head.
//!
//! Where a model has fewer key and value heads than the run has virtual shards, each shard computes with its own copy of its head. The
//! gradient of a head is the sum of its copies' gradients, in the tree over all virtual shards of the run, of which other heads' shards
//! are no leaves. Every copy gets it, and so every copy stays the same.
//!
//! Invariant: the sum does not depend on which rank owns which shards. A rank adds the subtree of the shards it owns, the
//! tensor-parallel group adds the rest.

use crate::comm::{Group, Reduction};
use crate::device::tensor::Tensor;
use crate::dtype::Dtype;
use crate::ops::elementwise;
use crate::plan::layout::{Place, Shared, UnitLayout};
use anyhow::Result;

/// In the flat gradients of a unit, every copy of a head becomes the sum over all copies.
pub fn fold(flat: &mut Tensor, layout: &UnitLayout, tensor: &dyn Group) -> Result<()> {
    if layout.shared().next().is_none() {
        return Ok(());
    }
    let mut sums = flat.device().zeros([layout.shared_length()], Dtype::F32);
    // A rank without a copy gives -0.0, the one number that adds nothing to any other, not even to -0.0.
    elementwise::scale(sums.view_mut(), -1.0);
    for (shared, start) in with_starts(layout) {
        let length = shared.head_length();
        for head in 0..shared.heads {
            if let Some(sum) = tree(copies(flat, &shared, head)) {
                let at = start + head * length;
                sums.view_mut().part(at..at + length, [length]).copy_from(sum.view());
            }
        }
    }
    if layout.shares_across_ranks() {
        sums = tensor.all_reduce(sums, Reduction::Sum)?.wait()?;
    }
    for (shared, start) in with_starts(layout) {
        let length = shared.head_length();
        for place in shared.copies {
            let at = start + place.head.expect("a copy is of a head") * length;
            flat.view_mut().part(place.flat.clone(), [length]).copy_from(sums.view().part(at..at + length, [length]));
        }
    }
    Ok(())
}

/// The shared parameters, each with the number of elements of those before it.
fn with_starts(layout: &UnitLayout) -> impl Iterator<Item = (Shared<'_>, usize)> {
    layout.shared().scan(0, |next, shared| {
        let start = *next;
        *next += shared.heads * shared.head_length();
        Some((shared, start))
    })
}

/// For each virtual shard of this rank its gradient of `head`, where it has a copy of it.
fn copies(flat: &Tensor, shared: &Shared<'_>, head: usize) -> Vec<Option<Tensor>> {
    let length = shared.head_length();
    let of_head = |place: &Place| {
        (place.head == Some(head)).then(|| {
            let mut copy = flat.device().empty([length], Dtype::F32);
            copy.view_mut().copy_from(flat.view().part(place.flat.clone(), [length]));
            copy
        })
    };
    shared.copies.iter().map(of_head).collect()
}

/// Neighbours are added, then neighbouring sums, and so on. What is not there is passed over, and an odd one out passes up.
fn tree(mut row: Vec<Option<Tensor>>) -> Option<Tensor> {
    while row.len() > 1 {
        let mut next = Vec::new();
        let mut rest = row.into_iter();
        while let Some(left) = rest.next() {
            next.push(match (left, rest.next().flatten()) {
                (Some(mut left), Some(right)) => {
                    elementwise::add(left.view_mut(), right.view());
                    Some(left)
                }
                (left, right) => left.or(right),
            });
        }
        row = next;
    }
    row.pop().flatten()
}
