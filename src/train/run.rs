//! One training run, from a configuration to its last checkpoint.
//!
//! Invariant: the configuration and the plan are checked before anything is written. After that, what a run has committed is never
//! lost: it ends with a checkpoint, or it goes on from one.

use crate::checkpoint::save::{Options, Writer};
use crate::comm::groups::Groups;
use crate::config::source::Problem;
use crate::config::{Config, DataOrder, DataSource, DeviceKind};
use crate::data::loader::{Loader, LoaderSpec};
use crate::data::sampler::Order;
use crate::data::sources::{self, Source};
use crate::data::tokenizer::Tokenizer;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::launch::identity::Identity;
use crate::launch::signals::StopRequest;
use crate::plan::Plan;
use crate::plan::budget::Flops;
use crate::train::evaluate::Validation;
use crate::train::forecast;
use crate::train::report::{Facts, Reporter, Step, StepClock};
use crate::train::resume;
use crate::train::step::{Outcome, Trainer};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// How a run came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps are done, or `train.stop_after` is.
    Done,
    /// It was asked to stop, has saved, and would go on if started again.
    Stopped,
}

/// Why a run could not begin or go on.
#[derive(Debug)]
pub enum Failure {
    /// Nothing was written.
    Config(Vec<Problem>),
    Error(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Error(error)
    }
}

/// Runs this process's rank of the training that `config` describes.
pub fn run(config: &Config, identity: &Identity) -> Result<Ending, Failure> {
    let device = device(config, identity)?;
    let (checkpoint, notes) = resume::find(config)?;
    let changes = checkpoint.as_ref().map(|checkpoint| resume::changes(checkpoint, config)).transpose()?.unwrap_or_default();
    let geometry = checkpoint.as_ref().map(resume::geometry).transpose()?;
    let plan = Plan::new(config, identity.world, geometry).map_err(Failure::Config)?;
    let footprint = forecast::text(config, &plan)?;
    let (dir, groups) = (&config.run.dir, Groups::solo());
    fs::create_dir_all(dir).with_context(|| format!("creating run.dir = {}", dir.display()))?;
    let incarnation = next_incarnation(dir)?;
    let writer = Writer::new(Options {
        checkpoints: resume::checkpoints(config),
        rank: identity.rank,
        world: identity.world,
        incarnation,
        keep: config.checkpoint.keep,
        deadline: Duration::from_secs(3600),
    })?;
    write_texts(dir, config, &footprint)?;
    let stop = StopRequest::listen()?;
    let Device::Cpu(cpu) = device.clone() else { unreachable!("a run has a device that computes") };
    // All of it on a thread of the pool: no op then has to wake the pool up from outside.
    cpu.install(|| {
        let mut trainer = Trainer::new(config, plan, identity.rank, &device, groups)?;
        let done = match &checkpoint {
            Some(checkpoint) => resume::load(&mut trainer, checkpoint)?,
            None => {
                resume::start(&mut trainer, config)?;
                0
            }
        };
        let mut run = Run { config, device: &device, reporter: None, trainer, writer, stop, saved: checkpoint.as_ref().map(|_| done) };
        if identity.rank == 0 {
            run.reporter = Some(Reporter::new(dir, run.facts(incarnation))?);
        }
        for note in notes.iter().chain(&changes) {
            run.say(note);
        }
        if let Some(checkpoint) = &checkpoint {
            run.say(&format!("going on after step {done} from {}", checkpoint.folder().display()));
        }
        device.memory().reset_peak();
        run.train(done).map_err(Failure::Error)
    })
}

struct Run<'a> {
    config: &'a Config,
    device: &'a Device,
    trainer: Trainer,
    /// Rank 0 speaks for all.
    reporter: Option<Reporter>,
    writer: Writer,
    stop: StopRequest,
    /// The last step that was handed to the writer.
    saved: Option<u64>,
}

