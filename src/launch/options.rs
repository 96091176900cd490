//! The flags of `ferrotron launch`: torchrun's, with the same names, meanings and environment defaults (`PET_*`).
//!
//! Invariant: a value that parses is well formed by itself; what depends on several flags is checked in `job.rs`.

use crate::launch::requests;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

#[derive(Args, Clone, Debug)]
pub struct LaunchOptions {
    /// Ranks on this node: a number; `cpu`, one per core; `gpu`, one per GPU; `auto`, one per GPU if there is any, else per core
    #[arg(long, alias = "nproc_per_node", env = "PET_NPROC_PER_NODE", default_value = "1", value_name = "N|auto|gpu|cpu")]
    pub nproc_per_node: RanksPerNode,

    /// Nodes of the job; one launcher runs on each
    #[arg(long, env = "PET_NNODES", default_value = "1", value_name = "N")]
    pub nnodes: Nodes,

    /// Which of the nodes this is, from 0
    #[arg(long, alias = "node_rank", env = "PET_NODE_RANK", default_value_t = 0, value_name = "K")]
    pub node_rank: usize,

    /// Where rank 0 can be reached: an address of node 0 [one node: 127.0.0.1]
    #[arg(long, alias = "master_addr", env = "PET_MASTER_ADDR", value_name = "ADDRESS")]
    pub master_addr: Option<String>,

    /// The port on which rank 0 listens [one node: a free one; several: 29500]
    #[arg(long, alias = "master_port", env = "PET_MASTER_PORT", value_name = "PORT")]
    pub master_port: Option<u16>,

    /// One node, on an address and a port of its own, whatever the environment says
    #[arg(long)]
    pub standalone: bool,

    /// How often all ranks are started again after a failure
    #[arg(long, alias = "max_restarts", env = "PET_MAX_RESTARTS", default_value_t = 0, value_name = "N")]
    pub max_restarts: u64,

    /// After a first failure, how long others may fail by themselves before all are stopped
    #[arg(long, alias = "monitor_interval", env = "PET_MONITOR_INTERVAL", default_value = "0.1", value_name = "SECONDS", value_parser = seconds)]
    pub monitor_interval: Duration,

    /// Keep what ranks print, in DIR/attempt_K/LOCAL_RANK/stdout.log and stderr.log
    #[arg(long, alias = "log_dir", env = "PET_LOG_DIR", value_name = "DIR")]
    pub log_dir: Option<PathBuf>,

    /// What goes to files only: 0 nothing, 1 stdout, 2 stderr, 3 both; or by local rank, such as 0:3,1:1
    #[arg(short, long, env = "PET_REDIRECTS", value_name = "STREAMS")]
    pub redirects: Option<Streams>,

    /// What goes to files and to the console, written as for --redirects [with --log-dir and neither flag: 3]
    #[arg(short, long, env = "PET_TEE", value_name = "STREAMS")]
    pub tee: Option<Streams>,

    /// Local ranks whose output is shown on the console, such as 0,1 [all]
    #[arg(long, alias = "local_ranks_filter", env = "PET_LOCAL_RANKS_FILTER", value_name = "RANKS", value_delimiter = ',')]
    pub local_ranks_filter: Vec<usize>,

    /// How long ranks that were told to stop may take before they are killed
    #[arg(long, alias = "shutdown_timeout", env = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    pub shutdown_timeout: Duration,

    /// Signals that are passed on to the ranks
    #[arg(
        long,
        alias = "signals_to_handle",
        env = "PET_SIGNALS_TO_HANDLE",
        default_value = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        value_name = "SIGNALS",
        value_delimiter = ',',
        value_parser = requests::signal
    )]
    pub signals_to_handle: Vec<i32>,

    /// The GPUs that the ranks may use, as CUDA reads it: what `gpu` and `auto` count.
    #[arg(long, env = "CUDA_VISIBLE_DEVICES", hide = true)]
    pub visible_gpus: Option<String>,

    /// The secret that the ranks of a job share. A launcher of several nodes needs one from outside, the same on all.
    #[arg(long, env = "FERROTRON_JOB_TOKEN", hide = true, hide_env_values = true)]
    pub job_token: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RanksPerNode {
    Count(usize),
    Cores,
    Gpus,
    Auto,
}

impl RanksPerNode {
    /// `visible_gpus`: the value of `CUDA_VISIBLE_DEVICES`.
    pub fn count(self, visible_gpus: Option<&str>) -> Result<usize> {
        match self {
            RanksPerNode::Count(count) => Ok(count),
            RanksPerNode::Cores => cores(),
            RanksPerNode::Gpus => match gpus(visible_gpus) {
                0 => bail!(
                    "--nproc-per-node gpu: no GPU to be seen (/dev/nvidia0, CUDA_VISIBLE_DEVICES); `cpu` or a number starts ranks on cores"
                ),
                count => Ok(count),
            },
            RanksPerNode::Auto => match gpus(visible_gpus) {
                0 => cores(),
                count => Ok(count),
            },
        }
    }
}

