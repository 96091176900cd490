//! Everything that is decided before the first FLOP, by pure functions, as data: no device, socket, clock or environment is touched.
//!
//! Invariant: after `Plan::new` nobody reads the configuration to make a decision about layout, and a plan that exists can be carried
//! out: its sizes divide, and the simulator has proved its schedule.

pub mod budget;
pub mod catalog;
pub mod check;
pub mod layout;
pub mod mesh;
pub mod picture;
pub mod schedule;
pub mod simulate;
pub mod stages;
pub mod traffic;
pub mod uses;

use crate::config::source::Problem;
use crate::config::{Config, Model, Offload, Recompute};
use crate::dtype::Dtype;
use catalog::{Kind, Unit};
use layout::{Share, UnitLayout};
use mesh::{Coordinates, Mesh};
use schedule::Schedule;
use schedule::passes::Reductions;
use serde::{Deserialize, Serialize};
use simulate::{Links, Proof};
use std::fmt;
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

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = match self.order {
            Order::Lanes => "lanes",
            Order::Rows => "rows",
        };
        write!(f, "shards {}, lanes {}, order {order}", self.shards, self.lanes)
    }
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
    /// Where master weights and moments lie, and where slices of weights do.
    pub offload_optimizer: Offload,
    pub offload_weights: Offload,
    pub dtype: Dtype,
    /// Whether there are weights in f32 beside those of `dtype`: narrower ones that are not rounded by chance need them.
    pub masters: bool,
    pub recompute: Recompute,
    /// Whether the rows of the residual stream are cut over tp: never where tp is 1.
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
    /// Rows of the global batch, in the order of this rank's micro-batches: lane after lane in the order of lanes; in the order of rows
    /// micro-batch m is of lane m % `lanes`.
    pub rows: Vec<usize>,
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
        let mesh = check::mesh(config, world, &mut problems);
        let fills_world = problems.is_empty();
        let geometry = geometry.unwrap_or_else(|| check::geometry(config, &mesh));
        check::tensors(config, &mesh, &geometry, &mut problems);
        check::stages(config, &mut problems);
        if fills_world {
            check::batch(config, &mesh, &geometry, &mut problems);
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let (model, train) = (&config.model, &config.train);
        let micros = train.global_batch_size / mesh.dp() / train.micro_batch_size;
        let Some(schedule) = check::actions(config, micros, &mut problems) else { return Err(problems) };
        let reductions = match geometry.order {
            Order::Lanes => Reductions::Last,
            Order::Rows => Reductions::Every(geometry.lanes / mesh.dp()),
        };
        let units = catalog::units(model, &config.optimizer.no_decay);
        let costs = budget::unit_costs(&units, model, train.seq_len);
        let stages = stages::of_units(&units, &costs, &schedule.placement).expect("costs are finite and there is a stage");
        let plan = Plan {
            model: model.clone(),
            mesh,
            geometry,
            units,
            stages,
            schedule: schedule.complete(reductions),
            zero: config.parallel.zero as usize,
            offload_optimizer: config.parallel.offload_optimizer.clone(),
            offload_weights: config.parallel.offload_weights.clone(),
            dtype: train.dtype,
            masters: train.dtype != Dtype::F32 && !config.optimizer.stochastic_rounding,
            recompute: train.recompute,
            sequence_parallel: config.parallel.sequence_parallel && mesh.tp > 1,
            t: train.seq_len,
            micro_batch: train.micro_batch_size,
            global_batch: train.global_batch_size,
        };
        match plan.simulate() {
            Ok(_) => Ok(plan),
            Err(error) => {
                let name = &config.parallel.pp_schedule;
                Err(vec![Problem::new("parallel.pp_schedule", format!("`parallel.pp_schedule` = \"{name}\" cannot run: {error:#}"))])
            }
        }
    }

    /// The proof that the schedule runs. One second is the forward pass of one block.
    pub fn proof(&self) -> Proof {
        self.simulate().expect("a plan that exists has been proved")
    }

    fn simulate(&self) -> anyhow::Result<Proof> {
        let costs = budget::stage_costs(&self.units, &self.stages, &self.model, self.t, self.recompute);
        simulate::simulate(&self.schedule, &costs, Links::Unbounded)
    }

    pub fn rank(&self, rank: usize) -> RankPlan {
        let at = self.mesh.coordinates(rank);
        let dp = at.dp(&self.mesh);
        let share = Share { shards: self.geometry.shards, rank: at.tp, size: self.mesh.tp };
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
            rows: self.rows(dp * lanes..(dp + 1) * lanes),
            lanes,
            micros_per_lane: self.global_batch / self.geometry.lanes / self.micro_batch,
            chunks,
            units,
        }
    }

    /// The rows of these lanes in the order in which a rank that owns them takes them.
    fn rows(&self, lanes: Range<usize>) -> Vec<usize> {
        let per_lane = self.global_batch / self.geometry.lanes;
        match self.geometry.order {
            Order::Lanes => (lanes.start * per_lane..lanes.end * per_lane).collect(),
            Order::Rows => {
                let micro =
                    |first: usize| lanes.clone().flat_map(move |lane| (0..self.micro_batch).map(move |i| lane * per_lane + first + i));
                (0..per_lane).step_by(self.micro_batch).flat_map(micro).collect()
            }
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
