//! Comparisons, tests and logic on predicates.
//!
//! Invariant: an ordered comparison with a NaN is false, an unordered one true.

use crate::instruction::{Answer, Class, Compare, Condition, HalfFormat, Logic, NONE, Slots, Test};
use crate::registers::{Lane, Mask, Registers};
use crate::rounding::{flush, from_half};
use crate::scalar::Scalar;

pub(super) fn execute(compare: &Compare, r: &mut Registers, slots: &Slots, mask: Mask) {
    let ab = [slots.a, slots.b];
    let condition = compare.condition;
    let half = |format: HalfFormat, shift: u32| {
        let (a, b) = (r.words[slots.a as usize], r.words[slots.b as usize]);
        let holds = |lane: usize| holds(condition, from_half(a[lane] >> shift, format), from_half(b[lane] >> shift, format));
        (0..a.len()).fold(0, |result, lane| result | u32::from(holds(lane)) << lane)
    };
    let result = match compare.scalar {
        Scalar::U32 | Scalar::B32 => integers::<u32>(condition, r, ab),
        Scalar::S32 => integers::<i32>(condition, r, ab),
        Scalar::U64 | Scalar::B64 => integers::<u64>(condition, r, ab),
        Scalar::S64 => integers::<i64>(condition, r, ab),
        Scalar::U16 | Scalar::B16 => integers::<u16>(condition, r, ab),
        Scalar::S16 => integers::<i16>(condition, r, ab),
        Scalar::F32 if compare.flush => r.compare::<f32>(ab, |a, b| holds(condition, flush(a), flush(b))),
        Scalar::F32 => r.compare::<f32>(ab, |a, b| holds(condition, a, b)),
        Scalar::F64 => r.compare::<f64>(ab, |a, b| holds(condition, a, b)),
        Scalar::F16 | Scalar::F16x2 => half(HalfFormat::F16, 0),
        Scalar::Bf16 | Scalar::Bf16x2 => half(HalfFormat::Bf16, 0),
        other => unreachable!("the decoder refuses comparisons of {other:?}"),
    };
    let second = match compare.scalar {
        Scalar::F16x2 => half(HalfFormat::F16, 16),
        Scalar::Bf16x2 => half(HalfFormat::Bf16, 16),
        _ => !result,
    };
    let combine = |result: Mask| {
        let other = if slots.c == NONE { 0 } else { r.predicates[slots.c as usize] ^ if compare.invert { !0 } else { 0 } };
        match compare.combine {
            Logic::And => result & other,
            Logic::Or => result | other,
            Logic::Xor => result ^ other,
            Logic::None | Logic::Not => result,
        }
    };
    let (result, second) = (combine(result), combine(second));
    match compare.answer {
        Answer::Predicate => r.set_predicate(slots.to, mask, result),
        Answer::Word(float) => {
            let yes = if float { 1f32.to_bits() } else { !0 };
            u32::write(r, slots.to, mask, |lane| if result >> lane & 1 != 0 { yes } else { 0 });
        }
    }
    if compare.second != NONE {
        r.set_predicate(compare.second, mask, second);
    }
}

#[inline(always)]
fn integers<T: Lane + Ord>(condition: Condition, r: &Registers, ab: [u32; 2]) -> Mask {
    match condition {
        Condition::Equal => r.compare::<T>(ab, |a, b| a == b),
        Condition::NotEqual => r.compare::<T>(ab, |a, b| a != b),
        Condition::Less => r.compare::<T>(ab, |a, b| a < b),
        Condition::LessEqual => r.compare::<T>(ab, |a, b| a <= b),
        Condition::Greater => r.compare::<T>(ab, |a, b| a > b),
        Condition::GreaterEqual => r.compare::<T>(ab, |a, b| a >= b),
        other => unreachable!("the decoder refuses {other:?} of whole numbers"),
    }
}

fn holds<T: PartialOrd>(condition: Condition, a: T, b: T) -> bool {
    let order = a.partial_cmp(&b);
    let unordered = order.is_none();
    match condition {
        Condition::Equal => a == b,
        Condition::NotEqual => order.is_some_and(|order| order.is_ne()),
        Condition::Less => a < b,
        Condition::LessEqual => a <= b,
        Condition::Greater => a > b,
        Condition::GreaterEqual => a >= b,
        Condition::EqualUnordered => unordered || a == b,
        Condition::NotEqualUnordered => a != b,
        Condition::LessUnordered => unordered || a < b,
        Condition::LessEqualUnordered => unordered || a <= b,
        Condition::GreaterUnordered => unordered || a > b,
        Condition::GreaterEqualUnordered => unordered || a >= b,
        Condition::Numbers => !unordered,
        Condition::AnyNan => unordered,
    }
}

pub(super) fn classify(class: Class, r: &mut Registers, slots: &Slots, mask: Mask) {
    let result = if class.wide {
        r.compare::<f64>([slots.a, slots.a], |x, _| passes(class.test, x.classify()))
    } else {
        r.compare::<f32>([slots.a, slots.a], |x, _| passes(class.test, x.classify()))
    };
    r.set_predicate(slots.to, mask, result);
}

fn passes(test: Test, category: std::num::FpCategory) -> bool {
    use std::num::FpCategory::{Infinite, Nan, Normal, Subnormal};
    match test {
        Test::Finite => !matches!(category, Infinite | Nan),
        Test::Infinite => category == Infinite,
        Test::Number => category != Nan,
        Test::NotANumber => category == Nan,
        Test::Normal => category == Normal,
        Test::Subnormal => category == Subnormal,
    }
}

pub(super) fn logic(logic: Logic, r: &mut Registers, slots: &Slots, mask: Mask) {
    let (a, b) = (r.predicates[slots.a as usize], r.predicates[slots.b as usize]);
    let result = match logic {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
        Logic::Not => !a,
        Logic::None => a,
    };
    r.set_predicate(slots.to, mask, result);
}
