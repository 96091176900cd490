//! Sums of squares of f32 without any rounding, in vectors.
//!
//! A square of an f32 is exact in f64. Blocks of numbers whose exponents are not too far apart are summed in a few columns of f64, each
//! for a stretch of 44 bits: a square leaves in a column what is a multiple of the column's unit, and hands on the rest. All of that is
//! exact, so the columns of a block are integers, which are added to the entries of the table that have their units.
//!
//! Invariant: the total of the table grows by exactly the sum of the squares; which entries it is spread over depends on the blocks.

use crate::device::cpu::Isa;
use crate::device::cpu::micro::prefetch;
use crate::device::cpu::widest::widest;

/// Entry e counts squares of the last place of numbers whose biased exponent is e: units of 2^(2 max(e, 1) - 300). What is added to the
/// last is the square of the significand of an infinity or a NaN, so that it tells that there was one.
pub type Table = [u128; 256];

/// Numbers of a block: they stay in the first-level cache, and each lane adds 2^8 of them.
const BLOCK: usize = 4096;
const LANES: usize = 16;
/// Bits of a square that a column keeps. With 2^8 squares to a lane, sums have 44 + 8 bits, fewer than the 53 of f64.
const STRETCH: i32 = 44;
/// Bits that the last column may have to keep: what is handed to it has a sign and is half a unit of the column before at most.
const LAST: i32 = 46;
/// From this biased exponent on, the first column would have no entry of the table.
const HIGHEST: u32 = 252;

/// Adds the squares of `values` to `table`.
pub fn add(isa: Isa, values: &[f32], table: &mut Table) {
    for block in values.chunks(BLOCK) {
        let (least, most) = widest(
            isa,
            #[inline(always)]
            || magnitudes(block),
        );
        if most == 0 {
            continue;
        }
        // The exponents of the least and the greatest magnitude; denormals have the last place of exponent 1.
        let (low, high) = ((least >> 23).max(1), (most >> 23).max(1));
        let (bottom, top) = (2 * low as i32 - 300, 2 * high as i32 - 252);
        let columns = (top - bottom - LAST + STRETCH - 1).div_euclid(STRETCH) + 1;
        match columns {
            _ if high > HIGHEST => plain(block, table),
            ..=2 => columns_of::<2>(isa, block, top, bottom, table),
            3 => columns_of::<3>(isa, block, top, bottom, table),
            4 => columns_of::<4>(isa, block, top, bottom, table),
            _ => plain(block, table),
        }
    }
}

/// The bits of the least magnitude that is not zero and those of the greatest; without any, the latter is 0.
#[inline(always)]
fn magnitudes(values: &[f32]) -> (u32, u32) {
    let (mut least, mut most) = (u32::MAX, 0);
    for x in values {
        let magnitude = x.to_bits() & 0x7fff_ffff;
        most = most.max(magnitude);
        // Zero becomes the greatest.
        least = least.min(magnitude.wrapping_sub(1));
    }
    (least.wrapping_add(1), most)
}

/// Adds the squares of a block, which are below 2^top and multiples of 2^bottom.
fn columns_of<const N: usize>(isa: Isa, block: &[f32], top: i32, bottom: i32, table: &mut Table) {
    // The exponents of the columns' units, from the left.
    let mut units: [i32; N] = std::array::from_fn(|column| top - STRETCH * (column as i32 + 1));
    units[N - 1] = bottom;
    // A number that has the unit as its last place: adding and subtracting it rounds to whole units. The first column's stays added, so
    // that its sum rounds by itself: all its terms are positive, and 2^8 of them are less than the number.
    let mut rounders: [f64; N] = units.map(|unit| 1.5 * power_of_two(52 + unit));
    rounders[0] = power_of_two(52 + units[0]);
    let sums = widest(
        isa,
        #[inline(always)]
        || sums(block, &rounders),
    );
    let mut carry = 0i128;
    for column in (0..N).rev() {
        let in_units = power_of_two(-units[column]);
        let whole = sums[column].iter().map(|sum| (sum * in_units) as i64 as i128).sum::<i128>() + carry;
        // Rests have signs; what a column lacks is taken from the one before, and all of them together are not negative.
        let kept = if column == 0 { whole } else { whole & ((1 << (units[column - 1] - units[column])) - 1) };
        carry = if column == 0 { 0 } else { (whole - kept) >> (units[column - 1] - units[column]) };
        table[((units[column] + 300) / 2) as usize] += u128::try_from(kept).expect("a sum of squares is not negative");
    }
}

