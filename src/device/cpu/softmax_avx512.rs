//! The softmax of attention in vectors of sixteen.
//!
//! Invariant: the bits of `softmax::forward_plain` and `softmax::backward_plain`.
#![allow(unsafe_code)]

use crate::device::cpu::softmax::{Gradient, ROWS, Step, Visible, shrink};
use crate::device::cpu::vector::{COEFFICIENTS, LOWEST_EXPONENT, ROUNDER};
use crate::dtype::Element;
use half::bf16;
use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, __m512i, _CMP_NLT_UQ, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_max_ps, _mm_max_ss,
    _mm_movehdup_ps, _mm_movehl_ps, _mm256_add_ps, _mm256_castps256_ps128, _mm256_extractf128_ps, _mm256_max_ps, _mm256_storeu_si256,
    _mm512_add_ps, _mm512_castps_si512, _mm512_castps512_ps256, _mm512_castsi512_ps, _mm512_castsi512_si256, _mm512_cmp_ps_mask,
    _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh, _mm512_extractf32x8_ps, _mm512_extracti64x4_epi64, _mm512_fmadd_ps, _mm512_fmsub_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_max_ps, _mm512_maskz_mov_ps, _mm512_maskz_mul_ps, _mm512_max_ps, _mm512_mul_ps,
    _mm512_permutexvar_epi16, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_ps,
};

const LANES: usize = 16;

/// Elements that a vector of f32 is rounded to.
trait Rounded: Element {
    /// # Safety
    /// There must be room for sixteen, and the processor must have AVX-512, for bf16 with that part.
    unsafe fn store(x: __m512, to: *mut Self);
}

impl Rounded for f32 {
    #[inline(always)]
    unsafe fn store(x: __m512, to: *mut f32) {
        // SAFETY: as the caller vouches for.
        unsafe { _mm512_storeu_ps(to, x) }
    }
}

impl Rounded for bf16 {
    #[inline(always)]
    unsafe fn store(x: __m512, to: *mut bf16) {
        // SAFETY: as the caller vouches for; the two types are the same 256 bits.
        unsafe { _mm256_storeu_si256(to.cast(), std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))) }
    }
}

/// # Safety
/// As for `forward_rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub unsafe fn forward_f32(step: Step<'_, f32>) {
    // SAFETY: what the caller vouches for.
    unsafe { forward_rows(step) }
}

/// # Safety
/// As for `forward_rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub unsafe fn forward_bf16(step: Step<'_, bf16>) {
    // SAFETY: what the caller vouches for.
    unsafe { forward_rows(step) }
}

/// From which element to before which a row sees.
#[derive(Clone, Copy)]
struct Row {
    first: usize,
    last: usize,
}

impl Row {
    #[inline(always)]
    fn new((first, last): Visible) -> Row {
        Row { first: first as usize, last: last as usize }
    }

    /// Vectors up to the last that has an element before `last`.
    #[inline(always)]
    fn vectors(self) -> usize {
        self.last.div_ceil(LANES)
    }

    /// Which elements of vector `index` are seen.
    #[inline(always)]
    fn mask(self, index: usize) -> u16 {
        let at = index * LANES;
        let before = |end: usize| (1u32 << end.saturating_sub(at).min(LANES)) - 1;
        (before(self.last) & !before(self.first)) as u16
    }
}

/// # Safety
/// Every row must have `stride` scores and weights, of which what is visible is a part, and its statistics; and the processor must have the
/// instructions of `Rounded::store`.
#[inline(always)]
unsafe fn forward_rows<T: Rounded>(step: Step<'_, T>) {
    let Step { stride, factor, visible, scores, weights, maxima, sums, totals } = step;
    let total_width = totals.len() / visible.len();
    let mut news = [0f32; ROWS];
    // All maxima first, then all exponentials: each loop is short enough for the processor to overlap rows.
    for (row, &seen) in visible.iter().enumerate() {
        // SAFETY: what the caller vouches for.
        let largest = unsafe { max_lanes(largest(Row::new(seen), scores.as_ptr().add(row * stride))) } * factor;
        news[row] = if largest > maxima[row] { largest } else { maxima[row] };
    }
    for (row, &seen) in visible.iter().enumerate() {
        let new = news[row];
        // SAFETY: what the caller vouches for.
        let added = unsafe {
            let (scores, weights) = (scores.as_ptr().add(row * stride), weights.as_mut_ptr().add(row * stride));
            add_lanes(weigh(Row::new(seen), factor, new, scores, weights))
        };
        let shrink = shrink(maxima[row], new);
        maxima[row] = new;
        sums[row] = sums[row].mul_add(shrink, added);
        if shrink != 1.0 {
            totals[row * total_width..][..total_width].iter_mut().for_each(|total| *total *= shrink);
        }
    }
}

