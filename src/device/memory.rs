//! The allocator of a device, which knows exactly how much it has given out.
//!
//! Invariant: `live` is the sum of the sizes of all buffers alive, each rounded up to whole 64-byte blocks; `peak` is its highest
//! value since the last `reset_peak`. The plan predicts this number and a test holds the two together.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One cache line: host buffers are made of these, so that every tensor starts aligned.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub struct Block([u8; 64]);

#[derive(Debug)]
pub struct Memory {
    /// False: buffers are counted but hold nothing.
    backed: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bytes_live: usize,
    bytes_peak: usize,
    /// Freed host buffers, by size in blocks: a training step asks for the same sizes again and again.
    free: HashMap<usize, Vec<Vec<Block>>>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "live {} peak {}", self.bytes_live, self.bytes_peak)
    }
}

/// Owned bytes of a device. They go back to their memory when dropped.
#[derive(Debug)]
pub struct Buffer {
    memory: Arc<Memory>,
    blocks: Vec<Block>,
    bytes: usize,
}

impl Memory {
    pub fn new(backed: bool) -> Memory {
        Memory { backed, state: Mutex::default() }
    }

    pub fn allocate(memory: &Arc<Memory>, bytes: usize) -> Buffer {
        let count = bytes.div_ceil(64);
        let reused = {
            let mut state = memory.lock();
            state.bytes_live += count * 64;
            state.bytes_peak = state.bytes_peak.max(state.bytes_live);
            if memory.backed { state.free.get_mut(&count).and_then(Vec::pop) } else { Some(Vec::new()) }
        };
        let blocks = reused.unwrap_or_else(|| vec![Block([0; 64]); count]);
        Buffer { memory: memory.clone(), blocks, bytes }
    }

    /// What a buffer of `bytes` counts for: whole blocks.
    pub fn bytes_taken(bytes: usize) -> usize {
        bytes.div_ceil(64) * 64
    }

    pub fn bytes_live(&self) -> usize {
        self.lock().bytes_live
    }

    pub fn bytes_peak(&self) -> usize {
        self.lock().bytes_peak
    }

    /// Bytes of freed buffers that are kept to be given out again.
    pub fn bytes_free(&self) -> usize {
        self.lock().free.iter().map(|(blocks, buffers)| 64 * blocks * buffers.len()).sum()
    }

    /// From now on `bytes_peak` counts anew, starting at what is live.
    pub fn reset_peak(&self) {
        let mut state = self.lock();
        state.bytes_peak = state.bytes_live;
    }

    /// Gives cached free buffers back to the system.
    pub fn trim(&self) {
        self.lock().free.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    /// What the buffer counts for: whole blocks.
    pub fn bytes_taken(&self) -> usize {
        self.bytes.div_ceil(64) * 64
    }

    /// Empty on a device that only counts.
    pub fn bytes(&self) -> &[u8] {
        let all: &[u8] = bytemuck::cast_slice(&self.blocks);
        &all[..self.bytes.min(all.len())]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let all: &mut [u8] = bytemuck::cast_slice_mut(&mut self.blocks);
        let length = self.bytes.min(all.len());
        &mut all[..length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let count = self.bytes.div_ceil(64);
        let mut state = self.memory.lock();
        assert!(state.bytes_live >= count * 64, "{} live bytes, {} freed", state.bytes_live, count * 64);
        state.bytes_live -= count * 64;
        if self.memory.backed {
            state.free.entry(count).or_default().push(std::mem::take(&mut self.blocks));
        }
    }
}
