//! One training run, from a configuration to its last checkpoint.
//!
//! Invariant: the configuration and the plan are checked before anything is written. After that, what a run has committed is never
//! lost: it ends with a checkpoint, or it goes on from one.

use crate::bench::machine;
use crate::checkpoint::load::Checkpoint;
use crate::checkpoint::save::{Options, Writer};
use crate::checkpoint::{commit, folder};
use crate::config::Config;
use crate::config::source::Problem;
use crate::data::loader::Loader;
use crate::data::tokenizer::Tokenizer;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::launch::failure;
use crate::launch::identity::Identity;
use crate::launch::signals::StopRequest;
use crate::plan::Plan;
use crate::plan::budget::{self, Flops};
use crate::plan::catalog;
use crate::train::evaluate::Validation;
use crate::train::fit::{self, Limit};
use crate::train::generate::{self, Sampling};
use crate::train::hardware::Hardware;
use crate::train::report::{Facts, Reporter, Step, StepClock, short_count};
use crate::train::step::{Outcome, Trainer};
use crate::train::team::Team;
use crate::train::{corpora, forecast, resume};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// How the sample at the end of a run is drawn: a little more of what is likely.
const SAMPLING: Sampling = Sampling { temperature: 0.6, top_k: 0, seed: 0 };

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

/// Runs this process's rank of the training that `config` describes. A failure is left in the run's folder too.
pub fn run(config: &Config, identity: &Identity) -> Result<Ending, Failure> {
    let ending = run_rank(config, identity);
    if let Err(Failure::Error(error)) = &ending {
        failure::record(&config.run.dir, identity, error);
    }
    ending
}

fn run_rank(config: &Config, identity: &Identity) -> Result<Ending, Failure> {
    // Before anybody waits for anybody: a device that is not there and a layout that cannot be are known at once.
    let hardware = Hardware::find(config, identity).map_err(|problem| Failure::Config(vec![problem]))?;
    Plan::new(config, identity.world, None).map_err(Failure::Config)?;
    let team = Team::join(config, identity)?;
    check_data(config, &team)?;
    let hardware = hardware.agreed(config, &team)?;
    let (checkpoint, mut notes) = resume::find(config, &team)?;
    notes.extend(hardware.note().map(str::to_string));
    let (decided, limit) = (hardware.decided(config), hardware.limit(config, &team)?);
    let (plan, note) = plan_on(&decided, identity.world, checkpoint.as_ref(), limit.as_ref())?;
    let told = |error: anyhow::Error| {
        team.fail(&error);
        Failure::Error(error)
    };
    let device = hardware.device(&decided, &plan, identity, &team, limit.as_ref()).map_err(told)?;
    let writer = open_run([config, &decided], identity, &plan, &team)?;
    let stop = StopRequest::listen()?;
    let groups = team.groups(&plan.mesh)?;
    let peak = peak_flops(&device, identity, plan.dtype);
    let ending = device.install(|| {
        let mut trainer = Trainer::new(config, plan, identity.rank, &device, groups)?;
        let done = match &checkpoint {
            Some(checkpoint) => resume::load(&mut trainer, checkpoint)?,
            None => resume::start(&mut trainer, config).map(|()| 0)?,
        };
        let reporter = Reporter::new(&config.run.dir, identity.rank, report_facts(config, &trainer.plan, writer.incarnation(), peak))?;
        reporter.say(&headline(config, &trainer.plan, &device.name()));
        if let Device::Gpu(gpu) = &device {
            reporter.say(&format!("matrix products by {}", gpu.products()));
        }
        notes.iter().chain(&note).for_each(|note| reporter.say(note));
        let loader = team.first_rank_first(|| corpora::training(config, &trainer))?;
        let validation = team.first_rank_first(|| corpora::validation(config, &trainer))?;
        device.memory().reset_peak();
        Run { config, device: &device, trainer, reporter, writer, stop, loader, validation, saved: None, unsaved: None }.train(done)
    });
    ending.map_err(told)
}

/// The plan of the run, which fits its device; one that goes on keeps model and geometry.
fn plan_on(
    config: &Config,
    world: usize,
    checkpoint: Option<&Checkpoint>,
    limit: Option<&Limit>,
) -> Result<(Plan, Option<String>), Failure> {
    if let Some(checkpoint) = checkpoint {
        let problems = resume::problems(checkpoint, config)?;
        if !problems.is_empty() {
            return Err(Failure::Config(problems));
        }
    }
    // Before the first step, as in imported weights, no sum has been taken that could be kept.
    let begun = checkpoint.filter(|checkpoint| checkpoint.index.facts.step > 0);
    let kept = begun.map(resume::geometry).transpose()?;
    let (plan, note) = resume::plan(config, world, kept).map_err(Failure::Config)?;
    match limit.map(|limit| fit::check_within(config, &plan, limit)).transpose()?.flatten() {
        Some(problem) => Err(Failure::Config(vec![problem])),
        None => Ok((plan, note)),
    }
}

