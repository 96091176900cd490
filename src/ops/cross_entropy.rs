//! Cross-entropy of logits against target tokens, in stages, so that the vocabulary may be cut over ranks.
//!
//! ```text
//! row_max   max[i]    = greatest logit of row i                     -> greatest over the ranks
//! sums      sums[i,0] = sum over v of exp(logit[i,v] - max[i])      -> added over the ranks, in the tree
//!           sums[i,1] = logit[i, target] - max[i], 0 if not here    -> added over the ranks
//! losses    loss[i]   = ln(sums[i,0]) - sums[i,1]
//! finish    dlogit    = (exp(logit - max) / sums[i,0] - (v == target)) scale
//! ```
//!
//! `first` is the number of the first token of this part of the vocabulary. Logits have any dtype, all else is f32. Where the target is
//! `IGNORED`, loss and gradient are zero, whatever the logits.
//!
//! Invariant: the sum of exponentials is made of one sum for each virtual shard of the vocabulary (`shard` tokens, the last may be
//! narrower), in lanes, and the shards are added in the balanced binary tree: the bits do not tell how many ranks hold the shards.
//!
//! `row_max` sums, too, as it reads: a shard's exponentials in segments of `SEGMENT` tokens from its start, each relative to its own
//! maximum. `sums` brings these `Parts` to the maximum of the whole row and adds them in order, and does not read the logits again.
//!
//! On a GPU (`cuda/cross_entropy.cu`) a segment is summed in another order, by approximate exponentials.

use crate::args;
use crate::device::Device;
use crate::device::cpu::vector::exp_of_low;
use crate::device::gpu::driver::Grid;
use crate::device::gpu::kernel;
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::elementary::ln;
use crate::ops::blocks::Blocks;
use crate::ops::functions::{max as greatest, sum};
use crate::ops::reduce::tree;
use crate::ops::rows::{Rows, over_rows};

/// The target of a row that does not count.
pub const IGNORED: u32 = u32::MAX;

/// What an exponential costs, in elements touched.
const COST: usize = 4;

/// Threads of a block on a GPU, which are eight warps: `THREADS` of cuda/cross_entropy.cu.
const THREADS: u32 = 256;
const WARPS: usize = 8;
/// Logits that are read twice, and stay in the first-level cache between: `SEGMENT` of cuda/cross_entropy.cu.
const SEGMENT: usize = 8192;

/// What was found in each segment of each row: its maximum, and its sum of exponentials relative to that. f32 [n, segments, 2]
pub struct Parts(Tensor);

/// How a row of v logits is cut into segments.
struct Segments {
    /// Of a whole shard.
    per_shard: usize,
    of_row: usize,
}

impl Segments {
    fn new(v: usize, shard: usize) -> Segments {
        assert!(shard > 0 && v / shard < 1 << 24, "{v} logits in shards of {shard}");
        let per_shard = shard.div_ceil(SEGMENT);
        Segments { per_shard, of_row: v / shard * per_shard + (v % shard).div_ceil(SEGMENT) }
    }
}

/// logits [n, v], the first of which starts a virtual shard -> f32 [n], and what `sums` asks for
pub fn row_max(logits: View<'_>, shard: usize) -> (Tensor, Parts) {
    let (n, v) = (logits.shape().rows(), logits.shape().columns());
    let segments = Segments::new(v, shard);
    let mut parts = logits.device().empty([n, segments.of_row, 2], Dtype::F32);
    let mut max = logits.device().empty([n], Dtype::F32);
    match logits.device() {
        Device::Cpu(cpu) => dispatch!(logits.dtype(), T => {
            let logits = logits.slice::<T>();
            let parts = Rows::new(parts.view_mut().into_slice::<f32>(), 2 * segments.of_row);
            let out = (Rows::new(max.view_mut().into_slice::<f32>(), 1), parts);
            over_rows(cpu, n, v * COST, out, #[inline(always)] |rows, (max, parts)| {
                for ((row, max), parts) in rows.zip(max.elements).zip(parts.each()) {
                    *max = read_row(parts, &logits[row * v..][..v], shard);
                }
            });
        }),
        Device::Gpu(gpu) => {
            let parts = parts.view_mut();
            let Segments { per_shard, of_row } = segments;
            let blocks = Grid::blocks(n * of_row, THREADS);
            gpu.launch(&kernel("cross_entropy_segments", logits.dtype()), blocks, &args![&parts, logits, v, shard, per_shard, of_row]);
            let rows = Grid::blocks(n.div_ceil(WARPS), THREADS);
            gpu.launch("cross_entropy_row_max", rows, &args![max.view_mut(), parts, n, of_row]);
        }
        Device::Dry(_) => {}
    }
    (max, Parts(parts))
}

