//! The memory that training will take, by rehearsing a step on a device that only counts.
//!
//! It is the code that trains which is rehearsed, so the prediction cannot drift away from it. A test holds the predicted peak to
//! the one that the allocator measures.

use crate::comm::connect::Transport;
use crate::comm::groups::Groups;
use crate::config::{Config, DeviceKind};
use crate::data::loader::Batch;
use crate::device::Device;
use crate::plan::Plan;
use crate::train::step::Trainer;
use anyhow::Result;

/// Bytes on one rank's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    pub weights: usize,
    pub gradients: usize,
    /// Master weights and moments.
    pub optimizer: usize,
    /// What forward passes keep for backward passes, when it is most.
    pub activations: usize,
    /// What comes on top of all these when most is in use: outputs on their way, gradients of activations, logits.
    pub workspace: usize,
    pub peak: usize,
    /// What lies in files instead of the device's memory.
    pub offloaded: usize,
}

/// Rehearses one step of rank `index`.
pub fn rehearse(config: &Config, plan: &Plan, index: usize) -> Result<Footprint> {
    let device = match config.device.kind {
        DeviceKind::Auto | DeviceKind::Cpu => Device::dry(),
        DeviceKind::Cuda | DeviceKind::Emulated => Device::dry_gpu(),
    };
    // What the world exchanges is on the host; of a large world it would be most of the work.
    let mut groups = Groups::connect(&Transport::Rehearsal, &plan.mesh, index)?;
    groups.world = Groups::solo().world;
    let mut trainer = Trainer::new(config, plan.clone(), index, &device, groups)?;
    let held = trainer.stage.zero.held()?;
    let fixed = device.memory().bytes_live();
    let batch = blank(trainer.rank.rows.len(), plan.t);
    trainer.step(0, &batch, false)?;
    let activations = trainer.stage.bytes_kept_peak().saturating_sub(fixed);
    let peak = device.memory().bytes_peak();
    Ok(Footprint {
        weights: held.weights,
        gradients: held.gradients,
        optimizer: held.optimizer,
        activations,
        workspace: peak - activations - held.weights - held.gradients - held.optimizer,
        peak,
        offloaded: held.offloaded,
    })
}

/// A batch without content.
fn blank(rows: usize, t: usize) -> Batch {
    let zeros = vec![0; rows * t];
    Batch { rows: (0..rows).collect(), seq_len: t, inputs: zeros.clone(), targets: zeros.clone(), positions: zeros.clone(), starts: zeros }
}
