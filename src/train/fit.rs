//! Whether a plan fits the memory that a rank may use, and if not, which settings would make it fit.
//!
//! Invariant: what is said to fit was rehearsed, on the fullest rank.

use crate::config::choice::Choice;
use crate::config::source::Problem;
use crate::config::{Config, Offload, Recompute};
use crate::plan::Plan;
use crate::train::forecast;
use crate::train::rehearsal::Footprint;
use crate::train::report::short_bytes;
use anyhow::Result;
use std::path::PathBuf;

/// How much memory a rank may use, and who says so.
#[derive(Clone, Debug)]
pub struct Limit {
    pub bytes: u64,
    pub words: String,
}

impl Limit {
    /// What the configuration allows.
    pub fn configured(config: &Config) -> Option<Limit> {
        config.device.memory.map(|bytes| Limit { bytes, words: format!("`device.memory` = {}", short_bytes(bytes)) })
    }
}

/// The problem with a plan that needs more memory than the configuration allows.
pub fn check(config: &Config, plan: &Plan) -> Result<Option<Problem>> {
    match Limit::configured(config) {
        Some(limit) => check_within(config, plan, &limit),
        None => Ok(None),
    }
}

/// The problem with a plan that needs more memory than `limit`.
pub fn check_within(config: &Config, plan: &Plan, limit: &Limit) -> Result<Option<Problem>> {
    let (rank, at) = fullest(config, plan)?;
    if at.peak as u64 <= limit.bytes {
        return Ok(None);
    }
    let [peak, weights, gradients, optimizer, activations, workspace] =
        [at.peak, at.weights, at.gradients, at.optimizer, at.activations, at.workspace].map(|size| short_bytes(size as u64));
    let message = format!(
        "{}, but rank {rank} needs {peak}: weights {weights}, gradients {gradients}, optimizer {optimizer}, activations {activations}, \
         workspace {workspace}",
        limit.words
    );
    Ok(Some(Problem::new("device.memory", message).help(advice(config, plan, limit.bytes)?)))
}

/// What would need less memory, where nobody knows by how much.
pub fn help(config: &Config, plan: &Plan) -> String {
    let names: Vec<&str> = settings(config, plan).iter().map(|(text, _)| *text).collect();
    let more = "more ranks (tp, pp, dp_shard) or a smaller model";
    if names.is_empty() { format!("{more} would need less") } else { format!("{}, {more} would need less", names.join(", ")) }
}

/// The rank that needs most, of the first at each place of the pipeline, and what it needs.
fn fullest(config: &Config, plan: &Plan) -> Result<(usize, Footprint)> {
    let footprints = forecast::footprints(config, plan)?;
    let (pp, at) = footprints.into_iter().enumerate().max_by_key(|(_, at)| at.peak).expect("a pipeline has a place");
    Ok((forecast::first_rank(&plan.mesh, pp), at))
}

/// How one writes it, and what it sets.
type Setting = (&'static str, fn(&mut Config));

/// Settings that save memory, as one would write them.
fn settings(config: &Config, plan: &Plan) -> Vec<Setting> {
    let mut settings: Vec<Setting> = Vec::new();
    let mut offer = |text, set| settings.push((text, set));
    match config.train.recompute {
        Recompute::None => {
            offer("train.recompute = \"selective\"", |config| config.train.recompute = Recompute::Selective);
            offer("train.recompute = \"full\"", |config| config.train.recompute = Recompute::Full);
        }
        Recompute::Selective => offer("train.recompute = \"full\"", |config| config.train.recompute = Recompute::Full),
        Recompute::Full => {}
    }
    if config.train.micro_batch_size > 1 {
        offer("train.micro_batch_size = 1", |config| config.train.micro_batch_size = 1);
    }
    if plan.mesh.shard > 1 {
        let stages: [Setting; 3] = [
            ("parallel.zero = 1", |config| config.parallel.zero = 1),
            ("parallel.zero = 2", |config| config.parallel.zero = 2),
            ("parallel.zero = 3", |config| config.parallel.zero = 3),
        ];
        stages[plan.zero..].iter().for_each(|(text, set)| offer(text, *set));
    }
    // A rehearsal makes no file: any name will do.
    if config.parallel.offload_optimizer == Offload::None {
        offer("parallel.offload_optimizer = \"<folder>\"", |config| {
            config.parallel.offload_optimizer = Offload::Folder(PathBuf::from("."))
        });
    }
    if config.parallel.offload_weights == Offload::None && plan.zero == 3 {
        offer("parallel.offload_weights = \"<folder>\"", |config| config.parallel.offload_weights = Offload::Folder(PathBuf::from(".")));
    }
    settings
}

fn advice(config: &Config, plan: &Plan, limit: u64) -> Result<String> {
    // A setting with which there is no plan is none to propose.
    let peak = |config: &Config| match Plan::new(config, plan.mesh.world(), Some(plan.geometry)) {
        Ok(plan) => Ok(Some(fullest(config, &plan)?.1.peak as u64)),
        Err(_) => anyhow::Ok(None),
    };
    let (mut all, mut fitting) = (config.clone(), Vec::new());
    let settings = settings(config, plan);
    for (text, set) in &settings {
        let mut one = config.clone();
        set(&mut one);
        set(&mut all);
        if let Some(peak) = peak(&one)?.filter(|peak| *peak <= limit) {
            fitting.push(format!("{text} ({})", short_bytes(peak)));
        }
    }
    if !fitting.is_empty() {
        return Ok(format!("one of these fits: {}", fitting.join(", ")));
    }
    let more = "more ranks (tp, pp, dp_shard) or a smaller model";
    let names: Vec<&str> = settings.iter().map(|(text, _)| *text).collect();
    Ok(match peak(&all)? {
        _ if names.is_empty() => format!("{more} would need less; recompute is {}", config.train.recompute.name()),
        Some(peak) if peak <= limit => {
            format!("no one of these fits alone, together they need {}: {}", short_bytes(peak), names.join(", "))
        }
        Some(peak) => format!("{} together still need {}: {more} would need less", names.join(", "), short_bytes(peak)),
        None => format!("none of {} fits alone: {more} would need less", names.join(", ")),
    })
}
