//! Random numbers as a function of position: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11), keyed by a seed and a stream name.
//!
//! Invariant: nothing here has state. A value is f(seed, stream, index), so it is the same on every rank, layout and resume.

use crate::elementary::{ln_of_normal, sine_cosine_of_small};
use std::f64::consts::FRAC_PI_2;

/// One named sequence of random words, addressed by index.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: [u32; 2],
    tag: u64,
}

impl Stream {
    pub fn new(seed: u64, name: &str) -> Stream {
        Stream { key: [seed as u32, (seed >> 32) as u32], tag: fnv1a(name.as_bytes()) }
    }

    /// The seed and the name's tag: all that a block depends on, beside its index.
    pub fn seed_and_tag(&self) -> (u64, u64) {
        (self.key[0] as u64 | (self.key[1] as u64) << 32, self.tag)
    }

    /// The `index`-th block of four words.
    #[inline(always)]
    pub fn block(&self, index: u64) -> [u32; 4] {
        philox([index as u32, (index >> 32) as u32, self.tag as u32, (self.tag >> 32) as u32], self.key)
    }

    pub fn word(&self, index: u64) -> u64 {
        let [a, b, _, _] = self.block(index);
        (a as u64) | ((b as u64) << 32)
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&self, index: u64) -> f64 {
        (self.word(index) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal. Two neighbours share a block: an even number and the one after it.
    pub fn normal(&self, index: u64) -> f64 {
        let [a, b, c, d] = self.block(index / 2);
        let (even, odd) = point(radius_of((a as u64) | ((b as u64) << 32)), (c as u64) | ((d as u64) << 32));
        if index.is_multiple_of(2) { even } else { odd }
    }

    /// The normals 2 p and 2 p + 1 of each p = `pair(0)`, `pair(1)`, ... For loops that are compiled to vector instructions.
    #[inline(always)]
    pub fn normal_pairs(&self, pair: impl Fn(usize) -> u64, even: &mut [f64; PAIRS], odd: &mut [f64; PAIRS]) {
        let (mut distances, mut directions) = ([0; PAIRS], [0; PAIRS]);
        // Short loops, one after the other: of each, a processor has several rounds under way at once.
        for lane in 0..PAIRS {
            let index = pair(lane);
            let [a, b, c, d] = philox([index as u32, (index >> 32) as u32, self.tag as u32, (self.tag >> 32) as u32], self.key);
            distances[lane] = (a as u64) | ((b as u64) << 32);
            directions[lane] = (c as u64) | ((d as u64) << 32);
        }
        for (radius, distance) in even.iter_mut().zip(distances) {
            *radius = radius_of(distance);
        }
        for lane in 0..PAIRS {
            (even[lane], odd[lane]) = point(even[lane], directions[lane]);
        }
    }
}

/// Pairs that `normal_pairs` makes in one call.
pub const PAIRS: usize = 64;

/// 52 random bits behind it make an f64 that is evenly within [1, 2), and this much is half of their last place.
const ONE: u64 = 1.0f64.to_bits();
const HALF_STEP: f64 = f64::EPSILON / 2.0;

/// Two independent standard normals are, as Box and Muller saw, a point of the plane in an even direction: this is its distance.
#[inline(always)]
fn radius_of(word: u64) -> f64 {
    // Within (0, 1), with neither end.
    let uniform = f64::from_bits((word >> 12) | ONE) - (1.0 - HALF_STEP);
    (-2.0 * ln_of_normal(uniform)).sqrt()
}

/// The point at that distance, in the direction that a word says.
#[inline(always)]
fn point(radius: f64, word: u64) -> (f64, f64) {
    // Within an eighth of a turn of the first axis; the top bits mirror that to its other side, and then to the second axis.
    let turn = (f64::from_bits((word << 2 >> 12) | ONE) - 1.5) + HALF_STEP;
    let (sine, cosine) = sine_cosine_of_small(turn * FRAC_PI_2);
    let (along, across) = (f64::from_bits((radius * cosine).to_bits() ^ (word & 1 << 63)), radius * sine);
    if word & 1 << 62 == 0 { (along, across) } else { (across, along) }
}

/// FNV-1a, 64 bits: names become stream tags.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3))
}

#[inline(always)]
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = 0xD251_1F53u64 * counter[0] as u64;
        let b = 0xCD9E_8D57u64 * counter[2] as u64;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the Random123 library.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    const DRAWS: usize = 1 << 20;

