//! Attention against its definition in f64 and finite differences, and the promises about bits.
//!
//! Invariant: a failing case names its dtype, heads, mask and processor, and its numbers come from a fixed seed.

use ferrotron::device::Device;
use ferrotron::device::cpu::{Cpu, Isa};
use ferrotron::device::tensor::Tensor;
use ferrotron::dispatch;
use ferrotron::dtype::{Dtype, Element};
use ferrotron::ops::attention::{self, Heads, Mask};
use ferrotron::rng::Stream;
use std::sync::Arc;

fn devices() -> Vec<(String, Device)> {
    let levels = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16].into_iter().filter(|&isa| isa <= Isa::detect());
    let mut all: Vec<_> = levels.map(|isa| (format!("{isa:?}"), Device::Cpu(Arc::new(Cpu::with_isa(2, isa))))).collect();
    all.extend([1, 4].map(|threads| (format!("{threads} threads"), Device::cpu(threads))));
    all
}

fn random(name: &str, count: usize) -> Vec<f64> {
    let stream = Stream::new(11, name);
    (0..count as u64).map(|i| stream.normal(i)).collect()
}

#[derive(Clone)]
struct Case {
    heads: Heads,
    t: usize,
    sequences: usize,
    window: Option<usize>,
    starts: Vec<u32>,
}

impl Case {
    fn new(heads: [usize; 3], t: usize, sequences: usize, window: Option<usize>, documents: bool) -> Case {
        let [query, kv, dim] = heads;
        let stream = Stream::new(5, "documents");
        let mut starts = Vec::new();
        for row in 0..t * sequences {
            let new = documents && stream.uniform(row as u64) < 0.05;
            let before = if row % t == 0 { 0 } else { starts[row - 1] };
            starts.push(if new { (row % t) as u32 } else { before });
        }
        Case { heads: Heads { query, kv, dim }, t, sequences, window, starts }
    }

    fn rows(&self) -> usize {
        self.t * self.sequences
    }

    fn describe(&self) -> String {
        format!("{:?} t {} x {} window {:?}", self.heads, self.t, self.sequences, self.window)
    }

    /// Keys that row `q` of a sequence sees.
    fn seen(&self, sequence: usize, q: usize) -> std::ops::RangeInclusive<usize> {
        let from_window = self.window.map_or(0, |window| (q + 1).saturating_sub(window));
        from_window.max(self.starts[sequence * self.t + q] as usize)..=q
    }

    /// o, lse by the definition.
    fn forward(&self, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let Heads { query, kv, dim } = self.heads;
        let columns = self.heads.columns();
        let (mut o, mut lse) = (vec![0.0; self.rows() * query * dim], vec![0.0; self.rows() * query]);
        for (row, head) in (0..self.rows()).flat_map(|row| (0..query).map(move |head| (row, head))) {
            let (sequence, key_head) = (row / self.t, head / (query / kv));
            let vector = |row: usize, head: usize| &qkv[row * columns + head * dim..][..dim];
            let q = vector(row, head);
            let keys: Vec<usize> = self.seen(sequence, row % self.t).map(|key| sequence * self.t + key).collect();
            let scores: Vec<f64> = keys
                .iter()
                .map(|&key| q.iter().zip(vector(key, query + key_head)).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt())
                .collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
            lse[row * query + head] = largest + sum.ln();
            for (score, &key) in scores.iter().zip(&keys) {
                let weight = (score - largest).exp() / sum;
                for (column, v) in vector(key, query + kv + key_head).iter().enumerate() {
                    o[(row * query + head) * dim + column] += weight * v;
                }
            }
        }
        (o, lse)
    }

    /// dqkv by the definition: the chain rule, written out.
    fn backward(&self, qkv: &[f64], dout: &[f64]) -> Vec<f64> {
        let Heads { query, kv, dim } = self.heads;
        let (columns, scale) = (self.heads.columns(), 1.0 / (dim as f64).sqrt());
        let (o, lse) = self.forward(qkv);
        let mut dqkv = vec![0.0; qkv.len()];
        for (row, head) in (0..self.rows()).flat_map(|row| (0..query).map(move |head| (row, head))) {
            let (sequence, key_head) = (row / self.t, head / (query / kv));
            let at = |row: usize, head: usize| row * columns + head * dim;
            let dout = &dout[(row * query + head) * dim..][..dim];
            let dot: f64 = dout.iter().zip(&o[(row * query + head) * dim..]).map(|(a, b)| a * b).sum();
            for key in self.seen(sequence, row % self.t).map(|key| sequence * self.t + key) {
                let (q, k, v) = (at(row, head), at(key, query + key_head), at(key, query + kv + key_head));
                let score: f64 = (0..dim).map(|column| qkv[q + column] * qkv[k + column]).sum::<f64>() * scale;
                let weight = (score - lse[row * query + head]).exp();
                let dweight: f64 = (0..dim).map(|column| dout[column] * qkv[v + column]).sum();
                let dscore = weight * (dweight - dot) * scale;
                for column in 0..dim {
                    dqkv[v + column] += weight * dout[column];
                    dqkv[q + column] += dscore * qkv[k + column];
                    dqkv[k + column] += dscore * qkv[q + column];
                }
            }
        }
        dqkv
    }

