//! Operations on tensors: one file for each, with its formula, its shape checks and its path on every device.
//!
//! Invariant: work is split over rows or columns of what is written, never over the terms of a sum; so a result depends on its operands
//! alone, not on the number of threads. On the CPU only +, -, *, /, fused multiply-adds and square roots are used, each rounded on its own: no
//! processor gives other bits. A GPU has its kernel of the operation in `cuda/`; where that adds in another order or approximates, its file says so.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod attention_backward;
pub mod attention_forward;
pub mod attention_kernels;
pub mod blocks;
pub mod chunks;
pub mod cross_entropy;
pub mod elementwise;
pub mod embedding;
pub mod exact;
pub mod functions;
pub mod matmul;
pub mod norm;
pub mod reduce;
pub mod rope;
pub mod rows;
pub mod select;
