//! Matmuls against their plain definition, bit for bit: every dtype, level of instructions, number of threads, odd shapes, cut of K.
//!
//! Invariant: a failing case names its dtype, instructions, threads and shape, and its numbers come from a fixed seed.

use ferrotron::device::Device;
use ferrotron::device::cpu::{Cpu, Isa};
use ferrotron::device::tensor::Tensor;
use ferrotron::dispatch;
use ferrotron::dtype::{Dtype, Element};
use ferrotron::ops::matmul::{self, Sum};
use ferrotron::rng::Stream;
use half::{bf16, f16};
use std::sync::Arc;

fn device(threads: usize, isa: Isa) -> Device {
    Device::Cpu(Arc::new(Cpu::with_isa(threads, isa)))
}

/// Every level of instructions of this machine, and several numbers of threads.
fn devices() -> Vec<(String, Device)> {
    let levels = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];
    let levels = levels.into_iter().filter(|&isa| isa <= Isa::detect());
    let mut all: Vec<_> = levels.map(|isa| (format!("{isa:?}"), device(2, isa))).collect();
    all.extend([1, 3, 4].map(|threads| (format!("{threads} threads"), Device::cpu(threads))));
    all
}

fn random<T: Element>(name: &str, count: usize, scale: f64) -> Vec<T> {
    let stream = Stream::new(7, name);
    (0..count as u64).map(|i| T::from_f32((stream.normal(i) * scale) as f32)).collect()
}

/// One fused chain; bf16 goes pair by pair, the odd element first, without denormals.
fn chain<T: Element>(pairs: impl Iterator<Item = (T, T)>) -> f32 {
    let values: Vec<(f32, f32)> = pairs.map(|(a, b)| (a.to_f32(), b.to_f32())).collect();
    if T::DTYPE != Dtype::Bf16 {
        return values.iter().fold(0.0, |sum, &(a, b)| a.mul_add(b, sum));
    }
    let flush = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
    let link = |sum: f32, (a, b): (f32, f32)| {
        let (a, b) = (flush(a), flush(b));
        let limit = 2f64.powi(-126) - 2f64.powi(-151);
        let sum_exact = a as f64 * b as f64 + sum as f64;
        let rounded = a.mul_add(b, sum);
        if sum_exact.abs() < limit { 0f32.copysign(rounded) } else { rounded }
    };
    values.chunks(2).fold(0.0, |sum, pair| link(link(sum, *pair.get(1).unwrap_or(&(0.0, 0.0))), pair[0]))
}

fn tree<T: Element>(mut leaves: Vec<T>) -> T {
    while leaves.len() > 1 {
        leaves = leaves.chunks(2).map(|pair| pair.get(1).map_or(pair[0], |other| T::from_f32(pair[0].to_f32() + other.to_f32()))).collect();
    }
    leaves[0]
}

fn plain_forward<T: Element>(x: &[T], w: &[T], bias: Option<&[T]>, [n, o, i]: [usize; 3], shard: usize) -> Vec<T> {
    let mut y = Vec::new();
    for (row, column) in (0..n * o).map(|index| (index / o, index % o)) {
        let part = |start: usize| {
            let ks = start..i.min(start + shard);
            chain(ks.map(|k| (x[row * i + k], w[column * i + k])))
        };
        let parts: Vec<f32> = (0..i).step_by(shard).map(part).collect();
        let added = bias.map_or(0.0, |bias| bias[column].to_f32());
        y.push(match (parts.len(), bias) {
            (1, Some(_)) => T::from_f32(parts[0] + added),
            (_, None) => tree(parts.into_iter().map(T::from_f32).collect()),
            (_, Some(_)) => T::from_f32(tree::<T>(parts.into_iter().map(T::from_f32).collect()).to_f32() + added),
        });
    }
    y
}

fn plain_backward_input<T: Element>(dy: &[T], w: &[T], [n, o, i]: [usize; 3]) -> Vec<T> {
    let element = |index: usize| T::from_f32(chain((0..o).map(|k| (dy[index / i * o + k], w[k * i + index % i]))));
    (0..n * i).map(element).collect()
}