    fn run<T: Element>(&self, device: &Device, qkv: &[T], dout: &[T]) -> (Vec<T>, Vec<f32>, Vec<T>) {
        let Heads { query, dim, .. } = self.heads;
        let qkv = Tensor::from_slice(device, [self.rows(), self.heads.columns()], qkv);
        let dout = Tensor::from_slice(device, [self.rows(), query * dim], dout);
        let starts = Tensor::from_slice(device, [self.rows()], &self.starts);
        let mask = Mask { t: self.t, starts: starts.view(), window: self.window };
        let (o, lse) = attention::forward(qkv.view(), self.heads, mask);
        let dqkv = attention::backward(dout.view(), qkv.view(), o.view(), lse.view(), self.heads, mask);
        (o.to_vec(), lse.to_vec(), dqkv.to_vec())
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::new([1, 1, 1], 1, 1, None, false),
        Case::new([2, 2, 16], 5, 3, None, false),
        Case::new([4, 2, 8], 64, 2, None, false),
        Case::new([3, 1, 7], 65, 1, None, true),
        Case::new([6, 2, 20], 193, 2, None, false),
        Case::new([2, 1, 64], 257, 1, Some(50), false),
        Case::new([2, 2, 33], 400, 1, Some(1), true),
        Case::new([5, 5, 12], 200, 2, Some(130), true),
        Case::new([8, 1, 6], 70, 1, None, true),
        Case::new([1, 1, 520], 60, 1, None, false),
    ]
}

/// Root mean square error against the definition, relative to its root mean square.
fn error<T: Element>(ours: &[T], right: &[f64]) -> f64 {
    assert_eq!(ours.len(), right.len());
    let squares = ours.iter().zip(right).map(|(a, b)| (a.to_f32() as f64 - b).powi(2)).sum::<f64>();
    let scale = right.iter().map(|b| b * b).sum::<f64>();
    (squares / scale.max(1e-30)).sqrt()
}

fn inputs<T: Element>(case: &Case) -> (Vec<T>, Vec<T>, Vec<f64>, Vec<f64>) {
    let narrow = |values: Vec<f64>| values.into_iter().map(|x| T::from_f32(x as f32)).collect::<Vec<T>>();
    let qkv = narrow(random("qkv", case.rows() * case.heads.columns()));
    let dout = narrow(random("dout", case.rows() * case.heads.query * case.heads.dim));
    let wide = |values: &[T]| values.iter().map(|x| x.to_f32() as f64).collect::<Vec<f64>>();
    let (qkv_wide, dout_wide) = (wide(&qkv), wide(&dout));
    (qkv, dout, qkv_wide, dout_wide)
}

#[test]
fn close_to_the_definition() {
    for case in cases() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            dispatch!(dtype, T => {
                let tolerance = match dtype { Dtype::F32 => 1e-5, Dtype::F16 => 1e-3, _ => 8e-3 };
                let (qkv, dout, qkv_wide, dout_wide) = inputs::<T>(&case);
                let ((o, lse), dqkv) = (case.forward(&qkv_wide), case.backward(&qkv_wide, &dout_wide));
                let ours = case.run(&Device::cpu(2), &qkv, &dout);
                let errors = [error(&ours.0, &o), error(&ours.1, &lse), error(&ours.2, &dqkv)];
                assert!(errors.iter().all(|&error| error < tolerance), "{dtype} {}: {errors:?}", case.describe());
            });
        }
    }
}

#[test]
fn the_same_bits_on_every_processor() {
    for case in cases() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            dispatch!(dtype, T => {
                let (qkv, dout, ..) = inputs::<T>(&case);
                let first = case.run(&Device::cpu(2), &qkv, &dout);
                for (name, device) in devices() {
                    assert!(case.run(&device, &qkv, &dout) == first, "{dtype} {} on {name}", case.describe());
                }
            });
        }
    }
}

/// Data parallelism and micro-batches cut sequences, tensor parallelism cuts heads.
#[test]
fn the_same_bits_for_fewer_sequences_and_heads() {
    let device = Device::cpu(2);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        dispatch!(dtype, T => {
            let case = Case::new([6, 3, 24], 210, 2, Some(100), true);
            let (qkv, dout, ..) = inputs::<T>(&case);
            let (o, lse, dqkv) = case.run(&device, &qkv, &dout);
            let (dim, columns, t) = (case.heads.dim, case.heads.columns(), case.t);
            for sequence in 0..2 {
                let alone = Case { sequences: 1, starts: case.starts[sequence * t..(sequence + 1) * t].to_vec(), ..case.clone() };
                let range = |width: usize| sequence * t * width..(sequence + 1) * t * width;
                let ours = alone.run(&device, &qkv[range(columns)], &dout[range(6 * dim)]);
                assert!(ours == (o[range(6 * dim)].to_vec(), lse[range(6)].to_vec(), dqkv[range(columns)].to_vec()), "{dtype} {sequence}");
            }
            for key_head in 0..3 {
                let alone = Case { heads: Heads { query: 2, kv: 1, dim }, ..case.clone() };
                let take = |all: &[T], width: usize, heads: &[std::ops::Range<usize>]| -> Vec<T> {
                    let row = |row: &[T]| heads.iter().flat_map(|heads| row[heads.start * dim..heads.end * dim].to_vec()).collect::<Vec<T>>();
                    all.chunks(width).flat_map(row).collect()
                };
                let queries = 2 * key_head..2 * key_head + 2;
                let mine = [queries.clone(), 6 + key_head..7 + key_head, 9 + key_head..10 + key_head];
                let ours = alone.run(&device, &take(&qkv, columns, &mine), &take(&dout, 6 * dim, std::slice::from_ref(&queries)));
                assert!(ours.0 == take(&o, 6 * dim, &[queries]) && ours.2 == take(&dqkv, columns, &mine), "{dtype} head {key_head}");
            }
        });
    }
}

