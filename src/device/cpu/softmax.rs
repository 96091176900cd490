//! The softmax of attention, forward and backward, on a block of scores.
//!
//! Exponentials have base 2: of x = factor * score, where factor is 1 / (sqrt(d) ln 2). Weights and their gradients are rounded once, to
//! nearest even; for bf16, a gradient below the normal numbers of f32 becomes zero first, as in the product that comes next.
//!
//! Invariant: a row's numbers come from that row alone, in an order of sums that does not depend on the vector width: element i is added
//! to lane i % LANES, then lanes are folded in halves.
#![allow(unsafe_code)]

use crate::device::cpu::Isa;
use crate::device::cpu::columns::Columns;
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::softmax_avx512;
use crate::device::cpu::vector::{LANES, add_lanes, exp2_of_low};
use crate::dtype::{Dtype, Element};
use crate::elementary;
use std::f64::consts::LN_2;

/// The elements of one row of a block that count: from the first to before the last.
pub type Visible = (u32, u32);

/// The most rows of a block.
pub const ROWS: usize = 64;

/// One step of a softmax that goes over blocks of columns; rows of `scores` and `weights` are `stride` apart, a multiple of `LANES`.
pub struct Step<'a, T> {
    pub stride: usize,
    pub factor: f32,
    pub visible: &'a [Visible],
    pub scores: &'a [f32],
    pub weights: &'a mut [T],
    /// For each row: the largest x so far, and the sum of 2^(x - that).
    pub maxima: &'a mut [f32],
    pub sums: &'a mut [f32],
    /// For each row the sums of values with these weights; none in the first step.
    pub totals: &'a mut [f32],
}

/// With x = factor * score where visible: takes the new maximum m of each row, scales `sums` and `totals` down to it, gives the weights
/// 2^(x - m) and adds them to `sums`. From 0 to the last visible element, and on to whole lanes, weights are 0 where nothing is
/// visible; weights after those may be written, or not. Scores that are not visible may be anything.
pub fn forward<T: Element>(isa: Isa, step: Step<'_, T>) {
    let rows = step.visible.len();
    assert!(rows <= ROWS && step.stride.is_multiple_of(LANES), "{rows} rows of {}", step.stride);
    assert!(step.scores.len() >= rows * step.stride && step.weights.len() >= rows * step.stride, "a block of {rows} rows");
    assert!(step.maxima.len() == rows && step.sums.len() == rows && step.totals.len().is_multiple_of(rows), "statistics of {rows} rows");
    assert!(step.visible.iter().all(|&(first, last)| first.max(last) as usize <= step.stride), "visible elements of {}", step.stride);
    #[cfg(target_arch = "x86_64")]
    match T::DTYPE {
        // SAFETY: the processor has these instructions; all rows have `stride` scores and weights, and what is visible lies in them.
        Dtype::Bf16 if isa >= Isa::Avx512Bf16 => return unsafe { softmax_avx512::forward_bf16(step.cast()) },
        // SAFETY: likewise.
        Dtype::F32 if isa >= Isa::Avx512 => return unsafe { softmax_avx512::forward_f32(step.cast()) },
        _ => {}
    }
    forward_plain(isa, step);
}

impl<'a, T: Element> Step<'a, T> {
    /// The same step, by the type's other name.
    #[cfg(target_arch = "x86_64")]
    fn cast<U: Element>(self) -> Step<'a, U> {
        let Step { stride, factor, visible, scores, weights, maxima, sums, totals } = self;
        Step { stride, factor, visible, scores, weights: bytemuck::cast_slice_mut(weights), maxima, sums, totals }
    }
}

