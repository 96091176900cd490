//! Whole numbers and bits.
//!
//! Invariant: results are those of the PTX manual for every input: shifts by more than the width, division by zero (all ones) and
//! of the smallest number by -1 (itself) included.

use crate::instruction::{Carry, Integer, Kind, Slots, WordOperator};
use crate::registers::{Lane, Mask, Registers};

/// A type of whole numbers of a register.
trait Number: Lane + Ord {
    const BITS: u32;
    fn bits(self) -> u64;
    /// Sign-extended where the type has a sign.
    fn wide(self) -> i128;
    /// The low bits.
    fn cut(value: i128) -> Self;
    fn add(self, other: Self) -> Self;
    fn subtract(self, other: Self) -> Self;
    fn multiply(self, other: Self) -> Self;
    fn shift_left(self, count: u32) -> Self;
    fn shift_right(self, count: u32) -> Self;
    fn divide(self, other: Self) -> Option<Self>;
    fn remainder(self, other: Self) -> Option<Self>;
    fn saturating(value: i128) -> Self;
}

macro_rules! number {
    ($type:ty, $unsigned:ty) => {
        impl Number for $type {
            const BITS: u32 = <$type>::BITS;
            #[inline(always)]
            fn bits(self) -> u64 {
                self as $unsigned as u64
            }
            #[inline(always)]
            fn wide(self) -> i128 {
                self as i128
            }
            #[inline(always)]
            fn cut(value: i128) -> Self {
                value as $type
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn subtract(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn multiply(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn shift_left(self, count: u32) -> Self {
                if count >= Self::BITS { 0 } else { self << count }
            }
            #[inline(always)]
            fn shift_right(self, count: u32) -> Self {
                if count >= Self::BITS { (self >> (Self::BITS / 2)) >> (Self::BITS / 2) } else { self >> count }
            }
            #[inline(always)]
            fn divide(self, other: Self) -> Option<Self> {
                (other != 0).then(|| self.wrapping_div(other))
            }
            #[inline(always)]
            fn remainder(self, other: Self) -> Option<Self> {
                (other != 0).then(|| self.wrapping_rem(other))
            }
            #[inline(always)]
            fn saturating(value: i128) -> Self {
                value.clamp(<$type>::MIN as i128, <$type>::MAX as i128) as $type
            }
        }
    };
}

number!(u16, u16);
number!(i16, u16);
number!(u32, u32);
number!(i32, u32);
number!(u64, u64);
number!(i64, u64);

pub(super) fn execute(operator: Integer, kind: Kind, registers: &mut Registers, slots: &Slots, mask: Mask) {
    match kind {
        Kind::U16 => number::<u16>(operator, registers, slots, mask),
        Kind::S16 => number::<i16>(operator, registers, slots, mask),
        Kind::U32 => number::<u32>(operator, registers, slots, mask),
        Kind::S32 => number::<i32>(operator, registers, slots, mask),
        Kind::U64 => number::<u64>(operator, registers, slots, mask),
        Kind::S64 => number::<i64>(operator, registers, slots, mask),
    }
}

fn number<T: Number>(operator: Integer, r: &mut Registers, slots: &Slots, mask: Mask) {
    let &Slots { to, a, b, c } = slots;
    match operator {
        Integer::Add => r.binary::<T, T, T>(to, [a, b], mask, T::add),
        Integer::Subtract => r.binary::<T, T, T>(to, [a, b], mask, T::subtract),
        Integer::Multiply => r.binary::<T, T, T>(to, [a, b], mask, T::multiply),
        Integer::MultiplyAdd => r.ternary::<T, T, T, T>(to, [a, b, c], mask, |x, y, z| x.multiply(y).add(z)),
        Integer::And => r.binary::<T, T, T>(to, [a, b], mask, |x, y| T::cut(x.wide() & y.wide())),
        Integer::Or => r.binary::<T, T, T>(to, [a, b], mask, |x, y| T::cut(x.wide() | y.wide())),
        Integer::Xor => r.binary::<T, T, T>(to, [a, b], mask, |x, y| T::cut(x.wide() ^ y.wide())),
        Integer::Not => r.unary::<T, T>(to, a, mask, |x| T::cut(!x.wide())),
        Integer::Negate => r.unary::<T, T>(to, a, mask, |x| T::cut(0).subtract(x)),
        Integer::Absolute => r.unary::<T, T>(to, a, mask, |x| if x.wide() < 0 { T::cut(0).subtract(x) } else { x }),
        Integer::ShiftLeft => r.binary::<T, u32, T>(to, [a, b], mask, T::shift_left),
        Integer::ShiftRight => r.binary::<T, u32, T>(to, [a, b], mask, T::shift_right),
        Integer::Minimum => r.binary::<T, T, T>(to, [a, b], mask, T::min),
        Integer::Maximum => r.binary::<T, T, T>(to, [a, b], mask, T::max),
        _ => seldom::<T>(operator, r, slots, mask),
    }
}

fn seldom<T: Number>(operator: Integer, r: &mut Registers, slots: &Slots, mask: Mask) {
    let &Slots { to, a, b, c } = slots;
    let unsigned = |x: T| (x.bits() << (64 - T::BITS)).leading_zeros().min(T::BITS);
    let high = |x: T, y: T| x.wide().wrapping_mul(y.wide()) >> T::BITS;
    match operator {
        Integer::MultiplyHigh => r.binary::<T, T, T>(to, [a, b], mask, |x, y| T::cut(high(x, y))),
        Integer::MultiplyAddHigh => r.ternary::<T, T, T, T>(to, [a, b, c], mask, |x, y, z| T::cut(high(x, y)).add(z)),
        Integer::Divide => r.binary::<T, T, T>(to, [a, b], mask, |x, y| x.divide(y).unwrap_or(T::cut(-1))),
        Integer::Remainder => r.binary::<T, T, T>(to, [a, b], mask, |x, y| x.remainder(y).unwrap_or(x)),
        Integer::AddSaturating => r.binary::<T, T, T>(to, [a, b], mask, |x, y| T::saturating(x.wide() + y.wide())),
        Integer::SubtractSaturating => r.binary::<T, T, T>(to, [a, b], mask, |x, y| T::saturating(x.wide() - y.wide())),
        Integer::SumOfDifferences => {
            r.ternary::<T, T, T, T>(to, [a, b, c], mask, |x, y, z| if x < y { y.subtract(x) } else { x.subtract(y) }.add(z));
        }
        Integer::CountOnes => r.unary::<T, u32>(to, a, mask, |x| x.bits().count_ones()),
        Integer::CountLeadingZeros => r.unary::<T, u32>(to, a, mask, unsigned),
        Integer::FindLeadingOne => r.unary::<T, u32>(to, a, mask, |x| {
            let x = if x.wide() < 0 { T::cut(!x.wide()) } else { x };
            if x.bits() == 0 { u32::MAX } else { T::BITS - 1 - unsigned(x) }
        }),
        Integer::ReverseBits => r.unary::<T, T>(to, a, mask, |x| T::cut((x.bits().reverse_bits() >> (64 - T::BITS)) as i128)),
        Integer::ExtractField => r.ternary::<T, u32, u32, T>(to, [a, b, c], mask, extract_field::<T>),
        other => unreachable!("`number` executes {other:?}"),
    }
}

/// `bfe`: `length` bits from `begin`, sign-extended from the highest of them (or of the number) where the type has a sign.
fn extract_field<T: Number>(value: T, begin: u32, length: u32) -> T {
    let (begin, length) = (begin & 0xFF, length & 0xFF);
    if length == 0 {
        return T::cut(0);
    }
    let signed = T::cut(-1).wide() < 0;
    let top = (begin + length - 1).min(T::BITS - 1);
    let fill = signed && value.bits() >> top & 1 != 0;
    let field = if begin >= T::BITS { 0 } else { value.bits() >> begin };
    let kept = if begin >= T::BITS { 0 } else { length.min(T::BITS - begin) };
    let mask = if kept >= 64 { u64::MAX } else { (1 << kept) - 1 };
    T::cut(i128::from(if fill { field | !mask } else { field & mask }))
}

pub(super) fn wide(kind: Kind, adds: bool, r: &mut Registers, slots: &Slots, mask: Mask) {
    let &Slots { to, a, b, c } = slots;
    match (kind, adds) {
        (Kind::U32, false) => r.binary::<u32, u32, u64>(to, [a, b], mask, |x, y| u64::from(x) * u64::from(y)),
        (Kind::S32, false) => r.binary::<i32, i32, i64>(to, [a, b], mask, |x, y| i64::from(x) * i64::from(y)),
        (Kind::U32, true) => {
            r.ternary::<u32, u32, u64, u64>(to, [a, b, c], mask, |x, y, z| (u64::from(x) * u64::from(y)).wrapping_add(z));
        }
        (Kind::S32, true) => {
            r.ternary::<i32, i32, i64, i64>(to, [a, b, c], mask, |x, y, z| (i64::from(x) * i64::from(y)).wrapping_add(z));
        }
        (Kind::U16, false) => r.binary::<u16, u16, u32>(to, [a, b], mask, |x, y| u32::from(x) * u32::from(y)),
        (Kind::S16, false) => r.binary::<i16, i16, i32>(to, [a, b], mask, |x, y| i32::from(x) * i32::from(y)),
        (Kind::U16, true) => {
            r.ternary::<u16, u16, u32, u32>(to, [a, b, c], mask, |x, y, z| (u32::from(x) * u32::from(y)).wrapping_add(z));
        }
        (Kind::S16, true) => {
            r.ternary::<i16, i16, i32, i32>(to, [a, b, c], mask, |x, y, z| (i32::from(x) * i32::from(y)).wrapping_add(z));
        }
        (Kind::U64 | Kind::S64, _) => unreachable!("the decoder refuses products of 128 bits"),
    }
}

pub(super) fn word(operator: WordOperator, r: &mut Registers, slots: &Slots, mask: Mask) {
    let &Slots { to, a, b, c } = slots;
    let abc = [a, b, c];
    match operator {
        WordOperator::Permute => r.ternary::<u32, u32, u32, u32>(to, abc, mask, permute),
        WordOperator::PermuteMode(mode) => r.ternary::<u32, u32, u32, u32>(to, abc, mask, |x, y, z| permute(x, y, selector(mode, z & 3))),
        WordOperator::Funnel(left, clamp) => r.ternary::<u32, u32, u32, u32>(to, abc, mask, |x, y, z| {
            let (value, count) = (u64::from(y) << 32 | u64::from(x), if clamp { z.min(32) } else { z & 31 });
            if left { (value << count >> 32) as u32 } else { (value >> count) as u32 }
        }),
        WordOperator::Logic3(table) => r.ternary::<u32, u32, u32, u32>(to, abc, mask, |x, y, z| {
            let mut result = 0;
            for row in 0..8u8 {
                let term = |bit: u8, value: u32| if row >> bit & 1 != 0 { value } else { !value };
                if table >> row & 1 != 0 {
                    result |= term(2, x) & term(1, y) & term(0, z);
                }
            }
            result
        }),
        WordOperator::DotBytes(signed_a, signed_b) => r.ternary::<u32, u32, u32, u32>(to, abc, mask, |x, y, z| {
            let byte = |value: u32, i: u32, signed: bool| {
                let byte = (value >> (8 * i)) as u8;
                if signed { i32::from(byte as i8) } else { i32::from(byte) }
            };
            (0..4).fold(z, |sum, i| sum.wrapping_add((byte(x, i, signed_a) * byte(y, i, signed_b)) as u32))
        }),
        WordOperator::Multiply24(signed, adds) => r.ternary::<u32, u32, u32, u32>(to, abc, mask, |x, y, z| {
            let cut = |value: u32| if signed { ((value << 8) as i32 >> 8) as u32 } else { value & 0xFF_FFFF };
            cut(x).wrapping_mul(cut(y)).wrapping_add(if adds { z } else { 0 })
        }),
    }
}

/// `prmt`: each nibble of the selector names a byte of `b:a`, or its sign eight times.
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = u64::from(b) << 32 | u64::from(a);
    let mut result = 0;
    for i in 0..4 {
        let nibble = selector >> (4 * i) & 15;
        let byte = (bytes >> (8 * (nibble & 7))) as u8;
        let byte = if nibble & 8 != 0 { (byte as i8 >> 7) as u8 } else { byte };
        result |= u32::from(byte) << (8 * i);
    }
    result
}

/// The selectors of the modes of `prmt`, in the order f4e, b4e, rc8, ecl, ecr, rc16.
fn selector(mode: u8, c: u32) -> u32 {
    let table: [[u32; 4]; 6] = [
        [0x3210, 0x4321, 0x5432, 0x6543],
        [0x5670, 0x6701, 0x7012, 0x0123],
        [0x0000, 0x1111, 0x2222, 0x3333],
        [0x3210, 0x3211, 0x3222, 0x3333],
        [0x0000, 0x1110, 0x2210, 0x3210],
        [0x1010, 0x3232, 0x1010, 0x3232],
    ];
    table[usize::from(mode)][c as usize]
}

pub(super) fn insert_field(sources: &[u32; 4], wide: bool, r: &mut Registers, to: u32, mask: Mask) {
    let &[a, b, begin, length] = sources;
    let (begin, length) = (u32::read(r, begin), u32::read(r, length));
    let insert = |lane: usize, a: u64, b: u64, bits: u32| {
        let (begin, length) = (begin[lane] & 0xFF, length[lane] & 0xFF);
        let field = if length >= 64 { u64::MAX } else { (1 << length) - 1 };
        if begin >= bits { b } else { (b & !(field << begin)) | (a & field) << begin }
    };
    if wide {
        let (a, b) = (u64::read(r, a), u64::read(r, b));
        u64::write(r, to, mask, |lane| insert(lane, a[lane], b[lane], 64));
    } else {
        let (a, b) = (u32::read(r, a), u32::read(r, b));
        u32::write(r, to, mask, |lane| insert(lane, u64::from(a[lane]), u64::from(b[lane]), 32) as u32);
    }
}

pub(super) fn carry(carry: Carry, r: &mut Registers, slots: &Slots, mask: Mask) {
    let bits = if carry.wide { 64 } else { 32 };
    let [a, b] = [slots.a, slots.b].map(|slot| if carry.wide { u64::read(r, slot) } else { u32::read(r, slot).map(u64::from) });
    let (old, mut new) = (r.carry, 0);
    let mut results = [0; crate::registers::LANES];
    for lane in crate::registers::each(mask) {
        let extra = u128::from(carry.takes && old >> lane & 1 != 0);
        let (x, y) = (u128::from(a[lane]), u128::from(b[lane]));
        let sum = if carry.subtract { x.wrapping_sub(y).wrapping_sub(extra) } else { x + y + extra };
        results[lane] = sum as u64;
        new |= u32::from(sum >> bits != 0) << lane;
    }
    if carry.gives {
        r.carry = (old & !mask) | new;
    }
    if carry.wide {
        u64::write(r, slots.to, mask, |lane| results[lane]);
    } else {
        u32::write(r, slots.to, mask, |lane| results[lane] as u32);
    }
}
