//! How a rank comes by its groups: it joins the world, then asks for each group by name and members.
//!
//! Invariant: a group of one is `Solo` on every transport, every group is metered, and all members ask for their groups in any order.

use crate::comm::Group;
use crate::comm::call::Seat;
use crate::comm::door::Job;
use crate::comm::mesh::Mesh;
use crate::comm::metered::{Meter, Metered};
use crate::comm::rehearsal::Rehearsal;
use crate::comm::rendezvous::Rendezvous;
use crate::comm::solo::Solo;
use crate::comm::staged::Staged;
use crate::comm::store::Store;
use crate::comm::tcp::Tcp;
use crate::comm::threads::Threads;
use crate::device::Device;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

/// How the ranks of a world reach each other.
#[derive(Clone)]
pub enum Transport {
    Threads(Arc<Threads>),
    Tcp(Arc<Mesh>),
    /// Nobody else is there: for devices without numbers.
    Rehearsal,
}

/// One rank's groups and what they have carried.
pub struct Groups {
    groups: BTreeMap<String, Arc<dyn Group>>,
    meters: Vec<Arc<Meter>>,
}

impl Groups {
    /// `wanted`: the name of each group that `rank` is in, and its members (ranks of the world, in the group's rank order).
    pub fn connect(transport: &Transport, rank: usize, world: usize, wanted: &[(String, Vec<usize>)]) -> Result<Groups> {
        let mut made = Groups { groups: BTreeMap::new(), meters: Vec::new() };
        // Tensors of a GPU go through its memory.
        let host = Device::cpu(1);
        for (name, members) in wanted {
            let seat = Seat::new(name, rank, members, world)?;
            let inner: Arc<dyn Group> = match transport {
                _ if seat.size() == 1 => Arc::new(Solo),
                Transport::Threads(threads) => Arc::new(Staged::new(threads.group(rank, members, name)?, host.clone())),
                Transport::Tcp(mesh) => Arc::new(Staged::new(Arc::new(Tcp::new(mesh.clone(), members, name, world)?), host.clone())),
                Transport::Rehearsal => Arc::new(Rehearsal { size: seat.size(), rank: seat.rank }),
            };
            let meter = Meter::new(name);
            made.meters.push(meter.clone());
            let twice = made.groups.insert(name.clone(), Arc::new(Metered::new(inner, meter)));
            assert!(twice.is_none(), "two groups of the name {name:?}");
        }
        Ok(made)
    }

    pub fn get(&self, name: &str) -> Arc<dyn Group> {
        let known = || self.groups.keys().cloned().collect::<Vec<_>>().join(", ");
        self.groups.get(name).unwrap_or_else(|| panic!("a group of the name {name:?}, there are {}", known())).clone()
    }

    /// In the order in which the groups were wanted.
    pub fn meters(&self) -> &[Arc<Meter>] {
        &self.meters
    }
}

/// A rank's membership in a world of processes. It is dropped last, after everything that talks to other ranks.
pub struct World {
    pub mesh: Arc<Mesh>,
    pub store: Arc<Store>,
    /// On rank 0.
    rendezvous: Option<Rendezvous>,
}

impl World {
    /// Rank 0 opens the rendezvous, on `listener` if its launcher has bound one; all ranks join it at `address` (`host:port`). Returns
    /// when all have joined, which must happen within `joining`; from then on every single wait has `deadline`.
    ///
    /// `ip`: where other ranks reach this one, if that is not the address by which it reaches the rendezvous.
    pub fn join(
        address: &str,
        listener: Option<TcpListener>,
        job: &Job,
        rank: usize,
        ip: Option<IpAddr>,
        joining: Duration,
        deadline: Duration,
    ) -> Result<World> {
        let (host, port) = address.rsplit_once(':').with_context(|| format!("{address:?} is not host:port"))?;
        let port: u16 = port.parse().with_context(|| format!("{port:?}, the port of {address:?}, is not a number up to 65535"))?;
        // A name of this host may stand for a loopback address here and for another one elsewhere: unless it is loopback for everybody,
        // rank 0 is heard on all addresses. The door refuses strangers.
        let here_only = host == "localhost" || host.trim_matches(['[', ']']).parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        let everywhere = IpAddr::from([0, 0, 0, 0]);
        let rendezvous = if rank == 0 {
            let bind = || if here_only { TcpListener::bind(address) } else { TcpListener::bind((everywhere, port)) };
            let bind = || bind().with_context(|| format!("rank 0 listens for the other ranks on {address}"));
            Some(Rendezvous::open(listener.map_or_else(bind, Ok)?, job.clone())?)
        } else {
            None
        };
        let store = Arc::new(Store::connect(address, job, rank, joining)?);
        let ip = match ip {
            None if !here_only && store.route()?.0.is_loopback() => Some(everywhere),
            known => known,
        };
        let mesh = Arc::new(Mesh::join(store.clone(), job.clone(), ip, deadline)?);
        let world = World { mesh, store, rendezvous };
        world.store.barrier("joined", joining).context("not all ranks of the job have come")?;
        Ok(world)
    }

    pub fn transport(&self) -> Transport {
        Transport::Tcp(self.mesh.clone())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.store.fail(&format!("rank {} panicked", self.store.rank()));
        }
        let peaceful = self.store.failure().is_none() && !std::thread::panicking();
        if peaceful {
            self.store.leave();
        }
        if let (Some(rendezvous), true) = (&self.rendezvous, peaceful) {
            // The others may have some files to finish, and failures to tell each other.
            rendezvous.wait_until_left(Duration::from_secs(10));
        }
    }
}