/// Fills the parts of a row, [segments, 2], and gives its maximum.
#[inline(always)]
fn read_row<T: Element>(parts: &mut [f32], logits: &[T], shard: usize) -> f32 {
    let segments = logits.chunks(shard).flat_map(|shard| shard.chunks(SEGMENT));
    let mut max = f32::NEG_INFINITY;
    for (part, segment) in parts.as_chunks_mut::<2>().0.iter_mut().zip(segments) {
        let here = greatest(segment);
        // Where all is masked, exponentials are relative to zero: none of them is then a NaN, unless a logit is.
        let relative = if here == f32::NEG_INFINITY { 0.0 } else { here };
        *part = [
            here,
            sum(
                segment,
                #[inline(always)]
                |logit| exp_of_low(logit - relative),
            ),
        ];
        max = if here > max { here } else { max };
    }
    max
}

/// logits [n, v], max f32 [n], targets u32 [n] -> f32 [n, 2]. `parts` of these logits, by `row_max`.
pub fn sums(logits: View<'_>, max: View<'_>, parts: &Parts, targets: View<'_>, first: usize, shard: usize) -> Tensor {
    let (n, v) = (logits.shape().rows(), logits.shape().columns());
    assert!(shard > 0 && first.is_multiple_of(shard), "a part of the vocabulary from {first} is cut within a shard of {shard}");
    check_rows(max, n, 1);
    check_targets(targets, n);
    let Segments { per_shard, of_row } = Segments::new(v, shard);
    let parts = parts.0.view();
    assert_eq!(parts.shape().numel(), n * of_row * 2, "parts of the same logits");
    let mut sums = logits.device().empty([n, 2], Dtype::F32);
    match logits.device() {
        Device::Cpu(cpu) => dispatch!(logits.dtype(), T => {
            let (logits, parts) = (logits.slice::<T>(), parts.slice::<f32>());
            let (max, targets) = (max.slice::<f32>(), targets.slice::<u32>());
            over_rows(cpu, n, of_row * COST, Rows::new(sums.view_mut().into_slice::<f32>(), 2), #[inline(always)] |rows, sums| {
                let mut shards = vec![0f32; v.div_ceil(shard)];
                for (row, sums) in rows.zip(sums.each()) {
                    let (logits, max) = (&logits[row * v..][..v], max[row]);
                    let parts = parts[row * of_row * 2..][..of_row * 2].as_chunks::<2>().0;
                    for (total, parts) in shards.iter_mut().zip(parts.chunks(per_shard)) {
                        *total = parts.iter().fold(0.0, |total, [here, sum]| total + sum * exp_of_low(here - max));
                    }
                    let target = target_column(targets[row], first, v).map_or(0.0, |column| Element::to_f32(logits[column]) - max);
                    sums.copy_from_slice(&[tree(&mut shards), target]);
                }
            });
        }),
        Device::Gpu(gpu) => {
            let arguments = args![sums.view_mut(), parts, logits, max, targets, n, v, first, per_shard, of_row];
            gpu.launch(&kernel("cross_entropy_sums", logits.dtype()), Grid::blocks(n.div_ceil(WARPS), THREADS), &arguments);
        }
        Device::Dry(_) => {}
    }
    sums
}

