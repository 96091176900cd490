//! What the machine gives at this moment: processor time, the rate of multiply-adds, the rate at which memory is copied.
//!
//! Rates are of processor time: what others do to the machine meanwhile takes less part in them than in time by the clock.

use crate::device::cpu::{Isa, burst};
use crate::dtype::Dtype;
use rustix::time::{ClockId, clock_gettime};
use std::hint::black_box;

/// Seconds of processor time of all threads of this process.
pub fn processor_seconds() -> f64 {
    seconds(ClockId::ProcessCPUTime)
}

fn seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Operations per second of nothing but multiply-adds in registers, on all threads together. Takes about a millisecond.
pub fn peak_flops(threads: usize, dtype: Dtype) -> f64 {
    const STEPS: u64 = 400_000;
    let isa = Isa::detect();
    on_threads(threads, || {
        let start = seconds(ClockId::ThreadCPUTime);
        (burst::burst(isa, dtype, STEPS), seconds(ClockId::ThreadCPUTime) - start)
    })
}

/// Bytes per second that `threads` threads read and write while each copies what no cache holds.
pub fn copy_bandwidth(threads: usize) -> f64 {
    const WORDS: usize = 1 << 23;
    const ROUNDS: usize = 4;
    on_threads(threads, || {
        let (from, mut to) = (vec![1u64; WORDS], vec![2u64; WORDS]);
        let start = seconds(ClockId::ThreadCPUTime);
        for _ in 0..ROUNDS {
            black_box(&mut to).copy_from_slice(black_box(&from));
        }
        ((2 * ROUNDS * WORDS * 8) as f64, seconds(ClockId::ThreadCPUTime) - start)
    })
}

/// What `work` says it has done per second of its thread, summed over the threads.
fn on_threads(threads: usize, work: impl Fn() -> (f64, f64) + Sync) -> f64 {
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(&work)).collect();
        let rates = all.into_iter().map(|thread| thread.join().expect("a burst cannot fail"));
        rates.map(|(done, seconds)| done / seconds).sum()
    })
}
