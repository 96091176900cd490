//! What one rank sends in a step: calls and bytes of every group and operation, in closed form.
//!
//! A call's bytes are those of `comm/metered.rs`: of s ranks each sends (s - 1)/s of a tensor that is gathered or scattered, twice that of
//! one that is reduced for all, and all of one that goes to a neighbour. Groups of one are left out: nothing travels there.
//! Small facts that ranks exchange on the host (loss, norm, stop) are the training step's, see `train/forecast.rs`.
//!
//! Invariant: what is said here is what the code of `parallel/` and `model/` does, to the byte; a test meters a rehearsal of it.

use crate::config::Recompute;
use crate::plan::budget::head_pieces;
use crate::plan::catalog::Kind;
use crate::plan::layout::UnitLayout;
use crate::plan::schedule::{Action, Pass};
use crate::plan::{Order, Plan, RankPlan, uses};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub calls: u64,
    /// Sent by this rank.
    pub bytes: u64,
}

/// By group (`tp shard replica down up tie`), then by operation, both as meters name them.
pub type Traffic = BTreeMap<&'static str, BTreeMap<&'static str, Count>>;

/// The traffic of one training step of a rank.
pub fn of_step(plan: &Plan, rank: &RankPlan) -> Traffic {
    let mut tally = Tally { traffic: Traffic::new() };
    let edges = Edges { plan, tp: Group { name: "tp", size: plan.mesh.tp as u64 } };
    for (chunk, passes) in passes(plan, rank).iter().enumerate() {
        for unit in rank.chunks[chunk].clone() {
            let kind = rank.kind(plan, unit);
            edges.forward(&mut tally, kind, passes.forward);
            edges.backward(&mut tally, kind, passes.backward);
        }
    }
    let gathers = uses::gathers(plan, rank, &uses::of(plan, rank, &plan.schedule.actions[rank.at.pp], false));
    for (unit, (_, layout)) in rank.units.iter().enumerate() {
        zero(&mut tally, plan, rank, rank.kind(plan, unit), layout, gathers[unit]);
    }
    let lane_ends = match plan.geometry.order {
        Order::Lanes => rank.lanes,
        Order::Rows => rank.micros(),
    };
    for (_, layout) in rank.units.iter().filter(|(_, layout)| layout.shares_across_ranks()) {
        tally.all_reduce(edges.tp, lane_ends as u64, 4 * layout.shared_length() as u64);
    }
    if plan.sequence_parallel {
        for (_, layout) in rank.units.iter().filter(|(_, layout)| layout.stream_length() > 0) {
            tally.all_reduce(edges.tp, lane_ends as u64, 4 * layout.stream_length() as u64);
        }
    }
    links(&mut tally, plan, rank);
    tally.traffic.retain(|_, operations| !operations.is_empty());
    tally.traffic
}

/// How often a chunk runs each pass in a step.
#[derive(Clone, Copy, Default)]
struct Passes {
    forward: u64,
    /// Whole, or of the input alone.
    backward: u64,
}

fn passes(plan: &Plan, rank: &RankPlan) -> Vec<Passes> {
    let mut passes = vec![Passes::default(); rank.chunks.len()];
    for action in &plan.schedule.actions[rank.at.pp] {
        let chunk = &mut passes[action.slot().chunk];
        match action {
            Action::Forward(_) => chunk.forward += 1,
            Action::Backward { .. } | Action::BackwardInput(_) => chunk.backward += 1,
            Action::BackwardWeight { .. } | Action::Receive(..) | Action::Send(..) | Action::Hand { .. } => {}
        }
    }
    passes
}

#[derive(Clone, Copy)]
struct Group {
    name: &'static str,
    size: u64,
}

struct Tally {
    traffic: Traffic,
}

impl Tally {
    fn add(&mut self, group: Group, operation: &'static str, calls: u64, bytes: u64) {
        if group.size > 1 && calls > 0 {
            let count = self.traffic.entry(group.name).or_default().entry(operation).or_default();
            count.calls += calls;
            count.bytes += calls * bytes;
        }
    }

    fn all_reduce(&mut self, group: Group, calls: u64, bytes: u64) {
        self.add(group, "all_reduce", calls, 2 * (group.size - 1) * bytes / group.size);
    }

    fn reduce_scatter(&mut self, group: Group, calls: u64, bytes: u64) {
        self.add(group, "reduce_scatter", calls, (group.size - 1) * bytes / group.size);
    }

    fn all_gather(&mut self, group: Group, calls: u64, bytes: u64) {
        self.add(group, "all_gather", calls, (group.size - 1) * bytes / group.size);
    }
}

/// The edges of tensor-parallel regions: the table of `parallel/tensor_parallel.rs`.
struct Edges<'a> {
    plan: &'a Plan,
    tp: Group,
}

