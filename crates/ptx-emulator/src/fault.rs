//! What can go wrong: text that cannot be loaded, and a launch that breaks a rule.
//!
//! Invariant: every fault of a kernel names the kernel, the line, the block and the thread, and says in one sentence what happened.

use std::error::Error;
use std::fmt;

/// PTX that this emulator cannot execute, with the line of the text.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadError {
    line: u32,
    message: String,
}

impl LoadError {
    pub(crate) fn new(line: u32, message: String) -> LoadError {
        LoadError { line, message }
    }

    /// The line of the PTX text, counted from 1.
    pub fn line(&self) -> u32 {
        self.line
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}: {}", self.line, self.message)
    }
}

impl Error for LoadError {}

/// The kinds of faults, for tests that expect one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Wrong number or size of arguments, an impossible grid, block or shared size.
    Launch,
    /// An access outside every allocation, past the end of shared, local or parameter memory.
    OutOfBounds,
    /// An access to memory that was given back.
    Freed,
    Misaligned,
    /// Warps or lanes that wait for each other, or a loop that does not end.
    Deadlock,
    /// A barrier, shuffle, vote or matrix instruction that its lanes do not reach together, or a wrong member mask.
    Divergence,
    /// `trap` or a failed device-side assertion.
    Trap,
    /// Use of an mbarrier, a copy group, a matrix descriptor or a tensor map against its rules.
    Protocol,
    /// Checked runs: two accesses that nothing orders, one of them a write.
    Race,
    /// Checked runs: a read of bytes that nobody wrote.
    Uninitialised,
    /// Checked runs: bytes of an asynchronous copy read or overwritten before it was waited for.
    InFlight,
    /// Checked runs: an access through the asynchronous proxy to bytes written without `fence.proxy.async`.
    MissingFence,
}

/// Where in a launch something happened.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Place {
    pub kernel: String,
    /// File and line of the CUDA source, where the PTX has line information.
    pub source: Option<(String, u32)>,
    pub ptx_line: u32,
    /// The opcode with its qualifiers.
    pub instruction: String,
    pub block: [u32; 3],
    pub thread: [u32; 3],
}

#[derive(Clone, Debug, PartialEq)]
struct Content {
    kind: FaultKind,
    place: Option<Place>,
    message: String,
}

/// A broken rule. Boxed, because every step of the interpreter returns one or nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault(Box<Content>);

impl Fault {
    pub(crate) fn of_host(kind: FaultKind, message: String) -> Fault {
        Fault(Box::new(Content { kind, place: None, message }))
    }

    pub(crate) fn of_kernel(kind: FaultKind, place: Place, message: String) -> Fault {
        Fault(Box::new(Content { kind, place: Some(place), message }))
    }

    pub fn kind(&self) -> FaultKind {
        self.0.kind
    }

    /// None for a fault of the host: a bad copy, a bad launch.
    pub fn place(&self) -> Option<&Place> {
        self.0.place.as_ref()
    }

    /// What happened, without the place.
    pub fn message(&self) -> &str {
        &self.0.message
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(place) = &self.0.place else { return f.write_str(&self.0.message) };
        let ([bx, by, bz], [tx, ty, tz]) = (place.block, place.thread);
        write!(f, "{} at ", place.kernel)?;
        match &place.source {
            Some((file, line)) => write!(f, "{file}:{line}")?,
            None => write!(f, "PTX line {}", place.ptx_line)?,
        }
        write!(f, ": block ({bx}, {by}, {bz}) thread ({tx}, {ty}, {tz}), {}, {}", place.instruction, self.0.message)
    }
}

impl Error for Fault {}
