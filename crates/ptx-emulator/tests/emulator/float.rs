//! Floating-point instructions, comparisons and conversions.

use crate::support::Case;

/// f32 bits: zeros, ones, subnormals, the largest, infinities, NaNs, halves on the edge of rounding.
const SINGLE: &[u64] = &[
    0,
    0x8000_0000,
    0x3F80_0000,
    0xBF80_0000,
    1,
    0x8000_0001,
    0x007F_FFFF,
    0x0080_0000,
    0x7F7F_FFFF,
    0xFF7F_FFFF,
    0x7F80_0000,
    0xFF80_0000,
    0x7FC0_0000,
    0xFFFF_FFFF,
    0x3F80_8000,
    0x3F81_8000,
    0x4B00_0001,
    0x4F00_0000,
    0x4EFF_FFFF,
    0xCF00_0000,
    0x3F00_0000,
    0x4020_0000,
    0x477F_E000,
    0x477F_F000,
    0x3380_0000,
    0x3300_0000,
];
const DOUBLE: &[u64] = &[
    0,
    1 << 63,
    0x3FF0_0000_0000_0000,
    0xBFF0_0000_0000_0000,
    1,
    0x7FEF_FFFF_FFFF_FFFF,
    0x7FF0_0000_0000_0000,
    0x7FF8_0000_0000_0000,
    0x3FF0_0000_1000_0000,
    0x3FF0_0000_3000_0000,
    0x41E0_0000_0000_0000,
    0x43E0_0000_0000_0000,
    0x36A0_0000_0000_0000,
    0x47EF_FFFF_F000_0000,
];
const HALF: &[u64] = &[
    0, 0x8000, 0x3C00, 0xBC00, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x3F80, 0xBF80, 0x7F, 0x80, 0x7F7F, 0x7F80,
    0xFF80, 0x7FC0, 0x4049,
];

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn g(bits: u64) -> f64 {
    f64::from_bits(bits)
}

/// Equal bits, or both no numbers: then the hardware's one NaN.
fn same(expected: f32, got: u64) -> Result<(), String> {
    let fits = if expected.is_nan() { got == 0x7FFF_FFFF } else { got == u64::from(expected.to_bits()) };
    if fits { Ok(()) } else { Err(format!("{expected:e} ({:#x})", expected.to_bits())) }
}

fn flushed(value: f32) -> f32 {
    if value.is_subnormal() { 0f32.copysign(value) } else { value }
}

fn single(line: &str, operation: impl Fn(f32, f32, f32) -> f32) {
    Case { line, bits: [32; 4] }.check(SINGLE, |[a, b, c], got| same(operation(f(a), f(b), f(c)), got));
}

fn smaller(a: f32, b: f32) -> f32 {
    match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        _ if a == b => {
            if a.is_sign_negative() {
                a
            } else {
                b
            }
        }
        _ => {
            if a < b {
                a
            } else {
                b
            }
        }
    }
}

#[test]
fn singles() {
    single("add.rn.f32 %o, %a, %b;", |a, b, _| a + b);
    single("sub.f32 %o, %a, %b;", |a, b, _| a - b);
    single("mul.f32 %o, %a, %b;", |a, b, _| a * b);
    single("div.rn.f32 %o, %a, %b;", |a, b, _| a / b);
    single("fma.rn.f32 %o, %a, %b, %c;", f32::mul_add);
    single("mad.rn.f32 %o, %a, %b, %c;", f32::mul_add);
    single("sqrt.rn.f32 %o, %a;", |a, _, _| a.sqrt());
    single("rcp.rn.f32 %o, %a;", |a, _, _| 1.0 / a);
    single("min.f32 %o, %a, %b;", |a, b, _| smaller(a, b));
    single("max.f32 %o, %a, %b;", |a, b, _| -smaller(-a, -b));
    single("min.NaN.f32 %o, %a, %b;", |a, b, _| if a.is_nan() || b.is_nan() { f32::NAN } else { smaller(a, b) });
    single("max.NaN.f32 %o, %a, %b;", |a, b, _| if a.is_nan() || b.is_nan() { f32::NAN } else { -smaller(-a, -b) });
    single("add.ftz.f32 %o, %a, %b;", |a, b, _| flushed(flushed(a) + flushed(b)));
    single("fma.rn.ftz.f32 %o, %a, %b, %c;", |a, b, c| flushed(flushed(a).mul_add(flushed(b), flushed(c))));
    let saturated = |value: f32| if value > 0.0 { value.min(1.0) } else { 0.0 };
    single("add.sat.f32 %o, %a, %b;", |a, b, _| saturated(a + b));
    single("fma.rn.sat.f32 %o, %a, %b, %c;", |a, b, c| saturated(a.mul_add(b, c)));
    Case { line: "neg.f32 %o, %a;", bits: [32; 4] }.equals(SINGLE, |[a, ..]| a ^ 0x8000_0000);
    Case { line: "abs.f32 %o, %a;", bits: [32; 4] }.equals(SINGLE, |[a, ..]| a & 0x7FFF_FFFF);
    Case { line: "copysign.f32 %o, %a, %b;", bits: [32; 4] }.equals(SINGLE, |[a, b, _]| (a & 0x8000_0000) | (b & 0x7FFF_FFFF));
}

