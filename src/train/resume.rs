//! Where a run goes on from: a checkpoint, given weights, or its seed.
//!
//! Invariant: a run that goes on does so with the canonical geometry of its checkpoint, and says what else has changed since.

use crate::checkpoint::import::HuggingFace;
use crate::checkpoint::index::{self, Facts, Kind};
use crate::checkpoint::load::{self, Checkpoint};
use crate::config::{Config, Resume};
use crate::dtype::Dtype;
use crate::model::init;
use crate::plan::layout::Piece;
use crate::plan::{Geometry, Order};
use crate::train::loss_scale::LossScaler;
use crate::train::step::Trainer;
use crate::train::team::Team;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What the training loop carries from step to step, besides weights and moments.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    updates: u64,
    loss_scale: LossScaler,
}

/// The folder of a run's checkpoints.
pub fn checkpoints(config: &Config) -> PathBuf {
    config.run.dir.join("checkpoints")
}

/// The checkpoint that `checkpoint.resume` asks for, verified, and what is worth telling about it. Rank 0 chooses for all.
pub fn find(config: &Config, team: &Team) -> Result<(Option<Checkpoint>, Vec<String>)> {
    let (folder, mut notes) = team.decide(|| {
        let (found, notes) = choose(config)?;
        Ok((found.map(|checkpoint| checkpoint.folder().to_path_buf()), notes))
    })?;
    let Some(folder) = folder else { return Ok((None, notes)) };
    let checkpoint = Checkpoint::open(&folder)?;
    notes.extend(changes(&checkpoint, config)?);
    notes.push(format!("going on after step {} from {}", checkpoint.index.facts.step, folder.display()));
    Ok((Some(checkpoint), notes))
}

fn choose(config: &Config) -> Result<(Option<Checkpoint>, Vec<String>)> {
    let folder = checkpoints(config);
    let found = match &config.checkpoint.resume {
        Resume::None => return Ok((None, Vec::new())),
        Resume::Auto if !folder.exists() => return Ok((None, Vec::new())),
        Resume::Auto => {
            let Some((checkpoint, skipped)) = load::newest_verified(&folder)? else { return Ok((None, Vec::new())) };
            let notes = skipped.iter().map(|skipped| format!("stepped back over {}: {}", skipped.folder.display(), skipped.reason));
            return Ok((Some(checkpoint), notes.collect()));
        }
        Resume::Step(step) => load::by_step(&folder, *step)?,
        Resume::Path(path) => Checkpoint::open(path)?,
    };
    found.verify()?;
    Ok((Some(found), Vec::new()))
}

/// The canonical geometry a checkpoint was made with.
pub fn geometry(checkpoint: &Checkpoint) -> Result<Geometry> {
    let index::Geometry { shards, lanes, order } = &checkpoint.index.facts.geometry;
    let order = match order.as_str() {
        "lanes" => Order::Lanes,
        "rows" => Order::Rows,
        other => bail!("{}: geometry.order is {other:?}, and \"lanes\" and \"rows\" are known", checkpoint.folder().display()),
    };
    Ok(Geometry { shards: *shards, lanes: *lanes, order })
}

/// Fills weights, moments and the loop's state from a checkpoint. Returns the number of steps done.
pub fn load(trainer: &mut Trainer, checkpoint: &Checkpoint) -> Result<u64> {
    let facts = &checkpoint.index.facts;
    let place = || format!("loading {}", checkpoint.folder().display());
    let kind = if checkpoint.has(Kind::Master) { Kind::Master } else { Kind::Weights };
    let zero = &mut trainer.stage.zero;
    zero.load_weights(&mut |_, pieces, out| checkpoint.read(kind, pieces, Dtype::F32, bytemuck::cast_slice_mut(out)))
        .with_context(place)?;
    if !checkpoint.has(Kind::ExpAvg) {
        // An imported checkpoint: weights alone, before the first step.
        return Ok(facts.step);
    }
    for (which, kind) in [Kind::ExpAvg, Kind::ExpAvgSq].into_iter().enumerate() {
        zero.load_moments(which, &mut |_, pieces, out| checkpoint.read(kind, pieces, Dtype::F32, bytemuck::cast_slice_mut(out)))
            .with_context(place)?;
    }
    let state: State = serde_json::from_value(facts.state.clone()).with_context(|| format!("{}: its state", place()))?;
    trainer.updates = state.updates;
    trainer.loss_scale = state.loss_scale;
    Ok(facts.step)
}

