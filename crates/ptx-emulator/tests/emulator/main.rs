//! The emulator against plain arithmetic, instruction by instruction, and one launch for every kind of fault.
//!
//! Invariant: no compiler and no GPU is needed: the tests write their PTX themselves.

mod asynchronous;
mod control;
mod counters;
mod faults;
mod float;
mod integer;
mod matrix;
mod memory;
mod support;
mod warp;
