//! The state of one unit on one rank: weights, master weights, moments and gradients.
//!
//! Invariant: what a rank owns of a unit is one slice of its flat buffer, in all of these.

use crate::device::tensor::Tensor;
use crate::device::{Device, Shelf};
use crate::dtype::Dtype;
use crate::ops::elementwise;
use crate::parallel::flat::Weights;
use crate::parallel::gradients::{Gradients, Rules};
use crate::parallel::update::Progress;
use crate::parallel::weights::{Gathered, WeightBuffer};
use crate::plan::catalog::Kind;
use crate::plan::layout::UnitLayout;
use crate::plan::{Plan, RankPlan};
use anyhow::{Context, Result};
use std::ops::Range;

pub struct UnitState {
    pub layout: UnitLayout,
    /// The slice of the flat buffer whose state this rank owns.
    pub mine: Range<usize>,
    pub tie: Tie,
    pub weights: WeightBuffer,
    /// f32 weights of `mine`, where the weights themselves are narrower and not rounded by chance.
    pub master: Option<Tensor>,
    /// First and second moments of `mine`.
    pub moments: Option<[Tensor; 2]>,
    pub gradients: Gradients,
    /// Micro-batches of the step that are added.
    pub micros: usize,
    /// While one is due, or under way, it has the weights, master weights, moments and the gradient.
    pub update: Progress,
}

/// A tied head has the embedding's values. Its gradients are its own until they are reduced, then they are added to the embedding's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tie {
    None,
    /// This unit uses the weights of that one on the same rank, and has gradients only.
    Here(usize),
    /// The other lies on the other end of the pipeline: both keep all, and do the same updates.
    There {
        owner: bool,
    },
}

/// Where the state of a rank's units lies.
struct Home {
    device: Device,
    /// Master weights and moments.
    optimizer: Shelf,
    /// Slices of weights.
    weights: Shelf,
}

/// The rank's units, with everything that they hold.
pub fn units(device: &Device, rules: &Rules, plan: &Plan, rank: &RankPlan) -> Result<Vec<UnitState>> {
    let kinds: Vec<Kind> = (0..rank.units.len()).map(|unit| rank.kind(plan, unit)).collect();
    let ties: Vec<Tie> = kinds.iter().map(|&kind| tie_of(kind, &kinds, plan)).collect();
    let owned = rank.units.iter().zip(&ties).filter(|(_, tie)| !matches!(tie, Tie::Here(_)));
    let lengths: Vec<usize> = owned.map(|((_, layout), _)| slice(rules, layout).len()).collect();
    let states = if plan.masters { 3 } else { 2 };
    let of_optimizer = lengths.iter().flat_map(|length| vec![length * Dtype::F32.bytes(); states]);
    let of_weights = lengths.iter().map(|length| length * plan.dtype.bytes());
    let optimizer = device.shelf(plan.offload_optimizer.folder(), of_optimizer).context("parallel.offload_optimizer")?;
    let weights = device.shelf(plan.offload_weights.folder(), of_weights).context("parallel.offload_weights")?;
    let mut home = Home { device: device.clone(), optimizer, weights };
    let tied = |unit: usize| ties.contains(&Tie::Here(unit));
    let units = rank.units.iter().zip(&ties).enumerate();
    units.map(|(unit, ((_, layout), tie))| UnitState::new(rules, plan, layout.clone(), *tie, tied(unit), &mut home)).collect()
}

/// The slice of a unit's flat buffer whose state this rank owns.
fn slice(rules: &Rules, layout: &UnitLayout) -> Range<usize> {
    let (slices, index) = if rules.sliced { (rules.shard.size(), rules.shard.rank()) } else { (1, 0) };
    assert_eq!(layout.numel % slices, 0, "a flat buffer of {} elements in {slices} slices", layout.numel);
    let length = layout.numel / slices;
    index * length..(index + 1) * length
}

fn tie_of(kind: Kind, here: &[Kind], plan: &Plan) -> Tie {
    let embedding = here.iter().position(|&kind| kind == Kind::Embedding);
    let tied = plan.units.iter().any(|unit| unit.kind == Kind::Head { tied: true });
    match kind {
        Kind::Head { tied: true } => embedding.map_or(Tie::There { owner: false }, Tie::Here),
        Kind::Embedding if tied && !here.contains(&Kind::Head { tied: true }) => Tie::There { owner: true },
        _ => Tie::None,
    }
}

impl UnitState {
    /// Everything is zero. `tied`: another unit on this rank has the same weights.
    fn new(rules: &Rules, plan: &Plan, layout: UnitLayout, tie: Tie, tied: bool, home: &mut Home) -> Result<UnitState> {
        let device = &home.device;
        let mine = slice(rules, &layout);
        let length = mine.len();
        let owns = !matches!(tie, Tie::Here(_));
        let weights = match (owns, plan.zero) {
            (false, _) => WeightBuffer::Nothing,
            (true, 3) => WeightBuffer::Sharded { mine: device.zeros_on(&mut home.weights, [length], plan.dtype)?, whole: None },
            (true, _) => WeightBuffer::Whole(Gathered::here(device.zeros([layout.numel], plan.dtype))),
        };
        let mut zeros = || device.zeros_on(&mut home.optimizer, [length], Dtype::F32);
        let master = (owns && plan.masters).then(&mut zeros).transpose()?;
        let moments = if owns { Some([zeros()?, zeros()?]) } else { None };
        let gradients = Gradients::new(device, rules, &layout, mine.clone(), tied);
        Ok(UnitState { layout, mine, tie, weights, master, moments, gradients, micros: 0, update: Progress::Done })
    }

    /// Whether the unit has weights and moments of its own on this rank.
    pub fn owns(&self) -> bool {
        !matches!(self.tie, Tie::Here(_))
    }

    /// Whether the unit's parameters are counted here: a tied pair is counted at the embedding.
    pub fn counts(&self) -> bool {
        matches!(self.tie, Tie::None | Tie::There { owner: true })
    }

    pub fn view(&self) -> Weights<'_> {
        Weights::new(self.weights.whole(), &self.layout)
    }

    /// Whether the weights of the slice lie on the host and the rest of its state on a GPU, or the other way round.
    pub fn is_apart(&self) -> bool {
        let on_host = |bytes_offloaded: usize| self.gradients.device().is_gpu() && bytes_offloaded > 0;
        let [first, _] = self.moments.as_ref().expect("a unit with weights has moments");
        on_host(first.bytes_offloaded()) != on_host(self.weights.bytes_offloaded())
    }

    /// The weights become the master weights, rounded.
    pub fn take_master(&mut self) {
        let apart = self.is_apart();
        let UnitState { mine, weights, master: Some(master), .. } = self else { return };
        if apart {
            let mut rounded = master.device().empty(master.shape(), weights.mine(mine).dtype());
            elementwise::cast(rounded.view_mut(), master.view());
            weights.mine_mut(mine).copy_from(rounded.view());
        } else {
            elementwise::cast(weights.mine_mut(mine), master.view());
        }
    }

    /// Starts to give the other ranks of the shard group this one's slice of the weights, and to take theirs.
    pub fn spread(&mut self, rules: &Rules) -> Result<()> {
        if rules.sliced { self.weights.spread(rules.shard.as_ref()) } else { Ok(()) }
    }
}
