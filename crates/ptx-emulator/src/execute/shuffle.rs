//! Instructions by which the lanes of a warp exchange values.
//!
//! Invariant: they run when all living lanes that the member mask names are there, and read no other lane.

use super::Flow;
use super::barrier::gathered;
use crate::fault::{Fault, FaultKind};
use crate::instruction::{NONE, Reduce, Shuffle, ShuffleMode, Slots, Vote};
use crate::machine::{At, Machine};
use crate::registers::{LANES, Lane, each, first};

pub(super) fn shuffle(machine: &mut Machine<'_>, at: At, shuffle: &Shuffle, slots: &Slots) -> Result<Flow, Fault> {
    if !gathered(machine, at, shuffle.members)? {
        return Ok(Flow::Park);
    }
    let registers = &mut machine.warps[at.warp].registers;
    let (values, others, clamps) = (u32::read(registers, slots.a), u32::read(registers, slots.b), u32::read(registers, slots.c));
    let (mut results, mut in_range, mut absent) = ([!0; LANES], 0, None);
    for lane in each(at.mask) {
        let (source, inside) = source(shuffle.mode, lane, others[lane], clamps[lane]);
        in_range |= u32::from(inside) << lane;
        // A lane that takes no part gives nothing one may rely on: all ones here.
        if at.mask >> source & 1 != 0 {
            results[lane] = values[source];
        } else {
            absent = Some((lane, source));
        }
    }
    u32::write(registers, slots.to, at.mask, |lane| results[lane]);
    if shuffle.in_range != NONE {
        registers.set_predicate(shuffle.in_range, at.mask, in_range);
    }
    if let (Some((lane, source)), true) = (absent, machine.checked()) {
        let message = format!("lane {lane} reads lane {source}, which takes no part (those that do: {:#010x})", at.mask);
        return Err(machine.fault(at, lane, FaultKind::Divergence, message));
    }
    Ok(Flow::Next)
}

/// The lane a shuffle reads, and whether it is inside the segment; if not it is the lane itself.
fn source(mode: ShuffleMode, lane: usize, other: u32, clamp: u32) -> (usize, bool) {
    let (lane, other) = (lane as u32, other & 31);
    let (clamp, segment) = (clamp & 31, clamp >> 8 & 31);
    let (low, high) = (lane & segment, (lane & segment) | (clamp & !segment));
    let (source, inside) = match mode {
        ShuffleMode::Up => (lane.wrapping_sub(other), lane as i32 - other as i32 >= high as i32),
        ShuffleMode::Down => (lane + other, lane + other <= high),
        ShuffleMode::Butterfly => (lane ^ other, lane ^ other <= high),
        ShuffleMode::Index => (low | (other & !segment), low | (other & !segment) <= high),
    };
    (if inside { source as usize } else { lane as usize }, inside)
}

pub(super) fn vote(machine: &mut Machine<'_>, at: At, vote: Vote, slots: &Slots) -> Result<Flow, Fault> {
    if !gathered(machine, at, slots.b)? {
        return Ok(Flow::Park);
    }
    let registers = &mut machine.warps[at.warp].registers;
    let yes = registers.predicates[slots.a as usize] & at.mask;
    let result = match vote {
        Vote::Ballot => {
            u32::write(registers, slots.to, at.mask, |_| yes);
            return Ok(Flow::Next);
        }
        Vote::All => yes == at.mask,
        Vote::Any => yes != 0,
        Vote::Uniform => yes == 0 || yes == at.mask,
    };
    registers.set_predicate(slots.to, at.mask, if result { !0 } else { 0 });
    Ok(Flow::Next)
}

/// `match.any` and, where the first is true, `match.all`; of doubles where the second is true.
pub(super) fn matching(machine: &mut Machine<'_>, at: At, [all, wide]: [bool; 2], slots: &Slots) -> Result<Flow, Fault> {
    if !gathered(machine, at, slots.b)? {
        return Ok(Flow::Park);
    }
    let registers = &mut machine.warps[at.warp].registers;
    let values = if wide { u64::read(registers, slots.a) } else { u32::read(registers, slots.a).map(u64::from) };
    let equal = |lane: usize| each(at.mask).filter(|other| values[*other] == values[lane]).fold(0, |mask, other| mask | 1 << other);
    let same = equal(first(at.mask)) == at.mask;
    let result = |lane: usize| match all {
        true if same => at.mask,
        true => 0,
        false => equal(lane),
    };
    u32::write(registers, slots.to, at.mask, result);
    if slots.c != NONE {
        registers.set_predicate(slots.c, at.mask, if same { !0 } else { 0 });
    }
    Ok(Flow::Next)
}

pub(super) fn reduce(machine: &mut Machine<'_>, at: At, reduce: Reduce, slots: &Slots) -> Result<Flow, Fault> {
    if !gathered(machine, at, slots.b)? {
        return Ok(Flow::Park);
    }
    let registers = &mut machine.warps[at.warp].registers;
    let values = u32::read(registers, slots.a);
    let combine = |x: u32, y: u32| match reduce {
        Reduce::Add => x.wrapping_add(y),
        Reduce::MinimumSigned => (x as i32).min(y as i32) as u32,
        Reduce::MaximumSigned => (x as i32).max(y as i32) as u32,
        Reduce::Minimum => x.min(y),
        Reduce::Maximum => x.max(y),
        Reduce::And => x & y,
        Reduce::Or => x | y,
        Reduce::Xor => x ^ y,
    };
    let result = each(at.mask).map(|lane| values[lane]).reduce(combine).expect("an executed instruction has a lane");
    u32::write(registers, slots.to, at.mask, |_| result);
    Ok(Flow::Next)
}

/// Chooses the lowest lane.
pub(super) fn elect(machine: &mut Machine<'_>, at: At, slots: &Slots) -> Result<Flow, Fault> {
    if !gathered(machine, at, slots.b)? {
        return Ok(Flow::Park);
    }
    let registers = &mut machine.warps[at.warp].registers;
    let leader = first(at.mask);
    u32::write(registers, slots.to, at.mask, |_| leader as u32);
    if slots.c != NONE {
        registers.set_predicate(slots.c, at.mask, 1 << leader);
    }
    Ok(Flow::Next)
}
