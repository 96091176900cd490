//! Which rank this process is, from what its launcher put into the environment. The only reader of the environment.
//!
//! In order: `RANK`, `LOCAL_RANK` and `WORLD_SIZE` (our `launch`, torchrun, DeepSpeed); the step variables of Slurm; Open MPI; MPICH;
//! else the process is alone.
//!
//! Invariant: an `Identity` is consistent (rank < world, and so on), and says in words where it was found. Sources that name
//! different ranks are an error, never a choice: a wrong guess is a job that waits for ever.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Variables by name. Taken as a value, so that everything that depends on them can be tested.
pub type Environment = BTreeMap<String, String>;

/// torchrun's port, where nobody names one.
const DEFAULT_PORT: u16 = 29500;

/// More hosts than any job has: a limit to what a hostlist may expand to.
const MOST_HOSTS: usize = 1 << 18;

/// The environment of this process. Values that are not UTF-8 are read with replacement characters.
pub fn environment() -> Environment {
    std::env::vars_os().map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned())).collect()
}

/// The file of the program that runs.
pub fn program() -> Result<PathBuf> {
    std::env::current_exe().context("finding this program's own file")
}

/// Whether to color what is printed; `terminal`: whether it goes to one.
pub fn wants_color(environment: &Environment, terminal: bool) -> bool {
    let set = |name: &str| environment.get(name).is_some_and(|value| !value.is_empty());
    terminal && !set("NO_COLOR") && environment.get("TERM").is_none_or(|term| term != "dumb")
}

/// Folders in which libraries of CUDA may be, from variables.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CudaPlaces {
    /// Where the user points: `FERROTRON_CUDA_LIBRARIES`, with `:` between folders.
    pub given: Vec<PathBuf>,
    /// Active Python environments, whose packages may bring libraries along.
    pub environments: Vec<PathBuf>,
}

impl CudaPlaces {
    pub fn detect(environment: &Environment) -> CudaPlaces {
        let variables = Variables(environment);
        let given = variables.get("FERROTRON_CUDA_LIBRARIES").unwrap_or_default().split(':').filter(|folder| !folder.is_empty());
        let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(|name| variables.get(name));
        CudaPlaces { given: given.map(PathBuf::from).collect(), environments: environments.map(PathBuf::from).collect() }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    pub rank: usize,
    /// Among the ranks of this node. Not `rank` modulo anything: Slurm may deal ranks to nodes in turn.
    pub local_rank: usize,
    pub world: usize,
    /// Ranks on this node.
    pub local_world: usize,
    pub node_rank: usize,
    /// Where rank 0 can be reached.
    pub master_addr: String,
    pub master_port: u16,
    /// Whether the launcher itself listens on `master_port` (torchrun does), so that rank 0 must take another.
    pub master_port_taken: bool,
    /// How often the job had been started before, by its launcher and by its cluster.
    pub restarts: u64,
    /// The name by which the launcher or the cluster knows the job.
    pub job: Option<String>,
    /// The secret by which the launcher lets ranks know each other.
    pub token: Option<String>,
    /// When the cluster will end the job, in seconds since 1970.
    pub ends_at: Option<u64>,
    /// Where the launcher wants to read why a rank failed.
    pub error_file: Option<PathBuf>,
    /// How this was found, in words.
    pub source: String,
}

impl Identity {
    pub fn detect(environment: &Environment) -> Result<Identity> {
        let variables = Variables(environment);
        let slurm = variables.slurm_step()?;
        let found = match (variables.launcher(slurm.as_ref())?, slurm) {
            (Some(launcher), slurm) => {
                // Inside a launcher's node (it sets GROUP_RANK) the Slurm task is the launcher, and its number that of the node.
                if let Some(slurm) = slurm.filter(|_| !variables.has("GROUP_RANK")) {
                    agree(&launcher, &slurm)?;
                }
                launcher
            }
            (None, Some(slurm)) => slurm,
            (None, None) => match variables.mpi()? {
                Some(mpi) => mpi,
                None => variables.alone(),
            },
        };
        found.check()?;
        Ok(found)
    }

    /// `rank 3 of 8 (RANK, LOCAL_RANK and WORLD_SIZE)`.
    pub fn describe(&self) -> String {
        format!("rank {} of {} ({})", self.rank, self.world, self.source)
    }

