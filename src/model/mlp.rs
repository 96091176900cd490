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
use crate::ops::{activation, elementwise, matmul, reduce};
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
    x: Tensor,
    stats: Tensor,
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
    /// x [n, c] -> y [n, c]
    pub fn forward(&self, w: Weights<'_>, x: Tensor) -> Result<(Tensor, Saved)> {
        let (normed, stats) = self.norm.forward(w, x.view());
        let normed = self.region.enter(normed)?;
        let wide = match self.wide_bias {
            None => matmul::forward(normed.view(), w.stack(&self.wide), matmul::WHOLE),
            Some(bias) => matmul::forward_bias(normed.view(), w.stack(&self.wide), w.get(bias), matmul::WHOLE),
        };
        let hidden = self.activate(wide.view());
        let mut y = self.region.leave_matmul(hidden.view(), w.get(self.down))?;
        if let Some(bias) = self.down_bias {
            elementwise::add_row(y.view_mut(), w.get(bias));
        }
        elementwise::add(y.view_mut(), x.view());
        Ok((y, Saved { x, stats, normed: Some(Arc::new(normed)), wide, hidden: Some(Arc::new(hidden)) }))
    }

    /// dy [n, c] -> dx [n, c]. `t`: rows of one sequence.
    pub fn backward(&self, w: Weights<'_>, g: &mut Grads<'_>, saved: Saved, dy: Arc<Tensor>, t: usize) -> Result<Tensor> {
        let Saved { x, stats, normed, wide, hidden } = saved;
        if let Some(bias) = self.down_bias {
            reduce::sum_rows(g.stream(bias), dy.view(), t);
        }
        let hidden = hidden.unwrap_or_else(|| Arc::new(self.activate(wide.view())));
        g.matrices(&[self.down], &dy, &hidden, t);
        drop(hidden);
        let dhidden = matmul::backward_input(dy.view(), w.get(self.down));
        let dwide = match self.activation {
            Activation::SwiGlu => activation::swiglu_backward(dhidden.view(), wide.view()),
            Activation::Gelu => activation::gelu_backward(dhidden.view(), wide.view()),
        };
        drop((dhidden, wide));
        if let Some(bias) = self.wide_bias {
            reduce::sum_rows(g.columns(&[bias]), dwide.view(), t);
        }
        let normed = match normed {
            Some(normed) => normed,
            None => Arc::new(self.region.enter(self.norm.again(w, x.view(), stats.view()))?),
        };
        let dwide = Arc::new(dwide);
        g.matrices(&self.wide, &dwide, &normed, t);
        drop(normed);
        let rows: Vec<usize> = self.wide.iter().map(|&id| w.get(id).shape()[0]).collect();
        let dnormed = self.region.enter_backward_matmul(dwide.view(), w.stack(&self.wide), &rows)?;
        drop(dwide);
        let mut dx = self.norm.backward(w, g, dnormed.view(), x.view(), stats.view(), t);
        elementwise::add(dx.view_mut(), dy.view());
        Ok(dx)
    }

    fn activate(&self, wide: View<'_>) -> Tensor {
        match self.activation {
            Activation::SwiGlu => activation::swiglu_forward(wide),
            Activation::Gelu => activation::gelu_forward(wide),
        }
    }
}
