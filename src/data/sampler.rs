//! Which tokens a row of a step is.
//!
//! Samples are numbered through the whole run: row r of step s is sample `s * global_batch + r`. A fixed pattern of slots deals the samples
//! out to the sources by weight; each source counts its own, and starts its next epoch when it runs out.
//!
//! Invariant: pure, with no table that grows with the data. A row is a function of (lengths, weights, order, seed, step, row).

use crate::rng::Stream;
use anyhow::{Result, ensure};

/// The length of the pattern by which several sources take turns: weights are kept to one part in so many.
const PERIOD: usize = 1 << 14;

/// Rounds of the Feistel network. Four make a pseudo-random permutation from ideal round functions; twice as many cost little and leave
/// room for the short words of small corpora.
const ROUNDS: u64 = 8;

/// The order of a source's samples within an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As they lie in the files.
    Sequential,
    /// By a permutation that is computed, not stored; another one in each epoch.
    Shuffled,
}

/// One row: `seq_len + 1` tokens of a source from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    pub source: usize,
    /// The first token, counted over all files of the source.
    pub start: usize,
    /// How often the source was read through before, from 0.
    pub epoch: u64,
}

/// A source as the sampler sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    /// What messages call it.
    pub name: String,
    pub tokens: usize,
    pub weight: f64,
}

#[derive(Clone, Debug)]
pub struct Sampler {
    order: Order,
    seed: u64,
    seq_len: usize,
    global_batch: usize,
    /// Tokens of each source.
    tokens: Vec<usize>,
    blend: Blend,
}

impl Sampler {
    pub fn new(order: Order, seed: u64, seq_len: usize, global_batch: usize, shares: &[Share]) -> Result<Sampler> {
        ensure!(seq_len > 0, "train.seq_len = 0: a row needs at least one token");
        ensure!(global_batch > 0, "train.global_batch_size = 0: a step needs at least one row");
        for share in shares {
            ensure!(
                share.tokens > seq_len,
                "{} holds {} tokens, but one row takes train.seq_len + 1 = {}: give it more text or lower train.seq_len",
                share.name,
                share.tokens,
                seq_len + 1
            );
        }
        let blend = Blend::new(shares)?;
        Ok(Sampler { order, seed, seq_len, global_batch, tokens: shares.iter().map(|share| share.tokens).collect(), blend })
    }

    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    pub fn global_batch(&self) -> usize {
        self.global_batch
    }

    /// The number of sources.
    pub fn sources(&self) -> usize {
        self.tokens.len()
    }

    /// Row `row` of step `step`, both from 0.
    pub fn row(&self, step: u64, row: usize) -> Sample {
        assert!(row < self.global_batch, "row {row} of a batch of {}", self.global_batch);
        self.sample(step * self.global_batch as u64 + row as u64)
    }

    /// The `n`-th sample of the run.
    pub fn sample(&self, n: u64) -> Sample {
        let (source, turn) = self.blend.source(n);
        let count = self.samples_of(source);
        let (epoch, position) = (turn / count, turn % count);
        let start = match self.order {
            Order::Sequential => position as usize * self.seq_len,
            Order::Shuffled => {
                let index = permute(&self.stream("order", source, epoch), count, position);
                self.offset(source, epoch) + index as usize * self.seq_len
            }
        };
        Sample { source, start, epoch }
    }

    /// How many samples there are, from sample 0 on, before one of the sources starts over. A validation set is read no further.
    pub fn samples_before_repeat(&self) -> u64 {
        (0..self.tokens.len()).map(|source| self.blend.sample_of(source, self.samples_of(source))).min().unwrap_or(0)
    }

    /// Windows of a source in one epoch: neighbours share one token, the last target of one and the first input of the next.
    fn samples_of(&self, source: usize) -> u64 {
        ((self.tokens[source] - 1) / self.seq_len) as u64
    }