    fn check(&self) -> Result<()> {
        let Identity { rank, world, local_rank, local_world, source, .. } = self;
        ensure!(rank < world, "rank {rank} of a world of {world}: ranks count from 0 ({source})");
        ensure!(local_rank < local_world, "local rank {local_rank} of {local_world} on this node: ranks count from 0 ({source})");
        ensure!(local_world <= world, "{local_world} ranks on this node, but {world} in the world ({source})");
        Ok(())
    }
}

fn agree(one: &Identity, other: &Identity) -> Result<()> {
    let (a, b) = ((one.rank, one.local_rank, one.world), (other.rank, other.local_rank, other.world));
    if a != b {
        bail!(
            "two sources disagree on who this process is: {} say rank {}, local rank {}, world {}, but the {} says rank {}, local rank {}, \
             world {}; unset one of them",
            one.source,
            a.0,
            a.1,
            a.2,
            other.source,
            b.0,
            b.1,
            b.2
        );
    }
    Ok(())
}

struct Variables<'a>(&'a Environment);

impl Variables<'_> {
    /// A variable that is empty is one that is not set.
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.get(name) else { return Ok(None) };
        let number = text.parse().ok().with_context(|| format!("the variable {name} is \"{text}\", not a whole number in range"))?;
        Ok(Some(number))
    }

    fn needed<T: std::str::FromStr>(&self, name: &str, because: &str) -> Result<T> {
        self.number(name)?.with_context(|| format!("the variable {name} is not set, though {because}"))
    }

    /// The job's name and limits, which do not depend on who named the rank.
    fn identity(&self, source: impl Into<String>) -> Result<Identity> {
        let restarts = |name: &str| self.number::<u64>(name).map(Option::unwrap_or_default);
        Ok(Identity {
            rank: 0,
            local_rank: 0,
            world: 1,
            local_world: 1,
            node_rank: 0,
            master_addr: "127.0.0.1".to_string(),
            master_port: self.number("MASTER_PORT")?.unwrap_or(DEFAULT_PORT),
            master_port_taken: self.get("TORCHELASTIC_USE_AGENT_STORE") == Some("True"),
            restarts: restarts("TORCHELASTIC_RESTART_COUNT")? + restarts("SLURM_RESTART_COUNT")?,
            token: self.get("FERROTRON_JOB_TOKEN").map(str::to_string),
            job: self.get("TORCHELASTIC_RUN_ID").filter(|id| *id != "none").or_else(|| self.get("SLURM_JOB_ID")).map(str::to_string),
            ends_at: self.number("SLURM_JOB_END_TIME")?,
            error_file: self.get("TORCHELASTIC_ERROR_FILE").map(PathBuf::from),
            source: source.into(),
        })
    }

    fn alone(&self) -> Identity {
        // A batch shell has a rank of its job's tasks without being one of them.
        let shell = self.has("SLURM_JOB_ID") && !self.has("SLURM_STEP_ID");
        let source = if shell { "alone: a shell of Slurm is no rank; start ranks with srun or ferrotron launch" } else { "alone" };
        let only = Environment::new();
        let mut identity = Variables(&only).identity(source).expect("without variables there is nothing to misread");
        identity.job = self.get("SLURM_JOB_ID").map(str::to_string);
        identity
    }

    /// `RANK`, `LOCAL_RANK` and `WORLD_SIZE`.
    fn launcher(&self, slurm: Option<&Identity>) -> Result<Option<Identity>> {
        let names = ["RANK", "WORLD_SIZE", "LOCAL_RANK"];
        let missing: Vec<&str> = names.into_iter().filter(|name| !self.has(name)).collect();
        match missing[..] {
            [] => {}
            [_, _, _] => return Ok(None),
            ["LOCAL_RANK"] => return self.ranks_of_nodes(slurm),
            _ => bail!("of the variables RANK, LOCAL_RANK and WORLD_SIZE, {} is not set: set all three or none", missing.join(" and ")),
        }
        let because = "the others of RANK, LOCAL_RANK and WORLD_SIZE are";
        let mut identity = self.identity("RANK, LOCAL_RANK and WORLD_SIZE")?;
        identity.rank = self.needed("RANK", because)?;
        identity.local_rank = self.needed("LOCAL_RANK", because)?;
        identity.world = self.needed("WORLD_SIZE", because)?;
        // A launcher that does not say how many ranks a node has is taken to have one node.
        let local = match self.number("LOCAL_WORLD_SIZE")? {
            None => self.number("LOCAL_SIZE")?,
            given => given,
        };
        identity.local_world = local.unwrap_or(identity.world);
        identity.node_rank = self.number("GROUP_RANK")?.unwrap_or(identity.rank / identity.local_world.max(1));
        self.reach_master(&mut identity)?;
        Ok(Some(identity))
    }

    /// `RANK` and `WORLD_SIZE` without `LOCAL_RANK` number nodes (Kubeflow) or restate what Slurm says.
    fn ranks_of_nodes(&self, slurm: Option<&Identity>) -> Result<Option<Identity>> {
        let (rank, world): (Option<usize>, Option<usize>) = (self.number("RANK")?, self.number("WORLD_SIZE")?);
        let restated = slurm.is_some_and(|slurm| Some(slurm.rank) == rank && Some(slurm.world) == world);
        if restated || world == Some(1) {
            return Ok(None);
        }
        let (rank, world) = (rank.unwrap_or_default(), world.unwrap_or_default());
        bail!(
            "RANK = {rank} and WORLD_SIZE = {world} are set without LOCAL_RANK, as where they number nodes: start the ranks of a node with \
             `ferrotron launch --nnodes {world} --node-rank {rank} --nproc-per-node N train ...`, or set LOCAL_RANK too"
        )
    }

    /// The task of a Slurm step with more than one. `SLURM_PROCID` alone proves nothing: a batch shell has it too.
    fn slurm_step(&self) -> Result<Option<Identity>> {
        let Some(step) = self.get("SLURM_STEP_ID") else { return Ok(None) };
        let because = "SLURM_STEP_ID is";
        let world: usize = self.number("SLURM_STEP_NUM_TASKS")?.unwrap_or(1);
        if world < 2 {
            return Ok(None);
        }
        let job: u64 = self.needed("SLURM_JOB_ID", because)?;
        let mut identity = self.identity(format!("Slurm step {job}.{step}"))?;
        identity.world = world;
        identity.rank = self.needed("SLURM_PROCID", because)?;
        identity.local_rank = self.needed("SLURM_LOCALID", because)?;
        identity.node_rank = self.needed("SLURM_NODEID", because)?;
        let tasks =
            self.get("SLURM_STEP_TASKS_PER_NODE").with_context(|| format!("SLURM_STEP_TASKS_PER_NODE is not set, though {because}"))?;
        let tasks = task_counts(tasks).context("reading SLURM_STEP_TASKS_PER_NODE")?;
        let node = identity.node_rank;
        let local =
            tasks.get(node).with_context(|| format!("SLURM_STEP_TASKS_PER_NODE has {} nodes, but SLURM_NODEID is {node}", tasks.len()))?;
        identity.local_world = *local;
        if !self.has("MASTER_PORT") {
            // Jobs that share a node get different ports.
            identity.master_port = 60000 + (job % 5000) as u16;
        }
        match (self.get("MASTER_ADDR"), self.get("SLURM_STEP_NODELIST").or_else(|| self.get("SLURM_JOB_NODELIST"))) {
            (Some(address), _) => identity.master_addr = address.to_string(),
            (None, Some(nodes)) => {
                let first = hosts(nodes).context("reading SLURM_STEP_NODELIST")?.into_iter().next();
                identity.master_addr = first.with_context(|| format!("the node list \"{nodes}\" names no node"))?;
            }
            (None, None) => bail!("neither MASTER_ADDR nor SLURM_STEP_NODELIST is set, though {because}"),
        }
        Ok(Some(identity))
    }

    fn mpi(&self) -> Result<Option<Identity>> {
        let open = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"];
        let mpich = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"];
        for (names, source) in [(open, "Open MPI"), (mpich, "MPICH")] {
            if !names.iter().all(|name| self.has(name)) {
                continue;
            }
            let because = "the others of its kind are";
            let mut identity = self.identity(source)?;
            identity.rank = self.needed(names[0], because)?;
            identity.world = self.needed(names[1], because)?;
            identity.local_rank = self.needed(names[2], because)?;
            identity.local_world = self.needed(names[3], because)?;
            identity.node_rank = identity.rank / identity.local_world.max(1);
            self.reach_master(&mut identity)?;
            return Ok(Some(identity));
        }
        Ok(None)
    }

    /// On one node rank 0 is here; otherwise somebody must say where it is.
    fn reach_master(&self, identity: &mut Identity) -> Result<()> {
        match self.get("MASTER_ADDR") {
            Some(address) => identity.master_addr = address.to_string(),
            None if identity.local_world < identity.world => {
                bail!("the variable MASTER_ADDR is not set: {} does not say where rank 0 of {} is", identity.source, identity.world)
            }
            None => {}
        }
        Ok(())
    }
}

