//! Norms: sums over rows in another order than the CPU's, which depends on the length of a row alone.

use crate::{Close, DTYPES, gpus, of, random, same};
use ferrotron::device::Device;
use ferrotron::device::tensor::{Tensor, View};
use ferrotron::dtype::Dtype;
use ferrotron::ops::{elementwise, norm};

const EPS: f32 = 1e-5;
const SUMS: Close = Close::Share(1e-6);

/// Rows and columns: less than a pack, one warp for a row, several rows in a block, teams of two to thirty-two warps, rows of single elements.
const SHAPES: [(usize, usize); 11] =
    [(1, 1), (3, 7), (17, 8), (9, 64), (2, 200), (9, 500), (2, 1001), (3, 1024), (2, 2056), (1, 4100), (1, 8192)];

struct Operands {
    x: Tensor,
    addend: Tensor,
    dy: Tensor,
    w: Tensor,
    b: Tensor,
}

fn operands(device: &Device, n: usize, c: usize, dtype: Dtype) -> Operands {
    let plus_one = |mut w: Tensor| {
        let ones = of(device, &[c], dtype, &vec![1.0; c]);
        elementwise::add(w.view_mut(), ones.view());
        w
    };
    Operands {
        x: random(device, "x", &[n, c], dtype, 2.0),
        addend: random(device, "addend", &[n, c], dtype, 1.0),
        dy: random(device, "dy", &[n, c], dtype, 1.0),
        w: plus_one(random(device, "w", &[c], dtype, 0.2)),
        b: random(device, "b", &[c], dtype, 0.3),
    }
}

fn rms(of: &Operands) -> Vec<Tensor> {
    let Operands { x, addend, dy, w, .. } = of;
    let (y, r) = norm::rms_forward(x.view(), w.view(), EPS);
    equal(&y, &norm::rms_again(x.view(), w.view(), r.view()), "y again");
    let sum = plus(x, addend);
    let mut stream = x.duplicate();
    let fused = norm::rms_forward_add(stream.view_mut(), addend.view(), w.view(), EPS);
    let two = norm::rms_forward(sum.view(), w.view(), EPS);
    equal(&stream, &sum, "x + addend");
    equal(&fused.0, &two.0, "y of the sum");
    equal(&fused.1, &two.1, "r of the sum");
    let dx = norm::rms_backward(dy.view(), x.view(), w.view(), r.view());
    let fused = norm::rms_backward_add(dy.view(), x.view(), w.view(), r.view(), addend.view());
    equal(&fused, &plus(&dx, addend), "dx + addend");
    vec![y, r, dx]
}

fn layer(of: &Operands) -> Vec<Tensor> {
    let Operands { x, addend, dy, w, b } = of;
    let (y, stats) = norm::layer_forward(x.view(), w.view(), b.view(), EPS);
    equal(&y, &norm::layer_again(x.view(), w.view(), b.view(), stats.view()), "y again");
    let sum = plus(x, addend);
    let mut stream = x.duplicate();
    let fused = norm::layer_forward_add(stream.view_mut(), addend.view(), w.view(), b.view(), EPS);
    let two = norm::layer_forward(sum.view(), w.view(), b.view(), EPS);
    equal(&stream, &sum, "x + addend");
    equal(&fused.0, &two.0, "y of the sum");
    equal(&fused.1, &two.1, "statistics of the sum");
    let dx = norm::layer_backward(dy.view(), x.view(), w.view(), stats.view());
    let fused = norm::layer_backward_add(dy.view(), x.view(), w.view(), stats.view(), addend.view());
    equal(&fused, &plus(&dx, addend), "dx + addend");
    vec![y, stats, dx]
}

fn plus(x: &Tensor, addend: &Tensor) -> Tensor {
    let mut sum = x.duplicate();
    elementwise::add(sum.view_mut(), addend.view());
    sum
}

/// What is fused, or computed again, has the bits of the plain operations, on every device.
fn equal(a: &Tensor, b: &Tensor, what: &str) {
    assert!(a.view().to_bytes() == b.view().to_bytes(), "{what} of rows {} of {}", a.shape(), a.dtype());
}

// All shapes on one device: an emulated GPU reads the kernels' text anew, and there are many of them.

#[test]
fn rows_of_all_lengths() {
    for dtype in DTYPES {
        same(&format!("rms {dtype}"), SUMS, |device| SHAPES.iter().flat_map(|&(n, c)| rms(&operands(device, n, c, dtype))).collect());
        // The gradient of a norm of one or two elements is a difference of what is all but equal.
        let wide = || SHAPES.iter().filter(|(_, c)| *c > 2);
        same(&format!("layer {dtype}"), SUMS, |device| wide().flat_map(|&(n, c)| layer(&operands(device, n, c, dtype))).collect());
    }
}

/// Rows longer than the registers of a team hold. The CPU adds a thousand squares in each of its lanes, one after the other.
#[test]
fn rows_longer_than_any() {
    for dtype in DTYPES {
        same(&format!("a long row {dtype}"), Close::Share(3e-6), |device| {
            let of = operands(device, 1, if dtype == Dtype::F32 { 16_392 } else { 32_776 }, dtype);
            rms(&of).into_iter().chain(layer(&of)).collect()
        });
    }
}

