//! Each form of instruction that the kernels use, against plain arithmetic: on the emulator, and on a GPU where FERROTRON_GPU asks for it.
//! Where a GPU has left its results in `tests/golden/gpu`, the emulator is held to those too.
//!
//! Invariant: what an instruction must give exactly is compared bit by bit, any NaN being like any other; what it may round in its own way,
//! within what the manual allows.

#[path = "support/golden.rs"]
mod golden;
#[path = "support/gpu.rs"]
mod gpu;

use ferrotron::args;
use ferrotron::device::Device;
use ferrotron::device::gpu::driver::Grid;
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::rng::Stream;
use golden::Record;
use half::{bf16, f16};

/// Words of an operand.
const N: usize = 4096;
const THREADS: usize = 256;

/// What a word of an operand holds.
#[derive(Clone, Copy)]
enum Kind {
    Bits,
    /// Numbers of all sizes, and those that are often got wrong.
    Floats,
    /// From -150 to 150.
    Exponents,
    /// Two numbers near one.
    Bf16s,
    F16s,
}

/// What a word of the result means.
#[derive(Clone, Copy, PartialEq)]
enum Word {
    Bits,
    F32,
    Bf16s,
    F16s,
}

enum Expected {
    Exactly(Vec<u32>),
    /// Values, and how far off each may be.
    Nearly(Vec<(f64, f64)>),
}

type Operands = [Vec<u32>; 3];

fn operand(name: &str, kind: Kind) -> Vec<u32> {
    let awkward =
        [0.0, -0.0, 1.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN_POSITIVE, 1e-40, -3e-39, 65504.0, 65520.0, 3.0e38];
    let stream = Stream::new(3, name);
    let near_one = |i: u64| stream.normal(i) as f32;
    let word = |i: u64| match kind {
        Kind::Bits => stream.word(i) as u32,
        // Every awkward number meets every other, and then all sizes.
        Kind::Floats if i < 256 => awkward[(stream.word(i) % awkward.len() as u64) as usize].to_bits(),
        Kind::Floats => ((stream.normal(i) * 2f64.powi((stream.word(i + N as u64) % 60) as i32 - 30)) as f32).to_bits(),
        Kind::Exponents => ((stream.uniform(i) * 300.0 - 150.0) as f32).to_bits(),
        Kind::Bf16s => pair([2 * i, 2 * i + 1].map(|i| bf16::from_f32(near_one(i)).to_bits())),
        Kind::F16s => pair([2 * i, 2 * i + 1].map(|i| f16::from_f32(near_one(i)).to_bits())),
    };
    (0..N as u64).map(word).collect()
}

fn pair([low, high]: [u16; 2]) -> u32 {
    (high as u32) << 16 | low as u32
}

fn halves(word: u32) -> [u16; 2] {
    [word as u16, (word >> 16) as u16]
}

/// Runs a form on a device; `more`: words of the result beyond those of an operand.
fn run(device: &Device, form: &str, operands: &Operands, per_thread: usize, more: usize) -> Tensor {
    let Device::Gpu(gpu) = device else { panic!("kernels run on a GPU") };
    let all = Tensor::from_slice(device, [3 * N], &operands.concat());
    let mut out = device.zeros([N + more], Dtype::U32);
    gpu.launch(
        &format!("instructions_{form}"),
        Grid::blocks(N / per_thread / THREADS, THREADS as u32),
        &args![out.view_mut(), all.view(), N],
    );
    device.check().unwrap_or_else(|error| panic!("{form}: {error:#}"));
    out
}

fn is_nan(meaning: Word, word: u32) -> bool {
    let any = |nan: fn(u16) -> bool| halves(word).into_iter().any(nan);
    match meaning {
        Word::Bits => false,
        Word::F32 => f32::from_bits(word).is_nan(),
        Word::Bf16s => any(|half| bf16::from_bits(half).is_nan()),
        Word::F16s => any(|half| f16::from_bits(half).is_nan()),
    }
}

fn equal(meaning: Word, a: u32, b: u32) -> bool {
    let each = |nan: fn(u16) -> bool| halves(a).into_iter().zip(halves(b)).all(|(a, b)| a == b || (nan(a) && nan(b)));
    match meaning {
        Word::Bits => a == b,
        Word::F32 => a == b || (is_nan(meaning, a) && is_nan(meaning, b)),
        Word::Bf16s => each(|half| bf16::from_bits(half).is_nan()),
        Word::F16s => each(|half| f16::from_bits(half).is_nan()),
    }
}

fn near(word: u32, (value, allowed): (f64, f64)) -> bool {
    let x = f32::from_bits(word) as f64;
    x == value || (x.is_nan() && value.is_nan()) || (x - value).abs() <= allowed
}

