//! Sums, scalings and conversions of element by element.
//!
//! On a GPU (`cuda/elementwise.cu`) the same roundings give the same bits.
//!
//! Invariant: each result is one f32 operation, rounded once to the dtype it rests in.

use crate::args;
use crate::device::Device;
use crate::device::gpu::driver::Grid;
use crate::device::gpu::kernel;
use crate::device::tensor::{View, ViewMut};
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::ops::rows::{Rows, over_rows};

/// y += x, of one shape and dtype.
pub fn add(y: ViewMut<'_>, x: View<'_>) {
    assert_eq!(y.dtype(), x.dtype(), "the terms of a sum");
    check_counts(&y, x);
    match x.device() {
        Device::Cpu(_) => dispatch!(x.dtype(), T => update::<T, T>(y, x, |y, x| y + x)),
        Device::Gpu(_) => launch(&kernel("elementwise_add", x.dtype()), &y, x),
        Device::Dry(_) => {}
    }
}

/// dst += src, in f32, whatever the dtype of `src`.
pub fn accumulate(dst: ViewMut<'_>, src: View<'_>) {
    assert_eq!(dst.dtype(), Dtype::F32, "gradients rest in f32");
    check_counts(&dst, src);
    match src.device() {
        Device::Cpu(_) => dispatch!(src.dtype(), T => update::<f32, T>(dst, src, |y, x| y + x)),
        Device::Gpu(_) => launch(&kernel("elementwise_accumulate", src.dtype()), &dst, src),
        Device::Dry(_) => {}
    }
}

/// dst = src, rounded where `dst` is narrower.
pub fn cast(dst: ViewMut<'_>, src: View<'_>) {
    check_counts(&dst, src);
    match src.device() {
        Device::Cpu(_) => dispatch!(dst.dtype(), D => dispatch!(src.dtype(), S => update::<D, S>(dst, src, |_, x| x))),
        Device::Gpu(_) => launch(&kernel(&kernel("elementwise_cast", dst.dtype()), src.dtype()), &dst, src),
        Device::Dry(_) => {}
    }
}

/// x *= factor
pub fn scale(mut x: ViewMut<'_>, factor: f32) {
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let x = x.slice_mut::<T>();
            over_rows(cpu, x.len(), 1, Rows::new(x, 1), #[inline(always)] |_, x| {
                scale_part(x.elements, factor);
            });
        }),
        Device::Gpu(gpu) => {
            let count = x.shape().numel();
            gpu.launch(&kernel("elementwise_scale", x.dtype()), grid(count), &args![&x, factor, count]);
        }
        Device::Dry(_) => {}
    }
}

#[inline(always)]
fn scale_part<T: Element>(x: &mut [T], factor: f32) {
    for x in x {
        *x = T::from_f32(x.to_f32() * factor);
    }
}

/// y += bias in every row. y [n, c], bias [c]
pub fn add_row(mut y: ViewMut<'_>, bias: View<'_>) {
    let (n, c) = (y.shape().rows(), y.shape().columns());
    assert_eq!((bias.shape().dims(), bias.dtype()), (&[c][..], y.dtype()), "the bias of rows {}", y.shape());
    match bias.device() {
        Device::Cpu(cpu) => dispatch!(bias.dtype(), T => {
            let bias = bias.slice::<T>();
            over_rows(cpu, n, c, Rows::new(y.slice_mut::<T>(), c), #[inline(always)] |_, y| {
                for y in y.each() {
                    add_to_row(y, bias);
                }
            });
        }),
        Device::Gpu(gpu) => gpu.launch(&kernel("elementwise_add_row", bias.dtype()), grid(n * c), &args![&y, bias, n, c]),
        Device::Dry(_) => {}
    }
}

#[inline(always)]
pub(super) fn add_to_row<T: Element>(y: &mut [T], x: &[T]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = T::from_f32(y.to_f32() + x.to_f32());
    }
}

#[inline(always)]
pub(super) fn accumulate_row<T: Element>(sums: &mut [f32], x: &[T]) {
    for (sum, x) in sums.iter_mut().zip(x) {
        *sum += x.to_f32();
    }
}

fn update<Y: Element, X: Element>(mut y: ViewMut<'_>, x: View<'_>, new: impl Fn(f32, f32) -> f32 + Sync) {
    let Device::Cpu(cpu) = x.device() else { return };
    let xs = x.slice::<X>();
    over_rows(
        cpu,
        xs.len(),
        1,
        Rows::new(y.slice_mut::<Y>(), 1),
        #[inline(always)]
        |range, y| {
            for (y, x) in y.elements.iter_mut().zip(&xs[range]) {
                *y = Y::from_f32(new(y.to_f32(), x.to_f32()));
            }
        },
    );
}

/// The kernels that read x and write as many elements of y.
fn launch(kernel: &str, y: &ViewMut<'_>, x: View<'_>) {
    let Device::Gpu(gpu) = x.device() else { return };
    let count = x.shape().numel();
    gpu.launch(kernel, grid(count), &args![y, x, count]);
}

/// A thread's turn is 16 bytes or less: up to eight elements.
fn grid(elements: usize) -> Grid {
    Grid::over(elements, 256 * 8, 256)
}

fn check_counts(y: &ViewMut<'_>, x: View<'_>) {
    assert_eq!(y.shape().numel(), x.shape().numel(), "element by element: {} and {}", y.shape(), x.shape());
}
