//! checkpoint

pub mod export;
pub mod import;
pub mod index;
pub mod load;
pub mod safetensors;
pub mod save;
