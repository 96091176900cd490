//! Losses and gradients of logits are those of the CPU; sums do not tell how the vocabulary is cut over ranks.

use crate::{Close, DTYPES, gpus, of, random, random_ids, same};
use ferrotron::device::Device;
use ferrotron::device::tensor::{Tensor, View};
use ferrotron::dtype::Dtype;
use ferrotron::ops::{cross_entropy, reduce};
use std::ops::Range;

/// Rows, vocabulary and shards: one token, partial packs, whole segments, several of them, shards of more than one.
const SHAPES: [(usize, usize, usize); 8] =
    [(1, 1, 1), (3, 5, 2), (5, 257, 40), (70, 33, 33), (2, 8192, 8192), (3, 20_000, 20_000), (2, 20_001, 9_000), (2, 17_000, 8_500)];

fn targets(device: &Device, n: usize, v: usize) -> Tensor {
    let mut targets = random_ids(device, "targets", n, v as u32).to_vec::<u32>();
    if n > 1 {
        targets[1] = cross_entropy::IGNORED;
    }
    Tensor::from_slice(device, [n], &targets)
}

/// Maxima, sums, losses and gradients.
fn all_of(logits: View<'_>, targets: View<'_>, shard: usize) -> Vec<Tensor> {
    let (max, parts) = cross_entropy::row_max(logits, shard);
    let sums = cross_entropy::sums(logits, max.view(), &parts, targets, 0, shard);
    let losses = cross_entropy::losses(sums.view(), targets);
    let mut gradient = logits.device().empty(logits.shape(), logits.dtype());
    gradient.view_mut().copy_from(logits);
    cross_entropy::finish(gradient.view_mut(), max.view(), sums.view(), targets, 0, 0.125);
    vec![max, sums, losses, gradient]
}

#[test]
fn losses_and_gradients() {
    for dtype in DTYPES {
        for (n, v, shard) in SHAPES {
            same(&format!("cross-entropy {dtype} {n} {v} {shard}"), Close::Share(1e-6), |device| {
                all_of(random(device, "logits", &[n, v], dtype, 4.0).view(), targets(device, n, v).view(), shard)
            });
        }
    }
}

#[test]
fn windows_that_begin_anywhere() {
    let (n, v) = (3, 4_099);
    for dtype in DTYPES {
        for start in [1, 3, 8] {
            let bits = |device: &Device| {
                let all = random(device, "logits", &[start + n * v], dtype, 4.0);
                let window = all.view().part(start..start + n * v, [n, v]);
                let mut gradient = random(device, "logits", &[start + n * v], dtype, 4.0);
                let (max, parts) = cross_entropy::row_max(window, v);
                let targets = targets(device, n, v);
                let sums = cross_entropy::sums(window, max.view(), &parts, targets.view(), 0, v);
                let part = gradient.view_mut().part(start..start + n * v, [n, v]);
                cross_entropy::finish(part, max.view(), sums.view(), targets.view(), 0, 0.5);
                let mut copy = device.empty([n, v], dtype);
                copy.view_mut().copy_from(window);
                (vec![max, sums, gradient], all_of(copy.view(), targets.view(), v))
            };
            same(&format!("cross-entropy {dtype} from {start}"), Close::Share(1e-6), |device| bits(device).0);
            let (window, whole) = bits(&Device::emulated(None, false, 1));
            assert_eq!(window[1].view().to_bytes(), whole[1].view().to_bytes(), "{dtype} from {start}: where rows begin shows in the sums");
        }
    }
}

#[test]
fn what_is_not_finite() {
    let (zero, infinite, nan) = (0.5, f32::INFINITY, f32::NAN);
    let rows = [
        [zero, infinite, 1.0, 2.0, 3.0, -1.0],
        [-infinite; 6],
        [zero, -infinite, 1.0, -infinite, -infinite, -infinite],
        [zero, nan, 1.0, 2.0, 3.0, -1.0],
        [nan; 6],
        [-infinite, -infinite, nan, -infinite, -infinite, -infinite],
        [60_000.0, -60_000.0, 0.0, -0.0, 1e-40, 59_900.0],
        [0.0; 6],
        [infinite; 6],
    ];
    for dtype in DTYPES {
        for shard in [1, 2, 6] {
            same(&format!("cross-entropy {dtype} in shards of {shard}"), Close::Share(1e-6), |device| {
                let targets = Tensor::from_slice(device, [rows.len()], &[0, 1, 1, 2, 3, 0, 5, cross_entropy::IGNORED, 4]);
                all_of(of(device, &[rows.len(), 6], dtype, rows.as_flattened()).view(), targets.view(), shard)
            });
        }
    }
}

