//! Random numbers as a function of position: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11), keyed by a seed and a stream name.
//!
//! Invariant: nothing here has state. A value is f(seed, stream, index), so it is the same on every rank, layout and resume.

use std::f64::consts::TAU;

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

    /// Standard normal, by Box-Muller on one block for each index.
    pub fn normal(&self, index: u64) -> f64 {
        let [a, b, c, d] = self.block(index);
        let unit = |low: u32, high: u32| ((((low as u64) | ((high as u64) << 32)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        (-2.0 * unit(a, b).ln()).sqrt() * (TAU * unit(c, d)).cos()
    }
}

/// FNV-1a, 64 bits: names become stream tags.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3))
}

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

    #[test]
    fn normal_has_the_moments_of_a_normal() {
        let stream = Stream::new(1, "moments");
        let draws: Vec<f64> = (0..100_000).map(|i| stream.normal(i)).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
    }
}
