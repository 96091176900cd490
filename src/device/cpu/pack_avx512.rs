//! Packing with AVX-512: transposed blocks, and pairs of rows that are interleaved.
//!
//! Invariant: the panels are those of `pack::plain`.
#![allow(unsafe_code)]

use crate::device::cpu::micro::prefetch;
use crate::device::cpu::pack::{AHEAD, Operand, RowPanels};
use crate::dtype::Element;
use std::arch::x86_64::{
    __m512i, _mm256_loadu_si256, _mm512_cvtepu16_epi32, _mm512_loadu_si512, _mm512_maskz_loadu_epi32, _mm512_or_si512,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_shuffle_i64x2, _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::ops::Range;

/// How far ahead along K rows are asked for: sixteen lines are too many streams for the processor to see by itself.
const UNITS_AHEAD: usize = 128;

/// Turns `rows` rows of 32-bit units, `row_bytes` apart, into a panel of `units` steps.
///
/// # Safety
/// The rows must be readable for `units` units each; the processor must have AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn transpose_avx512(from: *const u8, row_bytes: usize, rows: usize, width: usize, units: usize, panel: &mut [u32]) {
    assert_eq!(panel.len(), units * width, "a panel of {units} units of {width} rows");
    for row in (0..width).step_by(16) {
        let (present, wide) = (rows.saturating_sub(row).min(16), (width - row).min(16));
        for unit in (0..units).step_by(16) {
            let count = (units - unit).min(16);
            let mask = u16::MAX >> (16 - count);
            // At the end of these rows the next ones begin, of this panel or of its neighbour.
            let (ahead_row, ahead_unit) = match unit + UNITS_AHEAD {
                ahead if ahead < units => (row, ahead),
                ahead => (row + 16, ahead.saturating_sub(units).min(unit)),
            };
            if present.min(wide).min(count) == 16 {
                let to = &mut panel[unit * width + row..][..15 * width + 16];
                // SAFETY: the block's rows exist and have these units.
                unsafe { transpose_whole(from.add(row * row_bytes + unit * 4), row_bytes, to, width) };
                for index in 0..16 {
                    prefetch(from.wrapping_add((ahead_row + index) * row_bytes + ahead_unit * 4));
                }
                continue;
            }
            let mut block = [_mm512_setzero_si512(); 16];
            for (index, line) in block.iter_mut().enumerate().take(present) {
                prefetch(from.wrapping_add((ahead_row + index) * row_bytes + ahead_unit * 4));
                // SAFETY: the mask keeps the load within the `units` units of a row that exists.
                *line = unsafe { _mm512_maskz_loadu_epi32(mask, from.add((row + index) * row_bytes + unit * 4).cast()) };
            }
            transpose_block(&mut block);
            if wide == 16 {
                for (index, line) in block.into_iter().enumerate().take(count) {
                    let to = &mut panel[(unit + index) * width + row..][..16];
                    // SAFETY: `to` has sixteen units.
                    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), line) };
                }
            } else {
                for (index, line) in block.into_iter().enumerate().take(count) {
                    let mut units = [0u32; 16];
                    // SAFETY: `units` has sixteen units.
                    unsafe { _mm512_storeu_si512(units.as_mut_ptr().cast(), line) };
                    panel[(unit + index) * width + row..][..wide].copy_from_slice(&units[..wide]);
                }
            }
        }
    }
}

/// Writes a block of 16 x 16 units transposed, its lines `width` apart: all of it stays in registers.
///
/// # Safety
/// The rows must be readable for sixteen units each; the processor must have AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn transpose_whole(from: *const u8, row_bytes: usize, to: &mut [u32], width: usize) {
    assert!(to.len() >= 15 * width + 16, "{} units for lines {width} apart", to.len());
    // SAFETY: the caller vouches for the rows.
    let mut block = std::array::from_fn(|row| unsafe { _mm512_loadu_si512(from.add(row * row_bytes).cast()) });
    transpose_block(&mut block);
    for (index, line) in block.into_iter().enumerate() {
        // SAFETY: `to` has sixteen units from there on (asserted above).
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().add(index * width).cast(), line) };
    }
}

