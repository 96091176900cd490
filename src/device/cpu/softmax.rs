//! The softmax of attention, forward and backward, on a block of scores.
//!
//! Invariant: a row's numbers come from that row alone, in an order of sums that does not depend on the vector width.
#![allow(unsafe_code)]

use crate::device::cpu::Isa;
use crate::device::cpu::vector::{LANES, add_lanes, exp, exp_of_low};
use crate::dtype::Element;

/// The elements of one row of a block that count: from the first to before the last.
pub type Visible = (u32, u32);

/// The most rows of a block.
pub const ROWS: usize = 64;

/// One step of a softmax that goes over blocks of columns; rows of `scores` and `weights` are `stride` apart, and of each the first
/// `width`, a multiple of `LANES`, are looked at.
pub struct Step<'a, T> {
    pub stride: usize,
    pub width: usize,
    pub scale: f32,
    pub visible: &'a [Visible],
    pub scores: &'a mut [f32],
    pub weights: &'a mut [T],
    /// For each row: the largest x so far, the sum of exp(x - that), and the sums of values with these weights.
    pub maxima: &'a mut [f32],
    pub sums: &'a mut [f32],
    pub totals: &'a mut [f32],
}

leveled! {
    /// With x = scale * score where visible: takes the new maximum m of each row, scales `sums` and `totals` down to it, gives the
    /// weights exp(x - m), 0 where nothing is visible, and adds them to `sums`. Scores that are not visible may be anything.
    pub fn forward<T: Element>(step: Step<'_, T>) {
        let Step { stride, width, scale, visible, scores, weights, maxima, sums, totals } = step;
        let total_width = totals.len() / visible.len();
        let mut shrinks = [0.0; ROWS];
        let shrinks = &mut shrinks[..visible.len()];
        // All rows' maxima first, then all exponentials: each loop is short enough for the processor to overlap rows.
        for (row, &(first, last)) in visible.iter().enumerate() {
            let scores = &mut scores[row * stride..][..whole_lanes(last)];
            scores[..(first as usize).min(whole_lanes(last))].fill(f32::NEG_INFINITY);
            scores[last as usize..].fill(f32::NEG_INFINITY);
            let mut largest = [f32::NEG_INFINITY; LANES];
            for scores in scores.as_chunks::<LANES>().0 {
                for lane in 0..LANES {
                    let x = scores[lane] * scale;
                    largest[lane] = if x > largest[lane] { x } else { largest[lane] };
                }
            }
            let new = max_lanes(largest);
            shrinks[row] = if new > maxima[row] { new } else { maxima[row] };
        }
        for (shrink, largest) in shrinks.iter_mut().zip(maxima.iter_mut()) {
            let new = *shrink;
            *shrink = exp(*largest - new);
            *largest = new;
        }
        for (row, &(first, last)) in visible.iter().enumerate() {
            let weights = &mut weights[row * stride..][..width];
            if first >= last {
                weights.fill(T::from_f32(0.0));
                continue;
            }
            let largest = maxima[row];
            let mut added = [0.0; LANES];
            let scores = scores[row * stride..][..whole_lanes(last)].as_chunks::<LANES>().0;
            weights[whole_lanes(last)..].fill(T::from_f32(0.0));
            for (scores, weights) in scores.iter().zip(weights.as_chunks_mut::<LANES>().0) {
                for lane in 0..LANES {
                    let weight = exp_of_low(scores[lane] * scale - largest);
                    added[lane] += weight;
                    weights[lane] = T::from_f32(weight);
                }
            }
            sums[row] = sums[row].mul_add(shrinks[row], add_lanes(added));
            for total in &mut totals[row * total_width..][..total_width] {
                *total *= shrinks[row];
            }
        }
    }
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

/// The backward pass of a block; the rows of all four matrices are `stride` apart, and of each the first `width`, a multiple of `LANES`,
/// are looked at.
pub struct Gradient<'a, T> {
    pub stride: usize,
    pub width: usize,
    pub scale: f32,
    pub visible: &'a [Visible],
    pub scores: &'a mut [f32],
    pub dweights: &'a [f32],
    /// For each row: the logarithm of the sum of exp(x), and the sum of weight * dweight.
    pub log_sums: &'a [f32],
    pub dots: &'a [f32],
    pub weights: &'a mut [T],
    pub gradients: &'a mut [T],
}

leveled! {
    /// weights = exp(scale * score - log_sum) where visible, else 0; gradients of scale * score = weight * (dweight - dot).
    pub fn backward<T: Element>(block: Gradient<'_, T>) {
        let Gradient { stride, width, scale, visible, scores, dweights, log_sums, dots, weights, gradients } = block;
        for (row, &(first, last)) in visible.iter().enumerate() {
            let (scores, dweights) = (&mut scores[row * stride..][..width], &dweights[row * stride..][..width]);
            let (weights, gradients) = (&mut weights[row * stride..][..width], &mut gradients[row * stride..][..width]);
            let (log_sum, dot, zero) = (log_sums[row], dots[row], T::from_f32(0.0));
            let (before, after) = (0..first as usize, last as usize..width);
            let computed = whole_lanes(last);
            scores[before.clone()].fill(f32::NEG_INFINITY);
            scores[after.start..computed].fill(f32::NEG_INFINITY);
            weights[computed..].fill(zero);
            let (scores, dweights) = (&scores[..computed], &dweights[..computed]);
            let inputs = scores.as_chunks::<LANES>().0.iter().zip(dweights.as_chunks::<LANES>().0);
            let outputs = weights.as_chunks_mut::<LANES>().0.iter_mut().zip(gradients.as_chunks_mut::<LANES>().0);
            for ((scores, dweights), (weights, gradients)) in inputs.zip(outputs) {
                for lane in 0..LANES {
                    // A weight is at most 1, but for rounding.
                    let weight = exp_of_low(scores[lane].mul_add(scale, -log_sum));
                    weights[lane] = T::from_f32(weight);
                    gradients[lane] = T::from_f32(weight * (dweights[lane] - dot));
                }
            }
            // What is not seen has no gradient, whatever stands there.
            gradients[before].fill(zero);
            gradients[after].fill(zero);
        }
    }
}
