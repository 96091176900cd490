//! Rounding to the formats of the GPU.
//!
//! Invariant: a result is the exact value rounded once. NaNs come out as the one NaN the hardware makes.

use crate::instruction::{HalfFormat, Rounding};

pub(crate) const NAN: u32 = 0x7FFF_FFFF;

/// The f32 with the hardware's NaN. On bits, as a compiler may take any NaN for any other.
#[inline(always)]
pub(crate) fn canonical(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits(if bits & 0x7FFF_FFFF > 0x7F80_0000 { NAN } else { bits })
}

/// A subnormal becomes a zero of its sign.
#[inline(always)]
pub(crate) fn flush(value: f32) -> f32 {
    if value.to_bits() & 0x7F80_0000 == 0 { f32::from_bits(value.to_bits() & 0x8000_0000) } else { value }
}

/// The sum and what it misses: `a + b = sum + error` exactly, where nothing overflows.
#[inline(always)]
pub(crate) fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let part = sum - a;
    (sum, (a - (sum - part)) + (b - part))
}

/// `sum + error` rounded to odd: a later rounding to 51 bits or less then is as if from the exact value.
#[inline(always)]
fn to_odd(sum: f64, error: f64) -> f64 {
    // The error of an infinity is a NaN, which is not above zero.
    if sum.to_bits() & 1 == 0 && error.abs() > 0.0 {
        let away = (error > 0.0) == (sum > 0.0);
        return f64::from_bits(if away { sum.to_bits() + 1 } else { sum.to_bits() - 1 });
    }
    sum
}

/// `a + b` rounded to odd.
#[inline(always)]
pub(crate) fn sum_to_odd(a: f64, b: f64) -> f64 {
    let (sum, error) = two_sum(a, b);
    to_odd(sum, error)
}

/// `a * b + c`, rounded once, to nearest.
#[inline(always)]
pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
    sum_to_odd(f64::from(a) * f64::from(b), f64::from(c)) as f32
}

/// An f64 as f32.
pub(crate) fn narrow(value: f64, rounding: Rounding) -> f32 {
    let near = value as f32;
    if near.is_nan() || value.is_infinite() {
        return near;
    }
    let wide = f64::from(near);
    match rounding {
        Rounding::Nearest | Rounding::Away => near,
        Rounding::Zero if wide.abs() > value.abs() => {
            if value > 0.0 {
                near.next_down()
            } else {
                near.next_up()
            }
        }
        Rounding::Down if wide > value => near.next_down(),
        Rounding::Up if wide < value => near.next_up(),
        _ => near,
    }
}

/// A floating-point number as a whole one.
pub(crate) fn integral(value: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest | Rounding::Away => value.round_ties_even(),
        Rounding::Zero => value.trunc(),
        Rounding::Down => value.floor(),
        Rounding::Up => value.ceil(),
    }
}

/// To nearest, the common case.
#[inline(always)]
pub(crate) fn bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    if value.is_nan() {
        return 0x7FFF;
    }
    bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16
}

#[inline(always)]
pub(crate) fn from_bf16(bits: u32) -> f32 {
    f32::from_bits(bits << 16)
}

#[inline(always)]
pub(crate) fn from_f16(bits: u32) -> f32 {
    let sign = (bits & 0x8000) << 16;
    let (exponent, fraction) = (bits >> 10 & 31, bits & 0x3FF);
    let magnitude = match exponent {
        0 => (fraction as f32 * 2f32.powi(-24)).to_bits(),
        31 => 0x7F80_0000 | fraction << 13,
        _ => (exponent + 112) << 23 | fraction << 13,
    };
    f32::from_bits(sign | magnitude)
}

#[inline(always)]
pub(crate) fn from_half(bits: u32, format: HalfFormat) -> f32 {
    match format {
        HalfFormat::F16 => from_f16(bits & 0xFFFF),
        HalfFormat::Bf16 => from_bf16(bits & 0xFFFF),
    }
}

