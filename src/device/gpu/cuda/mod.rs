//! A real GPU, by NVIDIA's driver and cuBLASLt.
//!
//! Invariant: x.

pub mod failure;
pub mod libraries;
pub mod probe;
pub mod table;
