//! The same operations on a GPU, by the clock.
//!
//! A GPU's limits are taken in the same run, between the rounds of a case: memory's by a large copy on the device, that of products by a
//! large square one, which is what its library makes of the matrix units.
//!
//! Invariant: a time is of work that has been waited for, and no number is printed of a device on which anything has failed.

use crate::bench::cases::{Case, Sizes, Work, cases, random};
use crate::bench::{Seen, headline, line, object};
use crate::device::Device;
use crate::device::gpu::cuda::context::Context;
use crate::device::gpu::cuda::libraries::Search;
use crate::device::tensor::Tensor;
use crate::dtype::Dtype;
use crate::launch::identity::{self, CudaPlaces};
use crate::ops::matmul;
use anyhow::{Context as _, Result, ensure};
use std::hint::black_box;
use std::io::Write;
use std::time::Instant;

/// Of a round of a case, about, and of all its rounds.
const ROUND: f64 = 0.02;
const SECONDS: f64 = 0.2;

/// What the operations at large sizes take, and what the GPU must have free besides for its kernels and its library.
const LARGE: usize = 18 << 30;
const BESIDES: usize = 2 << 30;

/// How large the limits' own operands are.
#[derive(Clone, Copy)]
struct Reach {
    copied: usize,
    edge: usize,
}

const REACH: Reach = Reach { copied: 1 << 30, edge: 8192 };

/// A line for each operation whose name and dtype have all of `words`, on the first GPU; as JSON, if so wanted.
pub fn run(dtypes: &[Dtype], words: &[String], json: bool, out: &mut dyn Write) -> Result<()> {
    let search = Search::new(&CudaPlaces::detect(&identity::environment()));
    let context = Context::find(&search, 0, 1)?;
    // Without a library, the program's own products are all there are.
    let library = context.products(&search).ok();
    let free = context.bytes_free()?;
    let (sizes, bytes) = if free >= LARGE + BESIDES { (Sizes::LARGE, LARGE) } else { (Sizes::SMALL, 4 << 30) };
    ensure!(free >= bytes + BESIDES, "{} has {} MiB free, and measuring takes {}", context.name(), free >> 20, (bytes + BESIDES) >> 20);
    let device = Device::cuda(context, library, bytes, "measure fewer operations".to_string())?;
    measure_all(&device, sizes, REACH, dtypes, words, json, out)
}

fn measure_all(
    device: &Device,
    sizes: Sizes,
    reach: Reach,
    dtypes: &[Dtype],
    words: &[String],
    json: bool,
    out: &mut dyn Write,
) -> Result<()> {
    if !json {
        let products = if let Device::Gpu(gpu) = device { gpu.products() } else { device.name() };
        writeln!(
            out,
            "{}, products by {products}; by the clock, the best of several rounds; shares of a copy's bandwidth or of a square product's rate",
            device.name()
        )?;
        writeln!(out, "{}", headline())?;
    }
    let mut found = false;
    for &dtype in dtypes {
        let mut limits = Limits::new(device, reach, dtype)?;
        for case in with_own_products(device, sizes, dtype) {
            let text = format!("{} {dtype}", case.name);
            if words.iter().all(|word| text.contains(word.as_str())) {
                found = true;
                let seen = measure(device, &mut limits, case).context(text)?;
                if json {
                    writeln!(out, "{}", object(&device.name(), &seen))?;
                } else {
                    writeln!(out, "{}", line(&seen))?;
                }
            }
        }
    }
    ensure!(found, "no operation has all of these words: {}", words.join(", "));
    Ok(())
}

/// All cases. Where a library does products, those by the program's own kernels follow.
fn with_own_products(device: &Device, sizes: Sizes, dtype: Dtype) -> Vec<Case> {
    if matches!(device, Device::Gpu(gpu) if gpu.has_own_products()) {
        return cases(device, sizes, dtype);
    }
    let own = cases(&device.with_own_products(), sizes, dtype).into_iter().filter(|case| case.name.starts_with(PRODUCT));
    let own = own.map(|case| Case { name: format!("own {}", case.name), ..case });
    cases(device, sizes, dtype).into_iter().chain(own).collect()
}

/// How the names of products begin.
const PRODUCT: &str = "matmul ";

/// What the device gives at this moment. Holds the operands of its own measurements.
pub struct Limits {
    device: Device,
    to: Tensor,
    from: Tensor,
    matrix: Tensor,
}

