//! The loss on validation data: every window once, nothing learnt.

use crate::data::loader::{Batch, IGNORED, Loader};
use crate::ops::exact::LossSum;
use crate::parallel::pipeline;
use crate::plan::schedule;
use crate::train::step::Trainer;
use anyhow::Result;

/// The validation windows of a run, in order.
pub struct Validation {
    pub loader: Loader,
    /// Windows in all; a global batch may be larger than what is left of them.
    pub windows: u64,
    /// Global batches of one evaluation, at most.
    pub steps: u64,
}

impl Validation {
    /// Mean loss over the tokens of the first `steps` global batches of windows. The same on every rank.
    pub fn loss(&mut self, trainer: &mut Trainer) -> Result<f64> {
        let global_batch = trainer.plan.global_batch as u64;
        let actions = schedule::forward_only(&trainer.plan.schedule.actions[trainer.rank.at.pp]);
        let placement = trainer.plan.schedule.placement;
        let (mut loss, mut valid) = (LossSum::default(), 0);
        for step in 0..self.steps.min(self.windows.div_ceil(global_batch)) {
            let mut batch = self.loader.batch(step)?;
            ignore_beyond(&mut batch, self.windows.saturating_sub(step * global_batch));
            valid += batch.valid();
            trainer.stage.begin_evaluation(&batch);
            pipeline::run(&actions, &placement, &mut trainer.stage, &trainer.groups)?;
            loss.merge(&trainer.stage.loss());
        }
        trainer.stage.device().check()?;
        total(trainer, loss, valid)
    }
}

/// Rows from `windows` on are repetitions of earlier ones: they do not count.
fn ignore_beyond(batch: &mut Batch, windows: u64) {
    for (row, targets) in batch.rows.iter().zip(batch.targets.chunks_mut(batch.seq_len)) {
        if *row as u64 >= windows {
            targets.fill(IGNORED);
        }
    }
}

fn total(trainer: &Trainer, loss: LossSum, valid: u64) -> Result<f64> {
    let at = trainer.rank.at;
    let (loss, valid) = (if at.tp == 0 { loss } else { LossSum::default() }, if at.tp == 0 && at.pp == 0 { valid } else { 0 });
    let mut message = loss.to_bytes();
    message.extend(valid.to_le_bytes());
    let (mut sum, mut count) = (LossSum::default(), 0);
    for bytes in trainer.world().exchange(&message)? {
        let (loss, valid) = bytes.split_at(LossSum::BYTES);
        sum.merge(&LossSum::from_bytes(loss));
        count += u64::from_le_bytes(valid.try_into().expect("eight bytes were sent"));
    }
    Ok(sum.value() / count.max(1) as f64)
}
