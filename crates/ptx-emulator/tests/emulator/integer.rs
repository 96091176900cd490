//! Instructions on whole numbers and bits against arithmetic in 128 bits.

use crate::support::Case;

const SPECIAL: &[u64] =
    &[0, 1, 2, 31, 32, 33, 63, 64, 0x7F, 0x80, 0x7FFF, 0x8000, 0x7FFF_FFFF, 0x8000_0000, 1 << 63, (1 << 63) - 1, u64::MAX];

/// A value of so many bits, with its sign where it has one.
fn wide(value: u64, bits: u32, signed: bool) -> i128 {
    let value = i128::from(value) & ((1 << bits) - 1);
    if signed && value >> (bits - 1) & 1 != 0 { value - (1 << bits) } else { value }
}

type Operation = fn(i128, i128, i128, u32) -> i128;

const ARITHMETIC: &[(&str, Operation)] = &[
    ("add.T %o, %a, %b;", |a, b, _, _| a + b),
    ("sub.T %o, %a, %b;", |a, b, _, _| a - b),
    ("mul.lo.T %o, %a, %b;", |a, b, _, _| a.wrapping_mul(b)),
    ("mad.lo.T %o, %a, %b, %c;", |a, b, c, _| a.wrapping_mul(b).wrapping_add(c)),
    ("div.T %o, %a, %b;", |a, b, _, _| if b == 0 { -1 } else { a / b }),
    ("rem.T %o, %a, %b;", |a, b, _, _| if b == 0 { a } else { a % b }),
    ("min.T %o, %a, %b;", |a, b, _, _| a.min(b)),
    ("max.T %o, %a, %b;", |a, b, _, _| a.max(b)),
    ("sad.T %o, %a, %b, %c;", |a, b, c, _| (a - b).abs() + c),
    ("mul.hi.T %o, %a, %b;", |a, b, _, bits| a.wrapping_mul(b) >> bits),
    ("mad.hi.T %o, %a, %b, %c;", |a, b, c, bits| (a.wrapping_mul(b) >> bits) + c),
];

#[test]
fn arithmetic_of_every_width() {
    for (signed, bits) in [(false, 16), (true, 16), (false, 32), (true, 32), (false, 64), (true, 64)] {
        let name = format!("{}{bits}", if signed { 's' } else { 'u' });
        for (line, operation) in ARITHMETIC {
            let line = line.replace('T', &name);
            Case { line: &line, bits: [bits; 4] }.equals(SPECIAL, |[a, b, c]| {
                let [a, b, c] = [a, b, c].map(|value| wide(value, bits, signed));
                operation(a, b, c, bits) as u64
            });
        }
    }
}

#[test]
fn unary_and_bits() {
    for bits in [16, 32, 64] {
        type Logic = fn(u64, u64) -> u64;
        let logic: [(&str, Logic); 4] = [("and", |a, b| a & b), ("or", |a, b| a | b), ("xor", |a, b| a ^ b), ("not", |a, _| !a)];
        for (name, operation) in logic {
            let line = format!("{name}.b{bits} %o, %a{};", if name == "not" { "" } else { ", %b" });
            Case { line: &line, bits: [bits; 4] }.equals(SPECIAL, |[a, b, _]| operation(a, b));
        }
        Case { line: &format!("neg.s{bits} %o, %a;"), bits: [bits; 4] }.equals(SPECIAL, |[a, _, _]| a.wrapping_neg());
        Case { line: &format!("abs.s{bits} %o, %a;"), bits: [bits; 4] }
            .equals(SPECIAL, |[a, _, _]| wide(a, bits, true).unsigned_abs() as u64);
    }
    for bits in [32, 64] {
        let top = 64 - bits;
        Case { line: &format!("brev.b{bits} %o, %a;"), bits: [bits; 4] }.equals(SPECIAL, |[a, _, _]| a.reverse_bits() >> top);
        let counted = |name: &str, operation: fn(u64, u32) -> u64| {
            Case { line: &format!("{name}{bits} %o, %a;"), bits: [bits, bits, bits, 32] }.equals(SPECIAL, |[a, _, _]| operation(a, bits));
        };
        counted("popc.b", |a, _| u64::from(a.count_ones()));
        counted("clz.b", |a, bits| u64::from((a << (64 - bits)).leading_zeros().min(bits)));
        counted("bfind.u", |a, _| if a == 0 { u64::MAX } else { u64::from(63 - a.leading_zeros()) });
        counted("bfind.s", |a, bits| {
            let a = wide(a, bits, true);
            let a = if a < 0 { !a } else { a } as u64;
            if a == 0 { u64::MAX } else { u64::from(63 - a.leading_zeros()) }
        });
    }
}

