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
struct Visit<'a> {
    who: Who,
    viewer: &'a Viewer,
    doing: Doing,
    strong: bool,
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

    /// The cells of a range of bytes, all in one allocation or in shared memory: each with its bytes of the range as bits.
    fn cells(&mut self, machine: &Machine<'_>, space: Space, begin: u64, bytes: u64, mut f: impl FnMut(&mut Cell, u8, &Clocks) -> bool) {
        let (cells, allocation, begin) = if space == Space::Shared {
            (&mut self.shared, None, begin)
        } else {
            let (allocation, offset) = machine.global.find(begin, bytes).expect("an access is shown here after it was found in bounds");
            (self.global.entry(allocation.base).or_insert_with(|| Cells::new(allocation.bytes)), Some(allocation), offset)
        };
        let end = begin + bytes;
        for offset in (begin / CELL * CELL..end).step_by(CELL as usize) {
            let cell = cells.get(offset, |from, to, fresh| {
                let known = allocation.map_or_else(Vec::new, |allocation| allocation.initialised(from, to));
                for at in known.into_iter().flat_map(|(from, to)| from..to) {
                    fresh[((at - from) / CELL) as usize].initialised |= 1 << (at % CELL);
                }
            });
            // Two bytes to a cell: the first may lie before the range, the second after it.
            let mask = u8::from(offset >= begin) | u8::from(offset + 1 < end) << 1;
            if !f(cell, mask, &self.clocks) {
                return;
            }
        }
    }

    pub(super) fn touch(&mut self, machine: &Machine<'_>, at: At, touch: &Touch<'_>) -> Result<(), Fault> {
        let own = &self.clocks.warps[at.warp];
        let (segment, mut viewer) = (own.segment, Viewer { clock: own.clock, actor: at.warp, lane: 0 });
        let strong = touch.order != Order::Weak;
        self.now += 1;
        let now = self.now;
        for lane in each(touch.mask) {
            viewer.lane = lane as u8;
            let visit = Visit { who: Who::new(segment, at.pc, lane as u8), viewer: &viewer, doing: touch.doing, strong, now };
            let mut wrong = None;
            self.cells(machine, touch.space, touch.at[lane], touch.bytes as u64, |cell, mask, clocks| {
                wrong = visited(cell, clocks, &visit, mask);
                wrong.is_none()
            });
            if let Some((kind, other)) = wrong {
                return Err(self.offence(machine, at, touch, lane, kind, other));
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
        let &Remote { space, doing, begin, bytes, ref viewer, segment } = remote;
        let now = if doing == Doing::Reading { self.now } else { 0 };
        let visit = Visit { who: Who::new(segment, at.pc, WHOLE), viewer, doing, strong: doing == Doing::Changing, now };
        let (mut wrong, mut unfenced) = (None, None);
        self.cells(machine, space, begin, bytes as u64, |cell, mask, clocks| {
            let writer = usize::from(clocks.segments[cell.writer.segment as usize].actor);
            let fenced = clocks.warps.get(writer).is_none_or(|warp| warp.proxy_fence >= cell.stored);
            if space == Space::Shared && doing == Doing::Reading && cell.stored != 0 && !fenced {
                unfenced = Some(cell.writer);
            }
            wrong = visited(cell, clocks, &visit, mask);
            wrong.is_none()
        });
        if let Some((kind, other)) = wrong {
            let touch = Touch { space, doing, mask: 1, at: &[begin; LANES], bytes, order: Order::Weak };
            return Err(self.offence(machine, at, &touch, 0, kind, other));
        }
        match unfenced.map(|writer| self.name(machine, writer)) {
            None => Ok(()),
            Some(writer) => {
                let what = format!("reads {bytes} bytes at shared address {begin:#x} through the asynchronous proxy");
                let message = format!("{what}, which {writer} writes without fence.proxy.async after it");
                Err(machine.fault(at, 0, FaultKind::MissingFence, message))
            }
        }
    }

    /// Copies to shared memory are under way.
    pub(crate) fn in_flight(&mut self, machine: &Machine<'_>, mask: Mask, to: &[u64; LANES], bytes: u64) {
        for lane in each(mask) {
            self.cells(machine, Space::Shared, to[lane], bytes, |cell, _, _| {
                cell.pending = true;
                true
            });
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

/// Notes an access to some bytes of a cell, and says what is wrong with it.
fn visited(cell: &mut Cell, clocks: &Clocks, visit: &Visit<'_>, mask: u8) -> Option<(FaultKind, Offender)> {
    let &Visit { who, viewer, doing, strong, now } = visit;
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