/// Directed rounding: the neighbour on the right side of the exact value, which 128 bits of integers hold for these inputs.
#[test]
fn directed_rounding_brackets_the_exact_value() {
    for (name, down, up) in
        [("add", "add.rm.f32 %o, %a, %b;", "add.rp.f32 %o, %a, %b;"), ("mul", "mul.rm.f32 %o, %a, %b;", "mul.rp.f32 %o, %a, %b;")]
    {
        let near = |a: u64, b: u64| if name == "add" { f(a) + f(b) } else { f(a) * f(b) };
        // In f64 a product of f32 is exact; a sum is, where the exponents are close.
        let exact = |a: u64, b: u64| if name == "add" { f64::from(f(a)) + f64::from(f(b)) } else { f64::from(f(a)) * f64::from(f(b)) };
        let close = |a: u64, b: u64| name == "mul" || (a >> 23 & 255).abs_diff(b >> 23 & 255) < 25;
        for (line, is_down) in [(down, true), (up, false)] {
            Case { line, bits: [32; 4] }.check(SINGLE, |[a, b, _], got| {
                let (near, exact) = (near(a, b), exact(a, b));
                if !near.is_finite() || near == 0.0 || !close(a, b) {
                    return Ok(());
                }
                let expected = match is_down {
                    true if f64::from(near) > exact => near.next_down(),
                    false if f64::from(near) < exact => near.next_up(),
                    _ => near,
                };
                same(expected, got)
            });
        }
    }
    single("fma.rz.f32 %o, %a, 0f3F800000, 0f00000000;", |a, _, _| a + 0.0);
    Case { line: "fma.rm.f32 %o, %a, 0f3F800000, 0f33800000;", bits: [32; 4] }.check(SINGLE, |[a, ..], got| {
        let exact = f64::from(f(a)) + 2f64.powi(-24);
        let near = exact as f32;
        // Only where f64 holds the sum exactly.
        let close = (2f32.powi(-48)..2f32.powi(20)).contains(&f(a).abs());
        if close { same(if f64::from(near) > exact { near.next_down() } else { near }, got) } else { Ok(()) }
    });
}

#[test]
fn approximations_are_close() {
    type Function = fn(f64) -> f64;
    let functions: [(&str, Function); 8] = [
        ("ex2.approx.f32", f64::exp2),
        ("lg2.approx.f32", f64::log2),
        ("rcp.approx.ftz.f32", f64::recip),
        ("rsqrt.approx.f32", |x| x.sqrt().recip()),
        ("sqrt.approx.f32", f64::sqrt),
        ("sin.approx.f32", f64::sin),
        ("cos.approx.f32", f64::cos),
        ("tanh.approx.f32", f64::tanh),
    ];
    let inputs: Vec<u64> = (0..30).map(|i| u64::from((0.37f32 * 1.4f32.powi(i - 15)).to_bits())).collect();
    for (name, function) in functions {
        Case { line: &format!("{name} %o, %a;"), bits: [32; 4] }.check(&inputs, |[a, ..], got| {
            let exact = function(f64::from(f(a)));
            let value = f(got);
            if !f(a).is_normal() || f(a).abs() > 1e4 || !(exact as f32).is_normal() {
                return Ok(());
            }
            let fits = (f64::from(value) - exact).abs() <= 3e-7 * exact.abs() + 1e-9;
            if fits { Ok(()) } else { Err(format!("{exact:e}, got {value:e}")) }
        });
    }
}

