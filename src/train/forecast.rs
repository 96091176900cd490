//! What `ferrotron plan` prints: model, mesh and groups, stages, schedule, memory and traffic, as text, JSON or SVG.
//!
//! Ranks that differ in tensor or data parallelism only are alike, so everything is told for the first rank of each pipeline position.
//!
//! Invariant: a forecast is a function of configuration and plan; no device, clock or environment goes into it.

use crate::config::Config;
use crate::config::choice::Choice;
use crate::ops::exact::{LossSum, SquareSum};
use crate::plan::budget::{self, Flops};
use crate::plan::catalog::{self, Kind, Unit};
use crate::plan::mesh::{Coordinates, Mesh};
use crate::plan::picture;
use crate::plan::traffic::{self, Count, Traffic};
use crate::plan::{Order, Plan, RankPlan};
use crate::train::rehearsal::{self, Footprint};
use crate::train::report::{short_bytes as bytes, short_count as count};
use anyhow::Result;
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use serde_json::{Value, json};
use std::fmt::{self, Write};
use std::ops::Range;

/// Columns of the picture of a schedule.
const WIDTH: usize = 132;

/// The plan of a run as a page of text.
pub fn text(config: &Config, plan: &Plan) -> Result<String> {
    let mut out = String::new();
    let footprints = footprints(config, plan)?;
    let written = write_facts(&mut out, config, plan)
        .and_then(|()| write_groups(&mut out, plan))
        .and_then(|()| write_stages(&mut out, plan))
        .and_then(|()| write_schedule(&mut out, plan))
        .and_then(|()| write_memory(&mut out, plan, &footprints))
        .and_then(|()| write_traffic(&mut out, config, plan))
        .and_then(|()| writeln!(out, "\ncheckpoint {} each, {} kept", bytes(budget::checkpoint_bytes(plan)), config.checkpoint.keep));
    written.expect("writing to a string does not fail");
    Ok(out)
}

/// The same facts for programs.
pub fn json(config: &Config, plan: &Plan) -> Result<Value> {
    let (flops, mesh, proof) = (Flops::of(plan), plan.mesh, plan.proof());
    let memory: Vec<Value> = footprints(config, plan)?
        .iter()
        .enumerate()
        .map(|(pp, at)| {
            json!({"rank": first_rank(&mesh, pp), "pp": pp, "weights": at.weights, "gradients": at.gradients,
                   "optimizer": at.optimizer, "activations": at.activations, "workspace": at.workspace, "peak": at.peak,
                   "offloaded": at.offloaded})
        })
        .collect();
    let groups = groups(&mesh).map(|(name, ranks)| json!({"name": name, "size": ranks.len(), "groups": mesh.world() / ranks.len()}));
    let stages: Vec<Value> = (0..plan.stages.len())
        .map(|stage| {
            let ((pp, chunk), units) = (plan.schedule.placement.place(stage), &plan.units[plan.stages[stage].clone()]);
            json!({"stage": stage, "pp": pp, "chunk": chunk, "layers": layers(units), "parameters": catalog::parameters(units)})
        })
        .collect();
    let sent = |pp| json!({"rank": first_rank(&mesh, pp), "pp": pp, "groups": traffic_json(&traffic_of(config, plan, pp))});
    Ok(json!({
        "parameters": catalog::parameters(&plan.units),
        "flops_per_token": flops.per_token,
        "flops_per_token_causal": flops.per_token_causal,
        "tokens_per_step": plan.tokens_per_step(),
        "world": mesh.world(),
        "mesh": {"pp": mesh.pp, "dp_replicate": mesh.replicate, "dp_shard": mesh.shard, "tp": mesh.tp},
        "groups": groups.to_vec(),
        "geometry": {"shards": plan.geometry.shards, "lanes": plan.geometry.lanes, "order": plan.geometry.order},
        "stages": stages,
        "schedule": {"name": config.parallel.pp_schedule, "bubble_fraction": proof.bubble_fraction,
                     "bubble_by_rank": proof.bubble_by_rank, "live_peak": proof.live_peak},
        "micro_batches": plan.schedule.micros,
        "memory_bytes": memory,
        "traffic_per_step": (0..mesh.pp).map(sent).collect::<Vec<_>>(),
        "checkpoint_bytes": budget::checkpoint_bytes(plan),
    }))
}

