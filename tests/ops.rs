//! Every operation's forward pass against its plain definition, and the bits of all of them against the ways of splitting their work.
//!
//! Proves: one rounding in every dtype; the same bits for every number of threads, every grouping of sequences into calls, every cut of
//! rows and of the vocabulary over ranks; that what is not finite is never hidden; that exact sums are exact.

#[path = "support/plain.rs"]
mod plain;
mod support;

use ferrotron::device::Device;
use ferrotron::device::cpu::{Cpu, Isa};
use ferrotron::device::tensor::{Tensor, View};
use ferrotron::dispatch;
use ferrotron::dtype::{Dtype, Element};
use ferrotron::ops::adamw::{Adam, Chance};
use ferrotron::ops::exact::{LossSum, LossTotal, SquareSum};
use ferrotron::ops::rope::Scaling;
use ferrotron::ops::{activation, adamw, cross_entropy, elementwise, embedding, norm, reduce, rope};
use ferrotron::plan::layout::Places;
use std::sync::Arc;
use support::{FLOATS, assert_rounded_once, random, random_ids, relative_error, values};

/// Elements of any floating-point dtype, as they must agree where bits are compared.
fn bits(x: View<'_>) -> Vec<u32> {
    dispatch!(x.dtype(), T => x.to_vec::<T>().iter().map(|x| x.to_f32().to_bits()).collect())
}

fn f32s(device: &Device, values: &[f32]) -> Tensor {
    Tensor::from_slice(device, [values.len()], values)
}

#[test]
fn norms_are_their_definitions() {
    let device = Device::cpu(2);
    for dtype in FLOATS {
        for (n, c) in [(5, 37), (3, 1), (4, 64), (2, 1000), (0, 8)] {
            let (x, w) = (random(&device, "x", [n, c], dtype, 2.0), random(&device, "w", [c], dtype, 1.0));
            let b = random(&device, "b", [c], dtype, 1.0);
            let (xs, ws, bs) = (values(x.view()), values(w.view()), values(b.view()));
            let (y, r) = norm::rms_forward(x.view(), w.view(), 1e-2);
            assert_rounded_once("rms", y.view(), &plain::rms(&xs, &ws, 1e-2));
            assert_eq!(bits(y.view()), bits(norm::rms_again(x.view(), w.view(), r.view()).view()));
            let (y, stats) = norm::layer_forward(x.view(), w.view(), b.view(), 1e-2);
            assert_rounded_once("layer", y.view(), &plain::layer(&xs, &ws, &bs, 1e-2));
            assert_eq!(bits(y.view()), bits(norm::layer_again(x.view(), w.view(), b.view(), stats.view()).view()));
        }
    }
}

#[test]
fn activations_are_their_definitions() {
    let device = Device::cpu(2);
    for dtype in FLOATS {
        let gate_up = random(&device, "gate_up", [7, 2 * 45], dtype, 4.0);
        assert_rounded_once("swiglu", activation::swiglu_forward(gate_up.view()).view(), &plain::swiglu(&values(gate_up.view()), 45));
        let x = random(&device, "x", [7, 45], dtype, 3.0);
        assert_rounded_once("gelu", activation::gelu_forward(x.view()).view(), &plain::gelu(&values(x.view())));
    }
    let far = f32s(&device, &[1e30, -1e30, 200.0, -200.0, f32::NAN, 0.0]);
    let mut slopes = far.duplicate();
    activation::gelu_backward(far.view(), slopes.view_mut());
    let [y, dy] = [activation::gelu_forward(far.view()), slopes].map(|y| y.to_vec::<f32>());
    assert!(y[0] == 1e30 && y[1].abs() < 1e-6 && y[2] == 200.0 && y[3].abs() < 1e-30 && y[4].is_nan() && y[5] == 0.0, "{y:?}");
    assert!(dy[0] == 1e30 && dy[1].abs() < 1e-5 && dy[2] == 200.0 && dy[3].abs() < 1e-30 && dy[4].is_nan(), "{dy:?}");
    let gates = f32s(&device, &[1e30, -1e30, f32::NAN, 1.0, 1.0, 1.0]).reshape([1, 6]);
    let h = activation::swiglu_forward(gates.view()).to_vec::<f32>();
    assert!(h[0] == 1e30 && h[1].abs() < 1e-6 && h[2].is_nan(), "{h:?}");
}