impl Edges<'_> {
    /// Bytes of a micro-batch in the residual stream.
    fn stream(&self) -> u64 {
        (self.plan.micro_rows() * self.plan.model.hidden_size * self.plan.dtype.bytes()) as u64
    }

    fn enter(&self, tally: &mut Tally, calls: u64) {
        if self.plan.sequence_parallel {
            tally.all_gather(self.tp, calls, self.stream());
        }
    }

    fn enter_backward(&self, tally: &mut Tally, calls: u64) {
        self.leave(tally, calls);
    }

    fn leave(&self, tally: &mut Tally, calls: u64) {
        match self.plan.sequence_parallel {
            true => tally.reduce_scatter(self.tp, calls, self.stream()),
            false => tally.all_reduce(self.tp, calls, self.stream()),
        }
    }

    fn leave_backward(&self, tally: &mut Tally, calls: u64) {
        self.enter(tally, calls);
    }

    /// `passes` forward passes through a unit. The head has none: it runs in the backward pass.
    fn forward(&self, tally: &mut Tally, kind: Kind, passes: u64) {
        match kind {
            Kind::Embedding => self.leave(tally, passes),
            // Attention and MLP.
            Kind::Block(_) => {
                self.enter(tally, 2 * passes);
                self.leave(tally, 2 * passes);
            }
            Kind::Positions | Kind::Norm | Kind::Head { .. } => {}
        }
    }

    fn backward(&self, tally: &mut Tally, kind: Kind, passes: u64) {
        match kind {
            Kind::Embedding => self.leave_backward(tally, passes),
            Kind::Positions => {}
            Kind::Block(_) => {
                if self.plan.recompute == Recompute::Full {
                    self.forward(tally, kind, passes);
                }
                self.leave_backward(tally, 2 * passes);
                // What entered the two regions is not kept but gathered again.
                self.enter(tally, 2 * passes);
                self.enter_backward(tally, 2 * passes);
            }
            Kind::Norm => self.enter(tally, passes),
            Kind::Head { .. } => self.head(tally, passes),
        }
    }

    /// The logits of a piece of rows at a time, with maxima and sums over the vocabulary, f32 [rows] and [rows, 2].
    fn head(&self, tally: &mut Tally, passes: u64) {
        for piece in head_pieces(self.plan.micro_batch * self.plan.t, self.plan.t) {
            let rows = piece.len() as u64;
            tally.all_reduce(self.tp, passes, 4 * rows);
            tally.all_reduce(self.tp, passes, 8 * rows);
        }
        self.enter_backward(tally, passes);
    }
}

/// Reductions of gradients and gathers of weights: `parallel/gradients.rs` and `parallel/zero.rs`. `gathers`: those of ZeRO 3.
fn zero(tally: &mut Tally, plan: &Plan, rank: &RankPlan, kind: Kind, layout: &UnitLayout, gathers: u64) {
    let shard = Group { name: "shard", size: plan.mesh.shard as u64 };
    let replica = Group { name: "replica", size: plan.mesh.replicate as u64 };
    let (numel, narrow) = (layout.numel as u64, (layout.numel * plan.dtype.bytes()) as u64);
    let mine = if plan.zero >= 1 { numel / shard.size } else { numel };
    let reductions = match plan.geometry.order {
        Order::Lanes => 1,
        Order::Rows => rank.micros_per_lane as u64,
    };
    match plan.zero {
        0 => tally.all_reduce(shard, reductions, 4 * numel),
        _ => tally.reduce_scatter(shard, reductions, 4 * numel),
    }
    tally.all_reduce(replica, reductions, 4 * mine);
    let tie = tie(plan, rank, kind);
    if tie == Tie::There {
        tally.all_reduce(Group { name: "tie", size: 2 }, 1, 4 * mine);
    }
    match plan.zero {
        0 => {}
        // After the update; a tied head has no weights of its own.
        1 | 2 if tie != Tie::Here => tally.all_gather(shard, 1, narrow),
        1 | 2 => {}
        _ => tally.all_gather(shard, gathers, narrow),
    }
}

/// Where the other half of a tied pair is; the embedding of a pair on one rank counts as not tied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tie {
    None,
    Here,
    There,
}

fn tie(plan: &Plan, rank: &RankPlan, kind: Kind) -> Tie {
    let tied = Kind::Head { tied: true };
    let here = |wanted: Kind| (0..rank.units.len()).any(|unit| rank.kind(plan, unit) == wanted);
    match kind {
        Kind::Head { tied: true } if here(Kind::Embedding) => Tie::Here,
        Kind::Head { tied: true } => Tie::There,
        Kind::Embedding if !here(tied) && plan.units.iter().any(|unit| unit.kind == tied) => Tie::There,
        _ => Tie::None,
    }
}

/// The two one-way links to the neighbours in the pipeline.
fn links(tally: &mut Tally, plan: &Plan, rank: &RankPlan) {
    let size = plan.mesh.pp as u64;
    let cut = if plan.sequence_parallel { plan.mesh.tp } else { 1 };
    let bytes = (plan.micro_rows() / cut * plan.model.hidden_size * plan.dtype.bytes()) as u64;
    for action in &plan.schedule.actions[rank.at.pp] {
        let group = |pass: &Pass| Group { name: if *pass == Pass::Forward { "down" } else { "up" }, size };
        match action {
            Action::Send(pass, _) => tally.add(group(pass), "send", 1, bytes),
            Action::Receive(pass, _) => tally.add(group(pass), "receive", 1, 0),
            _ => {}
        }
    }
}
