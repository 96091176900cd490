//! Saving: every rank writes its boxes on a thread of its own, and rank 0 commits when all of them have arrived.
//!
//! Invariant: a save that fails, at whatever point, leaves every earlier checkpoint as it was and never stops the run.

use crate::checkpoint::boxes::{self, Area};
use crate::checkpoint::commit::{self, Part, Saved};
use crate::checkpoint::folder::{self, Name};
use crate::checkpoint::index::{Facts, Kind, StoredBox, StoredSum, Tensor, Tensors};
use crate::checkpoint::safetensors::{self, Entry};
use crate::dtype::Dtype;
use crate::plan::layout::Piece;
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A part of a flat buffer: what one rank holds of one kind, and is the one to write.
pub struct Shard {
    pub kind: Kind,
    pub dtype: Dtype,
    /// `flat` counts elements of `bytes`. Padding has no piece.
    pub pieces: Vec<Piece>,
    pub bytes: Vec<u8>,
}

/// Where and as whom to write.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder of all checkpoints of the run; every rank sees the same one.
    pub checkpoints: PathBuf,
    pub rank: usize,
    pub world: usize,
    /// Grows with every start of the run; a start that is not the latest can no longer commit.
    pub incarnation: u64,
    /// Checkpoints to keep; 0 keeps all.
    pub keep: usize,
    /// How long to wait for other ranks, and for a save under way.
    pub deadline: Duration,
}

/// How a save ended.
#[derive(Debug)]
pub struct Outcome {
    pub step: u64,
    pub result: Result<Saved>,
}

/// The background thread of one rank, and the way to hand it work. At most one save is under way.
pub struct Writer {
    options: Options,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    saves: u64,
    /// Held by rank 0 as long as the run may write.
    _lock: Option<File>,
}

/// What the run and its writer thread have in common.
pub struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    job: Option<Job>,
    busy: bool,
    stop: bool,
    outcomes: VecDeque<Outcome>,
}

struct Job {
    number: u64,
    facts: Facts,
    shards: Vec<Shard>,
}

impl Writer {
    /// Every rank makes its writer before any rank saves: the one of rank 0 takes possession of the folder and clears away what
    /// earlier starts left unfinished. Two runs in one folder refuse each other here.
    pub fn new(options: Options) -> Result<Writer> {
        ensure!(options.rank < options.world, "rank {} of {} ranks", options.rank, options.world);
        let lock = if options.rank == 0 { commit::claim(&options.checkpoints, options.incarnation)? } else { None };
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let (of_thread, for_thread) = (options.clone(), shared.clone());
        let thread = thread::Builder::new().name(format!("checkpoint {}", options.rank));
        let thread = thread.spawn(move || serve(&of_thread, &for_thread)).context("starting the thread that writes checkpoints")?;
        Ok(Writer { options, shared, thread: Some(thread), saves: 0, _lock: lock })
    }

    /// Which start of the run writes.
    pub fn incarnation(&self) -> u64 {
        self.options.incarnation
    }