#[test]
fn rope_and_embeddings_are_their_definitions() {
    let device = Device::cpu(2);
    let (n, width, heads, head_dim) = (9, 40, 3, 12);
    let table = rope::table(&device, head_dim, 10_000.0, Scaling::None, 50);
    let positions = random_ids(&device, "positions", n, 50);
    let places = positions.to_vec::<u32>();
    for dtype in FLOATS {
        let mut x = random(&device, "x", [n, width], dtype, 1.0);
        let truth = plain::rope(&values(x.view()), width, heads, &values(table.view()), head_dim, &places);
        rope::forward(x.view_mut(), heads, head_dim, table.view(), positions.view());
        assert_rounded_once("rope", x.view(), &truth);

        let vectors = random(&device, "vectors", [20, width], dtype, 1.0);
        let y = embedding::forward(positions.view(), vectors.view(), 15);
        assert_eq!(values(y.view()), plain::embedding(&places, &values(vectors.view()), width, 15));
        let all = random(&device, "all", [50, width], dtype, 1.0);
        let added = plain::embedding(&places, &values(all.view()), width, 0);
        let truth: Vec<f64> = values(x.view()).iter().zip(&added).map(|(x, y)| x + y).collect();
        embedding::positions_forward(x.view_mut(), all.view(), positions.view());
        assert_rounded_once("positions", x.view(), &truth);
    }
}

#[test]
fn elementwise_is_one_rounding() {
    let device = Device::cpu(2);
    for dtype in FLOATS {
        let x = random(&device, "x", [7, 33], dtype, 1.0);
        for other in FLOATS {
            let mut y = device.empty([7, 33], other);
            elementwise::cast(y.view_mut(), x.view());
            assert_rounded_once("cast", y.view(), &values(x.view()));
        }
        let (mut y, bias) = (random(&device, "y", [7, 33], dtype, 1.0), random(&device, "bias", [33], dtype, 1.0));
        let truth: Vec<f64> = values(y.view()).iter().zip(values(x.view())).map(|(y, x)| y + x).collect();
        elementwise::add(y.view_mut(), x.view());
        assert_rounded_once("add", y.view(), &truth);
        let truth: Vec<f64> = values(y.view()).iter().zip(values(bias.view()).iter().cycle()).map(|(y, x)| y + x).collect();
        elementwise::add_row(y.view_mut(), bias.view());
        assert_rounded_once("add_row", y.view(), &truth);
        let truth: Vec<f64> = values(y.view()).iter().map(|y| y * 0.3f32 as f64).collect();
        elementwise::scale(y.view_mut(), 0.3);
        assert_rounded_once("scale", y.view(), &truth);
        let mut total = random(&device, "total", [7, 33], Dtype::F32, 1.0);
        let truth: Vec<f64> = values(total.view()).iter().zip(values(x.view())).map(|(y, x)| y + x).collect();
        elementwise::accumulate(total.view_mut(), x.view());
        assert_rounded_once("accumulate", total.view(), &truth);
    }
}

