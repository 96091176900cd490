//! The groups that one rank belongs to, one for each axis of the mesh and the world.

use crate::comm::Group;
use crate::comm::connect::{self, Transport};
use crate::comm::metered::{Meter, Traffic};
use crate::comm::solo::Solo;
use crate::plan::mesh::Mesh;
use anyhow::Result;
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
    /// First and last pipeline rank, where tied embeddings may lie on two ranks.
    pub tie: Arc<dyn Group>,
    meters: Vec<Arc<Meter>>,
}

impl Groups {
    /// A rank that is alone.
    pub fn solo() -> Groups {
        let solo: Arc<dyn Group> = Arc::new(Solo);
        let [world, tp, shard, replica, down, up, tie] = [(); 7].map(|()| solo.clone());
        Groups { world, tp, shard, replica, down, up, tie, meters: Vec::new() }
    }

    /// The groups of `rank` in a world that is laid out as `mesh`.
    pub fn connect(transport: &Transport, mesh: &Mesh, rank: usize) -> Result<Groups> {
        let at = mesh.coordinates(rank);
        // Names are of the whole world, so each carries where the group lies on the axes along which it does not run.
        let [pp, replicate, shard, tp] = [at.pp, at.replicate, at.shard, at.tp];
        let line = mesh.pp_group(at);
        let wanted = [
            ("world".to_string(), (0..mesh.world()).collect()),
            (format!("tp of pp{pp} dp{replicate}.{shard}"), mesh.tp_group(at)),
            (format!("shard of pp{pp} dp{replicate} tp{tp}"), mesh.shard_group(at)),
            (format!("replica of pp{pp} shard{shard} tp{tp}"), mesh.replica_group(at)),
            (format!("down of dp{replicate}.{shard} tp{tp}"), line.clone()),
            (format!("up of dp{replicate}.{shard} tp{tp}"), line.clone()),
            (format!("tie of pp{} dp{replicate}.{shard} tp{tp}", at.end(mesh)), mesh.tie_group(at)),
        ];
        let made = connect::Groups::connect(transport, rank, mesh.world(), &wanted)?;
        let [world, tp, shard, replica, down, up, tie] = wanted.each_ref().map(|(name, _)| made.get(name));
        Ok(Groups { world, tp, shard, replica, down, up, tie, meters: made.meters().to_vec() })
    }

    /// What each group has carried since the last call, by its short name (`tp`, `shard`, ...).
    pub fn take_traffic(&self) -> Vec<(&'static str, Traffic)> {
        ["world", "tp", "shard", "replica", "down", "up", "tie"].into_iter().zip(self.meters.iter().map(|meter| meter.take())).collect()
    }

    /// Seconds that this rank has stood still for its groups since the last call; also ends the counts of `take_traffic`.
    pub fn take_seconds_exposed(&self) -> f64 {
        // Not `sum`: that of nothing is -0.
        self.take_traffic().iter().flat_map(|(_, traffic)| traffic.values()).fold(0.0, |sum, count| sum + count.seconds_exposed)
    }
}
