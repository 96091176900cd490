//! Packing: a block of an operand is copied into the order in which the tiles read it.
//!
//! A packed panel of `width` rows of A (or columns of B) is `[units][width]`. What is missing to a whole width, or to a whole pair
//! along K, is zero.
//!
//! Invariant: packing moves or widens values and never rounds; a faster way to pack gives the same panel.
#![allow(unsafe_code)]

use crate::device::cpu::Isa;
use crate::device::cpu::micro::{Unit, prefetch};
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::pack_avx512::{across_avx512, across_pairs_avx512, interleave_avx512, transpose_avx512};
use crate::dtype::{Dtype, Element};
use std::ops::Range;

/// Which index of an operand has neighbours in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Along {
    /// Element (x, k) lies at `x * stride + k`.
    K,
    /// Element (x, k) lies at `k * stride + x`.
    X,
}

/// One operand of a product: x counts rows of A or columns of B.
#[derive(Clone, Copy)]
pub struct Operand<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub along: Along,
}

impl<'a, T: Element> Operand<'a, T> {
    pub fn index(&self, x: usize, k: usize) -> usize {
        match self.along {
            Along::K => x * self.stride + k,
            Along::X => k * self.stride + x,
        }
    }

    /// The operand from (x, k) on.
    pub fn part(&self, x: usize, k: usize) -> Operand<'a, T> {
        Operand { data: &self.data[self.index(x, k)..], ..*self }
    }

    /// Fails when an element with `x < xs` and `k < ks` lies outside of the data, or two share a place.
    pub fn check(&self, xs: usize, ks: usize) {
        let inner = if self.along == Along::K { ks } else { xs };
        assert!(inner <= self.stride, "runs of {inner} elements at a distance of {}", self.stride);
        assert!(self.index(xs - 1, ks - 1) < self.data.len(), "{xs} x {ks} elements of {}", self.data.len());
    }

    /// The elements from (x, k) on, as bits.
    pub fn bits<B: bytemuck::Pod>(&self, x: usize, k: usize) -> &[B] {
        bytemuck::cast_slice(&self.data[self.index(x, k)..])
    }
}

/// What `pack` says of numbers whose exponents do not matter.
pub const ANY: u32 = 255;

/// Packs the rows `xs` and the elements `ks` along K of `operand` into `panel`, which is `width` wide. Returns, for `Unit::Swapped`, the
/// lowest biased exponent of a number that is not zero.
pub fn pack<T: Element>(
    isa: Isa,
    unit: Unit,
    operand: &Operand<'_, T>,
    xs: Range<usize>,
    ks: Range<usize>,
    width: usize,
    panel: &mut [u32],
) -> u32 {
    assert!(xs.len() <= width && panel.len() == unit.count(ks.len()) * width, "{xs:?} x {ks:?} into {} units", panel.len());
    if xs.is_empty() || ks.is_empty() {
        panel.fill(0);
        return ANY;
    }
    let whole = match unit {
        Unit::Pair => ks.len() / 2,
        Unit::Single | Unit::Swapped => unit.count(ks.len()),
    };
    let (fast, rest) = panel.split_at_mut(whole * width);
    let wide = isa >= Isa::Avx512;
    let mut lowest = ANY;
    match (unit, T::DTYPE, operand.along) {
        #[cfg(target_arch = "x86_64")]
        (Unit::Single, Dtype::F32, Along::K) | (Unit::Pair, Dtype::Bf16, Along::K) if wide => {
            let halves = if unit == Unit::Pair { 2 } else { 1 };
            let last = operand.index(xs.end - 1, ks.start + whole * halves);
            assert!(last <= operand.data.len(), "the last row ends at {last} of {}", operand.data.len());
            let from = operand.data[operand.index(xs.start, ks.start)..].as_ptr().cast();
            // SAFETY: every row has `whole` units, the last of them ends inside the data (asserted above), and the processor has AVX-512.
            unsafe { transpose_avx512(from, operand.stride * size_of::<T>(), xs.len(), width, whole, fast) }
        }
        (Unit::Single, Dtype::F32, Along::X) => {
            for (k, to) in ks.clone().zip(fast.chunks_exact_mut(width)) {
                let (to, padding) = to.split_at_mut(xs.len());
                to.copy_from_slice(&operand.bits(xs.start, k)[..xs.len()]);
                padding.fill(0);
            }
        }
        #[cfg(target_arch = "x86_64")]
        (Unit::Pair, Dtype::Bf16, Along::X) if wide && xs.len().is_multiple_of(16) && xs.len() == width => {
            let pairs = fast.chunks_exact_mut(width).zip(ks.clone().step_by(2));
            for (to, k) in pairs {
                let (even, odd) = (&operand.bits(xs.start, k)[..width], &operand.bits(xs.start, k + 1)[..width]);
                // SAFETY: the processor has AVX-512.
                unsafe { interleave_avx512(even, odd, to) }
            }
        }
        _ => lowest = plain(unit, operand, xs.clone(), ks.clone(), width, fast),
    }
    if unit == Unit::Pair && !rest.is_empty() {
        plain(unit, operand, xs, ks.end - 1..ks.end, width, rest);
    }
    lowest
}

