//! What a rank computes on: what the configuration asks for, what this machine has, and how much of its memory a run may take.
//!
//! It is found before the ranks know of each other, and becomes a device when the plan says how much memory that needs.
//!
//! Invariant: all ranks of a run compute on the same kind of device, and within the same limit of memory.

use crate::config::source::Problem;
use crate::config::{Config, DeviceKind};
use crate::device::Device;
use crate::device::gpu::cuda::context::Context;
use crate::device::gpu::cuda::libraries::Search;
use crate::device::gpu::cuda::probe::Found;
use crate::device::gpu::cuda::{self, probe};
use crate::launch::identity::{self, CudaPlaces, Identity};
use crate::plan::Plan;
use crate::train::fit::{self, Limit};
use crate::train::rehearsal;
use crate::train::report::short_bytes;
use crate::train::team::Team;
use anyhow::{Context as _, Result};

pub enum Hardware {
    Cpu {
        threads: usize,
        /// Why no GPU is used, where there is one.
        note: Option<String>,
    },
    Emulated {
        threads: usize,
    },
    Cuda(Box<(Context, Found)>),
}

impl Hardware {
    /// Of this rank.
    pub fn find(config: &Config, identity: &Identity) -> Result<Hardware, Problem> {
        let threads = threads(config, identity);
        let gpu = || Context::find(&Search::new(&CudaPlaces::detect(&identity::environment())), identity.local_rank, identity.local_world);
        match config.device.kind {
            DeviceKind::Cpu => Ok(Hardware::Cpu { threads, note: None }),
            DeviceKind::Emulated => Ok(Hardware::Emulated { threads }),
            DeviceKind::Cuda => gpu().map(|found| Hardware::Cuda(Box::new(found))).map_err(|error| {
                let message = format!("`device.kind` = \"cuda\", but {error:#}");
                Problem::new("device.kind", message).help("device.kind = \"cpu\", or \"auto\" for a GPU only where there is one")
            }),
            DeviceKind::Auto => Ok(match gpu() {
                Ok(found) => Hardware::Cuda(Box::new(found)),
                // Most machines have no driver, and nothing is to be said of that.
                Err(error) => Hardware::Cpu { threads, note: probe::is_installed().then(|| format!("no GPU is used: {error:#}")) },
            }),
        }
    }

    /// A GPU where every rank of the `team` has one; otherwise no rank uses one that it found by itself.
    pub fn agreed(self, config: &Config, identity: &Identity, team: &Team) -> Result<Hardware> {
        if config.device.kind != DeviceKind::Auto || team.least(matches!(self, Hardware::Cuda(_)) as u64)? == 1 {
            return Ok(self);
        }
        Ok(match self {
            Hardware::Cuda(_) => {
                let note = Some("no GPU is used: there are ranks that have none".to_string());
                Hardware::Cpu { threads: threads(config, identity), note }
            }
            other => other,
        })
    }

    /// The configuration, with `auto` decided.
    pub fn decided(&self, config: &Config) -> Config {
        let mut config = config.clone();
        config.device.kind = match self {
            Hardware::Cpu { .. } => DeviceKind::Cpu,
            Hardware::Emulated { .. } => DeviceKind::Emulated,
            Hardware::Cuda(_) => DeviceKind::Cuda,
        };
        config
    }

    pub fn note(&self) -> Option<&str> {
        if let Hardware::Cpu { note, .. } = self { note.as_deref() } else { None }
    }

    /// How much of its device's memory a rank may use: what the configuration says, and of a GPU no more than is free for each rank.
    pub fn limit(&self, config: &Config, team: &Team) -> Result<Option<Limit>> {
        let configured = Limit::configured(config);
        let Hardware::Cuda(found) = self else { return Ok(configured) };
        let context = &found.0;
        // Asked of all at the same time, when all have opened their GPUs and nobody has taken memory for its run.
        team.least(0)?;
        let free = context.bytes_free()? / context.sharing();
        let free = team.least(free.saturating_sub(cuda::BYTES_FOR_KERNELS) as u64)?;
        let words = format!("{} has {} free for a rank", context.name(), short_bytes(free));
        Ok(Some(configured.filter(|limit| limit.bytes <= free).unwrap_or(Limit { bytes: free, words })))
    }

    /// The device, with the memory that `plan` needs. `config` is the decided one.
    pub fn device(self, config: &Config, plan: &Plan, rank: usize, limit: Option<&Limit>) -> Result<Device> {
        Ok(match self {
            Hardware::Cpu { threads, .. } => Device::cpu(threads),
            Hardware::Emulated { threads } => Device::emulated(None, false, threads),
            Hardware::Cuda(found) => {
                let (context, found) = *found;
                let name = context.name();
                let bytes = cuda::bytes_with_slack(rehearsal::rehearse(config, plan, rank)?.peak);
                let bytes = limit.map_or(bytes, |limit| bytes.min(limit.bytes as usize));
                Device::cuda(context, found, bytes, fit::help(config, plan)).context(name)?
            }
        })
    }
}

fn threads(config: &Config, identity: &Identity) -> usize {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    if config.device.threads > 0 { config.device.threads } else { (available / identity.local_world).max(1) }
}
