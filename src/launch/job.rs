//! What this node's launcher is to do, checked; and the environment of each rank.
//!
//! Invariant: ranks are dealt to nodes in order, `rank = node * ranks_per_node + local_rank`, and all variables agree on it.

use crate::launch::options::{LaunchOptions, Streams};
use crate::launch::requests;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

/// torchrun's port, where several nodes must know one without having talked.
const DEFAULT_PORT: u16 = 29500;

pub struct Job {
    pub ranks_per_node: usize,
    pub nodes: usize,
    pub node: usize,
    master_addr: String,
    /// None: a free one, drawn for each attempt.
    master_port: Option<u16>,
    pub max_restarts: u64,
    pub monitor_interval: Duration,
    pub shutdown_timeout: Duration,
    pub log_dir: Option<PathBuf>,
    redirects: Option<Streams>,
    tee: Option<Streams>,
    shown: BTreeSet<usize>,
    pub signals: Vec<i32>,
    token: Option<String>,
    run_id: String,
}

/// Where stdout, or stderr, of one rank goes.
pub struct Ways {
    pub to_console: bool,
    pub to_file: bool,
}

impl Job {
    pub fn new(options: LaunchOptions) -> Result<Job> {
        let ranks_per_node = options.nproc_per_node.count(options.visible_gpus.as_deref())?;
        let nodes = options.nnodes.0;
        let node = if options.standalone { 0 } else { options.node_rank };
        ensure!(!(options.standalone && nodes > 1), "--standalone is for one node, but --nnodes is {nodes}: leave one of them out");
        ensure!(node < nodes, "--node-rank {node} of --nnodes {nodes}: nodes count from 0, so {} is the last", nodes - 1);
        ensure!(nodes == 1 || options.master_addr.is_some(), "{nodes} nodes must know where node 0 is: give --master-addr ADDRESS");
        ensure!(
            nodes == 1 || options.master_port != Some(0),
            "--master-port 0 asks for a free port, which {nodes} nodes cannot agree on: name one, such as {DEFAULT_PORT}"
        );
        for (flag, streams) in [("--redirects", &options.redirects), ("--tee", &options.tee)] {
            let files = streams.as_ref().is_some_and(|streams| !streams.are_none());
            ensure!(
                !files || options.log_dir.is_some(),
                "{flag} writes files: say where with --log-dir DIR (without it, the console shows every rank)"
            );
        }
        if let Some(rank) = options.local_ranks_filter.iter().find(|rank| **rank >= ranks_per_node) {
            bail!("--local-ranks-filter names {rank}, but this node has local ranks 0 to {}", ranks_per_node - 1);
        }
        let (master_addr, master_port) = if options.standalone { (None, None) } else { (options.master_addr, options.master_port) };
        let all = (0..ranks_per_node).collect();
        Ok(Job {
            ranks_per_node,
            nodes,
            node,
            master_addr: master_addr.unwrap_or_else(|| "127.0.0.1".to_owned()),
            master_port: if nodes > 1 { Some(master_port.unwrap_or(DEFAULT_PORT)) } else { master_port.filter(|port| *port != 0) },
            max_restarts: options.max_restarts,
            monitor_interval: options.monitor_interval,
            shutdown_timeout: options.shutdown_timeout,
            log_dir: options.log_dir,
            redirects: options.redirects,
            tee: options.tee,
            shown: if options.local_ranks_filter.is_empty() { all } else { options.local_ranks_filter.into_iter().collect() },
            signals: options.signals_to_handle,
            token: options.job_token,
            // Launchers that have not talked cannot share a name that one of them drew.
            run_id: if nodes == 1 { random_hex(8)? } else { "none".to_owned() },
        })
    }

    pub fn world(&self) -> usize {
        self.nodes * self.ranks_per_node
    }

    pub fn rank(&self, local_rank: usize) -> usize {
        self.node * self.ranks_per_node + local_rank
    }

