//! The norm of a family: RMSNorm (Llama) or LayerNorm with bias (GPT-2).

use crate::device::tensor::{Tensor, View, ViewMut};
use crate::ops::norm;
use crate::parallel::flat::{Grads, ParamId, Weights};
use crate::plan::layout::UnitLayout;
use std::sync::Arc;

pub enum Norm {
    Rms { weight: ParamId, eps: f32 },
    Layer { weight: ParamId, bias: ParamId, eps: f32 },
}

impl Norm {
    /// The norm whose weight has `role`; with a bias where the family has one, in `role` + `_bias`.
    pub fn new(layout: &UnitLayout, role: &str, eps: f64) -> Norm {
        let (weight, eps) = (layout.find(role), eps as f32);
        let bias = format!("{role}_bias");
        match layout.places.iter().position(|place| place.entry.role == bias) {
            None => Norm::Rms { weight, eps },
            Some(bias) => Norm::Layer { weight, bias, eps },
        }
    }

    /// x [n, c] -> y [n, c] and the statistics of each row, f32.
    pub fn forward(&self, w: Weights<'_>, x: View<'_>) -> (Tensor, Tensor) {
        match *self {
            Norm::Rms { weight, eps } => norm::rms_forward(x, w.get(weight), eps),
            Norm::Layer { weight, bias, eps } => norm::layer_forward(x, w.get(weight), w.get(bias), eps),
        }
    }

    /// x += addend, in place, then `forward` of the sum.
    pub fn forward_add(&self, w: Weights<'_>, x: ViewMut<'_>, addend: View<'_>) -> (Tensor, Tensor) {
        match *self {
            Norm::Rms { weight, eps } => norm::rms_forward_add(x, addend, w.get(weight), eps),
            Norm::Layer { weight, bias, eps } => norm::layer_forward_add(x, addend, w.get(weight), w.get(bias), eps),
        }
    }

    /// The same y again, bit for bit.
    pub fn again(&self, w: Weights<'_>, x: View<'_>, stats: View<'_>) -> Tensor {
        match *self {
            Norm::Rms { weight, .. } => norm::rms_again(x, w.get(weight), stats),
            Norm::Layer { weight, bias, .. } => norm::layer_again(x, w.get(weight), w.get(bias), stats),
        }
    }

    /// dy -> dx, plus the gradient that reaches x past the norm, where there is one. `t`: rows of one sequence.
    pub fn backward(
        &self,
        w: Weights<'_>,
        g: &mut Grads<'_>,
        dy: Tensor,
        (x, stats): (&Arc<Tensor>, &Arc<Tensor>),
        past: Option<View<'_>>,
        t: usize,
    ) -> Tensor {
        let dy = Arc::new(dy);
        let (kept_dy, kept_x, kept_stats) = (dy.clone(), x.clone(), stats.clone());
        let (dy_view, x, stats) = (dy.view(), x.view(), stats.view());
        match *self {
            Norm::Rms { weight, .. } => {
                g.add(move |g| norm::rms_backward_weight(g.stream(weight), kept_dy.view(), kept_x.view(), kept_stats.view(), t));
                match past {
                    None => norm::rms_backward(dy_view, x, w.get(weight), stats),
                    Some(past) => norm::rms_backward_add(dy_view, x, w.get(weight), stats, past),
                }
            }
            Norm::Layer { weight, bias, .. } => {
                g.add(move |g| norm::layer_backward_weight(g.stream(weight), kept_dy.view(), kept_x.view(), kept_stats.view(), t));
                g.add_stream_bias(bias, &dy, t);
                match past {
                    None => norm::layer_backward(dy_view, x, w.get(weight), stats),
                    Some(past) => norm::layer_backward_add(dy_view, x, w.get(weight), stats, past),
                }
            }
        }
    }
}
