//! Products by kernels of our own: close to the CPU's (f32: its bits), in every form, shape and tile, wherever operands begin, and of bits that
//! tell nothing of how many rows and columns a call has. What a GPU's library does instead is held to the same on a real one.

use crate::{AWKWARD, Close, DTYPES, REAL, difference, golden, gpus, of, random, same};
use ferrotron::device::Device;
use ferrotron::device::gpu::driver::{Gemm, Operand, Order};
use ferrotron::device::gpu::matmul::{Edge, Launch, launch_in};
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::ops::matmul;
use ferrotron::train::promise;

/// Rows, outputs and inputs.
const SHAPES: [(usize, usize, usize); 8] =
    [(1, 1, 1), (3, 5, 7), (1, 64, 192), (33, 17, 65), (64, 128, 96), (130, 72, 80), (16, 8, 515), (70, 66, 31)];

/// Of their norm: matrix units sum in an order of their own.
const SHARE: f64 = 2e-6;

/// A chain over K in order, fused, has the CPU's bits.
fn close(dtype: Dtype) -> Close {
    if dtype == Dtype::F32 { Close::Bits } else { Close::Share(SHARE) }
}

fn operands(device: &Device, dtype: Dtype, (n, o, i): (usize, usize, usize)) -> [Tensor; 5] {
    let [x, w, dy, bias] =
        [("x", [n, i]), ("w", [o, i]), ("dy", [n, o]), ("bias", [1, o])].map(|(name, shape)| random(device, name, &shape, dtype, 1.0));
    [x, w, dy, bias.reshape([o]), random(device, "dw", &[o, i], Dtype::F32, 1.0)]
}

/// Every form.
fn all(device: &Device, dtype: Dtype, sizes: (usize, usize, usize)) -> Vec<Tensor> {
    let [x, w, dy, bias, mut dw] = operands(device, dtype, sizes);
    matmul::backward_weight(dw.view_mut(), dy.view(), x.view(), sizes.0);
    let y = matmul::forward(x.view(), w.view(), matmul::WHOLE);
    let biased = matmul::forward_bias(x.view(), w.view(), bias.view(), matmul::WHOLE);
    vec![y, biased, matmul::backward_input(dy.view(), w.view()), dw]
}

#[test]
fn products_and_their_gradients() {
    for dtype in DTYPES {
        for sizes in SHAPES {
            let (n, o, i) = sizes;
            same(&format!("matmul {dtype} {n} {o} {i}"), close(dtype), |device| all(device, dtype, sizes));
        }
    }
}

/// A GPU's library, and what an emulated one has in its place.
#[test]
fn products_of_a_library() {
    let real = golden::real().map(|(device, _)| device);
    for device in [Some(Device::emulated(None, false, 1)), real].into_iter().flatten() {
        for dtype in DTYPES {
            promise::check(&device, dtype).unwrap_or_else(|error| panic!("{error:#}"));
            for sizes in SHAPES {
                let (got, expected) = (all(&device, dtype, sizes), all(&Device::cpu(1), dtype, sizes));
                device.check().unwrap_or_else(|error| panic!("{dtype} {sizes:?}: {error:#}"));
                for (got, expected) in got.iter().zip(&expected) {
                    let problem = difference(got, expected, Close::Share(SHARE));
                    assert!(problem.is_none(), "{dtype} {sizes:?} by {}: {}", device.name(), problem.unwrap_or_default());
                }
            }
        }
    }
}

