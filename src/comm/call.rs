//! Who calls what: a rank's seat in a group, the facts of a call that all ranks of the group must agree on, and its bytes on the host.
//!
//! Invariant: a `Call` that exists is well formed for its group: its tensor can be cut as the operation needs. A `Seat` is one of the
//! members of its group, and every member is there once.

use crate::comm::Reduction;
use crate::device::Device;
use crate::device::tensor::Tensor;
use crate::dtype::Dtype;
use crate::shape::Shape;
use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use std::fmt;
use std::ops::Range;

/// One rank's place in a group.
#[derive(Clone, Debug)]
pub struct Seat {
    pub group: String,
    /// Index into `members`.
    pub rank: usize,
    /// Ranks of the world, in the rank order of the group.
    pub members: Vec<usize>,
}

impl Seat {
    /// `me` counts in the world, as do `members`.
    pub fn new(group: &str, me: usize, members: &[usize], world: usize) -> Result<Seat> {
        for (i, &member) in members.iter().enumerate() {
            ensure!(member < world, "group {group:?} has a member {member}, the ranks of this world are 0 to {}", world - 1);
            ensure!(!members[..i].contains(&member), "group {group:?} has rank {member} twice in {members:?}");
        }
        let rank = members.iter().position(|&member| member == me);
        let rank = rank.with_context(|| format!("rank {me} asks for group {group:?}, whose members are {members:?}"))?;
        Ok(Seat { group: group.to_string(), rank, members: members.to_vec() })
    }

    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// A member in words, by its number in the world first: that is the number which logs and launchers use.
    pub fn member(&self, rank: usize) -> String {
        format!("rank {} ({rank} of group {:?})", self.members[rank], self.group)
    }

    pub fn list(&self, ranks: impl IntoIterator<Item = usize>) -> String {
        ranks.into_iter().map(|rank| self.member(rank)).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} ({} of {} in group {:?})", self.members[self.rank], self.rank, self.size(), self.group)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    AllReduce(Reduction),
    ReduceScatter(Reduction),
    AllGather,
    AllToAll,
    Exchange,
    Send,
    Receive,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Call {
    pub operation: Operation,
    /// None for an exchange, whose bytes may differ in length between ranks.
    pub tensor: Option<(Dtype, Shape)>,
}

impl Call {
    pub const EXCHANGE: Call = Call { operation: Operation::Exchange, tensor: None };

    pub fn new(operation: Operation, x: &Tensor, ranks: usize) -> Result<Call> {
        let call = Call { operation, tensor: Some((x.dtype(), x.shape())) };
        let sliced = matches!(operation, Operation::ReduceScatter(_) | Operation::AllGather | Operation::AllToAll);
        if sliced && !x.shape().numel().is_multiple_of(ranks) {
            bail!("{call}: {} elements cannot be cut into {ranks} equal slices, one for each rank", x.shape().numel());
        }
        if x.dtype() == Dtype::U32 && matches!(operation, Operation::AllReduce(Reduction::Sum) | Operation::ReduceScatter(Reduction::Sum)) {
            bail!("{call}: sums over ranks are of f32, bf16 or f16");
        }
        Ok(call)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.operation.name())?;
        match self.operation {
            Operation::AllReduce(Reduction::Sum) | Operation::ReduceScatter(Reduction::Sum) => f.write_str(" (sum)")?,
            Operation::AllReduce(Reduction::Max) | Operation::ReduceScatter(Reduction::Max) => f.write_str(" (max)")?,
            _ => {}
        }
        self.tensor.iter().try_for_each(|(dtype, shape)| write!(f, " of {dtype} {shape}"))
    }
}

impl Operation {
    pub fn name(self) -> &'static str {
        match self {
            Operation::AllReduce(_) => "all_reduce",
            Operation::ReduceScatter(_) => "reduce_scatter",
            Operation::AllGather => "all_gather",
            Operation::AllToAll => "all_to_all",
            Operation::Exchange => "exchange",
            Operation::Send => "send",
            Operation::Receive => "receive",
        }
    }
}

/// A tensor that holds nothing: collectives on it are over at once.
pub fn is_dry(x: &Tensor) -> bool {
    matches!(x.device(), Device::Dry(_))
}

/// The bytes of slice `index` when `x` is cut over `ranks`, as evenly as whole elements allow.
pub fn slice_bytes(x: &Tensor, ranks: usize, index: usize) -> Range<usize> {
    let (count, size) = (x.shape().numel(), x.dtype().bytes());
    count * index / ranks * size..count * (index + 1) / ranks * size
}

pub fn bytes(x: &Tensor) -> &[u8] {
    match x.dtype() {
        Dtype::F32 => bytemuck::cast_slice(x.view().slice::<f32>()),
        Dtype::Bf16 => bytemuck::cast_slice(x.view().slice::<bf16>()),
        Dtype::F16 => bytemuck::cast_slice(x.view().slice::<f16>()),
        Dtype::U32 => bytemuck::cast_slice(x.view().slice::<u32>()),
    }
}

pub fn bytes_mut(x: &mut Tensor) -> &mut [u8] {
    match x.dtype() {
        Dtype::F32 => bytemuck::cast_slice_mut(x.view_mut().into_slice::<f32>()),
        Dtype::Bf16 => bytemuck::cast_slice_mut(x.view_mut().into_slice::<bf16>()),
        Dtype::F16 => bytemuck::cast_slice_mut(x.view_mut().into_slice::<f16>()),
        Dtype::U32 => bytemuck::cast_slice_mut(x.view_mut().into_slice::<u32>()),
    }
}
