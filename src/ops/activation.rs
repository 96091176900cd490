//! The non-linearities of the MLP.
//!
//! ```text
//! swiglu  h = (gate s(gate)) up, s the logistic function      dgate = dh up s (1 + gate (1 - s)), dup = dh gate s
//! gelu    y = x s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)   dx = dy s (1 + x (1 - s) 2 u')
//! ```
//!
//! The tanh form of gelu, x (1 + tanh u) / 2, is x s(2 u): the same function without a difference that cancels. All in f32, rounded once.
//! On a GPU (`cuda/activation.cu`) the same roundings give the same bits.
//!
//! On the CPU a block of elements goes through three loops: the exponents, the exponentials, and what is made of these.
//!
//! Invariant: element by element, so bits depend on nothing but the element.

use crate::args;
use crate::device::Device;
use crate::device::cpu::vector::{exp_within, exp2_within};
use crate::device::gpu::driver::{Argument, Grid};
use crate::device::gpu::{Gpu, kernel};
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dispatch;
use crate::dtype::Element;
use crate::ops::blocks::Blocks;
use crate::ops::functions::sigmoid;
use crate::ops::rows::{Rows, over_rows};
use std::f32::consts::LOG2_E;

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
                let mut blocks = Blocks::new(cpu.isa());
                for (row, h) in rows.zip(h.each()) {
                    let (gate, up) = gate_up[row * 2 * f..][..2 * f].split_at(f);
                    swiglu_row(&mut blocks, h, gate, up);
                }
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "activation_swiglu_forward", gate_up, n * f, &args![h.view_mut(), gate_up, n, f]),
        Device::Dry(_) => {}
    }
    h
}

#[inline(always)]
fn swiglu_row<T: Element>(blocks: &mut Blocks, h: &mut [T], gate: &[T], up: &[T]) {
    blocks.fill(
        h,
        #[inline(always)]
        |range, h| {
            let (gate, up) = (&gate[range.clone()], &up[range]);
            gate_decays(h, gate);
            for ((h, gate), up) in h.iter_mut().zip(gate).zip(up) {
                *h = (gate.to_f32() * sigmoid(*h).0) * up.to_f32();
            }
        },
    );
}

/// e^-gate of each gate.
#[inline(always)]
fn gate_decays<T: Element>(decays: &mut [f32], gate: &[T]) {
    for (decay, gate) in decays.iter_mut().zip(gate) {
        // Beyond +-87 the smaller of s and 1 - s is next to the least normal number; stopping there keeps 0 * infinity away.
        *decay = -gate.to_f32().clamp(-87.0, 87.0);
    }
    for decay in decays {
        *decay = exp_within(*decay);
    }
}

/// dh [n, f]; gate_up [n, 2 f] becomes its own gradient.
pub fn swiglu_backward(dh: View<'_>, mut gate_up: ViewMut<'_>) {
    let (n, f) = halves(gate_up.view());
    assert_eq!((dh.shape().rows(), dh.shape().columns()), (n, f), "the gradient of a swiglu of {}", gate_up.shape());
    assert_eq!(dh.dtype(), gate_up.dtype(), "a gradient is like its value");
    match dh.device() {
        Device::Cpu(cpu) => dispatch!(dh.dtype(), T => {
            let (dh, gate_up) = (dh.slice::<T>(), gate_up.slice_mut::<T>());
            over_rows(cpu, n, 2 * f * COST, Rows::new(gate_up, 2 * f), #[inline(always)] |rows, gate_up| {
                let mut blocks = Blocks::new(cpu.isa());
                for (row, gate_up) in rows.zip(gate_up.each()) {
                    let (gate, up) = gate_up.split_at_mut(f);
                    swiglu_backward_row(&mut blocks, &dh[row * f..][..f], gate, up);
                }
            });
        }),
        Device::Gpu(gpu) => {
            let arguments = args![gate_up.again(), dh, gate_up.view(), n, f];
            launch(gpu, "activation_swiglu_backward", dh, n * f, &arguments);
        }
        Device::Dry(_) => {}
    }
}

