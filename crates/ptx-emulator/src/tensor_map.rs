//! The description of a tensor that `cp.async.bulk.tensor` reads: what the driver's opaque `CUtensorMap` is on a GPU.
//!
//! Invariant: `encode` gives 128 bytes that only this emulator understands; `decode` refuses all others.

use crate::fault::{Fault, FaultKind};

const MAGIC: u64 = u64::from_le_bytes(*b"PTXEMAP1");

/// How the rows of a box are spread over the banks of shared memory: address bits 4 to 6 are changed by bits 7 to 9 (or fewer).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    None,
    Bytes32,
    Bytes64,
    Bytes128,
}

/// A tensor in global memory, the innermost dimension first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    pub address: u64,
    pub element_bytes: u32,
    /// Elements per dimension, one to five dimensions.
    pub sizes: Vec<u64>,
    /// Bytes from one index to the next, of all dimensions but the innermost.
    pub strides: Vec<u64>,
    /// Elements of a copy, per dimension.
    pub tile: Vec<u32>,
    pub swizzle: Swizzle,
}

/// Applies a swizzle to a shared address. The modes are numbered as in a matrix descriptor.
pub(crate) fn swizzled(address: u32, mode: u32) -> u32 {
    let rows = match mode {
        1 => 7,
        2 => 3,
        3 => 1,
        _ => 0,
    };
    address ^ (address >> 7 & rows) << 4
}

impl Swizzle {
    /// The number a matrix descriptor has for it.
    pub(crate) fn mode(self) -> u32 {
        match self {
            Swizzle::None => 0,
            Swizzle::Bytes128 => 1,
            Swizzle::Bytes64 => 2,
            Swizzle::Bytes32 => 3,
        }
    }

    /// The longest row of a box.
    fn span(self) -> u32 {
        match self {
            Swizzle::None => u32::MAX,
            Swizzle::Bytes32 => 32,
            Swizzle::Bytes64 => 64,
            Swizzle::Bytes128 => 128,
        }
    }
}

impl TensorMap {
    fn problem(&self) -> Option<String> {
        let rank = self.sizes.len();
        if !(1..=5).contains(&rank) || self.strides.len() + 1 != rank || self.tile.len() != rank {
            return Some(format!("{rank} sizes, {} strides and {} edges of the tile do not fit", self.strides.len(), self.tile.len()));
        }
        if !matches!(self.element_bytes, 1 | 2 | 4 | 8) {
            return Some(format!("elements of {} bytes", self.element_bytes));
        }
        if !self.address.is_multiple_of(16) || self.strides.iter().any(|stride| !stride.is_multiple_of(16)) {
            return Some(format!("address {:#x} and strides {:?} must be multiples of 16", self.address, self.strides));
        }
        if self.tile.iter().any(|edge| !(1..=256).contains(edge)) {
            return Some(format!("edges {:?} of the tile; 1 to 256 are possible", self.tile));
        }
        let row = self.tile[0] * self.element_bytes;
        if !row.is_multiple_of(16) || row > self.swizzle.span() {
            return Some(format!("rows of {row} bytes must be a multiple of 16 and fit the swizzle ({:?})", self.swizzle));
        }
        None
    }

    /// The bytes a kernel takes as its parameter.
    pub fn encode(&self) -> Result<[u8; 128], Fault> {
        if let Some(problem) = self.problem() {
            return Err(Fault::of_host(FaultKind::Launch, format!("tensor map: {problem}")));
        }
        let mut words = vec![
            MAGIC,
            self.address,
            u64::from(self.element_bytes) | (self.sizes.len() as u64) << 8 | u64::from(self.swizzle.mode()) << 16,
        ];
        words.extend((0..5).map(|i| self.sizes.get(i).copied().unwrap_or(1)));
        words.extend((0..4).map(|i| self.strides.get(i).copied().unwrap_or(0)));
        let edge = |i: usize| u64::from(self.tile.get(i).copied().unwrap_or(1));
        words.extend([edge(0) | edge(1) << 32, edge(2) | edge(3) << 32, edge(4)]);
        let mut bytes = [0; 128];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        Ok(bytes)
    }

    pub(crate) fn decode(bytes: &[u8; 128]) -> Option<TensorMap> {
        let word = |i: usize| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().expect("a slice of eight"));
        if word(0) != MAGIC {
            return None;
        }
        let rank = (word(2) >> 8 & 0xFF) as usize;
        let swizzle = [Swizzle::None, Swizzle::Bytes128, Swizzle::Bytes64, Swizzle::Bytes32][(word(2) >> 16 & 3) as usize];
        let tile = (0..rank).map(|i| (word(12 + i / 2) >> (32 * (i % 2))) as u32).collect();
        Some(TensorMap {
            address: word(1),
            element_bytes: (word(2) & 0xFF) as u32,
            sizes: (0..rank).map(|i| word(3 + i)).collect(),
            strides: (1..rank).map(|i| word(7 + i)).collect(),
            tile,
            swizzle,
        })
    }

    /// Bytes of a tile in shared memory.
    pub(crate) fn tile_bytes(&self) -> usize {
        self.tile.iter().product::<u32>() as usize * self.element_bytes as usize
    }

    /// The address of an element, where the coordinates are inside the tensor.
    pub(crate) fn element(&self, coordinates: &[i64]) -> Option<u64> {
        let mut address = self.address;
        for (i, coordinate) in coordinates.iter().enumerate() {
            let index = u64::try_from(*coordinate).ok().filter(|index| *index < self.sizes[i])?;
            address += index * if i == 0 { u64::from(self.element_bytes) } else { self.strides[i - 1] };
        }
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_its_bytes() {
        let map = TensorMap {
            address: 0x1000,
            element_bytes: 2,
            sizes: vec![70, 33, 5],
            strides: vec![144, 144 * 33],
            tile: vec![64, 8, 2],
            swizzle: Swizzle::Bytes128,
        };
        let bytes = map.encode().expect("the map is sound");
        assert_eq!(TensorMap::decode(&bytes), Some(map.clone()));
        assert_eq!(map.element(&[3, 2, 1]), Some(0x1000 + 6 + 288 + 144 * 33));
        assert_eq!(map.element(&[70, 0, 0]), None);
        assert!(TensorMap { tile: vec![65, 8, 2], ..map }.encode().is_err());
    }
}