#[test]
fn adamw_is_its_definition() {
    let device = Device::cpu(2);
    let count = 1003;
    let mut state = ["p", "m", "v"].map(|name| random(&device, name, [count], Dtype::F32, if name == "p" { 1.0 } else { 0.0 }));
    let mut weights = device.empty([count], Dtype::Bf16);
    let [mut p, mut m, mut v] = [0, 1, 2].map(|i| values(state[i].view()));
    for step in 1..=5 {
        let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, rate: 1e-2 / step as f64, decay: 0.1, step, scale: 0.5 };
        let g = random(&device, &format!("g{step}"), [count], Dtype::F32, 0.1);
        for (i, g) in values(g.view()).iter().map(|g| g * 0.5).enumerate() {
            p[i] *= 1.0 - adam.rate * 0.1;
            m[i] += 0.1 * (g - m[i]);
            v[i] = 0.95 * v[i] + 0.05 * g * g;
            let root = v[i].sqrt() / (1.0 - 0.95f64.powi(step as i32)).sqrt();
            p[i] -= adam.rate / (1.0 - 0.9f64.powi(step as i32)) * m[i] / (root + 1e-8);
        }
        let mut other = state.each_ref().map(|x| x.duplicate());
        let [a, b, c] = &mut other;
        adamw::step(a.view_mut(), b.view_mut(), c.view_mut(), g.view(), &adam);
        let [a, b, c] = &mut state;
        adamw::step_and_cast(a.view_mut(), b.view_mut(), c.view_mut(), g.view(), weights.view_mut(), &adam);
        assert!(state.iter().zip(&other).all(|(x, y)| bits(x.view()) == bits(y.view())), "both forms are one");
    }
    for (name, got, truth) in [("p", &state[0], &p), ("m", &state[1], &m), ("v", &state[2], &v)] {
        let error = relative_error(&values(got.view()), truth);
        assert!(error < 1e-6, "{name}: relative error {error:e}");
    }
    assert_rounded_once("weights", weights.view(), &values(state[0].view()));
}

#[test]
fn rounding_by_chance_keeps_the_mean() {
    let (device, count) = (Device::cpu(2), 40_000);
    let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, rate: 0.0, decay: 0.0, step: 1, scale: 1.0 };
    // The last two lie among the denormals of f16.
    for dtype in [Dtype::Bf16, Dtype::F16] {
        for x in [1.0f32, 1.003, -0.7001, 300.17, 2.001e-5, -3.3e-7] {
            // A weight that is x once its decay is off.
            let [mut m, mut v, g] = [(); 3].map(|()| device.zeros([count], Dtype::F32));
            let mut weights = device.empty([count], dtype);
            elementwise::cast(weights.view_mut(), f32s(&device, &vec![x * 1.01; count]).view());
            let before = values(weights.view())[0];
            let decay = 1.0 - x as f64 / before;
            let x = (before as f32) * ((1.0 - decay) as f32);
            let places = Places { first: 0, length: 1 << 40, near: 1, far: 0 };
            let adam = Adam { rate: 1.0, decay, ..adam };
            adamw::step_by_chance(weights.view_mut(), m.view_mut(), v.view_mut(), g.view(), &adam, &Chance::new(11, "w", 1, places));
            let rounded = values(weights.view());
            let (least, most) = rounded.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
            let mut neighbours = rounded.clone();
            neighbours.sort_by(f64::total_cmp);
            neighbours.dedup();
            assert!(least <= x as f64 && x as f64 <= most && neighbours.len() <= 2, "{x} in {dtype}: {neighbours:?}");
            let mean = rounded.iter().sum::<f64>() / count as f64;
            let deviation = (most - least) / 2.0 / (count as f64).sqrt();
            assert!((mean - x as f64).abs() <= 4.0 * deviation, "{x} in {dtype}: {mean}");
        }
    }
}

/// Losses and sums of whole rows.
fn whole_cross_entropy(logits: View<'_>, targets: View<'_>, shard: usize) -> [Tensor; 3] {
    let (max, parts) = cross_entropy::row_max(logits, shard);
    let sums = cross_entropy::sums(logits, max.view(), &parts, targets, 0, shard);
    let losses = cross_entropy::losses(sums.view(), targets);
    [max, sums, losses]
}