/// Whether the panels of such a B can be packed by `pack_across`.
pub fn can_cross<T: Element>(isa: Isa, unit: Unit, operand: &Operand<'_, T>) -> bool {
    let known = match unit {
        Unit::Single => T::DTYPE == Dtype::F32,
        Unit::Swapped => false,
        Unit::Pair => isa >= Isa::Avx512 && T::DTYPE == Dtype::Bf16,
    };
    known && operand.along == Along::X
}

/// Packs `ks` of panels that are neighbours, all of them step by step, so that memory is read in the order in which it lies. Each panel has
/// its columns, which fill it, and its place.
pub fn pack_across<T: Element>(unit: Unit, operand: &Operand<'_, T>, ks: Range<usize>, panels: &mut [(Range<usize>, &mut [u32])]) {
    for (columns, to) in &*panels {
        operand.part(columns.start, ks.start).check(columns.len(), ks.len());
        assert_eq!(to.len(), unit.count(ks.len()) * columns.len(), "a panel of {columns:?} x {ks:?}");
    }
    if unit == Unit::Single {
        for (step, k) in ks.enumerate() {
            for (columns, to) in &mut *panels {
                let width = columns.len();
                to[step * width..][..width].copy_from_slice(&operand.bits(columns.start, k)[..width]);
            }
        }
        return;
    }
    let whole = ks.start..ks.end - ks.len() % 2;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `can_cross` asks for AVX-512.
    unsafe {
        across_avx512(operand, whole.clone(), panels);
    }
    if whole.end < ks.end {
        for (columns, to) in panels {
            let last = to.len() - columns.len();
            plain(unit, operand, columns.clone(), whole.end..ks.end, columns.len(), &mut to[last..]);
        }
    }
}

/// Panels of rows of A, one after the other: each of `height` rows and `steps` units, the last of as many rows as are left.
#[derive(Clone, Copy)]
pub struct RowPanels {
    pub unit: Unit,
    pub height: usize,
    pub steps: usize,
    /// The step at which packing begins.
    pub first: usize,
}

