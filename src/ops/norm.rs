//! Normalisation of rows: by their root mean square, and by mean and variance.
//!
//! ```text
//! rms     r = 1 / sqrt(mean(x^2) + eps)         y = w (x r)            dx = r (dh - h mean(dh h)),            h = x r
//! layer   m = mean(x), r from x - m             y = w ((x - m) r) + b  dx = r (dh - mean(dh) - h mean(dh h)), h = (x - m) r
//!         dh = dy w                             dw = sum over rows of dy h, by the chunk rule of reduce.rs; db = reduce::sum_rows
//! ```
//!
//! x, w, b, y, dy, dx have one dtype; r, m and dw are f32. Sums over a row are f32, in lanes (functions.rs).
//!
//! On a GPU (`cuda/norm.cu`) sums over a row have another order, which depends on c and the dtype alone.
//!
//! Invariant: a row's result depends on that row alone, and `*_again` gives the bits of `*_forward`.

use crate::args;
use crate::device::Device;
use crate::device::cpu::Isa;
use crate::device::gpu::driver::{Argument, Grid};
use crate::device::gpu::{Gpu, kernel};
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::ops::blocks::{Blocks, widened};
use crate::ops::chunks::GpuChunks;
use crate::ops::elementwise;
use crate::ops::functions::{sum, sums_of_three};
use crate::ops::reduce::{add_by_chunks, check_chunks};
use crate::ops::rows::{Rows, over_rows};

/// Where a kernel takes an address: nothing to add.
const NONE: usize = 0;

/// The most rows that the CPU takes together: first the statistics of all, then what is computed with them. A row's statistics end in a
/// few slow steps, during which the next row's sums are under way.
const GROUP: usize = 16;

/// How many rows of c elements a group has, so that it stays in the first-level cache where that is possible.
fn group(c: usize) -> usize {
    (4096 / c).clamp(1, GROUP)
}

/// x [n, c], w [c] -> y [n, c], r f32 [n]
pub fn rms_forward(x: View<'_>, w: View<'_>, eps: f32) -> (Tensor, Tensor) {
    let (n, c) = check_rows(x, w);
    let mut y = x.device().empty(x.shape(), x.dtype());
    let mut r = x.device().empty([n], Dtype::F32);
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let (x, w) = (x.slice::<T>(), w.slice::<T>());
            let out = (Rows::new(y.view_mut().into_slice::<T>(), c), Rows::new(r.view_mut().into_slice::<f32>(), 1));
            over_rows(cpu, n, c, out, #[inline(always)] |rows, (y, r)| {
                let (mut blocks, mut wide_w) = (Blocks::new(cpu.isa()), Vec::new());
                let (x, w) = (&x[rows.start * c..rows.end * c], widened(w, &mut wide_w));
                let (group, y, r) = (group(c), y.elements, r.elements);
                for ((x, y), r) in x.chunks(group * c).zip(y.chunks_mut(group * c)).zip(r.chunks_mut(group)) {
                    for (x, r) in x.chunks_exact(c).zip(r.iter_mut()) {
                        *r = 1.0 / (sum(x, #[inline(always)] |x| x * x) / c as f32 + eps).sqrt();
                    }
                    for ((x, y), r) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(r) {
                        rms_row(&mut blocks, y, x, w, *r);
                    }
                }
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "norm_rms_forward", x, &args![y.view_mut(), r.view_mut(), x, NONE, w, n, c, eps, team(x)]),
        Device::Dry(_) => {}
    }
    (y, r)
}

/// x += addend, then `rms_forward` of that, with the bits of the two; on a GPU in one pass.
pub fn rms_forward_add(mut x: ViewMut<'_>, addend: View<'_>, w: View<'_>, eps: f32) -> (Tensor, Tensor) {
    let (n, c) = check_rows(x.view(), w);
    check_like(addend, x.view());
    let Device::Gpu(gpu) = x.device() else {
        elementwise::add(x.again(), addend);
        return rms_forward(x.view(), w, eps);
    };
    let mut y = x.device().empty(x.shape(), x.dtype());
    let mut r = x.device().empty([n], Dtype::F32);
    let team = team(x.view());
    launch(gpu, "norm_rms_forward", x.view(), &args![y.view_mut(), r.view_mut(), &x, addend, w, n, c, eps, team]);
    (y, r)
}

/// y once more, from the r that `rms_forward` gave.
pub fn rms_again(x: View<'_>, w: View<'_>, r: View<'_>) -> Tensor {
    let (n, c) = check_rows(x, w);
    check_statistics(r, n, 1);
    let mut y = x.device().empty(x.shape(), x.dtype());
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let (x, w, r) = (x.slice::<T>(), w.slice::<T>(), r.slice::<f32>());
            over_rows(cpu, n, c, Rows::new(y.view_mut().into_slice::<T>(), c), #[inline(always)] |rows, y| {
                let (mut blocks, mut wide_w) = (Blocks::new(cpu.isa()), Vec::new());
                let w = widened(w, &mut wide_w);
                for (row, y) in rows.zip(y.each()) {
                    rms_row(&mut blocks, y, &x[row * c..][..c], w, r[row]);
                }
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "norm_rms_again", x, &args![y.view_mut(), x, w, r, n, c, team(x)]),
        Device::Dry(_) => {}
    }
    y
}

