//! The part of a model that one rank holds: its chunks of blocks, and the ends of the chain where they are here.
//!
//! Invariant: what a forward keeps, its backward takes; after a step nothing is kept.

use crate::comm::groups::Groups;
use crate::data::loader::Batch;
use crate::device::Device;
use crate::device::tensor::Tensor;
use crate::dtype::Dtype;
use crate::model::attention::Tokens;
use crate::model::block::{Block, Kept};
use crate::model::embedding::{Embedding, Positions};
use crate::model::family;
use crate::model::head::Head;
use crate::ops::exact::{LossSum, LossTotal};
use crate::parallel::flat::Deferred;
use crate::parallel::pipeline;
use crate::parallel::tensor_parallel::Region;
use crate::parallel::zero::Zero;
use crate::plan::schedule::{self, Slot};
use crate::plan::{Plan, RankPlan, uses};
use anyhow::Result;
use std::collections::HashMap;
use std::sync::Arc;

pub struct Stage {
    pub zero: Zero,
    device: Device,
    region: Region,
    embedding: Option<Embedding>,
    positions: Option<Positions>,
    chunks: Vec<Vec<Block>>,
    head: Option<Head>,
    /// f32 `[positions, d]`, where the family rotates.
    rope: Option<Tensor>,
    /// Rows of one sequence, and width of the residual stream.
    t: usize,
    hidden: usize,
    micro_rows: usize,
    dtype: Dtype,
    last_chunk: usize,
    uses: Uses,
    now: Step,
}

/// The units whose weights a step uses, in order.
struct Uses {
    training: Vec<usize>,
    evaluating: Vec<usize>,
}

/// What belongs to the step under way.
#[derive(Default)]
struct Step {
    micros: Vec<MicroBatch>,
    /// Multiplies every gradient: loss scale over valid tokens.
    scale: f32,
    loss: LossTotal,
    /// Forward only: nothing is kept.
    evaluating: bool,
    kept: HashMap<Slot, Vec<Kept>>,
    /// The last stage's output, whose loss is computed when its backward begins.
    outputs: HashMap<Slot, Tensor>,
    deferred: HashMap<Slot, Vec<(usize, Vec<Deferred>)>>,
    /// The most that was alive at the end of a forward pass.
    bytes_kept_peak: usize,
}

/// What follows when a backward pass has added a unit's gradients.
#[derive(Clone, Copy)]
enum Finish {
    Now {
        reduce: bool,
    },
    /// The matrices' gradients come with `backward_weight`, and all else after them.
    Later,
}

/// One micro-batch on the device: u32 `[n]` each.
struct MicroBatch {
    inputs: Tensor,
    targets: Tensor,
    positions: Tensor,
    starts: Tensor,
    /// Positions of the rows that lie in this rank's part of the stream, where it adds them.
    stream_positions: Option<Tensor>,
}

impl Stage {
    /// Weights and moments are zero until they are initialised or loaded.
    pub fn new(plan: &Plan, rank: &RankPlan, device: &Device, groups: &Groups) -> Result<Stage> {
        let zero = Zero::new(plan, rank, device, groups)?;
        let region = Region::new(groups.tp.clone(), rank.share, plan.sequence_parallel);
        let parts = family::parts(plan, rank, &region);
        let rope = family::rope_table(&plan.model, plan.t, device);
        let actions = &plan.schedule.actions[rank.at.pp];
        let forward = schedule::forward_only(actions);
        Ok(Stage {
            zero,
            device: device.clone(),
            region,
            embedding: parts.embedding,
            positions: parts.positions,
            chunks: parts.chunks,
            head: parts.head,
            rope,
            t: plan.t,
            hidden: plan.model.hidden_size,
            micro_rows: plan.micro_rows(),
            dtype: plan.dtype,
            last_chunk: rank.chunks.len() - 1,
            uses: Uses { training: uses::of(plan, rank, actions, false), evaluating: uses::of(plan, rank, &forward, true) },
            now: Step::default(),
        })
    }

    /// Takes this rank's rows of a step. Every gradient of the step is multiplied with `scale`.
    pub fn begin(&mut self, batch: &Batch, scale: f32) {
        self.now = Step { micros: self.upload(batch), scale, ..Step::default() };
        self.zero.expect(&self.uses.training);
    }