/// Packs the rows `xs` and the elements `ks` along K into the panels in `to`, from their step `first` on.
pub fn pack_rows<T: Element>(
    isa: Isa,
    panels: RowPanels,
    operand: &Operand<'_, T>,
    xs: Range<usize>,
    ks: Range<usize>,
    to: &mut [u32],
) -> u32 {
    let RowPanels { unit, height, steps, first } = panels;
    let whole = xs.start..xs.end - xs.len() % height;
    let across = operand.along == Along::X && matches!((unit, T::DTYPE), (Unit::Single, Dtype::F32) | (Unit::Pair, Dtype::Bf16));
    let filled = unit.count(ks.len());
    let mut lowest = ANY;
    match height {
        #[cfg(target_arch = "x86_64")]
        8 if across && unit == Unit::Pair && isa >= Isa::Avx512 => {
            let pairs = ks.start..ks.end - ks.len() % 4;
            // SAFETY: the processor has AVX-512.
            unsafe { across_pairs_avx512(panels, operand, whole.clone(), pairs.clone(), to) };
            let last = RowPanels { first: first + pairs.len() / 2, ..panels };
            across_panels::<T, 8>(last, operand, whole.clone(), pairs.end..ks.end, to);
        }
        8 if across => across_panels::<T, 8>(panels, operand, whole.clone(), ks.clone(), to),
        6 if across => across_panels::<T, 6>(panels, operand, whole.clone(), ks.clone(), to),
        _ => {
            for (x, to) in whole.clone().step_by(height).zip(to.chunks_mut(height * steps)) {
                let low = pack(isa, unit, operand, x..x + height, ks.clone(), height, &mut to[first * height..][..filled * height]);
                lowest = lowest.min(low);
            }
        }
    }
    if whole.end < xs.end {
        let left = xs.end - whole.end;
        let to = &mut to[whole.len() * steps + first * left..][..filled * left];
        lowest = lowest.min(pack(isa, unit, operand, whole.end..xs.end, ks, left, to));
    }
    lowest
}

/// How many steps along K are asked for in advance.
pub const AHEAD: usize = 16;

/// Whole panels of rows that are neighbours in memory: all panels step by step, so that each line of memory is read once.
fn across_panels<T: Element, const HEIGHT: usize>(
    RowPanels { unit, steps, first, .. }: RowPanels,
    operand: &Operand<'_, T>,
    xs: Range<usize>,
    ks: Range<usize>,
    to: &mut [u32],
) {
    if xs.is_empty() {
        return;
    }
    let line = 64 / size_of::<T>();
    for (step, k) in ks.clone().step_by(unit.elements()).enumerate() {
        // The next rows lie in other pages, where the processor does not look ahead by itself.
        for ahead in 0..unit.elements() {
            for x in (xs.start..xs.end).step_by(line) {
                prefetch(operand.data.as_ptr().wrapping_add(operand.index(x, k + ahead + AHEAD)));
            }
        }
        let places = to
            .chunks_mut(HEIGHT * steps)
            .map(|panel| panel[(first + step) * HEIGHT..].first_chunk_mut::<HEIGHT>().expect("a panel has all steps"));
        if unit == Unit::Single {
            let (from, _) = operand.bits::<u32>(xs.start, k)[..xs.len()].as_chunks::<HEIGHT>();
            places.zip(from).for_each(|(to, from)| *to = *from);
        } else {
            let (even, _) = operand.bits::<u16>(xs.start, k)[..xs.len()].as_chunks::<HEIGHT>();
            if k + 1 < ks.end {
                let (odd, _) = operand.bits::<u16>(xs.start, k + 1)[..xs.len()].as_chunks::<HEIGHT>();
                for ((to, even), odd) in places.zip(even).zip(odd) {
                    *to = std::array::from_fn(|x| even[x] as u32 | (odd[x] as u32) << 16);
                }
            } else {
                places.zip(even).for_each(|(to, even)| *to = even.map(u32::from));
            }
        }
    }
}

/// The definition of a packed panel.
fn plain<T: Element>(unit: Unit, operand: &Operand<'_, T>, xs: Range<usize>, ks: Range<usize>, width: usize, panel: &mut [u32]) -> u32 {
    let element = |x: usize, k: usize| if k < ks.end { operand.data[operand.index(x, k)].to_f32() } else { 0.0 };
    let mut lowest = ANY;
    for (step, to) in panel.chunks_exact_mut(width).enumerate() {
        let (to, padding) = to.split_at_mut(xs.len());
        for (x, to) in xs.clone().zip(to) {
            *to = match unit {
                Unit::Single => element(x, ks.start + step).to_bits(),
                Unit::Swapped => {
                    let bits = without_denormals(element(x, ks.start + (step ^ 1))).to_bits();
                    // The exponent of zero is 0, which counts as the highest.
                    lowest = lowest.min((bits >> 23 & 0xff).wrapping_sub(1));
                    bits
                }
                // A bf16 is the upper half of its f32.
                Unit::Pair => {
                    let k = ks.start + 2 * step;
                    (element(x, k).to_bits() >> 16) | (element(x, k + 1).to_bits() & 0xffff_0000)
                }
            };
        }
        padding.fill(0);
    }
    if lowest == ANY { ANY } else { lowest + 1 }
}