#[inline(always)]
fn rms_row<T: Element>(blocks: &mut Blocks, y: &mut [T], x: &[T], w: &[f32], r: f32) {
    blocks.fill(
        y,
        #[inline(always)]
        |range, y| {
            for ((y, x), w) in y.iter_mut().zip(&x[range.clone()]).zip(&w[range]) {
                *y = w * (x.to_f32() * r);
            }
        },
    );
}

/// dy [n, c] -> dx [n, c]
pub fn rms_backward(dy: View<'_>, x: View<'_>, w: View<'_>, r: View<'_>) -> Tensor {
    let (n, c) = check_rows(x, w);
    check_like(dy, x);
    check_statistics(r, n, 1);
    let mut dx = x.device().empty(x.shape(), x.dtype());
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let (dy, x, w, r) = (dy.slice::<T>(), x.slice::<T>(), w.slice::<T>(), r.slice::<f32>());
            over_rows(cpu, n, 2 * c, Rows::new(dx.view_mut().into_slice::<T>(), c), #[inline(always)] |rows, dx| {
                let part = rows.start * c..rows.end * c;
                backward_rows::<T, false>(cpu.isa(), dx.elements, &dy[part.clone()], &x[part], w, &r[rows]);
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "norm_rms_backward", x, &args![dx.view_mut(), dy, x, w, r, NONE, n, c, team(x)]),
        Device::Dry(_) => {}
    }
    dx
}

/// `rms_backward`, then += addend, with the bits of the two; on a GPU in one pass.
pub fn rms_backward_add(dy: View<'_>, x: View<'_>, w: View<'_>, r: View<'_>, addend: View<'_>) -> Tensor {
    let (n, c) = check_rows(x, w);
    check_like(addend, x);
    let Device::Gpu(gpu) = x.device() else {
        let mut dx = rms_backward(dy, x, w, r);
        elementwise::add(dx.view_mut(), addend);
        return dx;
    };
    check_like(dy, x);
    check_statistics(r, n, 1);
    let mut dx = x.device().empty(x.shape(), x.dtype());
    launch(gpu, "norm_rms_backward", x, &args![dx.view_mut(), dy, x, w, r, addend, n, c, team(x)]);
    dx
}

