//! Pipeline schedules as data: for each pipeline rank the list of what it does, in order.
//!
//! A *stage* is a piece of the model's chain of layers, counted from the tokens to the loss. A pipeline *rank* holds one or more
//! stages, its *chunks*; a [`Placement`] says which. Generators (`flat`, `looped`, `vee`) write the compute actions, passes
//! (`passes`) add transfers and gradient reductions, `plan/simulate.rs` proves the outcome and `parallel/pipeline.rs` obeys it.
//!
//! Invariant: nothing here knows a device or a clock, and the weight gradients of a chunk are added in order of micro-batches on
//! every schedule, so that no schedule changes a bit of them.

use std::fmt;

use anyhow::{Result, bail, ensure};

pub mod flat;
pub mod looped;
pub mod passes;
pub mod text;
pub mod vee;

/// Which way data moves through the chain of stages: activations to the loss, gradients back to the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pass {
    Forward,
    Backward,
}

/// Which of this rank's chunks, and which micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    pub chunk: usize,
    pub micro: usize,
}

/// One thing a rank does. A slot is always a slot of the rank whose list it stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// What the pass of this slot needs arrives from `Placement::source` and goes into the inbox.
    Receive(Pass, Slot),
    Forward(Slot),
    /// Gradients of input and weights together. `reduce`: this chunk's gradients are now to be added up over the data-parallel ranks.
    Backward {
        slot: Slot,
        reduce: bool,
    },
    /// The gradient of the input alone; what the weights' gradients need stays alive until `BackwardWeight`.
    BackwardInput(Slot),
    BackwardWeight {
        slot: Slot,
        reduce: bool,
    },
    /// What the pass of this slot gave leaves the outbox for `Placement::destination`. The list goes on without waiting for it.
    Send(Pass, Slot),
    /// Where the neighbouring stage is on this same rank, nothing travels: `(pass, from)` of the outbox becomes `(pass, to)` of the inbox.
    Hand {
        pass: Pass,
        from: Slot,
        to: Slot,
    },
}

/// How the stages run through the ranks, chunk after chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Every chunk runs from the first rank to the last, which hands over to the first again.
    Loop,
    /// Chunk 0 runs from the first rank to the last, chunk 1 from the last to the first, and so on: the turns stay on one rank.
    Vee,
}

/// Where each stage sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    pub ranks: usize,
    pub chunks: usize,
    pub route: Route,
}

impl Placement {
    pub fn stages(&self) -> usize {
        self.ranks * self.chunks
    }

    /// The stage that is chunk `chunk` of `rank`.
    pub fn stage(&self, rank: usize, chunk: usize) -> usize {
        assert!(rank < self.ranks && chunk < self.chunks, "chunk {chunk} of rank {rank} is not in {self:?}");
        chunk * self.ranks + self.turned(rank, chunk)
    }

    /// The rank that holds `stage`, and as which of its chunks.
    pub fn place(&self, stage: usize) -> (usize, usize) {
        assert!(stage < self.stages(), "stage {stage} is not in {self:?}");
        let chunk = stage / self.ranks;
        (self.turned(stage % self.ranks, chunk), chunk)
    }

    /// The rank and chunk whose output `pass` of this chunk reads; `None` where the pass begins.
    pub fn source(&self, pass: Pass, rank: usize, chunk: usize) -> Option<(usize, usize)> {
        let stage = self.stage(rank, chunk);
        match pass {
            Pass::Forward => stage.checked_sub(1).map(|before| self.place(before)),
            Pass::Backward => (stage + 1 < self.stages()).then(|| self.place(stage + 1)),
        }
    }

    /// The rank and chunk that reads the output of `pass` of this chunk; `None` where the pass ends.
    pub fn destination(&self, pass: Pass, rank: usize, chunk: usize) -> Option<(usize, usize)> {
        let opposite = match pass {
            Pass::Forward => Pass::Backward,
            Pass::Backward => Pass::Forward,
        };
        self.source(opposite, rank, chunk)
    }

    /// Position in a chunk's walk over the ranks <-> rank: its own inverse.
    fn turned(&self, index: usize, chunk: usize) -> usize {
        match self.route {
            Route::Vee if chunk % 2 == 1 => self.ranks - 1 - index,
            _ => index,
        }
    }
}

/// A list for each rank, and what its slots mean.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    pub placement: Placement,
    pub micros: usize,
    pub actions: Vec<Vec<Action>>,
}

impl Schedule {
    /// The schedule as a rank runs it: the compute actions with transfers and reductions put in.
    pub fn complete(&self, reductions: passes::Reductions) -> Schedule {
        let reduced = passes::with_reductions(self.actions.clone(), reductions);
        let actions = passes::with_transfers(&reduced, &self.placement);
        Schedule { actions, ..*self }
    }
}

