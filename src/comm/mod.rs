//! Collectives behind one trait. A group is some ranks that talk; a group of one makes every collective a no-op.
//!
//! Ownership says what is in flight: a tensor handed to a collective comes back from `Pending::wait`, so nobody can touch it
//! meanwhile. Every wait has a deadline, and an error names the collective and the peers that were missing.
//!
//! Invariant: a sum over ranks is the balanced binary tree over rank order (`tree`), each node an f32 addition rounded to the
//! tensor's dtype, whatever the transport.

pub mod call;
pub mod connect;
pub mod crew;
pub mod door;
pub mod faulty;
pub mod frame;
pub mod groups;
pub mod mesh;
pub mod metered;
pub mod rehearsal;
pub mod rendezvous;
pub mod shared_memory;
pub mod solo;
pub mod staged;
pub mod store;
pub mod tcp;
pub mod threads;
pub mod tree;

use crate::device::tensor::Tensor;
use anyhow::Result;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reduction {
    Sum,
    Max,
}

pub trait Group: Send + Sync {
    fn size(&self) -> usize;
    fn rank(&self) -> usize;

    /// Every rank gets the reduction of all ranks' `x`.
    fn all_reduce(&self, x: Tensor, reduction: Reduction) -> Result<Pending>;
    /// `x` is `size()` equal slices. Slice `rank()` becomes the reduction of all ranks' such slices; the others are left undefined.
    fn reduce_scatter(&self, x: Tensor, reduction: Reduction) -> Result<Pending>;
    /// `x` is `size()` equal slices, of which slice `rank()` is this rank's. The others are filled from theirs.
    fn all_gather(&self, x: Tensor) -> Result<Pending>;
    /// `x` is `size()` equal slices. Slice `i` goes to rank `i`, whose slice for this rank takes its place.
    fn all_to_all(&self, x: Tensor) -> Result<Pending>;
    /// Sends between two ranks arrive in the order in which they were sent. The tensor comes back when it may be reused.
    fn send(&self, to: usize, x: Tensor) -> Result<Pending>;
    /// `x` is overwritten by what `from` sends; shape and dtype must agree.
    fn receive(&self, from: usize, x: Tensor) -> Result<Pending>;
    /// Every rank's bytes, in rank order: for small facts that live on the host. Waits.
    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Returns when every rank has come here.
    fn barrier(&self) -> Result<()> {
        self.exchange(&[]).map(drop)
    }
}

/// A collective under way.
#[must_use = "the tensor comes back from wait()"]
pub struct Pending(State);

enum State {
    Ready(Tensor),
    Later(Box<dyn FnOnce() -> Result<Tensor> + Send>),
}

impl Pending {
    pub fn ready(x: Tensor) -> Pending {
        Pending(State::Ready(x))
    }

    pub fn later(wait: impl FnOnce() -> Result<Tensor> + Send + 'static) -> Pending {
        Pending(State::Later(Box::new(wait)))
    }

    pub fn wait(self) -> Result<Tensor> {
        match self.0 {
            State::Ready(x) => Ok(x),
            State::Later(wait) => wait(),
        }
    }
}