    /// Whether nobody can give the ranks of this job a secret in common.
    pub fn lacks_token(&self) -> bool {
        self.nodes > 1 && self.token.is_none()
    }

    /// Where an attempt's files of a rank are. Nodes may share a file system, so they get folders of their own.
    pub fn folder(&self, attempt: u64, local_rank: usize) -> Option<PathBuf> {
        let mut folder = self.log_dir.clone()?;
        if self.nodes > 1 {
            folder.push(format!("node_{}", self.node));
        }
        Some(folder.join(format!("attempt_{attempt}")).join(local_rank.to_string()))
    }

    pub fn stdout(&self, local_rank: usize) -> Ways {
        self.ways(local_rank, Streams::stdout)
    }

    pub fn stderr(&self, local_rank: usize) -> Ways {
        self.ways(local_rank, Streams::stderr)
    }

    fn ways(&self, local_rank: usize, includes: fn(&Streams, usize) -> bool) -> Ways {
        let named = |streams: &Option<Streams>| streams.as_ref().is_some_and(|streams| includes(streams, local_rank));
        let (redirected, teed) = (named(&self.redirects), named(&self.tee));
        let neither_is_given = self.redirects.is_none() && self.tee.is_none();
        Ways {
            to_console: self.shown.contains(&local_rank) && (teed || !redirected),
            to_file: self.log_dir.is_some() && (neither_is_given || redirected || teed),
        }
    }

    /// What all ranks of one attempt have in common.
    pub fn meeting(&self) -> Result<Meeting> {
        let port = match self.master_port {
            Some(port) => port,
            None => free_port()?,
        };
        // A new secret for each attempt also keeps a rank of the last one out, should it have survived.
        let token = match &self.token {
            Some(token) => Some(token.clone()),
            None if self.nodes == 1 => Some(random_hex(16)?),
            None => None,
        };
        Ok(Meeting { port, token })
    }

    /// The variables that torchrun sets, and the job's secret.
    pub fn variables(&self, meeting: &Meeting, attempt: u64, local_rank: usize) -> Vec<(&'static str, String)> {
        let rank = self.rank(local_rank).to_string();
        let world = self.world().to_string();
        let signals: Vec<String> = self.signals.iter().map(|signal| requests::name(*signal)).collect();
        // Empty where there is no folder, so that a file named by an outer launcher is not taken for ours.
        let error_file = self.error_file(attempt, local_rank).map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
        let mut variables = vec![
            ("RANK", rank.clone()),
            ("LOCAL_RANK", local_rank.to_string()),
            ("WORLD_SIZE", world.clone()),
            ("LOCAL_WORLD_SIZE", self.ranks_per_node.to_string()),
            ("GROUP_RANK", self.node.to_string()),
            ("GROUP_WORLD_SIZE", self.nodes.to_string()),
            ("ROLE_NAME", "default".to_owned()),
            ("ROLE_RANK", rank),
            ("ROLE_WORLD_SIZE", world),
            ("MASTER_ADDR", self.master_addr.clone()),
            ("MASTER_PORT", meeting.port.to_string()),
            ("TORCHELASTIC_RESTART_COUNT", attempt.to_string()),
            ("TORCHELASTIC_MAX_RESTARTS", self.max_restarts.to_string()),
            ("TORCHELASTIC_RUN_ID", self.run_id.clone()),
            ("TORCHELASTIC_USE_AGENT_STORE", "False".to_owned()),
            ("TORCHELASTIC_SIGNALS_TO_HANDLE", signals.join(",")),
            ("TORCHELASTIC_ERROR_FILE", error_file),
        ];
        variables.extend(meeting.token.clone().map(|token| ("FERROTRON_JOB_TOKEN", token)));
        variables
    }

    /// Where a rank says why it failed.
    pub fn error_file(&self, attempt: u64, local_rank: usize) -> Option<PathBuf> {
        self.folder(attempt, local_rank).map(|folder| folder.join("error.json"))
    }
}

