//! The edge between the residual stream and a region whose matmuls are cut over tensor parallelism.
//!
//! ```text
//!               whole stream          sequence-parallel stream (rows cut over tp)
//! enter         x                     all_gather x
//! enter'        all_reduce dx         reduce_scatter dx
//! leave         all_reduce y          reduce_scatter y
//! leave'        dy                    all_gather dy
//! ```
//!
//! Column-parallel linear = enter, then a plain linear on my rows of w.     y[n, o_tp] = x[n, i] w[o_tp, i]^T
//! Row-parallel linear    = a plain linear on my columns of w, then leave.  y[n, o]    = sum_tp x[n, i_tp] w[o, i_tp]^T
//!
//! Invariant: a sum over tensor parallelism is a sum over the run's virtual shards in a balanced binary tree. A rank adds the
//! subtree of the shards it owns inside its matmul (`width` tells it where to cut), the group adds the rest.

use crate::comm::{Group, Reduction};
use crate::device::tensor::{Tensor, View};
use crate::ops::matmul;
use crate::plan::layout::Share;
use anyhow::Result;
use std::sync::Arc;

#[derive(Clone)]
pub struct Region {
    tp: Arc<dyn Group>,
    share: Share,
}

impl Region {
    pub fn new(tp: Arc<dyn Group>, share: Share) -> Region {
        assert_eq!((tp.size(), tp.rank()), (share.size, share.rank), "the group and the share disagree");
        Region { tp, share }
    }

    pub fn share(&self) -> Share {
        self.share
    }

    /// How wide one virtual shard of a dim of `length` is: where sums over that dim are cut.
    pub fn width(&self, length: usize) -> usize {
        self.share.width(length)
    }

    pub fn enter(&self, x: Tensor) -> Result<Tensor> {
        Ok(x)
    }

    pub fn leave(&self, y: Tensor) -> Result<Tensor> {
        self.sum(y)
    }

    /// A row-parallel product, summed: x [n, i_tp], w [o, i_tp] -> y [n, o].
    pub fn leave_matmul(&self, x: View<'_>, w: View<'_>) -> Result<Tensor> {
        let local = x.shape().columns();
        let shard = if self.share.local() == 1 { matmul::WHOLE } else { local.div_ceil(self.share.local()) };
        self.leave(matmul::forward(x, w, shard))
    }

    /// The input's gradient of a column-parallel product, summed: dy [n, o_tp], w [o_tp, i] -> dx [n, i]. `stacked`: how many rows
    /// of `w` each of the matrices has that lie in it one below the other.
    pub fn enter_backward_matmul(&self, dy: View<'_>, w: View<'_>, stacked: &[usize]) -> Result<Tensor> {
        assert_eq!(stacked.iter().sum::<usize>(), w.shape()[0], "the stacked matrices are the whole of w");
        assert_eq!(self.share.local(), 1, "one virtual shard on a rank");
        self.sum(matmul::backward_input(dy, w))
    }

    /// Sums over the vocabulary, or any other partial sum that all ranks of the region need.
    pub fn sum(&self, x: Tensor) -> Result<Tensor> {
        self.tp.all_reduce(x, Reduction::Sum)?.wait()
    }

    pub fn max(&self, x: Tensor) -> Result<Tensor> {
        self.tp.all_reduce(x, Reduction::Max)?.wait()
    }
}
