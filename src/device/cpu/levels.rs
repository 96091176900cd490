//! One plain loop, compiled for each level of instructions.
//!
//! Invariant: every level gives the same bits, since each is compiled from the same Rust, and a compiler may not reorder its arithmetic.

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