    /// Takes rows to be measured and not learnt from.
    pub fn begin_evaluation(&mut self, batch: &Batch) {
        self.now = Step { micros: self.upload(batch), evaluating: true, ..Step::default() };
        self.zero.expect(&self.uses.evaluating);
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The sum of the losses of all tokens that the step has met on this rank.
    pub fn loss(&self) -> LossSum {
        self.now.loss.sum()
    }

    /// The most that was alive on the device at the end of a forward pass of this step.
    pub fn bytes_kept_peak(&self) -> usize {
        self.now.bytes_kept_peak
    }

    /// Logits `[n, v]` of a few sequences, on a model that is whole on this rank.
    pub fn logits(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let before = (self.micro_rows, self.t);
        (self.micro_rows, self.t) = (batch.inputs.len(), batch.seq_len);
        self.now = Step { micros: self.upload(batch), evaluating: true, ..Step::default() };
        let x = self.run_blocks(Slot { chunk: 0, micro: 0 }, None)?;
        (self.micro_rows, self.t) = before;
        let head = self.head.as_ref().expect("the whole model is here");
        let (normed, _) = head.norm(self.zero.weights(head.norm_unit)?, x.view(), self.t)?;
        let logits = head.logits(self.zero.weights(head.unit)?, normed.view());
        let mut wide = self.device.empty(logits.shape(), Dtype::F32);
        crate::ops::elementwise::cast(wide.view_mut(), logits.view());
        let logits = wide.to_vec();
        self.device.check()?;
        Ok(logits)
    }

    fn upload(&self, batch: &Batch) -> Vec<MicroBatch> {
        let n = self.micro_rows;
        let part = |values: &[u32], i: usize| Tensor::from_slice(&self.device, [n], &values[i * n..(i + 1) * n]);
        let micro = |i| MicroBatch {
            inputs: part(&batch.inputs, i),
            targets: part(&batch.targets, i),
            positions: part(&batch.positions, i),
            starts: part(&batch.starts, i),
            stream_positions: self.positions.as_ref().map(|_| self.stream_part(&batch.positions[i * n..(i + 1) * n])),
        };
        assert_eq!(batch.inputs.len() % n, 0, "a batch is whole micro-batches");
        (0..batch.inputs.len() / n).map(micro).collect()
    }

    /// Of each sequence the values of the rows in this rank's part of the stream.
    fn stream_part(&self, values: &[u32]) -> Tensor {
        let rows = self.region.stream_rows(self.t);
        let part: Vec<u32> = values.chunks_exact(self.t).flat_map(|sequence| &sequence[rows.clone()]).copied().collect();
        Tensor::from_slice(&self.device, [part.len()], &part)
    }

    fn is_first(&self, chunk: usize) -> bool {
        chunk == 0 && self.embedding.is_some()
    }

    fn is_last(&self, chunk: usize) -> bool {
        chunk == self.last_chunk && self.head.is_some()
    }

    /// From the stage's input to what its last block puts out.
    fn run_blocks(&mut self, slot: Slot, x: Option<Tensor>) -> Result<Tensor> {
        let micro = &self.now.micros[slot.micro];
        let tokens = tokens(micro, &self.rope, self.t);
        let mut x = match x {
            Some(x) => x,
            None => {
                let embedding = self.embedding.as_ref().expect("the first stage has the embedding");
                let mut x = embedding.forward(self.zero.weights(embedding.unit)?, micro.inputs.view(), self.t)?;
                self.zero.release(embedding.unit);
                if let Some(positions) = &self.positions {
                    let at = micro.stream_positions.as_ref().expect("a stage that adds positions has them");
                    positions.forward(self.zero.weights(positions.unit)?, &mut x, at.view());
                    self.zero.release(positions.unit);
                }
                x
            }
        };
        let mut kept = Vec::new();
        for block in &self.chunks[slot.chunk] {
            let (y, k) = block.forward(self.zero.weights(block.unit)?, Arc::new(x), tokens)?;
            self.zero.release(block.unit);
            if !self.now.evaluating {
                kept.push(k);
            }
            x = y;
        }
        if !self.now.evaluating {
            self.now.kept.insert(slot, kept);
        }
        Ok(x)
    }

    fn evaluate(&mut self, slot: Slot, x: Tensor) -> Result<()> {
        let head = self.head.as_ref().expect("the last stage has the head");
        let targets = self.now.micros[slot.micro].targets.view();
        let (normed, _) = head.norm(self.zero.weights(head.norm_unit)?, x.view(), self.t)?;
        let losses = head.losses(self.zero.weights(head.unit)?, normed.view(), targets, self.t)?;
        self.zero.release(head.norm_unit);
        self.zero.release(head.unit);
        self.now.loss.add(losses.view());
        Ok(())
    }

    /// The loss of the last stage's output, and where it pulls that output.
    fn backward_head(&mut self, slot: Slot) -> Result<Tensor> {
        let x = self.now.outputs.remove(&slot).expect("forward before backward");
        let head = self.head.as_ref().expect("the last stage has the head");
        let targets = self.now.micros[slot.micro].targets.view();
        let (normed, stats) = head.norm(self.zero.weights(head.norm_unit)?, x.view(), self.t)?;
        let (w, mut g) = self.zero.weights_and_grads(head.unit)?;
        let (losses, dnormed) = head.losses_and_gradient(w, &mut g, normed.view(), targets, self.t, self.now.scale)?;
        drop(normed);
        self.now.loss.add(losses.view());
        let (w, mut g) = self.zero.held_weights_and_grads(head.norm_unit)?;
        let dx = head.norm.backward(w, &mut g, dnormed, (&Arc::new(x), &Arc::new(stats)), None, self.region.stream_rows(self.t).len());
        let (unit, norm_unit) = (head.unit, head.norm_unit);
        self.zero.release(unit);
        self.zero.added(unit, slot.micro)?;
        self.zero.release(norm_unit);
        self.zero.added(norm_unit, slot.micro)?;
        Ok(dx)
    }

    fn backward_embedding(&mut self, slot: Slot, dx: Tensor) -> Result<()> {
        let micro = &self.now.micros[slot.micro];
        let dx = self.region.leave_backward(&Arc::new(dx), self.t)?;
        if let Some(positions) = &self.positions {
            let mut g = self.zero.grads(positions.unit)?;
            positions.backward(&mut g, dx.view(), micro.positions.view());
        }
        let embedding = self.embedding.as_ref().expect("the first stage has the embedding");
        let mut g = self.zero.grads(embedding.unit)?;
        embedding.backward(&mut g, dx.view(), micro.inputs.view());
        let units = [self.positions.as_ref().map(|positions| positions.unit), Some(embedding.unit)];
        for unit in units.into_iter().flatten() {
            self.zero.added(unit, slot.micro)?;
        }
        Ok(())
    }

    /// The micro-batch's gradients of a block are added; the plan said whether their sum is then reduced.
    fn added(&mut self, unit: usize, micro: usize, reduce: bool) -> Result<()> {
        let reduced = self.zero.added(unit, micro)?;
        assert_eq!(reduced, reduce, "the schedule and the order of sums agree on micro-batch {micro}");
        Ok(())
    }

    fn backward_blocks(&mut self, slot: Slot, mut dy: Tensor, finish: Finish) -> Result<Tensor> {
        let mut kept = self.now.kept.remove(&slot).expect("forward before backward");
        if let Finish::Later = finish {
            // Also of a chunk that has no blocks: what is left for later is then nothing.
            self.now.deferred.insert(slot, Vec::new());
        }
        for index in (0..self.chunks[slot.chunk].len()).rev() {
            let block = &self.chunks[slot.chunk][index];
            let unit = block.unit;
            let tokens = tokens(&self.now.micros[slot.micro], &self.rope, self.t);
            let (w, mut g) = self.zero.weights_and_grads(unit)?;
            let kept = kept.pop().expect("one for each block");
            let mut deferred = Vec::new();
            if let Finish::Later = finish {
                g = g.deferring(&mut deferred);
            }
            dy = block.backward(w, &mut g, kept, dy, tokens)?;
            self.zero.release(unit);
            match finish {
                Finish::Now { reduce } => self.added(unit, slot.micro, reduce)?,
                Finish::Later => self.now.deferred.entry(slot).or_default().push((unit, deferred)),
            }
        }
        Ok(dy)
    }

    fn backward_chunk(&mut self, slot: Slot, dy: Option<Tensor>, finish: Finish) -> Result<Option<Tensor>> {
        let dy = match dy {
            Some(dy) => dy,
            None => self.backward_head(slot)?,
        };
        let dx = self.backward_blocks(slot, dy, finish)?;
        if self.is_first(slot.chunk) {
            self.backward_embedding(slot, dx)?;
            return Ok(None);
        }
        Ok(Some(dx))
    }
}

impl pipeline::Stage for Stage {
    fn forward(&mut self, slot: Slot, x: Option<Tensor>) -> Result<Option<Tensor>> {
        let y = self.run_blocks(slot, x)?;
        let kept = self.device.memory().bytes_live() - self.zero.bytes_visiting();
        self.now.bytes_kept_peak = self.now.bytes_kept_peak.max(kept);
        if !self.is_last(slot.chunk) {
            return Ok(Some(y));
        }
        if self.now.evaluating {
            self.evaluate(slot, y)?;
        } else {
            self.now.outputs.insert(slot, y);
        }
        Ok(None)
    }

    fn backward(&mut self, slot: Slot, dy: Option<Tensor>, reduce: bool) -> Result<Option<Tensor>> {
        self.backward_chunk(slot, dy, Finish::Now { reduce })
    }

    fn backward_input(&mut self, slot: Slot, dy: Option<Tensor>) -> Result<Option<Tensor>> {
        self.backward_chunk(slot, dy, Finish::Later)
    }

    fn backward_weight(&mut self, slot: Slot, reduce: bool) -> Result<()> {
        for (unit, list) in self.now.deferred.remove(&slot).expect("the input's gradient before the weights'") {
            let mut g = self.zero.grads(unit)?;
            list.into_iter().for_each(|work| work(&mut g));
            self.added(unit, slot.micro, reduce)?;
        }
        Ok(())
    }

    fn boundary(&self) -> Tensor {
        let sequences = self.micro_rows / self.t;
        self.device.empty([sequences * self.region.stream_rows(self.t).len(), self.hidden], self.dtype)
    }
}

fn tokens<'a>(micro: &'a MicroBatch, rope: &'a Option<Tensor>, t: usize) -> Tokens<'a> {
    Tokens { t, positions: micro.positions.view(), starts: micro.starts.view(), rope: rope.as_ref().map(Tensor::view) }
}
