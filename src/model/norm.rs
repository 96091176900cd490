//! The norm of a family: RMSNorm (Llama) or LayerNorm with bias (GPT-2).

use crate::device::tensor::{Tensor, View};
use crate::ops::{norm, reduce};
use crate::parallel::flat::{Grads, ParamId, Weights};
use crate::plan::layout::UnitLayout;

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

    /// The same y again, bit for bit.
    pub fn again(&self, w: Weights<'_>, x: View<'_>, stats: View<'_>) -> Tensor {
        match *self {
            Norm::Rms { weight, .. } => norm::rms_again(x, w.get(weight), stats),
            Norm::Layer { weight, bias, .. } => norm::layer_again(x, w.get(weight), w.get(bias), stats),
        }
    }

    /// dy -> dx. `t`: rows of one sequence.
    pub fn backward(&self, w: Weights<'_>, g: &mut Grads<'_>, dy: View<'_>, x: View<'_>, stats: View<'_>, t: usize) -> Tensor {
        match *self {
            Norm::Rms { weight, .. } => {
                norm::rms_backward_weight(g.stream(weight), dy, x, stats, t);
                norm::rms_backward(dy, x, w.get(weight), stats)
            }
            Norm::Layer { weight, bias, .. } => {
                norm::layer_backward_weight(g.stream(weight), dy, x, stats, t);
                reduce::sum_rows(g.stream(bias), dy, t);
                norm::layer_backward(dy, x, w.get(weight), stats)
            }
        }
    }
}
