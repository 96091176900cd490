//! Every op on a GPU gives what it gives on the CPU: the kernels' PTX, executed by the emulator in a fixed order of threads, in eight random
//! ones, and with every check on. With FERROTRON_GPU=1 a real GPU stands beside the emulator's fixed order, with FERROTRON_GPU=only in its
//! place; what it gives is appended to the file that FERROTRON_RECORD names, and what is in `tests/golden/gpu` the emulator is held to.

mod activation;
mod adamw;
mod attention;
mod cross_entropy;
mod elementwise;
mod embedding;
#[path = "../support/golden.rs"]
mod golden;
#[path = "../support/gpu.rs"]
mod gpu;
mod matmul;
mod norm;
mod reduce;
mod rope;
mod select;

use ferrotron::device::Device;
use ferrotron::device::gpu::emulated::Emulated;
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::{Dtype, Element, Stored};
use ferrotron::rng::Stream;
use ferrotron::shape::Shape;
use golden::Record;
use half::{bf16, f16};
use std::path::PathBuf;

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

/// How near a GPU's result must be to the CPU's.
#[derive(Clone, Copy, Debug)]
pub enum Close {
    /// The same bits: any NaN is like any other.
    Bits,
    /// f32 within this share of the tensor's norm; bf16 and f16 within one rounding of each element, give or take that share.
    Share(f64),
}

/// The name of the real GPU among `gpus`.
const REAL: &str = "a real GPU";

/// Runs `op` on the CPU and on GPUs, and compares all tensors that it returns. On every emulated one they must have the same bits; on a
/// real one too from call to call, but not those of the emulator, where approximate instructions are used.
pub fn same(what: &str, close: Close, op: impl Fn(&Device) -> Vec<Tensor>) {
    let expected = op(&Device::cpu(1));
    let mut first: Option<Vec<Vec<u8>>> = None;
    for (order, device) in gpus() {
        let results = op(&device);
        let bytes: Vec<Vec<u8>> = results.iter().map(|x| x.view().to_bytes()).collect();
        device.check().unwrap_or_else(|error| panic!("{what}, {order}: {error:#}"));
        assert_eq!(results.len(), expected.len(), "{what}: results");
        let real = order == REAL;
        for (index, (result, expected)) in results.iter().zip(&expected).enumerate() {
            assert_eq!((result.shape(), result.dtype()), (expected.shape(), expected.dtype()), "{what}, result {index}");
            if real {
                // Before it is judged: a surprise is what one wants to look at.
                golden::record(&format!("{what}, result {index}"), &Record::of(result, KEPT * result.dtype().bytes()));
            }
            let problem = difference(result, expected, close);
            assert!(problem.is_none(), "{what}, {order}, result {index}: {}", problem.unwrap_or_default());
        }
        if real {
            let again: Vec<Vec<u8>> = op(&device).iter().map(|x| x.view().to_bytes()).collect();
            assert!(again == bytes, "{what}, {order}: other bits when it is done again");
            if let Some(emulated) = &first {
                println!("{what}: {} the emulator's bits", if *emulated == bytes { "has" } else { "has not" });
            }
            continue;
        }
        if first.is_none() {
            results.iter().enumerate().for_each(|(index, result)| hold_to_records(&format!("{what}, result {index}"), result, close));
        }
        let first = first.get_or_insert_with(|| bytes.clone());
        assert!(*first == bytes, "{what}, {order}: other bits than in the fixed order of threads");
    }
}

/// Elements of a result that are recorded as they are.
const KEPT: usize = 64;

/// Holds a result of the emulator to what real GPUs have recorded under its name.
fn hold_to_records(name: &str, result: &Tensor, close: Close) {
    let records = golden::recorded(name);
    if records.is_empty() {
        return;
    }
    let mine = Record::of(result, KEPT * result.dtype().bytes());
    for (file, record) in records {
        assert_eq!((mine.bytes, mine.head.len()), (record.bytes, record.head.len()), "{name}: as many bytes as in {file}");
        if let (Close::Share(_), false) = (close, result.dtype() == Dtype::U32) {
            // Both are within the share of the CPU's result, which has been seen of the whole.
            let host = Device::cpu(1);
            let [mine, theirs] = [&mine.head, &record.head].map(|head| of_bytes(&host, result.dtype(), head));
            let problem = difference(&mine, &theirs, Close::Share(HEADS));
            assert!(problem.is_none(), "{name}, beside {file}: {}", problem.unwrap_or_default());
        } else {
            assert_eq!(mine, *record, "{name}: not the bits of {file}");
        }
    }
}

/// How far the first elements of two results may be apart, as a share of their norm, which may be less than that of the whole.
const HEADS: f64 = 1e-4;

