//! The checks of a launch: accesses that nothing orders, reads of what nobody wrote, looks at copies under way.
//!
//! Invariant: what is reported is wrong under the memory model whatever the hardware happens to do; what is ordered by a barrier, a
//! fence with an atomic, or the end of a launch is never reported.

use super::Touch;
use super::cells::{CELL, Cell, Cells, Who};
use super::clocks::{ACTORS, Clock, Clocks, ENGINE, Viewer, WHOLE, join};
use crate::copies::Copy;
use crate::execute::memory::Doing;
use crate::fault::{Fault, FaultKind};
use crate::instruction::{Fence, Order};
use crate::machine::{At, Machine};
use crate::registers::{LANES, Mask, each};
use crate::syntax::Space;
use std::collections::HashMap;

const BARRIERS: usize = 17;

pub(crate) struct Check {
    pub(crate) clocks: Clocks,
    shared: Cells,
    /// By the address of their allocation.
    global: HashMap<u64, Cells>,
    barriers: [Clock; BARRIERS],
    /// Accesses so far, as a time.
    now: u32,
}

/// An access by the asynchronous side of the machine.
#[derive(Clone, Copy)]
pub(crate) struct Remote {
    pub(crate) space: Space,
    pub(crate) doing: Doing,
    pub(crate) begin: u64,
    pub(crate) bytes: usize,
    pub(crate) viewer: Viewer,
    pub(crate) segment: u32,
}

/// An access of one lane, as cells see it.
struct Visit {
    who: Who,
    viewer: Viewer,
    doing: Doing,
    strong: bool,
    /// The bytes of the cell.
    mask: u8,
    now: u32,
}

impl Check {
    pub(crate) fn new(shared_end: usize) -> Check {
        Check {
            clocks: Clocks::new(),
            shared: Cells::new(shared_end as u64),
            global: HashMap::new(),
            barriers: [[0; ACTORS]; BARRIERS],
            now: 0,
        }
    }

    pub(crate) fn begin(&mut self, block: u64, warps: usize) {
        self.clocks.begin(block, warps);
        self.shared.clear();
        self.barriers = [[0; ACTORS]; BARRIERS];
    }

    /// What the launch wrote is initialised for the next one.
    pub(crate) fn end(&mut self, machine: &Machine<'_>) {
        for (base, cells) in &self.global {
            if let Some((allocation, _)) = machine.global.find(*base, 0) {
                cells.initialised(|begin, end| allocation.initialise(begin, end.min(allocation.bytes)));
            }
        }
    }

    pub(crate) fn fence(&mut self, warp: usize, fence: Fence) {
        match fence {
            Fence::Block => self.clocks.fence(warp, false),
            Fence::Device => self.clocks.fence(warp, true),
            Fence::Proxy => self.clocks.warps[warp].proxy_fence = self.now,
        }
    }

    pub(crate) fn arrive(&mut self, warp: usize, barrier: usize) {
        let clock = self.clocks.release(warp);
        join(&mut self.barriers[barrier], &clock);
    }

    pub(crate) fn open(&mut self, barrier: usize, warps: &[usize]) {
        let clock = std::mem::replace(&mut self.barriers[barrier], [0; ACTORS]);
        for warp in warps {
            self.clocks.acquire(*warp, &clock);
            self.clocks.meet(*warp);
        }
    }

