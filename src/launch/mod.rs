//! launch

pub mod identity;
pub mod supervisor;