#[test]
fn doubles() {
    let double = |line: &str, operation: &dyn Fn(f64, f64, f64) -> f64| {
        Case { line, bits: [64; 4] }.check(DOUBLE, |[a, b, c], got| {
            let expected = operation(g(a), g(b), g(c));
            let fits = got == expected.to_bits() || expected.is_nan() && g(got).is_nan();
            if fits { Ok(()) } else { Err(format!("{expected:e}")) }
        });
    };
    double("add.f64 %o, %a, %b;", &|a, b, _| a + b);
    double("sub.rn.f64 %o, %a, %b;", &|a, b, _| a - b);
    double("mul.f64 %o, %a, %b;", &|a, b, _| a * b);
    double("div.rn.f64 %o, %a, %b;", &|a, b, _| a / b);
    double("fma.rn.f64 %o, %a, %b, %c;", &f64::mul_add);
    double("sqrt.rn.f64 %o, %a;", &|a, _, _| a.sqrt());
    double("neg.f64 %o, %a;", &|a, _, _| -a);
    double("abs.f64 %o, %a;", &|a, _, _| a.abs());
}

/// The value of a 16-bit number, by the definition of the formats.
fn half(bits: u64, fraction: u32, bias: i32) -> f64 {
    let exponent_bits = 15 - fraction;
    let (exponent, value) = ((bits >> fraction & ((1 << exponent_bits) - 1)) as i32, (bits & ((1 << fraction) - 1)) as f64);
    let scale = 2f64.powi(-(fraction as i32));
    let magnitude = if exponent == (1 << exponent_bits) - 1 {
        if value == 0.0 { f64::INFINITY } else { f64::NAN }
    } else if exponent == 0 {
        value * scale * 2f64.powi(1 - bias)
    } else {
        (1.0 + value * scale) * 2f64.powi(exponent - bias)
    };
    if bits >> 15 & 1 != 0 { -magnitude } else { magnitude }
}

/// Whether a result is the number of the format nearest to the exact value, ties to even.
fn nearest(exact: f64, got: u64, fraction: u32, bias: i32) -> Result<(), String> {
    let value = half(got & 0xFFFF, fraction, bias);
    if exact.is_nan() || value.is_nan() {
        return if exact.is_nan() && got & 0xFFFF == 0x7FFF { Ok(()) } else { Err(format!("{exact:e}")) };
    }
    let limit = (2.0 - 2f64.powi(-(fraction as i32) - 1)) * 2f64.powi(bias);
    if exact.abs() >= limit {
        return if value.is_infinite() && value.signum() == exact.signum() { Ok(()) } else { Err(format!("{exact:e}")) };
    }
    let magnitude = got & 0x7FFF;
    let away = |to: u64| (half(to, fraction, bias) - exact.abs()).abs();
    let own = away(magnitude);
    // Above the largest number lies infinity, which is too far by the limit above.
    let up = if half(magnitude + 1, fraction, bias).is_finite() { away(magnitude + 1) } else { f64::INFINITY };
    let down = if magnitude > 0 { away(magnitude - 1) } else { f64::INFINITY };
    let tie = own == up || own == down;
    let sign = exact == 0.0 || magnitude == 0 || (value < 0.0) == (exact < 0.0);
    if own <= up && own <= down && (!tie || magnitude.is_multiple_of(2)) && sign { Ok(()) } else { Err(format!("{exact:e}")) }
}

const FORMATS: [(&str, u32, i32); 2] = [("f16", 10, 15), ("bf16", 7, 127)];

