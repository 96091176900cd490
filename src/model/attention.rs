//! The attention half of a block: norm, q|k|v, rotary positions, causal attention, o.
//!
//! ```text
//! normed = norm(x)                       [n, c]
//! qkv    = rope(normed w_qkv^T + b)      [n, (h + 2 h_kv) d], cut by heads
//! out    = attention(qkv)                [n, h d]
//! y      = leave(out w_o^T) + b          [n, c]
//! ```
//!
//! The stream is then x + y: the norm of the feed-forward half adds them up, in the pass in which it reads them anyway.

use crate::device::tensor::{Tensor, View};
use crate::model::norm::Norm;
use crate::ops::attention::{self, Heads, Mask};
use crate::ops::{elementwise, matmul, rope};
use crate::parallel::flat::{Grads, ParamId, Weights};
use crate::parallel::tensor_parallel::Region;
use anyhow::Result;
use std::sync::Arc;

/// What a batch tells every layer: which rows are a sequence, where each token stands and what it may see.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// Rows of one sequence.
    pub t: usize,
    /// u32 `[n]`
    pub positions: View<'a>,
    /// u32 `[n]`: the first position of its sequence that a token may attend to.
    pub starts: View<'a>,
    /// f32 `[positions, d]`: cos and sin; none where positions are learned.
    pub rope: Option<View<'a>>,
}

pub struct Attention {
    pub norm: Norm,
    /// Queries, keys and values, of which there may be a copy for each virtual shard.
    pub qkv: Vec<ParamId>,
    pub qkv_bias: Option<Vec<ParamId>>,
    pub o: ParamId,
    pub o_bias: Option<ParamId>,
    pub region: Region,
    /// Heads of this tensor-parallel rank.
    pub heads: Heads,
    pub window: Option<usize>,
}

pub struct Saved {
    pub x: Arc<Tensor>,
    stats: Arc<Tensor>,
    /// Dropped by selective recomputation.
    normed: Option<Arc<Tensor>>,
    qkv: Tensor,
    out: Arc<Tensor>,
    lse: Tensor,
}

impl Saved {
    /// Lets go of what is cheap to redo.
    pub fn trim(&mut self) {
        self.normed = None;
    }
}

impl Attention {
    /// x [n, c] -> y [n, c], which is to be added to x.
    pub fn forward(&self, w: Weights<'_>, x: Arc<Tensor>, tokens: Tokens<'_>) -> Result<(Tensor, Saved)> {
        let (normed, stats) = self.norm.forward(w, x.view());
        let normed = Arc::new(normed);
        let entered = self.region.enter(&normed, tokens.t)?;
        let mut qkv = match &self.qkv_bias {
            None => matmul::forward(entered.view(), w.stack(&self.qkv), matmul::WHOLE),
            Some(bias) => matmul::forward_bias(entered.view(), w.stack(&self.qkv), w.stack(bias), matmul::WHOLE),
        };
        drop(entered);
        if let Some(table) = tokens.rope {
            rope::forward(qkv.view_mut(), self.heads.query + self.heads.kv, self.heads.dim, table, tokens.positions);
        }
        let (out, lse) = attention::forward(qkv.view(), self.heads, self.mask(tokens));
        let mut y = self.region.leave(self.region.row_parallel(out.view(), w.get(self.o)), tokens.t)?;
        if let Some(bias) = self.o_bias {
            elementwise::add_row(y.view_mut(), w.get(bias));
        }
        Ok((y, Saved { x, stats: Arc::new(stats), normed: Some(normed), qkv, out: Arc::new(out), lse }))
    }

    /// dy [n, c], of the stream behind this half -> dx [n, c], of the stream before it.
    pub fn backward(&self, w: Weights<'_>, g: &mut Grads<'_>, saved: Saved, dy: Arc<Tensor>, tokens: Tokens<'_>) -> Result<Tensor> {
        let Saved { x, stats, normed, qkv, out, lse } = saved;
        let (t, rotated) = (tokens.t, self.heads.query + self.heads.kv);
        let stream_t = self.region.stream_rows(t).len();
        if let Some(bias) = self.o_bias {
            g.add_stream_bias(bias, &dy, stream_t);
        }
        let dleft = self.region.leave_backward(&dy, t)?;
        g.add_matrices(&[self.o], &dleft, &out, t);
        let dout = matmul::backward_input(dleft.view(), w.get(self.o));
        drop(dleft);
        let mut dqkv = attention::backward(dout.view(), qkv.view(), out.view(), lse.view(), self.heads, self.mask(tokens));
        drop((dout, qkv, out, lse));
        if let Some(table) = tokens.rope {
            rope::backward(dqkv.view_mut(), rotated, self.heads.dim, table, tokens.positions);
        }
        let normed = normed.unwrap_or_else(|| Arc::new(self.norm.again(w, x.view(), stats.view())));
        let entered = self.region.enter(&normed, t)?;
        drop(normed);
        let dqkv = Arc::new(dqkv);
        if let Some(bias) = &self.qkv_bias {
            g.add_biases(bias, &dqkv, t);
        }
        g.add_matrices(&self.qkv, &dqkv, &entered, t);
        drop(entered);
        let Heads { query, kv, dim } = self.heads;
        let stacked = [query, kv, kv].map(|heads| (heads * dim, heads * dim / self.region.share().local()));
        let dnormed = self.region.column_parallel_backward(dqkv.view(), w.stack(&self.qkv), &stacked);
        drop(dqkv);
        let dnormed = self.region.enter_backward(dnormed, t)?;
        Ok(self.norm.backward(w, g, dnormed, (&x, &stats), Some(dy.view()), stream_t))
    }

    fn mask<'a>(&self, tokens: Tokens<'a>) -> Mask<'a> {
        Mask { t: tokens.t, starts: tokens.starts, window: self.window }
    }
}
