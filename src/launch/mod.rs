//! Who this process is among the ranks, and how it is asked to stop.

pub mod doctor;
pub mod identity;
pub mod signals;
pub mod supervisor;
