//! A warp: its registers, and which of its lanes stand where.
//!
//! Invariant: the masks of the groups are disjoint and together are the lanes that have not exited.

use crate::copies::{BulkCopy, Copy, CopyQueue, Products};
use crate::registers::{Mask, Registers};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// At an instruction that waits for other lanes of the warp.
    Parked,
    /// At a barrier of the block.
    Barrier(u32),
    /// At a wait for the mbarrier at this address.
    Mbarrier(u32),
}

/// Lanes that execute together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub(crate) pc: u32,
    pub(crate) mask: Mask,
    pub(crate) state: State,
}

#[derive(Debug)]
pub(crate) struct Warp {
    pub(crate) registers: Registers,
    pub(crate) groups: Vec<Group>,
    /// Lanes that have not exited.
    pub(crate) alive: Mask,
    /// Local memory of all lanes, one after the other.
    pub(crate) local: Vec<u8>,
    pub(crate) copies: CopyQueue<Copy>,
    /// Bulk copies to global memory.
    pub(crate) stores: CopyQueue<BulkCopy>,
    pub(crate) products: Products,
    pub(crate) steps: u64,
}

impl Warp {
    /// Groups that stand at the same instruction become one. Lanes that waited for the others look again.
    pub(crate) fn merge(&mut self) {
        let mut i = 0;
        while i < self.groups.len() {
            let mut j = i + 1;
            while j < self.groups.len() {
                let (a, b) = (self.groups[i], self.groups[j]);
                let movable = |state: State| matches!(state, State::Ready | State::Parked);
                if a.pc == b.pc && movable(a.state) && movable(b.state) {
                    self.groups.swap_remove(j);
                    self.groups[i] = Group { pc: a.pc, mask: a.mask | b.mask, state: State::Ready };
                } else {
                    j += 1;
                }
            }
            i += 1;
        }
    }

    /// Lanes leave; those that waited for them look again.
    pub(crate) fn exit(&mut self, group: usize, mask: Mask) {
        self.alive &= !mask;
        self.groups[group].mask &= !mask;
        self.groups[group].pc += 1;
        if self.groups[group].mask == 0 {
            self.groups.swap_remove(group);
        }
        for group in self.groups.iter_mut().filter(|group| group.state == State::Parked) {
            group.state = State::Ready;
        }
    }

    pub(crate) fn ready(&self) -> bool {
        self.groups.iter().any(|group| group.state == State::Ready)
    }
}
