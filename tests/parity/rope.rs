//! Rotary positions: element by element, bits are those of the CPU.

use crate::{Close, DTYPES, gpus, random, random_ids, same};
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::ops::rope::{self, Scaling};

const LLAMA: Scaling = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 64 };

#[test]
fn tables() {
    for scaling in [Scaling::None, LLAMA] {
        same("table", Close::Bits, |device| {
            vec![rope::table(device, 6, 10_000.0, scaling, 33), rope::table(device, 64, 5e5, scaling, 100)]
        });
    }
}

/// Rows, heads that turn, elements of a head, columns behind them.
#[test]
fn heads_of_all_sizes() {
    for dtype in DTYPES {
        for (n, heads, head_dim, rest) in
            [(1, 1, 2, 0), (5, 3, 6, 7), (7, 2, 16, 8), (9, 3, 64, 64), (3, 5, 128, 1), (0, 1, 8, 0), (4, 40, 128, 0)]
        {
            same(&format!("rope {dtype} {n} rows, {heads} x {head_dim} + {rest}"), Close::Bits, |device| {
                let table = rope::table(device, head_dim, 10_000.0, LLAMA, 50);
                let positions = random_ids(device, "positions", n, 50);
                let shape = [n, heads * head_dim + rest];
                let [mut there, mut back] = ["there", "back"].map(|name| random(device, name, &shape, dtype, 1.0));
                rope::forward(there.view_mut(), heads, head_dim, table.view(), positions.view());
                rope::backward(back.view_mut(), heads, head_dim, table.view(), positions.view());
                vec![there, back]
            });
        }
    }
}

#[test]
fn windows_that_begin_anywhere() {
    for dtype in DTYPES {
        for start in [1usize, 8, 16] {
            same(&format!("rope {dtype} from {start}"), Close::Bits, |device| {
                let table = rope::table(device, 16, 10_000.0, Scaling::None, 50);
                let positions = random_ids(device, "positions", 4, 50);
                let mut x = random(device, "x", &[300], dtype, 1.0);
                let window = x.view_mut().part(start..start + 4 * 56, [4, 56]);
                rope::forward(window, 3, 16, table.view(), positions.view());
                vec![x]
            });
        }
    }
}

#[test]
fn a_position_beyond_the_table_is_an_error() {
    for (order, device) in gpus() {
        // There is memory behind the table's end, so that nothing else would notice.
        let table = rope::table(&device, 8, 10_000.0, Scaling::None, 10);
        let positions = Tensor::from_slice(&device, [2], &[3u32, 4]);
        let mut x = random(&device, "x", &[2, 8], Dtype::F32, 1.0);
        rope::forward(x.view_mut(), 1, 8, table.view().rows(0..4), positions.view());
        let error = device.check().expect_err("position 4 of 4").to_string();
        assert!(error.contains("rope_turn_f32"), "{order}: {error}");
    }
}
