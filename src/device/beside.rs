//! Work beside other work of a device, which is waited for later.
//!
//! Invariant: it is done once; a panic in it comes out where it is waited for.

use rayon::Yield;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{self, Receiver, TryRecvError};

type Outcome<T> = Result<T, Box<dyn Any + Send>>;

/// What such work will give.
pub struct Beside<T>(Receiver<Outcome<T>>);

impl<T: Send + 'static> Beside<T> {
    /// `run` is given the work and sees to it that it is done.
    pub(in crate::device) fn new(work: impl FnOnce() -> T + Send + 'static, run: impl FnOnce(Box<dyn FnOnce() + Send>)) -> Beside<T> {
        let (done, outcome) = mpsc::channel();
        run(Box::new(move || {
            // Nobody may want it any more.
            done.send(catch_unwind(AssertUnwindSafe(work))).ok();
        }));
        Beside(outcome)
    }

    /// A thread of the pool meanwhile does what else there is, this work among it.
    pub fn wait(self) -> T {
        let outcome = loop {
            match self.0.try_recv() {
                Ok(outcome) => break outcome,
                Err(TryRecvError::Disconnected) => panic!("work beside other work was dropped"),
                Err(TryRecvError::Empty) => {}
            }
            match rayon::yield_now() {
                Some(Yield::Executed) => {}
                Some(Yield::Idle) => std::thread::yield_now(),
                None => break self.0.recv().expect("work beside other work is done"),
            }
        };
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    }
}

#[cfg(test)]
mod tests {
    use crate::device::Device;

    #[test]
    fn work_is_done_for_threads_of_the_pool_and_others() {
        for threads in [1, 2, 3] {
            let device = Device::cpu(threads);
            let many = || -> Vec<usize> {
                let all: Vec<_> = (0..20).map(|i| device.beside(move || i * i)).collect();
                all.into_iter().map(|work| work.wait()).collect()
            };
            let squares: Vec<usize> = (0..20).map(|i| i * i).collect();
            assert_eq!(many(), squares, "{threads} threads");
            assert_eq!(device.install(many), squares, "within {threads} threads");
        }
    }

    #[test]
    #[should_panic(expected = "seven")]
    fn panics_come_out() {
        let device = Device::cpu(2);
        device.install(|| device.beside(|| panic!("seven")).wait())
    }
}
