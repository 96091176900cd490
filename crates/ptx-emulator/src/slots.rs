//! Which registers an instruction reads and writes.
//!
//! Invariant: every slot of an instruction is shown exactly once per use, with the file it lies in, the reads before the writes.

use crate::instruction::{Address, Answer, Barrier, GroupFactor, Instruction, Integer, Kind, NONE, Operation, Vote};
use crate::scalar::Scalar;
use crate::transfer::MbarrierOperator;

/// The files of a warp's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum File {
    Words,
    Doubles,
    Predicates,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Read,
    Write,
    /// At a time after the instruction, by something that goes on meanwhile.
    Held,
}

/// Shows the slots of an instruction, which may be changed.
pub(crate) struct Visitor<'v> {
    show: &'v mut dyn FnMut(File, Use, &mut u32),
}

fn wide(wide: bool) -> File {
    if wide { File::Doubles } else { File::Words }
}

fn file(scalar: Scalar) -> File {
    if scalar == Scalar::Predicate { File::Predicates } else { wide(scalar.bytes() == 8) }
}

fn file_of_kind(kind: Kind) -> File {
    wide(matches!(kind, Kind::U64 | Kind::S64))
}

pub(crate) fn visit(instruction: &mut Instruction, show: &mut dyn FnMut(File, Use, &mut u32)) {
    let mut visitor = Visitor { show };
    visitor.reads(File::Predicates, [&mut instruction.guard]);
    visitor.plain(instruction);
    visitor.access(instruction);
    visitor.together(instruction);
}

