//! One block being executed, and what it shares with the other blocks of its launch.
//!
//! Invariant: between two steps of a warp every group stands at an instruction it has not begun.

use crate::address::SHARED_BEGIN;
use crate::allocation::Allocation;
use crate::copies::{BulkCopy, CopyQueue, Products};
use crate::execute::mbarrier::MbarrierState;
use crate::fault::{Fault, FaultKind, Place};
use crate::kernel::{Kernel, Special};
use crate::memory::Table;
use crate::random::Random;
use crate::registers::{LANES, Mask, Registers};
use crate::warp::{Group, State, Warp};
use crate::watch::Watch;
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

/// What all blocks of a launch share.
pub(crate) struct Setup<'l> {
    pub(crate) kernel: &'l Kernel,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) parameters: Vec<u8>,
    pub(crate) table: Arc<Table>,
    pub(crate) image: u64,
    pub(crate) shared_dynamic: u32,
    pub(crate) dynamic_begin: u32,
    pub(crate) shared_end: u32,
    /// Other threads execute blocks of this launch too.
    pub(crate) crowded: bool,
    pub(crate) seed: Option<u64>,
    /// What this launch writes is taken for initialised as a whole, as nobody looks closer.
    pub(crate) trusting: bool,
}

/// Global memory as one thread sees it: the table, and where it found something last.
pub(crate) struct View {
    table: Arc<Table>,
    last: Cell<usize>,
}

impl View {
    #[inline(always)]
    pub(crate) fn find(&self, address: u64, bytes: u64) -> Option<(&Allocation, u64)> {
        if let Some(allocation) = self.table.allocation(self.last.get()) {
            let offset = address.wrapping_sub(allocation.base);
            if offset < allocation.bytes && bytes <= allocation.bytes - offset {
                return Some((allocation, offset));
            }
        }
        let (index, allocation) = self.table.find(address, bytes)?;
        self.last.set(index);
        Some((allocation, address - allocation.base))
    }

    pub(crate) fn blame(&self, address: u64, bytes: u64) -> (FaultKind, String) {
        self.table.blame(address, bytes)
    }
}

/// A barrier of the block: who has arrived, and what they brought.
#[derive(Clone, Debug, Default)]
pub(crate) struct BlockBarrier {
    pub(crate) arrived: u32,
    /// Warps that complete it; 0 for all of the block.
    pub(crate) expected: u32,
    /// For `bar.red`: how many true and how many at all, and the registers that want to know.
    pub(crate) ones: u32,
    pub(crate) votes: u32,
    pub(crate) waiting: Vec<Waiting>,
}

/// A warp at a barrier that reduces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    pub(crate) warp: usize,
    pub(crate) pc: u32,
    pub(crate) mask: Mask,
}

/// A warp executing an instruction for some of its lanes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    pub(crate) warp: usize,
    pub(crate) pc: u32,
    pub(crate) mask: Mask,
}

pub(crate) struct Machine<'l> {
    pub(crate) setup: &'l Setup<'l>,
    pub(crate) kernel: &'l Kernel,
    pub(crate) global: View,
    /// By shared address; what lies below `SHARED_BEGIN` is never used.
    pub(crate) shared: Vec<u8>,
    pub(crate) warps: Vec<Warp>,
    pub(crate) barriers: Vec<BlockBarrier>,
    pub(crate) block: [u32; 3],
    pub(crate) random: Option<Random>,
    pub(crate) watch: Option<Box<Watch>>,
    pub(crate) mbarriers: Vec<MbarrierState>,
    /// Bulk copies into shared memory that are under way.
    pub(crate) bulk: VecDeque<BulkCopy>,
}

/// 16 by number, and one that stands for the barrier of a cluster of one block.
const BARRIERS: usize = 17;

