//! Who this process is among the ranks, and how it is asked to stop; and the launcher, which starts the ranks of a node.

pub mod crew;
pub mod doctor;
pub mod failure;
pub mod identity;
pub mod job;
pub mod options;
pub mod outcome;
pub mod output;
pub mod requests;
pub mod signals;
pub mod spawn;
pub mod supervisor;
