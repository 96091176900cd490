//! Functions of f32 and sums whose bits are the same on every machine: +, -, *, / and bit patterns only, no mathematical library.
//!
//! Invariant: a sum over a row adds element i to lane i % LANES and then folds the lanes in halves; nothing but the length decides
//! the order. The f32 functions are straight-line code, so that loops over them become vector instructions.

use crate::dtype::{Dtype, Element};

/// Two 512-bit registers of f32: enough independent additions to keep a core busy.
pub const LANES: usize = 32;

/// Elements that are converted to f32 before they are summed: a plain loop becomes better vector code than one that does both. Whole lanes.
const BLOCK: usize = 8 * LANES;

/// 1.5 * 2^23: adding it to a small f32 rounds to an integer, which then stands in the low bits.
const ROUNDER: f32 = 12_582_912.0;

/// e^x, within one unit in the last place. Overflows to infinity, underflows through the denormals to zero; NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // ln 2 in two parts: the first has nine bits, so that n times it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Beyond these ends the result is zero or infinite anyway, and n stays small enough for two factors of 2^(n/2).
    let x = x.clamp(-104.0, 89.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    // Taylor to r^7: the rest is below 6e-9 for |r| <= ln(2) / 2, a tenth of a unit in the last place.
    let mut q = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5] {
        q = q * r + coefficient;
    }
    let p = 1.0 + (r + (r * r) * q);
    let exponent = shifted.to_bits().wrapping_sub(ROUNDER.to_bits()) as i32;
    let half = exponent >> 1;
    p * power_of_two(half) * power_of_two(exponent.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits((exponent.wrapping_add(127) as u32) << 23)
}

/// 1 / (1 + e^-x) and its complement 1 - that, neither by a subtraction that cancels.
#[inline(always)]
pub fn sigmoid(x: f32) -> (f32, f32) {
    // Beyond +-88 the smaller of the two is under the least normal number; stopping there keeps 0 * infinity away.
    let e = exp(-x.clamp(-88.0, 88.0));
    let s = 1.0 / (1.0 + e);
    (s, e * s)
}

/// The sum of `term` over a row, in lanes.
#[inline(always)]
pub fn sum<T: Element>(x: &[T], term: impl Fn(f32) -> f32) -> f32 {
    let (mut lanes, mut space) = ([0f32; LANES], [0f32; BLOCK]);
    for x in x.chunks(BLOCK) {
        let (blocks, rest) = widened(x, &mut space).as_chunks::<LANES>();
        // A copy that only this loop touches stays in registers.
        let mut here = lanes;
        for x in blocks {
            for i in 0..LANES {
                here[i] += term(x[i]);
            }
        }
        lanes = here;
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += term(*x);
        }
    }
    fold(lanes)
}

/// The two sums of `terms` over three rows read side by side, in lanes.
#[inline(always)]
pub fn sums_of_three<T: Element>(a: &[T], b: &[T], c: &[T], terms: impl Fn(f32, f32, f32) -> (f32, f32)) -> (f32, f32) {
    let ((a, rest_a), (b, rest_b), (c, rest_c)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    let (mut first, mut second) = ([0f32; LANES], [0f32; LANES]);
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..LANES {
            let (x, y) = terms(a[i].to_f32(), b[i].to_f32(), c[i].to_f32());
            first[i] += x;
            second[i] += y;
        }
    }
    for (i, ((a, b), c)) in rest_a.iter().zip(rest_b).zip(rest_c).enumerate() {
        let (x, y) = terms(a.to_f32(), b.to_f32(), c.to_f32());
        first[i] += x;
        second[i] += y;
    }
    (fold(first), fold(second))
}

/// The greatest element; -infinity for none. A NaN is passed over.
#[inline(always)]
pub fn max<T: Element>(x: &[T]) -> f32 {
    let (mut lanes, mut space) = ([f32::NEG_INFINITY; LANES], [0f32; BLOCK]);
    for x in x.chunks(BLOCK) {
        let (blocks, rest) = widened(x, &mut space).as_chunks::<LANES>();
        let mut here = lanes;
        for x in blocks {
            for i in 0..LANES {
                here[i] = greater(here[i], x[i]);
            }
        }
        lanes = here;
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane = greater(*lane, *x);
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, greater)
}

#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// At most a block of elements as f32: themselves, or converted into `space`.
#[inline(always)]
fn widened<'a, T: Element>(x: &'a [T], space: &'a mut [f32; BLOCK]) -> &'a [f32] {
    if T::DTYPE == Dtype::F32 {
        return bytemuck::cast_slice(x);
    }
    for (wide, x) in space.iter_mut().zip(x) {
        *wide = x.to_f32();
    }
    &space[..x.len()]
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_one_unit_in_the_last_place() {
        let mut worst = 0f64;
        for i in -1_040_000..=887_000 {
            let x = i as f32 * 1e-4;
            let (ours, truth) = (exp(x) as f64, (x as f64).exp());
            let unit = f64::max(truth.log2().floor().exp2() * 2f64.powi(-23), 2f64.powi(-149));
            worst = worst.max((ours - truth).abs() / unit);
        }
        assert!(worst <= 1.0, "{worst} units");
        assert_eq!([exp(0.0), exp(-0.0), exp(f32::NEG_INFINITY), exp(-200.0)], [1.0, 1.0, 0.0, 0.0]);
        assert_eq!([exp(f32::INFINITY), exp(88.73)], [f32::INFINITY; 2]);
        assert!(exp(88.722).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn sigmoid_and_its_complement_keep_their_relative_precision() {
        for i in -8800..=8800 {
            let x = i as f32 * 0.01;
            let (s, complement) = sigmoid(x);
            let truth = 1.0 / (1.0 + (-x as f64).exp());
            let other = 1.0 / (1.0 + (x as f64).exp());
            assert!((s as f64 / truth - 1.0).abs() < 3e-7 && (complement as f64 / other - 1.0).abs() < 3e-7, "{x}: {s} {complement}");
        }
        assert!(sigmoid(f32::NAN).0.is_nan());
    }

    #[test]
    fn sums_do_not_depend_on_anything_but_the_row() {
        let x: Vec<f32> = (0..77).map(|i| (i as f32).sqrt() - 4.0).collect();
        let mut lanes = [0f32; LANES];
        x.iter().enumerate().for_each(|(i, x)| lanes[i % LANES] += x);
        assert_eq!(sum(&x, |x| x).to_bits(), fold(lanes).to_bits());
        let (first, second) = sums_of_three(&x, &x, &x, |a, b, c| (a, b * c));
        assert_eq!((first, second), (sum(&x, |x| x), sum(&x, |x| x * x)));
        assert_eq!((max(&x), max::<f32>(&[])), (x[76], f32::NEG_INFINITY));
    }
}
