//! Loops over slices and the functions they need: conversions, exponentials, dot products.
//!
//! Invariant: every level of instructions gives the same bits: elementwise arithmetic, fused `mul_add`, and sums in one stated order.
#![allow(unsafe_code)]

use crate::device::cpu::Isa;
use crate::dtype::{Dtype, Element};
use half::bf16;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_fpclass_ps_mask, _mm512_loadu_ps, _mm512_storeu_si512};
use std::f32::consts::{LN_2, LOG2_E};

/// out = sums + bias, rounded once.
pub fn finish<T: Element>(isa: Isa, sums: &[f32], bias: Option<&[T]>, out: &mut [T]) {
    match bias {
        Some(bias) => add_bias(isa, sums, bias, out),
        None => narrow(isa, sums, out),
    }
}

leveled! {
    /// out = sums + bias, rounded once.
    pub fn add_bias<T: Element>(sums: &[f32], bias: &[T], out: &mut [T]) {
        for ((sum, bias), out) in sums.iter().zip(bias).zip(out) {
            *out = T::from_f32(sum + bias.to_f32());
        }
    }
}

leveled! {
    /// The numbers of `from` as f32.
    pub fn widen<T: Element>(from: &[T], to: &mut [f32]) {
        for (from, to) in from.iter().zip(to) {
            *to = from.to_f32();
        }
    }
}

/// The numbers of `from`, rounded to nearest even.
pub fn narrow<T: Element>(isa: Isa, from: &[f32], to: &mut [T]) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Bf16 && T::DTYPE == Dtype::Bf16 {
        // SAFETY: `Cpu` holds an `Isa` that this processor has.
        return unsafe { narrow_bf16(from, bytemuck::cast_slice_mut(to)) };
    }
    narrow_at_level(isa, from, to);
}

leveled! {
    /// `narrow` by plain arithmetic.
    pub fn narrow_at_level<T: Element>(from: &[f32], to: &mut [T]) {
        for (from, to) in from.iter().zip(to) {
            *to = T::from_f32(*from);
        }
    }
}

/// `narrow` by the processor's own conversion, which takes a denormal for zero: plain arithmetic does blocks that have one.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn narrow_bf16(from: &[f32], to: &mut [bf16]) {
    const DENORMAL: i32 = 0x20;
    assert_eq!(from.len(), to.len(), "as many numbers as places for them");
    let (blocks, rest) = from.as_chunks::<32>();
    let (places, last) = to.as_chunks_mut::<32>();
    for (from, to) in blocks.iter().zip(places) {
        // SAFETY: a block is two vectors.
        let (low, high) = unsafe { (_mm512_loadu_ps(from.as_ptr()), _mm512_loadu_ps(from.as_ptr().add(16))) };
        if _mm512_fpclass_ps_mask::<DENORMAL>(low) | _mm512_fpclass_ps_mask::<DENORMAL>(high) != 0 {
            from.iter().zip(to).for_each(|(from, to)| *to = Element::from_f32(*from));
            continue;
        }
        let rounded = _mm512_cvtne2ps_pbh(high, low);
        // SAFETY: a block of results is one vector, and any bits are one.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), std::mem::transmute::<__m512bh, __m512i>(rounded)) };
    }
    rest.iter().zip(last).for_each(|(from, to)| *to = Element::from_f32(*from));
}

/// Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits: here together with the bias of an exponent.
pub const ROUNDER: f32 = 12_582_912.0 + 127.0;
/// Below this, e^x is not a normal number.
const LOWEST: f32 = -87.336_54;
/// Below this, 2^x is not a normal number.
pub const LOWEST_EXPONENT: f32 = -126.0;
/// 2^r for r from -1/2 to 1/2 as a polynomial from r^5 down to r: the least error, 1.1e-7, among those that give 1 for 0.
pub const COEFFICIENTS: [f32; 5] = [0.001_326_472_8, 0.009_671_513, 0.055_507_336, 0.240_222_42, LN_2 - 1.8e-7];

/// 2^x for an x from -126 to 127, with a relative error of 2e-7 at most; a NaN stays one. For other x the result means nothing.
#[inline(always)]
pub fn exp2_within(x: f32) -> f32 {
    let shifted = x + ROUNDER;
    two_to_the(x - (shifted - ROUNDER), shifted)
}

/// `exp2_within` for any x of 127 at most; what would be less than a normal number is zero.
#[inline(always)]
pub fn exp2_of_low(x: f32) -> f32 {
    let power = exp2_within(x);
    if x < LOWEST_EXPONENT { 0.0 } else { power }
}

/// e^x for an x from -87.3 to 88, with a relative error of 2e-7 + 2e-8 |x| at most; a NaN stays one. For other x the result means nothing.
#[inline(always)]
pub fn exp_within(x: f32) -> f32 {
    // The product with log2(e) is not rounded before the whole number is taken from it.
    let shifted = x.mul_add(LOG2_E, ROUNDER);
    two_to_the(x.mul_add(LOG2_E, ROUNDER - shifted), shifted)
}

/// `exp_within` for any x of 88 at most; what would be less than a normal number is zero.
#[inline(always)]
pub fn exp_of_low(x: f32) -> f32 {
    let power = exp_within(x);
    if x < LOWEST { 0.0 } else { power }
}