#[test]
fn shifts_by_any_count() {
    for bits in [16, 32, 64] {
        let shift = |line: String, operation: &dyn Fn(u64, u32) -> i128| {
            Case { line: &line, bits: [bits, 32, 32, bits] }.equals(SPECIAL, |[a, b, _]| operation(a, b as u32) as u64);
        };
        shift(format!("shl.b{bits} %o, %a, %b;"), &|a, b| if b >= bits { 0 } else { i128::from(a) << b });
        shift(format!("shr.u{bits} %o, %a, %b;"), &|a, b| if b >= bits { 0 } else { i128::from(a) >> b });
        shift(format!("shr.s{bits} %o, %a, %b;"), &|a, b| wide(a, bits, true) >> b.min(bits));
    }
    let both = |a: u64, b: u64| b << 32 | a;
    let funnel = |line: &str, operation: &dyn Fn(u64, u32) -> u64| {
        Case { line, bits: [32; 4] }.equals(SPECIAL, |[a, b, c]| operation(both(a, b), c as u32));
    };
    funnel("shf.l.wrap.b32 %o, %a, %b, %c;", &|v, c| v << (c & 31) >> 32);
    funnel("shf.r.wrap.b32 %o, %a, %b, %c;", &|v, c| v >> (c & 31));
    funnel("shf.l.clamp.b32 %o, %a, %b, %c;", &|v, c| v << c.min(32) >> 32);
    funnel("shf.r.clamp.b32 %o, %a, %b, %c;", &|v, c| v >> c.min(32));
}

#[test]
fn products_of_twice_the_width() {
    for (signed, bits) in [(false, 16), (true, 16), (false, 32), (true, 32)] {
        let name = format!("{}{bits}", if signed { 's' } else { 'u' });
        let product = |a: u64, b: u64| wide(a, bits, signed) * wide(b, bits, signed);
        Case { line: &format!("mul.wide.{name} %o, %a, %b;"), bits: [bits, bits, bits, 2 * bits] }
            .equals(SPECIAL, |[a, b, _]| product(a, b) as u64);
        Case { line: &format!("mad.wide.{name} %o, %a, %b, %c;"), bits: [bits, bits, 2 * bits, 2 * bits] }
            .equals(SPECIAL, |[a, b, c]| (product(a, b) + i128::from(c)) as u64);
    }
    for signed in [false, true] {
        let name = if signed { "s32" } else { "u32" };
        let cut = |value: u64| wide(value, 24, signed);
        Case { line: &format!("mul24.lo.{name} %o, %a, %b;"), bits: [32; 4] }.equals(SPECIAL, |[a, b, _]| (cut(a) * cut(b)) as u64);
        Case { line: &format!("mad24.lo.{name} %o, %a, %b, %c;"), bits: [32; 4] }
            .equals(SPECIAL, |[a, b, c]| (cut(a) * cut(b) + i128::from(c)) as u64);
    }
}

#[test]
fn saturation() {
    let clamp = |value: i128| value.clamp(i128::from(i32::MIN), i128::from(i32::MAX)) as u64;
    Case { line: "add.sat.s32 %o, %a, %b;", bits: [32; 4] }.equals(SPECIAL, |[a, b, _]| clamp(wide(a, 32, true) + wide(b, 32, true)));
    Case { line: "sub.sat.s32 %o, %a, %b;", bits: [32; 4] }.equals(SPECIAL, |[a, b, _]| clamp(wide(a, 32, true) - wide(b, 32, true)));
}

