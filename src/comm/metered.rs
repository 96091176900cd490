//! A group that counts: calls, bytes that this rank puts on the wire, and the seconds that it had to wait for them.
//!
//! Invariant: bytes follow from size, dtype and operation alone, so a rehearsal on a device without numbers counts the same as a run,
//! and both agree with the plan to the byte.

use crate::comm::{Group, Pending, Reduction};
use crate::device::tensor::Tensor;
use anyhow::Result;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// What one kind of call has added up to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Count {
    pub calls: u64,
    /// Sent by this rank.
    pub bytes: u64,
    /// Time in which this rank stood still: in `wait()`, and in calls that wait.
    pub seconds_exposed: f64,
}

/// By name of the operation: `all_reduce`, `reduce_scatter`, `all_gather`, `all_to_all`, `send`, `receive`, `exchange`.
pub type Traffic = BTreeMap<&'static str, Count>;

/// The counts of one group on one rank.
#[derive(Debug)]
pub struct Meter {
    pub name: String,
    traffic: Mutex<Traffic>,
}

impl Meter {
    pub fn new(name: &str) -> Arc<Meter> {
        Arc::new(Meter { name: name.to_string(), traffic: Mutex::default() })
    }

    pub fn traffic(&self) -> Traffic {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The counts since the last `take`.
    pub fn take(&self) -> Traffic {
        std::mem::take(&mut *self.traffic.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn add(&self, operation: &'static str, calls: u64, bytes: u64, seconds: f64) {
        let mut traffic = self.traffic.lock().unwrap_or_else(PoisonError::into_inner);
        let count = traffic.entry(operation).or_default();
        count.calls += calls;
        count.bytes += bytes;
        count.seconds_exposed += seconds;
    }
}

pub struct Metered {
    inner: Arc<dyn Group>,
    meter: Arc<Meter>,
}

impl Metered {
    pub fn new(inner: Arc<dyn Group>, meter: Arc<Meter>) -> Metered {
        Metered { inner, meter }
    }

    /// Counts the call and lets the clock run while its result is waited for.
    fn count(&self, operation: &'static str, bytes: u64, pending: Pending) -> Pending {
        self.meter.add(operation, 1, bytes, 0.0);
        let meter = self.meter.clone();
        Pending::later(move || {
            let start = Instant::now();
            let result = pending.wait();
            meter.add(operation, 0, 0, start.elapsed().as_secs_f64());
            result
        })
    }

    /// What a rank sends when each of the others gets or gives one of `size()` slices of `x`.
    fn others(&self, x: &Tensor) -> u64 {
        let ranks = self.size() as u64;
        (ranks - 1) * bytes(x) / ranks
    }
}

fn bytes(x: &Tensor) -> u64 {
    (x.shape().numel() * x.dtype().bytes()) as u64
}

impl Group for Metered {
    fn size(&self) -> usize {
        self.inner.size()
    }

    fn rank(&self) -> usize {
        self.inner.rank()
    }

    /// A reduce-scatter and an all-gather: each slice goes out twice.
    fn all_reduce(&self, x: Tensor, reduction: Reduction) -> Result<Pending> {
        let bytes = 2 * (self.size() as u64 - 1) * bytes(&x) / self.size() as u64;
        Ok(self.count("all_reduce", bytes, self.inner.all_reduce(x, reduction)?))
    }

    fn reduce_scatter(&self, x: Tensor, reduction: Reduction) -> Result<Pending> {
        let bytes = self.others(&x);
        Ok(self.count("reduce_scatter", bytes, self.inner.reduce_scatter(x, reduction)?))
    }

    fn all_gather(&self, x: Tensor) -> Result<Pending> {
        let bytes = self.others(&x);
        Ok(self.count("all_gather", bytes, self.inner.all_gather(x)?))
    }

    fn all_to_all(&self, x: Tensor) -> Result<Pending> {
        let bytes = self.others(&x);
        Ok(self.count("all_to_all", bytes, self.inner.all_to_all(x)?))
    }

    fn send(&self, to: usize, x: Tensor) -> Result<Pending> {
        let bytes = bytes(&x);
        Ok(self.count("send", bytes, self.inner.send(to, x)?))
    }

    fn receive(&self, from: usize, x: Tensor) -> Result<Pending> {
        Ok(self.count("receive", 0, self.inner.receive(from, x)?))
    }

    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let start = Instant::now();
        let all = self.inner.exchange(mine);
        let bytes = (self.size() as u64 - 1) * mine.len() as u64;
        self.meter.add("exchange", 1, bytes, start.elapsed().as_secs_f64());
        all
    }
}
