//! The ways of being many: tensor, pipeline and ZeRO-sharded data parallelism.

pub mod copies;
pub mod flat;
pub mod gradients;
pub mod pipeline;
pub mod state;
pub mod tensor_parallel;
pub mod unit;
pub mod update;
pub mod weights;
pub mod zero;
