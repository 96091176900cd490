//! Linear maps: y[n, o] = x[n, i] w[o, i]^T, and the gradients of x and w.
//!
//! Sums are in f32. Along K, products are added in one fused chain in order (`device/cpu/micro.rs`); where tensor parallelism may cut K,
//! the parts' sums are rounded to the output's dtype and added in a balanced tree, adjacent parts first.
//!
//! Invariant: the bits of an element depend on its row, its column and `shard` (or `rows_per_sequence`), never on how many rows, columns
//! or sequences a call has, and a part computed alone is exactly a leaf of the tree.

use crate::device::Device;
use crate::device::cpu::Cpu;
use crate::device::cpu::gemm;
use crate::device::cpu::pack::{Along, Operand};
use crate::device::gpu::driver::{self, Gemm, Order};
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::ops::elementwise;
use std::ops::Range;

/// Rows of one chain of a weight gradient: a longer sequence adds one such block after the other.
pub const CHAIN_ROWS: usize = 1024;

/// The `shard` of a sum that is not cut.
pub const WHOLE: usize = usize::MAX;

/// x[n, i], w[o, i] -> y[n, o] in x's dtype. K = i is cut at multiples of `shard`.
pub fn forward(x: View<'_>, w: View<'_>, shard: usize) -> Tensor {
    check_forward(x, w, shard);
    part_sum(x, w, None, 0..x.shape().columns().div_ceil(shard), shard)
}

/// As `forward`, with bias[o] added in f32: before the only rounding where K is not cut, after the tree where it is.
pub fn forward_bias(x: View<'_>, w: View<'_>, bias: View<'_>, shard: usize) -> Tensor {
    check_forward(x, w, shard);
    assert_eq!((bias.shape().numel(), bias.dtype()), (w.shape().rows(), x.dtype()), "a bias for each output, in x's dtype");
    let parts = x.shape().columns().div_ceil(shard);
    if parts == 1 {
        return part_sum(x, w, Some(bias), 0..1, shard);
    }
    let mut y = part_sum(x, w, None, 0..parts, shard);
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => add_bias::<T>(cpu, &mut y, bias)),
        Device::Gpu(_) => elementwise::add_row(y.view_mut(), bias),
        Device::Dry(_) => {}
    }
    y
}

/// dy[n, o], w[o, i] -> dx[n, i] in dy's dtype: dy w.
pub fn backward_input(dy: View<'_>, w: View<'_>) -> Tensor {
    let ([n, o], [rows, i]) = (matrix(dy), matrix(w));
    assert_eq!(o, rows, "dy {} and w {} share the outputs", dy.shape(), w.shape());
    assert_eq!(dy.dtype(), w.dtype(), "dy and w of one dtype");
    let mut dx = dy.device().empty([n, i], dy.dtype());
    let waiting = waiting_room(dy, [n, i], o);
    match dy.device() {
        Device::Cpu(cpu) => dispatch!(dy.dtype(), T => {
            let a = Operand { data: dy.slice::<T>(), stride: o, along: Along::K };
            let b = Operand { data: w.slice::<T>(), stride: i, along: Along::X };
            run::<T>(cpu, a, b, [n, i, o], None, waiting, &mut dx);
        }),
        Device::Gpu(gpu) => gpu.gemm(&Gemm {
            dtype: dy.dtype(),
            m: n,
            n: i,
            k: o,
            a: operand(dy, o, Order::SummedInner),
            b: operand(w, i, Order::SummedOuter),
            out: dx.view().address(),
            accumulate: false,
            bias: None,
        }),
        Device::Dry(_) => {}
    }
    dx
}

/// f32 that gradients are added to.
pub struct Sum<'a> {
    pub view: ViewMut<'a>,
    /// Nothing was added yet: what stands there counts as zero, and need not be read.
    pub fresh: bool,
}

impl<'a> From<ViewMut<'a>> for Sum<'a> {
    fn from(view: ViewMut<'a>) -> Sum<'a> {
        Sum { view, fresh: false }
    }
}

/// dw[o, i] (f32) += dy[n, o]^T x[n, i]: the product of each sequence of `rows_per_sequence` rows, one after the other. The sum of a
/// sequence is a chain over its rows, cut into blocks of `CHAIN_ROWS` rows that are added in order.
pub fn backward_weight<'a>(dw: impl Into<Sum<'a>>, dy: View<'_>, x: View<'_>, rows_per_sequence: usize) {
    let Sum { view: mut dw, fresh } = dw.into();
    let ([n, o], [rows, i]) = (matrix(dy), matrix(x));
    assert_eq!(n, rows, "dy {} and x {} share the rows", dy.shape(), x.shape());
    assert_eq!(dy.dtype(), x.dtype(), "dy and x of one dtype");
    assert_eq!((dw.shape().numel(), dw.dtype()), (o * i, Dtype::F32), "dw {} for dy {} and x {}", dw.shape(), dy.shape(), x.shape());
    assert!(rows_per_sequence > 0 && n.is_multiple_of(rows_per_sequence), "{n} rows in sequences of {rows_per_sequence}");
    match dy.device() {
        Device::Cpu(cpu) => dispatch!(dy.dtype(), T => {
            let a = Operand { data: dy.slice::<T>(), stride: o, along: Along::X };
            let b = Operand { data: x.slice::<T>(), stride: i, along: Along::X };
            gemm::accumulate(cpu, a, b, [o, i, n], &chains(n, rows_per_sequence), dw.into_slice(), fresh);
        }),
        Device::Gpu(gpu) => {
            if fresh {
                dw.again().fill_zero();
            }
            for rows in chains(n, rows_per_sequence) {
                gpu.gemm(&Gemm {
                    dtype: dy.dtype(),
                    m: o,
                    n: i,
                    k: rows.len(),
                    a: operand(dy.rows(rows.clone()), o, Order::SummedOuter),
                    b: operand(x.rows(rows), i, Order::SummedOuter),
                    out: dw.address(),
                    accumulate: true,
                    bias: None,
                });
            }
        }
        Device::Dry(_) => {}
    }
}