#[test]
fn fields() {
    for bits in [32, 64] {
        for signed in [false, true] {
            let line = format!("bfe.{}{bits} %o, %a, %b, %c;", if signed { 's' } else { 'u' });
            Case { line: &line, bits: [bits, 32, 32, bits] }.equals(SPECIAL, |[a, begin, length]| {
                let (begin, length) = (begin as u32 & 255, length as u32 & 255);
                // Bit by bit, as the manual has it.
                let sign = signed && length > 0 && a >> (begin + length - 1).min(bits - 1) & 1 != 0;
                (0..bits).fold(0, |field, i| {
                    let inside = i < length && begin + i < bits;
                    let bit = if inside { a >> (begin + i) & 1 } else { u64::from(sign) };
                    field | bit << i
                })
            });
        }
        let line = format!("and.b32 %r3, %c, 255;\nshr.u32 %r4, %c, 8;\nbfi.b{bits} %o, %a, %b, %r3, %r4;");
        Case { line: &line, bits: [bits, bits, 32, bits] }.equals(&[0, 1, 8, 0x0804, 0x2010, 0x4000, 0x403F, u64::MAX], |[a, b, c]| {
            let (begin, length) = (c as u32 & 255, (c as u32 >> 8) & 255);
            (0..bits).fold(0, |result, i| {
                let inside = i >= begin && i - begin < length;
                result | (if inside { a >> (i - begin) & 1 } else { b >> i & 1 }) << i
            })
        });
    }
}

#[test]
fn bytes_and_truth_tables() {
    let byte = |a: u64, b: u64, nibble: u64| {
        let byte = (b << 32 | a) >> (8 * (nibble & 7)) & 0xFF;
        if nibble & 8 == 0 { byte } else { 0xFF * (byte >> 7) }
    };
    Case { line: "prmt.b32 %o, %a, %b, %c;", bits: [32; 4] }
        .equals(SPECIAL, |[a, b, c]| (0..4).fold(0, |word, i| word | byte(a, b, c >> (4 * i) & 15) << (8 * i)));
    type Pick = fn(u64, u64) -> u64;
    let modes: [(&str, Pick); 6] = [
        ("f4e", |c, i| c + i),
        ("b4e", |c, i| c.wrapping_sub(i) & 7),
        ("rc8", |c, _| c),
        ("ecl", |c, i| c.max(i)),
        ("ecr", |c, i| c.min(i)),
        ("rc16", |c, i| 2 * (c & 1) + (i & 1)),
    ];
    for (name, pick) in modes {
        Case { line: &format!("prmt.b32.{name} %o, %a, %b, %c;"), bits: [32; 4] }
            .equals(SPECIAL, |[a, b, c]| (0..4).fold(0, |word, i| word | byte(a, b, pick(c & 3, i)) << (8 * i)));
    }
    for table in [0x00, 0x80, 0x96, 0xE8, 0xCA, 0x3C, 0xFF] {
        Case { line: &format!("lop3.b32 %o, %a, %b, %c, {table};"), bits: [32; 4] }.equals(SPECIAL, |[a, b, c]| {
            (0..32).fold(0, |word, i| word | (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i)
        });
    }
    for (types, signed) in [("u32.u32", [false, false]), ("s32.s32", [true, true]), ("u32.s32", [false, true])] {
        Case { line: &format!("dp4a.{types} %o, %a, %b, %c;"), bits: [32; 4] }.equals(SPECIAL, |[a, b, c]| {
            (0..4).fold(i128::from(c), |sum, i| sum + wide(a >> (8 * i), 8, signed[0]) * wide(b >> (8 * i), 8, signed[1])) as u64
        });
    }
}

#[test]
fn carries_run_through() {
    // %a and %b are the low and high halves of one number, %c of another with itself.
    let line = "add.cc.u32 %r3, %a, %c;\naddc.u32 %r4, %b, %c;\nmov.b64 %o, {%r3, %r4};";
    Case { line, bits: [32, 32, 32, 64] }.equals(SPECIAL, |[a, b, c]| (b << 32 | a).wrapping_add(c << 32 | c));
    let line = "sub.cc.u32 %r3, %a, %c;\nsubc.u32 %r4, %b, %c;\nmov.b64 %o, {%r3, %r4};";
    Case { line, bits: [32, 32, 32, 64] }.equals(SPECIAL, |[a, b, c]| (b << 32 | a).wrapping_sub(c << 32 | c));
}