/// The largest of the scores that are seen, lane by lane.
///
/// # Safety
/// As for `forward_rows`.
#[inline(always)]
unsafe fn largest(row: Row, scores: *const f32) -> __m512 {
    // SAFETY: what the caller vouches for.
    unsafe {
        let mut largest = _mm512_set1_ps(f32::NEG_INFINITY);
        let (begin, end) = (row.first.div_ceil(LANES), row.last / LANES);
        for vector in begin..end {
            // What is not a number is passed over: of two operands that do not compare, the second is taken.
            largest = _mm512_max_ps(_mm512_loadu_ps(scores.add(vector * LANES)), largest);
        }
        // The same vector twice does no harm.
        for edge in [row.first / LANES, end] {
            if (edge < begin || edge == end) && edge < row.vectors() {
                let scores = _mm512_loadu_ps(scores.add(edge * LANES));
                largest = _mm512_mask_max_ps(largest, row.mask(edge), scores, largest);
            }
        }
        largest
    }
}

/// Writes the weights of a row and returns their sums, lane by lane.
///
/// # Safety
/// As for `forward_rows`.
#[inline(always)]
unsafe fn weigh<T: Rounded>(row: Row, factor: f32, largest: f32, scores: *const f32, weights: *mut T) -> __m512 {
    // SAFETY: what the caller vouches for.
    unsafe {
        let (factor, largest) = (_mm512_set1_ps(factor), _mm512_set1_ps(largest));
        let vectors = row.vectors();
        let hidden = (row.first / LANES).min(vectors);
        let begin = row.first.div_ceil(LANES).min(vectors);
        let end = (row.last / LANES).max(begin);
        for vector in 0..hidden {
            T::store(_mm512_setzero_ps(), weights.add(vector * LANES));
        }
        let mut added = _mm512_setzero_ps();
        for vector in hidden..vectors {
            let exponents = _mm512_fmsub_ps(_mm512_loadu_ps(scores.add(vector * LANES)), factor, largest);
            let mut weight = exp2(exponents);
            if vector < begin || vector >= end {
                weight = _mm512_maskz_mov_ps(row.mask(vector), weight);
            }
            T::store(weight, weights.add(vector * LANES));
            added = _mm512_add_ps(added, weight);
        }
        added
    }
}

/// `vector::exp2_of_low`.
///
/// # Safety
/// The processor must have AVX-512, as for all functions here.
#[inline(always)]
unsafe fn exp2(x: __m512) -> __m512 {
    // SAFETY: what the caller vouches for.
    unsafe {
        let round = _mm512_set1_ps(ROUNDER);
        let shifted = _mm512_add_ps(x, round);
        let rest = _mm512_sub_ps(x, _mm512_sub_ps(shifted, round));
        let mut power = _mm512_set1_ps(COEFFICIENTS[0]);
        for coefficient in &COEFFICIENTS[1..] {
            power = _mm512_fmadd_ps(rest, power, _mm512_set1_ps(*coefficient));
        }
        power = _mm512_fmadd_ps(rest, power, _mm512_set1_ps(1.0));
        let scale = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
        let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(LOWEST_EXPONENT));
        _mm512_maskz_mul_ps(normal, power, _mm512_castsi512_ps(scale))
    }
}

/// `vector::add_lanes`.
///
/// # Safety
/// As for `exp2`.
#[inline(always)]
unsafe fn add_lanes(lanes: __m512) -> f32 {
    // SAFETY: what the caller vouches for.
    unsafe {
        let eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes));
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

/// The largest of sixteen that are numbers.
///
/// # Safety
/// As for `exp2`.
#[inline(always)]
unsafe fn max_lanes(lanes: __m512) -> f32 {
    // SAFETY: what the caller vouches for.
    unsafe {
        let eight = _mm256_max_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes));
        let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
}

/// What the weights and gradients of a row are made from.
#[derive(Clone, Copy)]
struct Source {
    row: Row,
    scores: *const f32,
    dweights: *const f32,
    factor: __m512,
    log_sum: __m512,
    dot: __m512,
}

impl Source {
    /// # Safety
    /// Row `row` must have `stride` elements and its statistics.
    #[inline(always)]
    unsafe fn new<T>(block: &Gradient<'_, T>, row: usize) -> Source {
        // SAFETY: what the caller vouches for.
        unsafe {
            Source {
                row: Row::new(block.visible[row]),
                scores: block.scores.as_ptr().add(row * block.stride),
                dweights: block.dweights.as_ptr().add(row * block.stride),
                factor: _mm512_set1_ps(block.factor),
                log_sum: _mm512_set1_ps(block.log_sums[row]),
                dot: _mm512_set1_ps(block.dots[row]),
            }
        }
    }

