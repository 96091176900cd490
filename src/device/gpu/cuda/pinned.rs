//! Copies between the GPU and memory that the driver cannot reach by itself, through a few pinned buffers.
//!
//! The host's processor copies one piece while the GPU copies another. The buffers are plain pinned memory, not write-combined: the host
//! reads them as fast as any other.
//!
//! Invariant: a buffer is touched only after the event behind its last copy.

#![allow(unsafe_code)]

use super::context::{Context, new_event};
use super::failure::Refusal;
use super::table::Driver;
use crate::device::gpu::driver::Stream;
use anyhow::{Context as _, Result};
use cudarc::driver::sys as cu;
use std::ptr::{null_mut, slice_from_raw_parts, slice_from_raw_parts_mut};

/// Bytes of a buffer: enough that starting a copy is not what takes the time.
pub const PIECE: usize = 4 << 20;
const BUFFERS: usize = 4;

pub struct Pinned {
    buffers: Vec<Buffer>,
    next: usize,
}

struct Buffer {
    memory: *mut u8,
    event: cu::CUevent,
    /// Whether a copy may be under way.
    busy: bool,
}

// SAFETY: the buffers are this one's alone, and the driver may be called from any thread.
unsafe impl Send for Pinned {}

impl Pinned {
    pub fn new(context: &Context) -> Result<Pinned> {
        let mut pinned = Pinned { buffers: Vec::new(), next: 0 };
        for _ in 0..BUFFERS {
            let buffer = context.bound(None, |driver| {
                let mut memory = null_mut();
                // SAFETY: the driver writes an address to where it is told to.
                unsafe { call!(driver.host_allocate, &mut memory, PIECE, cu::CU_MEMHOSTALLOC_PORTABLE) }?;
                let event = new_event(driver);
                if event.is_err() {
                    // SAFETY: nobody uses the memory yet.
                    unsafe { call!(driver.host_free, memory) }?;
                }
                Ok(Buffer { memory: memory.cast(), event: event?, busy: false })
            });
            let help = || format!("{} MiB of pinned memory for copies: `ulimit -l` may be too low", (BUFFERS * PIECE) >> 20);
            pinned.buffers.push(buffer.with_context(help)?);
        }
        Ok(pinned)
    }

    /// A buffer with no copy under way.
    fn free(&mut self, driver: &Driver) -> Result<usize, Refusal> {
        let place = self.next;
        self.next = (place + 1) % BUFFERS;
        self.finish(driver, place)?;
        Ok(place)
    }

    /// Waits for the copy of a buffer.
    fn finish(&mut self, driver: &Driver, place: usize) -> Result<(), Refusal> {
        let buffer = &mut self.buffers[place];
        if buffer.busy {
            // SAFETY: the event is alive.
            unsafe { call!(driver.event_synchronize, buffer.event) }?;
            buffer.busy = false;
        }
        Ok(())
    }

    /// Queues a copy of `bytes` to the GPU; they may be changed when this returns.
    pub fn upload(&mut self, context: &Context, stream: Stream, to: u64, bytes: &[u8]) -> Result<()> {
        let stream = context.stream(stream);
        context.bound(Some("upload"), |driver| {
            for (piece, to) in bytes.chunks(PIECE).zip((to..).step_by(PIECE)) {
                let place = self.free(driver)?;
                let buffer = &mut self.buffers[place];
                // SAFETY: the buffer has PIECE bytes, which no copy reads any more.
                unsafe { &mut *slice_from_raw_parts_mut(buffer.memory, piece.len()) }.copy_from_slice(piece);
                buffer.busy = true;
                // SAFETY: the buffer stays as it is until the event has come.
                unsafe {
                    call!(driver.copy_to_device, to, buffer.memory.cast(), piece.len(), stream)?;
                    call!(driver.event_record, buffer.event, stream)?;
                }
            }
            Ok(())
        })
    }

    /// Copies from the GPU to `bytes`, which are there when this returns.
    pub fn download(&mut self, context: &Context, stream: Stream, from: u64, bytes: &mut [u8]) -> Result<()> {
        let stream = context.stream(stream);
        context.bound(Some("download"), |driver| {
            // A piece is taken from its buffer when the next one is on its way.
            let mut before: Option<(usize, &mut [u8])> = None;
            for (piece, from) in bytes.chunks_mut(PIECE).zip((from..).step_by(PIECE)) {
                let place = self.free(driver)?;
                let buffer = &mut self.buffers[place];
                buffer.busy = true;
                // SAFETY: the buffer has PIECE bytes, which are not read before the event has come.
                unsafe {
                    call!(driver.copy_to_host, buffer.memory.cast(), from, piece.len(), stream)?;
                    call!(driver.event_record, buffer.event, stream)?;
                }
                if let Some((place, piece)) = before.replace((place, piece)) {
                    self.take(driver, place, piece)?;
                }
            }
            before.map_or(Ok(()), |(place, piece)| self.take(driver, place, piece))
        })
    }

    fn take(&mut self, driver: &Driver, place: usize, piece: &mut [u8]) -> Result<(), Refusal> {
        self.finish(driver, place)?;
        // SAFETY: the buffer has PIECE bytes, which the copy has written.
        piece.copy_from_slice(unsafe { &*slice_from_raw_parts(self.buffers[place].memory, piece.len()) });
        Ok(())
    }

    /// Gives the buffers back; no copy may be under way.
    pub fn release(&mut self, context: &Context) {
        for buffer in self.buffers.drain(..) {
            // What fails here has failed before and been told.
            context
                .bound(None, |driver| {
                    // SAFETY: nobody uses the event and the memory any more.
                    unsafe { call!(driver.event_destroy, buffer.event).and_then(|()| call!(driver.host_free, buffer.memory.cast())) }
                })
                .ok();
        }
    }
}