/// Slurm's `2(x3),1`: 2, 2, 2, 1.
pub fn task_counts(text: &str) -> Result<Vec<usize>> {
    let mut counts = Vec::new();
    for item in text.split(',') {
        let wrong = || format!("\"{item}\" is not a number of tasks such as 2 or 2(x3)");
        let (count, times) = match item.trim().split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')').with_context(wrong)?),
            None => (item.trim(), "1"),
        };
        let (count, times): (usize, usize) = (count.parse().with_context(wrong)?, times.parse().with_context(wrong)?);
        ensure!(counts.len() + times <= MOST_HOSTS, "\"{text}\" has more than {MOST_HOSTS} nodes");
        counts.resize(counts.len() + times, count);
    }
    Ok(counts)
}

/// Slurm's hostlists: `n[01-03,7],login` is n01, n02, n03, n7, login. Several groups vary like digits, the last fastest.
pub fn hosts(list: &str) -> Result<Vec<String>> {
    let mut hosts = Vec::new();
    let (mut depth, mut start) = (0, 0);
    let ends = list.char_indices().filter(|(_, letter)| "[],".contains(*letter)).chain([(list.len(), ',')]);
    for (at, letter) in ends {
        match letter {
            '[' => depth += 1,
            ']' => depth -= 1,
            _ if depth == 0 => {
                let item = list[start..at].trim();
                if !item.is_empty() {
                    expand(item, &mut hosts).with_context(|| format!("in the node list \"{list}\""))?;
                }
                start = at + 1;
            }
            _ => {}
        }
        ensure!((0..=1).contains(&depth), "the brackets of the node list \"{list}\" do not match");
    }
    ensure!(depth == 0, "the brackets of the node list \"{list}\" do not match");
    Ok(hosts)
}