#[test]
fn cross_entropy_is_its_definition() {
    let device = Device::cpu(2);
    let (n, v) = (9, 257);
    let mut names = random_ids(&device, "targets", n, v as u32).to_vec::<u32>();
    names[4] = cross_entropy::IGNORED;
    let targets = Tensor::from_slice(&device, [n], &names);
    let places: Vec<Option<usize>> = names.iter().map(|&name| (name != cross_entropy::IGNORED).then_some(name as usize)).collect();
    for dtype in FLOATS {
        let logits = random(&device, "logits", [n, v], dtype, 5.0);
        let [_, _, losses] = whole_cross_entropy(logits.view(), targets.view(), 64);
        assert_rounded_once("loss", losses.view(), &plain::cross_entropy(&values(logits.view()), &places, v));
        assert_eq!(losses.to_vec::<f32>()[4], 0.0);
    }
}

#[test]
fn a_vocabulary_cut_over_ranks_gives_the_same_bits() {
    let device = Device::cpu(2);
    let (n, v, shard) = (6, 257, 40);
    let targets = random_ids(&device, "targets", n, v as u32);
    let logits = random(&device, "logits", [n, v], Dtype::F32, 5.0);
    let [max, whole, losses] = whole_cross_entropy(logits.view(), targets.view(), shard);
    let all = logits.to_vec::<f32>();
    // Seven shards: subtrees of four and three, and of two, two, two and one.
    for cuts in [vec![0, 160, 257], vec![0, 80, 160, 240, 257]] {
        let ranks: Vec<(usize, Tensor)> = cuts.windows(2).map(|cut| (cut[0], columns(&device, &all, v, cut[0]..cut[1]))).collect();
        let readings: Vec<_> = ranks.iter().map(|(_, logits)| cross_entropy::row_max(logits.view(), shard)).collect();
        let maxima = readings.iter().map(|(max, _)| max.to_vec::<f32>());
        let greatest = maxima.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a.max(*b)).collect()).expect("there are ranks");
        assert_eq!(greatest, max.to_vec::<f32>());
        let sums = ranks
            .iter()
            .zip(&readings)
            .map(|((first, logits), (_, parts))| cross_entropy::sums(logits.view(), max.view(), parts, targets.view(), *first, shard));
        let sums: Vec<f32> = sums.flat_map(|sums| sums.to_vec::<f32>()).collect();
        let total = reduce::tree_rows(Tensor::from_slice(&device, [ranks.len(), 2 * n], &sums).view());
        assert_eq!(bits(total.view()), bits(whole.view()));
        let mut gradient = vec![0f32; n * v];
        for (first, mut logits) in ranks {
            cross_entropy::finish(logits.view_mut(), max.view(), total.view(), targets.view(), first, 0.1);
            let width = logits.shape().columns();
            for (row, part) in logits.to_vec::<f32>().chunks(width).enumerate() {
                gradient[row * v + first..][..width].copy_from_slice(part);
            }
        }
        let mut together = logits.duplicate();
        cross_entropy::finish(together.view_mut(), max.view(), whole.view(), targets.view(), 0, 0.1);
        assert_eq!(together.to_vec::<f32>(), gradient);
    }
    assert_eq!(losses.shape().numel(), n);
}

fn columns(device: &Device, all: &[f32], v: usize, range: std::ops::Range<usize>) -> Tensor {
    let part: Vec<f32> = all.chunks(v).flat_map(|row| row[range.clone()].to_vec()).collect();
    Tensor::from_slice(device, [all.len() / v, range.len()], &part)
}