#[test]
fn halves() {
    for (name, fraction, bias) in FORMATS {
        let check = |line: &str, operation: &dyn Fn(f64, f64, f64) -> f64| {
            Case { line, bits: [16; 4] }.check(HALF, |input, got| {
                let [a, b, c] = input.map(|bits| half(bits, fraction, bias));
                nearest(operation(a, b, c), got, fraction, bias)
            });
        };
        check(&format!("add.{name} %o, %a, %b;"), &|a, b, _| a + b);
        check(&format!("sub.{name} %o, %a, %b;"), &|a, b, _| a - b);
        check(&format!("mul.{name} %o, %a, %b;"), &|a, b, _| a * b);
        check(&format!("min.{name} %o, %a, %b;"), &|a, b, _| if a == b && a.is_sign_negative() { a } else { a.min(b) });
        check(&format!("max.{name} %o, %a, %b;"), &|a, b, _| if a == b && a.is_sign_positive() { a } else { a.max(b) });
        let relu = |value: f64| if value < 0.0 { 0.0 } else { value };
        if name == "f16" {
            // Exact in f64 for f16, so that one rounding is checked.
            check("fma.rn.f16 %o, %a, %b, %c;", &|a, b, c| a * b + c);
            check("fma.rn.relu.f16 %o, %a, %b, %c;", &|a, b, c| relu(a * b + c));
        }
        Case { line: &format!("neg.{name} %o, %a;"), bits: [16; 4] }.equals(HALF, |[a, ..]| a ^ 0x8000);
        Case { line: &format!("abs.{name} %o, %a;"), bits: [16; 4] }.equals(HALF, |[a, ..]| a & 0x7FFF);
        for pair in ["add", "mul"] {
            Case { line: &format!("{pair}.{name}x2 %o, %a, %b;"), bits: [32; 4] }.check(HALF, |[a, b, _], got| {
                for shift in [0, 16] {
                    let (x, y) = (half(a >> shift & 0xFFFF, fraction, bias), half(b >> shift & 0xFFFF, fraction, bias));
                    nearest(if pair == "add" { x + y } else { x * y }, got >> shift, fraction, bias)?;
                }
                Ok(())
            });
        }
    }
}

#[test]
fn conversions_to_and_from_halves() {
    for (name, fraction, bias) in FORMATS {
        Case { line: &format!("cvt.rn.{name}.f32 %o, %a;"), bits: [32, 32, 32, 16] }
            .check(SINGLE, |[a, ..], got| nearest(f64::from(f(a)), got, fraction, bias));
        Case { line: &format!("cvt.rz.{name}.f32 %o, %a;"), bits: [32, 32, 32, 16] }.check(SINGLE, |[a, ..], got| {
            let (exact, value) = (f64::from(f(a)), half(got, fraction, bias));
            let next = half((got & 0x7FFF) + 1, fraction, bias);
            let fits = exact.is_nan() && value.is_nan() || value.abs() <= exact.abs() && (exact.is_infinite() || exact.abs() < next);
            if fits { Ok(()) } else { Err(format!("{exact:e}")) }
        });
        // From bf16 this is a shift: a NaN keeps its bits.
        Case { line: &format!("cvt.f32.{name} %o, %a;"), bits: [16, 32, 32, 32] }.check(HALF, |[a, ..], got| {
            let expected = half(a, fraction, bias) as f32;
            if expected.is_nan() && f(got).is_nan() { Ok(()) } else { same(expected, got) }
        });
        Case { line: &format!("cvt.rn.{name}x2.f32 %o, %a, %b;"), bits: [32; 4] }.check(SINGLE, |[a, b, _], got| {
            nearest(f64::from(f(a)), got >> 16, fraction, bias)?;
            nearest(f64::from(f(b)), got, fraction, bias)
        });
        Case { line: &format!("cvt.rn.relu.{name}x2.f32 %o, %a, %b;"), bits: [32; 4] }.check(SINGLE, |[a, b, _], got| {
            let relu = |bits: u64| if f(bits) < 0.0 { 0.0 } else { f64::from(f(bits)) };
            nearest(relu(a), got >> 16, fraction, bias)?;
            nearest(relu(b), got, fraction, bias)
        });
    }
    Case { line: "cvt.rna.tf32.f32 %o, %a;", bits: [32; 4] }.check(SINGLE, |[a, ..], got| {
        if !f(a).is_finite() {
            return Ok(());
        }
        let expected = (a + 0x1000) & !0x1FFF;
        if got == expected { Ok(()) } else { Err(format!("{expected:#x}")) }
    });
}

