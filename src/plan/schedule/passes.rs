//! The passes that complete a schedule: gradient reductions, and the transfers between ranks.
//!
//! Invariant: a pass adds to the lists and never reorders or removes a compute action.

use std::collections::{HashSet, VecDeque};

use super::{Action, Pass, Placement, Slot};

/// When a chunk's gradients are added up over the data-parallel ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reductions {
    /// After every so many micro-batches, and after the last: the order `rows`, whose sums are over one micro-batch of each lane.
    Every(usize),
    /// After the last one: the order `lanes`.
    Last,
}

/// Sets `reduce` on the weight gradients after which a chunk is reduced.
pub fn with_reductions(mut actions: Vec<Vec<Action>>, reductions: Reductions) -> Vec<Vec<Action>> {
    let due = |micro: usize| match reductions {
        Reductions::Every(micros) => (micro + 1).is_multiple_of(micros),
        Reductions::Last => false,
    };
    for list in &mut actions {
        let mut complete = HashSet::new();
        for action in list.iter_mut().rev() {
            if let Action::Backward { slot, reduce } | Action::BackwardWeight { slot, reduce } = action {
                *reduce = complete.insert(slot.chunk) || due(slot.micro);
            }
        }
    }
    actions
}

/// Adds what moves between stages: `Send` directly after what it sends was computed, `Receive` directly before it is needed, `Hand`
/// instead of both where the two stages share a rank. The first and the last stage have nothing to exchange with the outside.
///
/// A `Receive` moves up from there in two cases only. Where a link's next message is needed later than another one behind it, it is
/// received first, since links keep their order. And where a link that holds one message would stop all ranks for good
/// because receivers are not yet at the message (breadth first with more micro-batches than ranks), the receiver takes it where it stands.
/// So if the compute actions alone can run at all, the completed lists run on links that hold a single message:
/// every standstill has a rank that waits for an emptier link, and the receiver of that link, standing too, empties it.
pub fn with_transfers(actions: &[Vec<Action>], placement: &Placement) -> Vec<Vec<Action>> {
    let mut run = Run::new(actions, placement);
    loop {
        let mut moved = false;
        for rank in 0..run.ranks.len() {
            moved |= run.advance(rank);
        }
        if !moved && !run.take_one() {
            return run.finish();
        }
    }
}

/// The lists being run without costs on links of one message, to see where they would stop.
struct Run<'a> {
    placement: &'a Placement,
    ranks: Vec<Rank>,
    /// At `link(from, to, pass)`: the receiver's slot that the message in it is for.
    links: Vec<Option<Slot>>,
}

struct Rank {
    /// With transfers in the default places.
    todo: VecDeque<Action>,
    done: Vec<Action>,
    /// What was received earlier than its place.
    early: HashSet<(Pass, Slot)>,
}

impl Run<'_> {
    fn new<'a>(actions: &[Vec<Action>], placement: &'a Placement) -> Run<'a> {
        let todo = |(rank, list): (usize, &Vec<Action>)| list.iter().flat_map(|&action| surrounded(action, rank, placement)).collect();
        let rank = |todo| Rank { todo, done: Vec::new(), early: HashSet::new() };
        let links = vec![None; 2 * placement.ranks * placement.ranks];
        Run { placement, ranks: actions.iter().enumerate().map(todo).map(rank).collect(), links }
    }

    fn link(&self, from: usize, to: usize, pass: Pass) -> usize {
        (from * self.placement.ranks + to) * 2 + pass as usize
    }

    /// Runs a rank until it must wait. Whether it moved at all.
    fn advance(&mut self, rank: usize) -> bool {
        let before = self.ranks[rank].done.len();
        while let Some(&action) = self.ranks[rank].todo.front() {
            match action {
                Action::Receive(pass, slot) => {
                    if self.ranks[rank].early.is_empty() || !self.ranks[rank].early.remove(&(pass, slot)) {
                        let Some((from, _)) = self.placement.source(pass, rank, slot.chunk) else { break };
                        let link = self.link(from, rank, pass);
                        let Some(offered) = self.links[link].take() else { break };
                        self.ranks[rank].done.push(Action::Receive(pass, offered));
                        if offered != slot {
                            self.ranks[rank].early.insert((pass, offered));
                            continue;
                        }
                    }
                    self.ranks[rank].todo.pop_front();
                    continue;
                }
                Action::Send(pass, slot) => {
                    let Some((to, chunk)) = self.placement.destination(pass, rank, slot.chunk) else { break };
                    let link = self.link(rank, to, pass);
                    if self.links[link].is_some() {
                        break;
                    }
                    self.links[link] = Some(Slot { chunk, ..slot });
                }
                _ => {}
            }
            self.ranks[rank].done.push(action);
            self.ranks[rank].todo.pop_front();
        }
        self.ranks[rank].done.len() > before
    }

    /// All ranks stand: takes one message that a sender waits to see gone, of several the one that its receiver needs last: that one
    /// is what the others wait behind. False where there is none.
    fn take_one(&mut self) -> bool {
        let blocking = |rank: usize| {
            let &Action::Send(pass, slot) = self.ranks[rank].todo.front()? else { return None };
            let (to, _) = self.placement.destination(pass, rank, slot.chunk)?;
            let link = self.link(rank, to, pass);
            let offered = self.links[link]?;
            let needed = self.ranks[to].todo.iter().position(|&action| action == Action::Receive(pass, offered));
            Some((needed, to, link, pass, offered))
        };
        let Some((_, to, link, pass, offered)) = (0..self.ranks.len()).filter_map(blocking).max_by_key(|&(needed, ..)| needed) else {
            return false;
        };
        self.links[link] = None;
        self.ranks[to].done.push(Action::Receive(pass, offered));
        self.ranks[to].early.insert((pass, offered));
        true
    }

    /// What is left to do is nothing, or could never run: the simulator says why.
    fn finish(self) -> Vec<Vec<Action>> {
        let whole = |rank: Rank| rank.done.into_iter().chain(rank.todo).collect();
        self.ranks.into_iter().map(whole).collect()
    }
}

/// A compute action with its transfers in their default places.
fn surrounded(action: Action, rank: usize, placement: &Placement) -> impl Iterator<Item = Action> {
    let slot = action.slot();
    let pass = match action {
        Action::Forward(_) => Some(Pass::Forward),
        Action::Backward { .. } | Action::BackwardInput(_) => Some(Pass::Backward),
        _ => None,
    };
    let source = pass.and_then(|pass| placement.source(pass, rank, slot.chunk).map(|(from, _)| (pass, from)));
    let before = source.filter(|&(_, from)| from != rank).map(|(pass, _)| Action::Receive(pass, slot));
    let destination = pass.and_then(|pass| placement.destination(pass, rank, slot.chunk).map(|place| (pass, place)));
    let after = destination.map(|(pass, (to, chunk))| match to == rank {
        true => Action::Hand { pass, from: slot, to: Slot { chunk, ..slot } },
        false => Action::Send(pass, slot),
    });
    before.into_iter().chain([action]).chain(after)
}
