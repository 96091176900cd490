//! The optimizer's update has the bits of the CPU, however slices lie, and so has rounding by chance.

use crate::{AWKWARD, Close, DTYPES, of, random, same};
use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::ops::adamw::{self, Adam, Rounding};

const COUNTS: [usize; 6] = [0, 1, 3, 64, 1027, 5003];

fn adam(step: u64) -> Adam {
    Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, rate: 1e-2, decay: 0.1, step, scale: 0.37 }
}

/// p, m, v and g.
fn state(device: &Device, count: usize) -> [Tensor; 4] {
    let mut state = ["p", "m", "v", "g"].map(|name| random(device, name, &[count], Dtype::F32, 1.0));
    let squares: Vec<f32> = state[2].to_vec::<f32>().iter().map(|x| x * x).collect();
    state[2] = of(device, &[count], Dtype::F32, &squares);
    state
}

#[test]
fn updates() {
    for count in COUNTS {
        for beta1 in [0.9, 0.3] {
            same(&format!("step {count} {beta1}"), Close::Bits, |device| {
                let [mut p, mut m, mut v, g] = state(device, count);
                adamw::step(p.view_mut(), m.view_mut(), v.view_mut(), g.view(), &Adam { beta1, ..adam(7) });
                vec![p, m, v]
            });
        }
        for dtype in DTYPES {
            for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 1 << 40 | 5, first: 3 }] {
                same(&format!("step and cast {dtype} {count} {rounding:?}"), Close::Bits, |device| {
                    let [mut p, mut m, mut v, g] = state(device, count);
                    let mut weights = device.zeros([count], dtype);
                    adamw::step_and_cast(p.view_mut(), m.view_mut(), v.view_mut(), g.view(), weights.view_mut(), &adam(2), rounding);
                    vec![p, m, v, weights]
                });
            }
        }
    }
}

#[test]
fn windows_that_begin_anywhere() {
    let count = 1100;
    for dtype in DTYPES {
        // All by the same, as slices of flat buffers do; and each by its own.
        for starts in [[1, 1, 1, 1, 1], [6, 6, 6, 6, 6], [3, 3, 3, 3, 5], [0, 1, 2, 3, 4], [4, 4, 4, 4, 1]] {
            for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 9, first: (1 << 34) - 700 }] {
                same(&format!("{dtype} from {starts:?} {rounding:?}"), Close::Bits, |device| {
                    let [mut p, mut m, mut v, g] = state(device, count + 8);
                    let mut weights = device.zeros([count + 8], dtype);
                    let [a, b, c, d, e] = starts.map(|start| start..start + count);
                    let shape = [count];
                    adamw::step_and_cast(
                        p.view_mut().part(a, shape),
                        m.view_mut().part(b, shape),
                        v.view_mut().part(c, shape),
                        g.view().part(d, shape),
                        weights.view_mut().part(e, shape),
                        &adam(1),
                        rounding,
                    );
                    vec![p, m, v, weights]
                });
            }
        }
    }
}

#[test]
fn awkward_numbers() {
    let count = AWKWARD.len() * AWKWARD.len();
    let repeated: Vec<f32> = AWKWARD.iter().flat_map(|&x| [x; AWKWARD.len()]).collect();
    let cycled: Vec<f32> = AWKWARD.iter().cycle().take(count).copied().collect();
    for dtype in DTYPES {
        for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 2, first: 0 }] {
            same(&format!("awkward {dtype} {rounding:?}"), Close::Bits, |device| {
                let (mut p, g) = (of(device, &[count], Dtype::F32, &repeated), of(device, &[count], Dtype::F32, &cycled));
                let (mut m, mut v) = (device.zeros([count], Dtype::F32), of(device, &[count], Dtype::F32, &vec![1e-12; count]));
                let mut weights = device.zeros([count], dtype);
                adamw::step_and_cast(p.view_mut(), m.view_mut(), v.view_mut(), g.view(), weights.view_mut(), &adam(3), rounding);
                vec![p, m, v, weights]
            });
        }
    }
}

/// Chance belongs to an element's number: no matter in which slice it lies.
#[test]
fn slices_round_as_the_whole() {
    let count = 1003;
    for device in [Device::cpu(1), Device::emulated(Some(1), false, 1)] {
        for dtype in DTYPES {
            let whole = |cuts: &[usize]| {
                let [mut p, mut m, mut v, g] = state(&device, count);
                let mut weights = device.zeros([count], dtype);
                for cut in cuts.windows(2) {
                    let (range, shape) = (cut[0]..cut[1], [cut[1] - cut[0]]);
                    let [p, m, v] = [&mut p, &mut m, &mut v].map(|x| x.view_mut().part(range.clone(), shape));
                    let rounding = Rounding::Stochastic { seed: 4, first: 100 + cut[0] as u64 };
                    adamw::step_and_cast(
                        p,
                        m,
                        v,
                        g.view().part(range.clone(), shape),
                        weights.view_mut().part(range, shape),
                        &adam(5),
                        rounding,
                    );
                }
                weights.view().to_bytes()
            };
            assert!(whole(&[0, count]) == whole(&[0, 1, 7, 500, count]), "{dtype}");
        }
    }
}
