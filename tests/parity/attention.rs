//! Attention on a GPU: all widths of heads, groups, windows, documents and lengths around the tiles of its kernels.
//!
//! A narrow weight rounds relative to a maximum, which depends on the blocks of keys: with a maximum other than the CPU's, a weight differs by up
//! to one rounding of its own, and a sum of them by a share of a typical element. f32 knows no such rounding.

use crate::{Close, DTYPES, random, same};
use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::ops::attention::{self, Heads, Mask};
use ferrotron::rng::Stream;

#[derive(Clone, Copy)]
struct Case {
    heads: Heads,
    t: usize,
    sequences: usize,
    window: Option<usize>,
    documents: bool,
}

fn case(heads: [usize; 3], t: usize, sequences: usize) -> Case {
    let [query, kv, dim] = heads;
    Case { heads: Heads { query, kv, dim }, t, sequences, window: None, documents: false }
}

impl Case {
    fn window(self, window: usize) -> Case {
        Case { window: Some(window), ..self }
    }

    fn documents(self) -> Case {
        Case { documents: true, ..self }
    }

    fn describe(&self, dtype: Dtype) -> String {
        format!("{dtype} {:?} t {} x {} window {:?} documents {}", self.heads, self.t, self.sequences, self.window, self.documents)
    }

    fn starts(&self) -> Vec<u32> {
        let stream = Stream::new(5, "documents");
        let mut starts = Vec::new();
        for row in 0..self.t * self.sequences {
            let new = self.documents && stream.uniform(row as u64) < 0.03;
            let before = if row % self.t == 0 { 0 } else { starts[row - 1] };
            starts.push(if new { (row % self.t) as u32 } else { before });
        }
        starts
    }

    fn inputs(&self, device: &Device, dtype: Dtype) -> [Tensor; 3] {
        let n = self.t * self.sequences;
        let qkv = random(device, "qkv", &[n, self.heads.columns()], dtype, 1.0);
        let dout = random(device, "dout", &[n, self.heads.query * self.heads.dim], dtype, 1.0);
        [qkv, dout, Tensor::from_slice(device, [n], &self.starts())]
    }

    /// o, lse, dqkv.
    fn run(&self, device: &Device, dtype: Dtype) -> Vec<Tensor> {
        let [qkv, dout, starts] = self.inputs(device, dtype);
        let mask = Mask { t: self.t, starts: starts.view(), window: self.window };
        let (o, lse) = attention::forward(qkv.view(), self.heads, mask);
        let dqkv = attention::backward(dout.view(), qkv.view(), o.view(), lse.view(), self.heads, mask);
        vec![o, lse, dqkv]
    }
}

fn close(dtype: Dtype) -> Close {
    Close::Share(match dtype {
        Dtype::F32 => 1e-6,
        Dtype::Bf16 => 1.6e-2,
        _ => 2e-3,
    })
}

fn check(cases: &[Case]) {
    for case in cases {
        for dtype in DTYPES {
            same(&case.describe(dtype), close(dtype), |device| case.run(device, dtype));
        }
    }
}

#[test]
fn lengths_around_tiles() {
    check(&[case([1, 1, 64], 1, 3), case([2, 1, 64], 7, 2), case([1, 1, 64], 64, 1), case([2, 2, 64], 129, 1), case([1, 1, 128], 100, 2)]);
}

#[test]
fn widths_of_heads() {
    check(&[16, 24, 80, 96, 128].map(|dim| case([2, 1, dim], 70, 1)));
}

#[test]
fn heads_that_are_no_whole_chunks() {
    check(&[case([3, 1, 7], 20, 2), case([2, 2, 33], 65, 1), case([1, 1, 200], 40, 1), case([1, 1, 256], 70, 1)]);
}

#[test]
fn groups() {
    check(&[case([4, 1, 16], 50, 2), case([8, 2, 32], 33, 1), case([8, 2, 128], 130, 1)]);
}

#[test]
fn windows_and_documents() {
    check(&[
        case([2, 1, 64], 200, 1).window(50),
        case([2, 2, 32], 200, 2).window(1).documents(),
        case([1, 1, 96], 200, 1).documents(),
        case([2, 1, 128], 200, 2).window(130).documents(),
    ]);
}
