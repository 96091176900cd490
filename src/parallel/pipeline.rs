//! The interpreter of schedules. One stage with m micro-batches is gradient accumulation: there is no second path.
//!
//! Invariant: the simulator has proved the list; here it is only obeyed, and at its end nothing is left over.

use crate::comm::Pending;
use crate::comm::groups::Groups;
use crate::device::tensor::Tensor;
use crate::plan::schedule::{Action, Pass, Placement, Slot};
use anyhow::{Context, Result};
use std::collections::{HashMap, VecDeque};

/// Messages that may be under way on one link. The simulator proves that a list runs even where a link holds a single one, so waiting
/// for the oldest cannot stop the pipeline; and memory does not grow with the number of micro-batches.
const UNDER_WAY: usize = 2;

/// What the pipeline needs to know of a model. `None` goes into the first stage, which reads its tokens, and comes out of the last,
/// which keeps the loss; backward likewise, mirrored.
pub trait Stage {
    fn forward(&mut self, slot: Slot, x: Option<Tensor>) -> Result<Option<Tensor>>;
    /// `reduce`: this chunk's gradients are now complete on this rank.
    fn backward(&mut self, slot: Slot, dy: Option<Tensor>, reduce: bool) -> Result<Option<Tensor>>;
    /// The gradient of the input alone.
    fn backward_input(&mut self, slot: Slot, dy: Option<Tensor>) -> Result<Option<Tensor>>;
    /// The gradients of the weights that `backward_input` left for later.
    fn backward_weight(&mut self, slot: Slot, reduce: bool) -> Result<()>;
    /// An empty tensor shaped like what crosses stages.
    fn boundary(&self) -> Tensor;
}

/// Runs one rank's list.
pub fn run(actions: &[Action], placement: &Placement, stage: &mut impl Stage, groups: &Groups) -> Result<()> {
    let rank = groups.down.rank();
    let mut inbox: HashMap<(Pass, Slot), Tensor> = HashMap::new();
    let mut outbox: HashMap<(Pass, Slot), Tensor> = HashMap::new();
    let mut sending: HashMap<(Pass, usize), VecDeque<Pending>> = HashMap::new();
    let link = |pass| if pass == Pass::Forward { &groups.down } else { &groups.up };
    for action in actions {
        match *action {
            Action::Receive(pass, slot) => {
                let (from, _) = placement.source(pass, rank, slot.chunk).expect("only a pass that does not begin here receives");
                let x = link(pass).receive(from, stage.boundary())?.wait().with_context(|| format!("{action}"))?;
                inbox.insert((pass, slot), x);
            }
            Action::Forward(slot) => {
                let y = stage.forward(slot, inbox.remove(&(Pass::Forward, slot)))?;
                outbox.extend(y.map(|y| ((Pass::Forward, slot), y)));
            }
            Action::Backward { slot, reduce } => {
                let dx = stage.backward(slot, inbox.remove(&(Pass::Backward, slot)), reduce)?;
                outbox.extend(dx.map(|dx| ((Pass::Backward, slot), dx)));
            }
            Action::BackwardInput(slot) => {
                let dx = stage.backward_input(slot, inbox.remove(&(Pass::Backward, slot)))?;
                outbox.extend(dx.map(|dx| ((Pass::Backward, slot), dx)));
            }
            Action::BackwardWeight { slot, reduce } => stage.backward_weight(slot, reduce)?,
            Action::Send(pass, slot) => {
                let (to, _) = placement.destination(pass, rank, slot.chunk).expect("only a pass that does not end here sends");
                let x = outbox.remove(&(pass, slot)).expect("computed before it is sent");
                let queue = sending.entry((pass, to)).or_default();
                if queue.len() == UNDER_WAY
                    && let Some(oldest) = queue.pop_front()
                {
                    oldest.wait().with_context(|| format!("{action}"))?;
                }
                queue.push_back(link(pass).send(to, x)?);
            }
            Action::Hand { pass, from, to } => {
                let x = outbox.remove(&(pass, from)).expect("computed before it is handed over");
                inbox.insert((pass, to), x);
            }
        }
    }
    for send in sending.into_values().flatten() {
        send.wait()?;
    }
    assert!(inbox.is_empty() && outbox.is_empty(), "a schedule leaves nothing behind");
    Ok(())
}
