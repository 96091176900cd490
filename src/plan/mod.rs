//! plan

pub mod budget;
pub mod catalog;
pub mod layout;
pub mod mesh;
pub mod schedule;
pub mod simulate;
