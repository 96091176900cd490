//! AdamW on the slice of a unit that a rank owns, now or beside the computation.
//!
//! An update waits for memory and a forward pass for arithmetic, so on the CPU the two run side by side: what an update needs is taken
//! out of its unit, and comes back when the unit is used next.
//!
//! Invariant: a unit's slice is updated by the one rank of the shard group that owns it, from the same gradient on every layout.

use crate::device::Device;
use crate::device::beside::Beside;
use crate::device::tensor::{Tensor, View};
use crate::dtype::Dtype;
use crate::ops::adamw::{self, Adam, Chance};
use crate::parallel::gradients::Rules;
use crate::parallel::unit::UnitState;
use crate::parallel::weights::WeightBuffer;
use crate::plan::layout::Piece;
use std::ops::Range;

/// How far the update of a unit is.
pub enum Progress {
    Done,
    Due(Box<Update>),
    UnderWay(Beside<Box<Update>>),
}

/// An update, and all that it reads and writes.
pub struct Update {
    adam: Adam,
    parts: Vec<Part>,
    mine: Range<usize>,
    /// Whether weights lie on the host and the rest on a GPU, or the other way round.
    apart: bool,
    weights: WeightBuffer,
    master: Option<Tensor>,
    moments: [Tensor; 2],
    gradient: Tensor,
    /// Where the slice lies in `gradient`.
    place: Range<usize>,
}

/// A range of a slice, counted from its start.
struct Part {
    range: Range<usize>,
    decays: bool,
    /// How its weights are rounded, where they have no f32 form besides.
    chance: Option<Chance>,
}

impl UnitState {
    /// The step's gradient is there: an update is due. `seed`: of chance.
    pub fn plan_update(&mut self, adam: Adam, seed: u64) {
        assert!(matches!(self.update, Progress::Done), "one update at a time");
        let (parts, apart) = (self.parts(seed, adam.step), self.is_apart());
        let (gradient, place) = self.gradients.take();
        self.update = Progress::Due(Box::new(Update {
            adam,
            parts,
            mine: self.mine.clone(),
            apart,
            weights: std::mem::replace(&mut self.weights, WeightBuffer::Nothing),
            master: self.master.take(),
            moments: self.moments.take().expect("a unit with weights has moments"),
            gradient,
            place,
        }));
    }

    /// Begins an update that is due, beside what is computed otherwise.
    pub fn start_update(&mut self, device: &Device) {
        self.update = match std::mem::replace(&mut self.update, Progress::Done) {
            Progress::Due(mut update) => Progress::UnderWay(device.beside(move || {
                update.run();
                update
            })),
            other => other,
        };
    }

    /// Makes the update where it is due, and waits for it where it is under way.
    pub fn finish_update(&mut self, rules: &Rules) {
        let update = match std::mem::replace(&mut self.update, Progress::Done) {
            Progress::Done => return,
            Progress::Due(mut update) => {
                update.run();
                update
            }
            Progress::UnderWay(update) => update.wait(),
        };
        let Update { weights, master, moments, gradient, .. } = *update;
        (self.weights, self.master, self.moments) = (weights, master, Some(moments));
        self.gradients.give_back(rules, gradient);
    }

    /// What of the slice is updated alike. Padding is zero, and where chance rounds it is left alone.
    fn parts(&self, seed: u64, step: u64) -> Vec<Part> {
        if self.master.is_some() || self.weights.mine(&self.mine).dtype() == Dtype::F32 {
            let local = |range: Range<usize>| range.start - self.mine.start..range.end - self.mine.start;
            let ranges = self.layout.decay_ranges(self.mine.clone()).into_iter();
            return ranges.map(|(range, decays)| Part { range: local(range), decays, chance: None }).collect();
        }
        let part = |piece: Piece| {
            // Entries that share a public tensor decay alike.
            let place = self.layout.places.iter().find(|place| place.entry.name == piece.name).expect("a piece is of a parameter");
            let chance = Chance::new(seed, &piece.name, step, piece.places());
            Part { range: piece.flat, decays: place.entry.decay, chance: Some(chance) }
        };
        self.pieces(false).into_iter().map(part).collect()
    }
}

impl Update {
    /// The update is computed where the moments are. What lies elsewhere is copied there, and the new weights back.
    fn run(&mut self) {
        let Update { adam, parts, mine, apart, weights, master, moments: [first, second], gradient, place } = self;
        let home = first.device().clone();
        let gradient = gradient.view().part(place.clone(), [place.len()]);
        let moved = (gradient.device().is_gpu() && first.bytes_offloaded() > 0).then(|| copied(&home, gradient));
        let gradient = moved.as_ref().map_or(gradient, Tensor::view);
        let mut fresh = apart.then(|| copied(&home, weights.mine(mine)));
        for Part { range, decays, chance } in parts {
            let shape = [range.len()];
            let adam = Adam { decay: if *decays { adam.decay } else { 0.0 }, ..*adam };
            let gradient = gradient.part(range.clone(), shape);
            let (m, v) = (first.view_mut().part(range.clone(), shape), second.view_mut().part(range.clone(), shape));
            let weights = fresh.as_mut().map_or_else(|| weights.mine_mut(mine), Tensor::view_mut).part(range.clone(), shape);
            match (chance, &mut *master) {
                (Some(chance), _) => adamw::step_by_chance(weights, m, v, gradient, &adam, chance),
                (None, None) => adamw::step(weights, m, v, gradient, &adam),
                (None, Some(master)) => adamw::step_and_cast(master.view_mut().part(range.clone(), shape), m, v, gradient, weights, &adam),
            }
        }
        if let Some(fresh) = fresh {
            weights.mine_mut(mine).copy_from(fresh.view());
        }
    }
}

/// A copy of `x` on `device`.
fn copied(device: &Device, x: View<'_>) -> Tensor {
    let mut copy = device.empty(x.shape(), x.dtype());
    copy.view_mut().copy_from(x);
    copy
}