#[test]
fn what_is_not_finite_is_not_hidden() {
    let device = Device::cpu(2);
    for poison in [f32::NAN, f32::INFINITY] {
        let mut row = vec![0.5f32; 70];
        row[66] = poison;
        let (x, w) = (f32s(&device, &row).reshape([1, 70]), f32s(&device, &[1.0; 70]));
        let (y, _) = norm::rms_forward(x.view(), w.view(), 1e-5);
        assert!(y.to_vec::<f32>()[66].is_nan());
        let (y, _) = norm::layer_forward(x.view(), w.view(), w.view(), 1e-5);
        assert!(y.to_vec::<f32>()[0].is_nan());
        for (target, counted) in [(3, true), (cross_entropy::IGNORED, false)] {
            let targets = Tensor::from_slice(&device, [1], &[target]);
            let [max, sums, losses] = whole_cross_entropy(x.view(), targets.view(), 32);
            assert_eq!(losses.to_vec::<f32>()[0].is_nan(), counted);
            let mut gradient = x.duplicate();
            cross_entropy::finish(gradient.view_mut(), max.view(), sums.view(), targets.view(), 0, 1.0);
            assert_eq!(gradient.to_vec::<f32>()[0].is_nan(), counted);
            let mut total = LossTotal::default();
            total.add(losses.view());
            let total = total.sum();
            assert_eq!((total.nonfinite, total.value().is_nan()), (counted, counted));
        }
        let mut squares = SquareSum::default();
        squares.add([x.view()]);
        assert!(!squares.is_finite() && squares.root().is_nan());
        assert_eq!(reduce::first_nonfinite(x.view()), Some(66));
    }
    // Masked logits are no poison.
    let logits = f32s(&device, &[1.0, f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY]).reshape([1, 4]);
    let [_, _, losses] = whole_cross_entropy(logits.view(), Tensor::from_slice(&device, [1], &[2u32]).view(), 1);
    assert_eq!(losses.to_vec::<f32>(), [std::f32::consts::LN_2]);
    let mut long = vec![0f32; 200_000];
    assert_eq!(reduce::first_nonfinite(f32s(&device, &long).view()), None);
    (long[150_001], long[199_000]) = (f32::NEG_INFINITY, f32::NAN);
    assert_eq!(reduce::first_nonfinite(f32s(&device, &long).view()), Some(150_001));
}

