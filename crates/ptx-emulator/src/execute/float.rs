//! Floating-point numbers of 32 and 64 bits.
//!
//! Invariant: sums, products, quotients and roots are rounded once. The approximate functions (`ex2`, `lg2`, `sin`, `cos`, `tanh`,
//! `rcp`, `rsqrt`) are the host's, which are closer to the exact value than the hardware's.

use crate::instruction::{Float, FloatFlags, Rounding, Slots};
use crate::registers::{Mask, Registers};
use crate::rounding::{canonical, flush, fma, narrow, sum_to_odd};

pub(super) fn single(operator: Float, flags: FloatFlags, registers: &mut Registers, slots: &Slots, mask: Mask) {
    if flags.rounding != Rounding::Nearest {
        return directed(operator, flags, registers, slots, mask);
    }
    match (flags.flush, flags.saturate) {
        (false, false) => apply(operator, registers, slots, mask, |x| x, canonical),
        (true, false) => apply(operator, registers, slots, mask, flush, |x| flush(canonical(x))),
        (false, true) => apply(operator, registers, slots, mask, |x| x, saturate),
        (true, true) => apply(operator, registers, slots, mask, flush, |x| flush(saturate(x))),
    }
}

/// Into 0 to 1; NaN becomes 0.
#[inline(always)]
fn saturate(value: f32) -> f32 {
    if value > 0.0 { value.min(1.0) } else { 0.0 }
}

#[inline(always)]
fn apply(
    operator: Float,
    r: &mut Registers,
    slots: &Slots,
    mask: Mask,
    input: impl Fn(f32) -> f32 + Copy,
    output: impl Fn(f32) -> f32 + Copy,
) {
    let &Slots { to, a, b, c } = slots;
    let ab = [a, b];
    match operator {
        Float::Add => r.binary::<f32, f32, f32>(to, ab, mask, |x, y| output(input(x) + input(y))),
        Float::Subtract => r.binary::<f32, f32, f32>(to, ab, mask, |x, y| output(input(x) - input(y))),
        Float::Multiply => r.binary::<f32, f32, f32>(to, ab, mask, |x, y| output(input(x) * input(y))),
        Float::Divide => r.binary::<f32, f32, f32>(to, ab, mask, |x, y| output(input(x) / input(y))),
        Float::MultiplyAdd => r.ternary::<f32, f32, f32, f32>(to, [a, b, c], mask, |x, y, z| output(fma(input(x), input(y), input(z)))),
        Float::Minimum => r.binary::<f32, f32, f32>(to, ab, mask, |x, y| output(minimum(input(x), input(y)))),
        Float::Maximum => r.binary::<f32, f32, f32>(to, ab, mask, |x, y| output(-minimum(-input(x), -input(y)))),
        Float::MinimumNan => r.binary::<f32, f32, f32>(to, ab, mask, |x, y| output(or_nan(x, y, minimum(input(x), input(y))))),
        Float::MaximumNan => r.binary::<f32, f32, f32>(to, ab, mask, |x, y| output(or_nan(x, y, -minimum(-input(x), -input(y))))),
        Float::Negate => r.unary::<f32, f32>(to, a, mask, |x| -input(x)),
        Float::Absolute => r.unary::<f32, f32>(to, a, mask, |x| input(x).abs()),
        // The sign is the first operand's.
        Float::CopySign => r.binary::<f32, f32, f32>(to, ab, mask, |x, y| y.copysign(x)),
        Float::Reciprocal => r.unary::<f32, f32>(to, a, mask, |x| output(1.0 / input(x))),
        Float::SquareRoot => r.unary::<f32, f32>(to, a, mask, |x| output(input(x).sqrt())),
        Float::ReciprocalSquareRoot => r.unary::<f32, f32>(to, a, mask, |x| output((1.0 / f64::from(input(x)).sqrt()) as f32)),
        Float::Exponential => r.unary::<f32, f32>(to, a, mask, |x| output(input(x).exp2())),
        Float::Logarithm => r.unary::<f32, f32>(to, a, mask, |x| output(input(x).log2())),
        Float::Sine => r.unary::<f32, f32>(to, a, mask, |x| output(input(x).sin())),
        Float::Cosine => r.unary::<f32, f32>(to, a, mask, |x| output(input(x).cos())),
        Float::Tangent => r.unary::<f32, f32>(to, a, mask, |x| output(input(x).tanh())),
    }
}

