//! ZeRO: who holds the weights, the gradients and the optimizer's state of each unit, and when.
//!
//! | stage | whole weights | whole gradients        | master, moments | reduce     | gather          |
//! |-------|---------------|------------------------|-----------------|------------|-----------------|
//! | 0     | always        | always                 | whole           | last micro | never           |
//! | 1     | always        | always                 | 1/n             | last micro | after update    |
//! | 2     | always        | until reduced          | 1/n             | when asked | after update    |
//! | 3     | while in use  | until reduced          | 1/n             | when asked | before each use |
//!
//! Nothing of this stops the computation where it can be helped: gathers after an update are waited for when the next forward pass
//! reads the weights; stage 3 gathers one unit ahead of the one in use; reductions run under the backward passes of the units below; where
//! no other rank waits for its weights, a unit is updated while the forward pass is at the unit before it (`update.rs`).
//!
//! So the stage is three lifetimes, not four code paths. How gradients are added up is `gradients.rs`. Where the run computes in f32
//! the master weights *are* the weights.
//!
//! Invariant: collectives of a group are called in an order that follows from the plan, the same on all of its ranks.

use crate::comm::Group;
use crate::comm::Reduction;
use crate::comm::groups::Groups;
use crate::device::Device;
use crate::device::memory::Memory;
use crate::dtype::Dtype;
use crate::ops::adamw::Adam;
use crate::ops::exact::SquareSum;
use crate::ops::reduce;
use crate::parallel::flat::{Grads, Weights};
use crate::parallel::gradients::Rules;
use crate::parallel::unit::{self, Tie, UnitState};
use crate::parallel::update::Progress;
use crate::plan::{Order, Plan, RankPlan};
use anyhow::Result;
use std::collections::VecDeque;
use std::sync::Arc;

/// Reductions that run at the same time where each holds a whole buffer: one of a large unit, and one of a small one beside it (the
/// head and the last norm end together).
const REDUCTIONS_UNDER_WAY: usize = 2;

pub struct Zero {
    pub(in crate::parallel) units: Vec<UnitState>,
    pub(in crate::parallel) dtype: Dtype,
    /// Of the ranks that hold the same slices, this one speaks for all (norm, checkpoints).
    pub(in crate::parallel) speaks: bool,
    device: Device,
    stage: usize,
    micros_per_lane: usize,
    rules: Rules,
    /// Stage 3: units whose whole weights are still to be used, in order. While one is used, the next is gathered.
    uses: VecDeque<usize>,
    /// Units whose gradients are being reduced, oldest first.
    reducing: VecDeque<usize>,
    /// First and last pipeline rank, where a tied embedding lies on both.
    tie: Arc<dyn Group>,
}

impl Zero {
    /// Allocates everything; weights and moments are zero until they are loaded.
    pub fn new(plan: &Plan, rank: &RankPlan, device: &Device, groups: &Groups) -> Result<Zero> {
        let cut_stream = plan.sequence_parallel && rank.share.size > 1;
        let rules = Rules {
            order: plan.geometry.order,
            lanes: rank.lanes,
            chunks: if cut_stream { rank.share.local() } else { rank.share.shards },
            keep: plan.zero <= 1 && plan.geometry.order == Order::Lanes && rank.lanes == 1,
            sliced: plan.zero >= 1,
            shard: groups.shard.clone(),
            replica: groups.replica.clone(),
            stream: if cut_stream { groups.tp.clone() } else { Groups::solo().tp },
            tensor: groups.tp.clone(),
        };
        Ok(Zero {
            units: unit::units(device, &rules, plan, rank)?,
            dtype: plan.dtype,
            speaks: rank.at.replicate == 0 && (plan.zero >= 1 || rank.at.shard == 0),
            device: device.clone(),
            stage: plan.zero,
            micros_per_lane: rank.micros_per_lane,
            rules,
            uses: VecDeque::new(),
            reducing: VecDeque::new(),
            tie: groups.tie.clone(),
        })
    }

    /// The units that are about to be used, in order (`plan/uses.rs`): so stage 3 knows which to gather next.
    pub fn expect(&mut self, uses: &[usize]) {
        assert!(self.uses.is_empty(), "units {:?} were to be used and were not", self.uses);
        if self.stage == 3 {
            self.uses.extend(uses);
        }
    }