/// dx from dy, x and statistics of the same rows, for both norms: subtracting a mean and a flat part of zero changes no bit.
#[inline(always)]
fn backward_rows<T: Element, const LAYER: bool>(isa: Isa, dx: &mut [T], dy: &[T], x: &[T], w: &[T], stats: &[f32]) {
    let (c, each) = (w.len(), 1 + LAYER as usize);
    let (mut blocks, mut wide_w) = (Blocks::new(isa), Vec::new());
    let w = widened(w, &mut wide_w);
    let mean_and_r = |stats: &[f32]| if LAYER { [stats[0], stats[1]] } else { [0.0, stats[0]] };
    let (group, mut sums) = (group(c), [[0f32; 2]; GROUP]);
    let groups = dx.chunks_mut(group * c).zip(dy.chunks(group * c)).zip(x.chunks(group * c)).zip(stats.chunks(group * each));
    for (((dx, dy), x), stats) in groups {
        for (((dy, x), stats), sums) in dy.chunks_exact(c).zip(x.chunks_exact(c)).zip(stats.chunks_exact(each)).zip(&mut sums) {
            let [mean, r] = mean_and_r(stats);
            let (flat, along) = sums_of_three(
                dy,
                x,
                w,
                #[inline(always)]
                |dy, x, w| (if LAYER { dy * w } else { 0.0 }, (dy * w) * ((x - mean) * r)),
            );
            *sums = [flat / c as f32, along / c as f32];
        }
        let rows = dx.chunks_exact_mut(c).zip(dy.chunks_exact(c)).zip(x.chunks_exact(c)).zip(stats.chunks_exact(each)).zip(&sums);
        for ((((dx, dy), x), stats), sums) in rows {
            gradient_row(&mut blocks, dx, dy, x, w, mean_and_r(stats), *sums);
        }
    }
}

#[inline(always)]
fn gradient_row<T: Element>(blocks: &mut Blocks, dx: &mut [T], dy: &[T], x: &[T], w: &[f32], [mean, r]: [f32; 2], [flat, along]: [f32; 2]) {
    blocks.fill(
        dx,
        #[inline(always)]
        |range, dx| {
            let (dy, x, w) = (&dy[range.clone()], &x[range.clone()], &w[range]);
            for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
                let (dh, h) = (dy.to_f32() * w, (x.to_f32() - mean) * r);
                *dx = r * ((dh - flat) - h * along);
            }
        },
    );
}

/// dw f32 [chunks, c] += the sum over rows of dy (x r)
pub fn rms_backward_weight(dw: ViewMut<'_>, dy: View<'_>, x: View<'_>, r: View<'_>, t: usize) {
    let (n, c) = (x.shape().rows(), x.shape().columns());
    check_chunks(&dw, n, c, t);
    check_like(dy, x);
    check_statistics(r, n, 1);
    let sums = GpuChunks::new(&dw, x, t);
    match x.device() {
        Device::Cpu(_) => dispatch!(x.dtype(), T => {
            let (dy, x, r) = (dy.slice::<T>(), x.slice::<T>(), r.slice::<f32>());
            add_by_chunks(dw, n, t, #[inline(always)] |row, columns, sums| {
                let (dy, x, r) = (&dy[row * c..][columns.clone()], &x[row * c..][columns], r[row]);
                add_weight_row(sums, dy, x, 0.0, r);
            });
        }),
        Device::Gpu(gpu) => sums.add(gpu, dw, "norm_rms_backward_weight", &args![dy, x, r]),
        Device::Dry(_) => {}
    }
}

