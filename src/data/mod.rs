//! Text and token files -> the rows of a training step.
//!
//! `sources` turns what the configuration names into corpora: it finds `files`, has `prepare` write text as token shards with a
//! `tokenizer`, and opens them as a `corpus`. The `sampler` says which tokens a row of a step is, the `loader` reads them.
//!
//! Invariant: the rows of a step are a function of (files, seed, step, row). Nothing here has a position that a resume would need.

pub mod corpus;
pub mod files;
pub mod loader;
pub mod prepare;
pub mod sampler;
pub mod shards;
pub mod sources;
pub mod tokenizer;