/// The rows of each chain of a weight gradient.
fn chains(rows: usize, rows_per_sequence: usize) -> Vec<Range<usize>> {
    let starts = (0..rows).step_by(rows_per_sequence);
    starts
        .flat_map(|start| {
            let end = start + rows_per_sequence;
            (start..end).step_by(CHAIN_ROWS).map(move |first| first..end.min(first + CHAIN_ROWS))
        })
        .collect()
}

fn matrix(x: View<'_>) -> [usize; 2] {
    [x.shape().rows(), x.shape().columns()]
}

fn check_forward(x: View<'_>, w: View<'_>, shard: usize) {
    assert_eq!(x.shape().columns(), w.shape().columns(), "x {} and w {} share the inputs", x.shape(), w.shape());
    assert_eq!(x.dtype(), w.dtype(), "x and w of one dtype");
    assert!(shard > 0, "K is cut into parts of at least one element");
}

/// The tree over `parts`: the left child is the largest power of two of leaves, so that adjacent pairs are added first and an odd one
/// passes up.
fn part_sum(x: View<'_>, w: View<'_>, bias: Option<View<'_>>, parts: Range<usize>, shard: usize) -> Tensor {
    if parts.len() == 1 {
        return leaf(x, w, bias, parts.start * shard..x.shape().columns().min(parts.end * shard));
    }
    let left = parts.len().next_power_of_two() / 2;
    let mut sum = part_sum(x, w, bias, parts.start..parts.start + left, shard);
    let right = part_sum(x, w, bias, parts.start + left..parts.end, shard);
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => add_rounded::<T>(cpu, &mut sum, &right)),
        Device::Gpu(_) => elementwise::add(sum.view_mut(), right.view()),
        Device::Dry(_) => {}
    }
    sum
}

/// The product over the columns `ks` of x and w.
fn leaf(x: View<'_>, w: View<'_>, bias: Option<View<'_>>, ks: Range<usize>) -> Tensor {
    let ([n, i], [o, _]) = (matrix(x), matrix(w));
    let mut y = x.device().empty([n, o], x.dtype());
    let waiting = waiting_room(x, [n, o], ks.len());
    match x.device() {
        Device::Cpu(cpu) if n > 0 => dispatch!(x.dtype(), T => {
            let a = Operand { data: &x.slice::<T>()[ks.start..], stride: i, along: Along::K };
            let b = Operand { data: &w.slice::<T>()[ks.start..], stride: i, along: Along::K };
            run::<T>(cpu, a, b, [n, o, ks.len()], bias, waiting, &mut y);
        }),
        Device::Gpu(gpu) => gpu.gemm(&Gemm {
            dtype: x.dtype(),
            m: n,
            n: o,
            k: ks.len(),
            a: from_column(operand(x, i, Order::SummedInner), x.dtype(), ks.start),
            b: from_column(operand(w, i, Order::SummedInner), x.dtype(), ks.start),
            out: y.view().address(),
            accumulate: false,
            bias: bias.map(|bias| bias.address()),
        }),
        Device::Cpu(_) | Device::Dry(_) => {}
    }
    y
}

/// Where the CPU keeps f32 sums of a product whose K it does in several rounds. A GPU keeps them in registers.
fn waiting_room(x: View<'_>, sizes: [usize; 2], k: usize) -> Option<Tensor> {
    let device = x.device();
    (!device.is_gpu() && gemm::needs_waiting(x.dtype(), k)).then(|| device.empty(sizes, Dtype::F32))
}

fn operand(x: View<'_>, stride: usize, order: Order) -> driver::Operand {
    driver::Operand { address: x.address(), stride, order }
}

fn from_column(operand: driver::Operand, dtype: Dtype, column: usize) -> driver::Operand {
    driver::Operand { address: operand.address + (column * dtype.bytes()) as u64, ..operand }
}

fn run<T: Element>(
    cpu: &Cpu,
    a: Operand<'_, T>,
    b: Operand<'_, T>,
    sizes: [usize; 3],
    bias: Option<View<'_>>,
    mut waiting: Option<Tensor>,
    out: &mut Tensor,
) {
    let waiting = waiting.as_mut().map(|waiting| waiting.view_mut().into_slice());
    gemm::product(cpu, a, b, sizes, bias.map(|bias| bias.slice()), waiting, out.view_mut().into_slice());
}

/// Elements that a thread adds at least, so that starting it pays.
const GRAIN: usize = 1 << 14;

fn add_rounded<T: Element>(cpu: &Cpu, sum: &mut Tensor, other: &Tensor) {
    let other = other.view().slice::<T>();
    cpu.for_rows(sum.view_mut().into_slice::<T>(), 1, GRAIN, |start, sums| {
        for (sum, other) in sums.iter_mut().zip(&other[start..]) {
            *sum = T::from_f32(sum.to_f32() + other.to_f32());
        }
    });
}

fn add_bias<T: Element>(cpu: &Cpu, y: &mut Tensor, bias: View<'_>) {
    let bias = bias.slice::<T>();
    cpu.for_rows(y.view_mut().into_slice::<T>(), bias.len(), GRAIN.div_ceil(bias.len()), |_, rows| {
        for row in rows.chunks_exact_mut(bias.len()) {
            for (y, bias) in row.iter_mut().zip(bias) {
                *y = T::from_f32(y.to_f32() + bias.to_f32());
            }
        }
    });
}