/// Everything that splits its work, on shapes that are large enough for that.
fn all_results(device: &Device) -> Vec<(&'static str, Tensor)> {
    let (n, c, t, chunks, dtype) = (96, 1100, 48, 3, Dtype::Bf16);
    let (x, dy) = (random(device, "x", [n, c], dtype, 1.0), random(device, "dy", [n, c], dtype, 1.0));
    let (w, b) = (random(device, "w", [c], dtype, 1.0), random(device, "b", [c], dtype, 1.0));
    let ids = random_ids(device, "ids", n, 40);
    let (mut y, mut turned, mut placed) = (x.duplicate(), x.duplicate(), x.duplicate());
    let mut sums = device.zeros([chunks, c], Dtype::F32);
    let (mut rms_dw, mut layer_dw) = (sums.duplicate(), sums.duplicate());
    let mut table_dw = device.zeros([40, c], Dtype::F32);
    let (rms_y, r) = norm::rms_forward(x.view(), w.view(), 1e-5);
    let (layer_y, stats) = norm::layer_forward(x.view(), w.view(), b.view(), 1e-5);
    norm::rms_backward_weight(rms_dw.view_mut(), dy.view(), x.view(), r.view(), t);
    norm::layer_backward_weight(layer_dw.view_mut(), dy.view(), x.view(), stats.view(), t);
    reduce::sum_rows(sums.view_mut(), dy.view(), t);
    embedding::backward(table_dw.view_mut(), dy.view(), ids.view(), 0);
    elementwise::add(y.view_mut(), dy.view());
    elementwise::add_row(y.view_mut(), b.view());
    elementwise::scale(y.view_mut(), 0.7);
    let angles = rope::table(device, 100, 1e4, Scaling::None, 40);
    rope::forward(turned.view_mut(), 10, 100, angles.view(), ids.view());
    let table = random(device, "table", [40, c], dtype, 1.0);
    embedding::positions_forward(placed.view_mut(), table.view(), ids.view());
    let mut logits = random(device, "logits", [n, c], Dtype::F32, 3.0);
    let [max, exponentials, losses] = whole_cross_entropy(logits.view(), ids.view(), 300);
    cross_entropy::finish(logits.view_mut(), max.view(), exponentials.view(), ids.view(), 0, 0.3);
    let [mut p, mut m, mut v] = ["p", "m", "v"].map(|name| random(device, name, [n, c], Dtype::F32, 1.0));
    elementwise::scale(v.view_mut(), 0.0);
    let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, rate: 1e-3, decay: 0.1, step: 3, scale: 1.0 };
    let mut rounded = device.empty([n, c], dtype);
    adamw::step_and_cast(p.view_mut(), m.view_mut(), v.view_mut(), logits.view(), rounded.view_mut(), &adam);
    let [mut swiglu_dx, mut gelu_dx] = [x.duplicate(), x.duplicate()];
    activation::swiglu_backward(activation::swiglu_forward(dy.view()).view(), swiglu_dx.view_mut());
    activation::gelu_backward(dy.view(), gelu_dx.view_mut());
    vec![
        ("rms dx", norm::rms_backward(dy.view(), x.view(), w.view(), r.view())),
        ("layer dx", norm::layer_backward(dy.view(), x.view(), w.view(), stats.view())),
        ("swiglu", activation::swiglu_forward(x.view())),
        ("swiglu dx", swiglu_dx),
        ("gelu", activation::gelu_forward(x.view())),
        ("gelu dx", gelu_dx),
        ("embedding", embedding::forward(ids.view(), table.view(), 0)),
        ("tree", reduce::tree_rows(rms_dw.view())),
        ("rms", rms_y),
        ("rms dw", rms_dw),
        ("layer", layer_y),
        ("layer dw", layer_dw),
        ("sum_rows", sums),
        ("embedding dw", table_dw),
        ("elementwise", y),
        ("rope table", angles),
        ("rope", turned),
        ("positions", placed),
        ("dlogits", logits),
        ("losses", losses),
        ("adamw p", p),
        ("adamw weights", rounded),
    ]
}

#[test]
fn threads_and_instructions_do_not_change_a_bit_and_a_dry_device_counts_the_same() {
    let one = Device::cpu(1);
    let expected = all_results(&one);
    for (threads, isa) in [(2, Isa::Avx512Bf16), (4, Isa::Avx512), (2, Isa::Avx2), (1, Isa::Portable)] {
        let device = Device::Cpu(Arc::new(Cpu::with_isa(threads, isa)));
        for ((name, got), (_, expected)) in all_results(&device).iter().zip(&expected) {
            assert!(bits(got.view()) == bits(expected.view()), "{name} with {threads} threads and {isa:?}");
        }
    }
    let dry = Device::dry();
    let kept = all_results(&dry);
    assert_eq!((dry.memory().bytes_live(), dry.memory().bytes_peak()), (one.memory().bytes_live(), one.memory().bytes_peak()));
    for ((name, got), (_, expected)) in kept.iter().zip(&expected) {
        assert_eq!((got.shape(), got.dtype()), (expected.shape(), expected.dtype()), "{name}");
    }
}

/// Adds to dw f32 [chunks, c] what rows of x and dy give, by each of the operations that obey the chunk rule.
type WeightPass = fn(dw: &mut Tensor, dy: View<'_>, x: View<'_>, t: usize);

const WEIGHT_PASSES: [(&str, WeightPass); 3] = [
    ("sum_rows", |dw, dy, _, t| reduce::sum_rows(dw.view_mut(), dy, t)),
    ("rms", |dw, dy, x, t| {
        let w = random(x.device(), "w", [x.shape().columns()], x.dtype(), 1.0);
        let (_, r) = norm::rms_forward(x, w.view(), 1e-5);
        norm::rms_backward_weight(dw.view_mut(), dy, x, r.view(), t);
    }),
    ("layer", |dw, dy, x, t| {
        let w = random(x.device(), "w", [x.shape().columns()], x.dtype(), 1.0);
        let (_, stats) = norm::layer_forward(x, w.view(), w.view(), 1e-5);
        norm::layer_backward_weight(dw.view_mut(), dy, x, stats.view(), t);
    }),
];