/// Where `words` are not what is expected, in words.
fn problem(meaning: Word, words: &[u32], expected: &Expected, operands: &Operands) -> Option<String> {
    let told = |i: usize, expected: String| {
        let [a, b, c] = [0, 1, 2].map(|k| operands[k].get(i).copied().unwrap_or_default());
        format!("word {i} is {:#010x} ({:e}), not {expected}; of {a:#010x}, {b:#010x}, {c:#010x}", words[i], f32::from_bits(words[i]))
    };
    match expected {
        Expected::Exactly(values) => {
            assert_eq!(words.len(), values.len(), "words of the result");
            (0..words.len()).find(|&i| !equal(meaning, words[i], values[i])).map(|i| told(i, format!("{:#010x}", values[i])))
        }
        Expected::Nearly(values) => {
            assert_eq!(words.len(), values.len(), "words of the result");
            let at = (0..words.len()).find(|&i| !near(words[i], values[i]));
            at.map(|i| told(i, format!("{:e} within {:e}", values[i].0, values[i].1)))
        }
    }
}

/// Holds a form to `expected`, on every device that there is, and the emulator to what was recorded.
struct Form {
    name: &'static str,
    kinds: [Kind; 3],
    meaning: Word,
    per_thread: usize,
    more: usize,
}

impl Form {
    fn hold(&self, expected: impl Fn(&Operands) -> Expected) {
        let names = ["a", "b", "c"];
        let operands: Operands = [0, 1, 2].map(|k| operand(names[k], self.kinds[k]));
        let expected = expected(&operands);
        let words = |device: &Device| run(device, self.name, &operands, self.per_thread, self.more);
        let emulated = words(&Device::emulated(None, true, 1));
        let problem_on = |result: &Tensor| problem(self.meaning, &result.to_vec::<u32>(), &expected, &operands);
        let found = problem_on(&emulated);
        assert!(found.is_none(), "{} on the emulator: {}", self.name, found.unwrap_or_default());
        let name = format!("instruction {}", self.name);
        if let Some((device, _)) = golden::real() {
            let result = words(&device);
            // Recorded before it is judged: a surprise is what one wants to look at.
            golden::record(&name, &Record::of(&result, usize::MAX));
            let same = self.first_difference(&emulated.to_vec::<u32>(), &result.to_vec::<u32>()).is_none();
            println!("{}: {} the emulator's bits", self.name, if same { "has" } else { "has not" });
            let found = problem_on(&result);
            assert!(found.is_none(), "{} on {}: {}", self.name, device.name(), found.unwrap_or_default());
        }
        for (file, record) in golden::recorded(&name) {
            let recorded: Vec<u32> =
                record.head.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect();
            let found = problem(self.meaning, &recorded, &expected, &operands);
            assert!(found.is_none(), "{} in {file}: {}", self.name, found.unwrap_or_default());
            if matches!(expected, Expected::Exactly(_)) {
                let at = self.first_difference(&emulated.to_vec::<u32>(), &recorded);
                assert!(at.is_none(), "{}: word {at:?} is not what {file} has", self.name);
            }
        }
    }

    fn first_difference(&self, a: &[u32], b: &[u32]) -> Option<usize> {
        a.iter().zip(b).position(|(a, b)| !equal(self.meaning, *a, *b))
    }
}

fn form(name: &'static str, kinds: [Kind; 3], meaning: Word) -> Form {
    Form { name, kinds, meaning, per_thread: 1, more: 0 }
}

/// A form of which word i of the result is of words i of the operands.
fn each(name: &'static str, kinds: [Kind; 3], meaning: Word, of: impl Fn(u32, u32, u32) -> u32) {
    form(name, kinds, meaning).hold(|[a, b, c]| Expected::Exactly((0..N).map(|i| of(a[i], b[i], c[i])).collect()));
}

/// The same of floats.
fn float(name: &'static str, of: impl Fn(f32, f32, f32) -> f32) {
    each(name, [Kind::Floats; 3], Word::F32, |a, b, c| {
        let [a, b, c] = [a, b, c].map(f32::from_bits);
        of(a, b, c).to_bits()
    });
}

/// A float of the first operand, as near to the value as `allowed` says of it; denormals may be taken for zeros, before and after.
fn approximately(name: &'static str, kind: Kind, of: impl Fn(f64) -> f64, allowed: impl Fn(f64) -> f64) {
    form(name, [kind; 3], Word::F32).hold(|[a, _, _]| {
        let value = |word: &u32| {
            let x = f32::from_bits(*word);
            let y = of(if x.is_subnormal() { 0f32.copysign(x) as f64 } else { x as f64 });
            // In float, so that what is too great is infinite.
            let rounded = y as f32 as f64;
            if rounded.is_finite() { (rounded, allowed(y) + f32::MIN_POSITIVE as f64) } else { (rounded, 0.0) }
        };
        Expected::Nearly(a.iter().map(value).collect())
    });
}