fn plain_backward_weight<T: Element>(dw: &[f32], dy: &[T], x: &[T], [n, o, i]: [usize; 3], rows_per_sequence: usize) -> Vec<f32> {
    let mut dw = dw.to_vec();
    for (index, dw) in dw.iter_mut().enumerate() {
        for start in (0..n).step_by(rows_per_sequence) {
            for first in (start..start + rows_per_sequence).step_by(matmul::CHAIN_ROWS) {
                let last = (start + rows_per_sequence).min(first + matmul::CHAIN_ROWS);
                *dw += chain((first..last).map(|k| (dy[k * o + index / i], x[k * i + index % i])));
            }
        }
    }
    dw
}

fn bits<T: Element>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

fn assert_same<T: Element>(ours: &[T], plain: &[T], what: &str) {
    let different = ours.iter().zip(plain).position(|(a, b)| bits(&[*a]) != bits(&[*b]));
    if let Some(at) = different {
        panic!("{what}: element {at} is {:?}, by definition {:?}", ours[at], plain[at]);
    }
    assert_eq!(ours.len(), plain.len(), "{what}");
}

const SIZES: [[usize; 3]; 12] = [
    [1, 1, 1],
    [1, 48, 64],
    [3, 5, 7],
    [8, 48, 32],
    [2, 100, 1],
    [17, 50, 33],
    [7, 16, 96],
    [65, 97, 130],
    [130, 49, 300],
    [2, 3, 5001],
    [140, 33, 4500],
    [5, 2, 9000],
];

fn same_as_plain<T: Element>() {
    let devices = devices();
    for sizes @ [n, o, i] in SIZES {
        let (x, w) = (random::<T>("x", n * i, 1.0), random::<T>("w", o * i, 1.0));
        let (dy, bias) = (random::<T>("dy", n * o, 1.0), random::<T>("bias", o, 1.0));
        let shards = [i, i.div_ceil(2), i.div_ceil(3), i.div_ceil(7)];
        let forwards = shards.map(|shard| plain_forward(&x, &w, None, sizes, shard));
        let biased = shards.map(|shard| plain_forward(&x, &w, Some(&bias), sizes, shard));
        let dx = plain_backward_input(&dy, &w, sizes);
        let start = random::<f32>("dw", o * i, 1.0);
        let dw = plain_backward_weight(&start, &dy, &x, sizes, n);
        for (name, device) in &devices {
            let what = format!("{} {name} n {n} o {o} i {i}", T::DTYPE);
            let tensor = |shape: [usize; 2], values: &[T]| Tensor::from_slice(device, shape, values);
            let (x, w, dy) = (tensor([n, i], &x), tensor([o, i], &w), tensor([n, o], &dy));
            let bias = Tensor::from_slice(device, [o], &bias);
            for (index, &shard) in shards.iter().enumerate() {
                let what = format!("{what} shard {shard}");
                assert_same(&matmul::forward(x.view(), w.view(), shard).to_vec::<T>(), &forwards[index], &what);
                let y = matmul::forward_bias(x.view(), w.view(), bias.view(), shard);
                assert_same(&y.to_vec::<T>(), &biased[index], &format!("{what} with bias"));
            }
            assert_same(&matmul::backward_input(dy.view(), w.view()).to_vec::<T>(), &dx, &format!("{what} dx"));
            let mut ours = Tensor::from_slice(device, [o, i], &start);
            matmul::backward_weight(ours.view_mut(), dy.view(), x.view(), n);
            assert_same(&ours.to_vec::<f32>(), &dw, &format!("{what} dw"));
            // A first term does not read what it overwrites: two sequences, so that the second is added to the first.
            let rows = if n.is_multiple_of(2) { n / 2 } else { n };
            let [mut of_zeros, mut of_anything] = [0.0, f32::NAN].map(|x| Tensor::from_slice(device, [o, i], &vec![x; o * i]));
            matmul::backward_weight(of_zeros.view_mut(), dy.view(), x.view(), rows);
            matmul::backward_weight(Sum { view: of_anything.view_mut(), fresh: true }, dy.view(), x.view(), rows);
            assert_same(&of_anything.to_vec::<f32>(), &of_zeros.to_vec::<f32>(), &format!("{what} first dw"));
        }
    }
}