    /// Hands over what this rank has to write and returns; the writing goes on behind. If the last save is still under way, waits
    /// for it first, so that at most one copy of the state waits in memory.
    ///
    /// All ranks save the same steps in the same order. Errors are bad arguments, or a save that has hung past the deadline; how
    /// the writing went is told by `outcome`.
    pub fn save(&mut self, facts: Facts, shards: Vec<Shard>) -> Result<()> {
        for shard in &shards {
            for piece in &shard.pieces {
                let kind = shard.kind;
                boxes::area_of(piece, shard.bytes.len() / shard.dtype.bytes()).with_context(|| format!("the shard of {kind}"))?;
            }
        }
        self.saves += 1;
        let mut state = self.wait()?;
        state.job = Some(Job { number: self.saves, facts, shards });
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// How a save ended that nobody has asked about yet; does not wait.
    ///
    /// On rank 0 a success means that the checkpoint is there; on the others, that their part of it is.
    pub fn outcome(&mut self) -> Option<Outcome> {
        self.shared.lock().outcomes.pop_front()
    }

    /// Waits until nothing is under way. How it went stays to be asked for.
    pub fn settle(&mut self) -> Result<()> {
        self.wait().map(drop)
    }

    /// Waits until nothing is under way. Fails with the first failure that nobody has asked about; successes stay to be asked for.
    pub fn finish(&mut self) -> Result<()> {
        let mut state = self.wait()?;
        let failed = state.outcomes.iter().position(|outcome| outcome.result.is_err());
        let failed = failed.and_then(|at| state.outcomes.remove(at));
        failed.map_or(Ok(()), |outcome| outcome.result.map(drop).with_context(|| format!("saving step {}", outcome.step)))
    }

    /// The state, when no save is under way.
    fn wait(&self) -> Result<MutexGuard<'_, State>> {
        // Rank 0 waits for the others within a save, so a save may take the deadline and its own writing.
        let deadline = self.options.deadline * 2;
        let under_way = |state: &mut State| state.job.is_some() || state.busy;
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), deadline, under_way);
        let (state, result) = waited.expect("nothing panics while it holds this lock");
        if result.timed_out() {
            let folder = self.options.checkpoints.display();
            bail!("rank {}: a save to {folder} hangs: it has not ended within {} s", self.options.rank, deadline.as_secs());
        }
        Ok(state)
    }
}

impl Drop for Writer {
    /// Lets a save under way write what it has, but does not wait for other ranks: they may be the reason that this one ends.
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // The thread catches the panics of its jobs, and there is nobody left to tell of another.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds this lock")
    }

    /// Sleeps, unless the run is ending. Says whether it is.
    pub fn nap(&self, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), time, |state| !state.stop);
        waited.expect("nothing panics while it holds this lock").0.stop
    }
}

/// The life of the thread.
fn serve(options: &Options, shared: &Shared) {
    loop {
        let idle = |state: &mut State| state.job.is_none() && !state.stop;
        let mut state = shared.changed.wait_while(shared.lock(), idle).expect("nothing panics while it holds this lock");
        let Some(job) = state.job.take() else { return };
        state.busy = true;
        drop(state);
        let step = job.facts.step;
        let result = catch_unwind(AssertUnwindSafe(|| perform(options, shared, job)));
        let result = result.unwrap_or_else(|panic| Err(anyhow!("the writer of checkpoints panicked: {}", panic_text(&*panic))));
        let mut state = shared.lock();
        state.busy = false;
        state.outcomes.push_back(Outcome { step, result });
        drop(state);
        shared.changed.notify_all();
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

/// One save, start to end.
fn perform(options: &Options, shared: &Shared, job: Job) -> Result<Saved> {
    let Job { number, facts, shards } = job;
    let name = Name::Attempt { step: facts.step, incarnation: options.incarnation, number };
    let attempt = options.checkpoints.join(name.text());
    let mut warnings = Vec::new();
    if options.rank == 0 {
        warnings.extend(commit::clean(&options.checkpoints, options.incarnation, number));
    }
    let written = Files::plan(options, &shards).and_then(|files| {
        commit::check_fence(&options.checkpoints, options.incarnation)?;
        folder::check_space(&options.checkpoints, files.bytes())?;
        folder::create(&attempt)?;
        files.write(&attempt).inspect_err(|_| files.remove(&attempt))
    });
    drop(shards);
    let part = match &written {
        Ok((files, tensors)) => Part::Done { facts: facts.clone(), files: files.clone(), tensors: tensors.clone() },
        Err(error) => Part::Failed { reason: format!("{error:#}") },
    };
    // The folder may be what could not be made: it is tried again, so that rank 0 need not wait for what does not come.
    let announced = folder::create(&attempt).and_then(|()| part.write(&attempt, options.rank));
    let written = written.and_then(|(files, _)| announced.map(|()| files));
    if options.rank != 0 {
        let bytes = written?.values().map(|sum| sum.bytes).sum();
        return Ok(Saved { folder: options.checkpoints.join(Name::Step(facts.step).text()), bytes, warnings });
    }
    let saved = written.and_then(|_| commit::commit(options, shared, &attempt, facts));
    if saved.is_err() {
        // The room is wanted back now; should that not work, the next save tries again and reports.
        let _ = folder::remove_tree(&attempt);
    }
    let mut saved = saved?;
    saved.warnings.splice(0..0, warnings);
    Ok(saved)
}

/// The files that one rank writes: for each, its boxes in the order in which they lie.
struct Files<'a>(BTreeMap<Kind, RankFile<'a>>);

struct RankFile<'a> {
    name: String,
    items: Vec<(Entry, &'a Piece, &'a Shard)>,
}

