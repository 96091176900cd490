//! parallel

pub mod flat;
pub mod pipeline;
pub mod tensor_parallel;
pub mod zero;