#[test]
fn same_bits_as_plain_f32() {
    same_as_plain::<f32>();
}

#[test]
fn same_bits_as_plain_bf16() {
    same_as_plain::<bf16>();
}

#[test]
fn same_bits_as_plain_f16() {
    same_as_plain::<f16>();
}

/// Against f64, so that the plain definition is itself held to something.
#[test]
fn close_to_f64() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        dispatch!(dtype, T => {
            let [n, o, i] = [20, 30, 200];
            let (x, w) = (random::<T>("x", n * i, 1.0), random::<T>("w", o * i, 1.0));
            let y = plain_forward(&x, &w, None, [n, o, i], 64);
            let rounding = match dtype { Dtype::F32 => 1e-6, Dtype::F16 => 2e-3, _ => 2e-2 };
            for (index, y) in y.iter().enumerate() {
                let terms = (0..i).map(|k| x[index / o * i + k].to_f32() as f64 * w[index % o * i + k].to_f32() as f64);
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                assert!((y.to_f32() as f64 - sum).abs() <= rounding * size, "{dtype} {index}: {y:?} against {sum}");
            }
        });
    }
}

/// A rank that owns one part, and then the tree: what tensor parallelism does.
#[test]
fn parts_computed_apart_are_leaves() {
    let device = Device::cpu(2);
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        dispatch!(dtype, T => {
            let ([n, o, i], shard) = ([19, 70, 330], 66);
            let (x, w) = (random::<T>("x", n * i, 1.0), random::<T>("w", o * i, 1.0));
            let columns = |values: &[T], start: usize| -> Vec<T> {
                values.chunks(i).flat_map(|row| row[start..start + shard].to_vec()).collect()
            };
            let parts: Vec<Vec<T>> = (0..i).step_by(shard).map(|start| {
                let x = Tensor::from_slice(&device, [n, shard], &columns(&x, start));
                let w = Tensor::from_slice(&device, [o, shard], &columns(&w, start));
                matmul::forward(x.view(), w.view(), shard).to_vec()
            }).collect();
            let added: Vec<T> = (0..n * o).map(|at| tree(parts.iter().map(|part| part[at]).collect())).collect();
            let whole = matmul::forward(
                Tensor::from_slice(&device, [n, i], &x).view(),
                Tensor::from_slice(&device, [o, i], &w).view(),
                shard,
            );
            assert_same(&whole.to_vec::<T>(), &added, dtype.name());
        });
    }
}

#[test]
fn sequences_may_come_in_any_calls() {
    let device = Device::cpu(2);
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        for rows in [1, 3, 64, 1500] {
            dispatch!(dtype, T => {
                let ([o, i], sequences) = ([50, 35], 5);
                let n = rows * sequences;
                let x = Tensor::from_slice(&device, [n, i], &random::<T>("x", n * i, 1.0));
                let dy = Tensor::from_slice(&device, [n, o], &random::<T>("dy", n * o, 1.0));
                let mut results = Vec::new();
                for calls in [vec![5], vec![1; 5], vec![2, 3], vec![4, 1]] {
                    let mut dw = device.zeros([o, i], Dtype::F32);
                    let mut start = 0;
                    for count in calls {
                        let mine = start..start + count * rows;
                        matmul::backward_weight(dw.view_mut(), dy.view().rows(mine.clone()), x.view().rows(mine.clone()), rows);
                        start = mine.end;
                    }
                    results.push(dw.to_vec::<f32>());
                }
                for other in &results[1..] {
                    assert_same(other, &results[0], &format!("{dtype}, sequences of {rows}"));
                }
            });
        }
    }
}