    fn cell<'a>(
        shared: &'a mut Cells,
        global: &'a mut HashMap<u64, Cells>,
        machine: &Machine<'_>,
        space: Space,
        address: u64,
    ) -> &'a mut Cell {
        if space == Space::Shared {
            return shared.get(address, |_, _, _| {});
        }
        let (allocation, offset) = machine.global.find(address, 1).expect("an access is shown here after it was found in bounds");
        let cells = global.entry(allocation.base).or_insert_with(|| Cells::new(allocation.bytes));
        cells.get(offset, |begin, end, fresh| {
            for at in allocation.initialised(begin, end).into_iter().flat_map(|(from, to)| from..to) {
                fresh[((at - begin) / CELL) as usize].initialised |= 1 << (at % CELL);
            }
        })
    }

    pub(super) fn touch(&mut self, machine: &Machine<'_>, at: At, touch: &Touch<'_>) -> Result<(), Fault> {
        let own = &self.clocks.warps[at.warp];
        let (segment, viewer) = (own.segment, Viewer { clock: own.clock, actor: at.warp, lane: 0 });
        let strong = touch.order != Order::Weak;
        self.now += 1;
        for lane in each(touch.mask) {
            let (begin, end) = (touch.at[lane], touch.at[lane] + touch.bytes as u64);
            let mut address = begin / CELL * CELL;
            while address < end {
                let bytes = (0..CELL).filter(|byte| (begin..end).contains(&(address + byte)));
                let mask = bytes.fold(0, |mask, byte| mask | 1 << byte);
                let viewer = Viewer { lane: lane as u8, ..viewer };
                let who = Who::new(segment, at.pc, lane as u8);
                let visit = Visit { who, viewer, doing: touch.doing, strong, mask, now: self.now };
                let cell = Check::cell(&mut self.shared, &mut self.global, machine, touch.space, address.max(begin));
                if let Some((kind, other)) = visited(cell, &self.clocks, &visit) {
                    return Err(self.offence(machine, at, touch, lane, kind, other));
                }
                address += CELL;
            }
        }
        if strong {
            self.synchronise(at.warp, touch);
        }
        Ok(())
    }

    /// What strong accesses publish and hear.
    fn synchronise(&mut self, warp: usize, touch: &Touch<'_>) {
        let shared = touch.space == Space::Shared;
        if matches!(touch.order, Order::Release | Order::AcquireRelease) {
            self.clocks.fence(warp, true);
        }
        for lane in each(touch.mask) {
            if touch.doing != Doing::Writing {
                self.clocks.hear(warp, shared, touch.at[lane]);
            }
            if touch.doing != Doing::Reading {
                self.clocks.publish(warp, shared, touch.at[lane]);
            }
        }
        if matches!(touch.order, Order::Acquire | Order::AcquireRelease) {
            self.clocks.fence(warp, true);
        }
    }

    fn offence(&self, machine: &Machine<'_>, at: At, touch: &Touch<'_>, lane: usize, kind: FaultKind, other: Offender) -> Fault {
        let space = if touch.space == Space::Shared { "shared" } else { "global" };
        let doing = touch.doing.verb();
        let what = format!("{doing} {} bytes at {space} address {:#x}", touch.bytes, touch.at[lane]);
        let rest = match other {
            Offender::Nobody => "of which nobody has written all".to_owned(),
            Offender::Reader(who) => format!("which {} reads, and nothing orders the two", self.name(machine, who)),
            Offender::Writer(who) => format!("which {} writes, and nothing orders the two", self.name(machine, who)),
            Offender::Copy(who) => format!("to which a copy of {} is under way", self.name(machine, who)),
        };
        machine.fault(at, lane, kind, format!("{what}, {rest}"))
    }

    fn name(&self, machine: &Machine<'_>, who: Who) -> String {
        let segment = self.clocks.segments[who.segment as usize];
        let place = machine.name_of(who.pc());
        let block = if segment.block == self.clocks.block { String::new() } else { format!(" of block number {}", segment.block) };
        match (usize::from(segment.actor), who.lane()) {
            (ENGINE, _) => format!("an asynchronous copy{block} begun at {place}"),
            (warp, WHOLE) => format!("warp {warp}{block} at {place}"),
            (warp, lane) => format!("lane {lane} of warp {warp}{block} at {place}"),
        }
    }

    /// An access by the asynchronous side of the machine: a bulk copy, or the operands of a group's product.
    pub(crate) fn remote(&mut self, machine: &Machine<'_>, at: At, remote: &Remote) -> Result<(), Fault> {
        self.now += 1;
        let Remote { space, doing, begin, bytes, viewer, segment } = *remote;
        let end = begin + bytes as u64;
        for address in (begin / CELL * CELL..end).step_by(CELL as usize) {
            let mask = (0..CELL).filter(|byte| (begin..end).contains(&(address + byte))).fold(0, |mask, byte| mask | 1 << byte);
            let now = if doing == Doing::Reading { self.now } else { 0 };
            let visit = Visit { who: Who::new(segment, at.pc, WHOLE), viewer, doing, strong: doing == Doing::Changing, mask, now };
            let cell = Check::cell(&mut self.shared, &mut self.global, machine, space, address.max(begin));
            let stored = (cell.stored, cell.writer);
            if let Some((kind, other)) = visited(cell, &self.clocks, &visit) {
                let touch = Touch { space, doing, mask: 1, at: &[begin; LANES], bytes, order: Order::Weak };
                return Err(self.offence(machine, at, &touch, 0, kind, other));
            }
            let writer = usize::from(self.clocks.segments[stored.1.segment as usize].actor);
            let fenced = self.clocks.warps.get(writer).is_none_or(|warp| warp.proxy_fence >= stored.0);
            if space == Space::Shared && doing == Doing::Reading && stored.0 != 0 && !fenced {
                let writer = self.name(machine, stored.1);
                let message = format!(
                    "reads shared address {address:#x} through the asynchronous proxy, which {writer} writes without fence.proxy.async after it"
                );
                return Err(machine.fault(at, 0, FaultKind::MissingFence, message));
            }
        }
        Ok(())
    }

    /// Copies to shared memory are under way.
    pub(crate) fn in_flight(&mut self, machine: &Machine<'_>, mask: Mask, to: &[u64; LANES], bytes: u64) {
        for lane in each(mask) {
            for address in (to[lane]..to[lane] + bytes).step_by(CELL as usize) {
                Check::cell(&mut self.shared, &mut self.global, machine, Space::Shared, address).pending = true;
            }
        }
    }

    /// A copy was carried out, on behalf of the lane that waited for it.
    pub(crate) fn landed(&mut self, warp: usize, copy: &Copy) {
        let segment = self.clocks.warps[warp].segment;
        for address in (copy.to..copy.to + copy.bytes).step_by(CELL as usize) {
            let cell = self.shared.get(u64::from(address), |_, _, _| {});
            cell.pending = false;
            cell.writer = Who::new(segment, copy.pc, copy.lane as u8);
        }
    }
}