/// x [n, c], w [c], b [c] -> y [n, c], stats f32 [n, 2]: mean and r
pub fn layer_forward(x: View<'_>, w: View<'_>, b: View<'_>, eps: f32) -> (Tensor, Tensor) {
    let (n, c) = check_rows(x, w);
    check_rows(x, b);
    let mut y = x.device().empty(x.shape(), x.dtype());
    let mut stats = x.device().empty([n, 2], Dtype::F32);
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let (x, w, b) = (x.slice::<T>(), w.slice::<T>(), b.slice::<T>());
            let out = (Rows::new(y.view_mut().into_slice::<T>(), c), Rows::new(stats.view_mut().into_slice::<f32>(), 2));
            over_rows(cpu, n, 2 * c, out, #[inline(always)] |rows, (y, stats)| {
                let (mut blocks, mut wide_w, mut wide_b) = (Blocks::new(cpu.isa()), Vec::new(), Vec::new());
                let (w, b) = (widened(w, &mut wide_w), widened(b, &mut wide_b));
                let (group, x, y) = (group(c), &x[rows.start * c..rows.end * c], y.elements);
                for ((x, y), stats) in x.chunks(group * c).zip(y.chunks_mut(group * c)).zip(stats.elements.chunks_mut(2 * group)) {
                    let stats = stats.as_chunks_mut::<2>().0;
                    for (x, [mean, _]) in x.chunks_exact(c).zip(stats.iter_mut()) {
                        *mean = sum(x, #[inline(always)] |x| x) / c as f32;
                    }
                    for (x, [mean, r]) in x.chunks_exact(c).zip(stats.iter_mut()) {
                        let variance = sum(x, #[inline(always)] |x| (x - *mean) * (x - *mean)) / c as f32;
                        *r = 1.0 / (variance + eps).sqrt();
                    }
                    for ((x, y), stats) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(stats) {
                        layer_row(&mut blocks, y, x, [w, b], stats);
                    }
                }
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "norm_layer_forward", x, &args![y.view_mut(), stats.view_mut(), x, NONE, w, b, n, c, eps, team(x)]),
        Device::Dry(_) => {}
    }
    (y, stats)
}

/// x += addend, then `layer_forward` of that, with the bits of the two; on a GPU in one pass.
pub fn layer_forward_add(mut x: ViewMut<'_>, addend: View<'_>, w: View<'_>, b: View<'_>, eps: f32) -> (Tensor, Tensor) {
    let (n, c) = check_rows(x.view(), w);
    check_rows(x.view(), b);
    check_like(addend, x.view());
    let Device::Gpu(gpu) = x.device() else {
        elementwise::add(x.again(), addend);
        return layer_forward(x.view(), w, b, eps);
    };
    let mut y = x.device().empty(x.shape(), x.dtype());
    let mut stats = x.device().empty([n, 2], Dtype::F32);
    let team = team(x.view());
    launch(gpu, "norm_layer_forward", x.view(), &args![y.view_mut(), stats.view_mut(), &x, addend, w, b, n, c, eps, team]);
    (y, stats)
}

/// y once more, from the statistics that `layer_forward` gave.
pub fn layer_again(x: View<'_>, w: View<'_>, b: View<'_>, stats: View<'_>) -> Tensor {
    let (n, c) = check_rows(x, w);
    check_rows(x, b);
    check_statistics(stats, n, 2);
    let mut y = x.device().empty(x.shape(), x.dtype());
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let (x, w, b, stats) = (x.slice::<T>(), w.slice::<T>(), b.slice::<T>(), stats.slice::<f32>());
            over_rows(cpu, n, c, Rows::new(y.view_mut().into_slice::<T>(), c), #[inline(always)] |rows, y| {
                let (mut blocks, mut wide_w, mut wide_b) = (Blocks::new(cpu.isa()), Vec::new(), Vec::new());
                let (w, b) = (widened(w, &mut wide_w), widened(b, &mut wide_b));
                for (row, y) in rows.zip(y.each()) {
                    layer_row(&mut blocks, y, &x[row * c..][..c], [w, b], &stats[2 * row..][..2]);
                }
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "norm_layer_again", x, &args![y.view_mut(), x, w, b, stats, n, c, team(x)]),
        Device::Dry(_) => {}
    }
    y
}

#[inline(always)]
fn layer_row<T: Element>(blocks: &mut Blocks, y: &mut [T], x: &[T], [w, b]: [&[f32]; 2], stats: &[f32]) {
    let (mean, r) = (stats[0], stats[1]);
    blocks.fill(
        y,
        #[inline(always)]
        |range, y| {
            let (x, w, b) = (&x[range.clone()], &w[range.clone()], &b[range]);
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
                *y = ((x.to_f32() - mean) * r) * w + b;
            }
        },
    );
}

/// dy [n, c] -> dx [n, c]
pub fn layer_backward(dy: View<'_>, x: View<'_>, w: View<'_>, stats: View<'_>) -> Tensor {
    let (n, c) = check_rows(x, w);
    check_like(dy, x);
    check_statistics(stats, n, 2);
    let mut dx = x.device().empty(x.shape(), x.dtype());
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let (dy, x, w, stats) = (dy.slice::<T>(), x.slice::<T>(), w.slice::<T>(), stats.slice::<f32>());
            over_rows(cpu, n, 2 * c, Rows::new(dx.view_mut().into_slice::<T>(), c), #[inline(always)] |rows, dx| {
                let part = rows.start * c..rows.end * c;
                let stats = &stats[2 * rows.start..2 * rows.end];
                backward_rows::<T, true>(cpu.isa(), dx.elements, &dy[part.clone()], &x[part], w, stats);
            });
        }),
        Device::Gpu(gpu) => launch(gpu, "norm_layer_backward", x, &args![dx.view_mut(), dy, x, w, stats, NONE, n, c, team(x)]),
        Device::Dry(_) => {}
    }
    dx
}