fn of_bytes(device: &Device, dtype: Dtype, bytes: &[u8]) -> Tensor {
    fn read<T: Stored>(device: &Device, bytes: &[u8]) -> Tensor {
        let mut values = vec![T::default(); bytes.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(bytes);
        Tensor::from_slice(device, [values.len()], &values)
    }
    match dtype {
        Dtype::F32 => read::<f32>(device, bytes),
        Dtype::Bf16 => read::<bf16>(device, bytes),
        Dtype::F16 => read::<f16>(device, bytes),
        Dtype::U32 => read::<u32>(device, bytes),
    }
}

/// GPUs, and how each orders its threads; products are the program's own. FERROTRON_PTX names a folder of kernels to be tested instead of the program's own.
pub fn gpus() -> Vec<(String, Device)> {
    let folder = std::env::var_os("FERROTRON_PTX").map(PathBuf::from);
    let gpu = |seed, checked| {
        let emulated = Emulated::new(seed, checked, 1);
        let emulated = match &folder {
            Some(folder) => emulated.with_ptx_of(folder),
            None => emulated,
        };
        Device::gpu(Box::new(emulated)).with_own_products()
    };
    let in_order = || ("in order".to_string(), gpu(None, false));
    if let Some((device, alone)) = golden::real() {
        let real = (REAL.to_string(), device.with_own_products());
        return if alone { vec![real] } else { vec![in_order(), real] };
    }
    let mut all = vec![in_order()];
    all.extend((0..8).map(|seed| (format!("seed {seed}"), gpu(Some(seed), false))));
    all.push(("checked".to_string(), gpu(None, true)));
    all.push(("checked, seed 9".to_string(), gpu(Some(9), true)));
    all
}

/// Why `result` is not close enough to `expected`.
fn difference(result: &Tensor, expected: &Tensor, close: Close) -> Option<String> {
    if result.dtype() == Dtype::U32 {
        return unequal(&result.to_vec::<u32>(), &expected.to_vec::<u32>(), |a, b| a == b);
    }
    let (a, b) = (floats(result), floats(expected));
    let share = match close {
        Close::Bits => return unequal(&a, &b, |a, b| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())),
        Close::Share(share) => share,
    };
    let finite = |x: &f32| if x.is_finite() { *x as f64 } else { 0.0 };
    let problem = unequal(&a, &b, |a, b| (a.is_finite() && b.is_finite()) || a == b || (a.is_nan() && b.is_nan()));
    if problem.is_some() {
        return problem;
    }
    let norm = b.iter().map(|x| finite(x).powi(2)).sum::<f64>().sqrt();
    if result.dtype() == Dtype::F32 {
        let distance = a.iter().zip(&b).map(|(a, b)| (finite(a) - finite(b)).powi(2)).sum::<f64>().sqrt();
        return (distance > share * norm).then(|| format!("off by {:.2e} of its norm {norm:.3e}", distance / norm));
    }
    // One unit of the last place, of the greater of the two, and where terms cancel a share of what a typical element is.
    let unit = if result.dtype() == Dtype::Bf16 { 2f64.powi(-7) } else { 2f64.powi(-10) };
    let typical = norm / (b.len().max(1) as f64).sqrt();
    unequal(&a, &b, |a, b| (finite(a) - finite(b)).abs() <= unit * finite(a).abs().max(finite(b).abs()) + share * typical)
}

fn unequal<T: std::fmt::Debug>(a: &[T], b: &[T], equal: impl Fn(&T, &T) -> bool) -> Option<String> {
    let at = a.iter().zip(b).position(|(a, b)| !equal(a, b))?;
    Some(format!("element {at} of {} is {:?}, not {:?}", a.len(), a[at], b[at]))
}

pub fn floats(x: &Tensor) -> Vec<f32> {
    match x.dtype() {
        Dtype::F32 => x.to_vec::<f32>(),
        Dtype::Bf16 => x.to_vec::<bf16>().into_iter().map(Element::to_f32).collect(),
        Dtype::F16 => x.to_vec::<f16>().into_iter().map(Element::to_f32).collect(),
        Dtype::U32 => panic!("no floats"),
    }
}

/// Normal numbers times `scale`, the same for the same `name`, rounded to `dtype`.
pub fn random(device: &Device, name: &str, shape: &[usize], dtype: Dtype, scale: f64) -> Tensor {
    let stream = Stream::new(1, name);
    let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| (stream.normal(i as u64) * scale) as f32).collect();
    of(device, shape, dtype, &values)
}

/// `values`, rounded to `dtype`.
pub fn of(device: &Device, shape: &[usize], dtype: Dtype, values: &[f32]) -> Tensor {
    fn rounded<T: Element + Stored>(device: &Device, shape: &[usize], values: &[f32]) -> Tensor {
        let values: Vec<T> = values.iter().map(|&x| T::from_f32(x)).collect();
        Tensor::from_slice(device, Shape::new(shape), &values)
    }
    match dtype {
        Dtype::F32 => rounded::<f32>(device, shape, values),
        Dtype::Bf16 => rounded::<bf16>(device, shape, values),
        Dtype::F16 => rounded::<f16>(device, shape, values),
        Dtype::U32 => panic!("no floats"),
    }
}

/// Whole numbers below `end`, the same for the same `name`.
pub fn random_ids(device: &Device, name: &str, count: usize, end: u32) -> Tensor {
    let stream = Stream::new(2, name);
    let ids: Vec<u32> = (0..count).map(|i| (stream.word(i as u64) % end as u64) as u32).collect();
    Tensor::from_slice(device, [count], &ids)
}

/// Numbers that are often got wrong.
pub const AWKWARD: [f32; 12] =
    [0.0, -0.0, 1.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN_POSITIVE, 1e-40, -3e-39, 65504.0, 3.0e38];
