//! What tests of numbers share: random tensors, their values in f64, and how far two sets of values are apart.
//!
//! Invariant: random values are a function of their name and index, so a failing test fails again.

use ferrotron::device::Device;
use ferrotron::device::tensor::{Tensor, View};
use ferrotron::dispatch;
use ferrotron::dtype::{Dtype, Element};
use ferrotron::rng::Stream;
use ferrotron::shape::Shape;

/// The formats that activations may have.
pub const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

/// Normal numbers times `spread`, rounded to `dtype`.
pub fn random(device: &Device, name: &str, shape: impl Into<Shape>, dtype: Dtype, spread: f64) -> Tensor {
    let (shape, stream) = (shape.into(), Stream::new(7, name));
    let draw = |i: usize| (stream.normal(i as u64) * spread) as f32;
    dispatch!(dtype, T => {
        let values: Vec<T> = (0..shape.numel()).map(|i| T::from_f32(draw(i))).collect();
        Tensor::from_slice(device, shape, &values)
    })
}

/// Whole numbers below `limit`.
pub fn random_ids(device: &Device, name: &str, count: usize, limit: u32) -> Tensor {
    let stream = Stream::new(7, name);
    let ids: Vec<u32> = (0..count).map(|i| (stream.uniform(i as u64) * limit as f64) as u32).collect();
    Tensor::from_slice(device, [count], &ids)
}

/// Elements of any floating-point dtype, exactly.
pub fn values(x: View<'_>) -> Vec<f64> {
    dispatch!(x.dtype(), T => x.to_vec::<T>().iter().map(|x| x.to_f32() as f64).collect())
}

/// |got - truth| / |truth|, both as vectors.
pub fn relative_error(got: &[f64], truth: &[f64]) -> f64 {
    assert_eq!(got.len(), truth.len(), "vectors of one length");
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    (square(&mut got.iter().zip(truth).map(|(a, b)| a - b)) / square(&mut truth.iter().copied()).max(1e-300)).sqrt()
}

/// That `got` is `truth`, computed in f32 and rounded to its dtype once.
pub fn assert_rounded_once(name: &str, got: View<'_>, truth: &[f64]) {
    let (dtype, got) = (got.dtype(), values(got));
    let largest = truth.iter().fold(0f64, |largest, x| largest.max(x.abs()));
    let error = relative_error(&got, truth);
    // Half a unit in the last place, relative to the power of two below the value; and the least step of the format.
    let (half_unit, least) = match dtype {
        Dtype::Bf16 => (2f64.powi(-8), 0.0),
        Dtype::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        _ => return assert!(error < 1e-6, "{name} {dtype}: relative error {error:e}"),
    };
    for (i, (got, truth)) in got.iter().zip(truth).enumerate() {
        let bound = half_unit * truth.abs().max(1e-300).log2().floor().exp2() + least + 1e-6 * largest;
        assert!((got - truth).abs() <= bound, "{name} {dtype}: element {i} is {got}, not {truth}; bound {bound:e}");
    }
}
