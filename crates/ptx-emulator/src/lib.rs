//! Executes PTX text on the CPU, so that CUDA kernels run, and are checked, where there is no GPU.
//!
//! Invariant: what the emulator cannot execute it refuses, by name, when the text is loaded.

mod address;
mod allocation;
mod block;
mod copies;
mod counters;
mod decode;
mod execute;
mod fault;
mod instruction;
mod kernel;
mod launch;
mod machine;
mod memory;
mod module;
mod random;
mod ranges;
mod registers;
mod rounding;
mod scalar;
mod syntax;
mod tensor_map;
mod token;
mod warp;
mod watch;

pub use counters::{Counters, Counts};
pub use fault::{Fault, FaultKind, LoadError, Place};
pub use kernel::Kernel;
pub use launch::{Launch, Options, launch};
pub use memory::Memory;
pub use module::Module;
pub use tensor_map::{Swizzle, TensorMap};