/// The schedule as a drawing. One second in it is the forward pass of one block.
pub fn svg(plan: &Plan) -> String {
    let placement = plan.schedule.placement;
    let title = format!("{} stages on {} ranks, {} micro-batches", placement.stages(), placement.ranks, plan.schedule.micros);
    picture::svg(&plan.proof(), &title)
}

/// What the rank sends in a step without overflow, with the facts that all ranks exchange.
pub fn traffic(config: &Config, plan: &Plan, rank: &RankPlan) -> Traffic {
    let mut traffic = traffic::of_step(plan, rank);
    if plan.mesh.world() > 1 {
        // Stop flag, loss and norm; before them the number of tokens that count, where it is not known beforehand.
        let mut facts = vec![1 + LossSum::BYTES + SquareSum::BYTES];
        facts.extend(config.data.document_mask.then_some(size_of::<u64>()));
        let bytes = (plan.mesh.world() - 1) * facts.iter().sum::<usize>();
        traffic.entry("world").or_default().insert("exchange", Count { calls: facts.len() as u64, bytes: bytes as u64 });
    }
    traffic
}

fn traffic_of(config: &Config, plan: &Plan, pp: usize) -> Traffic {
    traffic(config, plan, &plan.rank(first_rank(&plan.mesh, pp)))
}

pub fn first_rank(mesh: &Mesh, pp: usize) -> usize {
    mesh.rank(Coordinates { pp, replicate: 0, shard: 0, tp: 0 })
}

/// Of the first rank at each place of the pipeline.
pub fn footprints(config: &Config, plan: &Plan) -> Result<Vec<Footprint>> {
    (0..plan.mesh.pp).into_par_iter().map(|pp| rehearsal::rehearse(config, plan, first_rank(&plan.mesh, pp))).collect()
}

