//! Tokens into the residual stream: the vocabulary's rows, cut over tensor parallelism, and learned positions where a family has them.

use crate::device::tensor::{Tensor, View};
use crate::ops::embedding;
use crate::parallel::flat::{Grads, ParamId, Weights};
use crate::parallel::tensor_parallel::Region;
use anyhow::Result;

pub struct Embedding {
    pub unit: usize,
    pub table: ParamId,
    pub region: Region,
    /// The first token id whose row this rank holds.
    pub first: usize,
}

impl Embedding {
    /// ids u32 [n] -> x [n, c]. `t`: rows of one sequence.
    pub fn forward(&self, w: Weights<'_>, ids: View<'_>, t: usize) -> Result<Tensor> {
        self.region.leave(embedding::forward(ids, w.get(self.table), self.first), t)
    }

    /// `dx`: of all rows.
    pub fn backward(&self, g: &mut Grads<'_>, dx: View<'_>, ids: View<'_>) {
        embedding::backward(g.rows(self.table), dx, ids, self.first);
    }
}

/// GPT-2's learned positions.
pub struct Positions {
    pub unit: usize,
    pub table: ParamId,
}

impl Positions {
    /// x [n, c] += table[position], for the rows of the stream.
    pub fn forward(&self, w: Weights<'_>, x: &mut Tensor, positions: View<'_>) {
        embedding::positions_forward(x.view_mut(), w.get(self.table), positions);
    }

    /// `dx`: of all rows.
    pub fn backward(&self, g: &mut Grads<'_>, dx: View<'_>, positions: View<'_>) {
        embedding::positions_backward(g.get(self.table), dx, positions);
    }
}