/// Fills the weights alone, from the f32 ones where there are some.
pub fn load_weights(trainer: &mut Trainer, checkpoint: &Checkpoint) -> Result<()> {
    let kind = if checkpoint.has(Kind::Master) { Kind::Master } else { Kind::Weights };
    let read = |pieces: &[Piece], out: &mut [f32]| checkpoint.read(kind, pieces, Dtype::F32, bytemuck::cast_slice_mut(out));
    let loaded = trainer.stage.zero.load_weights(&mut |_, pieces, out| read(pieces, out));
    loaded.with_context(|| format!("loading {}", checkpoint.folder().display()))
}

/// Weights of step 0: given ones, or those that follow from the seed.
pub fn start(trainer: &mut Trainer, config: &Config) -> Result<()> {
    if let Some(folder) = &config.model.init {
        return start_from(trainer, folder).with_context(|| format!("model.init = {:?}", folder.display().to_string()));
    }
    let (seed, units) = (config.run.seed, trainer.rank.units.clone());
    let plan = trainer.plan.units.clone();
    trainer.stage.zero.load_weights(&mut |unit, pieces, out| {
        init::fill(seed, &plan[units[unit].0], pieces, out);
        Ok(())
    })
}

fn start_from(trainer: &mut Trainer, folder: &Path) -> Result<()> {
    let source = HuggingFace::open(folder)?;
    let entries = trainer.plan.units.iter().flat_map(|unit| &unit.entries);
    source.check(&entries.map(|entry| (entry.name.clone(), entry.public_shape.clone())).collect())?;
    trainer.stage.zero.load_weights(&mut |_, pieces, out| source.read(pieces, Dtype::F32, bytemuck::cast_slice_mut(out)))
}

/// What a checkpoint after `step` steps says of the run.
pub fn facts(trainer: &Trainer, config: &Config, step: u64) -> Result<Facts> {
    let Geometry { shards, lanes, order } = trainer.plan.geometry;
    let order = match order {
        Order::Lanes => "lanes",
        Order::Rows => "rows",
    };
    let state = State { updates: trainer.updates, loss_scale: trainer.loss_scale };
    Ok(Facts {
        step,
        tokens: step * trainer.plan.tokens_per_step(),
        seed: config.run.seed,
        geometry: index::Geometry { shards, lanes, order: order.to_string() },
        state: serde_json::to_value(state)?,
        config: config.to_toml(),
    })
}

/// What changed between the configuration of a checkpoint and the one in force. An error where the model itself is another.
fn changes(checkpoint: &Checkpoint, config: &Config) -> Result<Vec<String>> {
    let at = checkpoint.folder().display();
    let parse = |text: &str| text.parse::<toml::Table>().with_context(|| format!("{at}: its configuration"));
    let (before, now) = (parse(&checkpoint.index.facts.config)?, parse(&config.to_toml())?);
    let mut changes = Vec::new();
    compare("", &toml::Value::Table(before), &toml::Value::Table(now), &mut changes);
    let fatal: Vec<&str> = changes.iter().filter(|(key, _)| is_shape(key)).map(|(_, text)| text.as_str()).collect();
    if !fatal.is_empty() {
        bail!(
            "{at} is of another model: {}. Keep the model's keys to go on, or set checkpoint.resume = \"none\" and another run.dir to start anew",
            fatal.join(", ")
        );
    }
    Ok(changes.into_iter().filter(|(key, _)| is_worth_telling(key)).map(|(_, text)| text).collect())
}

/// Keys that decide which tensors there are.
fn is_shape(key: &str) -> bool {
    let free = ["model.init", "model.init_std", "model.max_position_embeddings", "model.config"];
    key.starts_with("model.") && !free.contains(&key)
}

/// Where a run is, how it is cut and how often it speaks may change at will.
fn is_worth_telling(key: &str) -> bool {
    !["run.", "log.", "checkpoint.", "device.", "eval.", "parallel.", "geometry."].iter().any(|section| key.starts_with(section))
        && !["train.stop_after", "data.cache"].contains(&key)
}

fn compare(key: &str, before: &toml::Value, now: &toml::Value, changes: &mut Vec<(String, String)>) {
    if let (toml::Value::Table(before), toml::Value::Table(now)) = (before, now) {
        let mut keys: Vec<&String> = before.keys().chain(now.keys()).collect();
        keys.sort();
        keys.dedup();
        for name in keys {
            let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            match (before.get(name), now.get(name)) {
                (Some(a), Some(b)) => compare(&path, a, b, changes),
                (Some(a), None) => changes.push((path.clone(), format!("{path} was {a} and is not set"))),
                (None, Some(b)) => changes.push((path.clone(), format!("{path} was not set and is {b}"))),
                (None, None) => unreachable!("the key is of one of the two"),
            }
        }
    } else if before != now {
        changes.push((key.to_string(), format!("{key} was {before} and is {now}")));
    }
}
