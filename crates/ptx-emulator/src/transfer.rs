//! Instructions whose work goes on beside the warp: copies, and the barriers in memory that tell when they are done.
//!
//! Invariant: as in `instruction.rs`: every slot is inside the files of its kernel.

use crate::instruction::{Address, AtomicOperator};
use crate::scalar::Scalar;

/// `cp.async`: `bytes` to shared memory, of which the word in `source_bytes` (or all) come from global memory and the rest is zero.
#[derive(Clone, Debug)]
pub(crate) struct CopyAsync {
    pub(crate) to: Address,
    pub(crate) from: Address,
    pub(crate) bytes: u32,
    pub(crate) source_bytes: u32,
    /// A predicate that, where true, leaves out the source.
    pub(crate) ignore: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Mbarrier {
    pub(crate) operator: MbarrierOperator,
    pub(crate) address: Address,
    /// Count, bytes, parity or state; a word, or a double for a state.
    pub(crate) value: u32,
    /// State or predicate, or `NONE`.
    pub(crate) to: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MbarrierOperator {
    Initialise,
    Invalidate,
    /// Arrives as often as the value says (or once).
    Arrive,
    ArriveExpect,
    Expect,
    /// `cp.async.mbarrier.arrive`: when the lane's copies so far are done; counted beforehand unless true.
    ArriveAfterCopies(bool),
    /// Blocks until the phase of this parity is over.
    TryWait,
    TestWait,
    /// The same with a state in place of the parity.
    TryWaitState,
    TestWaitState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BulkDirection {
    ToShared,
    ToGlobal,
    /// Adds, minimum or maximum into global memory.
    Reduce(AtomicOperator),
}

/// `cp.async.bulk` and, with a map, `cp.async.bulk.tensor`.
#[derive(Clone, Debug)]
pub(crate) struct Bulk {
    pub(crate) direction: BulkDirection,
    pub(crate) shared: Address,
    /// The tensor map, or the global address.
    pub(crate) global: Address,
    /// Empty: a plain copy of `bytes` bytes.
    pub(crate) coordinates: Vec<u32>,
    pub(crate) bytes: u32,
    pub(crate) mbarrier: Option<Address>,
    pub(crate) scalar: Scalar,
}