/// The loss of each row, from sums over the whole vocabulary -> f32 [n]
pub fn losses(sums: View<'_>, targets: View<'_>) -> Tensor {
    let n = targets.shape().numel();
    check_rows(sums, n, 2);
    check_targets(targets, n);
    let mut losses = sums.device().empty([n], Dtype::F32);
    match sums.device() {
        Device::Cpu(cpu) => {
            let (sums, targets) = (sums.slice::<f32>(), targets.slice::<u32>());
            over_rows(
                cpu,
                n,
                16 * COST,
                Rows::new(losses.view_mut().into_slice::<f32>(), 1),
                #[inline(always)]
                |rows, losses| {
                    for (row, loss) in rows.zip(losses.elements) {
                        let whole = (ln(sums[2 * row] as f64) - sums[2 * row + 1] as f64) as f32;
                        *loss = if targets[row] == IGNORED { 0.0 } else { whole };
                    }
                },
            );
        }
        Device::Gpu(gpu) => {
            let blocks = Grid::blocks(n.div_ceil(THREADS as usize), THREADS);
            gpu.launch("cross_entropy_losses", blocks, &args![losses.view_mut(), sums, targets, n]);
        }
        Device::Dry(_) => {}
    }
    losses
}

/// Turns logits [n, v] into their gradients, in place, from sums over the whole vocabulary.
pub fn finish(mut logits: ViewMut<'_>, max: View<'_>, sums: View<'_>, targets: View<'_>, first: usize, scale: f32) {
    let (n, v) = (logits.shape().rows(), logits.shape().columns());
    check_rows(max, n, 1);
    check_rows(sums, n, 2);
    check_targets(targets, n);
    match max.device() {
        Device::Cpu(cpu) => dispatch!(logits.dtype(), T => {
            let (max, sums, targets) = (max.slice::<f32>(), sums.slice::<f32>(), targets.slice::<u32>());
            over_rows(cpu, n, v * COST, Rows::new(logits.slice_mut::<T>(), v), #[inline(always)] |rows, logits| {
                let mut blocks = Blocks::new(cpu.isa());
                for (row, logits) in rows.zip(logits.each()) {
                    if targets[row] == IGNORED {
                        logits.fill(T::default());
                        continue;
                    }
                    let column = target_column(targets[row], first, v);
                    finish_row(&mut blocks, logits, max[row], 1.0 / sums[2 * row], column, scale);
                }
            });
        }),
        Device::Gpu(gpu) => {
            let per_row = v.div_ceil(SEGMENT);
            let arguments = args![&logits, max, sums, targets, v, first, per_row, scale];
            gpu.launch(&kernel("cross_entropy_finish", logits.dtype()), Grid::blocks(n * per_row, THREADS), &arguments);
        }
        Device::Dry(_) => {}
    }
}

#[inline(always)]
fn finish_row<T: Element>(blocks: &mut Blocks, logits: &mut [T], max: f32, share: f32, target: Option<usize>, scale: f32) {
    let gradient = target.map(|column| (exp_of_low(logits[column].to_f32() - max) * share - 1.0) * scale);
    blocks.update(
        logits,
        #[inline(always)]
        |logits| {
            for logit in logits {
                *logit = (exp_of_low(*logit - max) * share) * scale;
            }
        },
    );
    if let (Some(column), Some(gradient)) = (target, gradient) {
        logits[column] = T::from_f32(gradient);
    }
}

fn target_column(target: u32, first: usize, v: usize) -> Option<usize> {
    (target as usize).checked_sub(first).filter(|&column| column < v && target != IGNORED)
}

fn check_rows(statistics: View<'_>, n: usize, each: usize) {
    assert_eq!((statistics.shape().numel(), statistics.dtype()), (n * each, Dtype::F32), "{each} statistics for each of {n} rows");
}

fn check_targets(targets: View<'_>, n: usize) {
    assert_eq!((targets.shape().numel(), targets.dtype()), (n, Dtype::U32), "a u32 target for each of {n} rows");
}
