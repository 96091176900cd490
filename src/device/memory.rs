//! The allocator of a device, which knows exactly how much it has given out.
//!
//! Buffers that lie in a file (`mapped`) take nothing of the device's memory and are counted apart.
//!
//! Invariant: `live` is the sum of the sizes of all buffers alive, each rounded up to whole 64-byte blocks; `peak` is its highest
//! value since the last `reset_peak`. The plan predicts this number and a test holds the two together.

use crate::device::cpu::pages::Pages;
use crate::device::gpu::Queue;
use crate::device::mapped::Mapped;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
pub struct Memory {
    backing: Backing,
    state: Mutex<State>,
}

#[derive(Debug)]
enum Backing {
    Host,
    Gpu(Arc<Queue>),
    /// Buffers are counted but hold nothing.
    Nothing {
        /// What is counted is what a GPU would take.
        for_gpu: bool,
    },
}

#[derive(Default)]
struct State {
    bytes_live: usize,
    bytes_peak: usize,
    bytes_offloaded: usize,
    /// Freed host buffers, by size in blocks: a training step asks for the same sizes again and again.
    free: HashMap<usize, Vec<Pages>>,
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
    /// Nobody has had these bytes before, so they are zero.
    is_new: bool,
}

#[derive(Debug)]
enum Place {
    Host(Pages),
    /// On a GPU, at this address.
    Gpu(u64),
    /// On a device that only counts.
    Nowhere,
    /// None on a device that only counts.
    File(Option<Mapped>),
}

impl Memory {
    pub fn of_host() -> Memory {
        Memory { backing: Backing::Host, state: Mutex::default() }
    }

    pub fn of_gpu(queue: Arc<Queue>) -> Memory {
        Memory { backing: Backing::Gpu(queue), state: Mutex::default() }
    }

    /// Memory that only counts.
    pub fn of_nothing(for_gpu: bool) -> Memory {
        Memory { backing: Backing::Nothing { for_gpu }, state: Mutex::default() }
    }

    pub fn allocate(memory: &Arc<Memory>, bytes: usize) -> Buffer {
        let count = Memory::bytes_taken(bytes) / 64;
        let reused = {
            let mut state = memory.lock();
            state.bytes_live += count * 64;
            state.bytes_peak = state.bytes_peak.max(state.bytes_live);
            state.free.get_mut(&count).and_then(Vec::pop)
        };
        let is_new = matches!(memory.backing, Backing::Host) && reused.is_none();
        let place = match &memory.backing {
            Backing::Host => Place::Host(reused.unwrap_or_else(|| Pages::zeroed(count * 64))),
            Backing::Gpu(queue) => Place::Gpu(queue.run(|driver| driver.allocate(count * 64))),
            Backing::Nothing { .. } => Place::Nowhere,
        };
        Buffer { memory: memory.clone(), place, bytes, is_new }
    }

    /// A buffer of `bytes` that lies in `file`; on a device that only counts there is none.
    pub fn adopt(memory: &Arc<Memory>, file: Option<Mapped>, bytes: usize) -> Buffer {
        let counts = matches!(memory.backing, Backing::Nothing { .. });
        assert_eq!(counts, file.is_none(), "a device that holds numbers has a file to put them in");
        memory.lock().bytes_offloaded += Memory::bytes_taken(bytes);
        Buffer { memory: memory.clone(), place: Place::File(file), bytes, is_new: true }
    }

    /// Whether a GPU has this memory, or would have it.
    pub fn is_of_gpu(&self) -> bool {
        matches!(self.backing, Backing::Gpu(_) | Backing::Nothing { for_gpu: true })
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
            Place::Host(_) | Place::Gpu(_) | Place::Nowhere => Memory::bytes_taken(self.bytes),
            Place::File(_) => 0,
        }
    }

    /// What the buffer keeps out of the device's memory.
    pub fn bytes_offloaded(&self) -> usize {
        Memory::bytes_taken(self.bytes) - self.bytes_taken()
    }

    /// Whether these bytes are zero as the system gave them: pages that nobody touches take no memory and no time.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Where a GPU finds it.
    pub fn address(&self) -> u64 {
        match self.place {
            Place::Gpu(address) => address,
            _ => panic!("a buffer that is not on a GPU has no address there"),
        }
    }

    /// Empty on a device that only counts.
    pub fn bytes(&self) -> &[u8] {
        let all: &[u8] = match &self.place {
            Place::Host(pages) => pages.bytes(),
            Place::Gpu(_) => panic!("the numbers of a GPU are not read from the host"),
            Place::Nowhere => &[],
            Place::File(file) => file.as_ref().map_or(&[], Mapped::bytes),
        };
        &all[..self.bytes.min(all.len())]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let all: &mut [u8] = match &mut self.place {
            Place::Host(pages) => pages.bytes_mut(),
            Place::Gpu(_) => panic!("the numbers of a GPU are not written from the host"),
            Place::Nowhere => &mut [],
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
        if let Place::Host(pages) = &mut self.place {
            state.free.entry(taken / 64).or_default().push(std::mem::take(pages));
        }
        drop(state);
        if let (Place::Gpu(address), Backing::Gpu(queue)) = (&self.place, &self.memory.backing) {
            queue.run(|driver| driver.free(*address, taken));
        }
    }
}
