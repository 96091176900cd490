//! Barriers in shared memory.
//!
//! Invariant: a phase ends when all arrivals it expects have come and no announced byte is missing; then the next one begins. The
//! eight bytes in memory are not used: an mbarrier is known by its address.

use super::Flow;
use super::memory::{Doing, addresses, shared_index};
use crate::fault::{Fault, FaultKind};
use crate::instruction::NONE;
use crate::machine::{At, Machine};
use crate::registers::{each, first};
use crate::transfer::{Mbarrier, MbarrierOperator};
use crate::warp::State;
use crate::watch::clocks::{ACTORS, Clock, join};

#[derive(Clone, Debug)]
pub(crate) struct MbarrierState {
    pub(crate) address: u32,
    count: u32,
    pending: u32,
    /// Bytes announced less bytes that came.
    bytes: i64,
    phase: u32,
    /// A fence made its initialisation known to the asynchronous side.
    pub(crate) fenced: bool,
    /// What those that arrived knew, and what a wait for the last finished phase learns.
    clock: Clock,
    done: Clock,
}

pub(super) fn execute(machine: &mut Machine<'_>, at: At, mbarrier: &Mbarrier) -> Result<Flow, Fault> {
    let addresses = addresses(&machine.warps[at.warp].registers, &mbarrier.address);
    match mbarrier.operator {
        MbarrierOperator::TryWait | MbarrierOperator::TestWait => return wait(machine, at, mbarrier, &addresses),
        MbarrierOperator::TryWaitState | MbarrierOperator::TestWaitState => return wait(machine, at, mbarrier, &addresses),
        _ => {}
    }
    for lane in each(at.mask) {
        let address = shared_index(machine, at, lane, addresses[lane], 8, Doing::Changing)? as u32;
        let value = if mbarrier.value == NONE { 1 } else { machine.warps[at.warp].registers.word(mbarrier.value, lane) };
        if mbarrier.operator == MbarrierOperator::Initialise {
            initialise(machine, at, lane, address, value)?;
            continue;
        }
        let index = machine.mbarrier(at, lane, address)?;
        let phase = machine.mbarriers[index].phase;
        match mbarrier.operator {
            MbarrierOperator::Invalidate => drop(machine.mbarriers.swap_remove(index)),
            MbarrierOperator::Expect => machine.mbarriers[index].bytes += i64::from(value),
            MbarrierOperator::ArriveExpect => {
                machine.mbarriers[index].bytes += i64::from(value);
                arrive(machine, at, lane, index, 1)?;
            }
            MbarrierOperator::ArriveAfterCopies(counted) => {
                for copy in machine.warps[at.warp].copies.all_of(lane) {
                    super::copy::carry_out(machine, at, &copy)?;
                }
                if !counted {
                    machine.mbarriers[index].pending += 1;
                }
                arrive(machine, at, lane, index, 1)?;
            }
            _ => arrive(machine, at, lane, index, value)?,
        }
        if mbarrier.to != NONE {
            machine.warps[at.warp].registers.doubles[mbarrier.to as usize][lane] = u64::from(phase);
        }
    }
    Ok(Flow::Next)
}

fn initialise(machine: &mut Machine<'_>, at: At, lane: usize, address: u32, count: u32) -> Result<(), Fault> {
    if machine.mbarriers.iter().any(|state| state.address == address) {
        let message = format!("initialises the mbarrier at {address:#x} a second time");
        return Err(machine.fault(at, lane, FaultKind::Protocol, message));
    }
    if count == 0 || count >= 1 << 20 {
        return Err(machine.fault(at, lane, FaultKind::Protocol, format!("initialises an mbarrier with a count of {count}")));
    }
    let zero = [0; ACTORS];
    let state = MbarrierState { address, count, pending: count, bytes: 0, phase: 0, fenced: false, clock: zero, done: zero };
    machine.mbarriers.push(state);
    Ok(())
}

fn arrive(machine: &mut Machine<'_>, at: At, lane: usize, index: usize, count: u32) -> Result<(), Fault> {
    if machine.mbarriers[index].pending < count {
        let state = &machine.mbarriers[index];
        let message = format!(
            "arrives {count} times at the mbarrier at {:#x}, whose phase {} of {} arrivals expects {} more",
            state.address, state.phase, state.count, state.pending
        );
        return Err(machine.fault(at, lane, FaultKind::Protocol, message));
    }
    if let Some(clock) = machine.checking(|check, _| check.clocks.release(at.warp)) {
        join(&mut machine.mbarriers[index].clock, &clock);
    }
    machine.mbarriers[index].pending -= count;
    machine.end_phase(index);
    Ok(())
}

fn wait(machine: &mut Machine<'_>, at: At, mbarrier: &Mbarrier, addresses: &[u64; 32]) -> Result<Flow, Fault> {
    let states = matches!(mbarrier.operator, MbarrierOperator::TryWaitState | MbarrierOperator::TestWaitState);
    let blocks = matches!(mbarrier.operator, MbarrierOperator::TryWait | MbarrierOperator::TryWaitState);
    let mut over = 0;
    for lane in each(at.mask) {
        let address = shared_index(machine, at, lane, addresses[lane], 8, Doing::Reading)? as u32;
        let index = machine.mbarrier(at, lane, address)?;
        let state = &machine.mbarriers[index];
        let registers = &machine.warps[at.warp].registers;
        let finished = if states {
            u64::from(state.phase) != registers.double(mbarrier.value, lane)
        } else {
            state.phase & 1 != registers.word(mbarrier.value, lane) & 1
        };
        if finished {
            over |= 1 << lane;
            let done = state.done;
            machine.checking(|check, _| check.clocks.acquire(at.warp, &done));
        }
    }
    // A wait may give up at any time; one in vain is repeated when a phase has ended.
    let lane = first(at.mask);
    if over == 0 && blocks && each(at.mask).all(|other| addresses[other] == addresses[lane]) {
        return Ok(Flow::Mbarrier(addresses[lane] as u32));
    }
    machine.warps[at.warp].registers.set_predicate(mbarrier.to, at.mask, over);
    Ok(Flow::Next)
}

impl Machine<'_> {
    /// The index of the mbarrier at an address.
    pub(crate) fn mbarrier(&self, at: At, lane: usize, address: u32) -> Result<usize, Fault> {
        self.mbarriers.iter().position(|state| state.address == address).ok_or_else(|| {
            let message = format!("names the mbarrier at {address:#x}, which nobody has initialised");
            self.fault(at, lane, FaultKind::Protocol, message)
        })
    }

    /// Bytes that an mbarrier was told of have come.
    pub(crate) fn bytes_came(&mut self, index: usize, bytes: usize, clock: Option<&Clock>) {
        self.mbarriers[index].bytes -= bytes as i64;
        if let Some(clock) = clock {
            join(&mut self.mbarriers[index].clock, clock);
        }
        self.end_phase(index);
    }

    /// Begins the next phase if this one is complete, and wakes those that wait for it.
    fn end_phase(&mut self, index: usize) {
        let state = &mut self.mbarriers[index];
        if state.pending != 0 || state.bytes != 0 {
            return;
        }
        state.phase = state.phase.wrapping_add(1);
        state.pending = state.count;
        state.done = state.clock;
        let address = state.address;
        for group in self.warps.iter_mut().flat_map(|warp| &mut warp.groups) {
            if group.state == State::Mbarrier(address) {
                group.state = State::Ready;
            }
        }
    }
}