/// Generation computes one row at a time, training many: the same bits.
#[test]
fn rows_do_not_know_of_each_other() {
    for (name, device) in devices() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            dispatch!(dtype, T => {
                let [n, o, i] = [37, 99, 150];
                let x = Tensor::from_slice(&device, [n, i], &random::<T>("x", n * i, 1.0));
                let w = Tensor::from_slice(&device, [o, i], &random::<T>("w", o * i, 1.0));
                let all = matmul::forward(x.view(), w.view(), 40).to_vec::<T>();
                for rows in [0..1, 1..9, 9..20, 20..37] {
                    let some = matmul::forward(x.view().rows(rows.clone()), w.view(), 40).to_vec::<T>();
                    assert_same(&some, &all[rows.start * o..rows.end * o], &format!("{dtype} {name} rows {rows:?}"));
                }
            });
        }
    }
}

#[test]
fn views_may_start_anywhere() {
    for (name, device) in devices() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            dispatch!(dtype, T => {
                let [n, o, i] = [9, 52, 34];
                let (x, w) = (random::<T>("x", n * i, 1.0), random::<T>("w", o * i, 1.0));
                let shifted = |values: &[T], by: usize| {
                    let padded: Vec<T> = std::iter::repeat_n(T::from_f32(f32::NAN), by).chain(values.iter().copied()).collect();
                    Tensor::from_slice(&device, [padded.len()], &padded)
                };
                let plain = plain_forward(&x, &w, None, [n, o, i], i);
                for (a, b) in [(0, 0), (1, 3), (7, 1)] {
                    let (x, w) = (shifted(&x, a), shifted(&w, b));
                    let y = matmul::forward(x.view().part(a..a + n * i, [n, i]), w.view().part(b..b + o * i, [o, i]), i);
                    assert_same(&y.to_vec::<T>(), &plain, &format!("{dtype} {name}"));
                }
                let mut dw = device.zeros([3 + o * i], Dtype::F32);
                let dy = random::<T>("dy", n * o, 1.0);
                let (x, dy_tensor) = (Tensor::from_slice(&device, [n, i], &x), shifted(&dy, 5));
                let part = dw.view_mut().part(3..3 + o * i, [o, i]);
                matmul::backward_weight(part, dy_tensor.view().part(5..5 + n * o, [n, o]), x.view(), 3);
                let plain = plain_backward_weight(&vec![0.0; o * i], &dy, &x.to_vec::<T>(), [n, o, i], 3);
                assert_same(&dw.to_vec::<f32>()[3..], &plain, &format!("{dtype} {name} dw"));
            });
        }
    }
}

/// bf16 numbers of every size, denormals included: sums that underflow and cancel.
#[test]
fn tiny_and_huge_bf16_have_the_bits_of_the_definition() {
    let stream = Stream::new(3, "extremes");
    for (round, largest_exponent) in [(0u64, 0), (1, 66), (2, 70), (3, 130), (4, 190)] {
        let number = |index: u64| {
            let word = stream.word(round << 40 | index);
            let exponent = if largest_exponent == 0 { 0 } else { (word >> 32) as u16 % largest_exponent };
            bf16::from_bits((word as u16 & 0x807f) | (exponent << 7))
        };
        let [n, o, i] = [16, 64, 40];
        let x: Vec<bf16> = (0..(n * i) as u64).map(number).collect();
        let w: Vec<bf16> = (0..(o * i) as u64).map(|index| number(index + (1 << 32))).collect();
        // With sums that became zero, a denormal bias is what is left to round.
        let bias: Vec<bf16> = (0..o as u64).map(|index| number(index + (2 << 32))).collect();
        let plain = plain_forward(&x, &w, None, [n, o, i], i);
        let biased = plain_forward(&x, &w, Some(&bias), [n, o, i], i);
        for (name, device) in devices() {
            let (x, w) = (Tensor::from_slice(&device, [n, i], &x), Tensor::from_slice(&device, [o, i], &w));
            let y = matmul::forward(x.view(), w.view(), i);
            assert_same(&y.to_vec::<bf16>(), &plain, &format!("{name}, exponents below {largest_exponent}"));
            let y = matmul::forward_bias(x.view(), w.view(), Tensor::from_slice(&device, [o], &bias).view(), i);
            assert_same(&y.to_vec::<bf16>(), &biased, &format!("{name}, exponents below {largest_exponent}, with bias"));
        }
    }
}

