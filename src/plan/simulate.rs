//! Runs all ranks' lists of a complete schedule against links and clocks, and proves that they fit together.
//!
//! The model. A rank runs its list in order. Between each two ranks lie four links, one for each direction and pass; a link keeps
//! the order of its messages and carries one at a time, `Costs::transfer` seconds each. A `Receive` waits for its message. A `Send` hands
//! its message to the link and goes on; on `Links::Holding(n)` it first waits until fewer than n messages are in the link that the receiver
//! has not taken. (A sender that waits until its receiver *takes the message* is not the model: two neighbours that exchange
//! an activation and a gradient would each wait for the other. Links are one-way and separate so that this cannot happen.)
//!
//! What a [`Proof`] means. On every rank each slot ran forward once and backward once, whole or as input and then weight gradient, in
//! that order and each with its input at hand; the weight gradients of each chunk ran in order of micro-batches and were reduced
//! after the last one, and on all chunks after every so many; every message was the one its receiver expected; no rank waited forever; nothing was left over.
//! Whether a schedule passes does not depend on the costs: a rank never chooses what to do next, and each link has one sender
//! and one receiver, so another timing changes when things happen, never which. Running on `Holding(1)` implies running on any more.
//!
//! Invariant: the outcome is a function of the arguments; a schedule that breaks a rule gives an error that names rank, place and action.

use anyhow::{Result, bail, ensure};

use super::schedule::{Action, Pass, Placement, Schedule, Slot};

/// Seconds, for each stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    pub forward: Vec<f64>,
    /// A whole backward pass takes the seconds of both its halves.
    pub backward_input: Vec<f64>,
    pub backward_weight: Vec<f64>,
    /// Of one message, from any rank to any other.
    pub transfer: f64,
}

impl Costs {
    /// All stages alike, transfers free.
    pub fn equal(stages: usize, forward: f64, backward_input: f64, backward_weight: f64) -> Costs {
        let all = |seconds| vec![seconds; stages];
        Costs { forward: all(forward), backward_input: all(backward_input), backward_weight: all(backward_weight), transfer: 0.0 }
    }

    fn seconds(&self, action: &Action, stage: usize) -> f64 {
        match action {
            Action::Forward(_) => self.forward[stage],
            Action::Backward { .. } => self.backward_input[stage] + self.backward_weight[stage],
            Action::BackwardInput(_) => self.backward_input[stage],
            Action::BackwardWeight { .. } => self.backward_weight[stage],
            Action::Receive(..) | Action::Send(..) | Action::Hand { .. } => 0.0,
        }
    }
}

/// How many messages a link takes before its sender waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    Unbounded,
    Holding(usize),
}

/// A compute action and when it ran.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    pub start: f64,
    pub end: f64,
    pub action: Action,
}

/// That a schedule runs, and what it costs. Vectors are indexed by pipeline rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Proof {
    pub seconds_total: f64,
    /// Of all ranks' seconds, those without work.
    pub bubble_fraction: f64,
    pub bubble_by_rank: Vec<f64>,
    /// The most slots whose activations were alive at once: from `Forward` to the end of `Backward` or `BackwardWeight`.
    pub live_peak: Vec<usize>,
    /// The most slots at once between `BackwardInput` and `BackwardWeight`: they also hold the gradients of their outputs.
    pub stash_peak: Vec<usize>,
    /// The most messages that any one link held: sent and not yet taken.
    pub link_peak: usize,
    pub timeline: Vec<Vec<Span>>,
}

/// Proves a complete schedule (see [`Schedule::complete`]), or says what is wrong with it.
pub fn simulate(schedule: &Schedule, costs: &Costs, links: Links) -> Result<Proof> {
    let Placement { ranks, chunks, .. } = schedule.placement;
    let stages = schedule.placement.stages();
    ensure!(stages > 0 && schedule.micros > 0, "a schedule needs a rank, a chunk and a micro-batch");
    ensure!(schedule.actions.len() == ranks, "the schedule has {} lists for {ranks} ranks", schedule.actions.len());
    for (name, seconds) in
        [("forward", &costs.forward), ("backward_input", &costs.backward_input), ("backward_weight", &costs.backward_weight)]
    {
        ensure!(seconds.len() == stages, "{name} costs are given for {} stages of {stages}", seconds.len());
        ensure!(seconds.iter().all(|s| s.is_finite() && *s >= 0.0), "{name} costs must be finite and not negative: {seconds:?}");
    }
    ensure!(costs.transfer.is_finite() && costs.transfer >= 0.0, "the transfer cost must be finite and not negative: {}", costs.transfer);
    let capacity = match links {
        Links::Unbounded => usize::MAX,
        Links::Holding(messages) => messages,
    };
    ensure!(capacity > 0, "a link must hold at least one message");

    let rank = |list: &Vec<Action>| Rank {
        slots: vec![0; chunks * schedule.micros],
        weights_done: vec![0; chunks],
        timeline: Vec::with_capacity(list.len()),
        ..Rank::default()
    };
    let links = vec![Link::default(); 2 * ranks * ranks];
    let reduces_every = reduction_period(schedule);
    let mut run = Run { schedule, costs, capacity, ranks: schedule.actions.iter().map(rank).collect(), links, reduces_every };
    while run.sweep()? {}
    run.nothing_left()?;
    Ok(run.proof())
}

