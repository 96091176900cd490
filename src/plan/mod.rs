//! Everything that is decided before the first FLOP, by pure functions, as data: no device, socket, clock or environment is touched.
//!
//! Invariant: after `Plan::new` nobody reads the configuration to make a decision about layout.

pub mod budget;
pub mod catalog;
pub mod layout;
pub mod mesh;
pub mod picture;
pub mod schedule;
pub mod simulate;
pub mod stages;

use crate::config::source::Problem;
use crate::config::{Config, Model, Recompute, SumOrder};
use crate::dtype::Dtype;
use catalog::{Kind, Unit};
use layout::{Share, UnitLayout};
use mesh::{Coordinates, Mesh};
use schedule::Schedule;
use schedule::passes::Reductions;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The run's canonical sums, fixed when it starts and kept in its checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// The finest tensor-parallel cut.
    pub shards: usize,
    /// The finest data-parallel cut.
    pub lanes: usize,
    pub order: Order,
}

/// What is added first: each lane's sequences, or each micro-batch over the lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    Lanes,
    Rows,
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub model: Model,
    pub mesh: Mesh,
    pub geometry: Geometry,
    pub units: Vec<Unit>,
    /// The units of each stage, in the order of the chain.
    pub stages: Vec<Range<usize>>,
    pub schedule: Schedule,
    pub zero: usize,
    pub dtype: Dtype,
    pub recompute: Recompute,
    pub sequence_parallel: bool,
    /// Tokens of a sequence.
    pub t: usize,
    /// Sequences of a micro-batch and of a step.
    pub micro_batch: usize,
    pub global_batch: usize,
}

/// What one rank makes of the plan.
#[derive(Clone, Debug)]
pub struct RankPlan {
    pub at: Coordinates,
    pub share: Share,
    /// Rows of the global batch, in the order of this rank's micro-batches.
    pub rows: Range<usize>,
    /// Lanes whose gradients this rank adds up.
    pub lanes: usize,
    pub micros_per_lane: usize,
    /// For each of this rank's chunks the units it holds, as indices into `units` below.
    pub chunks: Vec<Range<usize>>,
    /// This rank's units: index into the plan's, and layout.
    pub units: Vec<(usize, UnitLayout)>,
}

impl Plan {
    /// `geometry`: that of the checkpoint to go on from; a run that starts takes it from the configuration and its first layout.
    pub fn new(config: &Config, world: usize, geometry: Option<Geometry>) -> Result<Plan, Vec<Problem>> {
        let mut problems = Vec::new();
        let mesh = mesh_of(config, world, &mut problems);
        let geometry = geometry.unwrap_or_else(|| geometry_of(config, &mesh));
        check_geometry(config, &mesh, &geometry, &mut problems);
        let units = catalog::units(&config.model, &config.optimizer.no_decay);
        if !problems.is_empty() {
            return Err(problems);
        }
        let micros = config.train.global_batch_size / mesh.dp() / config.train.micro_batch_size;
        let schedule = schedule::by_name(&config.parallel.pp_schedule, mesh.pp, micros, config.parallel.pp_chunks)
            .map_err(|error| vec![problem("parallel.pp_schedule", format!("{error:#}"), None)])?
            .complete(Reductions::Last);
        let stages = vec![0..units.len()];
        Ok(Plan {
            model: config.model.clone(),
            mesh,
            geometry,
            units,
            stages,
            schedule,
            zero: config.parallel.zero as usize,
            dtype: config.train.dtype,
            recompute: config.train.recompute,
            sequence_parallel: config.parallel.sequence_parallel,
            t: config.train.seq_len,
            micro_batch: config.train.micro_batch_size,
            global_batch: config.train.global_batch_size,
        })
    }

    pub fn rank(&self, rank: usize) -> RankPlan {
        let at = self.mesh.coordinates(rank);
        let dp = at.dp(&self.mesh);
        let share = Share { shards: self.geometry.shards, rank: at.tp, size: self.mesh.tp };
        let per_rank = self.global_batch / self.mesh.dp();
        let lanes = self.geometry.lanes / self.mesh.dp();
        let mut units = Vec::new();
        let mut chunks = Vec::new();
        let placement = &self.schedule.placement;
        for chunk in 0..placement.chunks {
            let start = units.len();
            for unit in self.stages[placement.stage(at.pp, chunk)].clone() {
                // 16 elements are a cache line of f32: slices of different ranks then never share one.
                units.push((unit, UnitLayout::new(&self.units[unit], share, 16 * self.mesh.shard)));
            }
            chunks.push(start..units.len());
        }
        RankPlan {
            at,
            share,
            rows: dp * per_rank..(dp + 1) * per_rank,
            lanes,
            micros_per_lane: per_rank / lanes / self.micro_batch,
            chunks,
            units,
        }
    }