#[test]
fn infinities_and_zeros_pass_through() {
    for (name, device) in devices() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            dispatch!(dtype, T => {
                let [n, o, i] = [10, 60, 41];
                let (mut x, w) = (random::<T>("x", n * i, 1.0), random::<T>("w", o * i, 1.0));
                x[3 * i + 40] = T::from_f32(f32::NAN);
                x[5 * i + 7] = T::from_f32(f32::INFINITY);
                x[6 * i..7 * i].fill(T::default());
                let y = matmul::forward(Tensor::from_slice(&device, [n, i], &x).view(), Tensor::from_slice(&device, [o, i], &w).view(), i);
                for (row, values) in y.to_vec::<T>().chunks(o).enumerate() {
                    for (column, value) in values.iter().enumerate() {
                        let (value, sign) = (value.to_f32(), w[column * i + 7].to_f32().signum());
                        let right = match row {
                            3 => value.is_nan(),
                            5 => value == f32::INFINITY * sign,
                            6 => value == 0.0,
                            _ => value.is_finite(),
                        };
                        assert!(right, "{dtype} {name}: ({row}, {column}) is {value}");
                    }
                }
            });
        }
    }
}

/// A device that only counts gives the same memory as one that computes.
#[test]
fn a_dry_run_counts_what_a_real_one_takes() {
    let peak = |device: &Device| {
        let (x, w) = (device.zeros([6, 4500], Dtype::Bf16), device.zeros([11, 4500], Dtype::Bf16));
        device.memory().reset_peak();
        let y = matmul::forward(x.view(), w.view(), 1000);
        let dx = matmul::backward_input(y.view(), w.view());
        let mut dw = device.zeros([11, 4500], Dtype::F32);
        matmul::backward_weight(dw.view_mut(), y.view(), dx.view(), 3);
        device.memory().bytes_peak()
    };
    let dry = peak(&Device::dry());
    for (name, device) in devices() {
        assert_eq!(peak(&device), dry, "{name}");
    }
}

/// Just below 2^-126: the processor decides after rounding to 24 bits whether a result is too small, so 2^-126 - 2^-151 stays.
#[test]
fn bf16_sums_at_the_edge_of_the_denormals() {
    let edge = 2f32.powi(-63);
    let mut x = Vec::new();
    for exponent in [-86, -87, -88, -89, -90] {
        for fraction in [1.0, 1.0078125, 1.25, 1.5, 1.9921875] {
            for sign in [-1.0, 1.0] {
                x.push([bf16::from_f32(sign * fraction * 2f32.powi(exponent)), bf16::from_f32(-sign.signum() * edge)]);
                x.push([bf16::from_f32(fraction * 2f32.powi(exponent)), bf16::from_f32(sign * edge)]);
            }
        }
    }
    let n = x.len();
    let x: Vec<bf16> = x.concat();
    let w = [edge, edge, 1.5 * edge, edge, edge, -edge, 1.0078125 * edge, 1.0078125 * edge].map(bf16::from_f32);
    let plain = plain_forward(&x, &w, None, [n, 4, 2], 2);
    assert!(plain.iter().any(|y| y.to_f32() == 0.0) && plain.iter().any(|y| y.to_f32().abs() == 2f32.powi(-126)));
    for (name, device) in devices() {
        let y = matmul::forward(Tensor::from_slice(&device, [n, 2], &x).view(), Tensor::from_slice(&device, [4, 2], &w).view(), 2);
        assert_same(&y.to_vec::<bf16>(), &plain, &name);
    }
}