/// Where the ranks of one attempt meet, and the secret by which they know each other.
pub struct Meeting {
    port: u16,
    token: Option<String>,
}

/// A port that nobody listens on now. Rank 0 binds it a moment later; until then somebody else could.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("0.0.0.0", 0)).context("looking for a free port")?;
    Ok(listener.local_addr().context("looking for a free port")?.port())
}

fn random_hex(bytes: usize) -> Result<String> {
    let path = "/dev/urandom";
    let mut random = vec![0; bytes];
    File::open(path).and_then(|mut file| file.read_exact(&mut random)).with_context(|| format!("reading {path}"))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: LaunchOptions,
    }

    fn job(line: &str) -> Result<Job> {
        let words = ["launch"].into_iter().chain(line.split_whitespace());
        Job::new(Line::try_parse_from(words)?.options)
    }

    fn variable(job: &Job, local_rank: usize, name: &str) -> String {
        let meeting = job.meeting().expect("a port and a token");
        let all = job.variables(&meeting, 2, local_rank);
        all.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone()).unwrap_or_default()
    }

    #[test]
    fn ranks_are_dealt_to_nodes_in_order() {
        let job = job("--nproc-per-node 4 --nnodes 2 --node_rank 1 --master-addr head --log-dir logs").expect("consistent flags");
        let expected = [
            ("RANK", "6"),
            ("LOCAL_RANK", "2"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("GROUP_RANK", "1"),
            ("GROUP_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "head"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
            ("TORCHELASTIC_RUN_ID", "none"),
            ("TORCHELASTIC_ERROR_FILE", "logs/node_1/attempt_2/2/error.json"),
        ];
        for (name, value) in expected {
            assert_eq!(variable(&job, 2, name), value, "{name}");
        }
        assert!(job.lacks_token() && variable(&job, 2, "FERROTRON_JOB_TOKEN").is_empty());
    }

    #[test]
    fn one_node_needs_nothing_said() {
        let job = job("--nproc-per-node 2").expect("consistent flags");
        assert_eq!(variable(&job, 1, "MASTER_ADDR"), "127.0.0.1");
        assert_ne!(variable(&job, 1, "MASTER_PORT"), "0");
        assert_eq!(variable(&job, 1, "FERROTRON_JOB_TOKEN").len(), 32);
        assert_eq!(variable(&job, 1, "TORCHELASTIC_ERROR_FILE"), "");
    }

    #[test]
    fn flags_that_contradict_each_other_are_named() {
        let cases = [
            ("--nnodes 2", "--master-addr"),
            ("--nnodes 2 --node-rank 2 --master-addr a", "--node-rank 2"),
            ("--nnodes 2 --standalone", "--standalone"),
            ("--nnodes 2 --master-addr a --master-port 0", "--master-port 0"),
            ("--tee 3", "--log-dir"),
            ("--nproc-per-node 2 --local-ranks-filter 0,2", "local ranks 0 to 1"),
            ("--signals-to-handle SIGKILL", "SIGTERM"),
            ("--nproc-per-node many", "auto"),
        ];
        for (line, word) in cases {
            let error = job(line).err().unwrap_or_else(|| panic!("`{line}` is wrong")).to_string();
            assert!(error.contains(word), "`{line}`: {error}");
        }
    }

    #[test]
    fn output_goes_where_it_was_sent() {
        let ways = |line: &str, local: usize| {
            let job = job(line).expect("consistent flags");
            (job.stdout(local).to_console, job.stdout(local).to_file)
        };
        assert_eq!(ways("", 0), (true, false));
        assert_eq!(ways("--log-dir d", 0), (true, true));
        assert_eq!(ways("--log-dir d --redirects 1", 0), (false, true));
        assert_eq!(ways("--log-dir d --redirects 2", 0), (true, false));
        assert_eq!(ways("--log-dir d --tee 3", 0), (true, true));
        assert_eq!(ways("--log-dir d --nproc-per-node 2 --local-ranks-filter 1", 0), (false, true));
    }
}
