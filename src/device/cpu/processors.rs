//! Which of a host's processors the threads of a rank run on, where several ranks share the host.
//!
//! A scheduler may have given each rank processors of its own, or all of them the same. In the latter case they are dealt out: threads of
//! two ranks that meet on one processor would wait for each other in every step, and a rank's memory stays near where its threads are.
//!
//! Invariant: only speed depends on what is here.

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// What a rank may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// As many threads as keep these busy, one at least.
    pub threads: usize,
    /// Its own, if no other rank of the host is to run there. Empty where threads go wherever the system puts them.
    pub processors: Vec<usize>,
}

impl Share {
    pub fn anywhere(threads: usize) -> Share {
        Share { threads: threads.max(1), processors: Vec::new() }
    }
}

/// The processors that this process may run on.
pub fn allowed() -> Result<Vec<usize>> {
    let set = sched_getaffinity(None).context("asking which processors this process may run on")?;
    Ok((0..CpuSet::MAX_CPU).filter(|&processor| set.is_set(processor)).collect())
}

/// The share of rank `local` of those on a host, which may run on the processors that `all` says of each.
pub fn share(all: &[Vec<usize>], local: usize) -> Share {
    let mine = &all[local];
    let meets = |other: &&Vec<usize>| other.iter().any(|processor| mine.contains(processor));
    let (sharers, alike) = (all.iter().filter(meets).count().max(1), all.iter().filter(|other| *other == mine).count());
    let each = mine.len() / sharers;
    if all.len() == 1 || sharers != alike || each == 0 {
        return Share::anywhere(each);
    }
    let before = all[..local].iter().filter(|other| *other == mine).count();
    Share { threads: each, processors: mine[before * each..(before + 1) * each].to_vec() }
}

/// Numbers of processors as a set of bits, for other ranks.
pub fn to_bytes(processors: &[usize]) -> Vec<u8> {
    let mut bytes = vec![0; processors.iter().max().map_or(0, |last| last / 8 + 1)];
    processors.iter().for_each(|processor| bytes[processor / 8] |= 1 << (processor % 8));
    bytes
}

/// The reverse of `to_bytes`, in ascending order.
pub fn from_bytes(bytes: &[u8]) -> Vec<usize> {
    (0..bytes.len() * 8).filter(|processor| bytes[processor / 8] >> (processor % 8) & 1 != 0).collect()
}

/// From now on the calling thread runs on `processors` only.
pub fn settle(processors: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    processors.iter().for_each(|&processor| set.set(processor));
    sched_setaffinity(None, &set).with_context(|| format!("running on the processors {processors:?} only"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(all: &[Vec<usize>]) -> Vec<Share> {
        (0..all.len()).map(|local| share(all, local)).collect()
    }

    #[test]
    fn ranks_that_may_run_anywhere_are_dealt_processors() {
        let all = vec![vec![0, 1, 4, 5, 6, 7, 9]; 3];
        let expected = [[0, 1], [4, 5], [6, 7]].map(|processors| Share { threads: 2, processors: processors.to_vec() });
        assert_eq!(shares(&all), expected);
    }

    #[test]
    fn what_a_scheduler_dealt_out_stays() {
        let all = [vec![0, 1, 2], vec![3, 4, 5]];
        assert_eq!(shares(&all), all.map(|processors| Share { threads: 3, processors }));
    }

    #[test]
    fn threads_go_anywhere_where_ranks_meet_in_part_or_outnumber_processors_or_are_alone() {
        assert_eq!(shares(&[vec![0, 1, 2, 3], vec![2, 3, 4, 5]]), [Share::anywhere(2), Share::anywhere(2)]);
        assert_eq!(shares(&vec![vec![3, 4]; 3]), vec![Share::anywhere(1); 3]);
        assert_eq!(shares(&[vec![0, 1]]), [Share::anywhere(2)]);
    }

    #[test]
    fn sets_travel_as_bits() {
        for processors in [vec![], vec![0], vec![7, 8], vec![0, 63, 64, 1023]] {
            assert_eq!(from_bytes(&to_bytes(&processors)), processors);
        }
    }

    #[test]
    fn a_thread_stays_where_it_is_put() {
        let all = allowed().expect("a process runs somewhere");
        let last = &all[all.len() - 1..];
        let seen = std::thread::scope(|scope| {
            let thread = scope.spawn(|| settle(last).and_then(|()| allowed()));
            thread.join().expect("no panic").expect("a processor of this process")
        });
        assert_eq!(seen, last);
    }
}
