//! The state of training in and out of the flat buffers: initial values, imported weights, checkpoints.
//!
//! Invariant: everything passes as boxes of global tensors, so what is read does not depend on the layout that wrote it.

use crate::checkpoint::index::Kind;
use crate::checkpoint::save::Shard;
use crate::device::tensor::View;
use crate::dtype::Dtype;
use crate::parallel::unit::UnitState;
use crate::parallel::zero::Zero;
use crate::plan::layout::Piece;
use anyhow::Result;

/// Gives the f32 numbers of boxes: which unit of the rank, the boxes, and the buffer that their `flat` ranges count in.
pub type Source<'a> = dyn FnMut(usize, &[Piece], &mut [f32]) -> Result<()> + 'a;

/// Bytes that a rank's units hold between steps: in the device's memory, but for the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub weights: usize,
    pub gradients: usize,
    /// Master weights and moments.
    pub optimizer: usize,
    /// Weights, master weights and moments that lie in files instead.
    pub offloaded: usize,
}

impl Zero {
    /// Waits for updates and gathers first.
    pub fn held(&mut self) -> Result<Held> {
        self.settle()?;
        let mut held = Held::default();
        for u in &self.units {
            held.weights += u.weights.bytes();
            held.gradients += u.gradients.bytes();
            let moments = u.moments.iter().flatten();
            for state in u.master.iter().chain(moments) {
                held.optimizer += state.bytes();
                held.offloaded += state.bytes_offloaded();
            }
            held.offloaded += u.weights.bytes_offloaded();
        }
        Ok(held)
    }

    /// Sets the weights, in f32 where the run keeps them so, else rounded to nearest, and gives every rank what it must hold.
    pub fn load_weights(&mut self, source: &mut Source<'_>) -> Result<()> {
        self.settle()?;
        for (index, u) in self.units.iter_mut().enumerate().filter(|(_, u)| u.owns()) {
            let pieces = u.pieces(false);
            let weights = match &mut u.master {
                Some(master) => master.view_mut(),
                None => u.weights.mine_mut(&u.mine),
            };
            // Padding stays what it always is: zero.
            weights.fill_rounded(|values| source(index, &pieces, values))?;
        }
        self.spread_weights()
    }

    /// Sets the first (`which` 0) or second (1) moments.
    pub fn load_moments(&mut self, which: usize, source: &mut Source<'_>) -> Result<()> {
        self.settle()?;
        for (index, u) in self.units.iter_mut().enumerate().filter(|(_, u)| u.owns()) {
            let pieces = u.pieces(false);
            let moments = u.moments.as_mut().expect("only a tied unit has no moments");
            moments[which].view_mut().fill_with(|values| source(index, &pieces, values))?;
        }
        Ok(())
    }

    /// What this rank answers for in a checkpoint, copied to the host.
    pub fn shards(&mut self) -> Result<Vec<Shard>> {
        self.settle()?;
        let mut shards = Vec::new();
        for u in self.units.iter().filter(|u| self.speaks && u.counts()) {
            let pieces = u.pieces(true);
            let [first, second] = u.moments.as_ref().expect("only a tied unit has no moments");
            let mut push = |kind, dtype, x: View<'_>| shards.push(Shard { kind, dtype, pieces: pieces.clone(), bytes: x.to_bytes() });
            push(Kind::Weights, self.dtype, u.weights.mine(&u.mine));
            if let Some(master) = &u.master {
                push(Kind::Master, Dtype::F32, master.view());
            }
            push(Kind::ExpAvg, Dtype::F32, first.view());
            push(Kind::ExpAvgSq, Dtype::F32, second.view());
        }
        Ok(shards)
    }

    /// The gradients that `finish_reductions` left, as they would lie in a checkpoint. For comparison with a reference.
    pub fn gradients(&self) -> Vec<(Vec<Piece>, Vec<f32>)> {
        let owned = self.units.iter().filter(|u| self.speaks && u.counts());
        owned.map(|u| (u.pieces(true), u.gradients.mine().to_vec())).collect()
    }
}

impl UnitState {
    /// The boxes of this rank's slice, counted from its start. `owned`: only those that this rank answers for.
    pub(in crate::parallel) fn pieces(&self, owned: bool) -> Vec<Piece> {
        let mut pieces = if owned { self.layout.pieces_owned(self.mine.clone()) } else { self.layout.pieces(self.mine.clone()) };
        for piece in &mut pieces {
            piece.flat = piece.flat.start - self.mine.start..piece.flat.end - self.mine.start;
        }
        pieces
    }
}
