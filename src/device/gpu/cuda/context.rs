//! One GPU opened for this process: the driver's context, its streams and events, and errors that say which GPU and which call.
//!
//! Invariant: every call of the driver that needs the context is made through `bound`, so that it works from any thread.

#![allow(unsafe_code)]

use super::failure::{self, Refusal};
use super::libraries::Search;
use super::probe::{self, Facts, Found, Started};
use super::table::{Driver, Texts};
use crate::device::gpu::driver::Stream;
use anyhow::{Context as _, Error, Result};
use cudarc::driver::sys as cu;
use std::fmt;
use std::ptr::null_mut;

/// Events that exist at a time. One that is asked for after so many later ones were recorded is waited for as a part of those.
const EVENTS: u64 = 256;

pub struct Context {
    started: Started,
    pub facts: Facts,
    /// Ranks of this node that compute on this GPU.
    sharing: usize,
    device: cu::CUdevice,
    context: cu::CUcontext,
    streams: [cu::CUstream; 2],
    /// One more than there may be: it belongs to nobody.
    events: Vec<cu::CUevent>,
}

// SAFETY: the handles are the driver's, which may be called from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; nothing here changes after `open`.
unsafe impl Sync for Context {}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl Context {
    /// Opens the GPU of the rank `local_rank` of the `local_world` on this node.
    pub fn find(search: &Search, local_rank: usize, local_world: usize) -> Result<Context> {
        let started = probe::start(search)?;
        let (facts, gpus) = started.gpu_of(local_rank)?;
        let sharing = (local_world - facts.ordinal.min(local_world - 1)).div_ceil(gpus);
        Context::open(started, facts, sharing)
    }

    /// Loads the cuBLASLt that goes with the GPU's driver.
    pub fn products(&self, search: &Search) -> Result<Found> {
        self.started.products(search)
    }

    pub fn open(started: Started, facts: Facts, sharing: usize) -> Result<Context> {
        let driver = &started.driver;
        let (mut device, mut handle) = (0, null_mut());
        // SAFETY: the driver writes a device and a context to where it is told to.
        unsafe { call!(driver.device, &mut device, facts.ordinal as i32).and_then(|()| call!(driver.context_retain, &mut handle, device)) }
            .map_err(|refusal| started.refused(refusal))
            .with_context(|| format!("opening GPU {} ({}, {})", facts.ordinal, facts.name, facts.bus_id))?;
        // From here on the context is given back when this is dropped.
        let mut context = Context { started, facts, sharing, device, context: handle, streams: [null_mut(); 2], events: Vec::new() };
        context.make_streams()?;
        Ok(context)
    }

    fn make_streams(&mut self) -> Result<()> {
        let (mut streams, mut events) = (self.streams, Vec::new());
        let made = self.bound(None, |driver| {
            for stream in &mut streams {
                // SAFETY: the driver writes a stream to where it is told to.
                unsafe { call!(driver.stream_create, stream, cu::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32) }?;
            }
            for _ in 0..=EVENTS {
                events.push(new_event(driver)?);
            }
            Ok(())
        });
        (self.streams, self.events) = (streams, events);
        made
    }

    /// `GPU 0 (NVIDIA H100 80GB HBM3, 0000:3b:00.0)`, and how many ranks share it.
    pub fn name(&self) -> String {
        let Facts { ordinal, name, bus_id, .. } = &self.facts;
        let shared = if self.sharing > 1 { format!(", shared by {} ranks", self.sharing) } else { String::new() };
        format!("GPU {ordinal} ({name}, {bus_id}{shared})")
    }

    /// Ranks of this node that compute on this GPU.
    pub fn sharing(&self) -> usize {
        self.sharing
    }

    /// Memory of the GPU that nobody has taken.
    pub fn bytes_free(&self) -> Result<usize> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the driver writes two numbers to where it is told to.
        self.bound(None, |driver| unsafe { call!(driver.memory_info, &mut free, &mut total) })?;
        Ok(free)
    }

    /// Does `work` with the context bound to the calling thread. `what`: what it is for, where the name of a call does not say.
    pub fn bound<T>(&self, what: Option<&str>, work: impl FnOnce(&Driver) -> Result<T, Refusal>) -> Result<T> {
        let driver = &self.started.driver;
        // SAFETY: the context is this one's, which is alive.
        let bound = unsafe { call!(driver.context_set, self.context) };
        bound.and_then(|()| work(driver)).map_err(|refusal| failure::sentence(refusal, what, Some(&self.started.texts)))
    }

    /// What the driver says of a refusal.
    pub fn sentence(&self, refusal: Refusal) -> Error {
        self.started.refused(refusal)
    }

    pub fn texts(&self) -> &Texts {
        &self.started.texts
    }

    pub fn stream(&self, stream: Stream) -> cu::CUstream {
        match stream {
            Stream::Compute => self.streams[0],
            Stream::Copies => self.streams[1],
        }
    }

    /// Records the `number`th event on `stream`.
    pub fn record(&self, number: u64, stream: Stream) -> Result<()> {
        let event = self.events[(number % EVENTS) as usize];
        // SAFETY: both are alive, and of this context.
        self.bound(None, |driver| unsafe { call!(driver.event_record, event, self.stream(stream)) })
    }

    /// Makes `stream` wait for the `number`th event of the `recorded` that there have been.
    pub fn wait(&self, stream: Stream, number: u64, recorded: u64) -> Result<()> {
        if recorded - number < EVENTS {
            let event = self.events[(number % EVENTS) as usize];
            // SAFETY: both are alive, and of this context.
            return self.bound(None, |driver| unsafe { call!(driver.stream_wait, self.stream(stream), event, 0) });
        }
        // A later event is in its place. All that both streams have been given until now is no less than what it stood for.
        let event = self.events[EVENTS as usize];
        for earlier in [Stream::Compute, Stream::Copies] {
            self.bound(None, |driver| {
                // SAFETY: all are alive, and of this context. A wait stands for what the event was recorded after when it was made.
                unsafe {
                    call!(driver.event_record, event, self.stream(earlier))
                        .and_then(|()| call!(driver.stream_wait, self.stream(stream), event, 0))
                }
            })?;
        }
        Ok(())
    }

    pub fn synchronize(&self) -> Result<()> {
        for stream in self.streams {
            // SAFETY: the stream is alive, and of this context.
            self.bound(None, |driver| unsafe { call!(driver.stream_synchronize, stream) })?;
        }
        Ok(())
    }
}

/// An event that measures no time.
pub fn new_event(driver: &Driver) -> Result<cu::CUevent, Refusal> {
    let mut event = null_mut();
    // SAFETY: the driver writes an event to where it is told to.
    unsafe { call!(driver.event_create, &mut event, cu::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32) }?;
    Ok(event)
}

impl Drop for Context {
    fn drop(&mut self) {
        // What fails here has failed before and been told; the process's end frees the rest.
        self.bound(None, |driver| {
            // SAFETY: the handles are this context's own, and nothing uses them any more.
            unsafe {
                self.events.iter().for_each(|&event| {
                    call!(driver.event_destroy, event).ok();
                });
                self.streams.iter().filter(|stream| !stream.is_null()).for_each(|&stream| {
                    call!(driver.stream_destroy, stream).ok();
                });
                call!(driver.context_release, self.device)
            }
        })
        .ok();
    }
}
