//! tensor_parallel
