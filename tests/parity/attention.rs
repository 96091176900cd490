//! Attention on a GPU: all widths of heads, groups, windows, documents and lengths around the tiles of its kernels.
//!
//! A narrow weight rounds relative to a maximum, which depends on the blocks of keys: with a maximum other than the CPU's, a weight differs by up
//! to one rounding of its own, and a sum of them by a share of a typical element. f32 knows no such rounding.

use crate::{Close, DTYPES, floats, of, random, same};
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
    /// Of queries, keys and values: with large ones, a row's greatest score rises from tile to tile.
    size: f64,
}

fn case(heads: [usize; 3], t: usize, sequences: usize) -> Case {
    let [query, kv, dim] = heads;
    Case { heads: Heads { query, kv, dim }, t, sequences, window: None, documents: false, size: 1.0 }
}

impl Case {
    fn window(self, window: usize) -> Case {
        Case { window: Some(window), ..self }
    }

    fn documents(self) -> Case {
        Case { documents: true, ..self }
    }

    fn size(self, size: f64) -> Case {
        Case { size, ..self }
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
        let qkv = random(device, "qkv", &[n, self.heads.columns()], dtype, self.size);
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

/// A score's rounding, which grows with it, is a weight's relative error. Beside sums in f64, the worst gradients of f16 are off by 0.9 % of a
/// typical one on the CPU and by 1.3 % on a GPU where scores are nine times as large, of either sign: apart by up to their sum.
fn close(dtype: Dtype, size: f64) -> Close {
    let share = match dtype {
        Dtype::F32 => 1e-6,
        Dtype::Bf16 => 1.6e-2,
        _ => 2.5e-3,
    };
    Close::Share(share * size * size)
}

/// Results 0 to 2 are those of the first case, and so on: to read the kernels takes longer than to run them, and is done once for all.
fn check(cases: &[Case]) {
    for dtype in DTYPES {
        let what: Vec<String> = cases.iter().map(|case| case.describe(dtype)).collect();
        same(&what.join("; "), close(dtype, cases[0].size), |device| cases.iter().flat_map(|case| case.run(device, dtype)).collect());
    }
}

#[test]
fn lengths_around_tiles() {
    check(&[case([1, 1, 64], 1, 3), case([2, 1, 64], 7, 2), case([1, 1, 32], 64, 1), case([1, 1, 64], 129, 1), case([1, 1, 128], 100, 1)]);
}

#[test]
fn widths_of_heads() {
    check(&[16, 24, 80, 96, 128].map(|dim| case([1, 1, dim], 40, 1)));
}

#[test]
fn heads_that_are_no_whole_chunks() {
    check(&[case([3, 1, 7], 20, 2), case([2, 2, 33], 35, 1), case([1, 1, 200], 40, 1), case([1, 1, 256], 35, 1)]);
}

#[test]
fn groups() {
    check(&[case([4, 1, 16], 40, 2), case([8, 2, 32], 33, 1)]);
}

#[test]
fn windows_and_documents() {
    check(&[
        case([1, 1, 64], 200, 1).window(50),
        case([2, 2, 32], 70, 2).window(1).documents(),
        case([1, 1, 96], 200, 1).documents(),
        case([1, 1, 128], 150, 2).window(130).documents(),
    ]);
}

#[test]
fn scores_that_rise() {
    check(&[case([1, 1, 64], 200, 1).size(3.0), case([1, 1, 128], 150, 1).size(3.0)]);
}

/// `count` of every `stride` elements, from `first` on.
fn columns(x: &[f32], stride: usize, first: usize, count: usize) -> Vec<f32> {
    x.chunks(stride).flat_map(|row| &row[first..first + count]).copied().collect()
}

#[test]
fn bits_do_not_depend_on_other_sequences_and_heads() {
    let device = Device::emulated(None, false, 1);
    let all = case([4, 2, 24], 140, 3).documents();
    for dtype in DTYPES {
        let n = all.t * all.sequences;
        let [qkv, dout, _] = all.inputs(&device, dtype);
        let [qkv, dout] = [qkv, dout].map(|x| floats(&x));
        let results: Vec<Vec<f32>> = all.run(&device, dtype).iter().map(floats).collect();
        // The second key head of the last sequence, with its two query heads.
        let (dim, rows) = (all.heads.dim, 2 * all.t..n);
        let of_qkv = |x: &[f32]| -> Vec<f32> {
            let row = |row: usize| &x[row * 8 * dim..][..8 * dim];
            rows.clone().flat_map(|at| [&row(at)[2 * dim..4 * dim], &row(at)[5 * dim..6 * dim], &row(at)[7 * dim..]].concat()).collect()
        };
        let part = |x: &[f32], width: usize| columns(&x[rows.start * 4 * width..], 4 * width, 2 * width, 2 * width);
        let heads = Heads { query: 2, kv: 1, dim };
        let qkv = of(&device, &[all.t, heads.columns()], dtype, &of_qkv(&qkv));
        let dout = of(&device, &[all.t, 2 * dim], dtype, &part(&dout, dim));
        let starts = Tensor::from_slice(&device, [all.t], &all.starts()[rows.clone()]);
        let mask = Mask { t: all.t, starts: starts.view(), window: None };
        let (o, lse) = attention::forward(qkv.view(), heads, mask);
        let dqkv = attention::backward(dout.view(), qkv.view(), o.view(), lse.view(), heads, mask);
        assert!(floats(&o) == part(&results[0], dim), "{dtype} o");
        assert!(floats(&lse) == part(&results[1], 1), "{dtype} lse");
        assert!(floats(&dqkv) == of_qkv(&results[2]), "{dtype} dqkv");
    }
}

#[test]
fn views_may_begin_anywhere() {
    let device = Device::emulated(None, true, 1);
    let case = case([2, 1, 32], 70, 1);
    for dtype in DTYPES {
        let results = case.run(&device, dtype);
        let [qkv, dout, starts] = case.inputs(&device, dtype);
        let (o, lse) = (&results[0], &results[1]);
        let moved = |x: &Tensor, by: usize| {
            let mut to = device.zeros([x.shape().numel() + by], x.dtype());
            to.view_mut().part(by..by + x.shape().numel(), x.shape()).copy_from(x.view());
            to
        };
        let tensors = [(&qkv, 1), (&dout, 3), (o, 5), (lse, 1), (&starts, 1)].map(|(x, by)| (moved(x, by), x.shape(), by));
        let [qkv, dout, o, lse, starts] = tensors.each_ref().map(|(x, shape, by)| x.view().part(*by..*by + shape.numel(), *shape));
        let mask = Mask { t: case.t, starts, window: None };
        let again = attention::forward(qkv, case.heads, mask);
        let dqkv = attention::backward(dout, qkv, o, lse, case.heads, mask);
        for (index, (x, expected)) in [again.0, again.1, dqkv].iter().zip(&results).enumerate() {
            assert!(floats(x) == floats(expected), "{dtype} result {index}");
        }
    }
}

#[test]
fn a_row_that_does_not_see_itself_ends_the_kernel() {
    for dtype in DTYPES {
        let device = Device::emulated(None, false, 1);
        let qkv = random(&device, "qkv", &[4, 48], dtype, 1.0);
        let starts = Tensor::from_slice(&device, [4], &[0u32, 2, 0, 0]);
        attention::forward(qkv.view(), Heads { query: 1, kv: 1, dim: 16 }, Mask { t: 4, starts: starts.view(), window: None });
        let error = device.check().expect_err("row 1 sees from 2 on").to_string();
        assert!(error.contains("trap"), "{error}");
    }
}

#[test]
#[should_panic(expected = "heads of up to 256")]
fn wider_heads_are_refused() {
    let device = Device::emulated(None, false, 1);
    case([1, 1, 257], 4, 1).run(&device, Dtype::Bf16);
}
