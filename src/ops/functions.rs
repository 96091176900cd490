//! Functions of f32 and sums whose bits are the same on every machine: +, -, *, / and bit patterns only, no mathematical library.
//! The exponential function is in `device::cpu::vector`, since attention has need of its parts there.
//!
//! Invariant: a sum over a row adds element i to lane i % LANES and then folds the lanes in halves; nothing but the length decides
//! the order. The f32 functions are straight-line code, so that loops over them become vector instructions.

use crate::dtype::Element;
use std::hint::black_box;

/// Two 512-bit registers of f32: enough independent additions to keep a core busy.
pub const LANES: usize = 32;

/// s = 1 / (1 + e^-x) and its complement 1 - s from e^-x, neither by a subtraction that cancels.
#[inline(always)]
pub fn sigmoid(decay: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + decay);
    (s, decay * s)
}

/// The sum of `term` over a row, in lanes.
#[inline(always)]
pub fn sum<T: Element>(x: &[T], term: impl Fn(f32) -> f32) -> f32 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for x in blocks {
        for i in 0..LANES {
            lanes[i] += term(x[i].to_f32());
        }
    }
    // Where lanes leave the loop in memory, it has them in whole registers; else the compiler cuts them to suit what comes next.
    let mut lanes = black_box(lanes);
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += term(x.to_f32());
    }
    fold(lanes)
}

/// The two sums of `terms` over three rows read side by side, in lanes.
#[inline(always)]
pub fn sums_of_three<T: Element>(a: &[T], b: &[T], c: &[f32], terms: impl Fn(f32, f32, f32) -> (f32, f32)) -> (f32, f32) {
    let ((a, rest_a), (b, rest_b), (c, rest_c)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    let (mut first, mut second) = ([0f32; LANES], [0f32; LANES]);
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..LANES {
            let (x, y) = terms(a[i].to_f32(), b[i].to_f32(), c[i]);
            first[i] += x;
            second[i] += y;
        }
    }
    let (mut first, mut second) = black_box((first, second));
    for (i, ((a, b), c)) in rest_a.iter().zip(rest_b).zip(rest_c).enumerate() {
        let (x, y) = terms(a.to_f32(), b.to_f32(), *c);
        first[i] += x;
        second[i] += y;
    }
    (fold(first), fold(second))
}

/// The greatest element; -infinity for none. A NaN is passed over.
#[inline(always)]
pub fn max<T: Element>(x: &[T]) -> f32 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for x in blocks {
        for i in 0..LANES {
            lanes[i] = greater(lanes[i], x[i].to_f32());
        }
    }
    let mut lanes = black_box(lanes);
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = greater(*lane, x.to_f32());
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, greater)
}

#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

#[inline(always)]
fn fold(lanes: [f32; LANES]) -> f32 {
    let lanes: [f32; 16] = halved(lanes);
    let lanes: [f32; 8] = halved(lanes);
    let lanes: [f32; 4] = halved(lanes);
    let [a, b] = halved(lanes);
    a + b
}

#[inline(always)]
fn halved<const N: usize, const HALF: usize>(lanes: [f32; N]) -> [f32; HALF] {
    let mut sums = [0f32; HALF];
    for i in 0..HALF {
        sums[i] = lanes[i] + lanes[i + HALF];
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::vector::exp_within;

    #[test]
    fn sigmoid_and_its_complement_keep_their_relative_precision() {
        for i in -8700..=8700 {
            let x = i as f32 * 0.01;
            let (s, complement) = sigmoid(exp_within(-x));
            let truth = 1.0 / (1.0 + (-x as f64).exp());
            let other = 1.0 / (1.0 + (x as f64).exp());
            let close = |ours: f32, truth: f64| (ours as f64 / truth - 1.0).abs() < 4e-7 + 2e-8 * x.abs() as f64;
            assert!(close(s, truth) && close(complement, other), "{x}: {s} {complement}");
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