leveled! {
    /// The definition of `forward`.
    pub fn forward_plain<T: Element>(step: Step<'_, T>) {
        let Step { stride, factor, visible, scores, weights, maxima, sums, totals } = step;
        let total_width = totals.len() / visible.len();
        for (row, &(first, last)) in visible.iter().enumerate() {
            let scores = scores[row * stride..][..whole_lanes(last)].as_chunks::<LANES>().0;
            let (weights, _) = weights[row * stride..][..whole_lanes(last)].as_chunks_mut::<LANES>();
            let seen = |block: usize, lane: usize| (first..last).contains(&((block * LANES + lane) as u32));
            let mut largest = [f32::NEG_INFINITY; LANES];
            for (block, scores) in scores.iter().enumerate() {
                for lane in 0..LANES {
                    largest[lane] = if seen(block, lane) && scores[lane] > largest[lane] { scores[lane] } else { largest[lane] };
                }
            }
            let (old, new) = (maxima[row], max_lanes(largest) * factor);
            let new = if new > old { new } else { old };
            let mut added = [0.0; LANES];
            for (block, (scores, weights)) in scores.iter().zip(weights).enumerate() {
                for lane in 0..LANES {
                    let weight = if seen(block, lane) { exp2_of_low(scores[lane].mul_add(factor, -new)) } else { 0.0 };
                    added[lane] += weight;
                    weights[lane] = T::from_f32(weight);
                }
            }
            let shrink = shrink(old, new);
            maxima[row] = new;
            sums[row] = sums[row].mul_add(shrink, add_lanes(added));
            for total in &mut totals[row * total_width..][..total_width] {
                *total *= shrink;
            }
        }
    }
}

/// What becomes of a sum that was taken with the maximum `old`. Before anything was seen, maxima are -infinity.
#[inline(always)]
pub fn shrink(old: f32, new: f32) -> f32 {
    if old == new { 1.0 } else { exp2_of_low(old - new) }
}

/// How many elements of a row are computed, where it sees none from `last` on.
#[inline(always)]
fn whole_lanes(last: u32) -> usize {
    (last as usize).next_multiple_of(LANES)
}

#[inline(always)]
fn max_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut count = LANES / 2;
    while count > 0 {
        for lane in 0..count {
            lanes[lane] = if lanes[lane + count] > lanes[lane] { lanes[lane + count] } else { lanes[lane] };
        }
        count /= 2;
    }
    lanes[0]
}

/// The backward pass of a block; the rows of all matrices are `stride` apart, a multiple of `LANES`.
pub struct Gradient<'a, T> {
    pub stride: usize,
    pub factor: f32,
    pub visible: &'a [Visible],
    pub scores: &'a [f32],
    pub dweights: &'a [f32],
    /// For each row: the logarithm in base 2 of the sum of 2^x, and the sum of weight * dweight.
    pub log_sums: &'a [f32],
    pub dots: &'a [f32],
    /// Where `pairs` says no.
    pub weights: &'a mut [T],
    pub gradients: &'a mut [T],
    /// Where `pairs` says yes: weights and gradients once more, elements of row 2i in the lower halves of line i and those of row 2i + 1, or
    /// zeros, in the upper ones.
    pub pairs: [&'a mut [u32]; 2],
}

/// Whether `backward` gives pairs of rows, as units that products along the rows take.
pub fn pairs(isa: Isa, dtype: Dtype) -> bool {
    isa >= Isa::Avx512Bf16 && dtype == Dtype::Bf16
}

/// weights = 2^(factor * score - log_sum) where visible, else 0; gradients = weight * (dweight - dot). They are written as in `forward`.
pub fn backward<T: Element>(isa: Isa, block: Gradient<'_, T>) {
    let (rows, stride) = (block.visible.len(), block.stride);
    assert!(rows <= ROWS && stride.is_multiple_of(LANES), "{rows} rows of {stride}");
    assert!(block.visible.iter().all(|&(first, last)| first.max(last) as usize <= stride), "visible elements of {stride}");
    let least = block.scores.len().min(block.dweights.len()).min(block.gradients.len());
    assert!(least >= rows * stride && block.log_sums.len() == rows && block.dots.len() == rows, "a block of {rows} rows");
    #[cfg(target_arch = "x86_64")]
    if pairs(isa, T::DTYPE) {
        assert!(block.pairs.iter().all(|pairs| pairs.len() >= rows.div_ceil(2) * stride), "pairs of {rows} rows");
        // SAFETY: the processor has these instructions; all rows have `stride` elements, and what is visible lies in them.
        return unsafe { softmax_avx512::backward_bf16(block.cast()) };
    }
    assert!(block.weights.len() >= rows * stride, "weights of {rows} rows");
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 && T::DTYPE == Dtype::F32 {
        // SAFETY: likewise.
        return unsafe { softmax_avx512::backward_f32(block.cast()) };
    }
    backward_plain(isa, block);
}

