//! Registers that are never needed at the same time share a slot: PTX has thousands of them, of which few are alive, and a warp's
//! registers should fit the caches of the host.
//!
//! Invariant: a slot holds one register from its first write to its last read along every path. Lanes keep apart by themselves, as
//! each has its own copy of a slot; registers that something else reads or writes later, and constants, share with nobody.

use crate::instruction::{NONE, Operation};
use crate::kernel::Kernel;
use crate::slots::{File, Use, visit};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

/// Registers as one range of numbers: words, then doubles, then predicates.
struct Numbers {
    words: usize,
    doubles: usize,
    all: usize,
}

impl Numbers {
    fn of(&self, file: File, slot: u32) -> usize {
        slot as usize
            + match file {
                File::Words => 0,
                File::Doubles => self.words,
                File::Predicates => self.words + self.doubles,
            }
    }
}

type Bits = Vec<u64>;

fn set(bits: &mut Bits, index: usize) {
    bits[index / 64] |= 1 << (index % 64);
}

fn has(bits: &Bits, index: usize) -> bool {
    bits[index / 64] >> (index % 64) & 1 != 0
}

fn each(bits: &Bits) -> impl Iterator<Item = usize> {
    bits.iter().enumerate().flat_map(|(word, bits)| (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| 64 * word + bit))
}

/// A stretch of code that is entered at its beginning and left at its end.
struct Block {
    begin: usize,
    end: usize,
    next: Vec<usize>,
    /// Read before they are written, written for all lanes, alive at the beginning.
    reads: Bits,
    writes: Bits,
    alive: Bits,
}

pub(crate) fn compact(kernel: &mut Kernel) {
    let numbers = Numbers { words: kernel.words, doubles: kernel.doubles, all: kernel.words + kernel.doubles + kernel.predicates };
    let mut blocks = blocks(kernel, &numbers);
    live(&mut blocks, numbers.all);
    let mut spans = vec![(usize::MAX, 0); numbers.all];
    let mut touch = |register: usize, at: usize| spans[register] = (spans[register].0.min(at), spans[register].1.max(at));
    for (index, instruction) in kernel.code.iter_mut().enumerate() {
        // Those change a register of a lane before they read the others.
        let early = matches!(instruction.operation, Operation::Atomic(_) | Operation::Mbarrier(_));
        visit(instruction, &mut |file, how, slot| {
            let register = numbers.of(file, *slot);
            match how {
                Use::Read => touch(register, 2 * index + usize::from(early)),
                Use::Write => touch(register, 2 * index + 1),
                Use::Held => {
                    touch(register, 0);
                    touch(register, usize::MAX);
                }
            }
        });
    }
    for block in &blocks {
        each(&block.alive).for_each(|register| touch(register, 2 * block.begin));
        for register in block.next.iter().flat_map(|next| each(&blocks[*next].alive)) {
            touch(register, 2 * block.end - 1);
        }
    }
    let pinned = [
        (
            File::Words,
            kernel
                .constant_words
                .iter()
                .map(|(slot, _)| *slot)
                .chain(kernel.special_words.iter().map(|(slot, _)| *slot))
                .collect::<Vec<_>>(),
        ),
        (
            File::Doubles,
            kernel.constant_doubles.iter().chain(&kernel.dynamic_doubles).chain(&kernel.image_doubles).map(|(slot, _)| *slot).collect(),
        ),
        (File::Predicates, kernel.constant_predicates.iter().map(|(slot, _)| *slot).collect()),
    ];
    for (file, slots) in &pinned {
        slots.iter().for_each(|slot| spans[numbers.of(*file, *slot)] = (0, usize::MAX));
    }
    rename(kernel, &numbers, &spans);
}

