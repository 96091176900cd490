//! What a launch counts: instructions of warps, and how well its accesses suit the memories.
//!
//! Invariant: the totals are the sums over the lines.

use crate::instruction::Operation;
use crate::kernel::Kernel;
use crate::syntax::Space;
use crate::watch::count::Count;
use std::collections::BTreeMap;

/// Counts of a launch or of a line. An instruction counts once per warp that executes it, for however many lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Whole numbers, bits, predicates, and moves between registers.
    pub integer: u64,
    pub float: u64,
    pub conversion: u64,
    /// Loads, stores, atomics and copies.
    pub memory: u64,
    /// Matrix products; the loads of their fragments are memory.
    pub matrix: u64,
    /// Barriers, fences, shuffles, votes.
    pub synchronization: u64,
    pub control: u64,
    /// Turns of the banks of shared memory, and how many the same bytes would need without conflicts.
    pub shared_wavefronts: u64,
    pub shared_wavefronts_ideal: u64,
    /// Sectors of 32 bytes of global memory, and how many the same bytes would need side by side.
    pub global_sectors: u64,
    pub global_sectors_ideal: u64,
    /// Of all lanes, however often they touch the same bytes.
    pub global_bytes_loaded: u64,
    pub global_bytes_stored: u64,
}

impl Counts {
    /// All instructions.
    pub fn instructions(&self) -> u64 {
        self.integer + self.float + self.conversion + self.memory + self.matrix + self.synchronization + self.control
    }

    fn add(&mut self, other: &Counts) {
        self.integer += other.integer;
        self.float += other.float;
        self.conversion += other.conversion;
        self.memory += other.memory;
        self.matrix += other.matrix;
        self.synchronization += other.synchronization;
        self.control += other.control;
        self.shared_wavefronts += other.shared_wavefronts;
        self.shared_wavefronts_ideal += other.shared_wavefronts_ideal;
        self.global_sectors += other.global_sectors;
        self.global_sectors_ideal += other.global_sectors_ideal;
        self.global_bytes_loaded += other.global_bytes_loaded;
        self.global_bytes_stored += other.global_bytes_stored;
    }
}

/// The counts of one launch; all zero unless `Options::counters` asked for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub total: Counts,
    /// By file and line of the source; without line information by the kernel's name and the line of the PTX.
    pub lines: BTreeMap<(String, u32), Counts>,
}

impl Counters {
    pub(crate) fn of(kernel: &Kernel, counted: &[Count]) -> Counters {
        let mut counters = Counters::default();
        for ((instruction, site), count) in kernel.code.iter().zip(&kernel.sites).zip(counted) {
            let mut counts = count.counts;
            *class(&instruction.operation, &mut counts) += count.executed;
            if counts == Counts::default() {
                continue;
            }
            let line = match kernel.files.get(&site.file) {
                Some(file) => (file.clone(), site.line),
                None => (kernel.name.clone(), site.ptx_line),
            };
            counters.lines.entry(line).or_default().add(&counts);
            counters.total.add(&counts);
        }
        counters
    }
}

fn class<'a>(operation: &Operation, counts: &'a mut Counts) -> &'a mut u64 {
    match operation {
        Operation::Float(..) | Operation::Double(_) | Operation::Half(..) => &mut counts.float,
        Operation::Convert(_) | Operation::ConvertPair(_) => &mut counts.conversion,
        // A parameter is a constant operand of the machine's own instructions.
        Operation::Load(access) if access.space == Some(Space::Parameter) => &mut counts.integer,
        Operation::Load(_) | Operation::Store(_) | Operation::Atomic(_) => &mut counts.memory,
        Operation::LoadMatrix(_) | Operation::StoreMatrix(_) | Operation::CopyAsync(_) | Operation::Bulk(_) => &mut counts.memory,
        Operation::Multiply(_) | Operation::GroupMultiply(_) => &mut counts.matrix,
        Operation::Branch(_) | Operation::BranchTable(_) | Operation::Exit | Operation::Trap(_) => &mut counts.control,
        Operation::Barrier(_) | Operation::WarpBarrier | Operation::Fence(_) | Operation::Shuffle(_) => &mut counts.synchronization,
        Operation::Vote(_) | Operation::Match(..) | Operation::Reduce(_) | Operation::Elect => &mut counts.synchronization,
        Operation::CopyCommit | Operation::CopyWait(_) | Operation::BulkCommit | Operation::BulkWait(_) => &mut counts.synchronization,
        Operation::Mbarrier(_) | Operation::GroupFence | Operation::GroupCommit | Operation::GroupWait(_) => &mut counts.synchronization,
        _ => &mut counts.integer,
    }
}
