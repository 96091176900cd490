//! ZeRO: who holds the weights, the gradients and the optimizer's state of each unit, and when.
//!
//! | stage | whole weights | whole gradients        | master, moments | reduce     | gather          |
//! |-------|---------------|------------------------|-----------------|------------|-----------------|
//! | 0     | always        | always                 | whole           | last micro | never           |
//! | 1     | always        | always                 | 1/n             | last micro | after update    |
//! | 2     | always        | until reduced          | 1/n             | when asked | after update    |
//! | 3     | while in use  | until reduced          | 1/n             | when asked | before each use |
//!
//! So the stage is three lifetimes, not four code paths. A gradient is summed over the shard group and then over its replicas.
//! Where the run computes in f32 the master weights *are* the weights.
//!
//! Invariant: the sum of a step's gradients is, per lane, one sequence after the other, then a balanced binary tree over lanes; a
//! rank adds the subtree of the lanes it owns, the groups add the rest. Each unit's gradients go Clean -> Adding -> Reducing ->
//! Reduced -> Clean, and every transition is asserted.

use crate::comm::{Group, Pending, Reduction};
use crate::device::Device;
use crate::device::tensor::{Tensor, View};
use crate::dtype::Dtype;
use crate::ops::adamw::{self, Adam};
use crate::ops::elementwise;
use crate::ops::reduce::SquareSum;
use crate::parallel::flat::{Grads, Weights};
use crate::plan::catalog::Kind;
use crate::plan::layout::UnitLayout;
use anyhow::Result;
use std::ops::Range;
use std::sync::Arc;

/// The part of the plan that concerns ZeRO on this rank.
pub struct Settings {
    pub stage: usize,
    pub dtype: Dtype,
    /// Lanes of the canonical sum that this rank owns.
    pub lanes: usize,
    /// Of the ranks that hold the same slices, this one speaks for all (norm, checkpoints).
    pub speaks: bool,
}

pub struct Zero {
    pub(in crate::parallel) settings: Settings,
    pub(in crate::parallel) device: Device,
    pub(in crate::parallel) units: Vec<UnitState>,
    shard: Arc<dyn Group>,
    replica: Arc<dyn Group>,
}

pub(in crate::parallel) struct UnitState {
    pub layout: UnitLayout,
    /// The slice of the flat buffer whose state this rank owns.
    pub mine: Range<usize>,
    /// The unit whose weights this one uses; it then has gradients only.
    pub tied_to: Option<usize>,
    pub weights: WeightBuffer,
    /// f32 weights of `mine`, where the weights themselves are narrower.
    pub master: Option<Tensor>,
    /// First and second moments of `mine`.
    pub moments: Option<[Tensor; 2]>,
    gradients: Gradients,
    /// Sums of whole lanes, with their level in the tree.
    lanes: Vec<(usize, Tensor)>,
}

pub(in crate::parallel) enum WeightBuffer {
    /// A tied unit has none of its own.
    Nothing,
    Whole(Tensor),
    /// Only `mine`; the whole is there while it is used.
    Sharded {
        mine: Tensor,
        whole: Option<Tensor>,
    },
}

enum Gradients {
    /// No sum yet. Stages 0 and 1 keep the buffer, cleared.
    Clean(Option<Tensor>),
    Adding(Tensor),
    /// Under way through the shard group; the buffer is still whole.
    Reducing(Pending),
    /// `mine` of the buffer (or all of it, when the buffer is only that slice) is the step's gradient.
    Reduced(Tensor),
}

impl Zero {
    /// Allocates everything; weights and moments are zero until `import` or `initialise` fills them.
    pub fn new(
        device: &Device,
        settings: Settings,
        units: Vec<(Kind, UnitLayout)>,
        shard: Arc<dyn Group>,
        replica: Arc<dyn Group>,
    ) -> Result<Zero> {
        let embedding = units.iter().position(|(kind, _)| *kind == Kind::Embedding);
        let states = units.into_iter().map(|(kind, layout)| {
            let tied_to = if kind == (Kind::Head { tied: true }) { embedding } else { None };
            UnitState::new(device, &settings, layout, tied_to, shard.as_ref())
        });
        Ok(Zero { units: states.collect(), settings, device: device.clone(), shard, replica })
    }