/// Of a number and a NaN the number; -0 is below +0.
#[inline(always)]
pub(super) fn minimum(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        b
    } else if b.is_nan() || a < b || (a == b && a.is_sign_negative()) {
        a
    } else {
        b
    }
}

#[inline(always)]
pub(super) fn or_nan(a: f32, b: f32, result: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { result }
}

/// Sums and products rounded down, up or to zero.
fn directed(operator: Float, flags: FloatFlags, r: &mut Registers, slots: &Slots, mask: Mask) {
    let &Slots { to, a, b, c } = slots;
    let input = |x: f32| f64::from(if flags.flush { flush(x) } else { x });
    let output = |x: f32| {
        let x = if flags.saturate { saturate(x) } else { canonical(x) };
        if flags.flush { flush(x) } else { x }
    };
    let sum = |x: f64, y: f64| {
        let sum = sum_to_odd(x, y);
        // An exact zero from opposite numbers is -0 when rounding down.
        if sum == 0.0 && x != 0.0 && flags.rounding == Rounding::Down { -0.0 } else { narrow(sum, flags.rounding) }
    };
    match operator {
        Float::Add => r.binary::<f32, f32, f32>(to, [a, b], mask, |x, y| output(sum(input(x), input(y)))),
        Float::Subtract => r.binary::<f32, f32, f32>(to, [a, b], mask, |x, y| output(sum(input(x), -input(y)))),
        Float::Multiply => r.binary::<f32, f32, f32>(to, [a, b], mask, |x, y| output(narrow(input(x) * input(y), flags.rounding))),
        Float::MultiplyAdd => {
            r.ternary::<f32, f32, f32, f32>(to, [a, b, c], mask, |x, y, z| output(sum(input(x) * input(y), input(z))));
        }
        other => unreachable!("the decoder refuses directed rounding of {other:?}"),
    }
}

pub(super) fn double(operator: Float, r: &mut Registers, slots: &Slots, mask: Mask) {
    let &Slots { to, a, b, c } = slots;
    let ab = [a, b];
    let nan = |x: f64, y: f64, result: f64| if x.is_nan() || y.is_nan() { f64::NAN } else { result };
    match operator {
        Float::Add => r.binary::<f64, f64, f64>(to, ab, mask, |x, y| x + y),
        Float::Subtract => r.binary::<f64, f64, f64>(to, ab, mask, |x, y| x - y),
        Float::Multiply => r.binary::<f64, f64, f64>(to, ab, mask, |x, y| x * y),
        Float::Divide => r.binary::<f64, f64, f64>(to, ab, mask, |x, y| x / y),
        Float::MultiplyAdd => r.ternary::<f64, f64, f64, f64>(to, [a, b, c], mask, f64::mul_add),
        Float::Minimum => r.binary::<f64, f64, f64>(to, ab, mask, f64::min),
        Float::Maximum => r.binary::<f64, f64, f64>(to, ab, mask, f64::max),
        Float::MinimumNan => r.binary::<f64, f64, f64>(to, ab, mask, |x, y| nan(x, y, x.min(y))),
        Float::MaximumNan => r.binary::<f64, f64, f64>(to, ab, mask, |x, y| nan(x, y, x.max(y))),
        Float::Negate => r.unary::<f64, f64>(to, a, mask, |x| -x),
        Float::Absolute => r.unary::<f64, f64>(to, a, mask, f64::abs),
        Float::CopySign => r.binary::<f64, f64, f64>(to, ab, mask, |x, y| y.copysign(x)),
        Float::Reciprocal => r.unary::<f64, f64>(to, a, mask, |x| 1.0 / x),
        Float::SquareRoot => r.unary::<f64, f64>(to, a, mask, f64::sqrt),
        Float::ReciprocalSquareRoot => r.unary::<f64, f64>(to, a, mask, |x| 1.0 / x.sqrt()),
        Float::Exponential => r.unary::<f64, f64>(to, a, mask, f64::exp2),
        Float::Logarithm => r.unary::<f64, f64>(to, a, mask, f64::log2),
        Float::Sine => r.unary::<f64, f64>(to, a, mask, f64::sin),
        Float::Cosine => r.unary::<f64, f64>(to, a, mask, f64::cos),
        Float::Tangent => r.unary::<f64, f64>(to, a, mask, f64::tanh),
    }
}
