//! Every operation's backward pass against central differences of its plain definition in f64, on odd shapes, in every dtype.
//!
//! Proves: the formulas of the hand-written gradients, their one rounding, and the chunk rule of gradients that sum over tokens.

#[path = "support/plain.rs"]
mod plain;
mod support;

use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::ops::embedding::RowSums;
use ferrotron::ops::rope::Scaling;
use ferrotron::ops::{activation, cross_entropy, elementwise, embedding, norm, reduce, rope};
use support::{FLOATS, assert_rounded_once, random, random_ids, values};

/// d (dy . f(x)) / dx, by central differences. In f64 they are good to about 1e-9.
fn slope(x: &[f64], dy: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let mut x = x.to_vec();
    let loss = |x: &[f64]| f(x).iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>();
    (0..x.len())
        .map(|i| {
            let (before, h) = (x[i], 1e-5 * x[i].abs().max(1.0));
            x[i] = before + h;
            let above = loss(&x);
            x[i] = before - h;
            let below = loss(&x);
            x[i] = before;
            (above - below) / (2.0 * h)
        })
        .collect()
}

/// The gradient of a weight of c elements in `chunks` rows: row k sees only the k-th part of each sequence of t rows.
fn slope_in_chunks(w: &[f64], dy: &[f64], t: usize, chunks: usize, f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let columns = w.len();
    let of_chunk = |k: usize| {
        let part = |row: usize| row % t / (t / chunks);
        let dy: Vec<f64> = dy.iter().enumerate().map(|(i, &dy)| if part(i / columns) == k { dy } else { 0.0 }).collect();
        slope(w, &dy, &f)
    };
    (0..chunks).flat_map(of_chunk).collect()
}

/// What gradients are added to: ones, so that a pass that overwrites is found out.
fn ones(device: &Device, shape: [usize; 2]) -> Tensor {
    Tensor::from_slice(device, shape, &vec![1f32; shape[0] * shape[1]])
}

fn plus_one(x: Vec<f64>) -> Vec<f64> {
    x.into_iter().map(|x| x + 1.0).collect()
}

#[test]
fn rms_norm() {
    let device = Device::cpu(2);
    for dtype in FLOATS {
        for (n, c, t, chunks) in [(6, 37, 3, 3), (8, 77, 4, 2), (3, 3, 3, 1), (4, 64, 2, 1)] {
            let (x, w) = (random(&device, "x", [n, c], dtype, 1.5), random(&device, "w", [c], dtype, 1.0));
            let dy = random(&device, "dy", [n, c], dtype, 1.0);
            let (xs, ws, dys) = (values(x.view()), values(w.view()), values(dy.view()));
            let (_, r) = norm::rms_forward(x.view(), w.view(), 1e-2);
            let dx = norm::rms_backward(dy.view(), x.view(), w.view(), r.view());
            assert_rounded_once("rms dx", dx.view(), &slope(&xs, &dys, |x| plain::rms(x, &ws, 1e-2)));
            let mut dw = ones(&device, [chunks, c]);
            norm::rms_backward_weight(dw.view_mut(), dy.view(), x.view(), r.view(), t);
            assert_rounded_once("rms dw", dw.view(), &plus_one(slope_in_chunks(&ws, &dys, t, chunks, |w| plain::rms(&xs, w, 1e-2))));
        }
    }
}

#[test]
fn layer_norm() {
    let device = Device::cpu(2);
    for dtype in FLOATS {
        for (n, c, t, chunks) in [(6, 37, 3, 3), (8, 77, 4, 2), (4, 64, 2, 1)] {
            let (x, w) = (random(&device, "x", [n, c], dtype, 1.5), random(&device, "w", [c], dtype, 1.0));
            let (b, dy) = (random(&device, "b", [c], dtype, 1.0), random(&device, "dy", [n, c], dtype, 1.0));
            let (xs, ws, bs, dys) = (values(x.view()), values(w.view()), values(b.view()), values(dy.view()));
            let (_, stats) = norm::layer_forward(x.view(), w.view(), b.view(), 1e-2);
            let dx = norm::layer_backward(dy.view(), x.view(), w.view(), stats.view());
            assert_rounded_once("layer dx", dx.view(), &slope(&xs, &dys, |x| plain::layer(x, &ws, &bs, 1e-2)));
            let (mut dw, mut db) = (ones(&device, [chunks, c]), ones(&device, [chunks, c]));
            norm::layer_backward_weight(dw.view_mut(), dy.view(), x.view(), stats.view(), t);
            reduce::sum_rows(db.view_mut(), dy.view(), t);
            let truth = slope_in_chunks(&ws, &dys, t, chunks, |w| plain::layer(&xs, w, &bs, 1e-2));
            assert_rounded_once("layer dw", dw.view(), &plus_one(truth));
            let truth = slope_in_chunks(&bs, &dys, t, chunks, |b| plain::layer(&xs, &ws, b, 1e-2));
            assert_rounded_once("layer db", db.view(), &plus_one(truth));
        }
    }
}