    /// The unit's weights, whole. Stage 3 gathers them now; other stages already have them.
    pub fn weights(&mut self, unit: usize) -> Result<Weights<'_>> {
        let owner = self.units[unit].tied_to.unwrap_or(unit);
        self.gather(owner)?;
        Ok(self.units[owner].view())
    }

    /// The weights, and the gradients to add to.
    pub fn weights_and_grads(&mut self, unit: usize) -> Result<(Weights<'_>, Grads<'_>)> {
        let owner = self.units[unit].tied_to.unwrap_or(unit);
        self.gather(owner)?;
        self.start_adding(unit);
        if owner == unit {
            let UnitState { weights, gradients, layout, .. } = &mut self.units[unit];
            return Ok((Weights::new(weights.whole(), layout), Grads::new(gradients.adding().view_mut(), layout)));
        }
        let [first, second] = self.units.get_disjoint_mut([owner, unit]).expect("a tied unit is not its owner");
        let grads = Grads::new(second.gradients.adding().view_mut(), &second.layout);
        Ok((first.view(), grads))
    }

    /// This pass is done with the unit's weights: stage 3 lets go of what it gathered.
    pub fn release(&mut self, unit: usize) {
        let owner = self.units[unit].tied_to.unwrap_or(unit);
        if let WeightBuffer::Sharded { whole, .. } = &mut self.units[owner].weights {
            *whole = None;
        }
    }

    /// The gradients of `unit` now hold the sum of one whole lane.
    pub fn end_lane(&mut self, unit: usize) {
        if self.settings.lanes == 1 {
            return;
        }
        let u = &mut self.units[unit];
        let Gradients::Adding(sum) = std::mem::replace(&mut u.gradients, Gradients::Clean(None)) else {
            panic!("the lane of a unit that added nothing");
        };
        u.lanes.push((0, sum));
        while let [.., (low, _), (high, _)] = u.lanes[..] {
            if low != high {
                break;
            }
            u.fold_lanes();
        }
    }

    /// The gradients of `unit` are complete on this rank: add them up over the data-parallel ranks.
    pub fn reduce(&mut self, unit: usize) -> Result<()> {
        let sliced = self.settings.stage >= 1;
        let u = &mut self.units[unit];
        while u.lanes.len() > 1 {
            u.fold_lanes();
        }
        if let Some((_, sum)) = u.lanes.pop() {
            u.gradients = Gradients::Adding(sum);
        }
        let Gradients::Adding(whole) = std::mem::replace(&mut u.gradients, Gradients::Clean(None)) else {
            panic!("a reduction of a unit that added nothing");
        };
        let pending = if sliced { self.shard.reduce_scatter(whole, Reduction::Sum) } else { self.shard.all_reduce(whole, Reduction::Sum) };
        u.gradients = Gradients::Reducing(pending?);
        Ok(())
    }

    /// Waits for all reductions, adds replicas, and adds a tied unit's gradients to its owner's.
    pub fn finish_reductions(&mut self) -> Result<()> {
        for u in &mut self.units {
            let Gradients::Reducing(pending) = std::mem::replace(&mut u.gradients, Gradients::Clean(None)) else {
                panic!("a step ends with the reduction of every unit under way");
            };
            let mut sum = pending.wait()?;
            if self.replica.size() > 1 {
                let mut mine = self.device.empty([u.mine.len()], Dtype::F32);
                mine.view_mut().copy_from(sum.view().part(u.mine.clone(), [u.mine.len()]));
                let mine = self.replica.all_reduce(mine, Reduction::Sum)?.wait()?;
                sum.view_mut().part(u.mine.clone(), [u.mine.len()]).copy_from(mine.view());
            }
            u.gradients = Gradients::Reduced(sum);
        }
        for unit in 0..self.units.len() {
            let Some(owner) = self.units[unit].tied_to else { continue };
            let [first, second] = self.units.get_disjoint_mut([owner, unit]).expect("a tied unit is not its owner");
            let range = first.mine.clone();
            let shape = [range.len()];
            elementwise::add(
                first.gradients.reduced().view_mut().part(range.clone(), shape),
                second.gradients.reduced().view().part(range, shape),
            );
        }
        Ok(())
    }

    /// The exact sum of squares of the gradients that this rank answers for.
    pub fn square_sum(&mut self) -> SquareSum {
        let mut sum = SquareSum::default();
        if !self.settings.speaks {
            return sum;
        }
        for u in self.units.iter_mut().filter(|u| u.tied_to.is_none()) {
            for part in u.layout.counted(u.mine.clone()) {
                let length = part.len();
                sum.add(u.gradients.reduced().view().part(part, [length]));
            }
        }
        sum
    }

    /// The public name of the first parameter with a gradient that is not finite, among those this rank owns.
    pub fn first_overflow(&mut self) -> Option<String> {
        for u in &mut self.units {
            let grads = u.gradients.reduced();
            for place in &u.layout.places {
                let part = u.mine.start.max(place.flat.start)..u.mine.end.min(place.flat.end);
                if part.is_empty() {
                    continue;
                }
                let length = part.len();
                if crate::ops::reduce::first_nonfinite(grads.view().part(part, [length])).is_some() {
                    return Some(place.entry.name.clone());
                }
            }
        }
        None
    }

    /// AdamW on the slice this rank owns, then every rank gets what it must hold whole. `decay` applies where the catalog says so.
    pub fn update(&mut self, adam: Adam) -> Result<()> {
        for u in self.units.iter_mut().filter(|u| u.tied_to.is_none()) {
            u.step(&adam);
            if self.settings.stage > 0
                && let WeightBuffer::Whole(_) = u.weights
            {
                let WeightBuffer::Whole(whole) = std::mem::replace(&mut u.weights, WeightBuffer::Nothing) else { unreachable!("checked above") };
                u.weights = WeightBuffer::Whole(self.shard.all_gather(whole)?.wait()?);
            }
        }
        Ok(())
    }

    /// Forgets the step's gradients: the next step starts clean.
    pub fn clear(&mut self) {
        let keeps = self.settings.stage <= 1 && self.settings.lanes == 1;
        for u in &mut self.units {
            let old = std::mem::replace(&mut u.gradients, Gradients::Clean(None));
            if let (true, Gradients::Reduced(mut whole)) = (keeps, old) {
                whole.view_mut().fill_zero();
                u.gradients = Gradients::Clean(Some(whole));
            }
        }
    }

    /// After the slices were written from outside: whole weights are gathered anew where they are held.
    pub(in crate::parallel) fn spread_weights(&mut self) -> Result<()> {
        for u in self.units.iter_mut().filter(|u| u.tied_to.is_none()) {
            if let Some(master) = &u.master {
                let length = u.mine.len();
                let slice = match &mut u.weights {
                    WeightBuffer::Whole(whole) => whole.view_mut().part(u.mine.clone(), [length]),
                    WeightBuffer::Sharded { mine, .. } => mine.view_mut(),
                    WeightBuffer::Nothing => unreachable!("only a tied unit has no weights"),
                };
                elementwise::cast(slice, master.view());
            }
            if self.settings.stage > 0
                && let WeightBuffer::Whole(_) = u.weights
            {
                let WeightBuffer::Whole(whole) = std::mem::replace(&mut u.weights, WeightBuffer::Nothing) else { unreachable!("checked above") };
                u.weights = WeightBuffer::Whole(self.shard.all_gather(whole)?.wait()?);
            }
        }
        Ok(())
    }

    fn gather(&mut self, unit: usize) -> Result<()> {
        let u = &mut self.units[unit];
        let WeightBuffer::Sharded { mine, whole } = &mut u.weights else { return Ok(()) };
        if whole.is_none() {
            let mut empty = self.device.empty([u.layout.numel], self.settings.dtype);
            empty.view_mut().part(u.mine.clone(), [u.mine.len()]).copy_from(mine.view());
            *whole = Some(self.shard.all_gather(empty)?.wait()?);
        }
        Ok(())
    }

    fn start_adding(&mut self, unit: usize) {
        let u = &mut self.units[unit];
        match std::mem::replace(&mut u.gradients, Gradients::Clean(None)) {
            Gradients::Clean(Some(buffer)) => u.gradients = Gradients::Adding(buffer),
            Gradients::Clean(None) => u.gradients = Gradients::Adding(self.device.zeros([u.layout.numel], Dtype::F32)),
            Gradients::Adding(buffer) => u.gradients = Gradients::Adding(buffer),
            Gradients::Reducing(_) | Gradients::Reduced(_) => panic!("a gradient arrives after the reduction of unit {unit}"),
        }
    }
}