#[test]
fn weight_gradients_do_not_depend_on_grouping_or_on_cut_rows() {
    let device = Device::cpu(2);
    let (sequences, t, chunks, c) = (3, 12, 4, 300);
    let n = sequences * t;
    let (x, dy) = (random(&device, "x", [n, c], Dtype::Bf16, 1.0), random(&device, "dy", [n, c], Dtype::Bf16, 1.0));
    for (name, pass) in WEIGHT_PASSES {
        let mut whole = device.zeros([chunks, c], Dtype::F32);
        pass(&mut whole, dy.view(), x.view(), t);
        for groups in [vec![1, 1, 1], vec![2, 1], vec![1, 2]] {
            let (mut parts, mut start) = (device.zeros([chunks, c], Dtype::F32), 0);
            for group in groups {
                let rows = start..start + group * t;
                pass(&mut parts, dy.view().rows(rows.clone()), x.view().rows(rows.clone()), t);
                start = rows.end;
            }
            assert!(bits(whole.view()) == bits(parts.view()), "{name} by groups");
        }
        // A rank of sequence parallelism holds one part of every sequence.
        let length = t / chunks;
        for chunk in 0..chunks {
            let mut mine = device.zeros([1, c], Dtype::F32);
            for sequence in 0..sequences {
                let first = sequence * t + chunk * length;
                pass(&mut mine, dy.view().rows(first..first + length), x.view().rows(first..first + length), length);
            }
            assert!(bits(mine.view()) == bits(whole.view().rows(chunk..chunk + 1)), "{name} part {chunk}");
        }
    }
    // Rows added to a table: the same, without chunks.
    let ids = random_ids(&device, "ids", n, 7);
    let (mut whole, mut parts) = (device.zeros([7, c], Dtype::F32), device.zeros([7, c], Dtype::F32));
    embedding::backward(whole.view_mut(), dy.view(), ids.view(), 0);
    for sequence in 0..sequences {
        let rows = sequence * t..(sequence + 1) * t;
        embedding::backward(parts.view_mut(), dy.view().rows(rows.clone()), ids.view().part(rows, [t]), 0);
    }
    assert!(bits(whole.view()) == bits(parts.view()));
}

#[test]
fn the_tree_adds_adjacent_pairs_and_passes_the_odd_one_up() {
    let device = Device::cpu(1);
    let terms = random(&device, "terms", [7, 5], Dtype::F32, 1.0);
    let x = terms.to_vec::<f32>();
    let total = reduce::tree_rows(terms.view()).to_vec::<f32>();
    for (column, total) in total.iter().enumerate() {
        let x = |row: usize| x[row * 5 + column];
        assert_eq!(*total, ((x(0) + x(1)) + (x(2) + x(3))) + ((x(4) + x(5)) + x(6)));
    }
    assert_eq!(bits(reduce::tree_rows(terms.view().rows(2..3)).view()), bits(terms.view().rows(2..3)));
}

/// The sum of squares in units of 2^-298, as bits from the lowest, by schoolbook addition.
fn square_sum_bits(values: &[f32]) -> Vec<bool> {
    let mut total = vec![false; 800];
    for value in values {
        let exponent = (value.to_bits() >> 23 & 255) as usize;
        let significand = (value.to_bits() & 0x7f_ffff) as u64 + if exponent > 0 { 1 << 23 } else { 0 };
        let (mut square, mut place, mut carry) = (significand * significand, 2 * (exponent.max(1) - 1), false);
        while square > 0 || carry {
            let (a, b) = (total[place], square & 1 == 1);
            total[place] = a ^ b ^ carry;
            carry = (a & b) | (carry & (a | b));
            (square, place) = (square >> 1, place + 1);
        }
    }
    total
}

