//! Where a run goes on from: a checkpoint, given weights, or its seed.
//!
//! Invariant: a run that goes on does so with the canonical geometry of its checkpoint, unless it was told that it may move, and says
//! what else has changed since.

use crate::checkpoint::import::HuggingFace;
use crate::checkpoint::index::{self, Facts, Kind};
use crate::checkpoint::load::{self, Checkpoint};
use crate::config::source::Problem;
use crate::config::{Config, Resume, SumOrder};
use crate::device::cpu::Isa;
use crate::dtype::Dtype;
use crate::model::init;
use crate::plan::layout::Piece;
use crate::plan::{Geometry, Order, Plan, check};
use crate::train::loss_scale::LossScaler;
use crate::train::step::Trainer;
use crate::train::team::Team;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
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
    let told = changes(&checkpoint, config)?.into_iter().filter(|change| is_worth_telling(&change.key));
    notes.extend(told.map(|change| change.text()));
    notes.push(format!("going on after step {} from {}", checkpoint.index.facts.step, folder.display()));
    Ok((Some(checkpoint), notes))
}

fn choose(config: &Config) -> Result<(Option<Checkpoint>, Vec<String>)> {
    let folder = checkpoints(config);
    let found = match &config.checkpoint.resume {
        Resume::None => return Ok((None, left_behind(&folder)?)),
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

/// What a run that starts anew finds in its folder. It is not in the way: later starts are newer, whatever the step.
fn left_behind(folder: &Path) -> Result<Vec<String>> {
    let (sound, unsound) = load::newest_first(folder)?;
    let count = sound.len() + unsound.len();
    let newest = sound.first().map(|checkpoint| format!(", the newest {}", checkpoint.folder().display())).unwrap_or_default();
    let note = || format!("starts anew beside {count} checkpoints of earlier starts{newest}, as checkpoint.resume = \"none\" asks");
    Ok((count > 0).then(note).into_iter().collect())
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

/// The plan of a run, and what is worth telling about its canonical sums. `kept`: those of the checkpoint that it goes on from.
pub fn plan(config: &Config, world: usize, kept: Option<Geometry>) -> Result<(Plan, Option<String>), Vec<Problem>> {
    let Some(kept) = kept else { return Ok((Plan::new(config, world, None)?, None)) };
    if config.geometry.may_move {
        let plan = Plan::new(config, world, None)?;
        let moved = || format!("the run's canonical sums move from ({kept}) to ({}): {ROUNDING}", plan.geometry);
        let note = (plan.geometry != kept).then(moved);
        return Ok((plan, note));
    }
    match Plan::new(config, world, Some(kept)) {
        Ok(plan) => {
            let asked = check::geometry(config, &plan.mesh);
            let refused = (config.geometry.shards > 0 && asked.shards != kept.shards)
                || (config.geometry.lanes > 0 && asked.lanes != kept.lanes)
                || (config.geometry.order != SumOrder::Auto && asked.order != kept.order);
            let note = || {
                format!(
                    "the run keeps the canonical sums of its checkpoint ({kept}): [geometry] asks for others, but not for geometry.move"
                )
            };
            Ok((plan, refused.then(note)))
        }
        Err(mut problems) => {
            // Where the layout is wrong by itself, that is what there is to tell.
            let alone = Plan::new(config, world, None)?;
            // What would help a run that starts is no help to one that keeps its sums: the first problem says what is.
            problems.iter_mut().for_each(|problem| problem.help = None);
            problems.insert(0, cannot_keep(&kept, &alone.geometry));
            Err(problems)
        }
    }
}

fn cannot_keep(kept: &Geometry, other: &Geometry) -> Problem {
    let fitting = |leaves: usize| {
        let parts: Vec<String> = (1..=leaves).filter(|&parts| check::tree_allows(leaves, parts)).map(|parts| parts.to_string()).collect();
        parts.join(" or ")
    };
    let message = format!("the checkpoint's canonical sums ({kept}) cannot be kept on this layout");
    let help = format!(
        "a layout with parallel.tp = {} and {} data-parallel ranks, or geometry.move = true to go on with ({other}): {ROUNDING}",
        fitting(kept.shards),
        fitting(kept.lanes)
    );
    Problem::new("geometry.move", message).help(help)
}

const ROUNDING: &str = "its numbers then differ from an unmoved run's by rounding";

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
        init::fill(Isa::detect(), seed, &plan[units[unit].0], pieces, out);
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

/// Why the run of a checkpoint cannot go on with this configuration: the keys by which the model is another.
pub fn problems(checkpoint: &Checkpoint, config: &Config) -> Result<Vec<Problem>> {
    let at = checkpoint.folder().display();
    let problem = |change: Change| {
        let Change { key, was, is } = change;
        let message = format!("`{key}` {is}, but {at} is of another model: there it {was}");
        Problem::new(&key, message).help("what it was, to go on; or `checkpoint.resume` = \"none\" and another run.dir, to start anew")
    };
    let rows = geometry(checkpoint)?.order == Order::Rows && !config.geometry.may_move;
    let (shape, rest): (Vec<Change>, Vec<Change>) = changes(checkpoint, config)?.into_iter().partition(|change| is_shape(&change.key));
    let mut problems: Vec<Problem> = shape.into_iter().map(problem).collect();
    if let Some(Change { key, was, is }) = rest.into_iter().find(|change| rows && change.key == "train.micro_batch_size") {
        let message = format!("`{key}` {is}, but it {was} in {at}, whose sums are in the order of rows: there it is part of the geometry");
        problems.push(Problem::new(&key, message).help(format!("what it was, or geometry.move = true: {ROUNDING}")));
    }
    Ok(problems)
}

/// A key that is set otherwise than before.
struct Change {
    key: String,
    was: String,
    is: String,
}

impl Change {
    fn text(&self) -> String {
        format!("{} {} and {}", self.key, self.was, self.is)
    }
}

/// What changed between the configuration of a checkpoint and the one in force.
fn changes(checkpoint: &Checkpoint, config: &Config) -> Result<Vec<Change>> {
    let at = checkpoint.folder().display();
    let parse = |text: &str| text.parse::<toml::Table>().with_context(|| format!("{at}: its configuration"));
    let (before, now) = (parse(&checkpoint.index.facts.config)?, parse(&config.to_toml())?);
    let mut changes = Vec::new();
    compare("", Some(&toml::Value::Table(before)), Some(&toml::Value::Table(now)), &mut changes);
    Ok(changes)
}

/// Keys that make the model what it is.
fn is_shape(key: &str) -> bool {
    let free = ["model.init", "model.init_std", "model.max_position_embeddings", "model.config"];
    key.starts_with("model.") && !free.contains(&key)
}

/// Where a run is, how it is cut and how often it speaks may change at will.
fn is_worth_telling(key: &str) -> bool {
    !["run.", "log.", "checkpoint.", "device.", "eval.", "parallel.", "geometry."].iter().any(|section| key.starts_with(section))
        && !["train.stop_after", "data.cache"].contains(&key)
}

fn compare(key: &str, before: Option<&toml::Value>, now: Option<&toml::Value>, changes: &mut Vec<Change>) {
    if let (Some(toml::Value::Table(before)), Some(toml::Value::Table(now))) = (before, now) {
        let names: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
        for name in names {
            let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            compare(&path, before.get(name), now.get(name), changes);
        }
    } else if before != now {
        let of = |verb: &str, value: Option<&toml::Value>| value.map_or(format!("{verb} not set"), |value| format!("{verb} {value}"));
        changes.push(Change { key: key.to_string(), was: of("was", before), is: of("is", now) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(lines: &str, world: usize, kept: Geometry) -> Result<(Geometry, Option<String>), Vec<String>> {
        let text = format!(
            "[model]\nfamily = \"llama\"\nhidden_size = 32\nintermediate_size = 32\nnum_layers = 2\nnum_heads = 4\n\
             [train]\nsteps = 1\nseq_len = 16\nglobal_batch_size = 8\n{lines}\n"
        );
        let (config, _) = Config::parse("small.toml", &text, &[]).expect("each key is well-formed");
        let told = |problem: Problem| problem.help.into_iter().fold(problem.message, |message, help| message + ": " + &help);
        match plan(&config, world, Some(kept)) {
            Ok((plan, note)) => Ok((plan.geometry, note)),
            Err(problems) => Err(problems.into_iter().map(told).collect()),
        }
    }

    const KEPT: Geometry = Geometry { shards: 2, lanes: 4, order: Order::Lanes };

    #[test]
    fn canonical_sums_are_kept_where_the_layout_allows() {
        assert_eq!(planned("", 1, KEPT), Ok((KEPT, None)));
        assert_eq!(planned("[parallel]\ntp = 2\nzero = 3", 8, KEPT), Ok((KEPT, None)));
        let (geometry, note) = planned("[geometry]\nlanes = 8", 2, KEPT).expect("lanes 4 fit too");
        assert_eq!(geometry, KEPT);
        let note = note.expect("[geometry] is not obeyed");
        assert!(note.contains("keeps the canonical sums of its checkpoint (shards 2, lanes 4, order lanes)"), "{note}");
    }

    #[test]
    fn canonical_sums_move_only_when_told_to() {
        let problems = planned("[parallel]\ntp = 4", 4, KEPT).expect_err("two shards on four ranks");
        assert_eq!(
            problems[0],
            "the checkpoint's canonical sums (shards 2, lanes 4, order lanes) cannot be kept on this layout: a layout with \
             parallel.tp = 1 or 2 and 1 or 2 or 4 data-parallel ranks, or geometry.move = true to go on with \
             (shards 4, lanes 1, order lanes): its numbers then differ from an unmoved run's by rounding"
        );
        assert!(problems[1].contains("`geometry.shards` = 2 cannot be cut over `parallel.tp` = 4 ranks"), "{problems:?}");
        let moved = Geometry { shards: 4, lanes: 1, order: Order::Lanes };
        let (geometry, note) = planned("[parallel]\ntp = 4\n[geometry]\nmove = true", 4, KEPT).expect("it may move");
        assert_eq!(geometry, moved);
        assert!(note.expect("it has moved").contains("from (shards 2, lanes 4, order lanes) to (shards 4, lanes 1, order lanes)"));
        assert_eq!(planned("[parallel]\ntp = 4\n[geometry]\nmove = true", 4, moved), Ok((moved, None)));
    }
}