fn blocks(kernel: &mut Kernel, numbers: &Numbers) -> Vec<Block> {
    let mut leaders = BTreeSet::from([0]);
    for (index, instruction) in kernel.code.iter().enumerate() {
        match &instruction.operation {
            Operation::Branch(target) => leaders.extend([*target as usize, index + 1]),
            Operation::BranchTable(targets) => leaders.extend(targets.iter().map(|target| *target as usize).chain([index + 1])),
            Operation::Exit => drop(leaders.insert(index + 1)),
            _ => {}
        }
    }
    let count = kernel.code.len();
    let begins: Vec<usize> = leaders.into_iter().filter(|leader| *leader < count).collect();
    let at = |index: usize| begins.partition_point(|begin| *begin <= index) - 1;
    let mut blocks = Vec::with_capacity(begins.len());
    for (number, begin) in begins.iter().enumerate() {
        let end = begins.get(number + 1).copied().unwrap_or(count);
        let last = &kernel.code[end - 1];
        let mut next: Vec<usize> = match &last.operation {
            Operation::Branch(target) => vec![at(*target as usize)],
            Operation::BranchTable(targets) => targets.iter().map(|target| at(*target as usize)).collect(),
            _ => Vec::new(),
        };
        let leaves = matches!(last.operation, Operation::Branch(_) | Operation::BranchTable(_) | Operation::Exit) && last.guard == NONE;
        if !leaves && end < count {
            next.push(number + 1);
        }
        let empty = vec![0; numbers.all.div_ceil(64)];
        let mut block = Block { begin: *begin, end, next, reads: empty.clone(), writes: empty.clone(), alive: empty };
        for instruction in &mut kernel.code[*begin..end] {
            let all_lanes = instruction.guard == NONE;
            visit(instruction, &mut |file, how, slot| {
                let register = numbers.of(file, *slot);
                if how == Use::Write && all_lanes {
                    set(&mut block.writes, register);
                } else if how == Use::Read && !has(&block.writes, register) {
                    set(&mut block.reads, register);
                }
            });
        }
        blocks.push(block);
    }
    blocks
}

/// Finds what is alive at the beginning of each block.
fn live(blocks: &mut [Block], registers: usize) {
    let mut changed = true;
    while changed {
        changed = false;
        for number in (0..blocks.len()).rev() {
            let mut out = vec![0; registers.div_ceil(64)];
            for next in &blocks[number].next {
                out.iter_mut().zip(&blocks[*next].alive).for_each(|(out, alive)| *out |= alive);
            }
            let block = &mut blocks[number];
            for (word, alive) in block.alive.iter_mut().enumerate() {
                let new = block.reads[word] | (out[word] & !block.writes[word]);
                changed |= new != *alive;
                *alive = new;
            }
        }
    }
}

/// Gives every register the first slot that is free for its span, and renames all.
fn rename(kernel: &mut Kernel, numbers: &Numbers, spans: &[(usize, usize)]) {
    let mut names = vec![NONE; numbers.all];
    let mut counts = [0; 3];
    let bounds = [0, numbers.words, numbers.words + numbers.doubles, numbers.all];
    for (file, count) in counts.iter_mut().enumerate() {
        let mut order: Vec<usize> = (bounds[file]..bounds[file + 1]).filter(|register| spans[*register].0 != usize::MAX).collect();
        order.sort_by_key(|register| spans[*register].0);
        let mut busy: BinaryHeap<Reverse<(usize, u32)>> = BinaryHeap::new();
        for register in order {
            let (begin, end) = spans[register];
            let free = busy.peek().is_some_and(|Reverse((last, _))| *last < begin);
            let slot = match if free { busy.pop() } else { None } {
                Some(Reverse((_, slot))) => slot,
                None => {
                    *count += 1;
                    *count - 1
                }
            };
            names[register] = slot;
            busy.push(Reverse((end, slot)));
        }
    }
    let name = |file: File, slot: &mut u32| *slot = names[numbers.of(file, *slot)];
    kernel.code.iter_mut().for_each(|instruction| visit(instruction, &mut |file, _, slot| name(file, slot)));
    kernel.constant_words.iter_mut().for_each(|(slot, _)| name(File::Words, slot));
    kernel.special_words.iter_mut().for_each(|(slot, _)| name(File::Words, slot));
    let doubles = kernel.constant_doubles.iter_mut().chain(&mut kernel.dynamic_doubles).chain(&mut kernel.image_doubles);
    doubles.for_each(|(slot, _)| name(File::Doubles, slot));
    kernel.constant_predicates.iter_mut().for_each(|(slot, _)| name(File::Predicates, slot));
    [kernel.words, kernel.doubles, kernel.predicates] = counts.map(|count| count as usize);
}
