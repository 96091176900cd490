//! Nothing but multiply-adds in registers: what the processor could do at most, whatever is in caches and memory.
#![allow(unsafe_code)]

use crate::device::cpu::Isa;
use crate::dtype::Dtype;
use std::hint::black_box;

/// Does about `steps` times a dozen of the widest multiply-adds that matmuls of `dtype` have, and says how many operations that were.
pub fn burst(isa: Isa, dtype: Dtype, steps: u64) -> f64 {
    let burst: unsafe fn(u64) -> f64 = match (isa, dtype) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, Dtype::Bf16) => burst_bf16,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16 | Isa::Avx512, _) => burst_avx512,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => burst_avx2,
        _ => burst_portable,
    };
    // SAFETY: an `Isa` is only given out where the processor has it.
    unsafe { burst(steps) }
}

/// Twelve independent chains of one instruction, `$flops` each.
macro_rules! burst {
    ($(#[$feature:meta])* $name:ident, $instruction:literal, $register:literal, $flops:literal) => {
        #[cfg(target_arch = "x86_64")]
        $(#[$feature])*
        unsafe fn $name(steps: u64) -> f64 {
            // SAFETY: only touches registers that are named.
            unsafe {
                std::arch::asm!(
                    "2:",
                    burst!(@line $instruction, $register, 0), burst!(@line $instruction, $register, 1),
                    burst!(@line $instruction, $register, 2), burst!(@line $instruction, $register, 3),
                    burst!(@line $instruction, $register, 4), burst!(@line $instruction, $register, 5),
                    burst!(@line $instruction, $register, 6), burst!(@line $instruction, $register, 7),
                    burst!(@line $instruction, $register, 8), burst!(@line $instruction, $register, 9),
                    burst!(@line $instruction, $register, 10), burst!(@line $instruction, $register, 11),
                    "dec {steps}", "jnz 2b", steps = inout(reg) steps => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                    out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm15") _,
                );
            }
            steps as f64 * 12.0 * $flops
        }
    };
    (@line $instruction:literal, $register:literal, $index:literal) => {
        concat!($instruction, " ", $register, $index, ", ", $register, "15, ", $register, "15")
    };
}

burst!(
    #[target_feature(enable = "avx512f,avx512bf16")]
    burst_bf16,
    "vdpbf16ps",
    "zmm",
    64.0
);
burst!(
    #[target_feature(enable = "avx512f")]
    burst_avx512,
    "vfmadd231ps",
    "zmm",
    32.0
);
burst!(
    #[target_feature(enable = "avx2,fma")]
    burst_avx2,
    "vfmadd231ps",
    "ymm",
    16.0
);

/// Where there is no better instruction.
unsafe fn burst_portable(steps: u64) -> f64 {
    let mut sums = [0f32; 32];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = black_box(1.0f32).mul_add(0.5, *sum);
        }
    }
    black_box(sums);
    steps as f64 * 64.0
}
