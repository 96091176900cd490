//! How near each operation comes to what the machine gives: `ferrotron bench`.
//!
//! Invariant: between the rounds of a measurement stand bursts of the machine's own limit, so a share is of what could be had then.

pub mod cases;
pub mod gpu;
pub mod machine;

use crate::device::Device;
use crate::dtype::Dtype;
use anyhow::{Result, ensure};
use cases::{Case, Sizes, Work, cases};
use machine::{copy_bandwidth, peak_flops, processor_seconds};
use serde_json::json;
use std::io::Write;

/// Seconds of processor time, over all threads, that a case is given.
const SECONDS: f64 = 0.4;

/// Prints a line for each operation whose name and dtype have all of `words`; as JSON, if so wanted.
pub fn run(threads: usize, dtypes: &[Dtype], words: &[String], json: bool, out: &mut dyn Write) -> Result<()> {
    let device = Device::cpu(threads);
    if !json {
        let how = "by processor time, the best of several rounds; shares of the limit measured between the rounds";
        writeln!(out, "{}; {how}", device.name())?;
        writeln!(out, "{}", headline())?;
    }
    let mut found = false;
    for &dtype in dtypes {
        for case in cases(&device, Sizes::SMALL, dtype) {
            let text = format!("{} {dtype}", case.name);
            if words.iter().all(|word| text.contains(word.as_str())) {
                found = true;
                let seen = measure(&device, threads, case);
                writeln!(out, "{}", if json { object(&device.name(), &seen).to_string() } else { line(&seen) })?;
            }
        }
    }
    ensure!(found, "no operation has all of these words: {}", words.join(", "));
    Ok(())
}

/// What was seen of one operation.
struct Seen {
    name: String,
    dtype: Dtype,
    work: Work,
    seconds: f64,
    /// Operations or bytes a second that the machine gives.
    limit: f64,
}

impl Seen {
    /// Of the limit.
    fn share(&self) -> f64 {
        let (Work::Flops(amount) | Work::Bytes(amount)) = self.work;
        amount / self.seconds / self.limit
    }
}

fn measure(device: &Device, threads: usize, case: Case) -> Seen {
    let limit = |work| match work {
        Work::Flops(_) => peak_flops(threads, case.dtype),
        Work::Bytes(_) => copy_bandwidth(threads),
    };
    let mut run = (case.prepare)();
    let mut time = |repeats: usize| {
        device.install(|| {
            let start = processor_seconds();
            (0..repeats).for_each(|_| run());
            (processor_seconds() - start) / (repeats * threads) as f64
        })
    };
    // The first call fills what is kept from call to call, and takes longer.
    time(1);
    let repeats = (0.02 / time(1).max(1e-9)).ceil().clamp(1.0, 1000.0) as usize;
    let (mut seconds, mut most, begin) = (f64::INFINITY, 0f64, processor_seconds());
    for round in 0.. {
        most = most.max(limit(case.work));
        seconds = seconds.min(time(repeats));
        if round >= 4 && processor_seconds() - begin > SECONDS * threads as f64 {
            break;
        }
    }
    Seen { name: case.name, dtype: case.dtype, work: case.work, seconds, limit: most }
}

fn object(device: &str, seen: &Seen) -> serde_json::Value {
    let (unit, amount) = match seen.work {
        Work::Flops(amount) => ("flops", amount),
        Work::Bytes(amount) => ("bytes", amount),
    };
    json!({
        "device": device, "operation": seen.name, "dtype": seen.dtype.to_string(), "seconds": seen.seconds, "unit": unit,
        "per_second": amount / seen.seconds, "limit_per_second": seen.limit, "share": seen.share(),
    })
}

/// The columns of `line`.
fn headline() -> String {
    format!("{:<52} {:>5}  {:>10}  {:>14}  of the limit", "operation", "dtype", "time", "rate")
}

fn line(seen: &Seen) -> String {
    let (amount, unit) = match seen.work {
        Work::Flops(flops) => (flops, "GFLOP/s"),
        Work::Bytes(bytes) => (bytes, "GB/s"),
    };
    let rate = amount / seen.seconds;
    let time = if seen.seconds < 1e-3 { format!("{:.1} us", seen.seconds * 1e6) } else { format!("{:.2} ms", seen.seconds * 1e3) };
    let share = 100.0 * seen.share();
    format!("{:<52} {:>5}  {time:>10}  {:>6.0} {unit:<7}  {share:>4.0} %", seen.name, seen.dtype, rate / 1e9)
}
