//! Work of a warp that is under way: copies, bulk stores and products of matrices.
//!
//! Invariant: work is in its queue until it was carried out, and groups are counted per lane, as lanes may commit apart.

use crate::registers::{LANES, Mask, each};
use crate::transfer::Bulk;
use crate::watch::clocks::Clock;

/// A copy of `cp.async`.
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

/// A copy of `cp.async.bulk`.
#[derive(Clone, Debug)]
pub(crate) struct BulkCopy {
    pub(crate) warp: usize,
    pub(crate) lane: usize,
    pub(crate) group: u32,
    pub(crate) pc: u32,
    pub(crate) shared: u32,
    /// The address of the tensor map, or of the bytes.
    pub(crate) global: u64,
    pub(crate) coordinates: Vec<i32>,
    pub(crate) bytes: usize,
    pub(crate) mbarrier: u32,
    /// In a checked launch: the clock of the copy, and the segment of its accesses.
    pub(crate) clock: Option<(Clock, u32)>,
}

/// A product of `wgmma` that was begun: the instruction, and what it read of the registers then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) pc: u32,
    pub(crate) group: u32,
    pub(crate) keep: bool,
    pub(crate) a: u64,
    pub(crate) b: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Products {
    pub(crate) waiting: Vec<Product>,
    pub(crate) open: u32,
    /// `wgmma.fence` was executed since the registers were last free.
    pub(crate) fenced: bool,
}

/// Work that belongs to a commit of a lane.
pub(crate) trait Grouped {
    fn lane(&self) -> usize;
    fn group(&self) -> u32;
}

impl Grouped for Copy {
    fn lane(&self) -> usize {
        self.lane
    }

    fn group(&self) -> u32 {
        self.group
    }
}

impl Grouped for BulkCopy {
    fn lane(&self) -> usize {
        self.lane
    }

    fn group(&self) -> u32 {
        self.group
    }
}

#[derive(Debug)]
pub(crate) struct CopyQueue<T> {
    pub(crate) waiting: Vec<T>,
    pub(crate) open: [u32; LANES],
}

impl<T> Default for CopyQueue<T> {
    fn default() -> CopyQueue<T> {
        CopyQueue { waiting: Vec::new(), open: [0; LANES] }
    }
}

impl<T: Grouped> CopyQueue<T> {
    pub(crate) fn commit(&mut self, mask: Mask) {
        for lane in each(mask) {
            self.open[lane] += 1;
        }
    }

    /// Takes out what must be done before at most `groups` commits of each lane are left.
    pub(crate) fn due(&mut self, mask: Mask, groups: u32) -> Vec<T> {
        let open = self.open;
        self.waiting.extract_if(.., |copy| mask >> copy.lane() & 1 != 0 && copy.group() + groups < open[copy.lane()]).collect()
    }

    /// Takes out all that a lane began.
    pub(crate) fn all_of(&mut self, lane: usize) -> Vec<T> {
        self.waiting.extract_if(.., |copy| copy.lane() == lane).collect()
    }
}

impl BulkCopy {
    /// A copy as its instruction begins it; the caller fills in what depends on the kind.
    pub(crate) fn new(warp: usize, lane: usize, pc: u32, bulk: &Bulk) -> BulkCopy {
        BulkCopy {
            warp,
            lane,
            group: 0,
            pc,
            shared: 0,
            global: 0,
            coordinates: Vec::with_capacity(bulk.coordinates.len()),
            bytes: 0,
            mbarrier: 0,
            clock: None,
        }
    }
}