#[test]
fn a_sum_that_is_cut() {
    let (n, o, i) = (9, 24, 96);
    for dtype in DTYPES {
        // Parts are rounded before they are added: a rounding that goes the other way shows in the sum as more than one.
        let close = if dtype == Dtype::F32 { Close::Bits } else { Close::Share(2e-2) };
        for shard in [20, 24, 32, 48] {
            same(&format!("matmul {dtype} cut at {shard}"), close, |device| {
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
            same(&format!("matmul {dtype} from {start}"), close(dtype), |device| {
                let window = |name: &str, shape: [usize; 2]| {
                    let all = random(device, name, &[start + shape[0] * shape[1]], dtype, 1.0);
                    (all, start..start + shape[0] * shape[1], shape)
                };
                let [x, w, dy] = [window("x", [n, i]), window("w", [o, i]), window("dy", [n, o])];
                let [x, w, dy] = [&x, &w, &dy].map(|(all, part, shape)| all.view().part(part.clone(), *shape));
                let mut dw = random(device, "dw", &[start + o * i], Dtype::F32, 1.0);
                matmul::backward_weight(dw.view_mut().part(start..start + o * i, [o, i]), dy, x, n);
                vec![matmul::forward(x, w, matmul::WHOLE), matmul::backward_input(dy, w), dw]
            });
        }
    }
}

#[test]
fn awkward_numbers() {
    let (n, o, i) = (13, 14, 12);
    for dtype in DTYPES {
        same(&format!("matmul {dtype} of awkward numbers"), close(dtype), |device| {
            // In a row of x, one number is not an ordinary one; a row of w is zeros.
            let ordinary = |row: usize, column: usize| (row * 7 + column * 3) as f32 % 11.0 - 5.0;
            let values = |row: usize, column: usize| if column == 5 && row < 12 { AWKWARD[row] } else { ordinary(row, column) };
            let x: Vec<f32> = (0..n * i).map(|at| values(at / i, at % i)).collect();
            let w: Vec<f32> = (0..o * i).map(|at| if at / i == 3 { 0.0 } else { ordinary(at % i, at / i) }).collect();
            let (x, w) = (of(device, &[n, i], dtype, &x), of(device, &[o, i], dtype, &w));
            vec![
                matmul::forward(x.view(), w.view(), matmul::WHOLE),
                matmul::backward_input(x.view(), random(device, "w", &[i, 9], dtype, 1.0).view()),
            ]
        });
    }
}

/// The result of `gemm`'s kernel for tiles of `edge`.
fn in_tiles(device: &Device, edge: Edge, dtype: Dtype, form: usize, [a, b, bias]: [&Tensor; 3], [m, n, k]: [usize; 3]) -> Tensor {
    let (inner, outer) = (Order::SummedInner, Order::SummedOuter);
    let (orders, accumulate) = [([inner, inner], false), ([inner, outer], false), ([outer, outer], true)][form];
    let operand = |x: &Tensor, order: Order, rows: usize| Operand {
        address: x.view().address(),
        stride: if order == inner { k } else { rows },
        order,
    };
    let out = if accumulate { random(device, "out", &[m, n], Dtype::F32, 1.0) } else { device.zeros([m, n], dtype) };
    let bias = (form == 0).then(|| bias.view().address());
    let gemm =
        Gemm { dtype, m, n, k, a: operand(a, orders[0], m), b: operand(b, orders[1], n), out: out.view().address(), accumulate, bias };
    let Launch { kernel, grid, arguments } = launch_in(&gemm, edge).expect("a form that there is");
    let Device::Gpu(gpu) = device else { panic!("kernels run on GPUs") };
    gpu.launch(&kernel, grid, &arguments);
    out
}

/// Large tiles are for large products, which an emulator has no time for: here they do small ones.
#[test]
fn tiles_of_both_sizes_have_the_same_bits() {
    for dtype in DTYPES {
        for sizes in [[200, 136, 72], [129, 77, 45]] {
            let [m, n, k] = sizes;
            for (order, device) in gpus().into_iter().filter(|(order, _)| ["in order", "seed 3", "checked", REAL].contains(&order.as_str()))
            {
                let [a, b, bias] =
                    [("a", m * k), ("b", n * k), ("bias", n)].map(|(name, count)| random(&device, name, &[count], dtype, 1.0));
                for form in 0..3 {
                    let [small, large] = [Edge::Of64, Edge::Of128]
                        .map(|edge| in_tiles(&device, edge, dtype, form, [&a, &b, &bias], sizes).view().to_bytes());
                    device.check().unwrap_or_else(|error| panic!("{dtype}, form {form}, {order}: {error:#}"));
                    assert!(small == large, "{dtype} {sizes:?}, form {form}, {order}: other bits in large tiles than in small ones");
                }
            }
        }
    }
}

#[test]
fn rows_and_columns_depend_on_nothing_but_themselves() {
    let (n, o, i) = (70, 96, 136);
    for dtype in DTYPES {
        for (order, device) in gpus() {
            let (x, w) = (random(&device, "x", &[n, i], dtype, 1.0), random(&device, "w", &[o, i], dtype, 1.0));
            let whole = matmul::forward(x.view(), w.view(), matmul::WHOLE);
            for rows in [0..1, 1..34, 34..n] {
                let part = matmul::forward(x.view().rows(rows.clone()), w.view(), matmul::WHOLE);
                let equal = whole.view().rows(rows.clone()).to_bytes() == part.view().to_bytes();
                device.check().unwrap_or_else(|error| panic!("{dtype}, {order}: {error:#}"));
                assert!(equal, "{dtype}, {order}: rows {rows:?} alone have other bits");
            }
        }
        for (order, device) in gpus().into_iter().filter(|(order, _)| ["seed 1", REAL].contains(&order.as_str())) {
            promise::check(&device, dtype).unwrap_or_else(|error| panic!("{order}: {error:#}"));
        }
    }
}

#[test]
fn a_product_over_nothing_is_refused() {
    let device = Device::emulated(None, false, 1).with_own_products();
    let (x, w) = (device.zeros([4, 0], Dtype::F32), device.zeros([4, 0], Dtype::F32));
    let Device::Gpu(gpu) = &device else { panic!("a GPU was asked for") };
    let operand = Operand { address: x.view().address(), stride: 1, order: Order::SummedInner };
    let b = Operand { address: w.view().address(), ..operand };
    gpu.gemm(&Gemm { dtype: Dtype::F32, m: 4, n: 4, k: 0, a: operand, b, out: x.view().address(), accumulate: false, bias: None });
    let error = device.check().expect_err("a sum over nothing").to_string();
    assert!(error.contains("a product of 4 x 4 sums over nothing"), "{error}");
}
