//! The allocator of a device, which knows exactly how much it has given out.
//!
//! Buffers that lie in a file (`mapped`) take nothing of the device's memory and are counted apart.
//!
//! Invariant: `live` is the sum of the sizes of all buffers alive, each rounded up to whole 64-byte blocks; `peak` is its highest
//! value since the last `reset_peak`. The plan predicts this number and a test holds the two together.

use crate::device::mapped::Mapped;
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
    bytes_offloaded: usize,
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
    place: Place,
    bytes: usize,
}

#[derive(Debug)]
enum Place {
    /// Empty on a device that only counts.
    Device(Vec<Block>),
    /// None on a device that only counts.
    File(Option<Mapped>),
}

impl Memory {
    pub fn new(backed: bool) -> Memory {
        Memory { backed, state: Mutex::default() }
    }

    pub fn allocate(memory: &Arc<Memory>, bytes: usize) -> Buffer {
        let count = Memory::bytes_taken(bytes) / 64;
        let reused = {
            let mut state = memory.lock();
            state.bytes_live += count * 64;
            state.bytes_peak = state.bytes_peak.max(state.bytes_live);
            if memory.backed { state.free.get_mut(&count).and_then(Vec::pop) } else { Some(Vec::new()) }
        };
        let blocks = reused.unwrap_or_else(|| vec![Block([0; 64]); count]);
        Buffer { memory: memory.clone(), place: Place::Device(blocks), bytes }
    }

    /// A buffer of `bytes` that lies in `file`; on a device that only counts there is none.
    pub fn adopt(memory: &Arc<Memory>, file: Option<Mapped>, bytes: usize) -> Buffer {
        assert_eq!(memory.backed, file.is_some(), "a device that holds numbers has a file to put them in");
        memory.lock().bytes_offloaded += Memory::bytes_taken(bytes);
        Buffer { memory: memory.clone(), place: Place::File(file), bytes }
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

    /// Bytes of buffers that lie in files.
    pub fn bytes_offloaded(&self) -> usize {
        self.lock().bytes_offloaded
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
    /// What the buffer takes of the device's memory: whole blocks, or nothing where it lies in a file.
    pub fn bytes_taken(&self) -> usize {
        match self.place {
            Place::Device(_) => Memory::bytes_taken(self.bytes),
            Place::File(_) => 0,
        }
    }

    /// What the buffer keeps out of the device's memory.
    pub fn bytes_offloaded(&self) -> usize {
        Memory::bytes_taken(self.bytes) - self.bytes_taken()
    }

    /// Empty on a device that only counts.
    pub fn bytes(&self) -> &[u8] {
        let all: &[u8] = match &self.place {
            Place::Device(blocks) => bytemuck::cast_slice(blocks),
            Place::File(file) => file.as_ref().map_or(&[], Mapped::bytes),
        };
        &all[..self.bytes.min(all.len())]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let all: &mut [u8] = match &mut self.place {
            Place::Device(blocks) => bytemuck::cast_slice_mut(blocks),
            Place::File(file) => file.as_mut().map_or(&mut [], Mapped::bytes_mut),
        };
        let length = self.bytes.min(all.len());
        &mut all[..length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let (taken, offloaded) = (self.bytes_taken(), self.bytes_offloaded());
        let mut state = self.memory.lock();
        assert!(state.bytes_live >= taken, "{} live bytes, {taken} freed", state.bytes_live);
        state.bytes_live -= taken;
        state.bytes_offloaded -= offloaded;
        if let (true, Place::Device(blocks)) = (self.memory.backed, &mut self.place) {
            state.free.entry(taken / 64).or_default().push(std::mem::take(blocks));
        }
    }
}
