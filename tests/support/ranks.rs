//! Whole training runs of tiny models with every rank a thread of the test, on tokens that are a function of (step, row).
//!
//! Invariant: what a run leaves is taken from global tensors, so runs of different layouts can be compared bit by bit.

#[path = "gpu.rs"]
mod gpu;
#[path = "tokens.rs"]
pub mod tokens;

use ferrotron::checkpoint::load::{Checkpoint, newest_verified};
use ferrotron::checkpoint::save::{Options, Shard, Writer};
use ferrotron::comm::connect::Transport;
use ferrotron::comm::groups::Groups;
use ferrotron::comm::threads::Threads;
use ferrotron::config::{Config, DeviceKind, Matmul};
use ferrotron::device::Device;
use ferrotron::plan::Plan;
use ferrotron::train::resume;
use ferrotron::train::step::Trainer;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// Longer than any step or save of these models on a busy machine.
const WAIT: Duration = Duration::from_secs(120);

/// What a run of some steps leaves.
#[derive(Clone, PartialEq, Debug)]
pub struct Trace {
    /// Bits of loss and norm of every step.
    pub steps: Vec<(u64, u64)>,
    /// Bytes of every global tensor, by kind and public name.
    pub tensors: BTreeMap<String, Vec<u8>>,
}

impl Trace {
    /// Where two traces part first, in words.
    pub fn difference(&self, other: &Trace) -> Option<String> {
        for (step, (a, b)) in self.steps.iter().zip(&other.steps).enumerate() {
            let number = f64::from_bits;
            if a.0 != b.0 {
                return Some(format!("loss of step {}: {:e} and {:e}", step + 1, number(a.0), number(b.0)));
            }
            if a.1 != b.1 {
                return Some(format!("norm of step {}: {:e} and {:e}", step + 1, number(a.1), number(b.1)));
            }
        }
        let names: Vec<&String> = self.tensors.keys().chain(other.tensors.keys()).collect();
        let differs = |name: &&&String| self.tensors.get(**name) != other.tensors.get(**name);
        names.iter().find(differs).map(|name| format!("tensor {name}"))
    }
}

/// Bits of loss and norm of every step, and what the rank holds in the end.
type Left = (Vec<(u64, u64)>, Vec<Shard>);

/// Where a run begins, which steps it does, and where it leaves a checkpoint. Folders are those of a run's checkpoints.
pub struct Leg<'a> {
    pub from: Option<&'a Path>,
    pub steps: Range<u64>,
    pub save_to: Option<&'a Path>,
}

/// Trains `steps` steps of `config` on `world` ranks.
pub fn train(config: &Config, world: usize, steps: u64) -> Trace {
    run(config, world, &Leg { from: None, steps: 0..steps, save_to: None })
}

/// A part of a run, on `world` ranks.
pub fn run(config: &Config, world: usize, leg: &Leg<'_>) -> Trace {
    let open = |folder: &Path| newest_verified(folder).expect("sound checkpoints").expect("a checkpoint").0;
    let checkpoint = leg.from.map(open);
    let geometry = checkpoint.as_ref().map(|checkpoint| resume::geometry(checkpoint).expect("a geometry"));
    let plan = Plan::new(config, world, geometry).unwrap_or_else(|problems| panic!("{problems:#?}"));
    let threads = Transport::Threads(Threads::new(world, WAIT));
    let mut outcomes: Vec<Left> = thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (plan, threads, checkpoint) = (plan.clone(), threads.clone(), checkpoint.as_ref());
                scope.spawn(move || one_rank(config, plan, &threads, rank, leg, checkpoint))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    });
    let steps = outcomes[0].0.clone();
    assert!(outcomes.iter().all(|(seen, _)| *seen == steps), "every rank reports the same losses and norms");
    let mut tensors = BTreeMap::new();
    for shard in outcomes.drain(..).flat_map(|(_, shards)| shards) {
        place(&shard, &mut tensors);
    }
    Trace { steps, tensors }
}

fn one_rank(config: &Config, plan: Plan, transport: &Transport, rank: usize, leg: &Leg<'_>, checkpoint: Option<&Checkpoint>) -> Left {
    let device = match config.device.kind {
        DeviceKind::Emulated => Device::emulated(None, false, 1),
        DeviceKind::Cuda => gpu::open(rank, plan.mesh.world()),
        _ => Device::cpu(1),
    };
    let device = if config.device.matmul == Matmul::Own { device.with_own_products() } else { device };
    let groups = Groups::connect(transport, &plan.mesh, rank).expect("groups of threads");
    let vocabulary = config.model.vocab_size;
    let mut trainer = Trainer::new(config, plan, rank, &device, groups).expect("a trainer");
    match checkpoint {
        None => resume::start(&mut trainer, config).expect("initial weights"),
        Some(checkpoint) => {
            let done = resume::load(&mut trainer, checkpoint).expect("a sound checkpoint");
            assert_eq!(done, leg.steps.start, "the run goes on where it was saved");
        }
    }
    let mut seen = Vec::new();
    for step in leg.steps.clone() {
        let batch = tokens::batch(step, &trainer.rank.rows, trainer.plan.t, vocabulary);
        let outcome = trainer.step(step, &batch, false).expect("a step");
        assert!(outcome.applied && outcome.loss.is_finite(), "step {step}: {outcome:?}");
        seen.push((outcome.loss.to_bits(), outcome.norm.to_bits()));
    }
    if let Some(folder) = leg.save_to {
        save(&mut trainer, config, folder, leg.steps.end);
    }
    (seen, trainer.stage.zero.shards().expect("gathers that end"))
}

/// Every rank writes its part, as a run does.
fn save(trainer: &mut Trainer, config: &Config, folder: &Path, step: u64) {
    let (rank, world) = (trainer.index(), trainer.plan.mesh.world());
    let options = Options { checkpoints: folder.to_owned(), rank, world, incarnation: 1, keep: 0, deadline: WAIT };
    let make = || Writer::new(options.clone()).expect("a writer");
    // Rank 0 takes possession of the folder before anybody writes to it.
    let first = (rank == 0).then(make);
    trainer.world().barrier().expect("all ranks come here");
    let mut writer = first.unwrap_or_else(make);
    let facts = resume::facts(trainer, config, step).expect("plain facts");
    writer.save(facts, trainer.stage.zero.shards().expect("gathers that end")).expect("sound shards");
    writer.finish().expect("nothing is in the way of a save");
}

/// Copies the boxes of a shard into the whole tensors.
fn place(shard: &Shard, tensors: &mut BTreeMap<String, Vec<u8>>) {
    let size = shard.dtype.bytes();
    for piece in &shard.pieces {
        let whole = tensors
            .entry(format!("{} {}", shard.kind, piece.name))
            .or_insert_with(|| vec![0xa5; piece.shape.iter().product::<usize>() * size]);
        let columns = *piece.shape.last().expect("a tensor has dims");
        let (rows, width) = if piece.size.len() == 1 { (1, piece.size[0]) } else { (piece.size[0], piece.size[1]) };
        let (row0, column0) = if piece.size.len() == 1 { (0, piece.start[0]) } else { (piece.start[0], piece.start[1]) };
        for i in 0..rows {
            for j in 0..width {
                let from = piece.flat.start + if piece.transposed { j * rows + i } else { i * width + j };
                let to = (row0 + i) * columns + column0 + j;
                whole[to * size..(to + 1) * size].copy_from_slice(&shard.bytes[from * size..(from + 1) * size]);
            }
        }
    }
}
