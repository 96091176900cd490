//! Products, which a real GPU leaves to its library: close to the CPU's, in every shape and wherever operands begin, and of bits that tell
//! nothing of how many rows a call has.

use crate::{Close, DTYPES, gpus, random, same};
use ferrotron::device::Device;
use ferrotron::dtype::Dtype;
use ferrotron::ops::matmul;

/// Rows, outputs and inputs.
const SHAPES: [(usize, usize, usize); 7] = [(1, 1, 1), (3, 5, 7), (1, 64, 192), (33, 17, 65), (64, 128, 96), (130, 257, 72), (16, 8, 515)];

/// Of their norm; a library sums in an order of its own.
const SHARE: f64 = 2e-6;

#[test]
fn products_and_their_gradients() {
    for dtype in DTYPES {
        for (n, o, i) in SHAPES {
            same(&format!("matmul {dtype} {n} {o} {i}"), Close::Share(SHARE), |device| {
                let [x, w, dy, bias] = [("x", [n, i]), ("w", [o, i]), ("dy", [n, o]), ("bias", [1, o])]
                    .map(|(name, shape)| random(device, name, &shape, dtype, 1.0));
                let mut dw = random(device, "dw", &[o, i], Dtype::F32, 1.0);
                matmul::backward_weight(dw.view_mut(), dy.view(), x.view(), n);
                let y = matmul::forward(x.view(), w.view(), matmul::WHOLE);
                let biased = matmul::forward_bias(x.view(), w.view(), bias.reshape([o]).view(), matmul::WHOLE);
                vec![y, biased, matmul::backward_input(dy.view(), w.view()), dw]
            });
        }
    }
}

#[test]
fn a_sum_that_is_cut() {
    let (n, o, i) = (9, 24, 96);
    for dtype in DTYPES {
        // Parts are rounded before they are added: a rounding that goes the other way shows in the sum as more than one.
        let share = if dtype == Dtype::F32 { SHARE } else { 2e-2 };
        for shard in [24, 32, 48] {
            same(&format!("matmul {dtype} cut at {shard}"), Close::Share(share), |device| {
                let (x, w) = (random(device, "x", &[n, i], dtype, 1.0), random(device, "w", &[o, i], dtype, 1.0));
                vec![matmul::forward(x.view(), w.view(), shard)]
            });
        }
    }
}

#[test]
fn windows_that_begin_anywhere() {
    let (n, o, i) = (20, 24, 40);
    for dtype in DTYPES {
        for start in [1, 3, 8] {
            same(&format!("matmul {dtype} from {start}"), Close::Share(SHARE), |device| {
                let x = random(device, "x", &[start + n * i], dtype, 1.0);
                let w = random(device, "w", &[start + o * i], dtype, 1.0);
                let (x, w) = (x.view().part(start..start + n * i, [n, i]), w.view().part(start..start + o * i, [o, i]));
                vec![matmul::forward(x, w, matmul::WHOLE)]
            });
        }
    }
}

#[test]
fn a_row_depends_on_nothing_but_itself() {
    let (n, o, i) = (70, 96, 136);
    for dtype in DTYPES {
        for (order, device) in gpus() {
            let bits = |device: &Device| {
                let (x, w) = (random(device, "x", &[n, i], dtype, 1.0), random(device, "w", &[o, i], dtype, 1.0));
                let whole = matmul::forward(x.view(), w.view(), matmul::WHOLE);
                let parts = [0..1, 1..34, 34..n].map(|rows| {
                    let part = matmul::forward(x.view().rows(rows.clone()), w.view(), matmul::WHOLE);
                    (whole.view().rows(rows.clone()).to_bytes() == part.view().to_bytes(), rows)
                });
                device.check().unwrap_or_else(|error| panic!("{dtype}, {order}: {error:#}"));
                parts
            };
            bits(&device).into_iter().for_each(|(equal, rows)| assert!(equal, "{dtype}, {order}: rows {rows:?} alone have other bits"));
        }
    }
}
