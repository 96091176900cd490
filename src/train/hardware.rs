//! What a rank computes on: what the configuration asks for, what this machine has, and how much of its memory a run may take.
//!
//! It is found before the ranks know of each other, and becomes a device when the plan says how much memory that needs.
//!
//! Invariant: all ranks of a run compute on the same kind of device, and within the same limit of memory.

use crate::config::source::Problem;
use crate::config::{Config, DeviceKind, Matmul};
use crate::device::Device;
use crate::device::cpu::processors::{self, Share};
use crate::device::gpu::cuda::context::Context;
use crate::device::gpu::cuda::libraries::Search;
use crate::device::gpu::cuda::probe::Found;
use crate::device::gpu::cuda::{self, probe};
use crate::launch::identity::{self, CudaPlaces, Identity};
use crate::plan::Plan;
use crate::train::fit::{self, Limit};
use crate::train::promise;
use crate::train::rehearsal;
use crate::train::report::short_bytes;
use crate::train::team::Team;
use anyhow::{Context as _, Result};

pub enum Hardware {
    Cpu {
        /// Why no GPU is used, where there is one.
        note: Option<String>,
    },
    Emulated,
    Cuda {
        context: Box<Context>,
        products: Products,
    },
}

/// Who does a GPU's matrix products: its library, or else ferrotron's own kernels.
#[derive(Default)]
pub struct Products {
    pub library: Option<Box<Found>>,
    /// Why there is no library, where one was looked for.
    pub note: Option<String>,
}

impl Hardware {
    /// Of this rank.
    pub fn find(config: &Config, identity: &Identity) -> Result<Hardware, Problem> {
        let search = Search::new(&CudaPlaces::detect(&identity::environment()));
        let gpu = || Context::find(&search, identity.local_rank, identity.local_world);
        let with_products = |context: Context| {
            let products = Products::find(config.device.matmul, &context, &search)?;
            Ok(Hardware::Cuda { context: Box::new(context), products })
        };
        match config.device.kind {
            DeviceKind::Cpu => Ok(Hardware::Cpu { note: None }),
            DeviceKind::Emulated if config.device.matmul == Matmul::Cublaslt => {
                let message = "`device.matmul` = \"cublaslt\", but an emulated GPU has no library";
                Err(Problem::new("device.matmul", message).help("\"own\" for ferrotron's own kernels, \"auto\" for the processor"))
            }
            DeviceKind::Emulated => Ok(Hardware::Emulated),
            DeviceKind::Cuda => match gpu() {
                Ok(context) => with_products(context),
                Err(error) => {
                    let message = format!("`device.kind` = \"cuda\", but {error:#}");
                    Err(Problem::new("device.kind", message).help("device.kind = \"cpu\", or \"auto\" for a GPU only where there is one"))
                }
            },
            DeviceKind::Auto => match gpu() {
                Ok(context) => with_products(context),
                // Most machines have no driver, and nothing is to be said of that.
                Err(error) => Ok(Hardware::Cpu { note: probe::is_installed().then(|| format!("no GPU is used: {error:#}")) }),
            },
        }
    }

    /// A GPU where every rank of the `team` has one; otherwise no rank uses one that it found by itself. Likewise with a GPU's library.
    pub fn agreed(self, config: &Config, team: &Team) -> Result<Hardware> {
        if config.device.kind != DeviceKind::Auto || team.least(matches!(self, Hardware::Cuda { .. }) as u64)? == 1 {
            return match self {
                Hardware::Cuda { context, products } if config.device.matmul == Matmul::Auto => {
                    Ok(Hardware::Cuda { context, products: products.agreed(team)? })
                }
                other => Ok(other),
            };
        }
        Ok(match self {
            Hardware::Cuda { .. } => {
                let note = Some("no GPU is used: there are ranks that have none".to_string());
                Hardware::Cpu { note }
            }
            other => other,
        })
    }

    /// The configuration, with `auto` decided.
    pub fn decided(&self, config: &Config) -> Config {
        let mut config = config.clone();
        config.device.kind = match self {
            Hardware::Cpu { .. } => DeviceKind::Cpu,
            Hardware::Emulated => DeviceKind::Emulated,
            Hardware::Cuda { products, .. } => {
                config.device.matmul = if products.library.is_some() { Matmul::Cublaslt } else { Matmul::Own };
                DeviceKind::Cuda
            }
        };
        config
    }

