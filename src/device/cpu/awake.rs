//! Keeps the threads of a pool from falling asleep between one operation and the next.
//!
//! A thread without work that the system has put to sleep takes some tens of microseconds to wake up, in each of the hundreds of
//! operations of a step. So while a step runs, threads without work look for it for a while before they sleep.
//!
//! Invariant: a thread that finds no work for `ROUNDS` rounds sleeps as it would otherwise: who waits long, for another rank or for a disk,
//! does not keep a processor busy.

use rayon::{ThreadPool, Yield};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rounds of looking for work: about a tenth of a millisecond.
const ROUNDS: usize = 1000;

/// Threads stay awake until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Awake {
    over: Arc<AtomicBool>,
}

impl Awake {
    pub fn new(pool: &ThreadPool) -> Awake {
        let over = Arc::new(AtomicBool::new(false));
        let (seen, caller) = (over.clone(), pool.current_thread_index());
        // The thread that runs the step must not wait in here when it looks for work itself.
        pool.spawn_broadcast(move |context| {
            if Some(context.index()) != caller {
                look_for_work(&seen);
            }
        });
        Awake { over }
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn look_for_work(over: &AtomicBool) {
    let mut rounds = 0;
    while rounds < ROUNDS && !over.load(Ordering::Relaxed) {
        match rayon::yield_now() {
            Some(Yield::Executed) => rounds = 0,
            _ => {
                rounds += 1;
                std::hint::spin_loop();
            }
        }
    }
}