/// After how many micro-batches weight gradients are reduced, by the first of them that is.
fn reduction_period(schedule: &Schedule) -> usize {
    let reduced = |action: &Action| match *action {
        Action::Backward { slot, reduce: true } | Action::BackwardWeight { slot, reduce: true } => Some(slot.micro + 1),
        _ => None,
    };
    schedule.actions.iter().flatten().filter_map(reduced).min().unwrap_or(schedule.micros)
}

/// What has happened to a slot, as bits of a byte.
const FORWARD: u8 = 1;
const INPUT: u8 = 2;
const WEIGHT: u8 = 4;
const INBOX: [u8; 2] = [8, 16];
const OUTBOX: [u8; 2] = [32, 64];

#[derive(Default)]
struct Rank {
    next: usize,
    clock: f64,
    busy: f64,
    slots: Vec<u8>,
    /// For each chunk: micro-batches whose weight gradients are done.
    weights_done: Vec<usize>,
    live: usize,
    live_peak: usize,
    stash: usize,
    stash_peak: usize,
    timeline: Vec<Span>,
}

#[derive(Clone, Default)]
struct Link {
    messages: Vec<Message>,
    /// When each message was taken; as long as the number taken.
    taken: Vec<f64>,
}

#[derive(Clone, Copy)]
struct Message {
    /// The receiver's slot.
    slot: Slot,
    sent: f64,
    arrives: f64,
}

struct Run<'a> {
    schedule: &'a Schedule,
    costs: &'a Costs,
    capacity: usize,
    ranks: Vec<Rank>,
    links: Vec<Link>,
    /// Weight gradients are reduced after every so many micro-batches; none but the last: after all of them.
    reduces_every: usize,
}