/// An f64 in a 16-bit format, rounded once.
pub(crate) fn half(value: f64, format: HalfFormat, rounding: Rounding) -> u32 {
    let (fraction_bits, bias, largest) = match format {
        HalfFormat::F16 => (10, 15, 0x7BFF),
        HalfFormat::Bf16 => (7, 127, 0x7F7F),
    };
    if value.is_nan() {
        return 0x7FFF;
    }
    let sign = u32::from(value.is_sign_negative()) << 15;
    let infinity = largest + 1;
    if value.is_infinite() {
        return sign | infinity;
    }
    let magnitude = value.abs();
    if magnitude == 0.0 {
        return sign;
    }
    // A subnormal f64 is far below every subnormal here: exponent -1023 will do.
    let exponent = ((magnitude.to_bits() >> 52) as i32 - 1023).max(1 - bias);
    // The distance of neighbours, as an exact power of two: `units` then is exact but for what is far below one.
    let scale = 2f64.powi(fraction_bits - exponent);
    let units = magnitude * scale;
    let whole = match (rounding, value > 0.0) {
        (Rounding::Nearest, _) => units.round_ties_even(),
        (Rounding::Away, _) => units.round(),
        (Rounding::Up, true) | (Rounding::Down, false) => units.ceil(),
        _ => units.floor(),
    };
    // A carry out of the fraction runs into the exponent, as it should.
    let bits = (((exponent + bias) as u32) << fraction_bits) + whole as u32 - (1 << fraction_bits);
    if bits >= infinity {
        let stays = match rounding {
            Rounding::Nearest | Rounding::Away => false,
            Rounding::Zero => true,
            Rounding::Down => value > 0.0,
            Rounding::Up => value < 0.0,
        };
        return sign | if stays { largest } else { infinity };
    }
    sign | bits
}

/// An f32 with the 10 bits of fraction of a tf32: to nearest, halves away from zero or to even.
pub(crate) fn tf32(value: f32, rounding: Rounding) -> u32 {
    let bits = value.to_bits();
    if !value.is_finite() {
        return if value.is_nan() { NAN } else { bits };
    }
    match rounding {
        Rounding::Away => bits.wrapping_add(0x1000) & !0x1FFF,
        Rounding::Nearest => bits.wrapping_add(0xFFF + (bits >> 13 & 1)) & !0x1FFF,
        _ => bits & !0x1FFF,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_agrees_with_the_general_rounding() {
        let mut random = crate::random::Random::new(1);
        for _ in 0..200_000 {
            let value = f32::from_bits(random.next() as u32);
            let expected = half(f64::from(value), HalfFormat::Bf16, Rounding::Nearest);
            assert_eq!(bf16(value), expected, "{value:e}");
        }
    }

    #[test]
    fn every_half_survives_the_way_through_f32() {
        for bits in 0..=0xFFFF {
            for format in [HalfFormat::F16, HalfFormat::Bf16] {
                let value = from_half(bits, format);
                let expected = if value.is_nan() { 0x7FFF } else { bits };
                for rounding in [Rounding::Nearest, Rounding::Zero, Rounding::Down, Rounding::Up] {
                    assert_eq!(half(f64::from(value), format, rounding), expected, "{bits:#x} {format:?} {rounding:?}");
                }
            }
        }
    }

    #[test]
    fn fma_agrees_with_the_library() {
        let mut random = crate::random::Random::new(2);
        for i in 0..300_000 {
            let mut next = || f32::from_bits(random.next() as u32);
            let (a, b) = (next(), next());
            let c = if i % 2 == 0 { next() } else { -(a * b) * (1.0 + f32::EPSILON * (i % 7) as f32) };
            let (got, expected) = (fma(a, b, c), a.mul_add(b, c));
            assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(), "{a:e} {b:e} {c:e}: {got:e} {expected:e}");
        }
    }
}
