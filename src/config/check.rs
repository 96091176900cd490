//! Conflicts between keys of different sections or of one, each told with both keys, both numbers and what would work.
//!
//! Invariant: a conflict is reported only where its keys are themselves well-formed, so that one mistake makes one message.
//! What depends on the world's size is not here: `plan/` reports it through the same `Problem`.

use super::reader::Findings;
use super::source::Problem;
use super::{Data, Eval, Model, Offload, Optimizer, Parallel, Schedule, ScheduleKind, Train};
use crate::dtype::Dtype;

/// Reports a conflict at the first of `keys`, unless one of them is wrong by itself.
fn conflict(findings: &mut Findings, keys: &[&str], message: String, help: String) {
    if keys.iter().all(|key| findings.clean(key)) {
        findings.problems.push(Problem::new(keys[0], message).help(help));
    }
}

pub fn training(train: &Train, findings: &mut Findings) {
    let (batch, micro) = (train.global_batch_size as u64, train.micro_batch_size as u64);
    if !batch.is_multiple_of(micro) {
        let message = format!("`train.global_batch_size` = {batch} is not a multiple of `train.micro_batch_size` = {micro}");
        let help = format!("micro_batch_size {}, or global_batch_size {}", divisors_near(batch, micro), multiples_near(micro, batch));
        conflict(findings, &["train.micro_batch_size", "train.global_batch_size"], message, help);
    }
    let (min, initial) = (train.loss_scale.min, train.loss_scale.initial);
    if min > initial {
        let message = format!("`train.loss_scale.min` = {min} is above `train.loss_scale.initial` = {initial}");
        conflict(findings, &["train.loss_scale.min", "train.loss_scale.initial"], message, format!("min {initial} or less"));
    }
}

pub fn rounding(optimizer: &Optimizer, train: &Train, findings: &mut Findings) {
    if optimizer.stochastic_rounding && train.dtype == Dtype::F32 {
        let message = "`optimizer.stochastic_rounding` is true, but with `train.dtype` = \"f32\" no weight is rounded".to_string();
        let help = "dtype = \"bf16\" or \"f16\", or stochastic_rounding = false".to_string();
        conflict(findings, &["optimizer.stochastic_rounding", "train.dtype"], message, help);
    }
}

pub fn positions(train: &Train, model: &Model, findings: &mut Findings) {
    let (seq_len, most) = (train.seq_len, model.max_position_embeddings);
    if seq_len > most {
        let message = format!("`train.seq_len` = {seq_len} is above `model.max_position_embeddings` = {most}");
        let help = format!("seq_len {most} or less, or max_position_embeddings {seq_len}");
        conflict(findings, &["train.seq_len", "model.max_position_embeddings"], message, help);
    }
}

pub fn offload(parallel: &Parallel, findings: &mut Findings) {
    if parallel.offload_weights != Offload::None && parallel.zero != 3 {
        let message = format!(
            "`parallel.offload_weights` is set, but with `parallel.zero` = {} every rank computes with whole weights",
            parallel.zero
        );
        let help = "zero = 3, which gathers weights for their use only, or offload_weights = \"none\"".to_string();
        conflict(findings, &["parallel.offload_weights", "parallel.zero"], message, help);
    }
}

pub fn evaluation(eval: &Eval, data: &Data, findings: &mut Findings) {
    if eval.interval > 0 && data.validation.is_empty() {
        let message = format!("`eval.interval` = {}, but `data.validation` is empty", eval.interval);
        let help = "give data.validation, or interval = 0 for no evaluation".to_string();
        conflict(findings, &["eval.interval", "data.validation"], message, help);
    }
}

pub fn schedule(schedule: &Schedule, steps: u64, lr: f64, findings: &mut Findings) {
    let Schedule { kind, warmup_steps: warmup, decay_steps, min_lr, wsd_decay_steps, .. } = *schedule;
    if min_lr > lr {
        let message = format!("`schedule.min_lr` = {min_lr:e} is above `optimizer.lr` = {lr:e}");
        let help = format!("min_lr {lr:e} or less; a tenth of it is usual");
        conflict(findings, &["schedule.min_lr", "optimizer.lr"], message, help);
    }
    let decays = !matches!(kind, ScheduleKind::Constant | ScheduleKind::InverseSqrt);
    if decays && decay_steps != 0 && decay_steps < warmup {
        let message = format!("`schedule.decay_steps` = {decay_steps} is below `schedule.warmup_steps` = {warmup}");
        let help = "decay_steps counts from the start of the run; 0: until its end".to_string();
        conflict(findings, &["schedule.decay_steps", "schedule.warmup_steps"], message, help);
    }
    let end = if decay_steps == 0 { steps } else { decay_steps };
    if kind == ScheduleKind::Wsd && warmup <= end && wsd_decay_steps > end - warmup {
        let message = format!(
            "`schedule.wsd_decay_steps` = {wsd_decay_steps} and `schedule.warmup_steps` = {warmup} are more than the {end} steps of the schedule"
        );
        let keys = ["schedule.wsd_decay_steps", "schedule.warmup_steps", "train.steps"];
        conflict(findings, &keys, message, format!("wsd_decay_steps {} or less", end - warmup));
    }
}

/// The divisors of `number` closest to `near`, as words.
pub fn divisors_near(number: u64, near: u64) -> String {
    let small = (1..).take_while(|divisor| divisor * divisor <= number).filter(|divisor| number.is_multiple_of(*divisor));
    let mut divisors: Vec<u64> = small.flat_map(|divisor| [divisor, number / divisor]).collect();
    divisors.sort_unstable();
    let below = divisors.iter().rev().find(|divisor| **divisor <= near);
    let above = divisors.iter().find(|divisor| **divisor >= near);
    either(below.copied(), above.copied())
}

/// The multiples of `number` closest to `near`, as words.
pub fn multiples_near(number: u64, near: u64) -> String {
    let below = near / number * number;
    let above = near.div_ceil(number) * number;
    either(Some(below).filter(|below| *below > 0), Some(above))
}

fn either(below: Option<u64>, above: Option<u64>) -> String {
    match (below, above) {
        (Some(below), Some(above)) if below != above => format!("{below} or {above}"),
        (Some(one), _) | (None, Some(one)) => one.to_string(),
        (None, None) => "(none)".to_string(),
    }
}
