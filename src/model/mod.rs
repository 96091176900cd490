//! Decoder families: layers as descriptions, forward and backward written by hand, for any layout.
//!
//! A layer holds parameter numbers, local dims and the region it is cut in; it owns no tensor. Its `forward` returns what its
//! `backward` needs, and the two mirror each other line by line.

pub mod attention;
pub mod block;
pub mod embedding;
pub mod family;
pub mod head;
pub mod init;
pub mod mlp;
pub mod norm;
pub mod stage;
