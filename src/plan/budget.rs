//! Closed forms: floating-point operations of a token, bytes of a checkpoint.
//!
//! Memory on the device is not here: it is rehearsed (`train/rehearsal.rs`).

use crate::dtype::Dtype;
use crate::plan::Plan;
use crate::plan::catalog::{self, Kind};

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
        let multiplied: u64 = plan
            .units
            .iter()
            .filter(|unit| !matches!(unit.kind, Kind::Embedding | Kind::Positions))
            .flat_map(|unit| &unit.entries)
            .map(|entry| entry.dims.iter().product::<usize>() as u64)
            .sum();
        let model = &plan.model;
        let square = 12 * (model.num_layers * model.num_heads * model.head_dim * plan.t) as u64;
        Flops { per_token: 6 * multiplied + square, per_token_causal: 6 * multiplied + square / 2 }
    }
}

/// Bytes of weights, master weights and moments on disk.
pub fn checkpoint_bytes(plan: &Plan) -> u64 {
    let master = if plan.dtype == Dtype::F32 { 0 } else { 4 };
    catalog::parameters(&plan.units) * (plan.dtype.bytes() as u64 + master + 8)
}