#[test]
fn conversions() {
    use Kind::{Bits, Floats};
    let b16 = |x: u32| bf16::from_f32(f32::from_bits(x)).to_bits();
    let h16 = |x: u32| f16::from_f32(f32::from_bits(x)).to_bits();
    each("bf16_from_float", [Floats; 3], Word::Bf16s, |a, _, _| b16(a) as u32);
    each("f16_from_float", [Floats; 3], Word::F16s, |a, _, _| h16(a) as u32);
    each("float_from_f16", [Bits; 3], Word::F32, |a, _, _| f16::from_bits(a as u16).to_f32().to_bits());
    each("two_bf16_from_float", [Floats; 3], Word::Bf16s, |a, b, _| pair([b16(a), b16(b)]));
    each("two_f16_from_float", [Floats; 3], Word::F16s, |a, b, _| pair([h16(a), h16(b)]));
    float("truncate", |a, _, _| a.trunc());
    each("unsigned_from_float", [Floats; 3], Word::Bits, |a, _, _| f32::from_bits(a) as u32);
    each("float_from_wide", [Bits; 3], Word::F32, |a, b, _| (((a as u64) << 32 | b as u64) as f32).to_bits());
    float("float_from_double", |a, b, c| (a as f64 * b as f64 + c as f64) as f32);
}

#[test]
fn arithmetic_that_is_rounded_once() {
    float("add", |a, b, _| a + b);
    float("subtract", |a, b, _| a - b);
    float("multiply", |a, b, _| a * b);
    float("multiply_add", f32::mul_add);
    float("divide", |a, b, _| a / b);
    float("reciprocal", |a, _, _| 1.0 / a);
    float("square_root", |a, _, _| a.sqrt());
    float("divide_double", |a, b, _| (a as f64 / b as f64) as f32);
    // Of two zeros the positive one is greater here, which Rust leaves open.
    float("maximum", |a, b, _| if a == 0.0 && b == 0.0 { f32::from_bits(a.to_bits() & b.to_bits()) } else { a.max(b) });
}

#[test]
fn integers() {
    let wide = |high: u32, low: u32| (high as u64) << 32 | low as u64;
    each("divide_wide", [Kind::Bits; 3], Word::Bits, |a, b, c| (wide(a, b) / (c | 1) as u64) as u32);
    each("remainder_wide", [Kind::Bits; 3], Word::Bits, |a, b, c| (wide(a, b) % (c | 1) as u64) as u32);
    each("multiply_wide", [Kind::Bits; 3], Word::Bits, |a, b, c| (wide(a, b).wrapping_mul(wide(c, a)) >> 32) as u32);
    each("shift_funnel", [Kind::Bits; 3], Word::Bits, |a, b, c| (wide(b, a) << (c % 32) >> 32) as u32);
    each("count_ones", [Kind::Bits; 3], Word::Bits, |a, _, _| a.count_ones());
}

#[test]
fn approximations() {
    approximately("exp2_fast", Kind::Exponents, f64::exp2, |y| y * 2f64.powi(-21));
    // Near one the error is absolute.
    approximately("log2_fast", Kind::Floats, f64::log2, |y| 2f64.powi(-21) * y.abs().max(1.0));
    approximately("reciprocal_fast", Kind::Floats, |x| 1.0 / x, |y| y.abs() * 2f64.powi(-22));
}

#[test]
fn between_lanes() {
    let warp = |name, of: fn(&Operands, usize) -> u32| {
        form(name, [Kind::Bits; 3], Word::Bits).hold(|all| Expected::Exactly((0..N).map(|i| of(all, i)).collect()));
    };
    warp("shuffle_xor", |[a, _, _], i| a[i ^ 5]);
    warp("shuffle_from", |[a, b, _], i| a[i / 32 * 32 + b[i] as usize % 32]);
    warp("ballot", |[a, _, _], i| (0..32).fold(0, |mask, lane| mask | (a[i / 32 * 32 + lane] & 1) << lane));
    warp("any", |[a, _, _], i| a[i / 32 * 32..i / 32 * 32 + 32].iter().any(|a| a % 32 == 0) as u32);
}