#[test]
fn activations() {
    let device = Device::cpu(2);
    for dtype in FLOATS {
        for (n, f) in [(3, 37), (5, 16), (1, 1)] {
            let (mut gate_up, dh) = (random(&device, "gate_up", [n, 2 * f], dtype, 3.0), random(&device, "dh", [n, f], dtype, 1.0));
            let truth = slope(&values(gate_up.view()), &values(dh.view()), |x| plain::swiglu(x, f));
            activation::swiglu_backward(dh.view(), gate_up.view_mut());
            assert_rounded_once("swiglu", gate_up.view(), &truth);
            let (mut x, dy) = (random(&device, "x", [n, f], dtype, 2.0), random(&device, "dy", [n, f], dtype, 1.0));
            let truth = slope(&values(x.view()), &values(dy.view()), plain::gelu);
            activation::gelu_backward(dy.view(), x.view_mut());
            assert_rounded_once("gelu", x.view(), &truth);
        }
    }
}

#[test]
fn rotary_positions() {
    let device = Device::cpu(2);
    let (n, width, heads, head_dim) = (7, 34, 3, 10);
    let table = rope::table(&device, head_dim, 100.0, Scaling::None, 50);
    let positions = random_ids(&device, "positions", n, 50);
    for dtype in FLOATS {
        let (x, mut dy) = (random(&device, "x", [n, width], dtype, 1.0), random(&device, "dy", [n, width], dtype, 1.0));
        let (angles, places) = (values(table.view()), positions.to_vec::<u32>());
        let truth = slope(&values(x.view()), &values(dy.view()), |x| plain::rope(x, width, heads, &angles, head_dim, &places));
        rope::backward(dy.view_mut(), heads, head_dim, table.view(), positions.view());
        assert_rounded_once("rope", dy.view(), &truth);
    }
}

/// Rows that count as zero, whatever stands there, get the bits that rows of zeros get, however often is added; the others are left alone.
#[test]
fn fresh_rows_of_an_embedding() {
    for threads in [1, 3] {
        let device = Device::cpu(threads);
        let (n, c, local) = (4000, 37, 700);
        let (mut expected, mut ours, mut fresh) =
            (device.zeros([local, c], Dtype::F32), device.empty([local, c], Dtype::F32), vec![1; local]);
        ours.view_mut().into_slice::<f32>().fill(f32::NAN);
        for name in ["first", "second"] {
            let (ids, dy) = (random_ids(&device, name, n, local as u32 / 2), random(&device, name, [n, c], Dtype::Bf16, 1.0));
            embedding::backward(expected.view_mut(), dy.view(), ids.view(), 0);
            embedding::backward(RowSums { view: ours.view_mut(), fresh: Some(&mut fresh) }, dy.view(), ids.view(), 0);
        }
        let touched = expected.to_vec::<f32>().chunks(c).map(|row| row.iter().any(|x| *x != 0.0)).collect::<Vec<_>>();
        assert!(touched.contains(&true) && touched.contains(&false));
        assert!(touched.iter().zip(&fresh).all(|(touched, fresh)| *touched == (*fresh == 0)));
        let [mut sums, mut plain] = [(); 2].map(|()| random(&device, "sums", [local, c], Dtype::F32, 1.0));
        embedding::add_rows(sums.view_mut(), ours.view(), &fresh);
        elementwise::add(plain.view_mut(), expected.view());
        assert_eq!(sums.to_vec::<f32>(), plain.to_vec::<f32>());
        embedding::clear(ours.view_mut(), &fresh);
        assert_eq!(ours.to_vec::<f32>(), expected.to_vec::<f32>());
    }
}

#[test]
fn embeddings() {
    let device = Device::cpu(2);
    let (n, c, local, first) = (23, 5, 4, 3);
    let ids = random_ids(&device, "ids", n, 10);
    for dtype in FLOATS {
        let (table, dy) = (random(&device, "table", [local, c], dtype, 1.0), random(&device, "dy", [n, c], dtype, 1.0));
        let mut dw = ones(&device, [local, c]);
        embedding::backward(dw.view_mut(), dy.view(), ids.view(), first);
        let names = ids.to_vec::<u32>();
        let truth = slope(&values(table.view()), &values(dy.view()), |w| plain::embedding(&names, w, c, first));
        assert_rounded_once("embedding", dw.view(), &plus_one(truth));
        let mut dw = ones(&device, [10, c]);
        embedding::positions_backward(dw.view_mut(), dy.view(), ids.view());
        let truth = slope(&vec![0.0; 10 * c], &values(dy.view()), |w| plain::embedding(&names, w, c, 0));
        assert_rounded_once("positions", dw.view(), &plus_one(truth));
    }
}

#[test]
fn losses() {
    let device = Device::cpu(2);
    let (n, v) = (9, 53);
    let mut names = random_ids(&device, "targets", n, v as u32).to_vec::<u32>();
    names[4] = cross_entropy::IGNORED;
    let targets = Tensor::from_slice(&device, [n], &names);
    let places: Vec<Option<usize>> = names.iter().map(|&name| (name != cross_entropy::IGNORED).then_some(name as usize)).collect();
    for dtype in FLOATS {
        let mut logits = random(&device, "logits", [n, v], dtype, 3.0);
        let truth = slope(&values(logits.view()), &[0.25; 9], |x| plain::cross_entropy(x, &places, v));
        let (max, parts) = cross_entropy::row_max(logits.view(), 16);
        let sums = cross_entropy::sums(logits.view(), max.view(), &parts, targets.view(), 0, 16);
        cross_entropy::finish(logits.view_mut(), max.view(), sums.view(), targets.view(), 0, 0.25);
        assert_rounded_once("cross-entropy", logits.view(), &truth);
        assert!(values(logits.view())[4 * v..5 * v].iter().all(|&x| x == 0.0));
    }
}
