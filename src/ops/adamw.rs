//! Adam with decoupled weight decay (Loshchilov, Hutter, ICLR'19), on any range of the flat buffers.
//!
//! ```text
//! g' = scale g     p *= 1 - rate decay     m += (1 - beta1) (g' - m)     v = beta2 v + (1 - beta2) g' g'
//! p -= rate / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//! ```
//!
//! p, m, v, g are f32; the scalars are computed in f64 and rounded to f32 once.
//!
//! Invariant: element by element, so bits do not depend on how the buffers are cut into ranges.

use crate::device::Device;
use crate::device::tensor::{View, ViewMut};
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::ops::rows::{Rows, over_rows};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub rate: f64,
    pub decay: f64,
    /// Counts updates, this one included: 1 at the first.
    pub step: u64,
    /// What gradients are multiplied by first: clipping, and the inverse of the loss scale.
    pub scale: f32,
}

/// The scalars of one update.
#[derive(Clone, Copy)]
struct Scalars {
    scale: f32,
    keep: f32,
    blend: f32,
    beta2: f32,
    fresh: f32,
    rate: f32,
    root: f32,
    eps: f32,
}

impl Adam {
    fn scalars(&self) -> Scalars {
        assert!(self.step > 0, "updates are counted from 1");
        Scalars {
            scale: self.scale,
            keep: (1.0 - self.rate * self.decay) as f32,
            blend: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            fresh: (1.0 - self.beta2) as f32,
            rate: (-self.rate / (1.0 - integer_power(self.beta1, self.step))) as f32,
            root: (1.0 - integer_power(self.beta2, self.step)).sqrt() as f32,
            eps: self.eps as f32,
        }
    }
}

/// One update of p, m and v, all f32 of one length, by the gradient g.
pub fn step(mut p: ViewMut<'_>, mut m: ViewMut<'_>, mut v: ViewMut<'_>, g: View<'_>, adam: &Adam) {
    check(&p, &m, &v, g);
    let scalars = adam.scalars();
    match g.device() {
        Device::Cpu(cpu) => {
            let gs = g.slice::<f32>();
            let state = (Rows::new(m.slice_mut::<f32>(), 1), Rows::new(v.slice_mut::<f32>(), 1));
            over_rows(
                cpu,
                gs.len(),
                4,
                (Rows::new(p.slice_mut::<f32>(), 1), state),
                #[inline(always)]
                |range, (p, (m, v))| {
                    for (((p, m), v), g) in p.elements.iter_mut().zip(m.elements).zip(v.elements).zip(&gs[range]) {
                        (*p, *m, *v) = update(*p, *m, *v, *g, scalars);
                    }
                },
            );
        }
        Device::Gpu(_) => panic!("not yet on a GPU"),
        Device::Dry(_) => {}
    }
}

/// The same, and `weights` = p, rounded to their dtype, in the same pass over memory.
pub fn step_and_cast(mut p: ViewMut<'_>, mut m: ViewMut<'_>, mut v: ViewMut<'_>, g: View<'_>, mut weights: ViewMut<'_>, adam: &Adam) {
    check(&p, &m, &v, g);
    assert_eq!(weights.shape().numel(), g.shape().numel(), "weights as long as their gradient");
    let scalars = adam.scalars();
    match g.device() {
        Device::Cpu(cpu) => dispatch!(weights.dtype(), T => {
            let gs = g.slice::<f32>();
            let state = (Rows::new(m.slice_mut::<f32>(), 1), Rows::new(v.slice_mut::<f32>(), 1));
            let out = (Rows::new(p.slice_mut::<f32>(), 1), Rows::new(weights.slice_mut::<T>(), 1));
            over_rows(cpu, gs.len(), 5, (out, state), #[inline(always)] |range, ((p, weights), (m, v))| {
                for ((((p, w), m), v), g) in p.elements.iter_mut().zip(weights.elements).zip(m.elements).zip(v.elements).zip(&gs[range]) {
                    (*p, *m, *v) = update(*p, *m, *v, *g, scalars);
                    *w = <T as Element>::from_f32(*p);
                }
            });
        }),
        Device::Gpu(_) => panic!("not yet on a GPU"),
        Device::Dry(_) => {}
    }
}

#[inline(always)]
fn update(p: f32, m: f32, v: f32, g: f32, with: Scalars) -> (f32, f32, f32) {
    let g = g * with.scale;
    // Both forms are the same line; each is exact at its own end, which is how PyTorch's lerp chooses, too.
    let m = if with.blend < 0.5 { m + with.blend * (g - m) } else { g - (g - m) * (1.0 - with.blend) };
    let v = v * with.beta2 + (with.fresh * g) * g;
    let p = p * with.keep + (with.rate * m) / (v.sqrt() / with.root + with.eps);
    (p, m, v)
}

/// base^exponent by squaring: the same bits everywhere, to about exponent * 1e-16 at worst.
fn integer_power(base: f64, exponent: u64) -> f64 {
    let (mut result, mut square, mut rest) = (1.0, base, exponent);
    while rest > 0 {
        if rest % 2 == 1 {
            result *= square;
        }
        square *= square;
        rest /= 2;
    }
    result
}

fn check(p: &ViewMut<'_>, m: &ViewMut<'_>, v: &ViewMut<'_>, g: View<'_>) {
    let count = g.shape().numel();
    assert_eq!([p.shape().numel(), m.shape().numel(), v.shape().numel()], [count; 3], "weights and moments as long as their gradient");
    assert_eq!([p.dtype(), m.dtype(), v.dtype(), g.dtype()], [Dtype::F32; 4], "weights, moments and gradient of an update");
}
