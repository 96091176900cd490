//! The softmax of attention, forward and backward, on a block of scores.
//!
//! Invariant: a row's numbers come from that row alone, in an order of sums that does not depend on the vector width.
#![allow(unsafe_code)]

use crate::device::cpu::Isa;
use crate::device::cpu::vector::{LANES, add_lanes, exp};
use crate::dtype::Element;

/// The elements of one row of a block that count: from the first to before the last.
pub type Visible = (u32, u32);

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
    /// weights exp(x - m), 0 where nothing is visible, and adds them to `sums`.
    pub fn forward<T: Element>(step: Step<'_, T>) {
        let Step { stride, width, scale, visible, scores, weights, maxima, sums, totals } = step;
        let total_width = totals.len() / visible.len();
        for (row, &(first, last)) in visible.iter().enumerate() {
            let scores = &mut scores[row * stride..][..width];
            let weights = &mut weights[row * stride..][..width];
            if first >= last {
                weights.fill(T::from_f32(0.0));
                continue;
            }
            let mut largest = [f32::NEG_INFINITY; LANES];
            for (start, scores) in (0..).step_by(LANES).zip(scores.chunks_exact_mut(LANES)) {
                for (lane, (score, largest)) in scores.iter_mut().zip(&mut largest).enumerate() {
                    let column = start + lane as u32;
                    *score = if column >= first && column < last { *score * scale } else { f32::NEG_INFINITY };
                    *largest = if *score > *largest { *score } else { *largest };
                }
            }
            let old = maxima[row];
            let new = largest.into_iter().fold(old, |a, b| if b > a { b } else { a });
            let mut added = [0.0; LANES];
            for (scores, weights) in scores.chunks_exact(LANES).zip(weights.chunks_exact_mut(LANES)) {
                for lane in 0..LANES {
                    let weight = exp(scores[lane] - new);
                    added[lane] += weight;
                    weights[lane] = T::from_f32(weight);
                }
            }
            let shrink = exp(old - new);
            maxima[row] = new;
            sums[row] = sums[row].mul_add(shrink, add_lanes(added));
            if shrink != 1.0 {
                for total in &mut totals[row * total_width..][..total_width] {
                    *total *= shrink;
                }
            }
        }
    }
}

/// The backward pass of a block; the rows of all four matrices are `stride` apart, and of each the first `width`, a multiple of `LANES`,
/// are looked at.
pub struct Gradient<'a, T> {
    pub stride: usize,
    pub width: usize,
    pub scale: f32,
    pub visible: &'a [Visible],
    pub scores: &'a [f32],
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
            let (scores, dweights) = (&scores[row * stride..][..width], &dweights[row * stride..][..width]);
            let (weights, gradients) = (&mut weights[row * stride..][..width], &mut gradients[row * stride..][..width]);
            let (log_sum, dot) = (log_sums[row], dots[row]);
            for start in (0..width).step_by(LANES) {
                for lane in start..start + LANES {
                    let seen = lane as u32 >= first && (lane as u32) < last;
                    let weight = if seen { exp(scores[lane].mul_add(scale, -log_sum)) } else { 0.0 };
                    let gradient = if seen { weight * (dweights[lane] - dot) } else { 0.0 };
                    weights[lane] = T::from_f32(weight);
                    gradients[lane] = T::from_f32(gradient);
                }
            }
        }
    }
}
