//! What a launch counts.
//!
//! Invariant: counting changes nothing else.

/// The counts of one launch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counters {}
