//! The edge between the residual stream and a region whose matmuls are cut over tensor parallelism.
//!
//! ```text
//!               whole stream          sequence-parallel stream (each sequence's rows cut over tp)
//! enter         x                     all_gather x
//! enter'        all_reduce dx         reduce_scatter dx
//! leave         all_reduce y          reduce_scatter y
//! leave'        dy                    all_gather dy
//! ```
//!
//! Column-parallel linear = enter, then a plain linear on my rows of w.     y[n, o_tp] = x[n, i] w[o_tp, i]^T
//! Row-parallel linear    = a plain linear on my columns of w, then leave.  y[n, o]    = sum_tp x[n, i_tp] w[o, i_tp]^T
//!
//! Invariant: a sum over tensor parallelism is a sum over the run's virtual shards in a balanced binary tree, each node rounded to the
//! stream's dtype. A rank adds the subtree of the shards it owns, the group adds the rest.

use crate::comm::{Group, Reduction};
use crate::device::tensor::{Tensor, View};
use crate::ops::{elementwise, matmul, select};
use crate::plan::layout::Share;
use anyhow::Result;
use std::ops::Range;
use std::sync::Arc;

#[derive(Clone)]
pub struct Region {
    tp: Arc<dyn Group>,
    share: Share,
    /// The stream's rows are cut over tp.
    sequence_parallel: bool,
}

impl Region {
    pub fn new(tp: Arc<dyn Group>, share: Share, sequence_parallel: bool) -> Region {
        assert_eq!((tp.size(), tp.rank()), (share.size, share.rank), "the group and the share disagree");
        Region { sequence_parallel: sequence_parallel && share.size > 1, tp, share }
    }

    pub fn share(&self) -> Share {
        self.share
    }

    /// Rows of a sequence of `t` that lie in this rank's part of the stream.
    pub fn stream_rows(&self, t: usize) -> Range<usize> {
        if !self.sequence_parallel {
            return 0..t;
        }
        let part = t / self.share.size;
        self.share.rank * part..(self.share.rank + 1) * part
    }

    /// Stream [n, c] -> all rows [n, c]. `t`: rows of one sequence.
    pub fn enter(&self, x: &Arc<Tensor>, t: usize) -> Result<Arc<Tensor>> {
        if self.sequence_parallel { self.gather(x.view(), t).map(Arc::new) } else { Ok(x.clone()) }
    }

    /// Partial sums of all rows [n, c] -> stream [n, c].
    pub fn enter_backward(&self, dx: Tensor, t: usize) -> Result<Tensor> {
        self.leave(dx, t)
    }

    /// Partial sums of all rows [n, c] -> stream [n, c].
    pub fn leave(&self, y: Tensor, t: usize) -> Result<Tensor> {
        if self.sequence_parallel { self.scatter(y, t) } else { self.sum(y) }
    }

    /// Stream [n, c] -> all rows [n, c].
    pub fn leave_backward(&self, dy: &Arc<Tensor>, t: usize) -> Result<Arc<Tensor>> {
        self.enter(dy, t)
    }

    /// This rank's part of a row-parallel product: x [n, i_tp], w [o, i_tp] -> partial sum of y [n, o].
    pub fn row_parallel(&self, x: View<'_>, w: View<'_>) -> Tensor {
        let local = x.shape().columns();
        let shard = if self.share.local() == 1 { matmul::WHOLE } else { local.div_ceil(self.share.local()) };
        matmul::forward(x, w, shard)
    }

    /// This rank's part of the input's gradient of a column-parallel product: dy [n, o_tp], w [o_tp, i] -> partial sum of dx [n, i].
    ///
    /// `stacked`: the matrices that lie one below the other in `w`, as (rows here, rows of one virtual shard). A virtual shard takes
    /// its part of each of them.
    pub fn column_parallel_backward(&self, dy: View<'_>, w: View<'_>, stacked: &[(usize, usize)]) -> Tensor {
        assert_eq!(stacked.iter().map(|(rows, _)| rows).sum::<usize>(), w.shape()[0], "the stacked matrices are the whole of w");
        if self.share.local() == 1 {
            return matmul::backward_input(dy, w);
        }
        let part = |shard: usize| {
            let mut next = 0;
            let mut ranges = Vec::new();
            for (rows, width) in stacked {
                ranges.push(next + (shard * width).min(*rows)..next + ((shard + 1) * width).min(*rows));
                next += rows;
            }
            matmul::backward_input(select::columns(dy, &ranges).view(), select::rows(w, &ranges).view())
        };
        tree((0..self.share.local()).map(part).collect())
    }

    /// A sum that every rank of the region needs.
    pub fn sum(&self, x: Tensor) -> Result<Tensor> {
        self.tp.all_reduce(x, Reduction::Sum)?.wait()
    }

    pub fn max(&self, x: Tensor) -> Result<Tensor> {
        self.tp.all_reduce(x, Reduction::Max)?.wait()
    }

    fn gather(&self, x: View<'_>, t: usize) -> Result<Tensor> {
        let (tp, rows, c) = (self.share.size, x.shape().rows(), x.shape().columns());
        let sequences = rows * tp / t;
        let mut whole = x.device().empty([tp * rows, c], x.dtype());
        whole.view_mut().rows(self.share.rank * rows..(self.share.rank + 1) * rows).copy_from(x);
        let whole = self.tp.all_gather(whole)?.wait()?;
        Ok(if sequences == 1 { whole } else { select::swap_blocks(whole.view(), tp, sequences) })
    }

    fn scatter(&self, y: Tensor, t: usize) -> Result<Tensor> {
        let (tp, n) = (self.share.size, y.shape().rows());
        let sequences = n / t;
        let y = if sequences == 1 { y } else { select::swap_blocks(y.view(), sequences, tp) };
        let sums = self.tp.reduce_scatter(y, Reduction::Sum)?.wait()?;
        let mine = self.share.rank * n / tp..(self.share.rank + 1) * n / tp;
        let mut part = sums.device().empty([n / tp, sums.shape().columns()], sums.dtype());
        part.view_mut().copy_from(sums.view().rows(mine));
        Ok(part)
    }
}

/// Neighbours are added, then neighbouring sums, and so on; an odd one out passes up.
fn tree(mut parts: Vec<Tensor>) -> Tensor {
    while parts.len() > 1 {
        let mut next = Vec::new();
        let mut rest = parts.into_iter();
        while let Some(mut left) = rest.next() {
            if let Some(right) = rest.next() {
                elementwise::add(left.view_mut(), right.view());
            }
            next.push(left);
        }
        parts = next;
    }
    parts.pop().expect("a sum of at least one part")
}
