//! One optimizer step, from a batch to updated weights.
//!
//! Invariant: every rank calls `step` with the same number and gets the same outcome; nothing else need be agreed.

use crate::comm::Group;
use crate::comm::groups::Groups;
use crate::config::{self, Config, LossScale};
use crate::data::loader::Batch;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::model::stage::Stage;
use crate::ops::adamw::Adam;
use crate::ops::exact::{LossSum, SquareSum};
use crate::parallel::pipeline;
use crate::plan::{Plan, RankPlan};
use crate::train::learning_rate;
use crate::train::loss_scale::LossScaler;
use anyhow::{Context, Result};

/// Everything one rank trains with.
pub struct Trainer {
    pub plan: Plan,
    pub rank: RankPlan,
    index: usize,
    pub groups: Groups,
    pub stage: Stage,
    pub loss_scale: LossScaler,
    scaling: LossScale,
    /// Updates done: steps less the skipped ones.
    pub updates: u64,
    optimizer: config::Optimizer,
    schedule: config::Schedule,
    steps: u64,
    masked: bool,
    seed: u64,
}

/// What a step did, the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Mean over all valid tokens of the global batch.
    pub loss: f64,
    /// L2 norm of the gradient before clipping.
    pub norm: f64,
    pub rate: f64,
    /// False: a gradient was not finite, and nothing was changed.
    pub applied: bool,
    pub overflow: Option<String>,
    /// The scale that the step's loss was multiplied with.
    pub loss_scale: f64,
    /// Some rank was asked to stop.
    pub stop: bool,
}

impl Trainer {
    pub fn new(config: &Config, plan: Plan, index: usize, device: &Device, groups: Groups) -> Result<Trainer> {
        let rank = plan.rank(index);
        let scaling = scaling(config);
        let stage = Stage::new(&plan, &rank, device, &groups)?;
        Ok(Trainer {
            rank,
            index,
            groups,
            stage,
            loss_scale: LossScaler::new(&scaling),
            scaling,
            updates: 0,
            optimizer: config.optimizer.clone(),
            schedule: config.schedule.clone(),
            steps: config.train.steps,
            masked: config.data.document_mask,
            seed: config.run.seed,
            plan,
        })
    }

    /// Step `step`, counted from 0. `stop`: this rank was asked to stop after it. An error, besides those of other ranks, when too
    /// many steps in a row had to be skipped.
    pub fn step(&mut self, step: u64, batch: &Batch, stop: bool) -> Result<Outcome> {
        let loss_scale = self.loss_scale.scale;
        let valid = self.valid(batch)?;
        self.stage.begin(batch, (loss_scale / valid as f64) as f32);
        self.run_schedule()?;
        let sums = self.gather_sums(stop)?;
        let norm = sums.squares.root() / loss_scale;
        let applied = norm.is_finite();
        let rate = learning_rate::rate(&self.optimizer, &self.schedule, self.steps, step);
        let overflow = if applied { None } else { self.first_overflow()? };
        if applied {
            self.updates += 1;
            self.stage.zero.update(self.adam(rate, norm, loss_scale), self.seed)?;
        }
        self.stage.zero.clear();
        self.loss_scale.note(&self.scaling, !applied).with_context(|| {
            let name = overflow.as_deref().unwrap_or("the loss");
            format!("step {}: the gradient of {name} is not finite", step + 1)
        })?;
        Ok(Outcome { loss: sums.loss.value() / valid as f64, norm, rate, applied, overflow, loss_scale, stop: sums.stop })
    }

    /// Forward, backward and the reductions, which are complete when this returns.
    pub fn run_schedule(&mut self) -> Result<()> {
        let schedule = &self.plan.schedule;
        pipeline::run(&schedule.actions[self.rank.at.pp], &schedule.placement, &mut self.stage, &self.groups)?;
        self.stage.zero.finish_reductions()
    }

    fn adam(&self, rate: f64, norm: f64, loss_scale: f64) -> Adam {
        let config::Optimizer { beta1, beta2, eps, weight_decay, grad_clip, .. } = self.optimizer;
        // The epsilon is torch.nn.utils.clip_grad_norm_'s.
        let clip = if grad_clip > 0.0 { (grad_clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        Adam { beta1, beta2, eps, rate, decay: weight_decay, step: self.updates, scale: (clip / loss_scale) as f32 }
    }

    /// Targets that count, over the whole global batch.
    fn valid(&self, batch: &Batch) -> Result<u64> {
        if !self.masked {
            return Ok(self.plan.tokens_per_step());
        }
        // Ranks that differ in tp or pp only have the same rows.
        let mine = if self.rank.at.tp == 0 && self.rank.at.pp == 0 { batch.valid() } else { 0 };
        let all = self.groups.world.exchange(&mine.to_le_bytes())?;
        let counts = all.iter().map(|bytes| u64::from_le_bytes(bytes[..].try_into().expect("eight bytes were sent")));
        Ok(counts.sum::<u64>().max(1))
    }

    /// Loss, norm and stop flag over all ranks, in one exchange.
    fn gather_sums(&mut self, stop: bool) -> Result<Sums> {
        let mut message = vec![stop as u8];
        // Tensor-parallel ranks have the same losses.
        let loss = if self.rank.at.tp == 0 { self.stage.loss() } else { LossSum::default() };
        message.extend(loss.to_bytes());
        message.extend(self.stage.zero.square_sum().to_bytes());
        // Nobody hears numbers of a device that has failed.
        self.stage.device().check()?;
        let mut sums = Sums { stop: false, loss: LossSum::default(), squares: SquareSum::default() };
        for bytes in self.groups.world.exchange(&message)? {
            let (head, squares) = bytes.split_at(1 + LossSum::BYTES);
            sums.stop |= head[0] != 0;
            sums.loss.merge(&LossSum::from_bytes(&head[1..]));
            sums.squares.merge(&SquareSum::from_bytes(squares));
        }
        Ok(sums)
    }

    /// The first tensor, in the order of ranks, whose gradient is not finite.
    fn first_overflow(&mut self) -> Result<Option<String>> {
        let mine = self.stage.zero.first_overflow().unwrap_or_default();
        let all = self.groups.world.exchange(mine.as_bytes())?;
        Ok(all.into_iter().map(|name| String::from_utf8_lossy(&name).into_owned()).find(|name| !name.is_empty()))
    }

    pub fn index(&self) -> usize {
        self.index
    }

    pub fn world(&self) -> &dyn Group {
        self.groups.world.as_ref()
    }
}

/// Only f16 needs its loss scaled; the count of skipped steps serves all.
fn scaling(config: &Config) -> LossScale {
    let chosen = config.train.loss_scale.clone();
    match config.train.dtype {
        Dtype::F16 => chosen,
        _ => LossScale { initial: 1.0, growth_interval: u64::MAX, backoff: 1.0, min: 1.0, ..chosen },
    }
}

struct Sums {
    stop: bool,
    loss: LossSum,
    squares: SquareSum,
}
