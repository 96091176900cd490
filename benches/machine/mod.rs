//! What the machine gives at this moment: processor time, and the rate of nothing but multiply-adds.
//!
//! Invariant: a burst runs in registers alone, so what else is in caches and memory does not slow it.

use ferrotron::dtype::Dtype;
use std::hint::black_box;

/// Seconds of processor time of all threads of this process.
pub fn processor_seconds() -> f64 {
    seconds(rustix::time::ClockId::ProcessCPUTime)
}

fn seconds(clock: rustix::time::ClockId) -> f64 {
    let time = rustix::time::clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// GFLOP/s of nothing but multiply-adds in registers, on all threads together.
pub fn peak(threads: usize, dtype: Dtype) -> f64 {
    const STEPS: u64 = 400_000;
    let burst: unsafe fn(u64) -> f64 = match dtype {
        #[cfg(target_arch = "x86_64")]
        Dtype::Bf16 if is_x86_feature_detected!("avx512bf16") => burst_bf16,
        #[cfg(target_arch = "x86_64")]
        _ if is_x86_feature_detected!("avx512f") => burst_avx512,
        #[cfg(target_arch = "x86_64")]
        _ if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") => burst_avx2,
        _ => burst_portable,
    };
    std::thread::scope(|scope| {
        let one = || {
            let start = seconds(rustix::time::ClockId::ThreadCPUTime);
            // SAFETY: chosen by what the processor has.
            let flops = unsafe { burst(STEPS) };
            flops / (seconds(rustix::time::ClockId::ThreadCPUTime) - start) / 1e9
        };
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        all.into_iter().map(|thread| thread.join().expect("a burst cannot fail")).sum()
    })
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
