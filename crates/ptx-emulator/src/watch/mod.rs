//! What a launch does beside executing: counting, and looking for accesses that break the rules of the memory model.
//!
//! Invariant: nothing here changes what a kernel computes; without an observer a launch pays one test per access.

pub(crate) mod cells;
pub(crate) mod check;
pub(crate) mod clocks;
pub(crate) mod count;

use crate::execute::memory::Doing;
use crate::fault::Fault;
use crate::instruction::Order;
use crate::machine::{At, Machine};
use crate::registers::{LANES, Mask};
use crate::syntax::Space;
use check::Check;
use count::Count;

/// The observers of a launch.
#[derive(Default)]
pub(crate) struct Watch {
    /// One per instruction of the kernel.
    pub(crate) counts: Vec<Count>,
    pub(crate) check: Option<Check>,
}

/// An access of some lanes of a warp to shared or global memory.
#[derive(Clone, Copy)]
pub(crate) struct Touch<'a> {
    pub(crate) space: Space,
    pub(crate) doing: Doing,
    pub(crate) mask: Mask,
    pub(crate) at: &'a [u64; LANES],
    /// Of each lane.
    pub(crate) bytes: usize,
    pub(crate) order: Order,
}

/// Shows an access to the observers. It must have been found to be in bounds.
#[inline(always)]
pub(crate) fn touch(machine: &mut Machine<'_>, at: At, touch: Touch<'_>) -> Result<(), Fault> {
    if machine.watch.is_none() {
        return Ok(());
    }
    observe(machine, at, touch)
}

fn observe(machine: &mut Machine<'_>, at: At, touch: Touch<'_>) -> Result<(), Fault> {
    let Some(mut watch) = machine.watch.take() else { return Ok(()) };
    if let Some(count) = watch.counts.get_mut(at.pc as usize) {
        count.access(&touch);
    }
    let result = match &mut watch.check {
        Some(check) => check.touch(machine, at, &touch),
        None => Ok(()),
    };
    machine.watch = Some(watch);
    result
}

impl Machine<'_> {
    /// Runs a part of the checks, if this launch is checked.
    pub(crate) fn checking<T>(&mut self, f: impl FnOnce(&mut Check, &Machine<'_>) -> T) -> Option<T> {
        let mut watch = self.watch.take()?;
        let result = watch.check.as_mut().map(|check| f(check, self));
        self.watch = Some(watch);
        result
    }

    pub(crate) fn checked(&self) -> bool {
        self.watch.as_ref().is_some_and(|watch| watch.check.is_some())
    }
}