/// A row's result is that row's alone: the same bits at any place in memory, in any company.
#[test]
fn windows_that_begin_anywhere() {
    for dtype in DTYPES {
        for c in [24usize, 7, 1032] {
            let n = 10;
            for (_, device) in gpus().into_iter().take(1) {
                let all = operands(&device, n, c, dtype);
                let whole = norm::rms_forward(all.x.view(), all.w.view(), EPS).0.view().to_bytes();
                let dx = |dy: View<'_>, x: View<'_>| {
                    let (_, stats) = norm::layer_forward(x, all.w.view(), all.b.view(), EPS);
                    norm::layer_backward(dy, x, all.w.view(), stats.view()).view().to_bytes()
                };
                let whole_dx = dx(all.dy.view(), all.x.view());
                for start in [1usize, 3, 8] {
                    let mut moved = device.zeros([n * c + start], dtype);
                    moved.view_mut().part(start..start + n * c, [n * c]).copy_from(all.x.view().reshape([n * c]));
                    let x = moved.view().part(start..start + n * c, [n, c]);
                    for rows in [0..n, 3..4, 5..n] {
                        let bytes = rows.start * c * dtype.bytes()..rows.end * c * dtype.bytes();
                        let y = norm::rms_forward(x.rows(rows.clone()), all.w.view(), EPS).0;
                        assert!(y.view().to_bytes() == whole[bytes.clone()], "{dtype}, rows {rows:?} of {c} from {start}");
                        let part = dx(all.dy.view().rows(rows.clone()), x.rows(rows.clone()));
                        assert!(part == whole_dx[bytes], "{dtype}, gradient of rows {rows:?} of {c} from {start}");
                    }
                }
                device.check().expect("nothing has failed");
            }
        }
    }
}

/// Sequences, rows of each, chunks, columns.
const SUMMED: [(usize, usize, usize, usize); 8] =
    [(1, 1, 1, 1), (2, 4, 4, 7), (1, 64, 1, 256), (3, 130, 2, 24), (1, 129, 1, 264), (6, 8, 1, 1001), (2, 1100, 1, 8), (9, 70, 1, 33)];

#[test]
fn gradients_of_weights() {
    for dtype in DTYPES {
        same(&format!("backward_weight {dtype}"), SUMS, |device| {
            let both = |&(sequences, t, chunks, c): &(usize, usize, usize, usize)| {
                let Operands { x, dy, w, b, .. } = operands(device, sequences * t, c, dtype);
                let (_, r) = norm::rms_forward(x.view(), w.view(), EPS);
                let (_, stats) = norm::layer_forward(x.view(), w.view(), b.view(), EPS);
                let [mut rms, mut layer] = ["dw", "dw of layer"].map(|name| random(device, name, &[chunks, c], Dtype::F32, 0.1));
                norm::rms_backward_weight(rms.view_mut(), dy.view(), x.view(), r.view(), t);
                norm::layer_backward_weight(layer.view_mut(), dy.view(), x.view(), stats.view(), t);
                [rms, layer]
            };
            SUMMED.iter().flat_map(both).collect()
        });
    }
}

/// All sequences in one call or one after the other, in packs or not, one chunk or all: the same bits.
#[test]
fn a_weights_gradient_depends_on_the_chunk_rule_alone() {
    let (sequences, t, chunks, c) = (6, 140, 2, 64);
    for dtype in DTYPES {
        for (_, device) in gpus().into_iter().take(1) {
            let of = operands(&device, sequences * t, c, dtype);
            let (_, r) = norm::rms_forward(of.x.view(), of.w.view(), EPS);
            let start = || random(&device, "dw", &[chunks, c], Dtype::F32, 0.1);
            let mut whole = start();
            norm::rms_backward_weight(whole.view_mut(), of.dy.view(), of.x.view(), r.view(), t);
            let mut by_one = start();
            for sequence in 0..sequences {
                let rows = sequence * t..(sequence + 1) * t;
                let r = r.view().part(rows.clone(), [t]);
                norm::rms_backward_weight(by_one.view_mut(), of.dy.view().rows(rows.clone()), of.x.view().rows(rows), r, t);
            }
            assert_eq!(whole.view().to_bytes(), by_one.view().to_bytes(), "{dtype}: sequence after sequence");
            // One part on its own, from an address that is no multiple of a pack.
            let part = t / chunks;
            let mut alone = start();
            let mut moved = device.zeros([part * c + 1], dtype);
            for sequence in 0..sequences {
                let rows = sequence * t + part..(sequence + 1) * t;
                moved.view_mut().part(1..part * c + 1, [part, c]).copy_from(of.x.view().rows(rows.clone()));
                let (x, r) = (moved.view().part(1..part * c + 1, [part, c]), r.view().part(rows.clone(), [part]));
                norm::rms_backward_weight(alone.view_mut().rows(1..2), of.dy.view().rows(rows), x, r, part);
            }
            assert_eq!(whole.view().rows(1..2).to_bytes(), alone.view().rows(1..2).to_bytes(), "{dtype}: the second chunk");
            device.check().expect("nothing has failed");
        }
    }
}

/// Rows of zeros, of numbers whose squares overflow, of infinities and of NaN.
#[test]
fn awkward_rows() {
    for dtype in DTYPES {
        same(&format!("awkward rows {dtype}"), SUMS, |device| {
            let mut all = Vec::new();
            for (c, value) in
                [5, 40].into_iter().flat_map(|c| [0.0, 1e-30, 60_000.0, 3e30, f32::INFINITY, f32::NAN].map(|value| (c, value)))
            {
                let Operands { w, b, dy, .. } = operands(device, 2, c, dtype);
                let x = of(device, &[2, c], dtype, &vec![value; 2 * c]);
                let (y, r) = norm::rms_forward(x.view(), w.view(), EPS);
                let dx = norm::rms_backward(dy.view(), x.view(), w.view(), r.view());
                all.extend([y, r, dx]);
                // The variance of equal numbers is what rounding leaves of it, unless it is none at all.
                if value == 0.0 || !value.is_finite() {
                    all.push(norm::layer_forward(x.view(), w.view(), b.view(), EPS).0);
                }
            }
            all
        });
    }
}
