//! Plain Rust loops, compiled with the widest vector instructions that the processor has.
//!
//! Invariant: the bits are those of the plain loop. Wider instructions do the same f32 operations on more elements at a time; nothing
//! is fused but `mul_add`, and nothing reordered, since Rust does not allow a compiler that.
#![allow(unsafe_code)]

use crate::device::cpu::Isa;

/// Runs `work` as code for the widest vectors of `isa`. What is to become such code must be inlined into `work`: mark closures and the
/// functions they call `#[inline(always)]`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn widest<R>(isa: Isa, work: impl FnOnce() -> R) -> R {
    #[target_feature(enable = "avx2,fma")]
    fn avx2<R>(work: impl FnOnce() -> R) -> R {
        work()
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn avx512<R>(work: impl FnOnce() -> R) -> R {
        work()
    }
    match isa {
        // SAFETY: `Cpu` holds an `Isa` that this processor has, and `Isa::detect` asks for these features by name.
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512(work) },
        // SAFETY: likewise.
        Isa::Avx2 => unsafe { avx2(work) },
        Isa::Portable => work(),
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub fn widest<R>(_: Isa, work: impl FnOnce() -> R) -> R {
    work()
}