impl UnitState {
    fn new(device: &Device, settings: &Settings, layout: UnitLayout, tied_to: Option<usize>, shard: &dyn Group) -> UnitState {
        let slices = if settings.stage >= 1 { shard.size() } else { 1 };
        assert_eq!(layout.numel % slices, 0, "a flat buffer of {} elements in {slices} slices", layout.numel);
        let length = layout.numel / slices;
        let index = if settings.stage >= 1 { shard.rank() } else { 0 };
        let mine = index * length..(index + 1) * length;
        let owns = tied_to.is_none();
        let weights = match (owns, settings.stage) {
            (false, _) => WeightBuffer::Nothing,
            (true, 3) => WeightBuffer::Sharded { mine: device.zeros([length], settings.dtype), whole: None },
            (true, _) => WeightBuffer::Whole(device.zeros([layout.numel], settings.dtype)),
        };
        let master = (owns && settings.dtype != Dtype::F32).then(|| device.zeros([length], Dtype::F32));
        let moments = owns.then(|| [device.zeros([length], Dtype::F32), device.zeros([length], Dtype::F32)]);
        let keeps = settings.stage <= 1 && settings.lanes == 1;
        let gradients = Gradients::Clean(keeps.then(|| device.zeros([layout.numel], Dtype::F32)));
        UnitState { layout, mine, tied_to, weights, master, moments, gradients, lanes: Vec::new() }
    }

