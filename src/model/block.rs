//! One block: attention, then the feed-forward half. What it keeps between the passes is the recomputation policy.

use crate::config::Recompute;
use crate::device::tensor::Tensor;
use crate::model::attention::{self, Attention, Tokens};
use crate::model::mlp::{self, Mlp};
use crate::parallel::flat::{Grads, Weights};
use anyhow::Result;
use std::sync::Arc;

pub struct Block {
    /// The unit of this rank that holds the block's parameters.
    pub unit: usize,
    pub attention: Attention,
    pub mlp: Mlp,
    pub recompute: Recompute,
}

pub struct Saved {
    attention: attention::Saved,
    mlp: mlp::Saved,
}

/// What backward starts from.
pub enum Kept {
    All(Box<Saved>),
    /// Everything is computed again from the block's input.
    Input(Arc<Tensor>),
}

impl Block {
    /// x [n, c] -> y [n, c]
    pub fn forward(&self, w: Weights<'_>, x: Arc<Tensor>, tokens: Tokens<'_>) -> Result<(Tensor, Kept)> {
        let (y, mut saved) = self.run(w, x, tokens)?;
        let kept = match self.recompute {
            Recompute::None => Kept::All(Box::new(saved)),
            Recompute::Selective => {
                saved.attention.trim();
                saved.mlp.trim();
                Kept::All(Box::new(saved))
            }
            Recompute::Full => Kept::Input(saved.attention.x),
        };
        Ok((y, kept))
    }

    /// dy [n, c] -> dx [n, c]
    pub fn backward(&self, w: Weights<'_>, g: &mut Grads<'_>, kept: Kept, dy: Tensor, tokens: Tokens<'_>) -> Result<Tensor> {
        let saved = match kept {
            Kept::All(saved) => *saved,
            Kept::Input(x) => self.run(w, x, tokens)?.1,
        };
        let dy = self.mlp.backward(w, g, saved.mlp, Arc::new(dy), tokens.t)?;
        self.attention.backward(w, g, saved.attention, Arc::new(dy), tokens)
    }

    fn run(&self, w: Weights<'_>, x: Arc<Tensor>, tokens: Tokens<'_>) -> Result<(Tensor, Saved)> {
        let (attended, attention) = self.attention.forward(w, x, tokens)?;
        let (y, mlp) = self.mlp.forward(w, attended, attention.x.view(), tokens.t)?;
        Ok((y, Saved { attention, mlp }))
    }
}