impl Limits {
    fn new(device: &Device, reach: Reach, dtype: Dtype) -> Result<Limits> {
        let copied = || device.zeros([reach.copied / 4], Dtype::F32);
        let mut limits =
            Limits { device: device.clone(), to: copied(), from: copied(), matrix: random(device, dtype, [reach.edge, reach.edge]) };
        // The first calls load code.
        limits.of(Work::Bytes(0.0))?;
        limits.of(Work::Flops(0.0))?;
        Ok(limits)
    }

    /// For products of this dtype, at the size that a large GPU has need of.
    pub fn of_products(device: &Device, dtype: Dtype) -> Result<Limits> {
        Limits::new(device, Reach { copied: 1 << 20, ..REACH }, dtype)
    }

    /// Operations or bytes a second.
    pub fn of(&mut self, work: Work) -> Result<f64> {
        const REPEATS: usize = 3;
        let edge = self.matrix.shape().rows() as f64;
        self.device.check()?;
        let start = Instant::now();
        for _ in 0..REPEATS {
            match work {
                Work::Bytes(_) => self.to.view_mut().copy_from(self.from.view()),
                Work::Flops(_) => drop(black_box(matmul::forward(self.matrix.view(), self.matrix.view(), matmul::WHOLE))),
            }
        }
        self.device.check()?;
        let done = if let Work::Bytes(_) = work { 2.0 * self.from.bytes() as f64 } else { 2.0 * edge * edge * edge };
        Ok(done * REPEATS as f64 / start.elapsed().as_secs_f64())
    }
}

fn measure(device: &Device, limits: &mut Limits, case: Case) -> Result<Seen> {
    let mut run = (case.prepare)();
    let mut time = |repeats: usize| -> Result<f64> {
        device.check()?;
        let start = Instant::now();
        (0..repeats).for_each(|_| run());
        device.check()?;
        Ok(start.elapsed().as_secs_f64() / repeats as f64)
    };
    // The first call loads code and chooses among the library's products.
    time(1)?;
    let repeats = (ROUND / time(1)?.max(1e-9)).ceil().clamp(1.0, 1000.0) as usize;
    let (mut seconds, mut most, begin) = (f64::INFINITY, 0f64, Instant::now());
    for round in 0.. {
        most = most.max(limits.of(case.work)?);
        seconds = seconds.min(time(repeats)?);
        if round >= 2 && begin.elapsed().as_secs_f64() > SECONDS {
            break;
        }
    }
    Ok(Seen { name: case.name, dtype: case.dtype, work: case.work, seconds, limit: most })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::Heads;

    #[test]
    fn every_case_runs_on_a_gpu() {
        let heads = Heads { query: 2, kv: 1, dim: 16 };
        let sizes = Sizes { sequences: 1, t: 8, c: 32, f: 8, heads, v: 24 };
        let device = Device::emulated(None, false, 1);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for case in with_own_products(&device, sizes, dtype) {
                let name = case.name.clone();
                (case.prepare)()();
                device.check().unwrap_or_else(|error| panic!("{name} {dtype}: {error:#}"));
            }
        }
        // 3 n v elements of two bytes, and 4 n floats.
        let all = cases(&device, sizes, Dtype::Bf16);
        let found = all.iter().find(|case| case.name.starts_with("cross-entropy")).map(|case| case.work);
        assert_eq!(found, Some(Work::Bytes((3 * 8 * 24 * 2 + 4 * 8 * 4) as f64)));
    }

    #[test]
    fn lines_have_a_share_of_what_was_measured() {
        let (sizes, reach) =
            (Sizes { sequences: 1, t: 4, c: 8, f: 8, heads: Heads { query: 1, kv: 1, dim: 8 }, v: 8 }, Reach { copied: 4096, edge: 8 });
        let device = Device::emulated(None, false, 1);
        let mut out = Vec::new();
        measure_all(&device, sizes, reach, &[Dtype::F32], &["add".to_string()], true, &mut out).expect("cases that run");
        let line: serde_json::Value = serde_json::from_slice(&out).expect("one object");
        assert!(line["operation"] == "add 4 x 8" && line["share"].as_f64().is_some_and(|share| share > 0.0), "{line}");
        let nothing =
            measure_all(&device, sizes, reach, &[Dtype::F32], &["subtract".to_string()], true, &mut out).expect_err("no such operation");
        assert!(nothing.to_string().contains("subtract"), "{nothing}");
    }
}
