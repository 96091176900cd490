//! Copies, bit for bit.

use crate::{Close, DTYPES, random, same};
use ferrotron::ops::select;

#[test]
fn columns_rows_and_blocks() {
    for dtype in DTYPES {
        for (n, k) in [(0, 5), (1, 3), (7, 24), (33, 160), (5, 1001)] {
            same(&format!("select {dtype} {n} {k}"), Close::Bits, |device| {
                let x = random(device, "x", &[n, k], dtype, 1.0);
                let ranges = [k - 1..k, 0..k / 3, 2..2, k / 8 * 8 / 2..k / 8 * 8, 1..k];
                vec![select::columns(x.view(), &ranges), select::rows(x.view(), &[n / 2..n, 0..n / 3])]
            });
        }
        for (outer, inner, height, c) in [(1, 1, 1, 1), (2, 3, 1, 8), (3, 2, 5, 7), (4, 4, 2, 64), (2, 2, 1, 6)] {
            same(&format!("swap_blocks {dtype} {outer} x {inner} of {height} x {c}"), Close::Bits, |device| {
                let x = random(device, "x", &[outer * inner * height, c], dtype, 1.0);
                vec![select::swap_blocks(x.view(), outer, inner)]
            });
        }
    }
}

#[test]
fn windows_that_begin_anywhere() {
    for dtype in DTYPES {
        for start in [1usize, 2, 8] {
            same(&format!("select {dtype} from {start}"), Close::Bits, |device| {
                let x = random(device, "x", &[300], dtype, 1.0);
                let x = x.view().part(start..start + 256, [8, 32]);
                vec![select::columns(x, &[8..16, 0..8]), select::swap_blocks(x, 2, 4)]
            });
        }
    }
}
