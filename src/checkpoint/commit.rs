//! What rank 0 does alone: taking possession of the folder, gathering the parts of an attempt into a checkpoint, and keeping few.
//!
//! Every start of a run has an incarnation, larger than all before it. The file `incarnation` holds the largest that wrote here, and
//! a rank of an earlier one, cut off and still alive somewhere, finds itself fenced out before it commits or deletes.
//!
//! Invariant: from the first commit on there is at every moment, a power cut included, a checkpoint that loads.

use crate::checkpoint::folder::{self, Name};
use crate::checkpoint::index::{self, Facts, INDEX, Index, StoredSum, Tensors, VERSION};
use crate::checkpoint::load::{Checkpoint, newest_first};
use crate::checkpoint::save::{Options, Shared};
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

const INCARNATION: &str = "incarnation";
const LATEST: &str = "latest";
/// Pauses between looks for the parts of other ranks: from the first to the second, doubling.
const NAPS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));

/// A save that went well.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Saved {
    pub folder: PathBuf,
    /// On rank 0 of the whole checkpoint, on the others of their part.
    pub bytes: u64,
    /// What went wrong beside it: leftovers or old checkpoints that could not be removed.
    pub warnings: Vec<String>,
}

/// What a rank leaves in the folder of an attempt when it has written its files, or could not.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Part {
    Done { facts: Facts, files: BTreeMap<String, StoredSum>, tensors: Tensors },
    Failed { reason: String },
}

impl Part {
    fn path(attempt: &Path, rank: usize) -> PathBuf {
        attempt.join(format!("part-{rank:05}.json"))
    }

    pub fn write(&self, attempt: &Path, rank: usize) -> Result<()> {
        folder::write_whole(&Part::path(attempt, rank), &index::seal(self)?)
    }
}

/// The largest incarnation that has written to the folder; None in a new one. A new start of the run takes a larger one.
pub fn last_incarnation(checkpoints: &Path) -> Result<Option<u64>> {
    let path = checkpoints.join(INCARNATION);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    let number = text.trim().parse().with_context(|| format!("{} should hold a number, not {text:?}", path.display()))?;
    Ok(Some(number))
}

/// Fails when a later start of the run has taken over.
pub fn check_fence(checkpoints: &Path, incarnation: u64) -> Result<()> {
    match last_incarnation(checkpoints)? {
        Some(last) if last > incarnation => {
            bail!(
                "incarnation {last} of the run has taken over {}; incarnation {incarnation} may no longer write there",
                checkpoints.display()
            )
        }
        _ => Ok(()),
    }
}

/// Takes possession of the folder for this start of the run, and puts in order what earlier ones left.
///
/// The lock that comes back keeps a second run of this kind out. Where the file system has no locks there is none.
pub fn claim(checkpoints: &Path, incarnation: u64) -> Result<Option<File>> {
    folder::create(checkpoints)?;
    let path = checkpoints.join("lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    let lock = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Some(file),
        Err(Errno::WOULDBLOCK) => bail!("another run is writing to {}: it holds {}", checkpoints.display(), path.display()),
        Err(Errno::NOSYS | Errno::NOLCK | Errno::OPNOTSUPP | Errno::INVAL) => None,
        Err(error) => return Err(error).with_context(|| format!("locking {}", path.display())),
    };
    check_fence(checkpoints, incarnation)?;
    folder::write_whole(&checkpoints.join(INCARNATION), format!("{incarnation}\n").as_bytes())?;
    if let Some(parent) = checkpoints.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        folder::sync(parent)?;
    }
    for name in folder::names(checkpoints)? {
        if let Name::Replaced(step) = name
            && !folder::exists(&checkpoints.join(Name::Step(step).text()))?
        {
            folder::rename(&checkpoints.join(name.text()), &checkpoints.join(Name::Step(step).text()))?;
            folder::sync(checkpoints)?;
        }
    }
    let failures = clean(checkpoints, incarnation, u64::MAX);
    ensure!(failures.is_empty(), "clearing away what an earlier run left: {}", failures.join("; "));
    Ok(lock)
}

