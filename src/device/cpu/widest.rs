//! Plain Rust loops, compiled with the widest vector instructions that the processor has.
//!
//! Invariant: the bits are those of the plain loop. Wider instructions do the same f32 operations on more elements at a time; nothing
//! is fused or reordered, since Rust does not allow a compiler that.
#![allow(unsafe_code)]

/// Runs `work` as code for the widest vectors of this processor. What is to become such code must be inlined into `work`: mark closures
/// and the functions they call `#[inline(always)]`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn widest<R>(work: impl FnOnce() -> R) -> R {
    #[target_feature(enable = "avx2,f16c")]
    fn avx2<R>(work: impl FnOnce() -> R) -> R {
        work()
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
    fn avx512<R>(work: impl FnOnce() -> R) -> R {
        work()
    }
    let detected_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
    let detected_avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    if detected_avx2 && detected_avx512 {
        // SAFETY: the processor has what `avx512` is compiled for: it has just been asked.
        unsafe { avx512(work) }
    } else if detected_avx2 {
        // SAFETY: likewise.
        unsafe { avx2(work) }
    } else {
        work()
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub fn widest<R>(work: impl FnOnce() -> R) -> R {
    work()
}
