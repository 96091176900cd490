//! Where the state spaces lie in the one address space of generic addresses.
//!
//! Invariant: no address of any space is a valid pointer of the host (all are at or above 2^52), and no two spaces overlap.

/// Global memory grows from here.
pub(crate) const GLOBAL: u64 = 1 << 52;
/// A shared address plus this is generic.
pub(crate) const SHARED_WINDOW: u64 = 1 << 60;
pub(crate) const LOCAL_WINDOW: u64 = 1 << 61;
pub(crate) const PARAMETER_WINDOW: u64 = 1 << 62;

const WINDOW_BYTES: u64 = 1 << 32;

/// The first shared address of a block: the driver keeps what lies below for itself, so that 0 is no address of a variable.
pub(crate) const SHARED_BEGIN: u32 = 1024;
pub(crate) const SHARED_BYTES_STATIC: usize = 48 << 10;
pub(crate) const SHARED_BYTES: usize = 227 << 10;

pub(crate) fn in_window(address: u64, window: u64) -> bool {
    address.wrapping_sub(window) < WINDOW_BYTES
}