/// The sequence of a training schedule without its backward passes: what was proved of the whole holds of this part.
pub fn forward_only(actions: &[Action]) -> Vec<Action> {
    let forward = |action: &&Action| {
        matches!(
            action,
            Action::Forward(_)
                | Action::Receive(Pass::Forward, _)
                | Action::Send(Pass::Forward, _)
                | Action::Hand { pass: Pass::Forward, .. }
        )
    };
    actions.iter().filter(forward).copied().collect()
}

/// What `parallel.pp_schedule` may be, besides the path of a file.
pub const NAMES: [&str; 7] = ["gpipe", "1f1b", "interleaved", "breadth_first", "zero_bubble", "zbv", "dualpipe_v"];

/// The schedule that users call `name`, compute actions only.
pub fn by_name(name: &str, ranks: usize, micros: usize, chunks: usize) -> Result<Schedule> {
    ensure!(ranks > 0 && micros > 0 && chunks > 0, "a schedule needs a rank, a micro-batch and a chunk: {ranks}, {micros}, {chunks}");
    type Generator = fn(usize, usize, usize) -> Vec<Vec<Action>>;
    let (generator, route, fits): (Generator, Route, &str) = match name {
        "gpipe" => (|p, m, _| flat::gpipe(p, m), Route::Loop, "1"),
        "1f1b" => (|p, m, _| flat::one_forward_one_backward(p, m), Route::Loop, "1"),
        "zero_bubble" => (|p, m, _| flat::zero_bubble(p, m), Route::Loop, "1"),
        "interleaved" => (looped::interleaved, Route::Loop, "2 or more"),
        "breadth_first" => (looped::breadth_first, Route::Loop, "2 or more"),
        "zbv" => (|p, m, _| vee::zbv(p, m), Route::Vee, "2"),
        "dualpipe_v" => (|p, m, _| vee::dualpipe_v(p, m), Route::Vee, "2"),
        _ => bail!("parallel.pp_schedule = {name:?} is neither a schedule ({}) nor a file", NAMES.join(", ")),
    };
    let good = match fits {
        "1" => chunks == 1,
        "2" => chunks == 2,
        _ => chunks >= 2,
    };
    ensure!(
        good,
        "parallel.pp_schedule = {name:?} runs {fits} chunks on each rank, but parallel.pp_chunks = {chunks}: \
         set pp_chunks to {fits}, or choose {}",
        if chunks == 1 { "gpipe, 1f1b or zero_bubble" } else { "interleaved or breadth_first" }
    );
    Ok(Schedule { placement: Placement { ranks, chunks, route }, micros, actions: generator(ranks, micros, chunks) })
}

/// Shorthands of the generators.
fn forward(chunk: usize, micro: usize) -> Action {
    Action::Forward(Slot { chunk, micro })
}

fn backward(chunk: usize, micro: usize) -> Action {
    Action::Backward { slot: Slot { chunk, micro }, reduce: false }
}

fn backward_input(chunk: usize, micro: usize) -> Action {
    Action::BackwardInput(Slot { chunk, micro })
}

fn backward_weight(chunk: usize, micro: usize) -> Action {
    Action::BackwardWeight { slot: Slot { chunk, micro }, reduce: false }
}

/// The list without the micro-batches from `micros` on.
///
/// Generators whose pattern needs a number of micro-batches write the pattern for more of them and drop the surplus. This is safe:
/// no micro-batch waits for another, so an order that fits all of them fits any selection.
fn only_micros(mut list: Vec<Action>, micros: usize) -> Vec<Action> {
    list.retain(|action| action.slot().micro < micros);
    list
}

impl Action {
    /// The slot the action is about; of a hand-over, the one that gives.
    pub fn slot(&self) -> Slot {
        match *self {
            Action::Receive(_, slot) | Action::Forward(slot) | Action::BackwardInput(slot) | Action::Send(_, slot) => slot,
            Action::Backward { slot, .. } | Action::BackwardWeight { slot, .. } => slot,
            Action::Hand { from, .. } => from,
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.chunk, self.micro)
    }
}

/// Compute actions read as in a schedule file: the letter, then chunk.micro.
impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |pass| if pass == Pass::Forward { 'F' } else { 'B' };
        match *self {
            Action::Receive(pass, slot) => write!(f, "receive {}{slot}", letter(pass)),
            Action::Forward(slot) => write!(f, "F{slot}"),
            Action::Backward { slot, .. } => write!(f, "B{slot}"),
            Action::BackwardInput(slot) => write!(f, "I{slot}"),
            Action::BackwardWeight { slot, .. } => write!(f, "W{slot}"),
            Action::Send(pass, slot) => write!(f, "send {}{slot}", letter(pass)),
            Action::Hand { pass, from, to } => write!(f, "hand {}{from} to {}{to}", letter(pass), letter(pass)),
        }
    }
}
