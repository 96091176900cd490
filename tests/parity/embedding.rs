//! Rows of a table and their gradient have the bits of the CPU.

use crate::{Close, DTYPES, gpus, random, random_ids, same};
use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::ops::embedding;

/// Rows, columns, rows of the part of the table, its first id; ids go up to 60.
const SHAPES: [(usize, usize, usize, usize); 9] = [
    (1, 1, 60, 0),
    (9, 5, 20, 30),
    (70, 8, 60, 0),
    (33, 64, 7, 50),
    (64, 136, 60, 0),
    (5, 1100, 60, 0),
    (100, 260, 30, 30),
    (65, 127, 1, 3),
    (0, 8, 4, 0),
];

#[test]
fn rows_by_id() {
    for dtype in DTYPES {
        for (n, c, local, first) in SHAPES {
            same(&format!("embedding {dtype} {n} {c} {local} {first}"), Close::Bits, |device| {
                let (ids, table) = (random_ids(device, "ids", n, 60), random(device, "table", &[local, c], dtype, 1.0));
                vec![embedding::forward(ids.view(), table.view(), first)]
            });
        }
    }
}

#[test]
fn gradients_by_id() {
    for dtype in DTYPES {
        for (n, c, local, first) in SHAPES {
            for kinds in [60, 2] {
                same(&format!("gradient {dtype} {n} {c} {local} {first}, {kinds} ids"), Close::Bits, |device| {
                    let mut dw = random(device, "dw", &[local, c], Dtype::F32, 1.0);
                    let ids: Vec<u32> = random_ids(device, "ids", n, kinds).to_vec::<u32>().iter().map(|id| id + 60 - kinds).collect();
                    let ids = Tensor::from_slice(device, [n], &ids);
                    embedding::backward(dw.view_mut(), random(device, "dy", &[n, c], dtype, 1.0).view(), ids.view(), first);
                    vec![dw]
                });
            }
        }
    }
}

#[test]
fn windows_that_begin_anywhere() {
    let (n, c, local) = (40, 24, 9);
    for dtype in DTYPES {
        for start in [1, 2, 4] {
            same(&format!("embedding {dtype} from {start}"), Close::Bits, |device| {
                let table = random(device, "table", &[local * c + 8], dtype, 1.0);
                let dy = random(device, "dy", &[n * c + 8], dtype, 1.0);
                let all_ids = random_ids(device, "ids", n + 8, local as u32);
                let ids = all_ids.view().part(start..start + n, [n]);
                let mut dw = random(device, "dw", &[local * c + 8], Dtype::F32, 1.0);
                let mut x = random(device, "x", &[n * c + 8], dtype, 1.0);
                let rows = table.view().part(start..start + local * c, [local, c]);
                let y = embedding::forward(ids, rows, 0);
                embedding::backward(
                    dw.view_mut().part(start..start + local * c, [local, c]),
                    dy.view().part(start..start + n * c, [n, c]),
                    ids,
                    0,
                );
                embedding::positions_forward(x.view_mut().part(start..start + n * c, [n, c]), rows, ids);
                vec![y, dw, x]
            });
        }
    }
}

#[test]
fn positions() {
    for dtype in DTYPES {
        for (n, c, most) in [(1, 1, 1), (50, 12, 25), (33, 520, 40), (7, 1027, 7)] {
            same(&format!("positions {dtype} {n} {c}"), Close::Bits, |device| {
                let positions: Vec<u32> = (0..n).map(|i| (i % most) as u32).collect();
                let positions = Tensor::from_slice(device, [n], &positions);
                let mut x = random(device, "x", &[n, c], dtype, 1.0);
                let mut dw = random(device, "dw", &[most, c], Dtype::F32, 1.0);
                embedding::positions_backward(dw.view_mut(), x.view(), positions.view());
                embedding::positions_forward(x.view_mut(), random(device, "table", &[most, c], dtype, 1.0).view(), positions.view());
                vec![x, dw]
            });
        }
    }
}

#[test]
fn a_position_that_no_table_has() {
    for (order, device) in gpus() {
        let mut x = random(&device, "x", &[3, 8], Dtype::F32, 1.0);
        let positions = Tensor::from_slice(&device, [3], &[0u32, 4, 1]);
        embedding::positions_forward(x.view_mut(), random(&device, "table", &[4, 8], Dtype::F32, 1.0).view(), positions.view());
        let error = device.check().expect_err("there is no row 4").to_string();
        assert!(error.contains("embedding_positions_forward"), "{order}: {error}");
    }
}

/// More rows than are sorted at once, an id that has many of them, and one that has all: the order of the rows goes on.
#[test]
fn many_rows() {
    let (n, c) = (8_192 + 70, 4);
    let all = |device: &Device, kinds: u32| {
        let mut dw = random(device, "dw", &[40, c], Dtype::F32, 1.0);
        let dy = random(device, "dy", &[n, c], Dtype::Bf16, 1.0);
        embedding::backward(dw.view_mut(), dy.view(), random_ids(device, "ids", n, kinds).view(), 0);
        dw.view().to_bytes()
    };
    for kinds in [1, 50] {
        let device = Device::emulated(None, false, 2);
        assert!(all(&device, kinds) == all(&Device::cpu(1), kinds), "{kinds} ids");
        device.check().expect("all kernels have run");
    }
}