    /// The unit's weights, whole. Waits for a gather that is under way; stage 3 starts the next unit's.
    pub fn weights(&mut self, unit: usize) -> Result<Weights<'_>> {
        let owner = self.owner(unit);
        self.gather(owner)?;
        Ok(self.units[owner].view())
    }

    /// The gradients to add to.
    pub fn grads(&mut self, unit: usize) -> Result<Grads<'_>> {
        let UnitState { gradients, layout, .. } = &mut self.units[unit];
        gradients.adding(&self.rules, layout)
    }

    /// The weights, and the gradients to add to.
    pub fn weights_and_grads(&mut self, unit: usize) -> Result<(Weights<'_>, Grads<'_>)> {
        self.gather(self.owner(unit))?;
        self.held_weights_and_grads(unit)
    }

    /// The same of a unit whose weights this pass has read already and not released: that is no further use of them.
    pub fn held_weights_and_grads(&mut self, unit: usize) -> Result<(Weights<'_>, Grads<'_>)> {
        let owner = self.owner(unit);
        if owner == unit {
            let UnitState { weights, gradients, layout, .. } = &mut self.units[unit];
            return Ok((Weights::new(weights.whole(), layout), gradients.adding(&self.rules, layout)?));
        }
        let [first, second] = self.units.get_disjoint_mut([owner, unit]).expect("a tied unit is not its owner");
        Ok((first.view(), second.gradients.adding(&self.rules, &second.layout)?))
    }

    /// This pass is done with the unit's weights: stage 3 lets go of what it gathered, unless it is used next.
    pub fn release(&mut self, unit: usize) {
        let owner = self.owner(unit);
        if self.uses.front() != Some(&owner) {
            self.units[owner].weights.release();
        }
    }

    /// All gradients of `unit` from micro-batch `micro` are added. Starts the reduction where a sum is complete, and says whether.
    pub fn added(&mut self, unit: usize, micro: usize) -> Result<bool> {
        let u = &mut self.units[unit];
        assert_eq!(u.micros, micro, "micro-batches are added in order");
        u.micros += 1;
        let (lane_ends, sum_ends) = match self.rules.order {
            Order::Lanes => (u.micros.is_multiple_of(self.micros_per_lane), u.micros == self.micros_per_lane * self.rules.lanes),
            Order::Rows => (true, u.micros.is_multiple_of(self.rules.lanes)),
        };
        if lane_ends {
            u.gradients.end_lane(&self.rules, &u.layout)?;
        }
        if sum_ends {
            u.gradients.reduce(&self.rules)?;
            self.reducing.retain(|&other| other != unit);
            self.reducing.push_back(unit);
            self.bound_reductions()?;
        }
        Ok(sum_ends)
    }

    /// Where the end of a reduction frees memory, or another over the replicas follows it, the oldest is waited for when too many are
    /// under way. Which, and when, follows from the order of passes alone: a rehearsal frees at the same points.
    fn bound_reductions(&mut self) -> Result<()> {
        while self.rules.goes_on() && self.reducing.len() > REDUCTIONS_UNDER_WAY {
            let oldest = self.reducing.pop_front().expect("more than none");
            self.units[oldest].gradients.over_replicas(&self.rules)?;
        }
        Ok(())
    }

    /// Waits for all reductions, and adds the gradients of tied units.
    pub fn finish_reductions(&mut self) -> Result<()> {
        // In the order in which they were started: none is waited for while an older one could go on.
        while let Some(oldest) = self.reducing.pop_front() {
            self.units[oldest].gradients.over_replicas(&self.rules)?;
        }
        for u in &mut self.units {
            u.gradients.finish()?;
        }
        for unit in 0..self.units.len() {
            match self.units[unit].tie {
                Tie::None => {}
                Tie::Here(owner) => {
                    let [first, second] = self.units.get_disjoint_mut([owner, unit]).expect("a tied unit is not its owner");
                    first.gradients.add_tied(&mut second.gradients, &first.layout);
                }
                Tie::There { .. } => {
                    let gradients = &mut self.units[unit].gradients;
                    let mut mine = self.device.empty(gradients.mine().shape(), Dtype::F32);
                    mine.view_mut().copy_from(gradients.mine());
                    let sum = self.tie.all_reduce(mine, Reduction::Sum)?.wait()?;
                    gradients.mine_mut().copy_from(sum.view());
                }
            }
        }
        Ok(())
    }

    /// The exact sum of squares of the gradients that this rank answers for.
    pub fn square_sum(&self) -> SquareSum {
        let mut sum = SquareSum::default();
        let counted = self.units.iter().filter(|u| self.speaks && u.counts());
        sum.add(counted.flat_map(|u| {
            let parts = u.layout.counted(u.mine.clone()).into_iter();
            parts.map(|part| u.gradients.mine().part(part.start - u.mine.start..part.end - u.mine.start, [part.len()]))
        }));
        sum
    }

    /// The public name of the first parameter with a gradient that is not finite, among those this rank owns.
    pub fn first_overflow(&self) -> Option<String> {
        for u in self.units.iter().filter(|u| u.owns()) {
            for place in &u.layout.places {
                let part = u.mine.start.max(place.flat.start)..u.mine.end.min(place.flat.end);
                if part.is_empty() {
                    continue;
                }
                let local = part.start - u.mine.start..part.end - u.mine.start;
                if reduce::first_nonfinite(u.gradients.mine().part(local, [part.len()])).is_some() {
                    return Some(place.entry.name.clone());
                }
            }
        }
        None
    }

    /// AdamW on the slice this rank owns; then the gathers of what every rank must hold whole are started. Where nobody waits for them,
    /// updates run beside the next forward pass, each before its unit is used. `decay` applies where the catalog says so. `seed`: of chance,
    /// where weights are rounded by it.
    pub fn update(&mut self, adam: Adam, seed: u64) -> Result<()> {
        for u in self.units.iter_mut().filter(|u| u.owns()) {
            u.weights.settle()?;
            u.plan_update(adam, seed);
            if !self.rules.can_wait() {
                u.finish_update(&self.rules);
                u.spread(&self.rules)?;
            }
        }
        self.start_update(0);
        Ok(())
    }

    /// The first update that is due, from this unit on, runs beside what is computed next.
    fn start_update(&mut self, first: usize) {
        if let Some(u) = self.units[first..].iter_mut().find(|u| matches!(u.update, Progress::Due(_))) {
            u.start_update(&self.device);
        }
    }

    /// Waits for all updates and gathers that are due or under way: before weights are read other than by `weights`.
    pub fn settle(&mut self) -> Result<()> {
        for u in &mut self.units {
            u.finish_update(&self.rules);
            u.weights.settle()?;
        }
        Ok(())
    }

    /// Bytes of whole weights that stage 3 holds for a while.
    pub fn bytes_visiting(&self) -> usize {
        let visiting = self.units.iter().filter(|u| u.weights.is_visiting());
        visiting.map(|u| Memory::bytes_taken(u.layout.numel * self.dtype.bytes())).sum()
    }

    /// Forgets the step's gradients: the next step starts clean.
    pub fn clear(&mut self) {
        assert!(self.uses.is_empty(), "units {:?} were to be used and were not", self.uses);
        for u in &mut self.units {
            assert!(!u.weights.is_visiting(), "a step leaves no gathered weights behind");
            u.gradients.clear(&self.rules);
            u.micros = 0;
        }
    }

    /// After master weights, or the slices of weights, were written from outside: every rank gets what it must hold whole.
    pub(in crate::parallel) fn spread_weights(&mut self) -> Result<()> {
        for u in self.units.iter_mut().filter(|u| u.owns()) {
            u.take_master();
            u.spread(&self.rules)?;
        }
        Ok(())
    }

    fn owner(&self, unit: usize) -> usize {
        match self.units[unit].tie {
            Tie::Here(owner) => owner,
            Tie::None | Tie::There { .. } => unit,
        }
    }

    /// Makes the unit's weights whole, and starts to do so with those that are used next.
    fn gather(&mut self, unit: usize) -> Result<()> {
        if self.uses.front() == Some(&unit) {
            self.uses.pop_front();
        }
        self.units[unit].finish_update(&self.rules);
        self.start_update(unit + 1);
        self.start_gather(unit)?;
        self.units[unit].weights.settle()?;
        match self.uses.front() {
            Some(&next) => self.start_gather(next),
            None => Ok(()),
        }
    }

    fn start_gather(&mut self, unit: usize) -> Result<()> {
        let u = &mut self.units[unit];
        u.weights.start(&self.device, self.rules.shard.as_ref(), u.layout.numel, &u.mine)
    }
}