impl<'a, T: Element> Gradient<'a, T> {
    /// The same block, by the type's other name.
    #[cfg(target_arch = "x86_64")]
    fn cast<U: Element>(self) -> Gradient<'a, U> {
        let Gradient { stride, factor, visible, scores, dweights, log_sums, dots, weights, gradients, pairs } = self;
        let (weights, gradients) = (bytemuck::cast_slice_mut(weights), bytemuck::cast_slice_mut(gradients));
        Gradient { stride, factor, visible, scores, dweights, log_sums, dots, weights, gradients, pairs }
    }
}

leveled! {
    /// The definition of `backward`, but for pairs.
    pub fn backward_plain<T: Element>(block: Gradient<'_, T>) {
        let Gradient { stride, factor, visible, scores, dweights, log_sums, dots, weights, gradients, .. } = block;
        for (row, &(first, last)) in visible.iter().enumerate() {
            let (log_sum, dot, computed) = (log_sums[row], dots[row], whole_lanes(last));
            let (scores, dweights) = (&scores[row * stride..][..computed], &dweights[row * stride..][..computed]);
            let (weights, gradients) = (&mut weights[row * stride..][..computed], &mut gradients[row * stride..][..computed]);
            let inputs = scores.as_chunks::<LANES>().0.iter().zip(dweights.as_chunks::<LANES>().0);
            let outputs = weights.as_chunks_mut::<LANES>().0.iter_mut().zip(gradients.as_chunks_mut::<LANES>().0);
            for (block, ((scores, dweights), (weights, gradients))) in inputs.zip(outputs).enumerate() {
                for lane in 0..LANES {
                    let seen = (first..last).contains(&((block * LANES + lane) as u32));
                    let weight = exp2_of_low(scores[lane].mul_add(factor, -log_sum));
                    let gradient = weight * (dweights[lane] - dot);
                    let low = T::DTYPE == Dtype::Bf16 && gradient.abs() < f32::MIN_POSITIVE;
                    let gradient = if low { 0f32.copysign(gradient) } else { gradient };
                    weights[lane] = T::from_f32(if seen { weight } else { 0.0 });
                    gradients[lane] = T::from_f32(if seen { gradient } else { 0.0 });
                }
            }
        }
    }
}

/// Sums for rows of `out`, `width` apart, and a factor for each.
pub struct Finished<'a> {
    pub sums: &'a [f32],
    pub width: usize,
    pub factors: &'a [f32],
}

leveled! {
    /// Rows of `out` from `first` on = sums * factor, rounded.
    pub fn finish<T: Element>(from: Finished<'_>, out: &mut Columns<'_, T>, first: usize) {
        for (row, &factor) in from.factors.iter().enumerate() {
            let out = out.row(first + row);
            for (sum, out) in from.sums[row * from.width..][..out.len()].iter().zip(out) {
                *out = T::from_f32(sum * factor);
            }
        }
    }
}

