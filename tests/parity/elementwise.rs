//! Element by element, bits are those of the CPU.

use crate::{AWKWARD, Close, DTYPES, of, random, same};
use ferrotron::dtype::Dtype;
use ferrotron::ops::elementwise;

/// Counts around whole packs and whole blocks.
const COUNTS: [usize; 7] = [0, 1, 7, 8, 63, 2048, 5003];

#[test]
fn sums_and_casts() {
    for dtype in DTYPES {
        for count in COUNTS {
            same(&format!("add {dtype} {count}"), Close::Bits, |device| {
                let mut y = random(device, "y", &[count], dtype, 1.0);
                elementwise::add(y.view_mut(), random(device, "x", &[count], dtype, 1.0).view());
                vec![y]
            });
            same(&format!("accumulate {dtype} {count}"), Close::Bits, |device| {
                let mut dst = random(device, "y", &[count], Dtype::F32, 1.0);
                elementwise::accumulate(dst.view_mut(), random(device, "x", &[count], dtype, 1.0).view());
                vec![dst]
            });
            for to in DTYPES {
                same(&format!("cast {dtype} to {to} {count}"), Close::Bits, |device| {
                    let mut dst = device.empty([count], to);
                    elementwise::cast(dst.view_mut(), random(device, "x", &[count], dtype, 100.0).view());
                    vec![dst]
                });
            }
        }
    }
}

#[test]
fn windows_that_begin_anywhere() {
    for dtype in DTYPES {
        for (start, other) in [(1, 1), (3, 0), (8, 8), (0, 5)] {
            same(&format!("add {dtype} from {start} and {other}"), Close::Bits, |device| {
                let mut y = random(device, "y", &[300], dtype, 1.0);
                let x = random(device, "x", &[300], dtype, 1.0);
                elementwise::add(y.view_mut().part(start..start + 250, [250]), x.view().part(other..other + 250, [250]));
                vec![y]
            });
        }
    }
}

#[test]
fn scaling_and_biases() {
    for dtype in DTYPES {
        same(&format!("scale {dtype}"), Close::Bits, |device| {
            let mut x = random(device, "x", &[777], dtype, 1.0);
            elementwise::scale(x.view_mut(), 0.3);
            vec![x]
        });
        for (n, c) in [(1, 1), (3, 5), (9, 64), (70, 136), (2, 1000)] {
            same(&format!("add_row {dtype} {n} {c}"), Close::Bits, |device| {
                let mut y = random(device, "y", &[n, c], dtype, 1.0);
                elementwise::add_row(y.view_mut(), random(device, "bias", &[c], dtype, 1.0).view());
                vec![y]
            });
        }
    }
}

#[test]
fn awkward_numbers() {
    for dtype in DTYPES {
        for to in DTYPES {
            same(&format!("cast {dtype} to {to}"), Close::Bits, |device| {
                let mut dst = device.empty([AWKWARD.len()], to);
                elementwise::cast(dst.view_mut(), of(device, &[AWKWARD.len()], dtype, &AWKWARD).view());
                vec![dst]
            });
        }
        same(&format!("add {dtype}"), Close::Bits, |device| {
            let mut y = of(device, &[AWKWARD.len()], dtype, &AWKWARD);
            let reversed: Vec<f32> = AWKWARD.iter().rev().copied().collect();
            elementwise::add(y.view_mut(), of(device, &[AWKWARD.len()], dtype, &reversed).view());
            vec![y]
        });
    }
}
