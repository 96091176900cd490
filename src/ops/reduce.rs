//! Sums over rows of tokens, sums in a tree, and sums that are exact.
//!
//! The chunk rule. A gradient that is a sum over tokens rests in a buffer of `chunks` rows, f32. The n = sequences * t rows of an
//! operand are whole sequences of t rows; each is cut into `chunks` equal consecutive parts; part k is summed over its rows in order,
//! in f32, from zero, and that sum is added to row k of the buffer, one sequence after the other.
//!
//! Invariant: a sum depends on its terms and on the rule above alone: not on threads, not on how sequences are grouped into calls, not on
//! which rank holds which part. `SquareSum` and `LossSum` are integers, so they depend on no order at all.

use crate::device::Device;
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::ops::elementwise::accumulate_row;
use crate::ops::rows::{Rows, over_rows};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSlice;
use std::ops::Range;

/// Columns summed at a time: their sums stay in the first-level cache.
const BLOCK: usize = 256;

/// dw[k] += sum of the rows of part k of dy: the gradient of a bias. dw f32 [chunks, c], dy [n, c].
pub fn sum_rows(dw: ViewMut<'_>, dy: View<'_>, t: usize) {
    let columns = dy.shape().columns();
    check_chunks(&dw, dy.shape().rows(), columns, t);
    match dy.device() {
        Device::Cpu(_) => dispatch!(dy.dtype(), T => {
            let values = dy.slice::<T>();
            add_by_chunks(dw, dy.shape().rows(), t, #[inline(always)] |row, columns_read, sums| {
                accumulate_row(sums, &values[row * columns..][columns_read]);
            });
        }),
        Device::Gpu(_) => panic!("not yet on a GPU"),
        Device::Dry(_) => {}
    }
}

/// The chunk rule on the CPU, for any term: `add_row(row, columns, sums)` adds what `row` gives to `columns`.
pub(super) fn add_by_chunks(mut dw: ViewMut<'_>, n: usize, t: usize, add_row: impl Fn(usize, Range<usize>, &mut [f32]) + Sync) {
    let (chunks, columns) = (dw.shape().rows(), dw.shape().columns());
    let part = t / chunks;
    let Device::Cpu(cpu) = dw.device() else { return };
    let out = Rows::new(dw.slice_mut::<f32>(), 1);
    over_rows(
        cpu,
        chunks * columns,
        n / chunks,
        out,
        #[inline(always)]
        |range, out| {
            let mut sums = [0f32; BLOCK];
            let (mut start, mut rest) = (range.start, out.elements);
            while start < range.end {
                let (chunk, column) = (start / columns, start % columns);
                let count = BLOCK.min(columns - column).min(range.end - start);
                let (dw, after) = rest.split_at_mut(count);
                let sums = &mut sums[..count];
                for sequence in 0..n / t {
                    sums.fill(0.0);
                    let first = sequence * t + chunk * part;
                    for row in first..first + part {
                        add_row(row, column..column + count, sums);
                    }
                    for (dw, sum) in dw.iter_mut().zip(&*sums) {
                        *dw += sum;
                    }
                }
                (start, rest) = (start + count, after);
            }
        },
    );
}

/// That `dw` can hold, by the chunk rule, the gradient of something `columns` wide that met `n` rows.
pub(super) fn check_chunks(dw: &ViewMut<'_>, n: usize, columns: usize, t: usize) {
    let chunks = dw.shape().rows();
    assert_eq!(dw.shape().columns(), columns, "a gradient {} of rows of {columns}", dw.shape());
    assert_eq!(dw.dtype(), Dtype::F32, "gradients rest in f32");
    assert!(t > 0 && n.is_multiple_of(t), "{n} rows are not whole sequences of {t}");
    assert!(chunks > 0 && t.is_multiple_of(chunks), "sequences of {t} rows in {chunks} equal parts");
}

/// The sum of the rows in the balanced binary tree: adjacent pairs are added, an odd one passes up. dw f32 [chunks, c] -> f32 [c].
pub fn tree_rows(dw: View<'_>) -> Tensor {
    let (chunks, columns) = (dw.shape().rows(), dw.shape().columns());
    assert!(chunks > 0, "a tree over no rows");
    assert_eq!(dw.dtype(), Dtype::F32, "gradients rest in f32");
    let mut total = dw.device().empty([columns], Dtype::F32);
    match dw.device() {
        Device::Cpu(cpu) => {
            let values = dw.slice::<f32>();
            over_rows(
                cpu,
                columns,
                chunks,
                Rows::new(total.view_mut().into_slice::<f32>(), 1),
                #[inline(always)]
                |range, total| {
                    let mut terms = vec![0f32; chunks];
                    for (column, total) in range.zip(total.elements) {
                        for (chunk, term) in terms.iter_mut().enumerate() {
                            *term = values[chunk * columns + column];
                        }
                        *total = tree(&mut terms);
                    }
                },
            );
        }
        Device::Gpu(_) => panic!("not yet on a GPU"),
        Device::Dry(_) => {}
    }
    total
}