#[test]
fn conversions_of_numbers() {
    let whole = |line: &str, bits: [u32; 2], special: &[u64], operation: &dyn Fn(u64) -> u64| {
        Case { line, bits: [bits[0], 32, 32, bits[1]] }.equals(special, |[a, ..]| operation(a));
    };
    whole("cvt.rzi.s32.f32 %o, %a;", [32, 32], SINGLE, &|a| f(a) as i32 as u64);
    whole("cvt.rzi.u32.f32 %o, %a;", [32, 32], SINGLE, &|a| u64::from(f(a) as u32));
    whole("cvt.rni.s32.f32 %o, %a;", [32, 32], SINGLE, &|a| f(a).round_ties_even() as i32 as u64);
    whole("cvt.rmi.s32.f32 %o, %a;", [32, 32], SINGLE, &|a| f(a).floor() as i32 as u64);
    whole("cvt.rpi.s64.f32 %o, %a;", [32, 64], SINGLE, &|a| f(a).ceil() as i64 as u64);
    whole("cvt.rzi.u64.f64 %o, %a;", [64, 64], DOUBLE, &|a| g(a) as u64);
    whole("cvt.rzi.s32.f64 %o, %a;", [64, 32], DOUBLE, &|a| g(a) as i32 as u64);
    whole("cvt.rn.f32.s32 %o, %a;", [32, 32], SINGLE, &|a| u64::from((a as i32 as f32).to_bits()));
    whole("cvt.rn.f32.u32 %o, %a;", [32, 32], SINGLE, &|a| u64::from((a as u32 as f32).to_bits()));
    whole("cvt.rn.f32.s64 %o, %a;", [64, 32], DOUBLE, &|a| u64::from((a as i64 as f32).to_bits()));
    whole("cvt.rn.f32.u64 %o, %a;", [64, 32], DOUBLE, &|a| u64::from((a as f32).to_bits()));
    whole("cvt.rn.f64.u64 %o, %a;", [64, 64], DOUBLE, &|a| (a as f64).to_bits());
    whole("cvt.rn.f64.s32 %o, %a;", [32, 64], SINGLE, &|a| f64::from(a as i32).to_bits());
    whole("cvt.rz.f32.u32 %o, %a;", [32, 32], SINGLE, &|a| {
        let near = a as u32 as f32;
        u64::from(if f64::from(near) > a as f64 { near.next_down() } else { near }.to_bits())
    });
    whole("cvt.s64.s32 %o, %a;", [32, 64], SINGLE, &|a| a as i32 as i64 as u64);
    whole("cvt.u64.u32 %o, %a;", [32, 64], SINGLE, &|a| a);
    whole("cvt.u32.u64 %o, %a;", [64, 32], DOUBLE, &|a| a);
    whole("cvt.s32.s8 %o, %a;", [32, 32], SINGLE, &|a| a as i8 as u64);
    whole("cvt.u32.u16 %o, %a;", [16, 32], HALF, &|a| a);
    whole("cvt.s32.s16 %o, %a;", [16, 32], HALF, &|a| a as i16 as u64);
    whole("cvt.u16.u32 %o, %a;", [32, 16], SINGLE, &|a| a);
    whole("cvt.sat.u8.s32 %o, %a;", [32, 16], SINGLE, &|a| (a as i32).clamp(0, 255) as u64);
    whole("cvt.sat.s16.s32 %o, %a;", [32, 16], SINGLE, &|a| (a as i32).clamp(-32768, 32767) as u64);
    single("cvt.rni.f32.f32 %o, %a;", |a, _, _| a.round_ties_even());
    single("cvt.rzi.f32.f32 %o, %a;", |a, _, _| a.trunc());
    single("cvt.rmi.f32.f32 %o, %a;", |a, _, _| a.floor());
    single("cvt.rpi.f32.f32 %o, %a;", |a, _, _| a.ceil());
    single("cvt.sat.f32.f32 %o, %a;", |a, _, _| if a > 0.0 { a.min(1.0) } else { 0.0 });
    Case { line: "cvt.rn.f32.f64 %o, %a;", bits: [64, 32, 32, 32] }.check(DOUBLE, |[a, ..], got| same(g(a) as f32, got));
    Case { line: "cvt.rm.f32.f64 %o, %a;", bits: [64, 32, 32, 32] }.check(DOUBLE, |[a, ..], got| {
        let near = g(a) as f32;
        same(if f64::from(near) > g(a) { near.next_down() } else { near }, got)
    });
    Case { line: "cvt.f64.f32 %o, %a;", bits: [32, 32, 32, 64] }.check(SINGLE, |[a, ..], got| {
        let fits = f64::from(f(a)).to_bits() == got || f(a).is_nan() && g(got).is_nan();
        if fits { Ok(()) } else { Err(format!("{:e}", f(a))) }
    });
}

