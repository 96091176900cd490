//! Activations: element by element, bits are those of the CPU.

use crate::{AWKWARD, Close, DTYPES, of, random, same};
use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use ferrotron::ops::activation;

fn swiglu(mut gate_up: Tensor, dh: &Tensor) -> Vec<Tensor> {
    let h = activation::swiglu_forward(gate_up.view());
    activation::swiglu_backward(dh.view(), gate_up.view_mut());
    vec![h, gate_up]
}

fn gelu(mut x: Tensor, dy: &Tensor) -> Vec<Tensor> {
    let y = activation::gelu_forward(x.view());
    activation::gelu_backward(dy.view(), x.view_mut());
    vec![y, x]
}

#[test]
fn swiglu_of_all_widths() {
    for dtype in DTYPES {
        for (n, f) in [(0, 8), (1, 1), (3, 7), (5, 8), (70, 24), (2, 2051), (3, 2056)] {
            same(&format!("swiglu {dtype} {n} {f}"), Close::Bits, |device| {
                let gate_up = random(device, "gate_up", &[n, 2 * f], dtype, 4.0);
                swiglu(gate_up, &random(device, "dh", &[n, f], dtype, 1.0))
            });
        }
    }
}

#[test]
fn gelu_of_all_counts() {
    for dtype in DTYPES {
        for count in [0, 1, 7, 8, 63, 2048, 5003] {
            same(&format!("gelu {dtype} {count}"), Close::Bits, |device| {
                gelu(random(device, "x", &[count], dtype, 4.0), &random(device, "dy", &[count], dtype, 1.0))
            });
        }
    }
}

#[test]
fn windows_that_begin_anywhere() {
    for dtype in DTYPES {
        for start in [1usize, 8] {
            same(&format!("activations {dtype} from {start}"), Close::Bits, |device| {
                let (x, dy) = (random(device, "x", &[300], dtype, 4.0), random(device, "dy", &[300], dtype, 1.0));
                let [mut by_gelu, mut by_swiglu] = [x.duplicate(), x.duplicate()];
                let (x, dy) = (x.view().part(start..start + 256, [8, 32]), dy.view().part(0..128, [8, 16]));
                let gelu = activation::gelu_forward(x);
                activation::gelu_backward(gelu.view(), by_gelu.view_mut().part(start..start + 256, [8, 32]));
                let swiglu = activation::swiglu_forward(x);
                activation::swiglu_backward(dy, by_swiglu.view_mut().part(start..start + 256, [8, 32]));
                vec![gelu, swiglu, by_gelu, by_swiglu]
            });
        }
    }
}

/// Gates that go through all of the exponential: to where it ends, and beyond.
#[test]
fn awkward_numbers() {
    let ends = [-1000.0, -104.0, -103.9, -89.0, -88.0, -87.4, -10.1, -10.0, -9.9, 9.9, 10.0, 10.1, 16.7, 87.0, 88.1, 89.5, 1000.0, 1e-8];
    let values: Vec<f32> = AWKWARD.into_iter().chain(ends).collect();
    let pairs: Vec<f32> = values.iter().flat_map(|&gate| AWKWARD.map(|up| [gate, up])).flatten().collect();
    for dtype in DTYPES {
        same(&format!("swiglu {dtype}"), Close::Bits, |device| {
            let n = pairs.len() / 2;
            swiglu(of(device, &[n, 2], dtype, &pairs), &random(device, "dh", &[n, 1], dtype, 1.0))
        });
        let count = values.len() * AWKWARD.len();
        let column = |device: &Device, which: usize| {
            of(device, &[count], dtype, &pairs.iter().skip(which).step_by(2).copied().collect::<Vec<f32>>())
        };
        same(&format!("gelu {dtype}"), Close::Bits, |device| gelu(column(device, 0), &column(device, 1)));
    }
}