impl<'l> Machine<'l> {
    pub(crate) fn new(setup: &'l Setup<'l>) -> Machine<'l> {
        let kernel = setup.kernel;
        let threads = setup.block.iter().product::<u32>() as usize;
        let warps = (0..threads.div_ceil(LANES)).map(|_| {
            let mut registers = Registers::new(kernel.words, kernel.doubles, kernel.predicates);
            for (slot, value) in &kernel.constant_words {
                registers.words[*slot as usize] = [*value; LANES];
            }
            for (slot, value) in &kernel.constant_doubles {
                registers.doubles[*slot as usize] = [*value; LANES];
            }
            for (slot, value) in &kernel.constant_predicates {
                registers.predicates[*slot as usize] = if *value { !0 } else { 0 };
            }
            for (slot, offset) in &kernel.dynamic_doubles {
                registers.doubles[*slot as usize] = [u64::from(setup.dynamic_begin).wrapping_add(*offset); LANES];
            }
            for (slot, offset) in &kernel.image_doubles {
                registers.doubles[*slot as usize] = [setup.image.wrapping_add(*offset); LANES];
            }
            let local = vec![0xFF; kernel.local_bytes * LANES];
            Warp {
                registers,
                groups: Vec::new(),
                alive: 0,
                local,
                copies: CopyQueue::default(),
                stores: CopyQueue::default(),
                products: Products::default(),
                steps: 0,
            }
        });
        Machine {
            setup,
            kernel,
            global: View { table: Arc::clone(&setup.table), last: Cell::new(0) },
            shared: vec![0xFF; setup.shared_end as usize],
            warps: warps.collect(),
            barriers: vec![BlockBarrier::default(); BARRIERS],
            block: [0; 3],
            random: None,
            watch: None,
            mbarriers: Vec::new(),
            bulk: VecDeque::new(),
        }
    }

    /// Makes everything ready for the block with this linear number.
    pub(crate) fn begin(&mut self, number: u64) {
        let [x, y, _] = self.setup.grid.map(u64::from);
        self.block = [(number % x) as u32, (number / x % y) as u32, (number / x / y) as u32];
        self.shared.fill(0xFF);
        self.barriers.fill(BlockBarrier::default());
        self.mbarriers.clear();
        self.bulk.clear();
        self.random = self.setup.seed.map(|seed| Random::new(seed ^ number.wrapping_mul(0xD1B5_4A32_D192_ED03)));
        self.checking(|check, machine| check.begin(number, machine.warps.len()));
        let threads = self.setup.block.iter().product::<u32>() as usize;
        for index in 0..self.warps.len() {
            let lanes = (threads - index * LANES).min(LANES);
            let alive = if lanes == LANES { !0 } else { (1 << lanes) - 1 };
            for (slot, special) in &self.kernel.special_words {
                let values = std::array::from_fn(|lane| self.special(*special, index, lane));
                self.warps[index].registers.words[*slot as usize] = values;
            }
            let warp = &mut self.warps[index];
            warp.alive = alive;
            warp.groups.clear();
            warp.groups.push(Group { pc: 0, mask: alive, state: State::Ready });
            warp.local.fill(0xFF);
            warp.copies = CopyQueue::default();
            warp.stores = CopyQueue::default();
            warp.products = Products::default();
            warp.steps = 0;
        }
    }

    pub(crate) fn thread(&self, warp: usize, lane: usize) -> [u32; 3] {
        let thread = (warp * LANES + lane) as u32;
        let [x, y, _] = self.setup.block;
        [thread % x, thread / x % y, thread / x / y]
    }

    fn special(&self, special: Special, warp: usize, lane: usize) -> u32 {
        let (block, grid) = (self.setup.block, self.setup.grid);
        match special {
            Special::ThreadX => self.thread(warp, lane)[0],
            Special::ThreadY => self.thread(warp, lane)[1],
            Special::ThreadZ => self.thread(warp, lane)[2],
            Special::ThreadsX => block[0],
            Special::ThreadsY => block[1],
            Special::ThreadsZ => block[2],
            Special::BlockX => self.block[0],
            Special::BlockY => self.block[1],
            Special::BlockZ => self.block[2],
            Special::BlocksX => grid[0],
            Special::BlocksY => grid[1],
            Special::BlocksZ => grid[2],
            Special::Lane => lane as u32,
            Special::Warp => warp as u32,
            Special::Warps => self.warps.len() as u32,
            Special::MaskEqual => 1 << lane,
            Special::MaskLess => (1 << lane) - 1,
            Special::MaskLessEqual => (1 << lane) | ((1 << lane) - 1),
            Special::MaskGreater => !((1 << lane) | ((1 << lane) - 1)),
            Special::MaskGreaterEqual => !((1 << lane) - 1),
            Special::SharedDynamic => self.setup.shared_dynamic,
            Special::SharedTotal => self.setup.shared_end - SHARED_BEGIN,
            Special::DynamicBegin => self.setup.dynamic_begin,
            Special::Zero => 0,
            Special::One => 1,
        }
    }

    /// Where the instruction at `pc` comes from, with a thread of the block being executed.
    pub(crate) fn place(&self, pc: u32, warp: usize, lane: usize) -> Place {
        let site = &self.kernel.sites[pc as usize];
        Place {
            kernel: self.kernel.name.clone(),
            source: self.kernel.files.get(&site.file).map(|file| (file.clone(), site.line)),
            ptx_line: site.ptx_line,
            instruction: site.opcode.to_string(),
            block: self.block,
            thread: self.thread(warp, lane),
        }
    }

    pub(crate) fn fault(&self, at: At, lane: usize, kind: FaultKind, message: impl Into<String>) -> Fault {
        Fault::of_kernel(kind, self.place(at.pc, at.warp, lane), message.into())
    }

    /// `rmsnorm.cu:41 (bar.sync)`, for messages that name several places.
    pub(crate) fn name_of(&self, pc: u32) -> String {
        let site = &self.kernel.sites[pc as usize];
        match self.kernel.files.get(&site.file) {
            Some(file) => format!("{file}:{} ({})", site.line, site.opcode),
            None => format!("PTX line {} ({})", site.ptx_line, site.opcode),
        }
    }
}
