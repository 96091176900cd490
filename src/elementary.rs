//! Elementary functions of f64 whose bits are the same on every machine: +, -, *, /, square roots and bit patterns only, no mathematical
//! library.
//!
//! Invariant: the `always` inlined ones are straight-line code, so that loops over them become vector instructions.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, FRAC_PI_2, LN_2, LOG2_E};

/// Where the exponent of an f64 begins, and what stands in it for 2^0.
const EXPONENT: u32 = 52;
const BIAS: u64 = 1023;

/// 2^52: the integers up to it stand in the low bits of what they are added to.
const INTEGERS: f64 = 4_503_599_627_370_496.0;

/// Natural logarithm of a positive normal number, to about 1e-15. Zero, negative and non-finite arguments give what f64::ln gives.
pub fn ln(x: f64) -> f64 {
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x == 0.0 {
        return f64::NEG_INFINITY;
    }
    if x == f64::INFINITY {
        return x;
    }
    ln_of_normal(x)
}

/// `ln` of what must be a positive normal number.
#[inline(always)]
pub fn ln_of_normal(x: f64) -> f64 {
    // x = m 2^e with m above sqrt(1/2), up to sqrt(2): counted from the first such m, the exponent's bits count up at each next.
    let from = FRAC_1_SQRT_2.to_bits() + 1;
    let biased = x.to_bits().wrapping_sub(from).wrapping_add(BIAS << EXPONENT) >> EXPONENT;
    let m = f64::from_bits(x.to_bits().wrapping_sub(biased.wrapping_sub(BIAS) << EXPONENT));
    let e = f64::from_bits(INTEGERS.to_bits() | biased) - (INTEGERS + BIAS as f64);
    // ln m = 2 artanh s, with |s| <= 0.172: the series' rest after s^19 is below 1e-17.
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let mut series = 1.0 / 19.0;
    for coefficient in [1.0 / 17.0, 1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0] {
        series = series * square + coefficient;
    }
    2.0 * s * series + e * LN_2
}

/// base^power for a positive base and a result within 1e-300 .. 1e300, to about 1e-14.
pub fn power(base: f64, power: f64) -> f64 {
    let x = power * ln(base);
    assert!(x.abs() < 690.0, "{base}^{power} is out of range");
    let n = (x * LOG2_E).round();
    let r = x - n * LN_2;
    // Taylor to r^14: the rest is below 1e-18 for |r| <= ln(2) / 2.
    let p = (1..15).rev().fold(1.0, |p, k| 1.0 + p * r / k as f64);
    p * f64::from_bits((n as i64 + BIAS as i64).cast_unsigned() << EXPONENT)
}

/// Sine and cosine of an angle of less than a million radians, to about 1e-15.
pub fn sine_cosine(angle: f64) -> (f64, f64) {
    assert!(angle.abs() < 1_048_576.0, "an angle of {angle} radians is too large to be reduced exactly");
    // A quarter turn in two parts: the first has 33 bits, so that up to 2^20 of it are exact.
    let high = f64::from_bits(FRAC_PI_2.to_bits() & !((1 << 20) - 1));
    // What the first part leaves of pi / 2: the dropped bits of the f64, and the 6.1e-17 that the f64 itself lacks.
    let low = (FRAC_PI_2 - high) + 6.123_233_995_736_766e-17;
    let quarters = (angle * FRAC_2_PI).round();
    let (sine, cosine) = sine_cosine_of_small((angle - quarters * high) - quarters * low);
    match quarters as i64 & 3 {
        0 => (sine, cosine),
        1 => (cosine, -sine),
        2 => (-sine, -cosine),
        _ => (-cosine, sine),
    }
}

/// `sine_cosine` of what must be within an eighth of a turn.
#[inline(always)]
pub fn sine_cosine_of_small(r: f64) -> (f64, f64) {
    let square = r * r;
    // Taylor to r^17 and r^16: the rests are below 1e-17 for |r| <= pi / 4.
    let (mut sine, mut cosine) = (1.0 / FACTORIALS[17], 1.0 / FACTORIALS[16]);
    for (n, sign) in [(14, -1.0), (12, 1.0), (10, -1.0), (8, 1.0), (6, -1.0), (4, 1.0), (2, -1.0)] {
        sine = sine * square + sign / FACTORIALS[n + 1];
        cosine = cosine * square + sign / FACTORIALS[n];
    }
    (r + r * (square * sine), 1.0 + square * cosine)
}

/// n!, exact up to 18! and farther.
const FACTORIALS: [f64; 18] = {
    let mut all = [1.0; 18];
    let mut n = 1;
    while n < all.len() {
        all[n] = all[n - 1] * n as f64;
        n += 1;
    }
    all
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_agree_with_the_mathematical_library() {
        for i in 1..20_000 {
            let x = i as f64 * 0.37;
            assert!((ln(x) - x.ln()).abs() <= 1e-15 * x.ln().abs().max(1.0), "ln {x}");
            assert!((ln(1.0 / x) + x.ln()).abs() <= 1e-15 * x.ln().abs().max(1.0), "ln 1 / {x}");
            let (sine, cosine) = sine_cosine(x * 50.0);
            assert!((sine - (x * 50.0).sin()).abs() < 1e-15 && (cosine - (x * 50.0).cos()).abs() < 1e-15, "angle {}", x * 50.0);
            let e = i as f64 / 20_000.0;
            assert!((power(5e5, e) / 5e5f64.powf(e) - 1.0).abs() < 1e-14, "{e}");
        }
        assert!(ln(0.0) == f64::NEG_INFINITY && ln(f64::NAN).is_nan() && ln(f64::INFINITY) == f64::INFINITY);
    }

    #[test]
    fn small_values_keep_their_relative_precision() {
        for i in 1..2000 {
            let small = 0.99f64.powi(i);
            let (sine, _) = sine_cosine(small * 0.78);
            assert!((sine / (small * 0.78).sin() - 1.0).abs() < 1e-15, "sine of {}", small * 0.78);
            let near = 1.0 - small * 0.3;
            assert!((ln(near) / near.ln() - 1.0).abs() < 1e-15 || near == 1.0, "ln {near}");
        }
        for at in [FRAC_1_SQRT_2, std::f64::consts::SQRT_2, 1.0, 2.0, f64::MIN_POSITIVE, f64::MAX] {
            for x in [at.next_down(), at, at.next_up()] {
                assert!(!x.is_normal() || (ln(x) - x.ln()).abs() <= 1e-15 * x.ln().abs().max(1e-300), "ln {x:e}");
            }
        }
    }
}
