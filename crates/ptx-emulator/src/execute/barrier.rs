//! Barriers of a block and of a warp, and the question whether the lanes of a warp are together.
//!
//! Invariant: a barrier opens when as many warps have arrived as it expects; exited warps are not expected.

use super::Flow;
use crate::fault::{Fault, FaultKind};
use crate::instruction::{Barrier, NONE, Operation, Slots};
use crate::machine::{At, Machine, Waiting};
use crate::registers::{LANES, Lane, Mask, first};
use crate::warp::State;

/// Whether the lanes that a collective instruction names have all arrived. `members` is the register that names them.
pub(super) fn gathered(machine: &Machine<'_>, at: At, members: u32) -> Result<bool, Fault> {
    let warp = &machine.warps[at.warp];
    let named = warp.registers.word(members, first(at.mask));
    for lane in crate::registers::each(at.mask) {
        let own = warp.registers.word(members, lane);
        if own >> lane & 1 == 0 {
            let message = format!("is executed by lane {lane}, which its member mask {own:#010x} does not name");
            return Err(machine.fault(at, lane, FaultKind::Divergence, message));
        }
        if own != named {
            let message = format!("lanes {} and {lane} name the members {named:#010x} and {own:#010x}", first(at.mask));
            return Err(machine.fault(at, lane, FaultKind::Divergence, message));
        }
    }
    Ok(named & warp.alive & !at.mask == 0)
}

/// Whether all lanes of the warp are here; a matrix instruction needs all 32.
pub(super) fn whole_warp(machine: &Machine<'_>, at: At) -> Result<bool, Fault> {
    let alive = machine.warps[at.warp].alive;
    if alive != !0 {
        let message = format!("needs all 32 lanes of the warp; alive are {alive:#010x}");
        return Err(machine.fault(at, first(at.mask), FaultKind::Divergence, message));
    }
    Ok(at.mask == !0)
}

/// `bar.warp.sync`: lanes may meet from different places.
pub(super) fn warp(machine: &mut Machine<'_>, at: At, slots: &Slots) -> Result<Flow, Fault> {
    if gathered(machine, at, slots.a)? {
        machine.checking(|check, _| check.clocks.meet(at.warp));
        return Ok(Flow::Next);
    }
    let code = &machine.kernel.code;
    let warp = &mut machine.warps[at.warp];
    let named = warp.registers.word(slots.a, first(at.mask));
    let waits = |state: State, pc: u32| state == State::Parked && matches!(code[pc as usize].operation, Operation::WarpBarrier);
    let elsewhere = warp.groups.iter().filter(|group| waits(group.state, group.pc)).fold(0, |mask, group| mask | group.mask);
    if named & warp.alive & !(at.mask | elsewhere) != 0 {
        return Ok(Flow::Park);
    }
    for group in warp.groups.iter_mut().filter(|group| waits(group.state, group.pc) && group.mask & named != 0) {
        group.state = State::Ready;
        group.pc += 1;
    }
    machine.checking(|check, _| check.clocks.meet(at.warp));
    Ok(Flow::Look)
}