#[inline(always)]
fn swiglu_backward_row<T: Element>(blocks: &mut Blocks, dh: &[T], gate: &mut [T], up: &mut [T]) {
    blocks.change_two(
        gate,
        up,
        #[inline(always)]
        |range, [dgate, dup], [gate, up]| {
            gate_decays(dgate, gate);
            for ((((dgate, dup), dh), gate), up) in dgate.iter_mut().zip(dup).zip(&dh[range]).zip(gate).zip(up) {
                let (dh, gate, up) = (dh.to_f32(), gate.to_f32(), up.to_f32());
                let (s, complement) = sigmoid(*dgate);
                *dgate = (dh * up) * (s * gate.mul_add(complement, 1.0));
                *dup = dh * (gate * s);
            }
        },
    );
}

/// x -> y of the same shape
pub fn gelu_forward(x: View<'_>) -> Tensor {
    let mut y = x.device().empty(x.shape(), x.dtype());
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let xs = x.slice::<T>();
            over_rows(cpu, xs.len(), COST, Rows::new(y.view_mut().into_slice::<T>(), 1), #[inline(always)] |range, y| {
                gelu_row(&mut Blocks::new(cpu.isa()), y.elements, &xs[range]);
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "activation_gelu_forward", x, x.shape().numel(), &args![y.view_mut(), x, x.shape().numel()]),
        Device::Dry(_) => {}
    }
    y
}

#[inline(always)]
fn gelu_row<T: Element>(blocks: &mut Blocks, y: &mut [T], x: &[T]) {
    blocks.fill(
        y,
        #[inline(always)]
        |range, y| {
            let x = &x[range];
            gelu_decays(y, x);
            for (y, x) in y.iter_mut().zip(x) {
                *y = x.to_f32() * sigmoid(*y).0;
            }
        },
    );
}

/// dy, of x's shape; x becomes its own gradient.
pub fn gelu_backward(dy: View<'_>, mut x: ViewMut<'_>) {
    assert_eq!((dy.shape(), dy.dtype()), (x.shape(), x.dtype()), "a gradient is like its value");
    let numel = x.shape().numel();
    match dy.device() {
        Device::Cpu(cpu) => dispatch!(dy.dtype(), T => {
            let (dys, xs) = (dy.slice::<T>(), x.slice_mut::<T>());
            over_rows(cpu, numel, COST, Rows::new(xs, 1), #[inline(always)] |range, xs| {
                gelu_backward_row(&mut Blocks::new(cpu.isa()), &dys[range], xs.elements);
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "activation_gelu_backward", dy, numel, &args![x.again(), dy, x.view(), numel]),
        Device::Dry(_) => {}
    }
}

#[inline(always)]
fn gelu_backward_row<T: Element>(blocks: &mut Blocks, dy: &[T], x: &mut [T]) {
    blocks.change(
        x,
        #[inline(always)]
        |range, dx, x| {
            gelu_decays(dx, x);
            for ((dx, dy), x) in dx.iter_mut().zip(&dy[range]).zip(x) {
                let (s, complement) = sigmoid(*dx);
                let x = x.to_f32().clamp(-FAR, FAR);
                let slope = x * (x * x).mul_add(3.0 * (CUBIC * TWICE_ROOT), TWICE_ROOT);
                *dx = dy.to_f32() * (s * slope.mul_add(complement, 1.0));
            }
        },
    );
}

/// 2 sqrt(2 / pi), the factor of x in 2 u, and of what the cube has more.
const TWICE_ROOT: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;
/// Here the gate is within 1e-37 of its limit, and its exponential still a normal number; cubes of larger numbers would overflow.
const FAR: f32 = 10.0;

/// e^-2u of each x, as 2^(-2u / ln 2).
#[inline(always)]
fn gelu_decays<T: Element>(decays: &mut [f32], x: &[T]) {
    const LINEAR: f32 = -TWICE_ROOT * LOG2_E;
    for (decay, x) in decays.iter_mut().zip(x) {
        let x = x.to_f32().clamp(-FAR, FAR);
        *decay = x * (x * x).mul_add(CUBIC * LINEAR, LINEAR);
    }
    for decay in decays {
        *decay = exp2_within(*decay);
    }
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