/// The sum of `terms` in the balanced binary tree. Leaves partial sums behind in them.
pub(super) fn tree(terms: &mut [f32]) -> f32 {
    let mut count = terms.len();
    while count > 1 {
        for pair in 0..count / 2 {
            terms[pair] = terms[2 * pair] + terms[2 * pair + 1];
        }
        if count % 2 == 1 {
            terms[count / 2] = terms[count - 1];
        }
        count = count.div_ceil(2);
    }
    terms.first().copied().unwrap_or(0.0)
}

/// The index of the first element that is infinite or not a number.
pub fn first_nonfinite(x: View<'_>) -> Option<usize> {
    const PART: usize = 1 << 16;
    match x.device() {
        Device::Cpu(cpu) => dispatch!(x.dtype(), T => {
            let values = x.slice::<T>();
            let find = |(part, values): (usize, &[T])| nonfinite_in(values).map(|i| part * PART + i);
            if values.len() <= PART { find((0, values)) } else { cpu.install(|| values.par_chunks(PART).enumerate().find_map_first(find)) }
        }),
        Device::Gpu(_) => panic!("not yet on a GPU"),
        Device::Dry(_) => None,
    }
}

fn nonfinite_in<T: Element>(values: &[T]) -> Option<usize> {
    // First whether there is one at all: that loop has no exit, so it becomes vector code.
    let any = values.iter().fold(false, |any, x| any | !x.to_f32().is_finite());
    if any { values.iter().position(|x| !x.to_f32().is_finite()) } else { None }
}

/// A sum of squares of f32 without any rounding: of each value with biased exponent e and 24-bit significand m, m * m is added to
/// `by_exponent[e]`. The sum of a whole model's gradient fits: 2^80 terms would.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SquareSum {
    pub by_exponent: [u128; 256],
}

impl Default for SquareSum {
    fn default() -> SquareSum {
        SquareSum { by_exponent: [0; 256] }
    }
}

impl SquareSum {
    pub const BYTES: usize = 256 * 16;

    /// Adds the squares of all elements of an f32 view.
    pub fn add(&mut self, x: View<'_>) {
        const PART: usize = 1 << 18;
        assert_eq!(x.dtype(), Dtype::F32, "squares are summed of f32");
        match x.device() {
            Device::Cpu(cpu) if cpu.threads() > 1 && x.shape().numel() > PART => {
                let parts = x.slice::<f32>().par_chunks(PART);
                let total = cpu.install(|| parts.map(SquareSum::of).reduce(SquareSum::default, SquareSum::merged));
                self.merge(&total);
            }
            Device::Cpu(_) => self.merge(&SquareSum::of(x.slice::<f32>())),
            Device::Gpu(_) => panic!("not yet on a GPU"),
            Device::Dry(_) => {}
        }
    }

    fn of(values: &[f32]) -> SquareSum {
        let mut sum = SquareSum::default();
        sum.add_here(values);
        sum
    }

    fn merged(mut self, other: SquareSum) -> SquareSum {
        self.merge(&other);
        self
    }

    fn add_here(&mut self, values: &[f32]) {
        // A square has at most 48 bits: 2^16 of them fit a u64. Neighbours often share an exponent: in four tables they need not wait.
        const MOST: usize = 1 << 16;
        for block in values.chunks(MOST) {
            let mut tables = [[0u64; 256]; 4];
            let (fours, rest) = block.as_chunks::<4>();
            for four in fours {
                for (table, x) in tables.iter_mut().zip(four) {
                    let (exponent, square) = exponent_and_square(*x);
                    table[exponent as usize] += square;
                }
            }
            for x in rest {
                let (exponent, square) = exponent_and_square(*x);
                tables[0][exponent as usize] += square;
            }
            for (exponent, sum) in self.by_exponent.iter_mut().enumerate() {
                *sum += tables.iter().map(|table| table[exponent] as u128).sum::<u128>();
            }
        }
    }

    pub fn merge(&mut self, other: &SquareSum) {
        for (sum, other) in self.by_exponent.iter_mut().zip(&other.by_exponent) {
            *sum += other;
        }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        self.by_exponent.iter().flat_map(|sum| sum.to_le_bytes()).collect()
    }

    /// The reverse of `to_bytes`.
    pub fn from_bytes(bytes: &[u8]) -> SquareSum {
        assert_eq!(bytes.len(), SquareSum::BYTES, "a sum of squares is 256 numbers of 16 bytes");
        let mut sum = SquareSum::default();
        for (sum, bytes) in sum.by_exponent.iter_mut().zip(bytes.as_chunks::<16>().0) {
            *sum = u128::from_le_bytes(*bytes);
        }
        sum
    }

