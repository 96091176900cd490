//! Floating-point numbers of 16 bits, alone or in pairs.
//!
//! Invariant: every operation is done on exact values and rounded once to the format.

use crate::instruction::{Float, HalfFlags, HalfFormat, Rounding, Slots};
use crate::registers::{Mask, Registers};
use crate::rounding::{bf16, flush, from_half, half, sum_to_odd};

pub(super) fn execute(operator: Float, flags: HalfFlags, r: &mut Registers, slots: &Slots, mask: Mask) {
    let &Slots { to, a, b, c } = slots;
    let pair = |one: &dyn Fn(u32) -> u32| if flags.pair { one(0) | one(16) << 16 } else { one(0) };
    let cut = |value: u32, shift: u32| value >> shift & 0xFFFF;
    match operator {
        Float::Negate => r.unary::<u32, u32>(to, a, mask, |x| x ^ if flags.pair { 0x8000_8000 } else { 0x8000 }),
        Float::Absolute => r.unary::<u32, u32>(to, a, mask, |x| x & if flags.pair { 0x7FFF_7FFF } else { 0x7FFF }),
        Float::Exponential | Float::Tangent => {
            r.unary::<u32, u32>(to, a, mask, |x| pair(&|shift| one(operator, flags, [cut(x, shift), 0, 0])));
        }
        Float::MultiplyAdd => r.ternary::<u32, u32, u32, u32>(to, [a, b, c], mask, |x, y, z| {
            pair(&|shift| one(operator, flags, [cut(x, shift), cut(y, shift), cut(z, shift)]))
        }),
        _ => r.binary::<u32, u32, u32>(to, [a, b], mask, |x, y| pair(&|shift| one(operator, flags, [cut(x, shift), cut(y, shift), 0]))),
    }
}

fn one(operator: Float, flags: HalfFlags, bits: [u32; 3]) -> u32 {
    // f16 subnormals are normal numbers in f32: the flush looks at the format's own exponent.
    let tiny = |bits: u32| flags.flush && bits & if flags.format == HalfFormat::F16 { 0x7C00 } else { 0x7F80 } == 0;
    let [x, y, z] = bits.map(|bits| if tiny(bits) { from_half(bits & 0x8000, flags.format) } else { from_half(bits, flags.format) });
    let result = match operator {
        Float::Add => sum_to_odd(f64::from(x), f64::from(y)),
        Float::Subtract => sum_to_odd(f64::from(x), -f64::from(y)),
        Float::Multiply => f64::from(x) * f64::from(y),
        Float::MultiplyAdd => sum_to_odd(f64::from(x) * f64::from(y), f64::from(z)),
        Float::Minimum => f64::from(super::float::minimum(x, y)),
        Float::Maximum => f64::from(-super::float::minimum(-x, -y)),
        Float::MinimumNan => f64::from(super::float::or_nan(x, y, super::float::minimum(x, y))),
        Float::MaximumNan => f64::from(super::float::or_nan(x, y, -super::float::minimum(-x, -y))),
        Float::Exponential => f64::from(x.exp2()),
        Float::Tangent => f64::from(x.tanh()),
        other => unreachable!("the decoder refuses {other:?} of 16 bits"),
    };
    let result = match flags.saturate {
        true if result > 0.0 => result.min(1.0),
        true => 0.0,
        false => result,
    };
    let result = if flags.relu && result < 0.0 { 0.0 } else { result };
    let rounded = half(result, flags.format, Rounding::Nearest);
    if tiny(rounded) { rounded & 0x8000 } else { rounded }
}

/// One f32 in a 16-bit format.
#[inline(always)]
pub(super) fn from_single(value: f32, format: HalfFormat, rounding: Rounding, relu: bool, flushes: bool) -> u32 {
    let value = if flushes { flush(value) } else { value };
    let value = if relu && value < 0.0 { 0.0 } else { value };
    if format == HalfFormat::Bf16 && rounding == Rounding::Nearest { bf16(value) } else { half(f64::from(value), format, rounding) }
}