#[inline(always)]
fn sums<const N: usize>(block: &[f32], rounders: &[f64; N]) -> [[f64; LANES]; N] {
    let mut sums = [[0f64; LANES]; N];
    sums[0] = [rounders[0]; LANES];
    let (chunks, rest) = block.as_chunks::<LANES>();
    for values in chunks {
        // The next block comes while this one is computed.
        prefetch(values.as_ptr().wrapping_add(BLOCK));
        add_squares(values, rounders, &mut sums);
    }
    let mut last = [0f32; LANES];
    last[..rest.len()].copy_from_slice(rest);
    add_squares(&last, rounders, &mut sums);
    sums[0].iter_mut().for_each(|sum| *sum -= rounders[0]);
    sums
}

#[inline(always)]
fn add_squares<const N: usize>(values: &[f32; LANES], rounders: &[f64; N], sums: &mut [[f64; LANES]; N]) {
    for lane in 0..LANES {
        let x = values[lane] as f64;
        let sum = x.mul_add(x, sums[0][lane]);
        let mut rest = x.mul_add(x, sums[0][lane] - sum);
        sums[0][lane] = sum;
        for column in 1..N - 1 {
            let kept = (rest + rounders[column]) - rounders[column];
            sums[column][lane] += kept;
            rest -= kept;
        }
        sums[N - 1][lane] += rest;
    }
}

fn power_of_two(exponent: i32) -> f64 {
    assert!((-1022..=1023).contains(&exponent), "2^{exponent} is not a normal f64");
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// The definition: of each number, the square of its significand counts in the entry of its exponent.
fn plain(values: &[f32], table: &mut Table) {
    for x in values {
        let bits = x.to_bits();
        let exponent = (bits >> 23) & 0xff;
        let significand = (bits & 0x7f_ffff) | (((exponent != 0) as u32) << 23);
        table[exponent as usize] += significand as u128 * significand as u128;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// A table with each entry below 4: one for each sum.
    fn total(table: &Table) -> Vec<u8> {
        let mut digits = vec![0u8; 1024];
        let mut carry = 0u128;
        for (place, digit) in digits.iter_mut().enumerate() {
            // Entries 0 and 1 have the same units.
            let entry = if place == 0 { table[0] + table[1] } else { table.get(place + 1).filter(|_| place < 254).copied().unwrap_or(0) };
            carry += entry;
            *digit = (carry & 3) as u8;
            carry >>= 2;
        }
        assert_eq!(carry, 0);
        digits
    }

    #[test]
    fn vectors_add_what_the_definition_adds() {
        let stream = Stream::new(1, "squares");
        let random = |count: u64, spread: f64| -> Vec<f32> {
            (0..count).map(|i| (stream.normal(2 * i) * (stream.normal(2 * i + 1) * spread).exp()) as f32).collect()
        };
        let mut cases =
            vec![vec![], vec![0.0; 5000], vec![-0.0, 1e-45], vec![f32::MAX; 5001], vec![f32::from_bits((252 << 23) | 0x7f_ffff); 9000]];
        for (count, spread) in [(1, 0.0), (15, 0.5), (17, 1.0), (4095, 0.0), (4097, 2.0), (20_000, 4.0), (50_001, 8.0), (9000, 15.0)] {
            let mut values = random(count, spread);
            cases.push(values.clone());
            values.iter_mut().for_each(|x| *x *= 1e-36);
            cases.push(values.clone());
            for (i, x) in values.iter_mut().enumerate().filter(|(i, _)| i % 3 != 0) {
                *x = if i % 3 == 1 { 0.0 } else { f32::from_bits(i as u32) };
            }
            cases.push(values);
        }
        let special = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        cases.extend(special.map(|x| [vec![1.0; 100], vec![x], vec![1e30; 7]].concat()));
        for values in cases {
            let mut expected = [0; 256];
            plain(&values, &mut expected);
            for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|&isa| isa <= Isa::detect()) {
                let mut table = [0; 256];
                add(isa, &values, &mut table);
                assert_eq!((total(&table), table[255] == 0), (total(&expected), expected[255] == 0), "{} values, {isa:?}", values.len());
                assert_eq!(table[255], expected[255], "what is not finite");
            }
        }
    }
}