    pub fn tokens_per_step(&self) -> u64 {
        (self.global_batch * self.t) as u64
    }

    /// Rows of a micro-batch.
    pub fn micro_rows(&self) -> usize {
        self.micro_batch * self.t
    }
}

impl RankPlan {
    pub fn kind(&self, plan: &Plan, unit: usize) -> Kind {
        plan.units[self.units[unit].0].kind
    }

    pub fn micros(&self) -> usize {
        self.lanes * self.micros_per_lane
    }
}

fn mesh_of(config: &Config, world: usize, problems: &mut Vec<Problem>) -> Mesh {
    let parallel = &config.parallel;
    let (tp, pp, replicate) = (parallel.tp, parallel.pp, parallel.dp_replicate);
    let fixed = tp * pp * replicate;
    let shard = match parallel.dp_shard {
        -1 if world % fixed == 0 => world / fixed,
        -1 => {
            let message = format!("tp {tp} × pp {pp} × dp_replicate {replicate} = {fixed} does not divide the world of {world} ranks");
            let help = format!("start a multiple of {fixed} ranks, or lower one of the three");
            problems.push(problem("parallel.tp", message, Some(help)));
            1
        }
        shard => {
            let shard = usize::try_from(shard).unwrap_or(1);
            if fixed * shard != world {
                let message = format!(
                    "tp {tp} × pp {pp} × dp_replicate {replicate} × dp_shard {shard} = {}, but the world has {world} ranks",
                    fixed * shard
                );
                problems.push(problem("parallel.dp_shard", message, Some(format!("start {} ranks, or set dp_shard = -1", fixed * shard))));
            }
            shard
        }
    };
    Mesh { pp, replicate, shard, tp }
}

fn geometry_of(config: &Config, mesh: &Mesh) -> Geometry {
    let or = |chosen: usize, default: usize| if chosen == 0 { default } else { chosen };
    let order = match (config.geometry.order, config.parallel.zero) {
        (SumOrder::Lanes, _) | (SumOrder::Auto, 0 | 1) => Order::Lanes,
        (SumOrder::Rows, _) | (SumOrder::Auto, _) => Order::Rows,
    };
    Geometry { shards: or(config.geometry.shards, mesh.tp), lanes: or(config.geometry.lanes, mesh.dp()), order }
}

fn check_geometry(config: &Config, mesh: &Mesh, geometry: &Geometry, problems: &mut Vec<Problem>) {
    let Geometry { shards, lanes, .. } = *geometry;
    let (dp, tp) = (mesh.dp(), mesh.tp);
    let mut divides = |key: &str, what: &str, number: usize, by_what: &str, by: usize| {
        if by == 0 || !number.is_multiple_of(by) {
            problems.push(problem(key, format!("{what} {number} is not divisible by {by_what} {by}"), Some(nearest(number, by))));
        }
    };
    divides("parallel.tp", "geometry.shards", shards, "parallel.tp", tp);
    divides("geometry.lanes", "geometry.lanes", lanes, "the number of data-parallel ranks", dp);
    divides("model.num_heads", "model.num_heads", config.model.num_heads, "the virtual shards of tensor parallelism", shards);
    divides("model.num_kv_heads", "model.num_kv_heads", config.model.num_kv_heads, "the virtual shards of tensor parallelism", shards);
    divides("model.intermediate_size", "model.intermediate_size", config.model.intermediate_size, "the virtual shards", shards);
    let batch = config.train.global_batch_size;
    divides("train.global_batch_size", "train.global_batch_size", batch, "geometry.lanes", lanes);
    divides(
        "train.micro_batch_size",
        "the sequences of a lane",
        batch / lanes.max(1),
        "train.micro_batch_size",
        config.train.micro_batch_size,
    );
}

/// The nearest divisors of `number` to `by`, in a sentence.
fn nearest(number: usize, by: usize) -> String {
    let divides = |d: &usize| number.is_multiple_of(*d);
    let below = (1..by.max(1)).rev().find(divides);
    let above = (by + 1..=number).find(divides);
    match (below, above) {
        (Some(a), Some(b)) => format!("{a} and {b} would divide it"),
        (Some(a), None) | (None, Some(a)) => format!("{a} would divide it"),
        (None, None) => "only a multiple would do".to_string(),
    }
}

fn problem(key: &str, message: String, help: Option<String>) -> Problem {
    Problem { key: key.to_string(), message, help }
}
