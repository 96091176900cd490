//! The host's processor: a pool of threads, memory, and what instructions it has.
//!
//! Invariant: work is split over threads by outputs, never over the terms of a sum, so the number of threads cannot change a bit.

#[macro_use]
mod levels;
pub mod block;
pub mod burst;
pub mod columns;
pub mod few;
pub mod gemm;
mod lanes;
pub mod micro;
pub mod pack;
#[cfg(target_arch = "x86_64")]
mod pack_avx512;
pub mod pages;
pub mod processors;
pub mod softmax;
#[cfg(target_arch = "x86_64")]
mod softmax_avx512;
pub mod squares;
pub mod vector;
pub mod widest;

use crate::device::cpu::processors::Share;
use crate::device::memory::Memory;
use rayon::ThreadPool;
use rayon::prelude::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator, ParallelSliceMut};
use std::sync::{Arc, Mutex, PoisonError};

/// The instructions that kernels may use, from least to most: each level has those below it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Isa {
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with dot products of bf16 pairs.
    Avx512Bf16,
}

#[derive(Debug)]
pub struct Cpu {
    pub memory: Arc<Memory>,
    isa: Isa,
    pool: ThreadPool,
    /// Buffers for packed operands that no matmul holds at the moment. All have one size, and there are at most as many as matmuls
    /// ever ran at once, so they are not counted as memory of tensors.
    panels: Mutex<Vec<gemm::Panels>>,
}

impl Isa {
    #[cfg(target_arch = "x86_64")]
    pub fn detect() -> Isa {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let wide = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match (avx2, avx2 && wide, avx2 && wide && is_x86_feature_detected!("avx512bf16")) {
            (_, _, true) => Isa::Avx512Bf16,
            (_, true, _) => Isa::Avx512,
            (true, _, _) => Isa::Avx2,
            _ => Isa::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn detect() -> Isa {
        Isa::Portable
    }
}

impl Cpu {
    pub fn new(threads: usize) -> Cpu {
        Cpu::with_isa(threads, Isa::detect())
    }

    /// A processor that uses no more than the instructions of `isa`; what the machine does not have is not used either.
    pub fn with_isa(threads: usize, isa: Isa) -> Cpu {
        Cpu::of(Share::anywhere(threads), isa)
    }

    /// A pool on the processors of `share`.
    pub fn on(share: Share) -> Cpu {
        Cpu::of(share, Isa::detect())
    }

    fn of(Share { threads, processors }: Share, isa: Isa) -> Cpu {
        let settle = move |_| {
            // Where the system does not want that, threads run anywhere, and compute the same.
            if !processors.is_empty()
                && let Err(error) = processors::settle(&processors)
            {
                tracing::debug!("{error:#}");
            }
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("cpu-{i}"))
            .start_handler(settle)
            .build()
            .expect("the system lets us start threads");
        Cpu { memory: Arc::new(Memory::of_host()), isa: isa.min(Isa::detect()), pool, panels: Mutex::default() }
    }

    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `work` on a thread of the pool: ops called from there need not wake one up.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    /// Has `work` run by a thread of the pool when one has nothing else to do.
    pub fn spawn(&self, work: impl FnOnce() + Send + 'static) {
        self.pool.spawn(work);
    }

    /// Runs `work(0)`, ..., `work(parts - 1)`, each once, spread over the threads. Neighbouring parts tend to share a thread.
    pub fn parallel(&self, parts: usize, work: impl Fn(usize) + Sync) {
        if parts <= 1 || self.threads() == 1 {
            (0..parts).for_each(work);
        } else {
            self.install(|| (0..parts).into_par_iter().with_max_len(1).for_each(&work));
        }
    }

    /// Cuts the rows of `out` into runs and calls `work(first row, rows)` for each. A run has at least `grain` rows (the last may have
    /// fewer) and no promised size: what `work` writes to a row must depend on that row alone.
    pub fn for_rows<T: Send>(&self, out: &mut [T], columns: usize, grain: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        assert!(columns > 0 && out.len().is_multiple_of(columns), "{} elements in rows of {columns}", out.len());
        let rows = out.len() / columns;
        let run = rows.div_ceil(4 * self.threads()).max(grain).max(1);
        if rows <= run || self.threads() == 1 {
            return work(0, out);
        }
        self.install(|| out.par_chunks_mut(run * columns).enumerate().for_each(|(index, rows)| work(index * run, rows)));
    }

    /// As `parallel`, for parts that own something.
    pub fn parallel_over<P: Send>(&self, parts: Vec<P>, work: impl Fn(P) + Sync) {
        if parts.len() <= 1 || self.threads() == 1 {
            parts.into_iter().for_each(work);
        } else {
            self.install(|| parts.into_par_iter().with_max_len(1).for_each(&work));
        }
    }

    /// Runs `work` with a buffer of 32-bit units for packed operands and sums, of a size that is the same always: 4 MiB.
    pub fn with_buffer<R>(&self, work: impl FnOnce(&mut [u32]) -> R) -> R {
        let mut panels = self.take_panels();
        let result = work(panels.units());
        self.give_panels(panels);
        result
    }

    /// A buffer for packed operands, to be given back with `give_panels`.
    fn take_panels(&self) -> gemm::Panels {
        self.panels.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give_panels(&self, panels: gemm::Panels) {
        self.panels.lock().unwrap_or_else(PoisonError::into_inner).push(panels);
    }
}