    pub fn note(&self) -> Option<&str> {
        match self {
            Hardware::Cpu { note, .. } | Hardware::Cuda { products: Products { note, .. }, .. } => note.as_deref(),
            Hardware::Emulated => None,
        }
    }

    /// How much of its device's memory a rank may use: what the configuration says, and of a GPU no more than is free for each rank.
    pub fn limit(&self, config: &Config, team: &Team) -> Result<Option<Limit>> {
        let configured = Limit::configured(config);
        let Hardware::Cuda { context, .. } = self else { return Ok(configured) };
        // Asked of all at the same time, when all have opened their GPUs and nobody has taken memory for its run.
        team.least(0)?;
        let free = context.bytes_free()? / context.sharing();
        let free = team.least(free.saturating_sub(cuda::BYTES_FOR_KERNELS) as u64)?;
        let words = format!("{} has {} free for a rank", context.name(), short_bytes(free));
        Ok(Some(configured.filter(|limit| limit.bytes <= free).unwrap_or(Limit { bytes: free, words })))
    }

    /// The device, with the memory that `plan` needs. `config` is the decided one.
    pub fn device(self, config: &Config, plan: &Plan, identity: &Identity, team: &Team, limit: Option<&Limit>) -> Result<Device> {
        Ok(match self {
            Hardware::Cpu { .. } => Device::cpu_on(share(config, identity, team)?),
            Hardware::Emulated => {
                let device = Device::emulated(None, false, share(config, identity, team)?.threads);
                if config.device.matmul == Matmul::Own { device.with_own_products() } else { device }
            }
            Hardware::Cuda { context, products: Products { library, .. } } => {
                let name = context.name();
                let bytes = cuda::bytes_with_slack(rehearsal::rehearse(config, plan, identity.rank)?.peak);
                let bytes = limit.map_or(bytes, |limit| bytes.min(limit.bytes as usize));
                let by_library = library.is_some();
                let device = Device::cuda(*context, library.map(|found| *found), bytes, fit::help(config, plan)).context(name)?;
                if by_library {
                    promise::check(&device, plan.dtype)?;
                }
                device
            }
        })
    }
}

impl Products {
    /// What `wish` means on this GPU.
    pub fn find(wish: Matmul, context: &Context, search: &Search) -> Result<Products, Problem> {
        let found = match wish {
            Matmul::Own => return Ok(Products::default()),
            Matmul::Auto | Matmul::Cublaslt => context.products(search),
        };
        match (found, wish) {
            (Ok(found), _) => Ok(Products { library: Some(Box::new(found)), note: None }),
            (Err(error), Matmul::Cublaslt) => {
                let message = format!("`device.matmul` = \"cublaslt\", but {error:#}");
                Err(Problem::new("device.matmul", message)
                    .help("device.matmul = \"own\" needs no library; \"auto\" uses one where there is one"))
            }
            (Err(error), _) => Ok(Products { library: None, note: Some(format!("cuBLASLt is not used: {error:#}")) }),
        }
    }

    /// A library where every rank has one.
    fn agreed(self, team: &Team) -> Result<Products> {
        let all = team.least(self.library.is_some() as u64)? == 1;
        if all || self.library.is_none() {
            return Ok(self);
        }
        Ok(Products { library: None, note: Some("cuBLASLt is not used: there are ranks that have none".to_string()) })
    }
}

/// The threads and processors of this rank, beside those of the other ranks of its host.
fn share(config: &Config, identity: &Identity, team: &Team) -> Result<Share> {
    let (available, mine) = (std::thread::available_parallelism().map_or(1, usize::from), processors::allowed()?);
    let all = team.on_this_host(identity.node_rank, &processors::to_bytes(&mine))?;
    // A container may be given less time than its processors have: then there is nothing to deal out.
    let share = if available == mine.len() && all.len() == identity.local_world {
        let all: Vec<_> = all.iter().map(|bytes| processors::from_bytes(bytes)).collect();
        processors::share(&all, identity.local_rank)
    } else {
        Share::anywhere(available / identity.local_world)
    };
    Ok(match config.device.threads {
        0 => share,
        wanted if wanted == share.threads => share,
        wanted => Share::anywhere(wanted),
    })
}