/// 2^(rest + n) for shifted = n + ROUNDER.
#[inline(always)]
fn two_to_the(rest: f32, shifted: f32) -> f32 {
    let mut power = COEFFICIENTS[0];
    for coefficient in &COEFFICIENTS[1..] {
        power = rest.mul_add(power, *coefficient);
    }
    // A shift to the left moves the biased exponent to its place; the bits above it fall out.
    rest.mul_add(power, 1.0) * f32::from_bits(shifted.to_bits() << 23)
}

/// Sums over slices go over this many lanes, which are added in a tree at the end: an order that any vector width can follow.
pub const LANES: usize = 16;

#[inline(always)]
pub fn add_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut count = LANES / 2;
    while count > 0 {
        for lane in 0..count {
            lanes[lane] += lanes[lane + count];
        }
        count /= 2;
    }
    lanes[0]
}

leveled! {
    /// out[0] = sum of a * b.
    pub fn dot<T: Element>(a: &[T], b: &[T], out: &mut f32) {
        let mut lanes = [0.0; LANES];
        let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        for (lane, (a, b)) in a_blocks.remainder().iter().zip(b_blocks.remainder()).enumerate() {
            lanes[lane] = a.to_f32() * b.to_f32();
        }
        for (a, b) in a_blocks.zip(b_blocks) {
            for lane in 0..LANES {
                lanes[lane] = a[lane].to_f32().mul_add(b[lane].to_f32(), lanes[lane]);
            }
        }
        *out = add_lanes(lanes);
    }
}

leveled! {
    /// to = from * factor, rounded.
    pub fn scaled<T: Element>(from: &[f32], factor: f32, to: &mut [T]) {
        for (from, to) in from.iter().zip(to) {
            *to = T::from_f32(from * factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_close_and_keep_their_limits() {
        for index in -8_733_000..=8_800_000i32 {
            let x = index as f32 * 1e-5;
            let (right, ours) = ((x as f64).exp(), exp_of_low(x));
            assert_eq!(ours.to_bits(), exp_within(x).to_bits(), "exp {x}");
            assert!((ours as f64 / right - 1.0).abs() <= 2e-7 + 2e-8 * x.abs() as f64, "exp {x}: {ours} for {right}");
        }
        for index in -12_600_000..=12_700_000i32 {
            let x = index as f32 * 1e-5;
            let (right, ours) = ((x as f64).exp2(), exp2_of_low(x));
            assert_eq!(ours.to_bits(), exp2_within(x).to_bits(), "2^{x}");
            assert!((ours as f64 / right - 1.0).abs() <= 2e-7, "2^{x}: {ours} for {right}");
        }
        // Every 41st negative number from -0 to -infinity, and all about the least normal result.
        let tiny = |x: f32| {
            let (right, ours) = ((x as f64).exp(), exp_of_low(x));
            let close = (ours as f64 - right).abs() <= 2e-6 * right;
            assert!(close || ours == 0.0 && right < 1.000_01 * f32::MIN_POSITIVE as f64, "exp {x:e}: {ours:e} for {right:e}");
        };
        (0x8000_0000u32..=0xff80_0000).step_by(41).map(f32::from_bits).for_each(tiny);
        (0..1 << 12).map(|i| f32::from_bits(LOWEST.to_bits() - (1 << 11) + i)).for_each(tiny);
        assert_eq!([exp_of_low(f32::NEG_INFINITY), exp_of_low(-200.0), exp_of_low(0.0), exp_of_low(-0.0)], [0.0, 0.0, 1.0, 1.0]);
        assert_eq!([f32::NEG_INFINITY, -126.1, -126.0, 0.0, 1.0].map(exp2_of_low), [0.0, 0.0, f32::MIN_POSITIVE, 1.0, 2.0]);
        for nan in [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xffff_ffff, 0x7fd5_5555].map(f32::from_bits) {
            assert!(exp_of_low(nan).is_nan() && exp_within(nan).is_nan() && exp2_of_low(nan).is_nan(), "{:x}", nan.to_bits());
        }
    }

    #[test]
    fn every_level_rounds_alike() {
        // All upper halves, with lower halves that round down, to even and up; the numbers next to each other are alike, and then are not.
        let lows = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let alike = (0..1 << 16).flat_map(|high: u32| lows.map(|low| f32::from_bits((high << 16) | low)));
        let mixed = (0..1 << 16).flat_map(|high: u32| lows.map(|low| f32::from_bits((high.wrapping_mul(40_503) << 16) | low)));
        let numbers: Vec<f32> = alike.chain(mixed).chain([1.0; 21]).collect();
        let right: Vec<u16> = numbers.iter().map(|x| <bf16 as Element>::from_f32(*x).to_bits()).collect();
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16].into_iter().filter(|&isa| isa <= Isa::detect()) {
            let mut rounded = vec![bf16::ZERO; numbers.len()];
            narrow(isa, &numbers, &mut rounded);
            let wrong = rounded.iter().zip(&right).position(|(ours, right)| ours.to_bits() != *right);
            assert_eq!(wrong.map(|i| (numbers[i], rounded[i], right[i])), None, "{isa:?}");
        }
    }
}