#[test]
fn comparisons() {
    type Holds = fn(f32, f32) -> bool;
    let floats: [(&str, Holds); 14] = [
        ("eq", |a, b| a == b),
        ("ne", |a, b| a.partial_cmp(&b).is_some_and(|order| order.is_ne())),
        ("lt", |a, b| a < b),
        ("le", |a, b| a <= b),
        ("gt", |a, b| a > b),
        ("ge", |a, b| a >= b),
        ("equ", |a, b| a.partial_cmp(&b).is_none_or(|order| order.is_eq())),
        ("neu", |a, b| a != b),
        ("ltu", |a, b| a < b || a.is_nan() || b.is_nan()),
        ("leu", |a, b| a <= b || a.is_nan() || b.is_nan()),
        ("gtu", |a, b| a > b || a.is_nan() || b.is_nan()),
        ("geu", |a, b| a >= b || a.is_nan() || b.is_nan()),
        ("num", |a, b| !a.is_nan() && !b.is_nan()),
        ("nan", |a, b| a.is_nan() || b.is_nan()),
    ];
    for (name, holds) in floats {
        let line = format!("setp.{name}.f32 %p0, %a, %b;\nselp.b32 %o, 1, 0, %p0;");
        Case { line: &line, bits: [32; 4] }.equals(SINGLE, |[a, b, _]| u64::from(holds(f(a), f(b))));
        let line = format!("set.{name}.u32.f32 %o, %a, %b;");
        Case { line: &line, bits: [32; 4] }.equals(SINGLE, |[a, b, _]| if holds(f(a), f(b)) { u64::MAX } else { 0 });
    }
    for (name, ordering) in
        [("lt", [true, false, false]), ("le", [true, true, false]), ("eq", [false, true, false]), ("ge", [false, true, true])]
    {
        let expected = |order: std::cmp::Ordering| u64::from(ordering[(order as i8 + 1) as usize]);
        for bits in [16, 32, 64] {
            let compare = |kind: &str, order: &dyn Fn(u64, u64) -> std::cmp::Ordering| {
                let line = format!("setp.{name}.{kind}{bits} %p0, %a, %b;\nselp.b32 %o, 1, 0, %p0;");
                Case { line: &line, bits: [bits, bits, 32, 32] }.equals(DOUBLE, |[a, b, _]| expected(order(a, b)));
            };
            compare("u", &|a, b| a.cmp(&b));
            let up = 64 - bits;
            compare("s", &move |a, b| (((a << up) as i64) >> up).cmp(&(((b << up) as i64) >> up)));
        }
    }
    // A second predicate gets the opposite, both combined with a third, which may be inverted.
    let line = "setp.ne.u32 %p2, %c, 0;\nsetp.lt.and.u32 %p0|%p1, %a, %b, !%p2;\nselp.b32 %r3, 1, 0, %p0;\nselp.b32 %r4, 2, 0, %p1;\nor.b32 %o, %r3, %r4;";
    Case { line, bits: [32; 4] }.equals(&[0, 1, 2, 7], |[a, b, c]| match (c != 0, a < b) {
        (true, _) => 0,
        (false, true) => 1,
        (false, false) => 2,
    });
    Case { line: "testp.subnormal.f32 %p0, %a;\nselp.b32 %o, 1, 0, %p0;", bits: [32; 4] }
        .equals(SINGLE, |[a, ..]| u64::from(f(a).is_subnormal()));
    Case { line: "setp.gt.u32 %p0, %a, %b;\nselp.f64 %o, %c, 0d3FF0000000000000, %p0;", bits: [32, 32, 64, 64] }
        .equals(DOUBLE, |[a, b, c]| if a > b { c } else { 1f64.to_bits() });
}
