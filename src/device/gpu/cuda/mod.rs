//! A real GPU, by NVIDIA's driver and, for matrix products, cuBLASLt where it is there.
//!
//! A rank takes as much memory as its plan foretells in one allocation and gives it out itself (`arena.rs`). Two streams run beside each
//! other, one for compute and one for copies. What is freed may be given out again at once, because its next use is queued behind its
//! last one; who uses memory on the other stream orders the two by an event before.
//!
//! Graphs of CUDA, which replay a step's launches at once, are not used: a replay repeats addresses, but a step's tensors lie elsewhere
//! each time, and the host takes part in every step (clipping, losses, collectives through its memory).
//!
//! Invariant: nothing here panics on what the driver answers; a refusal is an error that names the call and the GPU.

#![allow(unsafe_code)]

#[macro_use]
pub mod table;

pub mod arena;
pub mod context;
pub mod failure;
pub mod libraries;
pub mod modules;
pub mod pinned;
pub mod probe;
pub mod products;
pub mod recipe;

#[cfg(test)]
#[macro_use]
mod fake;
#[cfg(test)]
mod fake_products;
#[cfg(test)]
mod tests;

use super::driver::{Argument, Driver, Event, Gemm, Grid, Stream};
use anyhow::{Context as _, Error, Result, anyhow, ensure};
use arena::{Arena, GRANULE};
use context::Context;
use cudarc::driver::sys as cu;
use failure::{OUT_OF_MEMORY, Refusal};
use modules::Modules;
use pinned::Pinned;
use probe::Found;
use products::Multiplier;
use recipe::Step;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the driver and cuBLASLt take of a GPU for the kernels that a run uses, beside the memory that a plan foretells.
pub const BYTES_FOR_KERNELS: usize = 256 << 20;

/// Memory added to the first segment comes in steps of this.
const SEGMENT: usize = 64 << 20;

pub struct Cuda {
    context: Context,
    /// What to do where memory runs out, in the words of the configuration.
    help: String,
    state: Mutex<State>,
}

struct State {
    arena: Arena,
    modules: Modules,
    pinned: Pinned,
    /// None: there is no library, and nobody asks for its products.
    multiplier: Option<Multiplier>,
    /// Events recorded.
    recorded: u64,
}

/// What an arena has beyond the peak that is foretold: a plan counts what tensors take together, not the gaps between them.
pub fn bytes_with_slack(peak: usize) -> usize {
    (peak + peak / 16).next_multiple_of(SEGMENT)
}

impl Cuda {
    /// Takes `bytes` of the GPU's memory. `help`: what to do where they do not do.
    pub fn new(context: Context, library: Option<Found>, bytes: usize, help: String) -> Result<Cuda> {
        let state = State {
            arena: Arena::default(),
            modules: Modules::new(modules::architecture(context.facts.capability)),
            pinned: Pinned::new(&context)?,
            multiplier: library.map(|found| Multiplier::new(found, &context)).transpose()?,
            recorded: 0,
        };
        let cuda = Cuda { context, help, state: Mutex::new(state) };
        cuda.grow(&mut cuda.lock(), bytes)?;
        Ok(cuda)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a segment of `bytes` to the arena.
    fn grow(&self, state: &mut State, bytes: usize) -> Result<()> {
        let mut start = 0;
        let context = &self.context;
        let taken = context.bound(None, |driver| {
            // SAFETY: the driver writes an address to where it is told to.
            match unsafe { call!(driver.memory_allocate, &mut start, bytes) } {
                // It is told below, with what is taken.
                Err(Refusal { code: OUT_OF_MEMORY, .. }) => Ok(false),
                other => other.map(|()| true),
            }
        })?;
        if !taken {
            return Err(self.out_of_memory(&state.arena, bytes));
        }
        ensure!(start.is_multiple_of(GRANULE as u64), "the driver gave memory at {start:#x}, which is no multiple of {GRANULE} bytes");
        state.arena.add(start, bytes);
        Ok(())
    }

    fn out_of_memory(&self, arena: &Arena, asked: usize) -> Error {
        let free = self.context.bytes_free().map_or("an unknown amount".to_string(), mib);
        anyhow!(
            "out of memory: {} asked for, {} of this rank's {} taken, the largest free range is {}, and the GPU itself has {free} left; {}",
            mib(asked),
            mib(arena.bytes_taken()),
            mib(arena.bytes()),
            mib(arena.largest_free()),
            self.help
        )
    }

    fn take(&self, state: &mut State, bytes: usize) -> Result<u64> {
        if let Some(start) = state.arena.take(bytes) {
            return Ok(start);
        }
        self.grow(state, Arena::granules(bytes).next_multiple_of(SEGMENT))?;
        state.arena.take(bytes).context("a new segment of memory is too small for what it was made for")
    }

    fn queue_product(&self, state: &mut State, gemm: &Gemm, scratch: &mut Vec<u64>) -> Result<()> {
        let steps = recipe::steps(gemm, &mut |bytes| {
            let start = self.take(state, bytes)?;
            scratch.push(start);
            Ok(start)
        })?;
        for step in steps {
            match step {
                Step::Zero { address, bytes } => self.zero(Stream::Compute, address, bytes)?,
                Step::CopyRows { to, to_pitch, from, from_pitch, width, rows } => {
                    let copy = rows_copied([to, from], [to_pitch, from_pitch], width, rows);
                    let stream = self.context.stream(Stream::Compute);
                    // SAFETY: the description is read before the call returns.
                    self.context.bound(Some("rows of a product"), |driver| unsafe { call!(driver.copy_rows, &copy, stream) })?;
                }
                Step::Product { sizes, a, b, d, bias } => {
                    let multiplier = state.multiplier.as_mut().expect("looked at before there are steps");
                    multiplier.multiply(&self.context, &sizes, [a, b, d], bias)?;
                }
            }
        }
        Ok(())
    }
}

fn rows_copied([to, from]: [u64; 2], [to_pitch, from_pitch]: [usize; 2], width: usize, rows: usize) -> cu::CUDA_MEMCPY2D {
    let device = cu::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE;
    cu::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: device,
        srcHost: null_mut(),
        srcDevice: from,
        srcArray: null_mut(),
        srcPitch: from_pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: device,
        dstHost: null_mut(),
        dstDevice: to,
        dstArray: null_mut(),
        dstPitch: to_pitch,
        WidthInBytes: width,
        Height: rows,
    }
}

fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64)
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.context.name())
    }
}

impl Driver for Cuda {
    fn name(&self) -> String {
        self.context.name()
    }

    fn products(&self) -> String {
        self.lock().multiplier.as_ref().map_or("nobody".to_string(), Multiplier::name)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.take(&mut self.lock(), bytes)
    }

    fn free(&self, address: u64, _: usize) -> Result<()> {
        ensure!(self.lock().arena.give_back(address), "memory at {address:#x} is freed, but not given out");
        Ok(())
    }

    fn launch(&self, stream: Stream, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        self.lock().modules.launch(&self.context, stream, kernel, grid, arguments)
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        ensure!(gemm.k > 0, "a product of {} x {} sums over nothing", gemm.m, gemm.n);
        let (mut state, mut scratch) = (self.lock(), Vec::new());
        ensure!(state.multiplier.is_some(), "a product is asked of cuBLASLt, which was not loaded");
        let queued = self.queue_product(&mut state, gemm, &mut scratch);
        // Whoever gets the scratch next uses it after what was queued here.
        let returned = scratch.into_iter().all(|start| state.arena.give_back(start));
        assert!(returned, "scratch is given out once");
        queued
    }

    fn zero(&self, stream: Stream, address: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range is on the GPU and given out.
        self.context.bound(None, |driver| unsafe { call!(driver.fill, address, 0, bytes, self.context.stream(stream)) })
    }

    fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges are on the GPU and given out.
        self.context.bound(None, |driver| unsafe { call!(driver.copy_on_device, to, from, bytes, self.context.stream(stream)) })
    }

    fn upload(&self, stream: Stream, to: u64, bytes: &[u8]) -> Result<()> {
        self.lock().pinned.upload(&self.context, stream, to, bytes)
    }

    fn download(&self, stream: Stream, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.lock().pinned.download(&self.context, stream, from, bytes)
    }

    fn record(&self, stream: Stream) -> Result<Event> {
        let mut state = self.lock();
        state.recorded += 1;
        self.context.record(state.recorded, stream)?;
        Ok(Event(state.recorded))
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        let recorded = self.lock().recorded;
        self.context.wait(stream, event.0, recorded)
    }

    fn synchronize(&self) -> Result<()> {
        self.context.synchronize()
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        // What fails here has failed before and been told; the process's end frees the rest.
        self.context.synchronize().ok();
        state.multiplier.iter_mut().for_each(Multiplier::release);
        state.modules.release(&self.context);
        state.pinned.release(&self.context);
        for start in state.arena.segments() {
            // SAFETY: nothing is queued that uses the segment.
            self.context.bound(None, |driver| unsafe { call!(driver.memory_free, start) }).ok();
        }
    }
}
