//! The groups that one rank belongs to, one for each axis of the mesh and the world.

use crate::comm::Group;
use crate::comm::solo::Solo;
use std::sync::Arc;

#[derive(Clone)]
pub struct Groups {
    pub world: Arc<dyn Group>,
    pub tp: Arc<dyn Group>,
    /// The ranks among which ZeRO cuts the state.
    pub shard: Arc<dyn Group>,
    /// The ranks that hold the same slices.
    pub replica: Arc<dyn Group>,
    /// The ranks of one pipeline, twice: activations and gradients travel apart, so that neither has to wait for the other's turn.
    pub down: Arc<dyn Group>,
    pub up: Arc<dyn Group>,
    /// First and last pipeline rank, where tied embeddings lie on two ranks.
    pub tie: Arc<dyn Group>,
}

impl Groups {
    /// A rank that is alone.
    pub fn solo() -> Groups {
        let solo: Arc<dyn Group> = Arc::new(Solo);
        Groups {
            world: solo.clone(),
            tp: solo.clone(),
            shard: solo.clone(),
            replica: solo.clone(),
            down: solo.clone(),
            up: solo.clone(),
            tie: solo,
        }
    }
}
