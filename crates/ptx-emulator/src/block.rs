//! The order in which the warps of a block, and the groups of a warp, take their steps.
//!
//! Invariant: whoever can go on does so some time: a slice ends after a number of steps, and a block in which nobody can go on is
//! reported. Without a seed the order is fixed: warps in turn, in a warp the group with the lowest pc, so that lanes meet again early.

use crate::execute::{Flow, step};
use crate::fault::{Fault, FaultKind};
use crate::instruction::{NONE, Operation};
use crate::machine::{At, Machine};
use crate::registers::{Mask, first};
use crate::warp::{Group, State};

/// Steps of a warp before the next one has its turn, where no seed says otherwise: enough that a warp that waits in a loop for
/// another one costs little.
const SLICE: u32 = 1 << 10;
/// A warp with so many steps will not end: some ten seconds of our time.
const STEPS: u64 = 1 << 29;

impl Machine<'_> {
    /// Executes one block to its end.
    pub(crate) fn run_block(&mut self, number: u64) -> Result<(), Fault> {
        self.begin(number);
        let count = self.warps.len();
        loop {
            let begin = self.random.as_mut().map_or(0, |random| random.below(count));
            let mut ran = false;
            for turn in 0..count {
                let warp = (begin + turn) % count;
                if self.warps[warp].ready() {
                    ran = true;
                    self.run_warp(warp)?;
                    if self.random.as_mut().is_some_and(|random| random.below(2) == 0) {
                        self.land_one()?;
                    }
                }
            }
            // Without a seed a bulk copy is carried out when nobody can go on without it.
            ran = ran || self.land_one()?;
            if self.warps.iter().all(|warp| warp.groups.is_empty()) {
                while self.land_one()? {}
                return Ok(());
            }
            if !ran {
                return Err(self.deadlock());
            }
        }
    }

    /// The fault that says who waits where.
    fn deadlock(&self) -> Fault {
        let mut waits = Vec::new();
        let mut last = None;
        for (index, warp) in self.warps.iter().enumerate() {
            for group in &warp.groups {
                waits.push(format!("warp {index} lanes {:#010x} at {}", group.mask, self.name_of(group.pc)));
                last = Some((At { warp: index, pc: group.pc, mask: group.mask }, first(group.mask)));
            }
        }
        let exited = self.warps.iter().filter(|warp| warp.groups.is_empty()).count();
        let rest = if exited > 0 { format!("; {exited} warps have exited") } else { String::new() };
        let message = format!("waits for ever: {}{rest}", waits.join("; "));
        match last {
            Some((at, lane)) => self.fault(at, lane, FaultKind::Deadlock, message),
            None => Fault::of_host(FaultKind::Deadlock, message),
        }
    }

    fn run_warp(&mut self, warp: usize) -> Result<(), Fault> {
        let mut fuel = match &mut self.random {
            Some(random) => 1 + random.below(64) as u32,
            None => SLICE,
        };
        let mut spun = false;
        while fuel > 0 {
            let Some(group) = self.choose(warp, spun) else { break };
            let before = fuel;
            self.run_group(warp, group, &mut fuel)?;
            self.warps[warp].merge();
            self.warps[warp].steps += u64::from(before - fuel);
            spun = false;
        }
        if fuel == 0 && self.random.is_none() {
            // Lanes that wait in a loop for others of their warp must not keep those from running.
            spun = self.warps[warp].groups.len() > 1;
            if let Some(group) = self.choose(warp, spun).filter(|_| spun) {
                let mut fuel = SLICE;
                self.run_group(warp, group, &mut fuel)?;
                self.warps[warp].merge();
                self.warps[warp].steps += u64::from(SLICE - fuel);
            }
        }
        if self.warps[warp].steps > STEPS {
            let group = self.warps[warp].groups.first().copied();
            if let Some(group) = group {
                let at = At { warp, pc: group.pc, mask: group.mask };
                return Err(self.fault(
                    at,
                    first(group.mask),
                    FaultKind::Deadlock,
                    format!("does not end: {STEPS} instructions and no exit"),
                ));
            }
        }
        self.parked_for_ever(warp)
    }

    /// The ready group with the lowest pc, or with the highest where `highest`; with a seed, now and then any.
    fn choose(&mut self, warp: usize, highest: bool) -> Option<usize> {
        let groups = &self.warps[warp].groups;
        let ready = groups.iter().enumerate().filter(|(_, group)| group.state == State::Ready);
        if let (Some(random), true) = (&mut self.random, groups.len() > 1) {
            let candidates: Vec<usize> = ready.clone().map(|(index, _)| index).collect();
            if !candidates.is_empty() && random.below(4) == 0 {
                return Some(candidates[random.below(candidates.len())]);
            }
        }
        let key = |(_, group): &(usize, &Group)| group.pc;
        let chosen = if highest { ready.max_by_key(key) } else { ready.min_by_key(key) };
        chosen.map(|(index, _)| index)
    }

    /// A fault where all lanes of a warp wait for lanes that wait elsewhere.
    fn parked_for_ever(&self, warp: usize) -> Result<(), Fault> {
        let groups = &self.warps[warp].groups;
        if groups.is_empty() || groups.iter().any(|group| group.state != State::Parked) {
            return Ok(());
        }
        let waits: Vec<String> = groups.iter().map(|group| format!("lanes {:#010x} at {}", group.mask, self.name_of(group.pc))).collect();
        let at = At { warp, pc: groups[0].pc, mask: groups[0].mask };
        let message = format!("the lanes of warp {warp} cannot come together: {}", waits.join("; "));
        Err(self.fault(at, first(at.mask), FaultKind::Divergence, message))
    }

    /// Steps of one group until it has to wait, meets or passes another group, splits, ends, or the fuel is spent.
    fn run_group(&mut self, warp: usize, group: usize, fuel: &mut u32) -> Result<(), Fault> {
        let kernel = self.kernel;
        let Group { mut pc, mask, .. } = self.warps[warp].groups[group];
        let others = self.warps[warp].groups.iter().enumerate().filter(|(index, _)| *index != group);
        let meet = others.map(|(_, other)| other.pc).min().unwrap_or(u32::MAX);
        let counting = self.watch.as_ref().is_some_and(|watch| !watch.counts.is_empty());
        while *fuel > 0 {
            *fuel -= 1;
            let instruction = &kernel.code[pc as usize];
            let active = if instruction.guard == NONE {
                mask
            } else {
                let predicate = self.warps[warp].registers.predicates[instruction.guard as usize];
                mask & if instruction.when { predicate } else { !predicate }
            };
            let at = At { warp, pc, mask: active };
            if counting && active != 0 {
                self.count(pc);
            }
            match &instruction.operation {
                Operation::Branch(target) if active == mask => pc = *target,
                _ if active == 0 => pc += 1,
                Operation::Branch(target) => return self.split(at, group, &[(*target, active), (pc + 1, mask & !active)]),
                Operation::BranchTable(targets) => return self.branch_table(at, group, mask, instruction.slots.a, targets),
                Operation::Exit => {
                    self.warps[warp].groups[group].pc = pc;
                    self.exit(at, group)?;
                    return Ok(());
                }
                _ => match step(self, at, instruction)? {
                    Flow::Next => pc += 1,
                    Flow::Park => return self.park(at, group, mask, State::Parked),
                    Flow::Barrier(barrier) => return self.park(at, group, mask, State::Barrier(barrier)),
                    Flow::Mbarrier(address) => return self.park(at, group, mask, State::Mbarrier(address)),
                    Flow::Look => {
                        pc += 1;
                        break;
                    }
                },
            }
            if pc >= meet {
                break;
            }
        }
        self.warps[warp].groups[group].pc = pc;
        Ok(())
    }

    fn count(&mut self, pc: u32) {
        if let Some(watch) = &mut self.watch {
            watch.counts[pc as usize].executed += 1;
        }
    }

    /// One group becomes several.
    fn split(&mut self, at: At, group: usize, parts: &[(u32, Mask)]) -> Result<(), Fault> {
        let groups = &mut self.warps[at.warp].groups;
        groups.swap_remove(group);
        groups.extend(parts.iter().filter(|(_, mask)| *mask != 0).map(|(pc, mask)| Group { pc: *pc, mask: *mask, state: State::Ready }));
        Ok(())
    }

    fn branch_table(&mut self, at: At, group: usize, mask: Mask, slot: u32, targets: &[u32]) -> Result<(), Fault> {
        let mut parts: Vec<(u32, Mask)> = vec![(at.pc + 1, mask & !at.mask)];
        for lane in crate::registers::each(at.mask) {
            let index = self.warps[at.warp].registers.word(slot, lane) as usize;
            let Some(target) = targets.get(index) else {
                let message = format!("takes entry {index} of a branch table of {}", targets.len());
                return Err(self.fault(at, lane, FaultKind::OutOfBounds, message));
            };
            match parts.iter_mut().find(|(pc, _)| pc == target) {
                Some((_, mask)) => *mask |= 1 << lane,
                None => parts.push((*target, 1 << lane)),
            }
        }
        self.split(at, group, &parts)
    }

    /// Lanes that wait; those of the group that the guard leaves out go on.
    fn park(&mut self, at: At, group: usize, mask: Mask, state: State) -> Result<(), Fault> {
        let rest = mask & !at.mask;
        let groups = &mut self.warps[at.warp].groups;
        groups[group] = Group { pc: at.pc, mask: at.mask, state };
        if rest != 0 {
            groups.push(Group { pc: at.pc + 1, mask: rest, state: State::Ready });
        }
        Ok(())
    }

    fn exit(&mut self, at: At, group: usize) -> Result<(), Fault> {
        self.warps[at.warp].exit(group, at.mask);
        self.finish_copies(at)?;
        self.finish_stores(at)?;
        self.finish_products(at)?;
        if self.warps[at.warp].alive == 0 {
            self.barriers_after_exit()?;
        }
        Ok(())
    }
}
