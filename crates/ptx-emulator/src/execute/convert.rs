//! Conversions between types.
//!
//! Invariant: a conversion to whole numbers stays inside the type (NaN becomes 0), one to fewer bits cuts unless it saturates.

use super::half::from_single;
use crate::instruction::{Convert, HalfFormat, Rounding, Slots};
use crate::registers::{LANES, Lane, Mask, Registers};
use crate::rounding::{canonical, flush, from_half, half, integral, narrow, tf32};
use crate::scalar::Scalar;

pub(super) fn execute(convert: Convert, r: &mut Registers, slots: &Slots, mask: Mask) {
    let &Slots { to, a, .. } = slots;
    let plain = !convert.flush && !convert.saturate && !convert.integral && !convert.relu;
    match (convert.to, convert.from, convert.rounding) {
        (Scalar::F32, Scalar::Bf16, _) if plain => r.unary::<u32, u32>(to, a, mask, |x| x << 16),
        (Scalar::Bf16, Scalar::F32, Rounding::Nearest) if plain => r.unary::<f32, u32>(to, a, mask, crate::rounding::bf16),
        (Scalar::F32, Scalar::S32, Rounding::Nearest) if plain => r.unary::<i32, f32>(to, a, mask, |x| x as f32),
        (Scalar::F32, Scalar::U32, Rounding::Nearest) if plain => r.unary::<u32, f32>(to, a, mask, |x| x as f32),
        (Scalar::F32, Scalar::S64, Rounding::Nearest) if plain => r.unary::<i64, f32>(to, a, mask, |x| x as f32),
        (Scalar::F32, Scalar::U64, Rounding::Nearest) if plain => r.unary::<u64, f32>(to, a, mask, |x| x as f32),
        (Scalar::F64, Scalar::S64, Rounding::Nearest) if plain => r.unary::<i64, f64>(to, a, mask, |x| x as f64),
        (Scalar::F64, Scalar::U64, Rounding::Nearest) if plain => r.unary::<u64, f64>(to, a, mask, |x| x as f64),
        (Scalar::U64 | Scalar::S64 | Scalar::B64, Scalar::U32 | Scalar::B32, _) if plain => {
            r.unary::<u32, u64>(to, a, mask, u64::from);
        }
        (Scalar::U64 | Scalar::S64 | Scalar::B64, Scalar::S32, _) if plain => r.unary::<i32, i64>(to, a, mask, i64::from),
        _ if convert.to.integer() && convert.from.integer() => whole(convert, r, slots, mask),
        _ => general(convert, r, slots, mask),
    }
}

/// The lanes of a source as whole numbers.
fn integers(scalar: Scalar, r: &Registers, slot: u32) -> [i128; LANES] {
    match scalar {
        Scalar::B8 | Scalar::U8 => u8::read(r, slot).map(i128::from),
        Scalar::S8 => i8::read(r, slot).map(i128::from),
        Scalar::B16 | Scalar::U16 => u16::read(r, slot).map(i128::from),
        Scalar::S16 => i16::read(r, slot).map(i128::from),
        Scalar::S32 => i32::read(r, slot).map(i128::from),
        Scalar::B64 | Scalar::U64 => u64::read(r, slot).map(i128::from),
        Scalar::S64 => i64::read(r, slot).map(i128::from),
        _ => u32::read(r, slot).map(i128::from),
    }
}

fn limits(scalar: Scalar) -> (i128, i128) {
    let bits = 8 * scalar.bytes() as u32;
    if scalar.signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

fn store(scalar: Scalar, r: &mut Registers, slot: u32, mask: Mask, values: &[i128; LANES]) {
    match scalar.bytes() {
        1 => u8::write(r, slot, mask, |lane| values[lane] as u8),
        2 => u16::write(r, slot, mask, |lane| values[lane] as u16),
        8 => u64::write(r, slot, mask, |lane| values[lane] as u64),
        _ => u32::write(r, slot, mask, |lane| values[lane] as u32),
    }
}

fn whole(convert: Convert, r: &mut Registers, slots: &Slots, mask: Mask) {
    let (low, high) = limits(convert.to);
    let values = integers(convert.from, r, slots.a).map(|value| if convert.saturate { value.clamp(low, high) } else { value });
    store(convert.to, r, slots.to, mask, &values);
}

/// Conversions with a floating-point side, through f64, which holds every source exactly but 64-bit integers.
fn general(convert: Convert, r: &mut Registers, slots: &Slots, mask: Mask) {
    let Convert { to, from, rounding, .. } = convert;
    let flushed = |value: f32| if convert.flush { flush(value) } else { value };
    let values: [f64; LANES] = match from {
        Scalar::F64 => f64::read(r, slots.a),
        Scalar::F32 => f32::read(r, slots.a).map(|value| f64::from(flushed(value))),
        Scalar::F16 => u32::read(r, slots.a).map(|bits| f64::from(from_half(bits, HalfFormat::F16))),
        Scalar::Bf16 => u32::read(r, slots.a).map(|bits| f64::from(from_half(bits, HalfFormat::Bf16))),
        _ => integers(from, r, slots.a).map(to_odd),
    };
    let values = values.map(|value| {
        let value = if convert.integral { integral(value, rounding) } else { value };
        match (convert.saturate && to.float(), convert.relu) {
            (true, _) => {
                if value > 0.0 {
                    value.min(1.0)
                } else {
                    0.0
                }
            }
            (_, true) if value < 0.0 => 0.0,
            _ => value,
        }
    });
    match to {
        Scalar::F64 => f64::write(r, slots.to, mask, |lane| values[lane]),
        Scalar::F32 => f32::write(r, slots.to, mask, |lane| flushed(canonical(narrow(values[lane], rounding)))),
        Scalar::F16 => u32::write(r, slots.to, mask, |lane| half(values[lane], HalfFormat::F16, rounding)),
        Scalar::Bf16 => u32::write(r, slots.to, mask, |lane| half(values[lane], HalfFormat::Bf16, rounding)),
        Scalar::Tf32 => u32::write(r, slots.to, mask, |lane| tf32(values[lane] as f32, rounding)),
        _ => {
            let (low, high) = limits(to);
            // Without a mode the manual wants one; NVRTC always names it, and to zero is C's.
            let integers = values.map(|value| (integral(value, rounding) as i128).clamp(low, high));
            store(to, r, slots.to, mask, &integers);
        }
    }
}

/// A whole number in an f64, rounded to odd where it has more than 53 bits.
fn to_odd(value: i128) -> f64 {
    let magnitude = value.unsigned_abs();
    let surplus = (128 - magnitude.leading_zeros()).saturating_sub(53);
    let kept = magnitude >> surplus;
    let odd = if kept << surplus == magnitude { kept } else { kept | 1 };
    let result = (odd << surplus) as f64;
    if value < 0 { -result } else { result }
}

pub(super) fn pair(convert: Convert, r: &mut Registers, slots: &Slots, mask: Mask) {
    let format = if convert.to == Scalar::F16x2 { HalfFormat::F16 } else { HalfFormat::Bf16 };
    let Convert { rounding, relu, flush, .. } = convert;
    if format == HalfFormat::Bf16 && rounding == Rounding::Nearest && !relu && !flush {
        use crate::rounding::bf16;
        return r.binary::<f32, f32, u32>(slots.to, [slots.a, slots.b], mask, |x, y| bf16(x) << 16 | bf16(y));
    }
    let one = |value: f32| from_single(value, format, rounding, relu, flush);
    r.binary::<f32, f32, u32>(slots.to, [slots.a, slots.b], mask, |x, y| one(x) << 16 | one(y));
}