impl Run<'_> {
    /// Steps `done` + 1 to the end, counted from 1 as users do.
    fn train(&mut self, done: u64) -> Result<Ending> {
        let train = &self.config.train;
        let last = train.stop_after.map_or(train.steps, |stop| stop.min(train.steps));
        if done >= last {
            self.say(&format!("nothing to do: {done} steps are done, and the run ends after {last}"));
            return Ok(Ending::Done);
        }
        let mut loader = training_data(self.config, &self.trainer)?;
        let mut validation = validation_data(self.config, &self.trainer)?;
        let mut asked = false;
        for step in done + 1..=last {
            asked = self.one(step, &mut loader)?.stop;
            if let Some(validation) = &mut validation
                && (step % self.config.eval.interval == 0 || step == train.steps)
            {
                let loss = validation.loss(&mut self.trainer)?;
                if let Some(reporter) = &mut self.reporter {
                    reporter.evaluation(step, loss)?;
                }
            }
            let interval = self.config.checkpoint.interval;
            if (interval > 0 && step % interval == 0) || step == last || asked {
                self.save(step)?;
            }
            self.report_saves()?;
            if asked && step < last {
                break;
            }
        }
        let finished = self.writer.finish();
        self.report_saves()?;
        finished.context("the last checkpoint was not written; steps since the one before it would be lost")?;
        if let Some(reporter) = self.reporter.take() {
            reporter.finish();
        }
        Ok(if asked && self.saved != Some(last) { Ending::Stopped } else { Ending::Done })
    }

    fn one(&mut self, step: u64, loader: &mut Loader) -> Result<Outcome> {
        let mut clock = StepClock::start();
        let batch = loader.batch(step - 1)?;
        clock.data_arrived();
        let outcome = self.trainer.step(step - 1, &batch, self.stop.made())?;
        if !outcome.applied {
            let name = outcome.overflow.as_deref().unwrap_or("the loss");
            self.say(&format!("step {step} is skipped: the gradient of {name} is not finite"));
        }
        let line = Step {
            step,
            loss: outcome.loss,
            grad_norm: outcome.norm,
            lr: outcome.rate,
            tokens: step * self.trainer.plan.tokens_per_step(),
            comm_exposed_s: 0.0,
            memory_peak_bytes: self.device.memory().bytes_peak() as u64,
            loss_scale: (self.config.train.dtype == Dtype::F16).then_some(outcome.loss_scale),
            skipped: !outcome.applied,
        };
        if let Some(reporter) = &mut self.reporter {
            reporter.step(line, &clock)?;
        }
        Ok(outcome)
    }

    fn say(&self, text: &str) {
        if let Some(reporter) = &self.reporter {
            reporter.say(text);
        }
    }

    fn facts(&self, incarnation: u64) -> Facts {
        Facts {
            total_steps: self.config.train.steps,
            interval: self.config.log.interval,
            tokens_per_step: self.trainer.plan.tokens_per_step(),
            flops_per_token: Flops::of(&self.trainer.plan).per_token as f64,
            peak_flops: None,
            incarnation,
        }
    }

    fn save(&mut self, step: u64) -> Result<()> {
        let facts = resume::facts(&self.trainer, self.config, step)?;
        self.writer.save(facts, self.trainer.stage.zero.shards())?;
        self.saved = Some(step);
        if !self.config.checkpoint.asynchronous {
            // A save that fails does not end the run.
            if let Err(error) = self.writer.finish() {
                self.say(&format!("{error:#}; training goes on"));
            }
        }
        Ok(())
    }

    fn report_saves(&mut self) -> Result<()> {
        while let Some(outcome) = self.writer.outcome() {
            match outcome.result {
                Ok(saved) => self.say(&format!("saved step {} to {}", outcome.step, saved.folder.display())),
                Err(error) => self.say(&format!("step {} was not saved: {error:#}; training goes on", outcome.step)),
            }
        }
        Ok(())
    }
}

fn device(config: &Config, identity: &Identity) -> Result<Device> {
    match config.device.kind {
        DeviceKind::Auto | DeviceKind::Cpu => {}
        DeviceKind::Cuda | DeviceKind::Emulated => bail!("device.kind: this build trains on the cpu only; set device.kind = \"cpu\""),
    }
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if config.device.threads > 0 { config.device.threads } else { (available / identity.local_world).max(1) };
    Ok(Device::cpu(threads))
}

fn training_data(config: &Config, trainer: &Trainer) -> Result<Loader> {
    let order = match config.data.order {
        DataOrder::Shuffled => Order::Shuffled,
        DataOrder::Sequential => Order::Sequential,
    };
    loader(config, trainer, &config.data.sources, order)
}

fn validation_data(config: &Config, trainer: &Trainer) -> Result<Option<Validation>> {
    if config.eval.interval == 0 || config.data.validation.is_empty() {
        return Ok(None);
    }
    let loader = loader(config, trainer, &config.data.validation, Order::Sequential).context("data.validation")?;
    let windows = loader.sampler().samples_before_repeat();
    Ok(Some(Validation { loader, windows, steps: config.eval.steps }))
}

fn loader(config: &Config, trainer: &Trainer, sources: &[DataSource], order: Order) -> Result<Loader> {
    let tokenizer = Tokenizer::from_name(&config.data.tokenizer)?;
    let sources: Vec<Source> =
        sources.iter().map(|source| Source { path: source.path.clone().into(), weight: source.weight, dtype: None }).collect();
    Loader::new(LoaderSpec {
        sources: sources::open(&sources, &tokenizer, &config.data.cache, config.model.vocab_size)?,
        order,
        seed: config.run.seed,
        seq_len: config.train.seq_len,
        global_batch: config.train.global_batch_size,
        rows: trainer.rank.rows.clone(),
        document_mask: if config.data.document_mask { tokenizer.end_of_text() } else { None },
    })
}

/// The number of this start of the run, from 1; kept in a file, so that it grows even when a start ends badly.
fn next_incarnation(dir: &Path) -> Result<u64> {
    let path = dir.join("incarnation");
    let last = match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse::<u64>().with_context(|| format!("{}: a number was expected, not {text:?}", path.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    replace(&path, &format!("{}\n", last + 1))?;
    Ok(last + 1)
}

fn write_texts(dir: &Path, config: &Config, plan: &str) -> Result<()> {
    replace(&dir.join("config.toml"), &config.to_toml())?;
    replace(&dir.join("plan.txt"), plan)
}

/// Writes a small file so that a reader sees the old text or the new one, never half of it.
fn replace(path: &Path, text: &str) -> Result<()> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, path)).with_context(|| format!("writing {}", path.display()))
}