    /// Weights and gradients of a vector, as if all were seen.
    ///
    /// # Safety
    /// The row must have this vector.
    #[inline(always)]
    unsafe fn whole(&self, vector: usize) -> (__m512, __m512) {
        // SAFETY: what the caller vouches for.
        unsafe {
            let scores = _mm512_loadu_ps(self.scores.add(vector * LANES));
            let weight = exp2(_mm512_fmsub_ps(scores, self.factor, self.log_sum));
            let dweights = _mm512_loadu_ps(self.dweights.add(vector * LANES));
            (weight, _mm512_mul_ps(weight, _mm512_sub_ps(dweights, self.dot)))
        }
    }

    /// Those of a vector of which some may be hidden.
    ///
    /// # Safety
    /// As for `whole`.
    #[inline(always)]
    unsafe fn edge(&self, vector: usize) -> (__m512, __m512) {
        let mask = self.row.mask(vector);
        // SAFETY: what the caller vouches for.
        unsafe {
            let (weight, gradient) = self.whole(vector);
            (_mm512_maskz_mov_ps(mask, weight), _mm512_maskz_mov_ps(mask, gradient))
        }
    }
}

/// # Safety
/// Every row must have `stride` elements in all matrices, of which what is visible is a part, and the processor must have AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub unsafe fn backward_f32(block: Gradient<'_, f32>) {
    let (weights, gradients) = (block.weights.as_mut_ptr(), block.gradients.as_mut_ptr());
    for row in 0..block.visible.len() {
        // SAFETY: what the caller vouches for.
        unsafe {
            let source = Source::new(&block, row);
            let (weights, gradients) = (weights.add(row * block.stride), gradients.add(row * block.stride));
            let store = |vector: usize, (weight, gradient): (__m512, __m512)| {
                f32::store(weight, weights.add(vector * LANES));
                f32::store(gradient, gradients.add(vector * LANES));
            };
            let Row { first, last } = source.row;
            let vectors = source.row.vectors();
            let begin = first.div_ceil(LANES).min(vectors);
            let end = (last / LANES).max(begin);
            for vector in 0..begin {
                store(vector, source.edge(vector));
            }
            for vector in begin..end {
                store(vector, source.whole(vector));
            }
            for vector in end..vectors {
                store(vector, source.edge(vector));
            }
        }
    }
}

/// Row 2i and row 2i + 1 of a vector as one: sixteen units, each with the elements of both rows.
///
/// # Safety
/// The processor must have AVX-512 with its bf16 part.
#[inline(always)]
unsafe fn join(even: __m512, odd: __m512) -> (__m512i, __m512i) {
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut index = 0;
        while index < 32 {
            order[index] = (index as u16 & 1) * 16 + index as u16 / 2;
            index += 1;
        }
        order
    };
    // SAFETY: what the caller vouches for; the two types are the same 512 bits.
    unsafe {
        let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
        (both, _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), both))
    }
}

/// # Safety
/// As for `backward_f32`, with lines of pairs for all rows, and with the bf16 part.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub unsafe fn backward_bf16(mut block: Gradient<'_, bf16>) {
    let (rows, stride) = (block.visible.len(), block.stride);
    let [weight_pairs, gradient_pairs] = block.pairs.each_mut().map(|pairs| pairs.as_mut_ptr());
    let gradients = block.gradients.as_mut_ptr();
    for row in (0..rows).step_by(2) {
        let alone = row + 1 == rows;
        // SAFETY: what the caller vouches for; a row that has no partner is never stored as one.
        unsafe {
            let even = Source::new(&block, row);
            let odd = Source::new(&block, if alone { row } else { row + 1 });
            let store = |vector: usize, even: (__m512, __m512), odd: (__m512, __m512)| {
                let (line, at) = (row / 2 * stride + vector * LANES, row * stride + vector * LANES);
                let (_, weights) = join(even.0, odd.0);
                _mm512_storeu_si512(weight_pairs.add(line).cast(), weights);
                let (both, pairs) = join(even.1, odd.1);
                _mm512_storeu_si512(gradient_pairs.add(line).cast(), pairs);
                _mm256_storeu_si256(gradients.add(at).cast(), _mm512_castsi512_si256(both));
                if !alone {
                    _mm256_storeu_si256(gradients.add(at + stride).cast(), _mm512_extracti64x4_epi64::<1>(both));
                }
            };
            let none = (_mm512_setzero_ps(), _mm512_setzero_ps());
            let vectors = even.row.vectors().max(odd.row.vectors());
            let begin = even.row.first.max(odd.row.first).div_ceil(LANES).min(vectors);
            let end = (even.row.last.min(odd.row.last) / LANES).max(begin);
            let edge = |vector: usize| store(vector, even.edge(vector), if alone { none } else { odd.edge(vector) });
            (0..begin).for_each(edge);
            let whole = if alone { begin } else { end };
            for vector in begin..whole {
                store(vector, even.whole(vector), odd.whole(vector));
            }
            (whole..vectors).for_each(edge);
        }
    }
}