struct Run<'a> {
    config: &'a Config,
    device: &'a Device,
    trainer: Trainer,
    reporter: Reporter,
    writer: Writer,
    stop: StopRequest,
    loader: Loader,
    validation: Option<Validation>,
    /// The last step that was handed to the writer.
    saved: Option<u64>,
    /// Why the last save that ended has failed.
    unsaved: Option<anyhow::Error>,
}

impl Run<'_> {
    /// Steps `done` + 1 to the end, counted from 1 as users do.
    fn train(mut self, done: u64) -> Result<Ending> {
        let train = &self.config.train;
        let last = train.stop_after.map_or(train.steps, |stop| stop.min(train.steps));
        if done >= last {
            self.reporter.say(&format!("nothing to do: {done} steps are done, and the run ends after {last}"));
            return Ok(Ending::Done);
        }
        let mut asked = false;
        for step in done + 1..=last {
            asked = self.one(step)?.stop;
            self.evaluate(step)?;
            let interval = self.config.checkpoint.interval;
            if (interval > 0 && step.is_multiple_of(interval)) || step == last || asked {
                self.save(step)?;
            }
            if asked {
                break;
            }
            self.report_saves(if step < last { "; training goes on" } else { "" });
        }
        self.writer.settle()?;
        self.report_saves("");
        if let Some(error) = self.unsaved.take() {
            return Err(error.context("the last checkpoint was not written; steps since the one before it would be lost"));
        }
        let stopped = asked && self.saved != Some(last);
        if stopped {
            self.reporter.say("stopped on request: started again, the run goes on from here");
        } else {
            self.sample()?;
        }
        self.trainer.groups.world.barrier()?;
        self.reporter.finish();
        Ok(if stopped { Ending::Stopped } else { Ending::Done })
    }

    fn evaluate(&mut self, step: u64) -> Result<()> {
        let Some(validation) = &mut self.validation else { return Ok(()) };
        if !step.is_multiple_of(self.config.eval.interval) && step != self.config.train.steps {
            return Ok(());
        }
        let loss = validation.loss(&mut self.trainer)?;
        self.reporter.evaluation(step, loss)
    }

    /// Shows what the model has learnt to write: rank 0 does, where it has the whole model.
    fn sample(&mut self) -> Result<()> {
        let Some(prompt) = &self.config.eval.sample else { return Ok(()) };
        let reporter = &self.reporter;
        if self.trainer.index() != 0 {
            return Ok(());
        }
        if !generate::is_whole(&self.trainer.plan) {
            reporter.say(
                "no sample: eval.sample needs a rank that has the whole model (tp = 1, pp = 1, zero < 3); `ferrotron generate` has one",
            );
            return Ok(());
        }
        let tokenizer = Tokenizer::from_name(&self.config.data.tokenizer)?;
        let mut text = prompt.clone().into_bytes();
        let sampling = Sampling { seed: self.config.run.seed, ..SAMPLING };
        generate::speak(&mut self.trainer, &tokenizer, prompt.as_bytes(), self.config.eval.sample_tokens, sampling, &mut |bytes| {
            text.extend(bytes);
            Ok(())
        })?;
        reporter.say(&format!("what the model makes of {prompt:?}:\n{}", printable(&text)));
        Ok(())
    }

    fn one(&mut self, step: u64) -> Result<Outcome> {
        // What came between the steps (evaluation, checkpoints) is not the step's.
        self.trainer.groups.take_traffic();
        let mut clock = StepClock::start();
        let batch = self.loader.batch(step - 1)?;
        clock.data_arrived();
        let outcome = self.trainer.step(step - 1, &batch, self.stop.made())?;
        if !outcome.applied {
            let name = outcome.overflow.as_deref().unwrap_or("the loss");
            self.reporter.say(&format!("step {step} is skipped: the gradient of {name} is not finite"));
        }
        let line = Step {
            step,
            loss: outcome.loss,
            grad_norm: outcome.norm,
            lr: outcome.rate,
            tokens: step * self.trainer.plan.tokens_per_step(),
            comm_exposed_s: self.trainer.groups.take_seconds_exposed(),
            memory_peak_bytes: self.device.memory().bytes_peak() as u64,
            loss_scale: (self.config.train.dtype == Dtype::F16).then_some(outcome.loss_scale),
            skipped: !outcome.applied,
        };
        self.reporter.step(line, &clock)?;
        Ok(outcome)
    }

    fn save(&mut self, step: u64) -> Result<()> {
        let facts = resume::facts(&self.trainer, self.config, step)?;
        let shards = self.trainer.stage.zero.shards()?;
        self.device.check()?;
        self.writer.save(facts, shards)?;
        self.saved = Some(step);
        if !self.config.checkpoint.asynchronous {
            self.writer.settle()?;
        }
        Ok(())
    }

    /// A save that fails does not end the run. `then`: what follows such a failure.
    fn report_saves(&mut self, then: &str) {
        while let Some(outcome) = self.writer.outcome() {
            match outcome.result {
                Ok(saved) => {
                    self.reporter.say(&format!("saved step {} to {}", outcome.step, saved.folder.display()));
                    saved.warnings.iter().for_each(|warning| self.reporter.say(warning));
                    self.unsaved = None;
                }
                Err(error) => {
                    self.reporter.say(&format!("step {} was not saved: {error:#}{then}", outcome.step));
                    self.unsaved = Some(error);
                }
            }
        }
    }
}

