//! ferrotron: a model-parallel trainer for large language models.
//!
//! The house has floors; a room imports only from the floors below it (held by `tests/tidy.rs`):
//!
//! ```text
//! train/                            one training run
//! model/  bench/                    decoder families, forward and backward, for any layout | how fast operations are
//! parallel/                         tensor, pipeline and ZeRO-sharded data parallelism
//! ops/  comm/  checkpoint/          operations | collectives | sharded files
//! plan/ data/  device/              decisions, pure | tokens | where numbers live
//! config shape dtype rng launch/
//! elementary                        the ground
//! ```

pub mod bench;
pub mod checkpoint;
pub mod comm;
pub mod config;
pub mod data;
pub mod device;
pub mod dtype;
pub mod elementary;
pub mod launch;
pub mod model;
pub mod ops;
pub mod parallel;
pub mod plan;
pub mod rng;
pub mod shape;
pub mod train;
