//! `cp.async`: copies from global to shared memory that are done when they are waited for.
//!
//! Invariant: without a seed a copy is carried out as late as the rules allow: at the wait that covers it, or when its lane exits.
//! With a seed it may be carried out at once, unless the launch is checked: then every early look at its bytes shall be seen.

use super::Flow;
use super::memory::{Doing, addresses, lost, misaligned_global, shared_index};
use crate::copies::Copy;
use crate::fault::{Fault, FaultKind};
use crate::instruction::{NONE, Order};
use crate::machine::{At, Machine};
use crate::registers::{LANES, each};
use crate::syntax::Space;
use crate::transfer::CopyAsync;
use crate::watch::{Touch, touch};

pub(super) fn begin(machine: &mut Machine<'_>, at: At, copy: &CopyAsync) -> Result<Flow, Fault> {
    let registers = &machine.warps[at.warp].registers;
    let (to, from) = (addresses(registers, &copy.to), addresses(registers, &copy.from));
    let (mut partial, mut sizes) = (0, [0; LANES]);
    for lane in each(at.mask) {
        let warp = &machine.warps[at.warp];
        let ignored = copy.ignore != NONE && warp.registers.predicates[copy.ignore as usize] >> lane & 1 != 0;
        let source_bytes = match copy.source_bytes {
            _ if ignored => 0,
            NONE => copy.bytes,
            slot => warp.registers.word(slot, lane),
        };
        let group = warp.copies.open[lane];
        if source_bytes > copy.bytes {
            let message = format!("copies {source_bytes} bytes to {}", copy.bytes);
            return Err(machine.fault(at, lane, FaultKind::Protocol, message));
        }
        let bytes = copy.bytes as usize;
        shared_index(machine, at, lane, to[lane], bytes, Doing::Writing)?;
        if source_bytes > 0 {
            if !from[lane].is_multiple_of(bytes as u64) {
                return Err(misaligned_global(machine, at, lane, from[lane], bytes, Doing::Reading));
            }
            if machine.global.find(from[lane], u64::from(source_bytes)).is_none() {
                return Err(lost(machine, at, lane, from[lane], source_bytes as usize, Doing::Reading));
            }
        }
        let copy = Copy { lane, group, to: to[lane] as u32, from: from[lane], bytes: copy.bytes, source_bytes, pc: at.pc };
        partial |= u32::from(source_bytes < copy.bytes) << lane;
        sizes[lane] = source_bytes as usize;
        if !machine.checked() && machine.random.as_mut().is_some_and(|random| random.below(2) == 0) {
            carry_out(machine, at, &copy)?;
        } else {
            machine.warps[at.warp].copies.waiting.push(copy);
        }
    }
    let bytes = copy.bytes as usize;
    let write = Touch { space: Space::Shared, doing: Doing::Writing, mask: at.mask, at: &to, bytes, order: Order::Weak };
    touch(machine, at, write)?;
    let read = Touch { space: Space::Global, doing: Doing::Reading, mask: at.mask & !partial, at: &from, ..write };
    touch(machine, at, read)?;
    for lane in each(partial).filter(|lane| sizes[*lane] > 0) {
        touch(machine, at, Touch { mask: 1 << lane, bytes: sizes[lane], ..read })?;
    }
    machine.checking(|check, machine| check.in_flight(machine, at.mask, &to, bytes as u64));
    Ok(Flow::Next)
}

pub(super) fn wait(machine: &mut Machine<'_>, at: At, groups: u32) -> Result<Flow, Fault> {
    for copy in machine.warps[at.warp].copies.due(at.mask, groups) {
        carry_out(machine, at, &copy)?;
    }
    Ok(Flow::Next)
}

pub(super) fn carry_out(machine: &mut Machine<'_>, at: At, copy: &Copy) -> Result<(), Fault> {
    let (to, count) = (copy.to as usize, copy.source_bytes as usize);
    if count > 0 {
        let Some((allocation, offset)) = machine.global.find(copy.from, u64::from(copy.source_bytes)) else {
            return Err(lost(machine, At { pc: copy.pc, ..at }, copy.lane, copy.from, count, Doing::Reading));
        };
        allocation.read(offset, &mut machine.shared[to..to + count]);
    }
    machine.shared[to + count..to + copy.bytes as usize].fill(0);
    machine.checking(|check, _| check.landed(at.warp, copy));
    Ok(())
}

impl Machine<'_> {
    /// Carries out what exiting lanes left under way.
    pub(crate) fn finish_copies(&mut self, at: At) -> Result<(), Fault> {
        self.warps[at.warp].copies.commit(at.mask);
        for copy in self.warps[at.warp].copies.due(at.mask, 0) {
            carry_out(self, at, &copy)?;
        }
        Ok(())
    }
}