enum Offender {
    Nobody,
    Reader(Who),
    Writer(Who),
    Copy(Who),
}

/// Notes an access in a cell, and says what is wrong with it.
fn visited(cell: &mut Cell, clocks: &Clocks, visit: &Visit) -> Option<(FaultKind, Offender)> {
    let &Visit { who, ref viewer, doing, strong, mask, now } = visit;
    let ordered = |other: Who| clocks.ordered(other.segment, other.lane(), viewer);
    if cell.pending {
        return Some((FaultKind::InFlight, Offender::Copy(cell.writer)));
    }
    if cell.written & mask != 0 && !(strong && cell.strong_writer) && !ordered(cell.writer) {
        return Some((FaultKind::Race, Offender::Writer(cell.writer)));
    }
    if doing != Doing::Writing && cell.initialised & mask != mask {
        return Some((FaultKind::Uninitialised, Offender::Nobody));
    }
    if doing == Doing::Reading {
        let first = cell.readers[0];
        let same_warp = clocks.segments[first.segment as usize].actor == clocks.segments[who.segment as usize].actor;
        if first.segment != 0 && first != who && (!same_warp || cell.readers[1].segment == 0) {
            cell.readers[1] = first;
            cell.read[1] = cell.read[0];
            cell.strong_readers[1] = cell.strong_readers[0];
        }
        cell.read[0] = if first == who { cell.read[0] | mask } else { mask };
        cell.readers[0] = who;
        cell.strong_readers[0] = strong;
        return None;
    }
    for (i, reader) in cell.readers.into_iter().enumerate() {
        if cell.read[i] & mask != 0 && !(strong && cell.strong_readers[i]) && !ordered(reader) {
            return Some((FaultKind::Race, Offender::Reader(reader)));
        }
    }
    *cell = Cell {
        writer: who,
        initialised: cell.initialised | mask,
        written: if cell.writer == who { cell.written | mask } else { mask },
        strong_writer: strong,
        stored: now,
        ..Cell::default()
    };
    None
}