/// A model may well sample what would move a terminal's cursor.
fn printable(text: &[u8]) -> String {
    let shown = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { char::REPLACEMENT_CHARACTER } else { c };
    String::from_utf8_lossy(text).chars().map(shown).collect()
}

/// Operations a second that the processors of all ranks could do, as measured on this node now. Of a GPU it is not known.
fn peak_flops(device: &Device, identity: &Identity, dtype: Dtype) -> Option<f64> {
    let Device::Cpu(cpu) = device else { return None };
    // Ranks of one node may be more than its processors.
    let of_node = (cpu.threads() * identity.local_world).min(available_threads());
    let most = (0..3).map(|_| machine::peak_flops(of_node, dtype)).fold(0.0, f64::max);
    Some(most * identity.world as f64 / identity.local_world as f64)
}

fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn report_facts(config: &Config, plan: &Plan, incarnation: u64, peak_flops: Option<f64>) -> Facts {
    Facts {
        total_steps: config.train.steps,
        interval: config.log.interval,
        tokens_per_step: plan.tokens_per_step(),
        flops_per_token: Flops::of(plan).per_token as f64,
        peak_flops,
        incarnation,
    }
}

/// What a run is, in a line.
fn headline(config: &Config, plan: &Plan, device: &str) -> String {
    let plural = |count: usize| if count == 1 { "" } else { "s" };
    format!(
        "{}: {} parameters in {}, {} steps of {} tokens, on {} rank{} of {device}; all goes to {}",
        config.run.name,
        short_count(catalog::parameters(&plan.units) as f64),
        plan.dtype,
        config.train.steps,
        short_count(plan.tokens_per_step() as f64),
        plan.mesh.world(),
        plural(plan.mesh.world()),
        config.run.dir.display()
    )
}

/// Data that is not there is told before anything is written. Rank 0 looks for all.
fn check_data(config: &Config, team: &Team) -> Result<(), Failure> {
    let missing = team.decide(|| Ok(corpora::missing(config)))?;
    if missing.is_empty() {
        return Ok(());
    }
    let here = "paths begin at the folder in which the program is started";
    Err(Failure::Config(missing.iter().map(|(key, message)| Problem::new(key, message).help(here)).collect()))
}

/// Makes the run's folder and takes possession of its checkpoints. The first thing that is written. The configuration is as given, and
/// with `auto` decided.
fn open_run([config, decided]: [&Config; 2], identity: &Identity, plan: &Plan, team: &Team) -> Result<Writer> {
    let checkpoints = resume::checkpoints(config);
    let incarnation = team.decide(|| {
        fs::create_dir_all(&checkpoints).with_context(|| format!("making run.dir = {}", config.run.dir.display()))?;
        Ok(commit::last_incarnation(&checkpoints)?.unwrap_or(0) + 1)
    })?;
    let writer = team.first_rank_first(|| {
        Writer::new(Options {
            checkpoints,
            rank: identity.rank,
            world: identity.world,
            incarnation,
            keep: config.checkpoint.keep,
            deadline: Duration::from_secs(3600),
        })
    })?;
    team.decide(|| {
        folder::check_space(&config.run.dir, budget::checkpoint_bytes(plan))?;
        replace(&config.run.dir.join("config.toml"), &config.to_toml())?;
        replace(&config.run.dir.join("plan.txt"), &forecast::text(decided, plan)?)
    })?;
    Ok(writer)
}

/// Writes a small file so that a reader sees the old text or the new one, never half of it.
fn replace(path: &Path, text: &str) -> Result<()> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, path)).with_context(|| format!("writing {}", path.display()))
}