    fn draws(name: &str) -> Vec<f64> {
        let stream = Stream::new(1, name);
        let (mut even, mut odd) = ([0.0; PAIRS], [0.0; PAIRS]);
        let mut draws = Vec::with_capacity(DRAWS);
        while draws.len() < DRAWS {
            let first = draws.len() as u64 / 2;
            stream.normal_pairs(|lane| first + lane as u64, &mut even, &mut odd);
            draws.extend(even.iter().zip(&odd).flat_map(|(&even, &odd)| [even, odd]));
        }
        draws
    }

    fn mean(values: impl Iterator<Item = f64>) -> f64 {
        values.sum::<f64>() / DRAWS as f64
    }

    /// The chance of a standard normal below x, by its series.
    fn below(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..300 {
            term *= x * x / (2 * n + 1) as f64;
            sum += term;
        }
        0.5 + sum * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
    }

    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let draws = draws("moments");
        // Standard errors of the moments of so many draws are the roots of 1, 2, 15 and 96 over their root.
        for (power, expected, error) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0f64)] {
            let moment = mean(draws.iter().map(|x| x.powi(power)));
            assert!((moment - expected).abs() < 4.0 * (error / DRAWS as f64).sqrt(), "moment {power}: {moment}");
        }
        // The two of a pair, and neighbours of two pairs, know nothing of each other.
        for apart in [1, 2, 3] {
            for power in [1, 2] {
                let centred: Vec<f64> = draws.iter().map(|x| x.powi(power) - (power - 1) as f64).collect();
                let together = mean(centred.iter().zip(&centred[apart..]).map(|(x, y)| x * y));
                assert!(together.abs() < 4.0 * 2.0 / (DRAWS as f64).sqrt(), "{apart} apart, power {power}: {together}");
            }
        }
    }

    #[test]
    fn normals_are_spread_as_a_normal_is() {
        let mut draws = draws("spread");
        draws.sort_by(f64::total_cmp);
        let distance = |(i, &x): (usize, &f64)| f64::max((i + 1) as f64 / DRAWS as f64 - below(x), below(x) - i as f64 / DRAWS as f64);
        let farthest = draws.iter().enumerate().map(distance).fold(0.0, f64::max);
        // Kolmogorov and Smirnov: a greater distance has a chance of 1 in 1500.
        assert!(farthest * (DRAWS as f64).sqrt() < 2.0, "{farthest}");
        for ends in [2.0, 3.0, 4.0] {
            let expected = 2.0 * below(-ends) * DRAWS as f64;
            let found = draws.iter().filter(|x| x.abs() > ends).count() as f64;
            assert!((found - expected).abs() < 4.0 * expected.sqrt(), "beyond {ends}: {found}, and {expected} are expected");
        }
    }

    #[test]
    fn normals_are_what_the_mathematical_library_makes_of_their_words() {
        let expected = |[distance, direction]: [u64; 2]| {
            let steps = |word: u64| (word >> 12) as f64 + 0.5;
            let radius = (-2.0 * (steps(distance) / 2f64.powi(52)).ln()).sqrt();
            let angle = (steps(direction << 2) / 2f64.powi(52) - 0.5) * FRAC_PI_2;
            let (x, y) = (radius * angle.cos() * if direction >> 63 == 1 { -1.0 } else { 1.0 }, radius * angle.sin());
            if direction >> 62 & 1 == 1 { (y, x) } else { (x, y) }
        };
        let check = |words: [u64; 2], (x, y): (f64, f64)| {
            let (a, b) = expected(words);
            assert!((x / a - 1.0).abs() < 1e-13 && (y / b - 1.0).abs() < 1e-13, "{words:x?}: {x} {y}, not {a} {b}");
        };
        let stream = Stream::new(3, "words");
        for pair in 0..50_000 {
            let [a, b, c, d] = stream.block(pair);
            let words = [a as u64 | (b as u64) << 32, c as u64 | (d as u64) << 32];
            check(words, (stream.normal(2 * pair), stream.normal(2 * pair + 1)));
        }
        for distance in [0, 1 << 12, u64::MAX] {
            for direction in [0, 1 << 61, 1 << 62, 1 << 63, u64::MAX] {
                check([distance, direction], point(radius_of(distance), direction));
            }
        }
        assert!((radius_of(0) - 8.57).abs() < 0.01 && radius_of(u64::MAX) > 1e-9);
    }

    /// Weights of all runs follow from these bits.
    #[test]
    fn normals_have_the_same_bits_everywhere() {
        let stream = Stream::new(1, "model.embed_tokens.weight");
        let bits = [0, 1, 2, 1 << 40].map(|index| stream.normal(index).to_bits());
        assert_eq!(bits, [0x3ff8_2569_a27d_42e3, 0x3ffb_66c1_9c29_3000, 0x3fb2_40b4_2190_7ea6, 0xbfd3_694d_35a0_cd78]);
    }
}