impl Visitor<'_> {
    fn each<'s>(&mut self, file: File, how: Use, slots: impl IntoIterator<Item = &'s mut u32>) {
        for slot in slots.into_iter().filter(|slot| **slot != NONE) {
            (self.show)(file, how, slot);
        }
    }

    fn reads<'s>(&mut self, file: File, slots: impl IntoIterator<Item = &'s mut u32>) {
        self.each(file, Use::Read, slots);
    }

    fn writes<'s>(&mut self, file: File, slots: impl IntoIterator<Item = &'s mut u32>) {
        self.each(file, Use::Write, slots);
    }

    fn address(&mut self, address: &mut Address) {
        self.reads(wide(address.wide), [&mut address.slot]);
    }

    /// Instructions on registers alone.
    fn plain(&mut self, instruction: &mut Instruction) {
        let (slots, operation) = (&mut instruction.slots, &mut instruction.operation);
        let (to, a, b, c) = (&mut slots.to, &mut slots.a, &mut slots.b, &mut slots.c);
        let (sources, counts, third, result) = match operation {
            Operation::MoveWord | Operation::Word(_) | Operation::Float(..) | Operation::Half(..) | Operation::ConvertPair(_) => {
                (File::Words, File::Words, File::Words, File::Words)
            }
            Operation::MoveDouble | Operation::Double(_) => (File::Doubles, File::Doubles, File::Doubles, File::Doubles),
            Operation::MovePredicate | Operation::Logic(_) => (File::Predicates, File::Predicates, File::Predicates, File::Predicates),
            Operation::SelectWord => (File::Words, File::Words, File::Predicates, File::Words),
            Operation::SelectDouble => (File::Doubles, File::Doubles, File::Predicates, File::Doubles),
            Operation::Integer(operator, kind) => {
                let own = file_of_kind(*kind);
                match operator {
                    Integer::ShiftLeft | Integer::ShiftRight | Integer::ExtractField => (own, File::Words, File::Words, own),
                    Integer::CountOnes | Integer::CountLeadingZeros | Integer::FindLeadingOne => (own, own, own, File::Words),
                    _ => (own, own, own, own),
                }
            }
            Operation::Wide(kind, _) => {
                let result = wide(matches!(kind, Kind::U32 | Kind::S32));
                (File::Words, File::Words, result, result)
            }
            Operation::Carry(carry) => (wide(carry.wide), wide(carry.wide), File::Words, wide(carry.wide)),
            Operation::Classify(class) => (wide(class.wide), File::Words, File::Words, File::Predicates),
            Operation::Compare(compare) => {
                let answer = if compare.answer == Answer::Predicate { File::Predicates } else { File::Words };
                (file(compare.scalar), file(compare.scalar), File::Predicates, answer)
            }
            Operation::Convert(convert) => (file(convert.from), File::Words, File::Words, file(convert.to)),
            Operation::InSpace(_) => (File::Doubles, File::Words, File::Words, File::Predicates),
            Operation::BranchTable(_) | Operation::WarpBarrier | Operation::Reduce(_) | Operation::ActiveMask => {
                (File::Words, File::Words, File::Words, File::Words)
            }
            Operation::Vote(vote) => {
                let result = if *vote == Vote::Ballot { File::Words } else { File::Predicates };
                (File::Predicates, File::Words, File::Words, result)
            }
            Operation::Barrier(barrier) => {
                let result = if *barrier == Barrier::CountOnes { File::Words } else { File::Predicates };
                (File::Words, File::Words, File::Predicates, result)
            }
            Operation::Shuffle(shuffle) => {
                self.reads(File::Words, [&mut shuffle.members]);
                (File::Words, File::Words, File::Words, File::Words)
            }
            _ => return,
        };
        self.reads(sources, [a]);
        self.reads(counts, [b]);
        self.reads(third, [c]);
        self.writes(result, [to]);
        match operation {
            Operation::Compare(compare) => self.writes(File::Predicates, [&mut compare.second]),
            Operation::Shuffle(shuffle) => self.writes(File::Predicates, [&mut shuffle.in_range]),
            _ => {}
        }
    }

    /// Instructions with lists of registers or with addresses.
    fn access(&mut self, instruction: &mut Instruction) {
        let slots = &mut instruction.slots;
        match &mut instruction.operation {
            Operation::Pack(parts) => {
                self.reads(File::Words, &mut parts.slots);
                self.writes(wide(parts.wide), [&mut slots.to]);
            }
            Operation::Unpack(parts) => {
                self.reads(wide(parts.wide), [&mut slots.a]);
                self.writes(File::Words, &mut parts.slots);
            }
            Operation::InsertField(sources, is_wide) => {
                let [a, b, begin, length] = sources.as_mut();
                self.reads(wide(*is_wide), [a, b]);
                self.reads(File::Words, [begin, length]);
                self.writes(wide(*is_wide), [&mut slots.to]);
            }
            Operation::Load(access) => {
                self.address(&mut access.address);
                access.elements.iter_mut().for_each(|element| self.writes(wide(element.wide), [&mut element.slot]));
            }
            Operation::Store(access) => {
                self.address(&mut access.address);
                access.elements.iter_mut().for_each(|element| self.reads(wide(element.wide), [&mut element.slot]));
            }
            Operation::Atomic(atomic) => {
                let own = file(atomic.scalar);
                self.address(&mut atomic.address);
                self.reads(own, atomic.values.iter_mut().chain([&mut atomic.replacement]));
                self.writes(own, &mut atomic.results);
            }
            Operation::Clock => {
                self.writes(File::Words, [&mut slots.a]);
                self.writes(File::Doubles, [&mut slots.to]);
            }
            Operation::Match(_, is_wide) => {
                self.reads(wide(*is_wide), [&mut slots.a]);
                self.reads(File::Words, [&mut slots.b]);
                self.writes(File::Words, [&mut slots.to]);
                self.writes(File::Predicates, [&mut slots.c]);
            }
            Operation::Elect => {
                self.reads(File::Words, [&mut slots.b]);
                self.writes(File::Words, [&mut slots.to]);
                self.writes(File::Predicates, [&mut slots.c]);
            }
            _ => {}
        }
    }

    /// Matrices, copies and what goes on beside the warp.
    fn together(&mut self, instruction: &mut Instruction) {
        match &mut instruction.operation {
            Operation::Multiply(multiply) => {
                self.reads(File::Words, multiply.a.iter_mut().chain(&mut multiply.b).chain(&mut multiply.c));
                self.writes(File::Words, &mut multiply.d);
            }
            Operation::LoadMatrix(matrix) => {
                self.address(&mut matrix.address);
                self.writes(File::Words, &mut matrix.registers);
            }
            Operation::StoreMatrix(matrix) => {
                self.address(&mut matrix.address);
                self.reads(File::Words, &mut matrix.registers);
            }
            Operation::CopyAsync(copy) => {
                self.address(&mut copy.to);
                self.address(&mut copy.from);
                self.reads(File::Words, [&mut copy.source_bytes]);
                self.reads(File::Predicates, [&mut copy.ignore]);
            }
            Operation::Mbarrier(mbarrier) => {
                self.address(&mut mbarrier.address);
                let states = matches!(mbarrier.operator, MbarrierOperator::TryWaitState | MbarrierOperator::TestWaitState);
                let waits = states || matches!(mbarrier.operator, MbarrierOperator::TryWait | MbarrierOperator::TestWait);
                self.reads(wide(states), [&mut mbarrier.value]);
                self.writes(if waits { File::Predicates } else { File::Doubles }, [&mut mbarrier.to]);
            }
            Operation::Bulk(bulk) => {
                self.address(&mut bulk.shared);
                self.address(&mut bulk.global);
                bulk.mbarrier.iter_mut().for_each(|address| self.address(address));
                self.reads(File::Words, bulk.coordinates.iter_mut().chain([&mut bulk.bytes]));
            }
            Operation::GroupMultiply(multiply) => {
                self.each(File::Words, Use::Held, &mut multiply.d);
                match &mut multiply.a {
                    GroupFactor::Descriptor(slot) => self.reads(File::Doubles, [slot]),
                    GroupFactor::Registers(slots) => self.each(File::Words, Use::Held, slots),
                }
                self.reads(File::Doubles, [&mut multiply.b]);
                self.reads(File::Predicates, [&mut multiply.keep]);
            }
            _ => {}
        }
    }
}
