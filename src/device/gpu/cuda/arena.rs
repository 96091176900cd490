//! Which ranges of a GPU's memory are given out. It only keeps the books: the memory itself is the driver's (`mod.rs`).
//!
//! Memory comes in segments, each one allocation of the driver's. A request takes the smallest free range that it fits into, the lowest
//! of equals, and leaves the rest of it; a range that comes back joins its free neighbours in the same segment. What a range is given out
//! for next is queued behind what used it last, so a range may be given out again as soon as it is back.
//!
//! Invariant: free and taken ranges tile the segments; no two free ranges of a segment touch.

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Ranges start and end at multiples of this: what the widest accesses and cuBLASLt's fastest algorithms want.
pub const GRANULE: usize = 256;

#[derive(Debug, Default)]
pub struct Arena {
    /// Where each segment starts, and its bytes.
    segments: BTreeMap<u64, usize>,
    /// Free ranges by address, and again by size.
    free: BTreeMap<u64, usize>,
    by_size: BTreeSet<(usize, u64)>,
    taken: HashMap<u64, usize>,
    bytes_taken: usize,
}

impl Arena {
    /// What a request for `bytes` takes: at least one granule, so that every range has an address of its own.
    pub fn granules(bytes: usize) -> usize {
        bytes.max(1).next_multiple_of(GRANULE)
    }

    /// Adds memory.
    pub fn add(&mut self, start: u64, bytes: usize) {
        let bytes = bytes / GRANULE * GRANULE;
        assert!(start.is_multiple_of(GRANULE as u64), "a segment at {start:#x}");
        self.segments.insert(start, bytes);
        if bytes > 0 {
            self.put(start, bytes);
        }
    }

    /// A range of at least `bytes`, if a free one is large enough.
    pub fn take(&mut self, bytes: usize) -> Option<u64> {
        let bytes = Arena::granules(bytes);
        let &(size, start) = self.by_size.range((bytes, 0)..).next()?;
        self.remove(start, size);
        if size > bytes {
            self.put(start + bytes as u64, size - bytes);
        }
        self.taken.insert(start, bytes);
        self.bytes_taken += bytes;
        Some(start)
    }

    /// Takes back the range at `start`. False: none of that address is given out.
    pub fn give_back(&mut self, start: u64) -> bool {
        let Some(mut bytes) = self.taken.remove(&start) else { return false };
        self.bytes_taken -= bytes;
        let mut start = start;
        let after = start + bytes as u64;
        if let Some(&size) = self.free.get(&after).filter(|_| !self.segments.contains_key(&after)) {
            self.remove(after, size);
            bytes += size;
        }
        let before = self.free.range(..start).next_back().map(|(&before, &size)| (before, size));
        if let Some((before, size)) = before.filter(|&(before, size)| before + size as u64 == start && !self.segments.contains_key(&start))
        {
            self.remove(before, size);
            (start, bytes) = (before, bytes + size);
        }
        self.put(start, bytes);
        true
    }

    pub fn bytes(&self) -> usize {
        self.segments.values().sum()
    }

    pub fn bytes_taken(&self) -> usize {
        self.bytes_taken
    }

    pub fn largest_free(&self) -> usize {
        self.by_size.last().map_or(0, |&(size, _)| size)
    }

    /// Where the segments start.
    pub fn segments(&self) -> impl Iterator<Item = u64> {
        self.segments.keys().copied()
    }

    fn put(&mut self, start: u64, bytes: usize) {
        self.free.insert(start, bytes);
        self.by_size.insert((bytes, start));
    }

    fn remove(&mut self, start: u64, bytes: usize) {
        self.free.remove(&start);
        self.by_size.remove(&(bytes, start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};

    /// Holds the books to the invariant, by walking over them.
    fn check(arena: &Arena) {
        for (&segment, &bytes) in &arena.segments {
            let end = segment + bytes as u64;
            let mut ranges: Vec<(u64, usize, bool)> = arena.free.range(segment..end).map(|(&at, &size)| (at, size, true)).collect();
            ranges.extend(arena.taken.iter().filter(|(at, _)| (segment..end).contains(at)).map(|(&at, &size)| (at, size, false)));
            ranges.sort_unstable();
            let mut next = segment;
            let mut after_free = false;
            for (at, size, free) in ranges {
                assert_eq!(at, next, "a gap or an overlap");
                assert!(size > 0 && size.is_multiple_of(GRANULE) && !(free && after_free), "{size} bytes at {at:#x}");
                (next, after_free) = (at + size as u64, free);
            }
            assert_eq!(next, end);
        }
        let free: BTreeSet<(usize, u64)> = arena.free.iter().map(|(&at, &size)| (size, at)).collect();
        assert_eq!(free, arena.by_size);
        assert_eq!(arena.bytes_taken() + free.iter().map(|(size, _)| size).sum::<usize>(), arena.bytes());
    }

    #[test]
    fn the_smallest_that_fits_is_taken_and_neighbours_join() {
        let mut arena = Arena::default();
        arena.add(0x1000, 10 * GRANULE);
        let at: Vec<u64> = [2, 1, 4].map(|granules| arena.take(granules * GRANULE).expect("there is room")).to_vec();
        assert_eq!(at, [0x1000, 0x1200, 0x1300]);
        assert!(arena.give_back(at[0]));
        // Two granules are free before, three after: the smaller one is taken.
        assert_eq!(arena.take(2 * GRANULE), Some(0x1000));
        assert_eq!(arena.take(3 * GRANULE), Some(0x1700));
        assert_eq!((arena.largest_free(), arena.take(1)), (0, None));
        assert!(arena.give_back(at[1]) && arena.give_back(0x1000) && arena.give_back(0x1700) && arena.give_back(at[2]));
        assert!(!arena.give_back(at[2]), "given back twice");
        assert_eq!((arena.largest_free(), arena.bytes_taken()), (10 * GRANULE, 0));
        check(&arena);
    }

    #[test]
    fn segments_that_touch_stay_apart() {
        let mut arena = Arena::default();
        arena.add(0x1000, GRANULE);
        arena.add(0x1100, GRANULE);
        for first in [0, 1] {
            let ranges = [arena.take(1).expect("room"), arena.take(1).expect("room")];
            assert!(arena.give_back(ranges[first]) && arena.give_back(ranges[1 - first]));
            assert_eq!((arena.largest_free(), arena.bytes(), arena.segments().count()), (GRANULE, 2 * GRANULE, 2));
            check(&arena);
        }
    }

    proptest! {
        /// Any history of requests leaves sound books, and memory that is all back is whole again.
        #[test]
        fn books_are_sound(
            segments in prop::collection::vec(1usize..64, 1..4),
            history in prop::collection::vec((any::<bool>(), 0usize..20_000, any::<prop::sample::Index>()), 1..200),
        ) {
            let mut arena = Arena::default();
            for (place, granules) in segments.iter().enumerate() {
                arena.add(0x10_0000 * (place as u64 + 1), granules * GRANULE);
            }
            let mut held: Vec<u64> = Vec::new();
            for (takes, bytes, index) in history {
                if takes || held.is_empty() {
                    let room = arena.largest_free() >= Arena::granules(bytes);
                    let got = arena.take(bytes);
                    prop_assert_eq!(got.is_some(), room);
                    held.extend(got);
                } else {
                    prop_assert!(arena.give_back(held.swap_remove(index.index(held.len()))));
                }
                check(&arena);
            }
            held.into_iter().for_each(|at| assert!(arena.give_back(at)));
            check(&arena);
            prop_assert_eq!(arena.free.len(), segments.len());
        }
    }
}
