//! In which order a rank's list of actions reads the weights of its units: what ZeRO 3 gathers, one unit ahead.
//!
//! Invariant: what is said here is what `model/stage.rs` asks for; `parallel/zero.rs` asserts that a step used all of it.

use crate::plan::catalog::Kind;
use crate::plan::schedule::{Action, Slot};
use crate::plan::{Plan, RankPlan};

/// Units of the rank, in the order in which `actions` first need their whole weights. The head runs in the backward pass; where
/// nothing is learnt (`evaluating`), in the forward pass. A tied head on the embedding's rank uses the embedding's weights.
pub fn of(plan: &Plan, rank: &RankPlan, actions: &[Action], evaluating: bool) -> Vec<usize> {
    let mut uses = Vec::new();
    for action in actions {
        match *action {
            Action::Forward(slot) => {
                uses.extend(units(plan, rank, slot, is_body));
                if evaluating {
                    uses.extend(units(plan, rank, slot, is_end));
                }
            }
            Action::Backward { slot, .. } | Action::BackwardInput(slot) => {
                uses.extend(units(plan, rank, slot, is_end));
                let blocks: Vec<usize> = units(plan, rank, slot, |kind| matches!(kind, Kind::Block(_))).collect();
                uses.extend(blocks.into_iter().rev());
            }
            // Gradients of weights, and of the embedding, need no weights.
            Action::BackwardWeight { .. } | Action::Receive(..) | Action::Send(..) | Action::Hand { .. } => {}
        }
    }
    uses.iter().map(|&unit| owner(plan, rank, unit)).collect()
}

/// The unit whose weights `unit` uses: its own, but for a head that is tied to an embedding on the same rank.
pub fn owner(plan: &Plan, rank: &RankPlan, unit: usize) -> usize {
    let embedding = || (0..rank.units.len()).find(|&other| rank.kind(plan, other) == Kind::Embedding);
    if rank.kind(plan, unit) == (Kind::Head { tied: true }) { embedding().unwrap_or(unit) } else { unit }
}

/// How often each unit of the rank is gathered where weights are kept for a use only. Those that are used twice in a row stay, and so
/// does the last norm, which is held until the head is done, where it is used next after the head.
pub fn gathers(plan: &Plan, rank: &RankPlan, uses: &[usize]) -> Vec<u64> {
    let mut gathers = vec![0; rank.units.len()];
    for (at, &unit) in uses.iter().enumerate() {
        let used = |ago: usize| at >= ago && uses[at - ago] == unit;
        let stays = used(1) || (rank.kind(plan, unit) == Kind::Norm && used(2));
        gathers[unit] += !stays as u64;
    }
    gathers
}

fn units(plan: &Plan, rank: &RankPlan, slot: Slot, wanted: fn(Kind) -> bool) -> impl Iterator<Item = usize> {
    rank.chunks[slot.chunk].clone().filter(move |&unit| wanted(rank.kind(plan, unit)))
}

fn is_body(kind: Kind) -> bool {
    matches!(kind, Kind::Embedding | Kind::Positions | Kind::Block(_))
}

fn is_end(kind: Kind) -> bool {
    matches!(kind, Kind::Norm | Kind::Head { .. })
}