/// One item of a hostlist: text with any number of `[...]` in it.
fn expand(item: &str, hosts: &mut Vec<String>) -> Result<()> {
    let mut names = vec![String::new()];
    let mut rest = item;
    while let Some((text, after)) = rest.split_once('[') {
        let (group, after) = after.split_once(']').with_context(|| format!("\"{item}\" has a bracket that is not closed"))?;
        let numbers = numbers(group, MOST_HOSTS / names.len()).with_context(|| format!("in [{group}]"))?;
        names = names.iter().flat_map(|name| numbers.iter().map(move |number| format!("{name}{text}{number}"))).collect();
        rest = after;
    }
    names.iter_mut().for_each(|name| name.push_str(rest));
    ensure!(hosts.len() + names.len() <= MOST_HOSTS, "there are more than {MOST_HOSTS} nodes");
    hosts.append(&mut names);
    Ok(())
}

/// The inside of a bracket: `N` or `LOW-HIGH`, with commas. As many digits as LOW has, zeros in front.
fn numbers(group: &str, most: usize) -> Result<Vec<String>> {
    let mut numbers = Vec::new();
    for range in group.split(',') {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u64>().ok().filter(|_| digits).with_context(|| format!("\"{range}\" is not a number or a range of numbers"))
        };
        let (first, last, width) = (number(low)?, number(high)?, low.len());
        ensure!(first <= last, "the range \"{range}\" runs backwards");
        ensure!(last - first < (most - numbers.len()) as u64, "the range \"{range}\" has too many nodes");
        numbers.extend((first..=last).map(|number| format!("{number:0width$}")));
    }
    Ok(numbers)
}
