//! Sums that are exact, because they are sums of integers: of squares, and of losses.
//!
//! Invariant: a sum does not depend on the order of its terms, nor on how they are grouped. On a GPU (`cuda/exact.cu`) terms are added in
//! other units, but to the same total.

use crate::args;
use crate::device::Device;
use crate::device::cpu::{Isa, squares};
use crate::device::gpu::driver::Grid;
use crate::device::tensor::{Tensor, View};
use crate::dtype::Dtype;
use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;

/// A sum of squares of f32 without any rounding: `by_exponent[e]` counts squares of the last place of numbers whose biased exponent is e.
///
/// The square of a value with exponent e may be spread over entries, `by_exponent[e + 2]` at most (`device/cpu/squares.rs`); a GPU adds it to
/// e or a lower entry, in whose units it has up to 78 bits: a sum of 2^50 terms fits.
#[derive(Clone, Debug)]
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
    /// Words of an entry on a GPU, 64 bits each; the entries, and as many u32.
    const LIMBS: usize = 3;
    const TABLE: usize = 256 * SquareSum::LIMBS * 2;

    /// Adds the squares of all elements of f32 views. On a GPU that ends with waiting for it.
    pub fn add<'a>(&mut self, all: impl IntoIterator<Item = View<'a>>) {
        let mut table: Option<Tensor> = None;
        for x in all {
            assert_eq!(x.dtype(), Dtype::F32, "squares are summed of f32");
            table = table.or_else(|| zeroed_scratch(x.device(), SquareSum::TABLE));
            self.add_view(x, table.as_mut());
        }
        let Some(table) = table else { return };
        for (sum, limbs) in self.by_exponent.iter_mut().zip(words(&table).as_chunks::<{ SquareSum::LIMBS }>().0) {
            *sum += limbs.iter().rev().fold(0, |sum, &limb| (sum << 32) + limb as u128);
        }
    }

    fn add_view(&mut self, x: View<'_>, table: Option<&mut Tensor>) {
        const PART: usize = 1 << 18;
        // What a kernel may be given at once: its tables do not overflow then.
        const MOST: usize = 1 << 30;
        match x.device() {
            Device::Cpu(cpu) if cpu.threads() > 1 && x.shape().numel() > PART => {
                let parts = x.slice::<f32>().par_chunks(PART);
                let total = cpu.install(|| parts.map(|part| SquareSum::of(cpu.isa(), part)).reduce(SquareSum::default, SquareSum::merged));
                self.merge(&total);
            }
            Device::Cpu(cpu) => squares::add(cpu.isa(), x.slice::<f32>(), &mut self.by_exponent),
            Device::Gpu(gpu) => {
                let (table, count) = (table.expect("scratch of a GPU"), x.shape().numel());
                for start in (0..count).step_by(MOST) {
                    let part = x.part(start..(start + MOST).min(count), [MOST.min(count - start)]);
                    // Four tiles of the kernel for each block, before its table goes to the common one.
                    let grid = Grid::over(part.shape().numel(), 4 * 4096, 256);
                    gpu.launch("exact_squares", grid, &args![table.view_mut(), part, part.shape().numel()]);
                }
            }
            Device::Dry(_) => {}
        }
    }

    fn of(isa: Isa, values: &[f32]) -> SquareSum {
        let mut sum = SquareSum::default();
        squares::add(isa, values, &mut sum.by_exponent);
        sum
    }

    fn merged(mut self, other: SquareSum) -> SquareSum {
        self.merge(&other);
        self
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
        rounded(&self.total(), -298).sqrt()
    }

    /// The sum as an integer of 64-bit limbs, in units of 2^-298: the square of the least denormal.
    fn total(&self) -> [u64; 12] {
        let mut limbs = [0u64; 12];
        for (exponent, &sum) in self.by_exponent.iter().enumerate().filter(|(_, sum)| **sum != 0) {
            add_shifted(&mut limbs, sum, 2 * (exponent.max(1) - 1));
        }
        limbs
    }
}

/// Sums are equal where their totals are, whatever the entries these are made of.
impl PartialEq for SquareSum {
    fn eq(&self, other: &SquareSum) -> bool {
        self.is_finite() == other.is_finite() && self.total() == other.total()
    }
}

impl Eq for SquareSum {}

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

/// A sum of per-token losses in integer units of 2^-60, so that it does not depend on any order: not even beyond 2^67, where it wraps around.
/// What is smaller than a unit is cut off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LossSum {
    pub units: i128,
    /// A term was infinite, not a number, or beyond 2^63.
    pub nonfinite: bool,
}

impl LossSum {
    pub const BYTES: usize = 17;

    fn add_one(&mut self, loss: f32) {
        if loss.abs() < power_of_two(63) as f32 {
            self.units = self.units.wrapping_add((loss as f64 * power_of_two(60)) as i128);
        } else {
            self.nonfinite = true;
        }
    }

    pub fn merge(&mut self, other: &LossSum) {
        self.units = self.units.wrapping_add(other.units);
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

/// A sum of losses to which more are added. On a GPU it is there until somebody asks for it.
#[derive(Debug, Default)]
pub struct LossTotal {
    on_host: LossSum,
    on_gpu: Option<Tensor>,
}

impl LossTotal {
    /// Words of the sum on a GPU, and of how many terms were not finite.
    const LIMBS: usize = 4;
    const TABLE: usize = (LossTotal::LIMBS + 1) * 2;

    /// Adds all elements of an f32 view.
    pub fn add(&mut self, losses: View<'_>) {
        assert_eq!(losses.dtype(), Dtype::F32, "losses are f32");
        if self.on_gpu.is_none() {
            self.on_gpu = zeroed_scratch(losses.device(), LossTotal::TABLE);
        }
        match losses.device() {
            Device::Cpu(_) => losses.slice::<f32>().iter().for_each(|&loss| self.on_host.add_one(loss)),
            Device::Gpu(gpu) => {
                let (table, count) = (self.on_gpu.as_mut().expect("scratch of a GPU"), losses.shape().numel());
                gpu.launch("exact_losses", Grid::over(count, 256, 256), &args![table.view_mut(), losses, count]);
            }
            Device::Dry(_) => {}
        }
    }

    /// The sum so far. Waits for the GPU, if there is one.
    pub fn sum(&self) -> LossSum {
        let mut sum = self.on_host;
        if let Some(table) = &self.on_gpu {
            let words = words(table);
            let (limbs, nonfinite) = words.split_at(LossTotal::LIMBS);
            let units = limbs.iter().rev().fold(0i128, |units, &limb| units.wrapping_shl(32).wrapping_add(limb as i64 as i128));
            sum.units = sum.units.wrapping_add(units);
            sum.nonfinite |= nonfinite[0] != 0;
        }
        sum
    }
}

/// Zeros, where the device is a GPU.
fn zeroed_scratch(device: &Device, words: usize) -> Option<Tensor> {
    let mut table = device.gpu_scratch([words], Dtype::U32)?;
    table.view_mut().fill_zero();
    Some(table)
}

/// The 64-bit words of a table.
fn words(table: &Tensor) -> Vec<u64> {
    table.to_vec::<u32>().as_chunks::<2>().0.iter().map(|&[low, high]| low as u64 | (high as u64) << 32).collect()
}