    /// Where the first window of an epoch starts. The tokens that do not fill a last window are left out at the end in the first epoch, and
    /// anywhere between start and end in later ones: so each is read in some epoch, and the cuts between windows move.
    fn offset(&self, source: usize, epoch: u64) -> usize {
        let spare = (self.tokens[source] - 1) % self.seq_len;
        if epoch == 0 { 0 } else { (self.stream("offset", source, epoch).word(0) % (spare as u64 + 1)) as usize }
    }

    fn stream(&self, purpose: &str, source: usize, epoch: u64) -> Stream {
        Stream::new(self.seed, &format!("data {purpose} {source} {epoch}"))
    }
}

/// The place of `index` among 0..count, in an order that the stream decides: a Feistel network over the next even power of two, repeated
/// until it lands inside. It is a bijection whatever the round function is.
fn permute(stream: &Stream, count: u64, index: u64) -> u64 {
    assert!(index < count, "index {index} of {count}");
    let half = half_width(count);
    let mask = (1u64 << half) - 1;
    let mut place = index;
    loop {
        let (mut left, mut right) = (place >> half, place & mask);
        for round in 0..ROUNDS {
            // `right` has at most 32 bits, so each (round, right) has its own word.
            let word = stream.word(round << 32 | right);
            (left, right) = (right, left ^ (word & mask));
        }
        place = left << half | right;
        if place < count {
            return place;
        }
    }
}

/// Half the bits of the network: wide enough for `count`, and at least three, below which too few permutations could come out.
fn half_width(count: u64) -> u32 {
    let bits = u64::BITS - (count - 1).leading_zeros();
    bits.div_ceil(2).max(3)
}

/// A pattern of slots, repeated for ever, that says which source a sample is from.
#[derive(Clone, Debug)]
struct Blend {
    /// For each slot its source and how many slots of that source came before it in the pattern.
    slots: Vec<(u32, u32)>,
    /// For each source the slots that are its own, in order.
    of_source: Vec<Vec<u32>>,
}

impl Blend {
    fn new(shares: &[Share]) -> Result<Blend> {
        ensure!(!shares.is_empty(), "data.sources is empty: name at least one");
        for Share { name, weight, .. } in shares {
            ensure!(weight.is_finite() && *weight > 0.0, "{name} has weight {weight}; a weight is a positive number");
        }
        let weights: Vec<f64> = shares.iter().map(|share| share.weight).collect();
        let counts = if weights.len() == 1 { vec![1] } else { allot(&weights, PERIOD) };
        for (share, &count) in shares.iter().zip(&counts) {
            ensure!(
                count > 0,
                "{} has weight {}, {:.2e} of the whole: less than the smallest part that can be drawn, {:.2e}",
                share.name,
                share.weight,
                share.weight / weights.iter().sum::<f64>(),
                1.0 / PERIOD as f64
            );
        }
        // The k-th of a source's `count` slots belongs in the middle of the k-th of `count` equal parts of the pattern.
        let mut wanted: Vec<(u64, u32, u32)> = Vec::new();
        for (source, &count) in counts.iter().enumerate() {
            wanted.extend((0..count).map(|k| (((2 * k as u64 + 1) << 32) / (2 * count as u64), source as u32, k as u32)));
        }
        wanted.sort_unstable();
        let mut of_source = vec![Vec::new(); shares.len()];
        for (slot, &(_, source, _)) in wanted.iter().enumerate() {
            of_source[source as usize].push(slot as u32);
        }
        Ok(Blend { slots: wanted.into_iter().map(|(_, source, k)| (source, k)).collect(), of_source })
    }

    /// The source of sample `n`, and how many samples of that source came before.
    fn source(&self, n: u64) -> (usize, u64) {
        let period = self.slots.len() as u64;
        let (source, before) = self.slots[(n % period) as usize];
        let source = source as usize;
        (source, n / period * self.of_source[source].len() as u64 + u64::from(before))
    }

    /// The sample that is the `turn`-th of a source: the inverse of `source`.
    fn sample_of(&self, source: usize, turn: u64) -> u64 {
        let own = &self.of_source[source];
        let count = own.len() as u64;
        turn / count * self.slots.len() as u64 + u64::from(own[(turn % count) as usize])
    }
}

