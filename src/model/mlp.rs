//! The feed-forward half of a block: norm, up, activation, down, and the residual.
//!
//! ```text
//! normed = norm(x)                                    [n, c]
//! wide   = normed w_gate|up^T (+ b)                   [n, 2 f] for SwiGLU, [n, f] for GELU, cut over f
//! hidden = swiglu(wide) or gelu(wide)                 [n, f]
//! y      = x + leave(hidden w_down^T) (+ b)           [n, c]
//! ```

use crate::device::tensor::{Tensor, View};
use crate::model::norm::Norm;
use crate::ops::{activation, elementwise, matmul};
use crate::parallel::flat::{Grads, ParamId, Weights};
use crate::parallel::tensor_parallel::Region;
use anyhow::Result;
use std::sync::Arc;

pub enum Activation {
    SwiGlu,
    Gelu,
}

pub struct Mlp {
    pub norm: Norm,
    /// Gate and up, or up alone.
    pub wide: Vec<ParamId>,
    pub wide_bias: Option<ParamId>,
    pub activation: Activation,
    pub down: ParamId,
    pub down_bias: Option<ParamId>,
    pub region: Region,
}

pub struct Saved {
    x: Arc<Tensor>,
    stats: Arc<Tensor>,
    /// Dropped by selective recomputation, as is `hidden`.
    normed: Option<Arc<Tensor>>,
    wide: Tensor,
    hidden: Option<Arc<Tensor>>,
}

impl Saved {
    /// Lets go of what is cheap to redo.
    pub fn trim(&mut self) {
        self.normed = None;
        self.hidden = None;
    }
}

impl Mlp {
    /// x [n, c] -> y [n, c], where x = attended + before: what attention gave and the stream before it. `t`: rows of one sequence.
    pub fn forward(&self, w: Weights<'_>, attended: Tensor, before: View<'_>, t: usize) -> Result<(Tensor, Saved)> {
        let mut x = attended;
        let (normed, stats) = self.norm.forward_add(w, x.view_mut(), before);
        let (x, normed) = (Arc::new(x), Arc::new(normed));
        let entered = self.region.enter(&normed, t)?;
        let wide = match self.wide_bias {
            None => matmul::forward(entered.view(), w.stack(&self.wide), matmul::WHOLE),
            Some(bias) => matmul::forward_bias(entered.view(), w.stack(&self.wide), w.get(bias), matmul::WHOLE),
        };
        drop(entered);
        let hidden = self.activate(wide.view());
        let mut y = self.region.leave(self.region.row_parallel(hidden.view(), w.get(self.down)), t)?;
        if let Some(bias) = self.down_bias {
            elementwise::add_row(y.view_mut(), w.get(bias));
        }
        elementwise::add(y.view_mut(), x.view());
        Ok((y, Saved { x, stats: Arc::new(stats), normed: Some(normed), wide, hidden: Some(Arc::new(hidden)) }))
    }

    /// dy [n, c] -> dx [n, c]. `t`: rows of one sequence.
    pub fn backward(&self, w: Weights<'_>, g: &mut Grads<'_>, saved: Saved, dy: Arc<Tensor>, t: usize) -> Result<Tensor> {
        let Saved { x, stats, normed, mut wide, hidden } = saved;
        let stream_t = self.region.stream_rows(t).len();
        if let Some(bias) = self.down_bias {
            g.add_stream_bias(bias, &dy, stream_t);
        }
        let dleft = self.region.leave_backward(&dy, t)?;
        let hidden = hidden.unwrap_or_else(|| Arc::new(self.activate(wide.view())));
        g.add_matrices(&[self.down], &dleft, &hidden, t);
        drop(hidden);
        let dhidden = matmul::backward_input(dleft.view(), w.get(self.down));
        drop(dleft);
        match self.activation {
            Activation::SwiGlu => activation::swiglu_backward(dhidden.view(), wide.view_mut()),
            Activation::Gelu => activation::gelu_backward(dhidden.view(), wide.view_mut()),
        }
        drop(dhidden);
        let dwide = Arc::new(wide);
        let normed = normed.unwrap_or_else(|| Arc::new(self.norm.again(w, x.view(), stats.view())));
        let entered = self.region.enter(&normed, t)?;
        drop(normed);
        if let Some(bias) = self.wide_bias {
            g.add_biases(&[bias], &dwide, t);
        }
        g.add_matrices(&self.wide, &dwide, &entered, t);
        drop(entered);
        let rows = |&id: &ParamId| w.get(id).shape()[0];
        let stacked: Vec<_> = self.wide.iter().map(rows).map(|rows| (rows, rows / self.region.share().local())).collect();
        let dnormed = self.region.column_parallel_backward(dwide.view(), w.stack(&self.wide), &stacked);
        drop(dwide);
        let dnormed = self.region.enter_backward(dnormed, t)?;
        Ok(self.norm.backward(w, g, dnormed, (&x, &stats), Some(dy.view()), stream_t))
    }

    fn activate(&self, wide: View<'_>) -> Tensor {
        match self.activation {
            Activation::SwiGlu => activation::swiglu_forward(wide),
            Activation::Gelu => activation::gelu_forward(wide),
        }
    }
}