/// Removes attempts that came before the one numbered `number` of this incarnation, and what a deletion or a replacement left
/// when it was cut short. Gives the failures.
pub fn clean(checkpoints: &Path, incarnation: u64, number: u64) -> Vec<String> {
    let names = match check_fence(checkpoints, incarnation).and_then(|()| folder::names(checkpoints)) {
        Ok(names) => names,
        Err(error) => return vec![format!("{error:#}")],
    };
    let mut failures = Vec::new();
    for name in names {
        let over = match name {
            Name::Attempt { incarnation: of, number: at, .. } => (of, at) < (incarnation, number),
            Name::Deleted(_) => true,
            Name::Replaced(step) => Checkpoint::open(&checkpoints.join(Name::Step(step).text())).is_ok(),
            Name::Step(_) => false,
        };
        if over && let Err(error) = folder::discard(checkpoints, name) {
            failures.push(format!("{error:#}"));
        }
    }
    failures
}

/// Waits for the parts of all ranks and makes the attempt a checkpoint.
pub fn commit(options: &Options, shared: &Shared, attempt: &Path, facts: Facts) -> Result<Saved> {
    let index = gather(options, shared, attempt, facts)?;
    let path = attempt.join(INDEX);
    let mut file = folder::create_file(&path)?;
    file.write_all(&index.to_bytes()?).and_then(|()| file.sync_all()).with_context(|| format!("writing {}", path.display()))?;
    for rank in 0..options.world {
        let part = Part::path(attempt, rank);
        fs::remove_file(&part).with_context(|| format!("removing {}", part.display()))?;
    }
    folder::sync(attempt)?;
    check_fence(&options.checkpoints, options.incarnation)?;
    let step = index.facts.step;
    let folder = install(&options.checkpoints, attempt, step)?;
    let mut warnings = Vec::new();
    let replaced = Name::Replaced(step);
    let tidy = folder::exists(&options.checkpoints.join(replaced.text())).and_then(|there| match there {
        true => folder::discard(&options.checkpoints, replaced),
        false => Ok(()),
    });
    if let Err(error) = tidy.and_then(|()| retain(options, step, &mut warnings)) {
        warnings.push(format!("removing old checkpoints: {error:#}"));
    }
    Ok(Saved { folder, bytes: index.bytes(), warnings })
}

/// Gives the attempt its name. A checkpoint of the same step steps aside and counts until the new one is in its place.
fn install(checkpoints: &Path, attempt: &Path, step: u64) -> Result<PathBuf> {
    let (folder, aside) = (checkpoints.join(Name::Step(step).text()), checkpoints.join(Name::Replaced(step).text()));
    if folder::exists(&folder)? {
        if folder::exists(&aside)? {
            // The one aside is still there because the one in place is not sound: that one goes.
            folder::discard(checkpoints, Name::Step(step))?;
        } else {
            folder::rename(&folder, &aside)?;
        }
    }
    folder::rename(attempt, &folder)?;
    let named = folder::sync(checkpoints)
        .and_then(|()| folder::write_whole(&checkpoints.join(LATEST), format!("{}\n", Name::Step(step).text()).as_bytes()));
    named.with_context(|| format!("{} is in place, but its name may not be", folder.display()))?;
    Ok(folder)
}

