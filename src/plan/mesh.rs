//! The ranks as a box with four axes, and the groups along each.
//!
//! Invariant: the groups of one kind partition the world, and every rank is in exactly one group of each kind.

use std::fmt;

/// Sizes of the axes. Rank order: `tp` runs fastest, then `shard`, then `replicate`, then `pp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    pub pp: usize,
    pub replicate: usize,
    pub shard: usize,
    pub tp: usize,
}

/// Where one rank sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coordinates {
    pub pp: usize,
    pub replicate: usize,
    pub shard: usize,
    pub tp: usize,
}

impl Mesh {
    pub const ONE: Mesh = Mesh { pp: 1, replicate: 1, shard: 1, tp: 1 };

    pub fn world(&self) -> usize {
        self.pp * self.dp() * self.tp
    }

    /// Data-parallel ranks: replicas times shards.
    pub fn dp(&self) -> usize {
        self.replicate * self.shard
    }

    pub fn coordinates(&self, rank: usize) -> Coordinates {
        assert!(rank < self.world(), "rank {rank} of a world of {}", self.world());
        Coordinates {
            tp: rank % self.tp,
            shard: rank / self.tp % self.shard,
            replicate: rank / (self.tp * self.shard) % self.replicate,
            pp: rank / (self.tp * self.dp()),
        }
    }

    pub fn rank(&self, at: Coordinates) -> usize {
        ((at.pp * self.replicate + at.replicate) * self.shard + at.shard) * self.tp + at.tp
    }

    /// The ranks that differ from `at` in tensor parallelism only.
    pub fn tp_group(&self, at: Coordinates) -> Vec<usize> {
        (0..self.tp).map(|tp| self.rank(Coordinates { tp, ..at })).collect()
    }

    /// The ranks among which ZeRO cuts the state of `at`.
    pub fn shard_group(&self, at: Coordinates) -> Vec<usize> {
        (0..self.shard).map(|shard| self.rank(Coordinates { shard, ..at })).collect()
    }

    /// The ranks that hold the same slice as `at`.
    pub fn replica_group(&self, at: Coordinates) -> Vec<usize> {
        (0..self.replicate).map(|replicate| self.rank(Coordinates { replicate, ..at })).collect()
    }

    /// The pipeline that `at` belongs to, first rank first.
    pub fn pp_group(&self, at: Coordinates) -> Vec<usize> {
        (0..self.pp).map(|pp| self.rank(Coordinates { pp, ..at })).collect()
    }

    /// The first and the last rank of a pipeline, where there are two; any other rank is alone.
    pub fn tie_group(&self, at: Coordinates) -> Vec<usize> {
        let ends = [0, self.pp - 1];
        if self.pp > 1 && ends.contains(&at.pp) {
            return ends.map(|pp| self.rank(Coordinates { pp, ..at })).to_vec();
        }
        vec![self.rank(at)]
    }
}

impl Coordinates {
    /// The stage that names this rank's tie group: the first for both ends.
    pub fn end(&self, mesh: &Mesh) -> usize {
        if self.pp == mesh.pp - 1 { 0 } else { self.pp }
    }

    /// The data-parallel rank: shards run fastest.
    pub fn dp(&self, mesh: &Mesh) -> usize {
        self.replicate * mesh.shard + self.shard
    }
}

impl fmt::Display for Coordinates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pp{} dp{}.{} tp{}", self.pp, self.replicate, self.shard, self.tp)
    }
}