/// The definition's own gradient, by central differences of its forward pass, and ours with it.
#[test]
fn gradients_are_finite_differences() {
    for case in [Case::new([4, 2, 6], 9, 2, None, true), Case::new([2, 1, 5], 12, 1, Some(4), false)] {
        let (qkv, dout, qkv_wide, dout_wide) = inputs::<f32>(&case);
        let loss = |qkv: &[f64]| case.forward(qkv).0.iter().zip(&dout_wide).map(|(a, b)| a * b).sum::<f64>();
        let ours = case.run(&Device::cpu(1), &qkv, &dout).2;
        for (index, ours) in ours.iter().enumerate() {
            let moved = |by: f64| {
                let mut qkv = qkv_wide.clone();
                qkv[index] += by;
                loss(&qkv)
            };
            let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((*ours as f64 - difference).abs() < 2e-5, "{}: element {index} is {ours}, not {difference}", case.describe());
        }
    }
}

#[test]
fn large_scores_neither_overflow_nor_vanish() {
    let case = Case::new([1, 1, 4], 70, 1, None, false);
    let (mut qkv, dout, ..) = inputs::<f32>(&case);
    qkv.iter_mut().enumerate().filter(|(index, _)| index % 12 < 8).for_each(|(_, x)| *x *= 100.0);
    let wide: Vec<f64> = qkv.iter().map(|&x| x as f64).collect();
    let (o, lse) = case.forward(&wide);
    let ours = case.run(&Device::cpu(2), &qkv, &dout);
    assert!(error(&ours.0, &o) < 1e-3 && error(&ours.1, &lse) < 1e-6 && ours.2.iter().all(|x| x.is_finite()));
}

#[test]
fn what_is_not_a_number_stays_none() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        dispatch!(dtype, T => {
            let case = Case::new([2, 2, 8], 30, 1, None, false);
            let (mut qkv, dout, ..) = inputs::<T>(&case);
            qkv[20 * case.heads.columns()] = T::from_f32(f32::NAN);
            let (o, lse, _) = case.run(&Device::cpu(2), &qkv, &dout);
            assert!(lse[20 * 2].is_nan() && o[20 * 16..20 * 16 + 8].iter().all(|o| o.to_f32().is_nan()), "{dtype}");
            assert!(!lse[20 * 2 + 1].is_nan() && !lse[19 * 2].is_nan(), "{dtype}");
        });
    }
}

#[test]
fn views_may_start_anywhere() {
    let device = Device::cpu(2);
    dispatch!(Dtype::Bf16, T => {
        let case = Case::new([2, 1, 10], 80, 1, None, false);
        let (qkv, dout, ..) = inputs::<T>(&case);
        let right = case.run(&device, &qkv, &dout).0;
        let shifted: Vec<T> = std::iter::repeat_n(T::from_f32(f32::NAN), 3).chain(qkv.iter().copied()).collect();
        let shifted = Tensor::from_slice(&device, [shifted.len()], &shifted);
        let starts = Tensor::from_slice(&device, [81], &vec![0u32; 81]);
        let view = shifted.view().part(3..3 + qkv.len(), [80, 40]);
        let (o, _) = attention::forward(view, case.heads, Mask { t: 80, starts: starts.view().part(1..81, [80]), window: None });
        assert!(o.to_vec::<T>() == right);
    });
}

#[test]
fn a_dry_run_counts_what_a_real_one_takes() {
    let peak = |device: &Device| {
        let heads = Heads { query: 6, kv: 2, dim: 20 };
        let (qkv, starts) = (device.zeros([130, heads.columns()], Dtype::F16), device.zeros([130], Dtype::U32));
        device.memory().reset_peak();
        let mask = Mask { t: 65, starts: starts.view(), window: None };
        let (o, lse) = attention::forward(qkv.view(), heads, mask);
        attention::backward(o.view(), qkv.view(), o.view(), lse.view(), heads, mask);
        device.memory().bytes_peak()
    };
    let dry = peak(&Device::dry());
    for (name, device) in devices() {
        assert_eq!(peak(&device), dry, "{name}");
    }
}
