//! Loops over slices and the functions they need: conversions, exponentials, dot products.
//!
//! Invariant: every level of instructions gives the same bits: elementwise arithmetic, fused `mul_add`, and sums in one stated order.
#![allow(unsafe_code)]

use crate::device::cpu::Isa;
use crate::dtype::Element;

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

leveled! {
    /// The numbers of `from` as f32.
    pub fn widen<T: Element>(from: &[T], to: &mut [f32]) {
        for (from, to) in from.iter().zip(to) {
            *to = from.to_f32();
        }
    }
}

leveled! {
    /// The numbers of `from`, rounded to nearest even.
    pub fn narrow<T: Element>(from: &[f32], to: &mut [T]) {
        narrow_plain(from, to);
    }
}

// Adding and subtracting 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Below this, e^x is not a normal number; above the other, it is not a number.
const LOWEST: f32 = -87.336_54;
const HIGHEST: f32 = 88.722_84;

/// e^x, to about one unit in the last place; numbers below the normal ones are zero.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // A NaN fails both comparisons and stays.
    let bounded = if x < LOWEST { LOWEST } else { x };
    let bounded = if bounded > HIGHEST { HIGHEST } else { bounded };
    let (power, shifted) = power_and_exponent(bounded);
    // 2^whole in two factors, since 2^128 is not a number.
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = exponent >> 1;
    let scale = |exponent: i32| f32::from_bits(((exponent + 127) << 23) as u32);
    let result = power * scale(half) * scale(exponent - half);
    let result = if x > HIGHEST { f32::INFINITY } else { result };
    if x < LOWEST { 0.0 } else { result }
}

/// The bits of `exp` for an x of 88 at most, or a NaN, with less work: one factor is enough.
#[inline(always)]
pub fn exp_of_low(x: f32) -> f32 {
    let (power, shifted) = power_and_exponent(x);
    // The low bits of `shifted` are the exponent, which a shift to the left moves to its place; the bits above fall out.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    // What comes out for lower numbers is not used.
    if x < LOWEST { 0.0 } else { power * scale }
}

/// e^(x - n ln 2) for the whole number n that is nearest to x / ln 2, and n + ROUND.
#[inline(always)]
fn power_and_exponent(x: f32) -> (f32, f32) {
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    // ln 2 in two parts: the first has few enough bits for exact products.
    let rest = whole.mul_add(-0.693_145_75, x);
    let rest = whole.mul_add(-1.428_606_8e-6, rest);
    let mut power = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        power = rest.mul_add(power, coefficient);
    }
    (power, shifted)
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
    fn exp_of_low_numbers_is_exp() {
        let check = |x: f32| {
            let (ours, right) = (exp_of_low(x), exp(x));
            assert!(ours.to_bits() == right.to_bits() || ours.is_nan() && right.is_nan(), "exp {x:e}: {ours:e} for {right:e}");
        };
        // Every 41st negative number from -0 to -infinity, all about the least normal result, and positive ones up to 88.
        (0x8000_0000u32..=0xff80_0000).step_by(41).map(f32::from_bits).for_each(check);
        (0..1 << 20).map(|i| f32::from_bits(LOWEST.to_bits() - (1 << 19) + i)).for_each(check);
        (0..=88.0f32.to_bits()).step_by(4001).map(f32::from_bits).for_each(check);
        [f32::NEG_INFINITY, f32::NAN, -f32::NAN, 88.0, 0.0].into_iter().for_each(check);
    }

    #[test]
    fn exp_is_close_and_keeps_its_limits() {
        for index in -4_000_000..4_000_000i32 {
            let x = index as f32 * 2.3e-5;
            let (right, ours) = ((x as f64).exp(), exp(x) as f64);
            if (-87.3..88.7).contains(&x) {
                assert!((ours - right).abs() <= 1.5e-7 * right, "exp {x}: {ours} for {right}");
            }
        }
        assert_eq!(
            (exp(f32::NEG_INFINITY), exp(-200.0), exp(0.0), exp(90.0), exp(f32::INFINITY)),
            (0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY)
        );
        assert!(exp(f32::NAN).is_nan());
    }
}