impl FromStr for RanksPerNode {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<RanksPerNode> {
        Ok(match text {
            "cpu" => RanksPerNode::Cores,
            "gpu" => RanksPerNode::Gpus,
            "auto" => RanksPerNode::Auto,
            _ => match text.parse() {
                Ok(0) => bail!("a node has one rank at least"),
                Ok(count) => RanksPerNode::Count(count),
                Err(_) => bail!("expected a number of ranks, `cpu`, `gpu` or `auto`"),
            },
        })
    }
}

fn cores() -> Result<usize> {
    Ok(thread::available_parallelism().context("counting the cores of this node")?.get())
}

/// GPUs that this node shows as devices (a container is given those it may use), or those that were picked of them.
fn gpus(visible: Option<&str>) -> usize {
    let Ok(devices) = fs::read_dir("/dev") else { return 0 };
    let is_gpu = |name: &str| name.strip_prefix("nvidia").is_some_and(|number| number.parse::<u32>().is_ok());
    let present = devices.filter_map(Result::ok).filter(|device| is_gpu(&device.file_name().to_string_lossy())).count();
    match visible {
        Some(picked) if present > 0 => picked_gpus(picked),
        _ => present,
    }
}

/// CUDA takes the names in front of the first that is none: `-1` and nothing at all hide every GPU.
fn picked_gpus(picked: &str) -> usize {
    picked.split(',').map(str::trim).take_while(|name| !name.is_empty() && !name.starts_with('-')).count()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Nodes(pub usize);

impl FromStr for Nodes {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Nodes> {
        let (least, most) = text.split_once(':').unwrap_or((text, text));
        let count = |text: &str| text.parse::<usize>().ok().filter(|count| *count > 0).context("expected a number of nodes, 1 at least");
        let (least, most) = (count(least)?, count(most)?);
        ensure!(least == most, "a job has a fixed number of nodes here: write {most}, not {text}");
        Ok(Nodes(most))
    }
}

/// Which of stdout and stderr, for each local rank.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Streams {
    /// Two bits, torchrun's: 1 stdout, 2 stderr.
    others: u8,
    by_local_rank: BTreeMap<usize, u8>,
}

impl Streams {
    pub fn stdout(&self, local_rank: usize) -> bool {
        self.bits(local_rank) & 1 != 0
    }

    pub fn stderr(&self, local_rank: usize) -> bool {
        self.bits(local_rank) & 2 != 0
    }

    pub fn are_none(&self) -> bool {
        self.others == 0 && self.by_local_rank.values().all(|bits| *bits == 0)
    }

    fn bits(&self, local_rank: usize) -> u8 {
        self.by_local_rank.get(&local_rank).copied().unwrap_or(self.others)
    }
}

impl FromStr for Streams {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Streams> {
        let expected = || "expected 0, 1 (stdout), 2 (stderr) or 3 (both), or these by local rank such as 0:3,1:1";
        let bits = |text: &str| text.parse::<u8>().ok().filter(|bits| *bits <= 3).with_context(expected);
        if !text.contains(':') {
            return Ok(Streams { others: bits(text)?, by_local_rank: BTreeMap::new() });
        }
        let mut by_local_rank = BTreeMap::new();
        for item in text.split(',') {
            let (rank, which) = item.split_once(':').with_context(expected)?;
            let rank: usize = rank.parse().with_context(expected)?;
            ensure!(by_local_rank.insert(rank, bits(which)?).is_none(), "local rank {rank} stands there twice");
        }
        Ok(Streams { others: 0, by_local_rank })
    }
}

fn seconds(text: &str) -> Result<Duration> {
    let seconds: f64 = text.parse().ok().context("expected seconds, such as 30 or 0.5")?;
    Duration::try_from_secs_f64(seconds).ok().context("expected seconds, not negative and not without end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_named_for_all_or_by_local_rank() {
        let of = |text: &str, rank: usize| {
            let streams: Streams = text.parse().expect("well formed");
            (streams.stdout(rank), streams.stderr(rank))
        };
        assert_eq!(of("0", 5), (false, false));
        assert_eq!(of("1", 5), (true, false));
        assert_eq!(of("2", 5), (false, true));
        assert_eq!(of("0:3,1:1", 0), (true, true));
        assert_eq!(of("0:3,1:1", 1), (true, false));
        assert_eq!(of("0:3,1:1", 2), (false, false));
        for wrong in ["4", "", "x", "0:3,1", "0:3,0:1", "0:", "-1:2"] {
            assert!(wrong.parse::<Streams>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn counts_of_ranks_and_nodes() {
        assert_eq!("8".parse::<RanksPerNode>().ok(), Some(RanksPerNode::Count(8)));
        assert_eq!("auto".parse::<RanksPerNode>().ok(), Some(RanksPerNode::Auto));
        assert!("0".parse::<RanksPerNode>().is_err() && "xpu".parse::<RanksPerNode>().is_err());
        assert_eq!("4".parse::<Nodes>().ok(), Some(Nodes(4)));
        assert_eq!("4:4".parse::<Nodes>().ok(), Some(Nodes(4)));
        assert!("1:4".parse::<Nodes>().is_err() && "0".parse::<Nodes>().is_err());
        assert_eq!(["0,3", "GPU-8932f937,MIG-GPU-1/2", "", "-1", "0,-1,1"].map(picked_gpus), [2, 2, 0, 0, 1]);
        assert!(seconds("-1").is_err() && seconds("inf").is_err() && seconds("soon").is_err());
    }
}