fn without_denormals(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;
    use half::bf16;

    fn check<T: Element>(unit: Unit, values: &[T]) {
        for (xs, ks, width) in
            [(3..19, 1..40, 16), (0..48, 0..64, 48), (5..6, 2..3, 8), (1..40, 0..33, 48), (0..8, 3..20, 8), (2..9, 0..31, 7)]
        {
            for along in [Along::K, Along::X] {
                let operand = Operand { data: values, stride: 71, along };
                let mut expected = vec![7; unit.count(ks.len()) * width];
                plain(unit, &operand, xs.clone(), ks.clone(), width, &mut expected);
                let mut panel = vec![9; expected.len()];
                pack(Isa::detect(), unit, &operand, xs.clone(), ks.clone(), width, &mut panel);
                assert_eq!(panel, expected, "{unit:?} {along:?} {xs:?} {ks:?} {width}");
            }
        }
    }

    #[test]
    fn panels_across_are_panels() {
        let stream = Stream::new(2, "pack");
        let narrow: Vec<bf16> = (0..71 * 71).map(|i| bf16::from_f32(stream.normal(i) as f32)).collect();
        for (height, along, ks) in
            [(8, Along::X, 3..20), (8, Along::X, 2..40), (8, Along::X, 4..5), (6, Along::X, 0..7), (8, Along::K, 0..9)]
        {
            let operand = Operand { data: &narrow[..], stride: 71, along };
            let units = Unit::Pair.count(ks.len());
            let mut together = vec![0; 37 * units];
            let panels = RowPanels { unit: Unit::Pair, height, steps: units, first: 0 };
            pack_rows(Isa::detect(), panels, &operand, 1..38, ks.clone(), &mut together);
            for start in (0..37).step_by(height) {
                let rows = height.min(37 - start);
                let mut alone = vec![0; rows * units];
                plain(Unit::Pair, &operand, 1 + start..1 + start + rows, ks.clone(), rows, &mut alone);
                assert_eq!(together[start * units..][..rows * units], alone, "{height} {along:?} {ks:?} {start}");
            }
        }
    }

    fn check_across<T: Element>(unit: Unit, values: &[T]) {
        for ks in [0..1, 3..20, 2..40, 1..2] {
            let operand = Operand { data: values, stride: 71, along: Along::X };
            if !can_cross(Isa::detect(), unit, &operand) {
                continue;
            }
            let panels = [5..21, 21..53, 53..69];
            let mut places = panels.clone().map(|columns| vec![9; unit.count(ks.len()) * columns.len()]);
            let mut all: Vec<_> = panels.iter().cloned().zip(places.iter_mut().map(|place| &mut place[..])).collect();
            pack_across(unit, &operand, ks.clone(), &mut all);
            for (columns, place) in panels.into_iter().zip(places) {
                let mut expected = vec![7; place.len()];
                plain(unit, &operand, columns.clone(), ks.clone(), columns.len(), &mut expected);
                assert_eq!(place, expected, "{unit:?} {columns:?} {ks:?}");
            }
        }
    }

    #[test]
    fn panels_packed_together_are_panels() {
        let stream = Stream::new(3, "pack");
        let floats: Vec<f32> = (0..71 * 71).map(|i| stream.normal(i) as f32).collect();
        check_across(Unit::Single, &floats);
        check_across(Unit::Pair, &floats.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
    }

    #[test]
    fn fast_packing_gives_the_plain_panel() {
        let stream = Stream::new(1, "pack");
        let floats: Vec<f32> = (0..71 * 71).map(|i| stream.normal(i) as f32).collect();
        let narrow: Vec<bf16> = floats.iter().map(|&x| bf16::from_f32(x)).collect();
        check(Unit::Single, &floats);
        check(Unit::Single, &narrow);
        check(Unit::Swapped, &narrow);
        check(Unit::Pair, &narrow);
    }
}
