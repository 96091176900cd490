//! model

pub mod attention;
pub mod block;
pub mod embedding;
pub mod head;
pub mod init;
pub mod mlp;
pub mod stage;