/// An integer in units of 2^-298, rounded to nearest even.
fn rounded(bits: &[bool]) -> f64 {
    let Some(top) = bits.iter().rposition(|&bit| bit) else { return 0.0 };
    let lowest = (top + 1).saturating_sub(53);
    let mut kept = bits[lowest..=top].iter().rev().fold(0u64, |kept, &bit| kept * 2 + bit as u64);
    let half = lowest > 0 && bits[lowest - 1];
    let more = lowest > 1 && bits[..lowest - 1].contains(&true);
    kept += (half && (more || kept & 1 == 1)) as u64;
    kept as f64 * 2f64.powi(lowest as i32 - 298)
}

fn square_sum(device: &Device, values: &[f32]) -> SquareSum {
    let mut sum = SquareSum::default();
    sum.add([f32s(device, values).view()]);
    sum
}

#[test]
fn squares_are_summed_exactly() {
    let device = Device::cpu(2);
    let extremes = [f32::MAX, f32::MIN_POSITIVE, 1e-45, -1e-45, 3e-42, 1.0, -1.5, 1e20, -7e-20, 0.0, -0.0, f32::MAX, 1e-38];
    let random = |count: u64, spread: f64| -> Vec<f32> {
        let (stream, scale) = (ferrotron::rng::Stream::new(1, "squares"), ferrotron::rng::Stream::new(1, "scale"));
        (0..count).map(|i| (stream.normal(i) * (scale.normal(i) * spread).exp()) as f32).collect()
    };
    let mut cases: Vec<Vec<f32>> = (0..extremes.len()).map(|start| extremes[start..].to_vec()).collect();
    cases.extend([vec![], vec![1e-45; 3], vec![f32::MAX; 70_001], random(1000, 20.0), random(100_003, 1.0)]);
    // Exactly half way between two f64, just above, and half way with an odd last bit: 2^54 + 2, + 2 + tiny, + 2 + 4 in units of 1.
    let tie = vec![2f32.powi(27), 1.0, 1.0];
    cases.extend([tie.clone(), [tie.clone(), vec![1e-45]].concat(), [tie, vec![2.0]].concat()]);
    for values in cases {
        let expected = rounded(&square_sum_bits(&values)).sqrt();
        let sum = square_sum(&device, &values);
        assert!(sum.is_finite());
        assert_eq!(sum.root().to_bits(), expected.to_bits(), "{} values from {:?}", values.len(), values.first());
        assert_eq!(SquareSum::from_bytes(&sum.to_bytes()), sum);
    }
}

#[test]
fn exact_sums_know_no_order() {
    let many = random(&Device::cpu(1), "many", [1_000_003], Dtype::F32, 1e-3).to_vec::<f32>();
    let whole = square_sum(&Device::cpu(1), &many);
    let mut losses = LossTotal::default();
    losses.add(f32s(&Device::cpu(1), &many).view());
    let losses = losses.sum();
    let reversed: Vec<f32> = many.iter().rev().copied().collect();
    assert_eq!(whole, square_sum(&Device::cpu(4), &reversed));
    let (mut parts, mut loss_parts) = (SquareSum::default(), LossSum::default());
    for part in reversed.chunks(77_777) {
        parts.merge(&square_sum(&Device::cpu(2), part));
        let mut loss = LossTotal::default();
        loss.add(f32s(&Device::cpu(2), part).view());
        loss_parts.merge(&LossSum::from_bytes(&loss.sum().to_bytes()));
    }
    assert_eq!((whole, losses), (parts, loss_parts));
    let truth = many.iter().map(|&x| x as f64).sum::<f64>();
    assert!((losses.value() - truth).abs() < 1e-9, "{} {truth}", losses.value());
}