/// Transposes a 16 x 16 block of 32-bit units.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_block(rows: &mut [__m512i; 16]) {
    let mut other = [_mm512_setzero_si512(); 16];
    for i in 0..8 {
        other[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        other[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Now each 128-bit lane of four registers holds a 4 x 4 block; within it, columns become rows.
    for i in 0..4 {
        let four = [other[4 * i], other[4 * i + 1], other[4 * i + 2], other[4 * i + 3]];
        rows[4 * i] = _mm512_unpacklo_epi64(four[0], four[2]);
        rows[4 * i + 1] = _mm512_unpackhi_epi64(four[0], four[2]);
        rows[4 * i + 2] = _mm512_unpacklo_epi64(four[1], four[3]);
        rows[4 * i + 3] = _mm512_unpackhi_epi64(four[1], four[3]);
    }
    // What is left is a 4 x 4 transposition of whole lanes, for each of the four columns of a lane.
    for column in 0..4 {
        let (a, b, c, d) = (rows[column], rows[4 + column], rows[8 + column], rows[12 + column]);
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        other[column] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        other[4 + column] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        other[8 + column] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        other[12 + column] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
    *rows = other;
}

/// Joins two lines of bf16, neighbours along K, into units.
///
/// # Safety
/// The processor must have AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn interleave_avx512(even: &[u16], odd: &[u16], to: &mut [u32]) {
    assert!(to.len().is_multiple_of(16) && even.len() == to.len() && odd.len() == to.len(), "lines of one length");
    for ((even, odd), to) in even.as_chunks().0.iter().zip(odd.as_chunks().0).zip(to.as_chunks_mut::<16>().0) {
        // SAFETY: `to` has sixteen units; the processor has AVX-512.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), joined(even, odd)) };
    }
}

/// Sixteen units of two lines of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn joined(even: &[u16; 16], odd: &[u16; 16]) -> __m512i {
    // SAFETY: both lines have sixteen elements.
    let [low, high] = [even, odd].map(|line| unsafe { _mm256_loadu_si256(line.as_ptr().cast()) });
    _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)))
}

/// `across_panels` for pairs of bf16 and panels of eight rows, of an even number of steps: two at a time, so that whole lines are
/// written. The panels lie a power of two apart, and half-written lines of all of them would not fit into one set of the cache.
///
/// # Safety
/// The processor must have AVX-512.
#[target_feature(enable = "avx512f,avx512vl,avx2")]
pub unsafe fn across_pairs_avx512<T: Element>(
    RowPanels { steps, first, .. }: RowPanels,
    operand: &Operand<'_, T>,
    xs: Range<usize>,
    ks: Range<usize>,
    to: &mut [u32],
) {
    assert!(xs.len().is_multiple_of(8) && ks.len().is_multiple_of(4), "whole panels of {xs:?} and two steps each of {ks:?}");
    /// The elements `xs` at `k`, in whole vectors and what is left; those of a later k are asked for.
    #[inline(always)]
    fn line<'a, T: Element>(operand: &'a Operand<'_, T>, xs: &Range<usize>, k: usize) -> (&'a [[u16; 16]], &'a [u16]) {
        let line = &operand.bits::<u16>(xs.start, k)[..xs.len()];
        let ahead = line.as_ptr().wrapping_add(AHEAD * operand.stride);
        for x in (0..xs.len()).step_by(32) {
            prefetch(ahead.wrapping_add(x));
        }
        line.as_chunks()
    }
    if xs.is_empty() {
        return;
    }
    for (step, k) in ks.step_by(4).enumerate() {
        let (a, b, c, d) = (line(operand, &xs, k), line(operand, &xs, k + 1), line(operand, &xs, k + 2), line(operand, &xs, k + 3));
        let mut place = (first + 2 * step) * 8;
        for (((a, b), c), d) in a.0.iter().zip(b.0).zip(c.0).zip(d.0) {
            let (one, two) = (joined(a, b), joined(c, d));
            // The first eight units of both, and the last eight.
            let lines = [_mm512_shuffle_i64x2::<0x44>(one, two), _mm512_shuffle_i64x2::<0xee>(one, two)];
            for line in lines {
                let to = &mut to[place..][..16];
                // SAFETY: `to` has sixteen units.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), line) };
                place += 8 * steps;
            }
        }
        // Eight rows, or none.
        for (x, (((a, b), c), d)) in a.1.iter().zip(b.1).zip(c.1).zip(d.1).enumerate() {
            to[place + x] = *a as u32 | (*b as u32) << 16;
            to[place + 8 + x] = *c as u32 | (*d as u32) << 16;
        }
    }
}

/// How many steps along K `across_avx512` asks for in advance.
const STEPS_AHEAD: usize = 8;

/// `pack_across` for pairs of bf16.
///
/// # Safety
/// The processor must have AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn across_avx512<T: Element>(operand: &Operand<'_, T>, ks: Range<usize>, panels: &mut [(Range<usize>, &mut [u32])]) {
    for (step, k) in ks.step_by(2).enumerate() {
        for (columns, to) in &mut *panels {
            let width = columns.len();
            let (even, odd) = (&operand.bits::<u16>(columns.start, k)[..width], &operand.bits::<u16>(columns.start, k + 1)[..width]);
            for line in [even, odd] {
                let ahead = line.as_ptr().wrapping_add(STEPS_AHEAD * operand.stride);
                prefetch(ahead);
                prefetch(ahead.wrapping_add(width - 1));
            }
            // SAFETY: the processor has AVX-512.
            unsafe { interleave_avx512(even, odd, &mut to[step * width..][..width]) }
        }
    }
}
