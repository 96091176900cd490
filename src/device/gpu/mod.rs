//! A GPU as ops see it: kernels are launched by name, and the first failure ends all that would follow.
//!
//! An op returns a tensor, not a result: on a GPU it has not run yet when it returns. What fails is kept here instead, nothing is queued
//! after it, and `check` tells it at the next point where the host waits for numbers, before any of them is used.
//!
//! Invariant: after a failure no kernel runs, and no number that came from the device is used.

pub mod cuda;
pub mod driver;
pub mod emulated;
pub mod kernels;
pub mod matmul;

use crate::device::memory::Memory;
use crate::dtype::Dtype;
use anyhow::{Result, anyhow};
use driver::{Argument, Driver, Event, Gemm, Grid, Stream};
use matmul::Launch;
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Debug)]
pub struct Gpu {
    pub memory: Arc<Memory>,
    queue: Arc<Queue>,
    /// Whether matrix products are kernels of `cuda/matmul.cu`, or whatever the driver has for them.
    own_products: bool,
}

/// A driver that stops at its first failure.
#[derive(Debug)]
pub struct Queue {
    driver: Box<dyn Driver>,
    failure: Mutex<Option<String>>,
}

/// The name of a kernel for one dtype.
pub fn kernel(pass: &str, dtype: Dtype) -> String {
    format!("{pass}_{dtype}")
}

/// The arguments of a kernel, in its order: views give their address, `usize` is a `size_t`.
#[macro_export]
macro_rules! args {
    ($($argument:expr),* $(,)?) => {
        [$($crate::device::gpu::driver::Argument::from($argument)),*]
    };
}

impl Gpu {
    pub fn new(driver: Box<dyn Driver>) -> Gpu {
        let queue = Arc::new(Queue { driver, failure: Mutex::default() });
        Gpu { memory: Arc::new(Memory::of_gpu(queue.clone())), queue, own_products: false }
    }

    /// The same GPU, with matrix products by kernels of the program's own.
    pub fn with_own_products(&self) -> Gpu {
        Gpu { memory: self.memory.clone(), queue: self.queue.clone(), own_products: true }
    }

    pub fn name(&self) -> String {
        self.queue.driver.name()
    }

    pub fn has_own_products(&self) -> bool {
        self.own_products
    }

    /// Who does matrix products, in words.
    pub fn products(&self) -> String {
        if self.own_products { "ferrotron's own kernels".to_string() } else { self.queue.driver.products() }
    }

    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// Launches `kernel`; a grid without blocks has nothing to do.
    pub fn launch(&self, kernel: &str, grid: Grid, arguments: &[Argument]) {
        if grid.blocks.iter().all(|&blocks| blocks > 0) {
            self.queue.run(|driver| driver.launch(Stream::Compute, kernel, grid, arguments));
        }
    }

    pub fn gemm(&self, gemm: &Gemm) {
        if gemm.m == 0 || gemm.n == 0 {
            return;
        }
        self.queue.run(|driver| {
            if !self.own_products {
                return driver.gemm(gemm);
            }
            let Launch { kernel, grid, arguments } = matmul::launch(gemm)?;
            driver.launch(Stream::Compute, &kernel, grid, &arguments)
        });
    }

    /// Waits for all work, and tells the first failure of any.
    pub fn check(&self) -> Result<()> {
        self.queue.run(|driver| driver.synchronize());
        self.queue.failed().map_or(Ok(()), |failure| Err(anyhow!(failure)))
    }
}

impl Queue {
    /// Does `work`, unless something has failed before; if it fails, nothing is done any more.
    pub fn run<T: Default>(&self, work: impl FnOnce(&dyn Driver) -> Result<T>) -> T {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_some() {
            return T::default();
        }
        match work(self.driver.as_ref()) {
            Ok(value) => value,
            Err(error) => {
                *failure = Some(format!("{}: {error:#}", self.driver.name()));
                T::default()
            }
        }
    }

    pub fn failed(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes `later` begin no work before `earlier` has done what it has been given so far.
    pub fn order(&self, earlier: Stream, later: Stream) {
        self.run(|driver| {
            let event: Event = driver.record(earlier)?;
            driver.wait(later, event)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_arguments() {
        assert_eq!(kernel("norm_rms_forward", Dtype::Bf16), "norm_rms_forward_bf16");
        let arguments = args![7usize, 1.0f32, 3u32];
        assert_eq!(arguments.map(|argument| argument.bytes().len()), [8, 4, 4]);
        assert_eq!(Grid::over(1000, 256, 128), Grid { blocks: [4, 1, 1], threads: 128, shared_bytes: 0 });
    }
}