/// `layer_backward`, then += addend, with the bits of the two; on a GPU in one pass.
pub fn layer_backward_add(dy: View<'_>, x: View<'_>, w: View<'_>, stats: View<'_>, addend: View<'_>) -> Tensor {
    let (n, c) = check_rows(x, w);
    check_like(addend, x);
    let Device::Gpu(gpu) = x.device() else {
        let mut dx = layer_backward(dy, x, w, stats);
        elementwise::add(dx.view_mut(), addend);
        return dx;
    };
    check_like(dy, x);
    check_statistics(stats, n, 2);
    let mut dx = x.device().empty(x.shape(), x.dtype());
    launch(gpu, "norm_layer_backward", x, &args![dx.view_mut(), dy, x, w, stats, addend, n, c, team(x)]);
    dx
}

/// dw f32 [chunks, c] += the sum over rows of dy ((x - mean) r). The bias's gradient is `reduce::sum_rows`.
pub fn layer_backward_weight(dw: ViewMut<'_>, dy: View<'_>, x: View<'_>, stats: View<'_>, t: usize) {
    let (n, c) = (x.shape().rows(), x.shape().columns());
    check_chunks(&dw, n, c, t);
    check_like(dy, x);
    check_statistics(stats, n, 2);
    let sums = GpuChunks::new(&dw, x, t);
    match x.device() {
        Device::Cpu(_) => dispatch!(x.dtype(), T => {
            let (dy, x, stats) = (dy.slice::<T>(), x.slice::<T>(), stats.slice::<f32>());
            add_by_chunks(dw, n, t, #[inline(always)] |row, columns, sums| {
                let (dy, x) = (&dy[row * c..][columns.clone()], &x[row * c..][columns]);
                let (mean, r) = (stats[2 * row], stats[2 * row + 1]);
                add_weight_row(sums, dy, x, mean, r);
            });
        }),
        Device::Gpu(gpu) => sums.add(gpu, dw, "norm_layer_backward_weight", &args![dy, x, stats]),
        Device::Dry(_) => {}
    }
}

/// For both norms: subtracting a mean of zero changes no bit.
#[inline(always)]
fn add_weight_row<T: Element>(sums: &mut [f32], dy: &[T], x: &[T], mean: f32, r: f32) {
    for ((sum, dy), x) in sums.iter_mut().zip(dy).zip(x) {
        *sum += dy.to_f32() * ((x.to_f32() - mean) * r);
    }
}

fn check_rows(x: View<'_>, w: View<'_>) -> (usize, usize) {
    let (n, c) = (x.shape().rows(), x.shape().columns());
    assert_eq!(w.shape().dims(), [c], "the weight of a norm over rows {}", x.shape());
    assert_eq!(x.dtype(), w.dtype(), "rows and weight of a norm");
    (n, c)
}

fn check_like(dy: View<'_>, x: View<'_>) {
    assert_eq!((dy.shape(), dy.dtype()), (x.shape(), x.dtype()), "what goes with rows is like them");
}

fn check_statistics(stats: View<'_>, n: usize, each: usize) {
    assert_eq!((stats.shape().numel(), stats.dtype()), (n * each, Dtype::F32), "{each} statistics for each of {n} rows");
}

/// How many threads of a GPU work on one row of x: a power of two, 32 to 1024, so that each has at most four packs of 16 bytes.
fn team(x: View<'_>) -> u32 {
    let packs = x.shape().columns().div_ceil(16 / x.dtype().bytes());
    packs.div_ceil(4).next_power_of_two().clamp(32, 1024) as u32
}

/// Launches a kernel that gives each row of x a team. Teams of one warp share a block.
fn launch(gpu: &Gpu, pass: &str, x: View<'_>, arguments: &[Argument]) {
    let rows_of_block = if team(x) == 32 { 8 } else { 1 };
    let blocks = x.shape().rows().div_ceil(rows_of_block);
    gpu.launch(&kernel(pass, x.dtype()), Grid::blocks(blocks, team(x) * rows_of_block as u32), arguments);
}