impl Run<'_> {
    /// Runs every rank until it must wait; false when no rank moved.
    fn sweep(&mut self) -> Result<bool> {
        let mut moved = false;
        for rank in 0..self.ranks.len() {
            while let Some(action) = self.schedule.actions[rank].get(self.ranks[rank].next) {
                match self.step(rank, *action) {
                    Ok(true) => self.ranks[rank].next += 1,
                    Ok(false) => break,
                    Err(why) => bail!("rank {rank}, action {} ({action}): {why}", self.ranks[rank].next),
                }
                moved = true;
            }
        }
        Ok(moved)
    }

    /// Does one action; false when it has to wait.
    fn step(&mut self, rank: usize, action: Action) -> Result<bool> {
        let (slot, chunks, micros) = (action.slot(), self.schedule.placement.chunks, self.schedule.micros);
        ensure!(slot.chunk < chunks && slot.micro < micros, "the schedule has {chunks} chunks and {micros} micro-batches");
        match action {
            Action::Receive(pass, slot) => return self.receive(rank, pass, slot),
            Action::Send(pass, slot) => return self.send(rank, pass, slot),
            Action::Hand { pass, from, to } => self.hand(rank, pass, from, to)?,
            Action::Forward(slot) => self.forward(rank, slot)?,
            Action::Backward { slot, reduce } => {
                self.backward_input(rank, slot)?;
                self.backward_weight(rank, slot, reduce)?;
            }
            Action::BackwardInput(slot) => {
                self.backward_input(rank, slot)?;
                let rank = &mut self.ranks[rank];
                rank.stash += 1;
                rank.stash_peak = rank.stash_peak.max(rank.stash);
            }
            Action::BackwardWeight { slot, reduce } => {
                self.backward_weight(rank, slot, reduce)?;
                self.ranks[rank].stash -= 1;
            }
        }
        if !matches!(action, Action::Hand { .. }) {
            self.spend(rank, action);
        }
        Ok(true)
    }

    fn spend(&mut self, rank: usize, action: Action) {
        let seconds = self.costs.seconds(&action, self.schedule.placement.stage(rank, action.slot().chunk));
        let rank = &mut self.ranks[rank];
        let start = rank.clock;
        rank.clock += seconds;
        rank.busy += seconds;
        rank.timeline.push(Span { start, end: rank.clock, action });
    }

    fn forward(&mut self, rank: usize, slot: Slot) -> Result<()> {
        ensure!(!self.has(rank, slot, FORWARD), "this slot has run forward before");
        self.move_input(Pass::Forward, rank, slot)?;
        self.set(rank, slot, FORWARD);
        let rank = &mut self.ranks[rank];
        rank.live += 1;
        rank.live_peak = rank.live_peak.max(rank.live);
        Ok(())
    }

    fn backward_input(&mut self, rank: usize, slot: Slot) -> Result<()> {
        ensure!(self.has(rank, slot, FORWARD), "this slot has not run forward");
        ensure!(!self.has(rank, slot, INPUT), "this slot has run backward before");
        self.move_input(Pass::Backward, rank, slot)?;
        self.set(rank, slot, INPUT);
        Ok(())
    }

    fn backward_weight(&mut self, rank: usize, slot: Slot, reduce: bool) -> Result<()> {
        ensure!(self.has(rank, slot, INPUT), "the gradient of this slot's input has not been computed");
        ensure!(!self.has(rank, slot, WEIGHT), "the weight gradients of this slot have been added before");
        let done = self.ranks[rank].weights_done[slot.chunk];
        ensure!(slot.micro == done, "weight gradients are added in order of micro-batches, and next is micro-batch {done} of this chunk");
        if slot.micro + 1 == self.schedule.micros {
            ensure!(reduce, "this is the chunk's last weight gradient, and it is not reduced");
        } else {
            let every = self.reduces_every;
            let due = (slot.micro + 1).is_multiple_of(every);
            ensure!(reduce == due, "weight gradients are reduced after every {every} micro-batches and the last, on all chunks alike");
        }
        self.set(rank, slot, WEIGHT);
        let rank = &mut self.ranks[rank];
        rank.weights_done[slot.chunk] += 1;
        rank.live -= 1;
        Ok(())
    }

    /// Takes the input of a pass from the inbox and puts its output into the outbox, where there are such.
    fn move_input(&mut self, pass: Pass, rank: usize, slot: Slot) -> Result<()> {
        let placement = &self.schedule.placement;
        let (reads, writes) = (placement.source(pass, rank, slot.chunk), placement.destination(pass, rank, slot.chunk));
        if reads.is_some() {
            ensure!(self.has(rank, slot, INBOX[pass as usize]), "its input is not there");
            self.clear(rank, slot, INBOX[pass as usize]);
        }
        if writes.is_some() {
            self.set(rank, slot, OUTBOX[pass as usize]);
        }
        Ok(())
    }

    fn send(&mut self, rank: usize, pass: Pass, slot: Slot) -> Result<bool> {
        let Some((to, chunk)) = self.schedule.placement.destination(pass, rank, slot.chunk) else { bail!("the pass ends here") };
        ensure!(to != rank, "the next stage is on this rank: this is a hand-over");
        ensure!(self.has(rank, slot, OUTBOX[pass as usize]), "there is nothing to send");
        let link = self.link(rank, to, pass);
        let sent = match self.links[link].messages.len().checked_sub(self.capacity) {
            None => self.ranks[rank].clock,
            Some(makes_room) => match self.links[link].taken.get(makes_room) {
                None => return Ok(false),
                Some(&taken) => self.ranks[rank].clock.max(taken),
            },
        };
        self.clear(rank, slot, OUTBOX[pass as usize]);
        self.ranks[rank].clock = sent;
        let messages = &mut self.links[link].messages;
        let starts = messages.last().map_or(sent, |before| sent.max(before.arrives));
        messages.push(Message { slot: Slot { chunk, ..slot }, sent, arrives: starts + self.costs.transfer });
        Ok(true)
    }

    fn receive(&mut self, rank: usize, pass: Pass, slot: Slot) -> Result<bool> {
        let Some((from, _)) = self.schedule.placement.source(pass, rank, slot.chunk) else { bail!("the pass begins here") };
        ensure!(from != rank, "the stage before is on this rank: this is a hand-over");
        let link = self.link(from, rank, pass);
        let Some(&message) = self.links[link].messages.get(self.links[link].taken.len()) else { return Ok(false) };
        ensure!(message.slot == slot, "the next message from rank {from} is for slot {}", message.slot);
        self.fill_inbox(rank, pass, slot)?;
        self.ranks[rank].clock = self.ranks[rank].clock.max(message.arrives);
        self.links[link].taken.push(self.ranks[rank].clock);
        Ok(true)
    }

    fn hand(&mut self, rank: usize, pass: Pass, from: Slot, to: Slot) -> Result<()> {
        let next = self.schedule.placement.destination(pass, rank, from.chunk);
        ensure!(next == Some((rank, to.chunk)) && from.micro == to.micro, "the pass does not go on in that slot");
        ensure!(self.has(rank, from, OUTBOX[pass as usize]), "there is nothing to hand over");
        self.clear(rank, from, OUTBOX[pass as usize]);
        self.fill_inbox(rank, pass, to)
    }

    fn fill_inbox(&mut self, rank: usize, pass: Pass, slot: Slot) -> Result<()> {
        ensure!(!self.has(rank, slot, INBOX[pass as usize]), "this input has come before");
        self.set(rank, slot, INBOX[pass as usize]);
        Ok(())
    }

    /// No rank can move: all must be done, and nothing left over.
    fn nothing_left(&self) -> Result<()> {
        let waits = |(rank, state): (usize, &Rank)| {
            let action = self.schedule.actions[rank].get(state.next)?;
            Some(format!("rank {rank} at action {} ({action})", state.next))
        };
        let waiting: Vec<String> = self.ranks.iter().enumerate().filter_map(waits).collect();
        ensure!(waiting.is_empty(), "deadlock: {} can never go on", waiting.join(", "));
        for (rank, state) in self.ranks.iter().enumerate() {
            for (index, &bits) in state.slots.iter().enumerate() {
                let slot = Slot { chunk: index / self.schedule.micros, micro: index % self.schedule.micros };
                for (bit, what) in [(FORWARD, "forward pass"), (INPUT, "gradient of its input"), (WEIGHT, "gradient of its weights")] {
                    ensure!(bits & bit != 0, "rank {rank} ends without slot {slot}'s {what}");
                }
                ensure!(bits == FORWARD | INPUT | WEIGHT, "rank {rank} ends with a message of slot {slot} not sent or not used");
            }
        }
        let left = self.links.iter().position(|link| link.taken.len() < link.messages.len());
        if let Some(link) = left {
            let (from, to) = (link / 2 / self.ranks.len(), link / 2 % self.ranks.len());
            bail!("a message from rank {from} is never received by rank {to}");
        }
        Ok(())
    }

    fn proof(self) -> Proof {
        let seconds_total = self.ranks.iter().map(|rank| rank.clock).fold(0.0, f64::max);
        let idle = |busy: f64| if seconds_total > 0.0 { (1.0 - busy / seconds_total).max(0.0) } else { 0.0 };
        let busy: f64 = self.ranks.iter().map(|rank| rank.busy).sum();
        Proof {
            seconds_total,
            bubble_fraction: idle(busy / self.ranks.len() as f64),
            bubble_by_rank: self.ranks.iter().map(|rank| idle(rank.busy)).collect(),
            live_peak: self.ranks.iter().map(|rank| rank.live_peak).collect(),
            stash_peak: self.ranks.iter().map(|rank| rank.stash_peak).collect(),
            link_peak: self.links.iter().map(Link::peak).max().unwrap_or(0),
            timeline: self.ranks.into_iter().map(|rank| rank.timeline).collect(),
        }
    }

    fn link(&self, from: usize, to: usize, pass: Pass) -> usize {
        (from * self.ranks.len() + to) * 2 + pass as usize
    }

    fn has(&self, rank: usize, slot: Slot, bit: u8) -> bool {
        self.ranks[rank].slots[slot.chunk * self.schedule.micros + slot.micro] & bit != 0
    }

    fn set(&mut self, rank: usize, slot: Slot, bit: u8) {
        self.ranks[rank].slots[slot.chunk * self.schedule.micros + slot.micro] |= bit;
    }

    fn clear(&mut self, rank: usize, slot: Slot, bit: u8) {
        self.ranks[rank].slots[slot.chunk * self.schedule.micros + slot.micro] &= !bit;
    }
}

impl Link {
    /// The most messages sent and not taken, at any time. Both lists are in order of time.
    fn peak(&self) -> usize {
        let mut taken = 0;
        let mut peak = 0;
        for (sent, message) in self.messages.iter().enumerate() {
            while taken <= sent && self.taken[taken] <= message.sent {
                taken += 1;
            }
            peak = peak.max(sent + 1 - taken);
        }
        peak
    }
}
