//! The host's processor: a pool of threads and memory.
//!
//! Invariant: work is split over threads by outputs, never over the terms of a sum, so the number of threads cannot change a bit.

pub mod widest;

use crate::device::memory::Memory;
use rayon::ThreadPool;
use std::sync::Arc;

#[derive(Debug)]
pub struct Cpu {
    pub memory: Arc<Memory>,
    pool: ThreadPool,
}

impl Cpu {
    pub fn new(threads: usize) -> Cpu {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .expect("the system lets us start threads");
        Cpu { memory: Arc::new(Memory::new(true)), pool }
    }

    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` on a thread of the pool: ops called from there need not wake one up.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }
}