/// The index of all ranks' parts.
fn gather(options: &Options, shared: &Shared, attempt: &Path, facts: Facts) -> Result<Index> {
    let mut index = Index { version: VERSION, incarnation: options.incarnation, facts, files: BTreeMap::new(), tensors: Tensors::new() };
    let (mut nap, mut waited) = (NAPS.0, Duration::ZERO);
    let mut missing: Vec<usize> = (0..options.world).collect();
    loop {
        let mut late = Vec::new();
        for rank in missing {
            let path = Part::path(attempt, rank);
            if !folder::exists(&path)? {
                late.push(rank);
                continue;
            }
            match index::unseal(&path)? {
                Part::Failed { reason } => bail!("rank {rank} could not write its part of {}: {reason}", attempt.display()),
                Part::Done { facts, files, tensors } => {
                    merge(&mut index, facts, files, tensors).with_context(|| format!("the part of rank {rank}"))?;
                }
            }
        }
        if late.is_empty() {
            break;
        }
        missing = late;
        let (seconds, folder) = (options.deadline.as_secs(), attempt.display());
        ensure!(waited < options.deadline, "the ranks {missing:?} have not written their parts of {folder} within {seconds} s");
        ensure!(!shared.nap(nap), "the run ended before the ranks {missing:?} had written their parts of {folder}");
        waited += nap;
        nap = NAPS.1.min(nap * 2);
    }
    for tensor in index.tensors.values_mut().flat_map(BTreeMap::values_mut) {
        tensor.boxes.sort();
    }
    index.check().context("the parts of all ranks do not make whole tensors")?;
    for (name, sum) in &index.files {
        let path = attempt.join(name);
        let bytes = fs::symlink_metadata(&path).with_context(|| format!("looking at {}", path.display()))?.len();
        ensure!(bytes == sum.bytes, "{} has {bytes} bytes, and {} were written", path.display(), sum.bytes);
    }
    Ok(index)
}

fn merge(index: &mut Index, facts: Facts, files: BTreeMap<String, StoredSum>, tensors: Tensors) -> Result<()> {
    ensure!(facts == index.facts, "it says {facts:?}, and rank 0 says {:?}", index.facts);
    for (name, sum) in files {
        ensure!(index.files.insert(name.clone(), sum).is_none(), "the file {name:?} is there already");
    }
    for (kind, tensors) in tensors {
        let all = index.tensors.entry(kind).or_default();
        for (name, mut tensor) in tensors {
            let Some(known) = all.get_mut(&name) else {
                all.insert(name, tensor);
                continue;
            };
            let (left, right) = ((&known.shape, known.dtype), (&tensor.shape, tensor.dtype));
            ensure!(left == right, "{name:?} of {kind} is {right:?} here and {left:?} elsewhere");
            known.boxes.append(&mut tensor.boxes);
        }
    }
    Ok(())
}

/// Deletes checkpoints beyond `keep`: the oldest first, never the newest that verifies, never the one that `latest` names.
///
/// The one just saved verifies without being read: its sums were taken on the way to the disk. What is not sound is not counted
/// and not touched; it is reported.
fn retain(options: &Options, saved: u64, warnings: &mut Vec<String>) -> Result<()> {
    if options.keep == 0 {
        return Ok(());
    }
    let checkpoints = &options.checkpoints;
    let (sound, unsound) = newest_first(checkpoints)?;
    warnings.extend(unsound.iter().map(|skipped| format!("{} is left alone: {}", skipped.folder.display(), skipped.reason)));
    if sound.len() <= options.keep {
        return Ok(());
    }
    let fresh = |checkpoint: &Checkpoint| (checkpoint.index.incarnation, checkpoint.index.facts.step) == (options.incarnation, saved);
    let verified = sound.iter().find(|checkpoint| fresh(checkpoint) || checkpoint.verify().is_ok()).map(|checkpoint| checkpoint.folder());
    let latest = checkpoints.join(Name::Step(saved).text());
    for checkpoint in &sound[options.keep..] {
        if Some(checkpoint.folder()) == verified || checkpoint.folder() == latest {
            continue;
        }
        check_fence(checkpoints, options.incarnation)?;
        let name = checkpoint.folder().file_name().and_then(|name| name.to_str()).and_then(Name::parse);
        folder::discard(checkpoints, name.expect("the checkpoint was found by a name that parses"))?;
    }
    Ok(())
}
