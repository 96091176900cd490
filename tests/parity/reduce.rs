//! Sums over rows, trees, searches and exact sums.

use crate::{AWKWARD, Close, DTYPES, gpus, of, random, same};
use ferrotron::device::Device;
use ferrotron::device::tensor::{Tensor, View};
use ferrotron::dtype::Dtype;
use ferrotron::ops::exact::{LossSum, LossTotal, SquareSum};
use ferrotron::ops::reduce;

#[test]
fn trees() {
    for chunks in [1, 2, 3, 5, 7, 8, 9, 11, 16, 37, 64, 200] {
        for c in [1, 5, 300] {
            same(&format!("tree {chunks} {c}"), Close::Bits, |device| {
                vec![reduce::tree_rows(random(device, "dw", &[chunks, c], Dtype::F32, 1.0).view())]
            });
        }
    }
    same("tree of awkward numbers", Close::Bits, |device| {
        vec![reduce::tree_rows(of(device, &[6, 4], Dtype::F32, &[AWKWARD, AWKWARD].concat()).view())]
    });
}

#[test]
fn sums_of_rows() {
    for dtype in DTYPES {
        for (sequences, t, chunks, c) in [(1, 1, 1, 1), (2, 6, 3, 5), (3, 70, 1, 40), (1, 256, 2, 129), (5, 12, 4, 264), (2, 200, 1, 1000)]
        {
            same(&format!("sum_rows {dtype} {sequences} {t} {chunks} {c}"), Close::Share(1e-6), |device| {
                let mut dw = random(device, "dw", &[chunks, c], Dtype::F32, 1.0);
                reduce::sum_rows(dw.view_mut(), random(device, "dy", &[sequences * t, c], dtype, 1.0).view(), t);
                vec![dw]
            });
        }
        // Any grouping of the sequences, and rows that begin anywhere.
        let (t, c) = (70, 72);
        for (order, device) in gpus() {
            let dy = random(&device, "dy", &[5 * t * c + 1], dtype, 1.0);
            let sums = |calls: &[usize], start: usize| {
                let mut copy = device.empty([5 * t * c + 1], dtype);
                copy.view_mut().part(start..start + 5 * t * c, [5 * t * c]).copy_from(dy.view().part(0..5 * t * c, [5 * t * c]));
                let mut dw = device.zeros([2, c], Dtype::F32);
                for call in calls.windows(2) {
                    let rows = copy.view().part(start + call[0] * t * c..start + call[1] * t * c, [(call[1] - call[0]) * t, c]);
                    reduce::sum_rows(dw.view_mut(), rows, t);
                }
                dw.view().to_bytes()
            };
            let whole = sums(&[0, 5], 0);
            assert!(whole == sums(&[0, 1, 2, 3, 4, 5], 0), "{dtype}, {order}: calls show");
            assert!(whole == sums(&[0, 2, 5], 1), "{dtype}, {order}: alignment shows");
            device.check().expect("all kernels have run");
        }
    }
}

#[test]
fn the_first_that_is_not_finite() {
    let at: [&[usize]; 7] = [&[], &[0], &[4_999], &[17, 3_000], &[3_000, 16], &[7], &[4_096, 4_095]];
    let find = |device: &Device, dtype: Dtype, count: usize, places: &[usize], start: usize| {
        let mut values = vec![1.0f32; count + start];
        // What lies before the window does not count.
        values[..start].fill(f32::NAN);
        for (&place, bad) in places.iter().zip([f32::NAN, f32::NEG_INFINITY]) {
            if place < count {
                values[start + place] = bad;
            }
        }
        let x = of(device, &[count + start], dtype, &values);
        reduce::first_nonfinite(x.view().part(start..start + count, [count]))
    };
    for (order, device) in gpus() {
        for dtype in DTYPES {
            for (places, count, start) in
                at.iter().flat_map(|places| [(places, 0, 0), (places, 5, 3), (places, 5_000, 0), (places, 5_000, 3)])
            {
                let expected = find(&Device::cpu(1), dtype, count, places, start);
                assert_eq!(find(&device, dtype, count, places, start), expected, "{dtype}, {places:?} of {count} from {start}, {order}");
            }
        }
        device.check().expect("all kernels have run");
    }
}

/// Lists of numbers of many kinds.
fn lists() -> Vec<(&'static str, Vec<f32>)> {
    let normal = |count: usize, scale: f64| random(&Device::cpu(1), "x", &[count], Dtype::F32, scale).to_vec::<f32>();
    let wide = |count: usize| {
        let exponents = random(&Device::cpu(1), "exponents", &[count], Dtype::F32, 30.0).to_vec::<f32>();
        normal(count, 1.0).iter().zip(exponents).map(|(x, e)| x * e.exp2()).collect::<Vec<f32>>()
    };
    let sizes = [1e-30, 1.0, 1e-6, 1e18, 1e-44, 0.0];
    vec![
        ("none", vec![]),
        ("one", vec![-3.25]),
        ("normal", normal(10_000, 1e-3)),
        ("wide", wide(10_000)),
        ("denormal", normal(5_003, 1e-39)),
        ("zero", vec![0.0; 5_000]),
        ("steps", (0..30_000).map(|i| (sizes[i / 5_000] * (1.0 + i as f64 * 1e-5)) as f32).collect()),
        ("greatest", vec![f32::MAX; 4_100]),
        ("least", vec![f32::from_bits(1); 4_100]),
        ("sparse", (0..9_000).map(|i| if i % 97 == 0 { 1e-8 * i as f32 } else { 0.0 }).collect()),
        ("awkward", AWKWARD.to_vec()),
        ("awkward and finite", AWKWARD.iter().copied().filter(|x| x.is_finite()).collect()),
    ]
}

fn squares(all: &[View<'_>]) -> SquareSum {
    let mut sum = SquareSum::default();
    sum.add(all.iter().copied());
    SquareSum::from_bytes(&sum.to_bytes())
}

fn losses(all: &[View<'_>]) -> LossSum {
    let mut total = LossTotal::default();
    all.iter().for_each(|losses| total.add(*losses));
    total.sum()
}

#[test]
fn sums_of_integers_are_exact() {
    for (name, values) in lists() {
        let count = values.len();
        let host = Tensor::from_slice(&Device::cpu(1), [count], &values);
        let (expected_squares, expected_losses) = (squares(&[host.view()]), losses(&[host.view()]));
        for (order, device) in gpus() {
            let x = Tensor::from_slice(&device, [count], &values);
            let cut = count / 3;
            let parts = [x.view().part(0..cut, [cut]), x.view().part(cut..count, [count - cut])];
            for views in [&[x.view()][..], &parts] {
                let found = squares(views);
                assert!(found == expected_squares, "{name}, {order}: {:e} not {:e}", found.root(), expected_squares.root());
                assert_eq!(losses(views), expected_losses, "{name}, {order}");
            }
            assert_eq!(losses(&[]), LossSum::default());
            device.check().expect("all kernels have run");
        }
    }
}