#[test]
fn shared_memory_and_copies() {
    form("shared_words", [Kind::Bits; 3], Word::Bits).hold(|[a, _, _]| Expected::Exactly((0..N).map(|i| a[i ^ 1]).collect()));
    for (name, words) in [("copy_16", 4), ("copy_8", 2)] {
        Form { per_thread: words, ..form(name, [Kind::Bits; 3], Word::Bits) }.hold(|[a, b, _]| {
            let cut = |i: usize| {
                let bytes = b[i / words] as usize % (4 * words + 1);
                let here = bytes.saturating_sub(i % words * 4).min(4);
                a[i] & ((1u64 << (8 * here)) - 1) as u32
            };
            Expected::Exactly((0..N).map(cut).collect())
        });
    }
    each("copy_4", [Kind::Bits; 3], Word::Bits, |a, b, c| a & ((1u64 << (8 * (b % 5))) - 1) as u32 ^ c);
    Form { more: THREADS, ..form("atomic_add", [Kind::Bits; 3], Word::Bits) }.hold(|[a, b, _]| {
        let mut wide = [0u64; 64];
        let mut words = Vec::new();
        for block in 0..N / THREADS {
            let mut sums = [0u64; 64];
            (block * THREADS..(block + 1) * THREADS).for_each(|i| sums[a[i] as usize % 64] += b[i] as u64);
            (0..64).for_each(|slot| wide[slot] += sums[slot] + (sums[slot] >> 32 << 40));
            words.extend((0..THREADS).map(|slot| sums.get(slot).map_or(0, |&sum| sum as u32)));
        }
        let mut all: Vec<u32> = wide.iter().flat_map(|sum| [*sum as u32, (sum >> 32) as u32]).collect();
        all.resize(THREADS, 0);
        all.extend(words);
        Expected::Exactly(all)
    });
}

/// The 16-bit number `column` of row `row` of the warp's rows of eight.
fn element(a: &[u32], row: usize, column: usize) -> u16 {
    halves(a[row * 4 + column / 2])[column % 2]
}

#[test]
fn matrices_from_shared_memory() {
    for (name, transposed) in [("load_matrices", false), ("load_matrices_transposed", true)] {
        Form { per_thread: 4, ..form(name, [Kind::Bits; 3], Word::Bits) }.hold(|[a, _, _]| {
            let word = |i: usize| {
                let (thread, matrix) = (i / 4, i % 4);
                let (warp, lane) = (thread / 32 * 32, thread % 32);
                let place = |row: usize, column: usize| element(a, warp + ((matrix * 8 + row) ^ 6), column);
                let (row, column) = (lane / 4, lane % 4 * 2);
                pair([0, 1].map(|k| if transposed { place(column + k, row) } else { place(row, column + k) }))
            };
            Expected::Exactly((0..N).map(word).collect())
        });
    }
}

#[test]
fn products_of_matrices() {
    type Value = fn(u16) -> f64;
    let of_bf16: Value = |half| bf16::from_bits(half).to_f64();
    let of_f16: Value = |half| f16::from_bits(half).to_f64();
    let forms = [("multiply_bf16", Kind::Bf16s, of_bf16), ("multiply_f16", Kind::F16s, of_f16)];
    for (name, kind, value) in forms {
        Form { per_thread: 4, ..form(name, [kind, kind, Kind::Exponents], Word::F32) }.hold(|[a, b, c]| {
            let word = |i: usize| {
                let (thread, k) = (i / 4, i % 4);
                let (warp, lane) = (thread / 32 * 32, thread % 32);
                let (row, column) = (lane / 4 + k / 2 * 8, lane % 4 * 2 + k % 2);
                // Where the manual says that a[row, j] and b[j, column] lie.
                let left = |j: usize| value(halves(a[(warp + row % 8 * 4 + j % 8 / 2) * 4 + row / 8 + j / 8 * 2])[j % 2]);
                let right = |j: usize| value(halves(b[(warp + column * 4 + j % 8 / 2) * 4 + j / 8])[j % 2]);
                let start = f32::from_bits(c[i]) as f64;
                let terms = (0..16).map(|j| left(j) * right(j));
                let size = start.abs() + terms.clone().map(f64::abs).sum::<f64>();
                // Sums are kept in at least 24 bits, cut off or rounded at each of few additions.
                (start + terms.sum::<f64>(), size * 2f64.powi(-20))
            };
            Expected::Nearly((0..N).map(word).collect())
        });
    }
}

#[test]
fn recorded_on_a_gpu() {
    let files = golden::files();
    match files.as_slice() {
        [] => println!("no GPU has left its results in tests/golden/gpu yet: the emulator is held to plain arithmetic alone"),
        files => files.iter().for_each(|(name, bytes)| println!("held to tests/golden/gpu/{name}, {} bytes", bytes.len())),
    }
}
