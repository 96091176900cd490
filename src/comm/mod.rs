//! comm

pub mod connect;
pub mod metered;
pub mod rendezvous;
pub mod solo;
pub mod tcp;
pub mod threads;