/// Splits `period` by weight, by largest remainder: each part is within one of its exact share, and together they are the whole.
fn allot(weights: &[f64], period: usize) -> Vec<usize> {
    let total: f64 = weights.iter().sum();
    let shares: Vec<f64> = weights.iter().map(|weight| weight / total * period as f64).collect();
    let mut counts: Vec<usize> = shares.iter().map(|share| share.floor() as usize).collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    // The sort keeps the order of equals, so that the first source wins a tie.
    by_remainder.sort_by(|&a, &b| shares[b].fract().total_cmp(&shares[a].fract()));
    let missing = period.saturating_sub(counts.iter().sum());
    for &source in by_remainder.iter().cycle().take(missing) {
        counts[source] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blend(weights: &[f64]) -> Blend {
        let shares: Vec<Share> = weights.iter().map(|&weight| Share { name: "source".to_string(), tokens: 100, weight }).collect();
        Blend::new(&shares).expect("positive weights")
    }

    #[test]
    fn the_permutation_is_a_bijection_for_every_size() {
        for count in (1..300).chain([1023, 1024, 1025, 4096, 4097, 65_537, 100_003]) {
            let stream = Stream::new(count, "bijection");
            let mut seen = vec![false; count as usize];
            for index in 0..count {
                let place = permute(&stream, count, index) as usize;
                assert!(!seen[place], "{place} of {count} comes twice");
                seen[place] = true;
            }
        }
    }

    #[test]
    fn the_permutation_is_inside_for_sizes_that_no_table_could_hold() {
        let stream = Stream::new(1, "large");
        for count in [u64::from(u32::MAX) + 7, 1 << 40, (1 << 62) + 1, u64::MAX] {
            for index in [0, 1, count / 2, count - 1] {
                assert!(permute(&stream, count, index) < count);
            }
        }
    }

    #[test]
    fn every_index_goes_everywhere() {
        // Where index i of n lands, over many streams: chi-square of a uniform distribution, for sizes below and above the least network.
        for count in [2u64, 3, 10, 64, 65] {
            for index in [0, count - 1] {
                let draws = 4000 * count;
                let mut hits = vec![0u64; count as usize];
                for seed in 0..draws {
                    hits[permute(&Stream::new(seed, "uniform"), count, index) as usize] += 1;
                }
                let chi: f64 = hits.iter().map(|&hit| (hit as f64 - 4000.0).powi(2) / 4000.0).sum();
                // Mean n - 1, variance 2 (n - 1): five standard deviations.
                let freedom = (count - 1) as f64;
                assert!(chi < freedom + 5.0 * (2.0 * freedom).sqrt() + 5.0, "size {count}, index {index}: chi-square {chi}");
            }
        }
    }

    #[test]
    fn slots_follow_the_weights() {
        let weights = [0.5, 0.3, 0.2, 0.001];
        let blend = blend(&weights);
        assert_eq!(blend.slots.len(), PERIOD);
        let total: f64 = weights.iter().sum();
        for (source, weight) in weights.iter().enumerate() {
            let exact = weight / total * PERIOD as f64;
            let count = blend.of_source[source].len() as f64;
            assert!((count - exact).abs() < 1.0, "source {source} has {count} slots, exactly {exact}");
            // Spread evenly: at any point of the pattern a source is close to its share.
            for n in (0..PERIOD).step_by(97) {
                let so_far = blend.of_source[source].iter().filter(|&&slot| (slot as usize) < n).count() as f64;
                assert!((so_far - exact * n as f64 / PERIOD as f64).abs() <= weights.len() as f64, "source {source} at {n}: {so_far}");
            }
        }
    }

    #[test]
    fn turns_of_a_source_count_up_across_periods() {
        let blend = blend(&[1.0, 2.0, 0.5]);
        let mut turns = [0u64; 3];
        for n in 0..3 * PERIOD as u64 {
            let (source, turn) = blend.source(n);
            assert_eq!(turn, turns[source]);
            assert_eq!(blend.sample_of(source, turn), n);
            turns[source] += 1;
        }
    }
}
