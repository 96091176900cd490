//! The copies of `cp.async` that are under way in a warp.
//!
//! Invariant: a copy is in the queue until it was carried out, and groups are counted per lane, as lanes may commit apart.

use crate::registers::{LANES, Mask, each};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Copy {
    pub(crate) lane: usize,
    /// The commit of the lane that covers it.
    pub(crate) group: u32,
    pub(crate) to: u32,
    pub(crate) from: u64,
    pub(crate) bytes: u32,
    pub(crate) source_bytes: u32,
    pub(crate) pc: u32,
}

#[derive(Debug, Default)]
pub(crate) struct CopyQueue {
    pub(crate) waiting: Vec<Copy>,
    pub(crate) open: [u32; LANES],
}

impl CopyQueue {
    pub(crate) fn commit(&mut self, mask: Mask) {
        for lane in each(mask) {
            self.open[lane] += 1;
        }
    }

    /// Takes out what must be done before at most `groups` commits of each lane are left.
    pub(crate) fn due(&mut self, mask: Mask, groups: u32) -> Vec<Copy> {
        let open = self.open;
        let is_due = |copy: &Copy| mask >> copy.lane & 1 != 0 && copy.group + groups < open[copy.lane];
        let due = self.waiting.iter().filter(|copy| is_due(copy)).copied().collect();
        self.waiting.retain(|copy| !is_due(copy));
        due
    }
}
