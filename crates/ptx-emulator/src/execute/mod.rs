//! One instruction for the active lanes of a group.
//!
//! Invariant: an instruction that has to wait has changed nothing; it is executed anew when its lanes go on.

mod atomic;
pub(crate) mod barrier;
pub(crate) mod bulk;
mod compare;
mod convert;
mod copy;
mod float;
mod group;
mod half;
mod integer;
mod matrix;
pub(crate) mod mbarrier;
pub(crate) mod memory;
mod moves;
mod shuffle;

use crate::fault::{Fault, FaultKind};
use crate::instruction::{Instruction, Operation};
use crate::machine::{At, Machine};
use crate::registers::{Lane, first};

/// What the group does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    Next,
    /// The next instruction, after a look at the other groups of the warp.
    Look,
    /// Waits here for other lanes of the warp.
    Park,
    /// Waits here for the barrier of this number.
    Barrier(u32),
    /// Waits here for the mbarrier at this address.
    Mbarrier(u32),
}

pub(crate) fn step(machine: &mut Machine<'_>, at: At, instruction: &Instruction) -> Result<Flow, Fault> {
    let warp = &mut machine.warps[at.warp];
    let (registers, slots, mask) = (&mut warp.registers, &instruction.slots, at.mask);
    match &instruction.operation {
        Operation::MoveWord => registers.unary::<u32, u32>(slots.to, slots.a, mask, |x| x),
        Operation::MoveDouble => registers.unary::<u64, u64>(slots.to, slots.a, mask, |x| x),
        Operation::Integer(operator, kind) => integer::execute(*operator, *kind, registers, slots, mask),
        Operation::Float(operator, flags) => float::single(*operator, *flags, registers, slots, mask),
        Operation::Double(operator) => float::double(*operator, registers, slots, mask),
        Operation::Half(operator, flags) => half::execute(*operator, *flags, registers, slots, mask),
        Operation::Wide(kind, adds) => integer::wide(*kind, *adds, registers, slots, mask),
        Operation::Word(operator) => integer::word(*operator, registers, slots, mask),
        Operation::InsertField(sources, wide) => integer::insert_field(sources, *wide, registers, slots.to, mask),
        Operation::Carry(carry) => integer::carry(*carry, registers, slots, mask),
        Operation::Compare(compare) => compare::execute(compare, registers, slots, mask),
        Operation::Classify(class) => compare::classify(*class, registers, slots, mask),
        Operation::Logic(logic) => compare::logic(*logic, registers, slots, mask),
        Operation::Convert(convert) => convert::execute(*convert, registers, slots, mask),
        Operation::ConvertPair(convert) => convert::pair(*convert, registers, slots, mask),
        Operation::MovePredicate => {
            let value = registers.predicates[slots.a as usize];
            registers.set_predicate(slots.to, mask, value);
        }
        Operation::SelectWord => moves::select_word(registers, slots, mask),
        Operation::SelectDouble => moves::select_double(registers, slots, mask),
        Operation::Pack(parts) => moves::pack(parts, registers, slots.to, mask),
        Operation::Unpack(parts) => moves::unpack(parts, registers, slots.a, mask),
        Operation::InSpace(space) => moves::in_space(*space, registers, slots, mask),
        Operation::Clock => {
            let now = warp.steps;
            match slots.to {
                crate::instruction::NONE => u32::write(registers, slots.a, mask, |_| now as u32),
                to => u64::write(registers, to, mask, |_| now),
            }
        }
        Operation::ActiveMask => u32::write(registers, slots.to, mask, |_| mask),
        Operation::Load(access) => memory::load(machine, at, access)?,
        Operation::Store(access) => memory::store(machine, at, access)?,
        Operation::Atomic(atomic) => atomic::execute(machine, at, atomic)?,
        Operation::Trap(what) => return Err(machine.fault(at, first(mask), FaultKind::Trap, *what)),
        Operation::Branch(_) | Operation::BranchTable(_) | Operation::Exit => {
            unreachable!("the block's loop takes branches and exits itself")
        }
        _ => return together(machine, at, instruction),
    }
    Ok(Flow::Next)
}

/// Instructions with more to them than registers and one access.
fn together(machine: &mut Machine<'_>, at: At, instruction: &Instruction) -> Result<Flow, Fault> {
    let slots = &instruction.slots;
    match &instruction.operation {
        Operation::Fence(fence) => {
            if *fence == crate::instruction::Fence::Proxy {
                machine.mbarriers.iter_mut().for_each(|mbarrier| mbarrier.fenced = true);
            }
            machine.checking(|check, _| check.fence(at.warp, *fence));
            Ok(Flow::Next)
        }
        Operation::Barrier(barrier) => barrier::block(machine, at, *barrier, slots),
        Operation::WarpBarrier => barrier::warp(machine, at, slots),
        Operation::Shuffle(shuffle) => shuffle::shuffle(machine, at, shuffle, slots),
        Operation::Vote(vote) => shuffle::vote(machine, at, *vote, slots),
        Operation::Match(all, wide) => shuffle::matching(machine, at, [*all, *wide], slots),
        Operation::Reduce(reduce) => shuffle::reduce(machine, at, *reduce, slots),
        Operation::Elect => shuffle::elect(machine, at, slots),
        Operation::Multiply(multiply) => matrix::multiply(machine, at, multiply),
        Operation::LoadMatrix(matrix) => matrix::load(machine, at, matrix),
        Operation::StoreMatrix(matrix) => matrix::store(machine, at, matrix),
        Operation::CopyAsync(copy) => copy::begin(machine, at, copy),
        Operation::CopyCommit => {
            machine.warps[at.warp].copies.commit(at.mask);
            Ok(Flow::Next)
        }
        Operation::CopyWait(groups) => copy::wait(machine, at, *groups),
        Operation::Mbarrier(mbarrier) => mbarrier::execute(machine, at, mbarrier),
        Operation::Bulk(bulk) => bulk::begin(machine, at, bulk),
        Operation::BulkCommit => {
            machine.warps[at.warp].stores.commit(at.mask);
            Ok(Flow::Next)
        }
        Operation::BulkWait(groups) => bulk::wait(machine, at, *groups),
        Operation::GroupFence | Operation::GroupCommit | Operation::GroupWait(_) | Operation::GroupMultiply(_) => {
            group::execute(machine, at, &instruction.operation)
        }
        other => unreachable!("`step` executes {other:?}"),
    }
}
