//! Whether a device's matrix products keep what every layout relies on: an element's bits depend on its row, its column and k alone.
//!
//! Of a library nobody can read that; only the GPU at hand can show it. So before a run begins, some rows and columns of a product are
//! computed once more as a smaller product, in each form that `ops/matmul.rs` has, over a short and a long k. It takes milliseconds.
//!
//! Invariant: nobody trains on products that were seen to break the promise, and nobody changes to other ones silently.

use crate::device::Device;
use crate::device::tensor::Tensor;
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::ops::matmul::{self, CHAIN_ROWS, WHOLE};
use crate::rng::Stream;
use anyhow::{Result, bail};
use std::ops::Range;

/// Rows and columns of the whole product: several tiles of any library, and parts of some.
const SIZES: [usize; 2] = [328, 264];

/// Those that are computed again.
const AGAIN: [Range<usize>; 2] = [40..128, 136..208];

/// Of a head, and of the longest chain of a gradient.
const DEPTHS: [usize; 2] = [64, CHAIN_ROWS];

/// Numbers of the operands, [m, k] and [n, k], and of a bias.
struct Operands {
    k: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    bias: Vec<f32>,
}

type Form = (&'static str, fn(&Device, Dtype, &Operands) -> Tensor);

const FORMS: [Form; 4] = [
    ("x w^T", |device, dtype, of| matmul::forward(of.a(device, dtype).view(), of.b(device, dtype).view(), WHOLE)),
    ("x w^T with a bias", |device, dtype, of| {
        let bias = tensor(device, dtype, [1, of.bias.len()], &of.bias).reshape([of.bias.len()]);
        matmul::forward_bias(of.a(device, dtype).view(), of.b(device, dtype).view(), bias.view(), WHOLE)
    }),
    ("dy w", |device, dtype, of| matmul::backward_input(of.a(device, dtype).view(), of.outer(device, dtype, &of.b).view())),
    ("dy^T x, added to f32", |device, dtype, of| {
        let (dy, x) = (of.outer(device, dtype, &of.a), of.outer(device, dtype, &of.b));
        let mut dw = device.zeros([dy.shape().columns(), x.shape().columns()], Dtype::F32);
        matmul::backward_weight(dw.view_mut(), dy.view(), x.view(), of.k);
        dw
    }),
];

/// Fails where a product of `dtype` gives an element other bits than a smaller one with the same rows and columns.
pub fn check(device: &Device, dtype: Dtype) -> Result<()> {
    for k in DEPTHS {
        let whole = Operands::new(k);
        let part = whole.part();
        for (form, product) in FORMS {
            let (large, small) = (product(device, dtype, &whole), product(device, dtype, &part));
            let (large, small) = (large.view().to_bytes(), small.view().to_bytes());
            device.check()?;
            let [rows, columns] = AGAIN;
            let size = small.len() / (rows.len() * columns.len());
            let of_large = rows.flat_map(|row| {
                let row = &large[row * SIZES[1] * size..][..SIZES[1] * size];
                &row[columns.start * size..columns.end * size]
            });
            if !of_large.eq(&small) {
                let by = if let Device::Gpu(gpu) = device { gpu.products() } else { device.name() };
                bail!(
                    "{by} does not keep what ferrotron promises: in the product {form} of {dtype} over k = {k}, elements have other bits in a \
                     result of {} x {} than in one of {} x {}, so that every layout would train other numbers; set device.matmul = \"own\"",
                    AGAIN[0].len(),
                    AGAIN[1].len(),
                    SIZES[0],
                    SIZES[1]
                );
            }
        }
    }
    Ok(())
}

impl Operands {
    fn new(k: usize) -> Operands {
        let stream = Stream::new(1, "promise");
        let [m, n] = SIZES;
        let numbers = |first: usize, count: usize| (first..first + count).map(|i| stream.normal(i as u64) as f32).collect();
        Operands { k, a: numbers(0, m * k), b: numbers(m * k, n * k), bias: numbers((m + n) * k, n) }
    }

    /// The rows that are computed again.
    fn part(&self) -> Operands {
        let [rows, columns] = AGAIN;
        let of = |all: &[f32], rows: &Range<usize>, k: usize| all[rows.start * k..rows.end * k].to_vec();
        Operands { k: self.k, a: of(&self.a, &rows, self.k), b: of(&self.b, &columns, self.k), bias: of(&self.bias, &columns, 1) }
    }

    fn a(&self, device: &Device, dtype: Dtype) -> Tensor {
        tensor(device, dtype, [self.a.len() / self.k, self.k], &self.a)
    }

    fn b(&self, device: &Device, dtype: Dtype) -> Tensor {
        tensor(device, dtype, [self.b.len() / self.k, self.k], &self.b)
    }

    /// With a row for each k.
    fn outer(&self, device: &Device, dtype: Dtype, values: &[f32]) -> Tensor {
        let rows = values.len() / self.k;
        let turned: Vec<f32> = (0..values.len()).map(|i| values[i % rows * self.k + i / rows]).collect();
        tensor(device, dtype, [self.k, rows], &turned)
    }
}

fn tensor(device: &Device, dtype: Dtype, shape: [usize; 2], values: &[f32]) -> Tensor {
    fn rounded<T: Element>(device: &Device, shape: [usize; 2], values: &[f32]) -> Tensor {
        let values: Vec<T> = values.iter().map(|&x| T::from_f32(x)).collect();
        Tensor::from_slice(device, shape, &values)
    }
    dispatch!(dtype, T => rounded::<T>(device, shape, values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::gpu::driver::{Argument, Driver, Event, Gemm, Grid, Stream as Queue};
    use crate::device::gpu::emulated::Emulated;

    /// A GPU whose library takes the parts of short products in another order than those of long ones.
    #[derive(Debug)]
    struct Fickle(Emulated, bool);

    impl Driver for Fickle {
        fn name(&self) -> String {
            self.0.name()
        }
        fn products(&self) -> String {
            "a library".to_string()
        }
        fn allocate(&self, bytes: usize) -> Result<u64> {
            self.0.allocate(bytes)
        }
        fn free(&self, address: u64, bytes: usize) -> Result<()> {
            self.0.free(address, bytes)
        }
        fn launch(&self, stream: Queue, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
            self.0.launch(stream, kernel, grid, arguments)
        }
        fn gemm(&self, gemm: &Gemm) -> Result<()> {
            let cut = gemm.k / 2;
            if self.1 != gemm.accumulate || gemm.m == SIZES[0] {
                return self.0.gemm(gemm);
            }
            if !gemm.accumulate {
                // A sum that has lost its last term stands for any other.
                return self.0.gemm(&Gemm { k: gemm.k - 1, ..*gemm });
            }
            self.0.gemm(&Gemm { k: cut, ..*gemm })?;
            let later = |of: crate::device::gpu::driver::Operand| crate::device::gpu::driver::Operand {
                address: of.address + (cut * of.stride * gemm.dtype.bytes()) as u64,
                ..of
            };
            self.0.gemm(&Gemm { k: gemm.k - cut, a: later(gemm.a), b: later(gemm.b), ..*gemm })
        }
        fn zero(&self, stream: Queue, address: u64, bytes: usize) -> Result<()> {
            self.0.zero(stream, address, bytes)
        }
        fn copy(&self, stream: Queue, to: u64, from: u64, bytes: usize) -> Result<()> {
            self.0.copy(stream, to, from, bytes)
        }
        fn upload(&self, stream: Queue, to: u64, bytes: &[u8]) -> Result<()> {
            self.0.upload(stream, to, bytes)
        }
        fn download(&self, stream: Queue, from: u64, bytes: &mut [u8]) -> Result<()> {
            self.0.download(stream, from, bytes)
        }
        fn record(&self, stream: Queue) -> Result<Event> {
            self.0.record(stream)
        }
        fn wait(&self, stream: Queue, event: Event) -> Result<()> {
            self.0.wait(stream, event)
        }
        fn synchronize(&self) -> Result<()> {
            self.0.synchronize()
        }
    }

    #[test]
    fn products_of_the_host_keep_it_and_others_are_told() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            check(&Device::cpu(1), dtype).expect("the same bits");
            check(&Device::emulated(None, false, 1), dtype).expect("the same bits");
        }
        for (accumulate, form) in
            [(false, "the product x w^T of bf16 over k = 64"), (true, "the product dy^T x, added to f32 of bf16 over k = 64")]
        {
            let device = Device::gpu(Box::new(Fickle(Emulated::new(None, false, 1), accumulate)));
            let error = check(&device, Dtype::Bf16).expect_err("other bits").to_string();
            assert!(error.starts_with("a library does not keep") && error.contains(form), "{error}");
            assert!(error.ends_with("in a result of 88 x 72 than in one of 328 x 264, so that every layout would train other numbers; set device.matmul = \"own\""));
        }
    }
}
