//! A group that misbehaves on purpose, at one call drawn from a seed: how tests prove that no fault makes a rank hang.
//!
//! Invariant: until its fault strikes, it does exactly what the group inside does. The same seed gives the same fault.

use crate::comm::call;
use crate::comm::{Group, Pending, Reduction};
use crate::device::tensor::Tensor;
use crate::rng::Stream;
use anyhow::{Result, bail};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call comes late. Shorter than the deadline it must harm nobody; longer, it is a stall that the others give up on.
    Delay(Duration),
    /// The rank dies: it leaves the group.
    Death,
    /// The rank never calls again and never leaves either, as a process that is stopped.
    Silence,
    /// A tensor of another shape.
    WrongShape,
    /// An exchange instead of the call.
    WrongCall,
    /// Some bits of the tensor change before the call.
    FlippedBits,
}

impl Fault {
    /// Which of `ranks` ranks misbehaves, at which of its first `calls` calls, and how; `deadline` is that of the group.
    pub fn draw(seed: u64, ranks: usize, calls: u64, deadline: Duration) -> (usize, u64, Fault) {
        let stream = Stream::new(seed, "faults");
        let kinds = [
            Fault::Delay(deadline / 20),
            Fault::Delay(deadline * 2),
            Fault::Death,
            Fault::Silence,
            Fault::WrongShape,
            Fault::WrongCall,
            Fault::FlippedBits,
        ];
        let kind = kinds[(stream.word(0) % kinds.len() as u64) as usize];
        ((stream.word(1) % ranks as u64) as usize, stream.word(2) % calls, kind)
    }
}

pub struct Faulty {
    /// None after a death.
    inner: Mutex<Option<Arc<dyn Group>>>,
    size: usize,
    rank: usize,
    fault: Fault,
    at: u64,
    calls: AtomicU64,
}

impl Faulty {
    /// `fault` strikes at call `at`, counted from 0 over all operations.
    pub fn new(inner: Arc<dyn Group>, fault: Fault, at: u64) -> Faulty {
        let (size, rank) = (inner.size(), inner.rank());
        Faulty { inner: Mutex::new(Some(inner)), size, rank, fault, at, calls: AtomicU64::new(0) }
    }

    /// The group inside, and the fault where this is its call.
    fn enter(&self) -> Result<(Arc<dyn Group>, Option<Fault>)> {
        let strikes = self.calls.fetch_add(1, Ordering::Relaxed) == self.at;
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(group) = inner.clone() else { bail!("rank {} is dead: an injected fault", self.rank) };
        if !strikes {
            return Ok((group, None));
        }
        match self.fault {
            Fault::Delay(time) => std::thread::sleep(time),
            Fault::Death => {
                *inner = None;
                drop(group);
                bail!("rank {} dies: an injected fault", self.rank);
            }
            Fault::Silence => {
                *inner = None;
                // A stopped process keeps its connections: the handle is never dropped, so that nobody sees this rank leave.
                std::mem::forget(group);
                bail!("rank {} falls silent: an injected fault", self.rank);
            }
            Fault::WrongShape | Fault::WrongCall | Fault::FlippedBits => {}
        }
        Ok((group, Some(self.fault)))
    }

    fn pass(&self, mut x: Tensor, call: impl FnOnce(&dyn Group, Tensor) -> Result<Pending>) -> Result<Pending> {
        let (group, fault) = self.enter()?;
        match fault {
            Some(Fault::WrongShape) => x = x.device().zeros([x.shape().numel() + self.size], x.dtype()),
            Some(Fault::WrongCall) => {
                group.exchange(b"not what was asked for")?;
                return Ok(Pending::ready(x));
            }
            Some(Fault::FlippedBits) => {
                let stream = Stream::new(self.at, "flipped bits");
                for (i, byte) in call::bytes_mut(&mut x).iter_mut().enumerate().step_by(7) {
                    *byte ^= 1 << (stream.word(i as u64) % 8);
                }
            }
            Some(Fault::Delay(_) | Fault::Death | Fault::Silence) | None => {}
        }
        call(&*group, x)
    }
}

impl Group for Faulty {
    fn size(&self) -> usize {
        self.size
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn all_reduce(&self, x: Tensor, reduction: Reduction) -> Result<Pending> {
        self.pass(x, |group, x| group.all_reduce(x, reduction))
    }

    fn reduce_scatter(&self, x: Tensor, reduction: Reduction) -> Result<Pending> {
        self.pass(x, |group, x| group.reduce_scatter(x, reduction))
    }

    fn all_gather(&self, x: Tensor) -> Result<Pending> {
        self.pass(x, |group, x| group.all_gather(x))
    }

    fn all_to_all(&self, x: Tensor) -> Result<Pending> {
        self.pass(x, |group, x| group.all_to_all(x))
    }

    fn send(&self, to: usize, x: Tensor) -> Result<Pending> {
        self.pass(x, |group, x| group.send(to, x))
    }

    fn receive(&self, from: usize, x: Tensor) -> Result<Pending> {
        self.pass(x, |group, x| group.receive(from, x))
    }

    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.enter()?.0.exchange(mine)
    }
}