leveled! {
    /// The natural logarithms of sums of exponentials, from what `forward` leaves.
    pub fn log_sums<T: Element>(maxima: &[f32], sums: &[f32], out: &mut [T]) {
        for ((maximum, sum), out) in maxima.iter().zip(sums).zip(out) {
            *out = T::from_f32((*maximum as f64 * LN_2 + elementary::ln(*sum as f64)) as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;
    use half::bf16;

    /// Ragged rows, some that see nothing, scores that are not numbers, gradients that are not normal.
    fn block() -> (Vec<Visible>, Vec<f32>, Vec<f32>) {
        let visible = vec![(0, 1), (0, 16), (0, 17), (3, 40), (48, 48), (20, 48), (17, 31), (0, 48), (30, 30)];
        let stream = Stream::new(4, "softmax");
        let numbers = |from: u64| (0..9 * 48).map(|i| 4.0 * stream.normal(from + i) as f32).collect::<Vec<f32>>();
        let (mut scores, mut dweights) = (numbers(0), numbers(9 * 48));
        (scores[7 * 48 + 5], scores[3 * 48 + 9], scores[2 * 48 + 3]) = (f32::NAN, f32::NEG_INFINITY, -400.0);
        dweights.iter_mut().step_by(5).for_each(|x| *x *= 1e-38);
        (visible, scores, dweights)
    }

    fn check<T: Element>() {
        let (visible, scores, dweights) = block();
        let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let forward_by = |run: fn(Isa, Step<'_, T>)| {
            let mut weights = vec![T::from_f32(7.0); 9 * 48];
            let (mut maxima, mut sums, mut totals) = (vec![f32::NEG_INFINITY; 9], vec![0.0; 9], vec![3.0; 9 * 20]);
            (maxima[5], sums[5]) = (9.0, 2.0);
            let (scores, totals_of) = (&scores, &mut totals);
            let step = Step {
                stride: 48,
                factor: 0.7,
                visible: &visible,
                scores,
                weights: &mut weights,
                maxima: &mut maxima,
                sums: &mut sums,
                totals: totals_of,
            };
            run(Isa::detect(), step);
            (bits(&weights.iter().map(|x| x.to_f32()).collect::<Vec<_>>()), bits(&maxima), bits(&sums), bits(&totals))
        };
        assert!(forward_by(forward) == forward_by(forward_plain), "forward {}", T::DTYPE);

        let log_sums: Vec<f32> = (0..9).map(|row| 3.0 + row as f32).collect();
        let dots = [1e-38, 0.0, 1.0, -1.0, 2.0, 0.0, 1e-39, 0.5, 0.25];
        let backward_by = |run: fn(Isa, Gradient<'_, T>)| {
            let [mut weights, mut gradients] = [7.0; 2].map(|x| vec![T::from_f32(x); 9 * 48]);
            let [mut first, mut second] = [7; 2].map(|x| vec![x; 5 * 48]);
            let pairs = [&mut first[..], &mut second];
            let (weights_of, gradients_of) = (&mut weights[..], &mut gradients[..]);
            run(
                Isa::detect(),
                Gradient {
                    stride: 48,
                    factor: 0.7,
                    visible: &visible,
                    scores: &scores,
                    dweights: &dweights,
                    log_sums: &log_sums,
                    dots: &dots,
                    weights: weights_of,
                    gradients: gradients_of,
                    pairs,
                },
            );
            ([weights, gradients].map(|all| all.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>()), [first, second])
        };
        let (ours, right) = (backward_by(backward), backward_by(backward_plain));
        for (row, &(_, last)) in visible.iter().enumerate() {
            for at in row * 48..row * 48 + whole_lanes(last) {
                assert_eq!(ours.0[1][at], right.0[1][at], "{} gradient {at}", T::DTYPE);
                if !pairs(Isa::detect(), T::DTYPE) {
                    assert_eq!(ours.0[0][at], right.0[0][at], "{} weight {at}", T::DTYPE);
                    continue;
                }
                for (pairs, right) in ours.1.iter().zip(&right.0) {
                    let half = pairs[row / 2 * 48 + at % 48] >> (16 * (row % 2)) << 16;
                    assert_eq!(half, right[at], "{} pair {at}", T::DTYPE);
                }
            }
        }
    }

    #[test]
    fn every_level_is_the_definition() {
        check::<f32>();
        check::<bf16>();
    }
}
