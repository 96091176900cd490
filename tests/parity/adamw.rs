//! The optimizer's update has the bits of the CPU, however slices lie, and so has rounding by chance.

use crate::{AWKWARD, Close, DTYPES, of, random, same};
use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::ops::adamw::{self, Adam, Chance};
use ferrotron::ops::elementwise;
use ferrotron::plan::layout::Places;

const COUNTS: [usize; 6] = [0, 1, 3, 64, 1027, 5003];
const NARROW: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

/// Side by side; lines that end anywhere; a transposed tensor, in which the second number is past 2^32.
const PLACES: [Places; 4] = [
    Places { first: 3, length: 1 << 40, near: 1, far: 0 },
    Places { first: (1 << 34) - 700, length: 37, near: 1, far: 4099 },
    Places { first: 0, length: 128, near: 1, far: 130 },
    Places { first: 1, length: 61, near: (1 << 33) + 5, far: 1 },
];

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
            same(&format!("step and cast {dtype} {count}"), Close::Bits, |device| {
                let [mut p, mut m, mut v, g] = state(device, count);
                let mut weights = device.zeros([count], dtype);
                adamw::step_and_cast(p.view_mut(), m.view_mut(), v.view_mut(), g.view(), weights.view_mut(), &adam(2));
                vec![p, m, v, weights]
            });
        }
        for (dtype, places) in NARROW.into_iter().flat_map(|dtype| PLACES.map(|places| (dtype, places))) {
            let chance = Chance::new(1 << 40 | 5, "h.0.weight", 2, places);
            same(&format!("step by chance {dtype} {count} {places:?}"), Close::Bits, |device| {
                let [_, mut m, mut v, g] = state(device, count);
                let mut weights = random(device, "w", &[count], dtype, 1.0);
                adamw::step_by_chance(weights.view_mut(), m.view_mut(), v.view_mut(), g.view(), &adam(2), &chance);
                vec![weights, m, v]
            });
        }
    }
}

#[test]
fn windows_that_begin_anywhere() {
    let count = 1100;
    for dtype in DTYPES {
        // All by the same, as slices of flat buffers do; and each by its own.
        for starts in [[1, 1, 1, 1, 1], [6, 6, 6, 6, 6], [3, 3, 3, 3, 5], [0, 1, 2, 3, 4], [4, 4, 4, 4, 1]] {
            for chance in [None, Some(Chance::new(9, "w", 1, PLACES[0])), Some(Chance::new(9, "w", 1, PLACES[1]))] {
                if dtype == Dtype::F32 && chance.is_some() {
                    continue;
                }
                same(&format!("{dtype} from {starts:?} {chance:?}"), Close::Bits, |device| {
                    let [mut p, mut m, mut v, g] = state(device, count + 8);
                    let mut weights = random(device, "w", &[count + 8], dtype, 1.0);
                    let [a, b, c, d, e] = starts.map(|start| start..start + count);
                    let shape = [count];
                    let (m_part, v_part, g_part) = (m.view_mut().part(b, shape), v.view_mut().part(c, shape), g.view().part(d, shape));
                    let w_part = weights.view_mut().part(e, shape);
                    match chance {
                        None => adamw::step_and_cast(p.view_mut().part(a, shape), m_part, v_part, g_part, w_part, &adam(1)),
                        Some(chance) => adamw::step_by_chance(w_part, m_part, v_part, g_part, &adam(1), &chance),
                    }
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
        let moments = |device: &Device| (device.zeros([count], Dtype::F32), of(device, &[count], Dtype::F32, &vec![1e-12; count]));
        same(&format!("awkward {dtype}"), Close::Bits, |device| {
            let (mut p, g) = (of(device, &[count], Dtype::F32, &repeated), of(device, &[count], Dtype::F32, &cycled));
            let ((mut m, mut v), mut weights) = (moments(device), device.zeros([count], dtype));
            adamw::step_and_cast(p.view_mut(), m.view_mut(), v.view_mut(), g.view(), weights.view_mut(), &adam(3));
            vec![p, m, v, weights]
        });
        if NARROW.contains(&dtype) {
            same(&format!("awkward by chance {dtype}"), Close::Bits, |device| {
                let (mut weights, g) = (of(device, &[count], dtype, &repeated), of(device, &[count], Dtype::F32, &cycled));
                let (mut m, mut v) = moments(device);
                let chance = Chance::new(2, "w", 3, PLACES[0]);
                adamw::step_by_chance(weights.view_mut(), m.view_mut(), v.view_mut(), g.view(), &adam(3), &chance);
                vec![weights, m, v]
            });
        }
    }
}

/// Chance belongs to an element's place in its tensor: no matter in which slice it lies, and how.
#[test]
fn slices_round_as_the_whole() {
    let (rows, columns) = (17, 59);
    let count = rows * columns;
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
    let transpose = |values: &[f32]| (0..count).map(|i| values[i % rows * columns + i / rows]).collect::<Vec<f32>>();
    for device in [Device::cpu(1), Device::emulated(Some(1), false, 1)] {
        for dtype in NARROW {
            let rounded = |values: &[f32], cuts: &[usize], places: &dyn Fn(usize) -> Places| {
                let (mut weights, g) = (of(&device, &[count], dtype, values), of(&device, &[count], Dtype::F32, values));
                let [mut m, mut v] = [(); 2].map(|()| device.zeros([count], Dtype::F32));
                for cut in cuts.windows(2) {
                    let (range, shape) = (cut[0]..cut[1], [cut[1] - cut[0]]);
                    let [m, v] = [&mut m, &mut v].map(|x| x.view_mut().part(range.clone(), shape));
                    let g = g.view().part(range.clone(), shape);
                    let chance = Chance::new(4, "w", 5, places(cut[0]));
                    adamw::step_by_chance(weights.view_mut().part(range, shape), m, v, g, &adam(5), &chance);
                }
                let mut wide = device.empty([count], Dtype::F32);
                elementwise::cast(wide.view_mut(), weights.view());
                wide.to_vec::<f32>()
            };
            let whole = |from: usize| Places { first: from as u64, length: 1 << 48, near: 1, far: 0 };
            let expected = rounded(&values, &[0, count], &whole);
            assert_eq!(rounded(&values, &[0, 1, 7, 500, count], &whole), expected, "{dtype} in ranges");
            let by_rows = |_| Places { first: 0, length: columns as u64, near: 1, far: columns as u64 };
            assert_eq!(rounded(&values, &[0, count], &by_rows), expected, "{dtype} by rows");
            let by_columns = |from: usize| Places { first: (from / rows) as u64, length: rows as u64, near: columns as u64, far: 1 };
            let cuts = [0, rows, 5 * rows, count];
            assert_eq!(rounded(&transpose(&values), &cuts, &by_columns), transpose(&expected), "{dtype} by columns");
        }
    }
}