    /// False if an infinity or a NaN was added.
    pub fn is_finite(&self) -> bool {
        self.by_exponent[255] == 0
    }

    /// The square root of the sum, which is rounded once, to f64, before. NaN if a term was not finite.
    pub fn root(&self) -> f64 {
        if !self.is_finite() {
            return f64::NAN;
        }
        // The sum as an integer of 64-bit limbs, in units of 2^-298: the square of the least denormal.
        let mut limbs = [0u64; 12];
        for (exponent, &sum) in self.by_exponent.iter().enumerate().filter(|(_, sum)| **sum != 0) {
            add_shifted(&mut limbs, sum, 2 * (exponent.max(1) - 1));
        }
        rounded(&limbs, -298).sqrt()
    }
}

#[inline(always)]
fn exponent_and_square(x: f32) -> (u8, u64) {
    let bits = x.to_bits();
    let exponent = (bits >> 23) as u8;
    let significand = (bits & 0x7f_ffff) | (((exponent != 0) as u32) << 23);
    (exponent, significand as u64 * significand as u64)
}

/// limbs += value * 2^shift
fn add_shifted(limbs: &mut [u64; 12], value: u128, shift: usize) {
    let (limb, bit) = (shift / 64, shift % 64);
    let low = value << bit;
    let high = if bit == 0 { 0 } else { (value >> (128 - bit)) as u64 };
    let mut carry = 0u128;
    for (i, limb) in limbs[limb..].iter_mut().enumerate() {
        let term = [low as u64, (low >> 64) as u64, high].get(i).copied().unwrap_or(0);
        carry += *limb as u128 + term as u128;
        *limb = carry as u64;
        carry >>= 64;
    }
    assert_eq!(carry, 0, "768 bits hold every sum of squares");
}

/// The integer in `limbs` times 2^exponent, rounded to nearest even.
fn rounded(limbs: &[u64; 12], exponent: i32) -> f64 {
    let Some(top) = limbs.iter().rposition(|&limb| limb != 0) else { return 0.0 };
    let length = 64 * top + 64 - limbs[top].leading_zeros() as usize;
    let bits_from = |start: usize| {
        let below = limbs[start / 64] >> (start % 64);
        let above = if start.is_multiple_of(64) { 0 } else { limbs.get(start / 64 + 1).map_or(0, |limb| limb << (64 - start % 64)) };
        below | above
    };
    // The top 64 bits; the last of them stands for all that is below, so that the conversion to f64 rounds as the whole would.
    let start = length.saturating_sub(64);
    let sticky = (0..start).any(|bit| limbs[bit / 64] >> (bit % 64) & 1 == 1);
    let leading = bits_from(start) | sticky as u64;
    leading as f64 * power_of_two(start as i32 + exponent)
}

fn power_of_two(exponent: i32) -> f64 {
    assert!((-1022..=1023).contains(&exponent), "2^{exponent} is not a normal f64");
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// A sum of per-token losses in integer units of 2^-60, so that it does not depend on any order. What is smaller is cut off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LossSum {
    pub units: i128,
    /// A term was infinite, not a number, or beyond 2^63.
    pub nonfinite: bool,
}

impl LossSum {
    pub const BYTES: usize = 17;

    /// Adds all elements of an f32 view.
    pub fn add(&mut self, losses: View<'_>) {
        assert_eq!(losses.dtype(), Dtype::F32, "losses are f32");
        match losses.device() {
            Device::Cpu(_) => losses.slice::<f32>().iter().for_each(|&loss| self.add_one(loss)),
            Device::Gpu(_) => panic!("not yet on a GPU"),
            Device::Dry(_) => {}
        }
    }

    fn add_one(&mut self, loss: f32) {
        if loss.abs() < power_of_two(63) as f32 {
            self.units += (loss as f64 * power_of_two(60)) as i128;
        } else {
            self.nonfinite = true;
        }
    }

    pub fn merge(&mut self, other: &LossSum) {
        self.units += other.units;
        self.nonfinite |= other.nonfinite;
    }

    /// NaN if a term was not finite.
    pub fn value(&self) -> f64 {
        if self.nonfinite { f64::NAN } else { self.units as f64 * power_of_two(-60) }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.units.to_le_bytes().to_vec();
        bytes.push(self.nonfinite as u8);
        bytes
    }

    /// The reverse of `to_bytes`.
    pub fn from_bytes(bytes: &[u8]) -> LossSum {
        let Some((units, [flag])) = bytes.split_first_chunk::<16>() else {
            panic!("a sum of losses is {} bytes, not {}", LossSum::BYTES, bytes.len())
        };
        LossSum { units: i128::from_le_bytes(*units), nonfinite: *flag != 0 }
    }
}