    fn view(&self) -> Weights<'_> {
        Weights::new(self.weights.whole(), &self.layout)
    }

    /// Adds the last two lane sums into one.
    fn fold_lanes(&mut self) {
        let (_, right) = self.lanes.pop().expect("two lanes to fold");
        let (level, mut left) = self.lanes.pop().expect("two lanes to fold");
        elementwise::add(left.view_mut(), right.view());
        self.lanes.push((level + 1, left));
    }

    /// Bytes of gradient buffers at this moment.
    pub fn gradient_bytes(&self) -> usize {
        let lanes = self.lanes.iter().map(|(_, sum)| sum.bytes()).sum::<usize>();
        lanes
            + match &self.gradients {
                Gradients::Clean(buffer) => buffer.as_ref().map_or(0, Tensor::bytes),
                Gradients::Adding(sum) | Gradients::Reduced(sum) => sum.bytes(),
                Gradients::Reducing(_) => 0,
            }
    }

    /// The step's gradient of `mine`.
    pub fn gradient_mine(&mut self) -> View<'_> {
        let length = self.mine.len();
        let range = self.mine.clone();
        self.gradients.reduced().view().part(range, [length])
    }

    fn step(&mut self, adam: &Adam) {
        let Gradients::Reduced(grads) = &self.gradients else { panic!("an update before the reduction") };
        let [first, second] = self.moments.as_mut().expect("only a tied unit has no moments");
        for (range, decays) in self.layout.decay_ranges(self.mine.clone()) {
            let local = range.start - self.mine.start..range.end - self.mine.start;
            let shape = [range.len()];
            let adam = Adam { decay: if decays { adam.decay } else { 0.0 }, ..*adam };
            let gradient = grads.view().part(range.clone(), shape);
            let (m, v) = (first.view_mut().part(local.clone(), shape), second.view_mut().part(local.clone(), shape));
            let weights = match &mut self.weights {
                WeightBuffer::Whole(whole) => whole.view_mut().part(range, shape),
                WeightBuffer::Sharded { mine, .. } => mine.view_mut().part(local.clone(), shape),
                WeightBuffer::Nothing => unreachable!("only a tied unit has no weights"),
            };
            match &mut self.master {
                None => adamw::step(weights, m, v, gradient, &adam),
                Some(master) => adamw::step_and_cast(master.view_mut().part(local, shape), m, v, gradient, weights, &adam),
            }
        }
    }
}

impl WeightBuffer {
    pub fn bytes(&self) -> usize {
        match self {
            WeightBuffer::Nothing => 0,
            WeightBuffer::Whole(whole) => whole.bytes(),
            WeightBuffer::Sharded { mine, whole } => mine.bytes() + whole.as_ref().map_or(0, Tensor::bytes),
        }
    }

    fn whole(&self) -> View<'_> {
        match self {
            WeightBuffer::Whole(whole) | WeightBuffer::Sharded { whole: Some(whole), .. } => whole.view(),
            WeightBuffer::Sharded { whole: None, .. } | WeightBuffer::Nothing => panic!("weights are used before they are gathered"),
        }
    }
}

impl Gradients {
    fn adding(&mut self) -> &mut Tensor {
        match self {
            Gradients::Adding(sum) => sum,
            _ => panic!("a gradient is added before the unit started adding"),
        }
    }

    fn reduced(&mut self) -> &mut Tensor {
        match self {
            Gradients::Reduced(sum) => sum,
            _ => panic!("a gradient is read before its reduction is finished"),
        }
    }
}