/// The groups of rank 0 with their members.
fn groups(mesh: &Mesh) -> [(&'static str, Vec<usize>); 4] {
    let at = mesh.coordinates(0);
    [("tp", mesh.tp_group(at)), ("shard", mesh.shard_group(at)), ("replica", mesh.replica_group(at)), ("pipeline", mesh.pp_group(at))]
}

/// `embedding, blocks 0-6`.
fn layers(units: &[Unit]) -> String {
    let block = |unit: &Unit| if let Kind::Block(block) = unit.kind { Some(block) } else { None };
    let (first, last) = (units.iter().find_map(block), units.iter().rev().find_map(block));
    let mut names = Vec::new();
    for unit in units {
        match unit.kind {
            Kind::Embedding => names.push("embedding".to_string()),
            Kind::Positions => names.push("positions".to_string()),
            Kind::Block(block) if Some(block) == first => names.push(match (first, last) {
                (Some(first), Some(last)) if first < last => format!("blocks {first}-{last}"),
                _ => format!("block {block}"),
            }),
            Kind::Block(_) => {}
            Kind::Norm => names.push("norm".to_string()),
            Kind::Head { tied: true } => names.push("head (tied)".to_string()),
            Kind::Head { tied: false } => names.push("head".to_string()),
        }
    }
    names.join(", ")
}

fn write_facts(out: &mut String, config: &Config, plan: &Plan) -> fmt::Result {
    let (model, mesh, flops) = (&plan.model, plan.mesh, Flops::of(plan));
    let parameters = catalog::parameters(&plan.units);
    let tokens = plan.tokens_per_step();
    writeln!(out, "model      {} with {} layers of {}: {parameters} parameters", model.family.name(), model.num_layers, model.hidden_size)?;
    writeln!(
        out,
        "compute    {} FLOP a token, attention counted over the full square (PaLM, appendix B); {} with its causal half (Megatron-LM)",
        count(flops.per_token as f64),
        count(flops.per_token_causal as f64)
    )?;
    writeln!(
        out,
        "           {:.2e} FLOP a step, {:.2e} on each rank",
        flops.per_token as f64 * tokens as f64,
        flops.per_token as f64 * tokens as f64 / mesh.world() as f64
    )?;
    writeln!(
        out,
        "batch      {} sequences of {} tokens a step, {} tokens; {} steps, {} tokens",
        plan.global_batch,
        plan.t,
        count(tokens as f64),
        config.train.steps,
        count(config.train.steps as f64 * tokens as f64)
    )?;
    let cut = if plan.sequence_parallel { ", sequence parallel" } else { "" };
    writeln!(
        out,
        "mesh       {} = pp {} × dp_replicate {} × dp_shard {} × tp {}, zero {}{cut}",
        if mesh.world() == 1 { "1 rank".to_string() } else { format!("{} ranks", mesh.world()) },
        mesh.pp,
        mesh.replicate,
        mesh.shard,
        mesh.tp,
        plan.zero
    )?;
    let order = match plan.geometry.order {
        Order::Lanes => "lanes",
        Order::Rows => "rows",
    };
    writeln!(
        out,
        "geometry   shards {}, lanes {}, order {order}: the same bits on every layout that keeps them",
        plan.geometry.shards, plan.geometry.lanes
    )?;
    let (name, micros) = (&config.parallel.pp_schedule, plan.schedule.micros);
    let batches = if micros == 1 { "micro-batch" } else { "micro-batches" };
    writeln!(out, "schedule   {name}, {micros} {batches} of {} a rank", plan.micro_batch)?;
    let rounding = if config.optimizer.stochastic_rounding { " rounded by chance, no master weights" } else { "" };
    writeln!(out, "precision  {}{rounding}, recompute {}", plan.dtype, config.train.recompute.name())
}

fn write_groups(out: &mut String, plan: &Plan) -> fmt::Result {
    let mesh = plan.mesh;
    for (place, (name, ranks)) in groups(&mesh).into_iter().filter(|(_, ranks)| ranks.len() > 1).enumerate() {
        if place == 0 {
            writeln!(out, "\ngroups of ranks, and the one that rank 0 is in")?;
        }
        let (number, stride) = (mesh.world() / ranks.len(), ranks[1] - ranks[0]);
        let last = ranks[ranks.len() - 1];
        let members = match (stride, ranks.len()) {
            (1, _) => format!("0 to {last}"),
            (_, 2) => format!("0, {last}"),
            _ => format!("0, {stride}, ... {last}"),
        };
        let groups = if number == 1 { "1 group".to_string() } else { format!("{number} groups") };
        writeln!(out, "  {name:<8}  {groups} of {} ranks: {members}", ranks.len())?;
    }
    Ok(())
}

fn write_stages(out: &mut String, plan: &Plan) -> fmt::Result {
    if plan.stages.len() == 1 {
        return Ok(());
    }
    writeln!(out, "\nstages, and their share of the computation")?;
    writeln!(out, "{:>7}  {:>4}  {:>5}  {:>10}  {:>6}  layers", "stage", "pp", "chunk", "parameters", "share")?;
    let costs = budget::unit_costs(&plan.units, &plan.model, plan.t);
    let total: f64 = costs.iter().sum();
    for (stage, range) in plan.stages.iter().enumerate() {
        let (pp, chunk) = plan.schedule.placement.place(stage);
        let units = &plan.units[range.clone()];
        let share = 100.0 * costs[range.clone()].iter().sum::<f64>() / total;
        let parameters = count(units.iter().map(Unit::parameters).sum::<u64>() as f64);
        writeln!(out, "{stage:>7}  {pp:>4}  {chunk:>5}  {parameters:>10}  {share:>4.1} %  {}", layers(units))?;
    }
    Ok(())
}

fn write_schedule(out: &mut String, plan: &Plan) -> fmt::Result {
    if plan.mesh.pp == 1 {
        return Ok(());
    }
    let proof = plan.proof();
    writeln!(
        out,
        "\nschedule, with transfers free: {:.1} % of all ranks' time is idle, a step takes as long as {:.0} forward passes of a block",
        100.0 * proof.bubble_fraction,
        proof.seconds_total
    )?;
    // The first line of the picture says the same in seconds.
    let picture = picture::text(&proof, WIDTH);
    picture.lines().skip(1).try_for_each(|line| writeln!(out, "{line}"))
}

fn write_memory(out: &mut String, plan: &Plan, footprints: &[Footprint]) -> fmt::Result {
    writeln!(out, "\nmemory of the device, by rank")?;
    let line = |out: &mut String, cells: [String; 8]| {
        let [rank, pp, weights, gradients, optimizer, activations, workspace, peak] = cells;
        writeln!(out, "{rank:>7}  {pp:>4}  {weights:>10}  {gradients:>10}  {optimizer:>10}  {activations:>11}  {workspace:>10}  {peak:>10}")
    };
    line(out, ["rank", "pp", "weights", "gradients", "optimizer", "activations", "workspace", "peak"].map(String::from))?;
    for (pp, at) in footprints.iter().enumerate() {
        let [weights, gradients, optimizer, activations, workspace, peak] =
            [at.weights, at.gradients, at.optimizer, at.activations, at.workspace, at.peak].map(|size| bytes(size as u64));
        let rank = first_rank(&plan.mesh, pp).to_string();
        line(out, [rank, pp.to_string(), weights, gradients, optimizer, activations, workspace, peak])?;
    }
    for (pp, at) in footprints.iter().enumerate().filter(|(_, at)| at.offloaded > 0) {
        writeln!(out, "{:>7}  {pp:>4}  offloaded to a file: {}", first_rank(&plan.mesh, pp), bytes(at.offloaded as u64))?;
    }
    Ok(())
}

/// Neighbours in the pipeline that send the same are one entry.
fn write_traffic(out: &mut String, config: &Config, plan: &Plan) -> fmt::Result {
    if plan.mesh.world() == 1 {
        return Ok(());
    }
    let mut alike: Vec<(Range<usize>, Traffic)> = Vec::new();
    for pp in 0..plan.mesh.pp {
        let traffic = traffic_of(config, plan, pp);
        match alike.last_mut() {
            Some((range, same)) if *same == traffic => range.end = pp + 1,
            _ => alike.push((pp..pp + 1, traffic)),
        }
    }
    writeln!(out, "\nwhat a rank sends in a step, by place in the pipeline")?;
    writeln!(out, "{:>7}  {:<8} {:<14}  {:>8}  {:>10}", "pp", "group", "operation", "calls", "sent")?;
    for (range, traffic) in &alike {
        let mut place = if range.len() == 1 { range.start.to_string() } else { format!("{}-{}", range.start, range.end - 1) };
        for (group, operations) in traffic {
            for (operation, Count { calls, bytes: sent }) in operations.iter().filter(|(operation, _)| **operation != "receive") {
                writeln!(out, "{place:>7}  {group:<8} {operation:<14}  {calls:>8}  {:>10}", bytes(*sent))?;
                place.clear();
            }
        }
    }
    Ok(())
}

fn traffic_json(traffic: &Traffic) -> Value {
    let operation = |count: &Count| json!({"calls": count.calls, "bytes": count.bytes});
    let operations = |of: &std::collections::BTreeMap<&'static str, Count>| -> Value {
        of.iter().map(|(name, count)| (name.to_string(), operation(count))).collect::<serde_json::Map<_, _>>().into()
    };
    traffic.iter().map(|(group, of)| (group.to_string(), operations(of))).collect::<serde_json::Map<_, _>>().into()
}