/// `bar.sync`, `bar.arrive` and `bar.red`.
pub(super) fn block(machine: &mut Machine<'_>, at: At, barrier: Barrier, slots: &Slots) -> Result<Flow, Fault> {
    let lane = first(at.mask);
    let warp = &machine.warps[at.warp];
    if at.mask != warp.alive {
        return Ok(Flow::Park);
    }
    let number = warp.registers.word(slots.a, lane);
    let threads = if slots.b == NONE { 0 } else { warp.registers.word(slots.b, lane) };
    if number as usize >= machine.barriers.len() {
        return Err(machine.fault(at, lane, FaultKind::Divergence, format!("names barrier {number}; there are 16")));
    }
    if !threads.is_multiple_of(LANES as u32) {
        let message = format!("names {threads} threads, which is no multiple of the warp's 32");
        return Err(machine.fault(at, lane, FaultKind::Divergence, message));
    }
    let expected = threads / LANES as u32;
    let state = &mut machine.barriers[number as usize];
    if state.arrived > 0 && state.expected != expected {
        let message = format!("expects {threads} threads where warps that arrived before expect {}", state.expected * LANES as u32);
        return Err(machine.fault(at, lane, FaultKind::Divergence, message));
    }
    state.expected = expected;
    state.arrived += 1;
    if expected == 0 && machine.checked() {
        none_exited(machine, at)?;
    }
    machine.checking(|check, _| check.arrive(at.warp, number as usize));
    let state = &mut machine.barriers[number as usize];
    if slots.c != NONE {
        let predicate = machine.warps[at.warp].registers.predicates[slots.c as usize] & at.mask;
        state.ones += predicate.count_ones();
        state.votes += at.mask.count_ones();
    }
    if barrier != Barrier::Arrive {
        state.waiting.push(Waiting { warp: at.warp, pc: at.pc, mask: at.mask });
    }
    if barrier != Barrier::Arrive {
        let group = machine.warps[at.warp].groups.iter_mut().find(|group| group.mask & at.mask != 0);
        // The group stands here until the barrier opens, which may be at once.
        if let Some(group) = group {
            group.pc = at.pc;
            group.state = State::Barrier(number);
        }
    }
    let opened = machine.open_if_complete(number as usize)?;
    Ok(match (barrier, opened) {
        (Barrier::Arrive, _) | (_, true) => Flow::Next,
        _ => Flow::Barrier(number),
    })
}

/// A barrier of all threads of the block that some have left: the hardware counts those that are there, older hardware hangs.
fn none_exited(machine: &Machine<'_>, at: At) -> Result<(), Fault> {
    let threads: u32 = machine.setup.block.iter().product();
    let alive: u32 = machine.warps.iter().map(|warp| warp.alive.count_ones()).sum();
    if alive < threads {
        let message = format!("is a barrier of all {threads} threads of the block, of which {} have exited", threads - alive);
        return Err(machine.fault(at, first(at.mask), FaultKind::Divergence, message));
    }
    Ok(())
}

impl Machine<'_> {
    /// Lets the warps at a barrier go on if all it expects have arrived.
    pub(crate) fn open_if_complete(&mut self, number: usize) -> Result<bool, Fault> {
        let barrier = &self.barriers[number];
        let alive = self.warps.iter().filter(|warp| warp.alive != 0).count() as u32;
        let expected = if barrier.expected == 0 { alive } else { barrier.expected };
        if barrier.arrived == 0 || barrier.arrived < expected {
            return Ok(false);
        }
        let done = std::mem::take(&mut self.barriers[number]);
        let warps: Vec<usize> = done.waiting.iter().map(|waiting| waiting.warp).collect();
        self.checking(|check, _| check.open(number, &warps));
        for waiting in &done.waiting {
            self.answer(*waiting, done.ones, done.votes);
            let warp = &mut self.warps[waiting.warp];
            for group in warp.groups.iter_mut().filter(|group| group.state == State::Barrier(number as u32)) {
                group.state = State::Ready;
                group.pc += 1;
            }
        }
        Ok(true)
    }

    /// Gives a warp the result of `bar.red`.
    fn answer(&mut self, waiting: Waiting, ones: u32, votes: u32) {
        let instruction = &self.kernel.code[waiting.pc as usize];
        let Operation::Barrier(barrier) = &instruction.operation else { return };
        let registers = &mut self.warps[waiting.warp].registers;
        let (to, mask): (u32, Mask) = (instruction.slots.to, waiting.mask);
        match barrier {
            Barrier::CountOnes => u32::write(registers, to, mask, |_| ones),
            Barrier::And => registers.set_predicate(to, mask, if ones == votes { !0 } else { 0 }),
            Barrier::Or => registers.set_predicate(to, mask, if ones > 0 { !0 } else { 0 }),
            Barrier::Sync | Barrier::Arrive => {}
        }
    }

    /// A warp has exited: barriers that expect all of the block may be complete now.
    pub(crate) fn barriers_after_exit(&mut self) -> Result<(), Fault> {
        for number in 0..self.barriers.len() {
            if self.barriers[number].expected > 0 {
                continue;
            }
            if let (Some(waiting), true) = (self.barriers[number].waiting.first().copied(), self.checked()) {
                none_exited(self, At { warp: waiting.warp, pc: waiting.pc, mask: waiting.mask })?;
            }
            self.open_if_complete(number)?;
        }
        Ok(())
    }
}
