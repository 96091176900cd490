//! Loops over slices, compiled for each level of instructions.
//!
//! Invariant: every level gives the same bits, since each is the same plain Rust: elementwise arithmetic and fused `mul_add`, nothing that
//! a compiler may reorder.
#![allow(unsafe_code)]

use crate::device::cpu::Isa;
use crate::dtype::Element;

/// A function whose body is compiled for each level of instructions; `isa` picks one at run time.
macro_rules! leveled {
    ($(#[$doc:meta])* pub fn $name:ident<$T:ident: $bound:ident>($($argument:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        pub fn $name<$T: $bound>(isa: Isa, $($argument: $type),*) {
            #[inline(always)]
            fn plain<$T: $bound>($($argument: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<$T: $bound>($($argument: $type),*) {
                plain($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512<$T: $bound>($($argument: $type),*) {
                plain($($argument),*)
            }
            match isa {
                // SAFETY: `Cpu` holds an `Isa` that this processor has.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512($($argument),*) },
                // SAFETY: likewise.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2($($argument),*) },
                _ => plain($($argument),*),
            }
        }
    };
}

leveled! {
    /// out = sums + bias, rounded once.
    pub fn finish<T: Element>(sums: &[f32], bias: Option<&[T]>, out: &mut [T]) {
        match bias {
            Some(bias) => {
                for ((sum, bias), out) in sums.iter().zip(bias).zip(out) {
                    *out = T::from_f32(sum + bias.to_f32());
                }
            }
            None => narrow_plain(sums, out),
        }
    }
}

#[inline(always)]
fn narrow_plain<T: Element>(from: &[f32], to: &mut [T]) {
    for (from, to) in from.iter().zip(to) {
        *to = T::from_f32(*from);
    }
}
