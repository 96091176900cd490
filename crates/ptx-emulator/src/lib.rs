//! Executes PTX text on the CPU, so that CUDA kernels run, and are checked, where there is no GPU.
//!
//! [`Module::parse`] decodes what NVRTC emits; [`launch`] executes a kernel on a [`Memory`]:
//!
//! ```
//! use ptx_emulator::{Launch, Memory, Module, Options, launch};
//!
//! let text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry fill(.param .u64 out)\n{\n.reg .b32 %r<2>;\n.reg .b64 %d<3>;\n\
//!     ld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\nmul.wide.u32 %d1, %r0, 4;\nadd.s64 %d2, %d0, %d1;\nst.global.u32 [%d2], %r0;\nret;\n}";
//! let module = Module::parse(text)?;
//! let memory = Memory::new();
//! let out = memory.allocate(256);
//! let kernel = module.kernel("fill").ok_or("no such kernel")?;
//! let arguments: [&[u8]; 1] = [&out.to_le_bytes()];
//! let shape = Launch { kernel, grid: [1, 1, 1], block: [64, 1, 1], shared_bytes: 0, arguments: &arguments, blocks: None };
//! launch(&memory, &shape, &Options { checked: true, ..Options::default() })?;
//! let mut bytes = [0; 4];
//! memory.read(out + 4 * 9, &mut bytes)?;
//! assert_eq!(u32::from_le_bytes(bytes), 9);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How kernels are executed
//!
//! A register is an array of 32 lanes, and an instruction runs for the active lanes of a warp. Lanes that part at a branch become
//! groups with a pc each; the group with the lowest pc goes first, so that lanes meet again where their ways do. An instruction that
//! needs other lanes (shuffles, votes, barriers, matrix products) parks its group until they are there. Warps take turns, blocks
//! follow one another. With [`Options::seed`] all of this is random, in slices of 1 to 64 instructions, and the seed repeats it.
//! Without one it is fixed. Copies and products that the hardware does on the side (`cp.async`, bulk copies, `wgmma`) are done as late
//! as the rules allow or, with a seed, at random times before: what is used too early shows as a wrong value.
//!
//! A launch holds its memory: launches on one [`Memory`], and copies of the host, follow one another. Blocks run on several threads
//! where [`Options::threads`] says so and nothing else asks for one order. Global memory is made of atomic cells of four bytes, so that
//! the threads need no locks; only atomics of eight bytes take one, and ordinary accesses of eight bytes may be seen in halves. Blocks
//! must not wait for blocks that come after them: there is no promise that two run at the same time.
//!
//! # What is checked
//!
//! Always: bounds (each allocation by itself, with gaps between them and no address used twice), alignment, the types and sizes of
//! arguments, limits of the launch, member masks, barriers that cannot open, loops without end, the rules of mbarriers, copy groups and
//! `wgmma`. With [`Options::checked`] also: races in shared and global memory, within a warp, a block, and between blocks; reads of
//! bytes nobody wrote; bytes of copies under way; a missing `fence.proxy.async`; barriers that threads have left; shuffles from lanes
//! that take no part. Races are found by what orders two accesses (barriers, mbarriers, a fence with an atomic), not by luck, but only
//! among the last writer and two readers of each two bytes. A first fault ends the launch.
//!
//! # What this is not
//!
//! - There is no time: nothing here tells how fast a kernel is. [`Counters`] are of the code alone: no caches, no latencies.
//! - Memory is sequentially consistent. A missing fence changes no value; the checks find it by the order they keep.
//! - Tensor cores: each sum begins with the element of C and adds the products, which are exact, in the order of k, rounding to nearest
//!   in f32 each time. The hardware adds several products at once and truncates: its last bits differ. Sums in f16 are rounded once.
//! - `ex2`, `lg2`, `sin`, `cos`, `tanh`, `rcp` and `rsqrt` are the host's, closer to the exact value than the hardware's approximations.
//! - `mul` and `add` without `.rn` are never fused, as ptxas may do.
//! - A cluster is one block. There are no textures, no fp8, no sparse products, no indirect calls, no recursion, no dynamic parallelism.
//!   Calls are written out in place; `printf` prints nothing.
//!
//! Invariant: what the emulator cannot execute it refuses, by name, when the text is loaded.

mod address;
mod allocation;
mod block;
mod compact;
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
mod slots;
mod syntax;
mod tensor_map;
mod token;
mod transfer;
mod warp;
mod watch;

pub use counters::{Counters, Counts};
pub use fault::{Fault, FaultKind, LoadError, Place};
pub use kernel::Kernel;
pub use launch::{Launch, Options, launch};
pub use memory::Memory;
pub use module::Module;
pub use tensor_map::{Swizzle, TensorMap};
