//! Sets of bytes, as ranges.
//!
//! Invariant: the ranges are sorted, not empty, and do not touch each other.

#[derive(Clone, Debug, Default)]
pub(crate) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    pub(crate) fn insert(&mut self, begin: u64, end: u64) {
        if begin >= end {
            return;
        }
        let first = self.0.partition_point(|(_, e)| *e < begin);
        let last = self.0.partition_point(|(b, _)| *b <= end);
        let merged = self.0[first..last].iter().fold((begin, end), |(b, e), range| (b.min(range.0), e.max(range.1)));
        self.0.splice(first..last, [merged]);
    }

    pub(crate) fn remove(&mut self, begin: u64, end: u64) {
        let first = self.0.partition_point(|(_, e)| *e <= begin);
        let last = self.0.partition_point(|(b, _)| *b < end);
        if begin >= end || first >= last {
            return;
        }
        let (head, tail) = ((self.0[first].0, begin), (end, self.0[last - 1].1));
        let rest = [head, tail].into_iter().filter(|(b, e)| b < e);
        self.0.splice(first..last, rest.collect::<Vec<_>>());
    }

    /// The parts of a range that are in the set.
    pub(crate) fn within(&self, begin: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let first = self.0.partition_point(|(_, e)| *e <= begin);
        self.0[first..].iter().take_while(move |(b, _)| *b < end).map(move |(b, e)| ((*b).max(begin), (*e).min(end)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_a_set_of_bytes() {
        let mut random = crate::random::Random::new(3);
        let (mut ranges, mut bytes) = (Ranges::default(), [false; 64]);
        for _ in 0..10_000 {
            let (a, b) = (random.below(65), random.below(65));
            let (begin, end) = (a.min(b), a.max(b));
            let add = random.below(2) == 0;
            if add {
                ranges.insert(begin as u64, end as u64);
            } else {
                ranges.remove(begin as u64, end as u64);
            }
            bytes[begin..end].fill(add);
            let mut got = [false; 64];
            for (begin, end) in ranges.within(0, 64) {
                got[begin as usize..end as usize].fill(true);
            }
            assert_eq!(got, bytes);
            assert!(ranges.0.windows(2).all(|pair| pair[0].1 < pair[1].0), "{ranges:?}");
        }
    }
}
