//! Closed forms: floating-point operations of a token and of a stage, bytes of a checkpoint.
//!
//! Memory on the device is not here: it is rehearsed (`train/rehearsal.rs`). What travels is in `traffic.rs`.
//!
//! Invariant: everything here is a function of the model, the sequence length and the policies that the plan states.

use crate::config::{Model, Recompute};
use crate::plan::Plan;
use crate::plan::catalog::{self, Kind, Unit};
use crate::plan::simulate::Costs;
use std::ops::Range;

/// Rows of the head whose logits exist at a time: enough to keep the matmuls busy, few enough to keep 128k-word vocabularies small.
pub const HEAD_ROWS: usize = 1024;

/// The pieces of `n` rows in sequences of `t` that the head takes at a time: `HEAD_ROWS` rows of a sequence from its start, or, where
/// sequences are shorter, as many whole ones as fit. A small piece would read the output matrix, and add to its gradient, for few rows.
pub fn head_pieces(n: usize, t: usize) -> impl Iterator<Item = Range<usize>> {
    let together = (HEAD_ROWS / t).max(1) * t;
    (0..n).step_by(together).flat_map(move |start| {
        let end = n.min(start + together);
        (start..end).step_by(HEAD_ROWS).map(move |first| first..end.min(first + HEAD_ROWS))
    })
}

/// Floating-point operations of one token, forward and backward, a multiply-add as two. What recomputation adds is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flops {
    /// 6 N + 12 L h d t, with N the parameters that are multiplied with (no input embedding, but a tied head): PaLM, appendix B.
    pub per_token: u64,
    /// The same with half of the attention's square, which is what a causal kernel computes.
    pub per_token_causal: u64,
}

impl Flops {
    pub fn of(plan: &Plan) -> Flops {
        let multiplied: u64 =
            plan.units.iter().filter(|unit| !matches!(unit.kind, Kind::Embedding | Kind::Positions)).map(Unit::parameters).sum();
        let model = &plan.model;
        let square = 12 * (model.num_layers * model.num_heads * model.head_dim * plan.t) as u64;
        Flops { per_token: 6 * multiplied + square, per_token_causal: 6 * multiplied + square / 2 }
    }
}

/// Floating-point operations of one token in the three passes of a schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Work {
    forward: f64,
    backward_input: f64,
    backward_weight: f64,
}

impl Work {
    /// The head runs forward and backward in one go when the gradient of its output is asked for; looking tokens up costs nothing.
    fn of(unit: &Unit, model: &Model, t: usize) -> Work {
        let products = 2.0 * unit.parameters() as f64;
        match unit.kind {
            Kind::Embedding | Kind::Positions => Work::default(),
            Kind::Norm | Kind::Head { .. } => Work { forward: 0.0, backward_input: 3.0 * products, backward_weight: 0.0 },
            Kind::Block(_) => {
                let square = 4.0 * (model.num_heads * model.head_dim * t) as f64;
                Work { forward: products + square, backward_input: products + 2.0 * square, backward_weight: products }
            }
        }
    }

    fn total(&self) -> f64 {
        self.forward + self.backward_input + self.backward_weight
    }
}

/// What each unit costs, in blocks, rounded to 1/1024: sums of such numbers and of their squares are exact, so that cuts which cost the
/// same compare as equal.
pub fn unit_costs(units: &[Unit], model: &Model, t: usize) -> Vec<f64> {
    let block = units.iter().find(|unit| matches!(unit.kind, Kind::Block(_))).expect("a model has a block");
    let block = Work::of(block, model, t).total();
    units.iter().map(|unit| (1024.0 * Work::of(unit, model, t).total() / block).round() / 1024.0).collect()
}

/// What each stage costs the simulator: one second is the forward pass of one block, and transfers are free.
pub fn stage_costs(units: &[Unit], stages: &[Range<usize>], model: &Model, t: usize, recompute: Recompute) -> Costs {
    let mut costs = Costs::equal(stages.len(), 0.0, 0.0, 0.0);
    let block = units.iter().find(|unit| matches!(unit.kind, Kind::Block(_))).expect("a model has a block");
    let second = Work::of(block, model, t).forward;
    for (stage, range) in stages.iter().enumerate() {
        for unit in &units[range.clone()] {
            let work = Work::of(unit, model, t);
            let again = if recompute == Recompute::Full { work.forward } else { 0.0 };
            costs.forward[stage] += work.forward / second;
            costs.backward_input[stage] += (work.backward_input + again) / second;
            costs.backward_weight[stage] += work.backward_weight / second;
        }
    }
    costs
}

/// Bytes of weights, master weights and moments on disk.
pub fn checkpoint_bytes(plan: &Plan) -> u64 {
    let master = if plan.masters { 4 } else { 0 };
    catalog::parameters(&plan.units) * (plan.dtype.bytes() as u64 + master + 8)
}
