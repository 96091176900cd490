//! The non-linearities of the MLP.
//!
//! ```text
//! swiglu  h = (gate s(gate)) up, s the logistic function      dgate = dh up s (1 + gate (1 - s)), dup = dh gate s
//! gelu    y = x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)   dx = dy (s + x s (1 - s) 2 u')
//! ```
//!
//! The tanh form of gelu, x (1 + tanh u) / 2, is x s(2 u): the same function without a difference that cancels. All in f32, rounded once.
//! On a GPU (`cuda/activation.cu`) the same roundings give the same bits.
//!
//! Invariant: element by element, so bits depend on nothing but the element.

use crate::args;
use crate::device::Device;
use crate::device::gpu::driver::{Argument, Grid};
use crate::device::gpu::{Gpu, kernel};
use crate::device::tensor::{Tensor, View};
use crate::dispatch;
use crate::dtype::Element;
use crate::ops::functions::sigmoid;
use crate::ops::rows::{Rows, over_rows};

/// What an exponential costs, in elements touched.
const COST: usize = 4;

/// gate_up [n, 2 f], gates in the first half of each row -> [n, f]
pub fn swiglu_forward(gate_up: View<'_>) -> Tensor {
    let (n, f) = halves(gate_up);
    let mut h = gate_up.device().empty([n, f], gate_up.dtype());
    match gate_up.device() {
        Device::Cpu(cpu) => dispatch!(gate_up.dtype(), T => {
            let gate_up = gate_up.slice::<T>();
            over_rows(cpu, n, f * COST, Rows::new(h.view_mut().into_slice::<T>(), f), #[inline(always)] |rows, h| {
                for (row, h) in rows.zip(h.each()) {
                    let (gate, up) = gate_up[row * 2 * f..][..2 * f].split_at(f);
                    swiglu_row(h, gate, up);
                }
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "activation_swiglu_forward", gate_up, n * f, &args![h.view_mut(), gate_up, n, f]),
        Device::Dry(_) => {}
    }
    h
}

#[inline(always)]
fn swiglu_row<T: Element>(h: &mut [T], gate: &[T], up: &[T]) {
    for ((h, gate), up) in h.iter_mut().zip(gate).zip(up) {
        let (gate, up) = (gate.to_f32(), up.to_f32());
        *h = T::from_f32((gate * sigmoid(gate).0) * up);
    }
}

/// dh [n, f] -> dgate_up [n, 2 f]
pub fn swiglu_backward(dh: View<'_>, gate_up: View<'_>) -> Tensor {
    let (n, f) = halves(gate_up);
    assert_eq!((dh.shape().rows(), dh.shape().columns()), (n, f), "the gradient of a swiglu of {}", gate_up.shape());
    assert_eq!(dh.dtype(), gate_up.dtype(), "a gradient is like its value");
    let mut dgate_up = gate_up.device().empty(gate_up.shape(), gate_up.dtype());
    match gate_up.device() {
        Device::Cpu(cpu) => dispatch!(gate_up.dtype(), T => {
            let (dh, gate_up) = (dh.slice::<T>(), gate_up.slice::<T>());
            over_rows(cpu, n, 2 * f * COST, Rows::new(dgate_up.view_mut().into_slice::<T>(), 2 * f), #[inline(always)] |rows, dgate_up| {
                for (row, dgate_up) in rows.zip(dgate_up.each()) {
                    let (gate, up) = gate_up[row * 2 * f..][..2 * f].split_at(f);
                    let (dgate, dup) = dgate_up.split_at_mut(f);
                    swiglu_backward_row(dgate, dup, &dh[row * f..][..f], gate, up);
                }
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "activation_swiglu_backward", gate_up, n * f, &args![dgate_up.view_mut(), dh, gate_up, n, f]),
        Device::Dry(_) => {}
    }
    dgate_up
}

#[inline(always)]
fn swiglu_backward_row<T: Element>(dgate: &mut [T], dup: &mut [T], dh: &[T], gate: &[T], up: &[T]) {
    for ((((dgate, dup), dh), gate), up) in dgate.iter_mut().zip(dup).zip(dh).zip(gate).zip(up) {
        let (dh, gate, up) = (dh.to_f32(), gate.to_f32(), up.to_f32());
        let (s, complement) = sigmoid(gate);
        *dgate = T::from_f32((dh * up) * (s * (1.0 + gate * complement)));
        *dup = T::from_f32(dh * (gate * s));
    }
}

/// x -> y of the same shape
pub fn gelu_forward(x: View<'_>) -> Tensor {
    let mut y = x.device().empty(x.shape(), x.dtype());
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let xs = x.slice::<T>();
            over_rows(cpu, xs.len(), COST, Rows::new(y.view_mut().into_slice::<T>(), 1), #[inline(always)] |range, y| {
                gelu_row(y.elements, &xs[range]);
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "activation_gelu_forward", x, x.shape().numel(), &args![y.view_mut(), x, x.shape().numel()]),
        Device::Dry(_) => {}
    }
    y
}

#[inline(always)]
fn gelu_row<T: Element>(y: &mut [T], x: &[T]) {
    for (y, x) in y.iter_mut().zip(x) {
        let x = x.to_f32();
        *y = T::from_f32(x * gelu_gate(x).0);
    }
}

/// dy, x -> dx
pub fn gelu_backward(dy: View<'_>, x: View<'_>) -> Tensor {
    assert_eq!((dy.shape(), dy.dtype()), (x.shape(), x.dtype()), "a gradient is like its value");
    let mut dx = x.device().empty(x.shape(), x.dtype());
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let (dys, xs) = (dy.slice::<T>(), x.slice::<T>());
            over_rows(cpu, xs.len(), COST, Rows::new(dx.view_mut().into_slice::<T>(), 1), #[inline(always)] |range, dx| {
                gelu_backward_row(dx.elements, &dys[range.clone()], &xs[range]);
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "activation_gelu_backward", x, x.shape().numel(), &args![dx.view_mut(), dy, x, x.shape().numel()]),
        Device::Dry(_) => {}
    }
    dx
}

#[inline(always)]
fn gelu_backward_row<T: Element>(dx: &mut [T], dy: &[T], x: &[T]) {
    for ((dx, dy), x) in dx.iter_mut().zip(dy).zip(x) {
        let (gate, slope) = gelu_gate(x.to_f32());
        *dx = T::from_f32(dy.to_f32() * (gate + slope));
    }
}

/// s(2 u) and x times its derivative.
#[inline(always)]
fn gelu_gate(x: f32) -> (f32, f32) {
    const TWICE_ROOT: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715;
    // At 10 the gate is within 1e-37 of its limit; cubes of larger numbers would overflow.
    let x = x.clamp(-10.0, 10.0);
    let square = x * x;
    let (s, complement) = sigmoid((TWICE_ROOT * x) * (1.0 + CUBIC * square));
    let slope = TWICE_ROOT * (1.0 + (3.0 * CUBIC) * square);
    (s, (x * slope) * (s * complement))
}

fn halves(gate_up: View<'_>) -> (usize, usize) {
    let columns = gate_up.shape().columns();
    assert!(columns.is_multiple_of(2), "gates and ups side by side in {columns} columns");
    (gate_up.shape().rows(), columns / 2)
}

/// Launches a kernel whose threads take a pack of x, 16 bytes, at a time.
fn launch(gpu: &Gpu, pass: &str, x: View<'_>, elements: usize, arguments: &[Argument]) {
    gpu.launch(&kernel(pass, x.dtype()), Grid::over(elements, 256 * 16 / x.dtype().bytes(), 256), arguments);
}
