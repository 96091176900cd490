//! data

pub mod corpus;
pub mod loader;
pub mod prepare;
pub mod sampler;
pub mod tokenizer;
