//! The data floor, from files to batches, and what it says when the files are not what they should be.
//!
//! Invariant: every failing case reads its message, and the message names the file and what would help.

mod rows;
mod support;
mod text;
mod tokens;
