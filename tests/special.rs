//! Every level of instructions against plain code, where loops have odd lengths, slices start anywhere, and numbers are not ordinary.
//!
//! Invariant: the same bits on all levels and numbers of threads, but for the bits of a NaN, which processors choose by the order of operands.

use ferrotron::device::Device;
use ferrotron::device::cpu::{Cpu, Isa};
use ferrotron::device::tensor::{Tensor, View};
use ferrotron::dispatch;
use ferrotron::dtype::{Dtype, Element};
use ferrotron::ops::{activation, cross_entropy, elementwise, norm};
use ferrotron::rng::Stream;
use std::sync::Arc;

const SPECIAL: [f32; 16] = [
    0.0,
    -0.0,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    1e-45,
    -1e-45,
    f32::MIN_POSITIVE,
    -1e-39,
    3.4e38,
    -3.4e38,
    88.8,
    -88.8,
    -104.5,
    65504.0,
    6e-8,
];
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];
const WIDTHS: [usize; 7] = [1, 5, 16, 31, 67, 256, 801];
/// Where slices begin.
const OFFSETS: [usize; 3] = [0, 1, 7];

/// Numbers of which about every `rare`-th is special; 0: none is.
fn numbers(name: &str, count: usize, rare: u64) -> Vec<f32> {
    let stream = Stream::new(3, name);
    let one = |i: u64| {
        let word = stream.word(2 * i + 1);
        if rare > 0 && word.is_multiple_of(rare) { SPECIAL[(word >> 32) as usize % 16] } else { (stream.normal(2 * i) * 4.0) as f32 }
    };
    (0..count as u64).map(one).collect()
}

fn tensor(device: &Device, dtype: Dtype, values: &[f32]) -> Tensor {
    dispatch!(dtype, T => Tensor::from_slice(device, [values.len()], &values.iter().map(|&x| <T as Element>::from_f32(x)).collect::<Vec<_>>()))
}

/// Bits, with one NaN for all.
fn bits(x: View<'_>) -> Vec<u32> {
    let bits = |x: f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
    dispatch!(x.dtype(), T => x.slice::<T>().iter().map(|&x| bits(Element::to_f32(x))).collect())
}

/// What the fused operations make of `rows` rows that begin anywhere in memory.
fn results(device: &Device, dtype: Dtype, rows: usize, width: usize, offset: usize, rare: u64) -> Vec<(&'static str, Vec<u32>)> {
    let count = rows * width;
    let make = |name: &str, count: usize, rare| tensor(device, dtype, &numbers(name, offset + count, rare));
    let (x, dy, gates) = (make("x", count, rare), make("dy", count, rare), make("gates", 2 * count, rare));
    let (w, b) = (make("w", width, 0), make("b", width, 0));
    let x = x.view().part(offset..offset + count, [rows, width]);
    let dy = dy.view().part(offset..offset + count, [rows, width]);
    let gates = gates.view().part(offset..offset + 2 * count, [rows, 2 * width]);
    let [w, b] = [&w, &b].map(|t| t.view().part(offset..offset + width, [width]));
    let (rms, r) = norm::rms_forward(x, w, 1e-5);
    let (layer, stats) = norm::layer_forward(x, w, b, 1e-5);
    let targets: Vec<u32> =
        (0..rows as u32).map(|row| if row % 3 == 2 { cross_entropy::IGNORED } else { row * 7 % width as u32 }).collect();
    let targets = Tensor::from_slice(device, [rows], &targets);
    let (max, parts) = cross_entropy::row_max(x, width.div_ceil(2));
    let sums = cross_entropy::sums(x, max.view(), &parts, targets.view(), 0, width.div_ceil(2));
    let mut logits = device.empty([rows, width], dtype);
    logits.view_mut().copy_from(x);
    cross_entropy::finish(logits.view_mut(), max.view(), sums.view(), targets.view(), 0, 0.5);
    let mut added = device.empty([rows, width], dtype);
    added.view_mut().copy_from(x);
    elementwise::add(added.view_mut(), dy);
    let mut gelu_dx = device.empty(x.shape(), dtype);
    gelu_dx.view_mut().copy_from(x);
    activation::gelu_backward(dy, gelu_dx.view_mut());
    let mut swiglu_dx = device.empty(gates.shape(), dtype);
    swiglu_dx.view_mut().copy_from(gates);
    activation::swiglu_backward(dy, swiglu_dx.view_mut());
    let all = [
        ("gelu", activation::gelu_forward(x)),
        ("gelu dx", gelu_dx),
        ("swiglu", activation::swiglu_forward(gates)),
        ("swiglu dx", swiglu_dx),
        ("rms dx", norm::rms_backward(dy, x, w, r.view())),
        ("rms", rms),
        ("rms r", r),
        ("layer dx", norm::layer_backward(dy, x, w, stats.view())),
        ("layer", layer),
        ("layer stats", stats),
        ("losses", cross_entropy::losses(sums.view(), targets.view())),
        ("sums", sums),
        ("dlogits", logits),
        ("added", added),
    ];
    all.into_iter().map(|(name, tensor)| (name, bits(tensor.view()))).collect()
}

#[test]
fn every_level_gives_the_bits_of_plain_code() {
    let plain = Device::Cpu(Arc::new(Cpu::with_isa(1, Isa::Portable)));
    let levels = [Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16].into_iter().filter(|&isa| isa <= Isa::detect());
    let mut devices: Vec<_> = levels.map(|isa| (1, isa)).collect();
    devices.extend([2, 4].map(|threads| (threads, Isa::detect())));
    let devices: Vec<_> =
        devices.into_iter().map(|(threads, isa)| (threads, isa, Device::Cpu(Arc::new(Cpu::with_isa(threads, isa))))).collect();
    for (dtype, width) in DTYPES.into_iter().flat_map(|dtype| WIDTHS.map(|width| (dtype, width))) {
        // Rows that have no special number at all, a few, and many; more rows than one thread takes by itself.
        for (offset, rare) in OFFSETS.into_iter().zip([0, 50, 4]) {
            let rows = if width == 31 { 1200 } else { 5 };
            let expected = results(&plain, dtype, rows, width, offset, rare);
            for (threads, isa, device) in &devices {
                for ((name, got), (_, expected)) in results(device, dtype, rows, width, offset, rare).iter().zip(&expected) {
                    let first = got.iter().zip(expected).position(|(got, expected)| got != expected);
                    assert_eq!(first, None, "{name} of {dtype} {rows} x {width} from {offset} on, {threads} threads, {isa:?}");
                }
            }
        }
    }
}