/// The columns of `all` [n, v], on their own.
fn columns(device: &Device, all: View<'_>, range: Range<usize>) -> Tensor {
    let (n, v) = (all.shape().rows(), all.shape().columns());
    let mut part = device.empty([n, range.len()], all.dtype());
    for row in 0..n {
        let piece = all.part(row * v + range.start..row * v + range.end, [range.len()]);
        part.view_mut().part(row * range.len()..(row + 1) * range.len(), [range.len()]).copy_from(piece);
    }
    part
}

#[test]
fn a_vocabulary_cut_over_ranks_gives_the_same_bits() {
    let (n, v) = (4, 20_011);
    for dtype in DTYPES {
        // Seven shards: subtrees of four and three, and of two, two, two and one. Three: one of two segments each, and the rest.
        for (shard, cuts) in [(3_000, vec![0, 12_000, v]), (3_000, vec![0, 6_000, 12_000, 18_000, v]), (9_001, vec![0, 18_002, v])] {
            for (order, device) in gpus() {
                let logits = random(&device, "logits", &[n, v], dtype, 4.0);
                let targets = targets(&device, n, v);
                let whole = all_of(logits.view(), targets.view(), shard);
                let ranks: Vec<(usize, Tensor)> =
                    cuts.windows(2).map(|cut| (cut[0], columns(&device, logits.view(), cut[0]..cut[1]))).collect();
                let readings: Vec<_> = ranks.iter().map(|(_, logits)| cross_entropy::row_max(logits.view(), shard)).collect();
                let maxima = readings.iter().map(|(max, _)| max.to_vec::<f32>());
                let max = maxima.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a.max(*b)).collect()).expect("there are ranks");
                assert_eq!(max, whole[0].to_vec::<f32>(), "{dtype} {shard}, {order}");
                let of_ranks: Vec<f32> = ranks
                    .iter()
                    .zip(&readings)
                    .flat_map(|((first, logits), (_, parts))| {
                        cross_entropy::sums(logits.view(), whole[0].view(), parts, targets.view(), *first, shard).to_vec::<f32>()
                    })
                    .collect();
                let total = reduce::tree_rows(Tensor::from_slice(&device, [ranks.len(), 2 * n], &of_ranks).view());
                assert_eq!(total.view().to_bytes(), whole[1].view().to_bytes(), "{dtype} {shard}, {order}");
                for (first, mut logits) in ranks {
                    let width = logits.shape().columns();
                    cross_entropy::finish(logits.view_mut(), whole[0].view(), total.view(), targets.view(), first, 0.125);
                    let expected = columns(&device, whole[3].view(), first..first + width);
                    assert!(logits.view().to_bytes() == expected.view().to_bytes(), "{dtype} {shard}, {order}: gradient from {first}");
                }
                device.check().expect("all kernels have run");
            }
        }
    }
}

#[test]
fn a_row_depends_on_nothing_but_itself() {
    let (n, v) = (9, 3_001);
    for dtype in DTYPES {
        let device = Device::emulated(Some(3), false, 1);
        let (logits, targets) = (random(&device, "logits", &[n, v], dtype, 4.0), random_ids(&device, "targets", n, v as u32));
        let all = all_of(logits.view(), targets.view(), v);
        for row in 0..n {
            let one = all_of(logits.view().rows(row..row + 1), targets.view().part(row..row + 1, [1]), v);
            for (one, all) in one.iter().zip(&all) {
                let each = all.shape().numel() / n;
                let bytes = all.view().part(row * each..(row + 1) * each, [each]).to_bytes();
                assert!(one.view().to_bytes() == bytes, "{dtype}, row {row}");
            }
        }
        assert_eq!(all[2].dtype(), Dtype::F32);
    }
}
