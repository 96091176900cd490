//! The ranks of a run before they have a plan: how they find each other, and how rank 0 decides for all.
//!
//! Invariant: what `decide` returns is the same on every rank, an error too.

use crate::comm::Group;
use crate::comm::connect::{self, World};
use crate::comm::door::Job;
use crate::comm::groups::Groups;
use crate::comm::solo::Solo;
use crate::config::Config;
use crate::launch::identity::Identity;
use crate::plan::mesh::Mesh;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;

/// How long ranks wait for the last one to start.
const JOINING: Duration = Duration::from_secs(600);

/// How long a rank waits for another within a run: longer than any step or save, shorter than a night.
const DEADLINE: Duration = Duration::from_secs(600);

pub struct Team {
    /// All ranks.
    group: Arc<dyn Group>,
    rank: usize,
    /// Dropped last: what the ranks talk over.
    world: Option<World>,
}

impl Team {
    /// Finds the other ranks of the job. A process that is alone has none to find.
    pub fn join(config: &Config, identity: &Identity) -> Result<Team> {
        let rank = identity.rank;
        if identity.world == 1 {
            return Ok(Team { group: Arc::new(Solo), rank, world: None });
        }
        let port = identity.master_port + identity.master_port_taken as u16;
        let address = format!("{}:{port}", identity.master_addr);
        let id = identity.job.clone().unwrap_or_else(|| config.run.name.clone());
        // Without a launcher's secret the job's name keeps apart what has strayed in, not what means harm.
        let token = identity.token.clone().unwrap_or_else(|| id.clone());
        let job = Job::new(&id, &token, &config.to_toml(), identity.world);
        let world = World::join(&address, None, &job, rank, None, JOINING, DEADLINE)
            .with_context(|| format!("rank {rank} of {} joins the others at {address}", identity.world))?;
        let all = [("all".to_string(), (0..identity.world).collect())];
        let group = connect::Groups::connect(&world.transport(), rank, identity.world, &all)?.get("all");
        Ok(Team { group, rank, world: Some(world) })
    }

    /// The groups of this rank in a mesh of the whole world.
    pub fn groups(&self, mesh: &Mesh) -> Result<Groups> {
        match &self.world {
            None => Ok(Groups::solo()),
            Some(world) => Groups::connect(&world.transport(), mesh, self.rank),
        }
    }

    /// Tells the other ranks why this one gives up, so that they need not find out by waiting.
    pub fn fail(&self, error: &anyhow::Error) {
        if let Some(world) = &self.world {
            world.store.fail(&format!("rank {}: {error:#}", self.rank));
        }
    }

    /// Rank 0 does `work`; all ranks get what came of it.
    pub fn decide<T: Serialize + DeserializeOwned>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.rank == 0 {
            let decision = work();
            let told = decision.as_ref().map_err(|error| format!("{error:#}"));
            self.group.exchange(&serde_json::to_vec(&told)?)?;
            return decision;
        }
        let told = self.group.exchange(&[])?.swap_remove(0);
        match serde_json::from_slice::<Result<T, String>>(&told).context("what rank 0 decided")? {
            Ok(decision) => Ok(decision),
            Err(error) => bail!("rank 0 gave up: {error}"),
        }
    }

    /// The least of what each rank gives.
    pub fn least(&self, mine: u64) -> Result<u64> {
        let all = self.group.exchange(&mine.to_le_bytes())?;
        let numbers = all.iter().map(|bytes| Ok(u64::from_le_bytes(bytes.as_slice().try_into().context("a number of another rank")?)));
        let numbers: Vec<u64> = numbers.collect::<Result<_>>()?;
        Ok(numbers.into_iter().min().unwrap_or(mine))
    }

    /// What each rank of this one's host gives, in the order of their local ranks. `node`: the number of the host.
    pub fn on_this_host(&self, node: usize, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut message = (node as u64).to_le_bytes().to_vec();
        message.extend(mine);
        let all = self.group.exchange(&message)?;
        let here = all.iter().filter_map(|other| other.strip_prefix(&message[..8]));
        Ok(here.map(<[u8]>::to_vec).collect())
    }

    /// Rank 0 does `work` first, then the others do.
    pub fn first_rank_first<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.rank == 0 {
            let made = work();
            self.decide(|| made.as_ref().map(drop).map_err(|error| anyhow::anyhow!("{error:#}")))?;
            return made;
        }
        self.decide(|| Ok(()))?;
        work()
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        // The groups of the transport end before the transport does.
        self.group = Arc::new(Solo);
        drop(self.world.take());
    }
}