impl<'a> Files<'a> {
    fn plan(options: &Options, shards: &'a [Shard]) -> Result<Files<'a>> {
        let mut files: BTreeMap<Kind, RankFile<'a>> = BTreeMap::new();
        for shard in shards {
            for piece in &shard.pieces {
                let entry = Entry { key: key(piece)?, dtype: shard.dtype, shape: piece.size.clone() };
                let name = || format!("{}-{:05}-of-{:05}.safetensors", shard.kind, options.rank, options.world);
                let file = files.entry(shard.kind).or_insert_with(|| RankFile { name: name(), items: Vec::new() });
                file.items.push((entry, piece, shard));
            }
        }
        for file in files.values_mut() {
            file.items.sort_by(|(left, ..), (right, ..)| left.rank().cmp(&right.rank()));
        }
        Ok(Files(files))
    }

    /// What will be written, without headers and index.
    fn bytes(&self) -> u64 {
        self.0.values().flat_map(|file| &file.items).map(|(entry, ..)| entry.bytes() as u64).sum()
    }

    fn write(&self, attempt: &Path) -> Result<(BTreeMap<String, StoredSum>, Tensors)> {
        let (mut files, mut tensors) = (BTreeMap::new(), Tensors::new());
        for (kind, file) in &self.0 {
            let entries: Vec<Entry> = file.items.iter().map(|(entry, ..)| entry.clone()).collect();
            let mut writer = safetensors::Writer::create(&attempt.join(&file.name), &entries)?;
            let tensors = tensors.entry(*kind).or_default();
            for (entry, piece, shard) in &file.items {
                boxes::stream(piece, shard.dtype, &shard.bytes, |bytes| writer.write(bytes))?;
                let fresh = || Tensor { dtype: shard.dtype, shape: piece.shape.clone(), boxes: Vec::new() };
                let stored =
                    StoredBox { start: piece.start.clone(), size: piece.size.clone(), file: file.name.clone(), key: entry.key.clone() };
                tensors.entry(piece.name.clone()).or_insert_with(fresh).boxes.push(stored);
            }
            files.insert(file.name.clone(), writer.finish()?.into());
        }
        Ok((files, tensors))
    }

    /// Gives the room back after a failure, as far as that goes; the failure itself is what gets reported.
    fn remove(&self, attempt: &Path) {
        for file in self.0.values() {
            let _ = fs::remove_file(attempt.join(&file.name));
        }
    }
}

/// The name of a box inside its file: the tensor's own where it is all of it, else with the ranges of its dims.
fn key(piece: &Piece) -> Result<String> {
    if Area::of(&piece.shape, &piece.start, &piece.size)? == Area::whole(&piece.shape)? {
        return Ok(piece.name.clone());
    }
    let ranges: Vec<String> = piece.start.iter().zip(&piece.size).map(|(start, size)| format!("{start}:{}", start + size)).collect();
    Ok(format!("{}[{}]", piece.name, ranges.join(",")))
}
