//! The end of the chain: last norm, logits, cross-entropy.
//!
//! In training the head runs forward and backward in one go, a piece of a sequence at a time: the logits of one piece are all that
//! ever exist. `[rows, v]` logits become their own gradients in place.
//!
//! Invariant: the gradient of the output matrix takes the sum of one sequence (of `HEAD_ROWS` rows of it, counted from its start) after
//! the other, so the bits do not depend on how many sequences a piece has.

use crate::device::tensor::{Tensor, View};
use crate::dtype::Dtype;
use crate::model::norm::Norm;
use crate::ops::{cross_entropy, matmul};
use crate::parallel::flat::{Grads, ParamId, Weights};
use crate::parallel::tensor_parallel::Region;
use crate::plan::budget::head_pieces;
use anyhow::Result;
use std::sync::Arc;

pub struct Head {
    /// The unit of the last norm.
    pub norm_unit: usize,
    pub norm: Norm,
    /// The unit of the output matrix.
    pub unit: usize,
    pub table: ParamId,
    pub region: Region,
    /// The first token id whose logit this rank computes.
    pub first: usize,
    /// Ids in one virtual shard of the vocabulary.
    pub width: usize,
}

impl Head {
    /// The norm before the logits: the stream's x [n, c] -> normed [n, c] of all rows, and the stream's statistics.
    pub fn norm(&self, w: Weights<'_>, x: View<'_>, t: usize) -> Result<(Arc<Tensor>, Tensor)> {
        let (normed, stats) = self.norm.forward(w, x);
        Ok((self.region.enter(&Arc::new(normed), t)?, stats))
    }

    /// The loss of every row, f32 [n], and nothing else.
    pub fn losses(&self, w: Weights<'_>, normed: View<'_>, targets: View<'_>, t: usize) -> Result<Tensor> {
        let mut losses = normed.device().empty([normed.shape().rows()], Dtype::F32);
        for rows in head_pieces(normed.shape().rows(), t) {
            let targets = targets.part(rows.clone(), [rows.len()]);
            let logits = self.logits(w, normed.rows(rows.clone()));
            let (_, sums) = self.sums(logits.view(), targets)?;
            let piece = cross_entropy::losses(sums.view(), targets);
            losses.view_mut().part(rows.clone(), [rows.len()]).copy_from(piece.view());
        }
        Ok(losses)
    }

    /// The loss of every row, f32 [n], and its gradient times `scale` with respect to the stream's `normed`; the output matrix's is
    /// added to `g`.
    pub fn losses_and_gradient(
        &self,
        w: Weights<'_>,
        g: &mut Grads<'_>,
        normed: View<'_>,
        targets: View<'_>,
        t: usize,
        scale: f32,
    ) -> Result<(Tensor, Tensor)> {
        let device = normed.device();
        let mut losses = device.empty([normed.shape().rows()], Dtype::F32);
        let mut dnormed = device.empty(normed.shape(), normed.dtype());
        for rows in head_pieces(normed.shape().rows(), t) {
            let targets = targets.part(rows.clone(), [rows.len()]);
            let mut logits = self.logits(w, normed.rows(rows.clone()));
            let (max, sums) = self.sums(logits.view(), targets)?;
            let piece = cross_entropy::losses(sums.view(), targets);
            losses.view_mut().part(rows.clone(), [rows.len()]).copy_from(piece.view());
            cross_entropy::finish(logits.view_mut(), max.view(), sums.view(), targets, self.first, scale);
            matmul::backward_weight(g.matrices(&[self.table]), logits.view(), normed.rows(rows.clone()), t.min(rows.len()));
            let stacked = (logits.shape().columns(), self.width);
            let piece = self.region.column_parallel_backward(logits.view(), w.get(self.table), &[stacked]);
            dnormed.view_mut().rows(rows).copy_from(piece.view());
        }
        Ok((losses, self.region.enter_backward(dnormed, t)?))
    }

    /// normed [n, c] -> this rank's logits [n, v_tp]
    pub fn logits(&self, w: Weights<'_>, normed: View<'_>) -> Tensor {
        matmul::forward(normed, w.get(self.table), matmul::WHOLE)
    }

    /// The maximum of each row, and what its softmax needs, over the whole vocabulary.
    fn sums(&self, logits: View<'_>, targets: View<'_>) -> Result<(Tensor, Tensor)> {
        let (max, parts) = cross_entropy::row_max(logits, self.width);
        let max = self.region.max(max)?;
        let sums = self.region.sum(cross_entropy::sums(logits, max.view(), &parts, targets, self.first, self.width))?;
        Ok((max, sums))
    }
}
