//! The counts of one instruction.
//!
//! Invariant: wavefronts and sectors are those of the access pattern alone: no caches, no conflicts between warps.

use super::Touch;
use crate::counters::Counts;
use crate::execute::memory::Doing;
use crate::registers::each;
use crate::syntax::Space;

const BANKS: usize = 32;
const SECTOR: u64 = 32;

/// Counts of an instruction, without its class.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    pub(crate) executed: u64,
    pub(crate) counts: Counts,
}

impl Count {
    pub(super) fn access(&mut self, touch: &Touch<'_>) {
        if touch.space == Space::Shared {
            let (wavefronts, ideal) = wavefronts(touch);
            self.counts.shared_wavefronts += wavefronts;
            self.counts.shared_wavefronts_ideal += ideal;
            return;
        }
        let (sectors, ideal) = sectors(touch);
        self.counts.global_sectors += sectors;
        self.counts.global_sectors_ideal += ideal;
        let bytes = u64::from(touch.mask.count_ones()) * touch.bytes as u64;
        if touch.doing != Doing::Writing {
            self.counts.global_bytes_loaded += bytes;
        }
        if touch.doing != Doing::Reading {
            self.counts.global_bytes_stored += bytes;
        }
    }
}

/// Shared memory serves 32 banks of 4 bytes at a time: 32 lanes of 4 bytes, 16 of 8, 8 of 16. Lanes that share a word share its turn.
fn wavefronts(touch: &Touch<'_>) -> (u64, u64) {
    let lanes_at_once = match touch.bytes {
        16 => 8,
        8 => 16,
        _ => 32,
    };
    let (mut wavefronts, mut ideal) = (0, 0);
    for begin in (0..32).step_by(lanes_at_once) {
        let now = touch.mask & (u32::MAX >> (32 - lanes_at_once) << begin);
        let mut words: Vec<u64> =
            each(now).flat_map(|lane| touch.at[lane] / 4..(touch.at[lane] + touch.bytes as u64).div_ceil(4)).collect();
        words.sort_unstable();
        words.dedup();
        let mut banks = [0; BANKS];
        for word in &words {
            banks[*word as usize % BANKS] += 1;
        }
        wavefronts += banks.into_iter().max().unwrap_or(0);
        ideal += words.len().div_ceil(BANKS) as u64;
    }
    (wavefronts, ideal)
}

/// Sectors of 32 bytes that a warp touches, and the fewest that could hold its bytes.
fn sectors(touch: &Touch<'_>) -> (u64, u64) {
    let bytes = touch.bytes as u64;
    let mut begins: Vec<u64> = each(touch.mask).map(|lane| touch.at[lane]).collect();
    begins.sort_unstable();
    let (mut sectors, mut covered, mut end, mut last) = (0, 0, 0, None);
    for begin in begins {
        covered += (begin + bytes).saturating_sub(end.max(begin));
        end = end.max(begin + bytes);
        let (first, final_one) = (begin / SECTOR, (begin + bytes - 1) / SECTOR);
        let fresh = last.map_or(first, |last: u64| first.max(last + 1));
        sectors += (final_one + 1).saturating_sub(fresh);
        last = Some(last.map_or(final_one, |last: u64| last.max(final_one)));
    }
    (sectors, covered.div_ceil(SECTOR))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instruction::Order;

    fn touch(at: &[u64; 32], bytes: usize) -> Touch<'_> {
        Touch { space: Space::Shared, doing: Doing::Reading, mask: !0, at, bytes, order: Order::Weak }
    }

    #[test]
    fn banks_and_sectors_of_known_patterns() {
        let at = |f: fn(u64) -> u64| std::array::from_fn(|lane| f(lane as u64));
        assert_eq!(wavefronts(&touch(&at(|l| 4 * l), 4)), (1, 1));
        assert_eq!(wavefronts(&touch(&at(|_| 64), 4)), (1, 1));
        assert_eq!(wavefronts(&touch(&at(|l| 8 * l), 4)), (2, 1));
        assert_eq!(wavefronts(&touch(&at(|l| 128 * l), 4)), (32, 1));
        assert_eq!(wavefronts(&touch(&at(|l| 16 * l), 16)), (4, 4));
        assert_eq!(wavefronts(&touch(&at(|l| 128 * l), 16)), (32, 4));
        assert_eq!(sectors(&touch(&at(|l| 4 * l), 4)), (4, 4));
        assert_eq!(sectors(&touch(&at(|l| 4 * l + 4), 4)), (5, 4));
        assert_eq!(sectors(&touch(&at(|l| 64 * l), 4)), (32, 4));
        assert_eq!(sectors(&touch(&at(|_| 64), 4)), (1, 1));
    }
}
