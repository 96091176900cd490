//! What `ferrotron plan` prints: the model, the mesh, the schedule, the memory, as text or JSON.

use crate::config::Config;
use crate::config::choice::Choice;
use crate::plan::budget::{self, Flops};
use crate::plan::catalog;
use crate::plan::{Order, Plan};
use crate::train::rehearsal::{self, Footprint};
use crate::train::report::{short_bytes as bytes, short_count as count};
use anyhow::Result;
use serde_json::{Value, json};
use std::fmt::Write;

/// The plan of a run as a page of text.
pub fn text(config: &Config, plan: &Plan) -> Result<String> {
    let mut out = String::new();
    write_page(&mut out, config, plan, &footprints(config, plan)?).expect("writing to a string does not fail");
    Ok(out)
}

/// The same facts for programs.
pub fn json(config: &Config, plan: &Plan) -> Result<Value> {
    let flops = Flops::of(plan);
    let ranks: Vec<Value> = footprints(config, plan)?
        .iter()
        .map(|(rank, at)| {
            json!({"rank": rank, "weights": at.weights, "gradients": at.gradients, "optimizer": at.optimizer,
                   "activations": at.activations, "workspace": at.workspace, "peak": at.peak})
        })
        .collect();
    let mesh = plan.mesh;
    Ok(json!({
        "parameters": catalog::parameters(&plan.units),
        "flops_per_token": flops.per_token,
        "flops_per_token_causal": flops.per_token_causal,
        "tokens_per_step": plan.tokens_per_step(),
        "world": mesh.world(),
        "mesh": {"pp": mesh.pp, "dp_replicate": mesh.replicate, "dp_shard": mesh.shard, "tp": mesh.tp},
        "geometry": {"shards": plan.geometry.shards, "lanes": plan.geometry.lanes, "order": plan.geometry.order},
        "micro_batches": plan.rank(0).micros(),
        "memory_bytes": ranks,
    }))
}

/// One rank of each pipeline stage: the others of a stage are alike.
fn footprints(config: &Config, plan: &Plan) -> Result<Vec<(usize, Footprint)>> {
    let per_stage = plan.mesh.world() / plan.mesh.pp;
    (0..plan.mesh.pp).map(|stage| Ok((stage * per_stage, rehearsal::rehearse(config, plan, stage * per_stage)?))).collect()
}

fn write_page(out: &mut String, config: &Config, plan: &Plan, footprints: &[(usize, Footprint)]) -> std::fmt::Result {
    let (model, mesh, flops) = (&plan.model, plan.mesh, Flops::of(plan));
    let parameters = catalog::parameters(&plan.units);
    writeln!(out, "model      {} with {} layers of {}: {parameters} parameters", model.family.name(), model.num_layers, model.hidden_size)?;
    writeln!(
        out,
        "compute    {} FLOP a token, attention counted over the full square (PaLM, appendix B); {} with its causal half (Megatron-LM)",
        count(flops.per_token as f64),
        count(flops.per_token_causal as f64)
    )?;
    writeln!(
        out,
        "batch      {} sequences of {} tokens a step, {} tokens; {} steps, {} tokens",
        plan.global_batch,
        plan.t,
        count(plan.tokens_per_step() as f64),
        config.train.steps,
        count((config.train.steps * plan.tokens_per_step()) as f64)
    )?;
    writeln!(
        out,
        "mesh       {} ranks = pp {} × dp_replicate {} × dp_shard {} × tp {}, zero {}",
        mesh.world(),
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
    let micros = plan.rank(0).micros();
    writeln!(out, "schedule   {}, {micros} micro-batches of {} a rank", config.parallel.pp_schedule, plan.micro_batch)?;
    writeln!(out, "precision  {}, recompute {}", plan.dtype, config.train.recompute.name())?;
    writeln!(out)?;
    writeln!(out, "memory of the device, by rank")?;
    writeln!(
        out,
        "{:>6}  {:>10}  {:>10}  {:>10}  {:>11}  {:>10}  {:>10}",
        "rank", "weights", "gradients", "optimizer", "activations", "workspace", "peak"
    )?;
    for (rank, at) in footprints {
        let size = |n: usize| bytes(n as u64);
        writeln!(
            out,
            "{rank:>6}  {:>10}  {:>10}  {:>10}  {:>11}  {:>10}  {:>10}",
            size(at.weights),
            size(at.gradients),
            size(at.optimizer),
            size(at.activations),
            size(at.workspace),
            size(at.peak)
        )?;
    }
    let state = budget::checkpoint_bytes(plan);
    writeln!(out)?;
    writeln!(out, "checkpoint {} each, {} kept", bytes(state), config.checkpoint.keep)
}
