//! Ranks that are processes and talk over sockets.
//!
//! A collective's first messages leave when it is called; a thread of the group does the rest while this rank computes (`crew`).
//!
//! Invariant: the collectives of a group are carried out in the order in which they were called. A tensor is lent to the threads that
//! write until its messages are written, and only then written to. Every wait ends: by its deadline, by a failure on any rank, or well.

use crate::comm::call::{self, Call, Operation, Seat};
use crate::comm::crew::{self, Crew, Done, Near, Work, give_up, mismatch, others, prefix, what};
use crate::comm::frame::{Header, Payload, Phase};
use crate::comm::mesh::{Address, Mesh, Sent};
use crate::comm::{Group, Pending, Reduction};
use crate::device::memory::Memory;
use crate::device::tensor::Tensor;
use crate::rng::fnv1a;
use anyhow::{Context, Result, anyhow};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// One rank's handle of a group whose members reach each other over a mesh.
pub struct Tcp {
    mesh: Arc<Mesh>,
    seat: Arc<Seat>,
    near: Arc<Near>,
    id: u64,
    calls: AtomicU64,
    /// Whether there has been a collective of a tensor.
    begun: AtomicBool,
    /// How many sends to, and receives from, each member there have been.
    sends: Vec<AtomicU64>,
    receives: Vec<AtomicU64>,
    worker: Sender<Work>,
}

impl Tcp {
    /// Every member makes the group with the same name and members (ranks of the world, in the group's rank order).
    pub fn new(mesh: Arc<Mesh>, members: &[usize], name: &str, world: usize) -> Result<Tcp> {
        let seat = Arc::new(Seat::new(name, mesh.hub.rank, members, world)?);
        let id = fnv1a(format!("{name} {members:?}").as_bytes());
        let (worker, queue) = channel();
        let near = Arc::new(Near::new());
        let crew = Crew::new(mesh.hub.clone(), seat.clone(), near.clone());
        let thread = std::thread::Builder::new().name(format!("group-{name}"));
        thread.spawn(move || crew.work(queue)).with_context(|| format!("starting the thread of group {name:?}"))?;
        let counters = || members.iter().map(|_| AtomicU64::new(0)).collect();
        Ok(Tcp {
            mesh,
            seat,
            near,
            id,
            calls: AtomicU64::new(0),
            begun: AtomicBool::new(false),
            sends: counters(),
            receives: counters(),
            worker,
        })
    }

    fn header(&self, call: Call) -> Header {
        Header { group: self.id, phase: Phase::Scatter, number: self.calls.fetch_add(1, Ordering::Relaxed), call }
    }

    fn collective(&self, operation: Operation, x: Tensor) -> Result<Pending> {
        let call = Call::new(operation, &x, self.seat.size())?;
        if call::is_dry(&x) {
            return Ok(Pending::ready(x));
        }
        let header = self.header(call);
        let (x, sent, done) = (Arc::new(x), Arc::new(Sent::default()), Arc::new(Done::default()));
        let first = !self.begun.swap(true, Ordering::Relaxed);
        let posted = crew::post(&self.mesh.hub, &self.seat, &self.near, &header, &x, first, &sent)?;
        let work = Work { header, x, sent, done: done.clone(), first, posted };
        self.worker.send(work).map_err(|_| anyhow!("{}: the thread of this group has ended", prefix(&self.seat, &header)))?;
        let (hub, seat) = (self.mesh.hub.clone(), self.seat.clone());
        Ok(Pending::later(move || {
            let until = Instant::now() + hub.deadline;
            let outcome = || hub.wait_for(until, || done.outcome.lock().unwrap_or_else(PoisonError::into_inner).take());
            let outcome = hub.waiting(what(&header), &done.awaited, outcome);
            outcome.and_then(|outcome| outcome).map_err(|ending| give_up(&hub, &seat, &header, ending, hub.missing(&done.awaited)))
        }))
    }
}

impl Group for Tcp {
    fn size(&self) -> usize {
        self.seat.size()
    }

    fn rank(&self) -> usize {
        self.seat.rank
    }

    fn all_reduce(&self, x: Tensor, reduction: Reduction) -> Result<Pending> {
        self.collective(Operation::AllReduce(reduction), x)
    }

    fn reduce_scatter(&self, x: Tensor, reduction: Reduction) -> Result<Pending> {
        self.collective(Operation::ReduceScatter(reduction), x)
    }

    fn all_gather(&self, x: Tensor) -> Result<Pending> {
        self.collective(Operation::AllGather, x)
    }

    fn all_to_all(&self, x: Tensor) -> Result<Pending> {
        self.collective(Operation::AllToAll, x)
    }

    fn send(&self, to: usize, x: Tensor) -> Result<Pending> {
        assert!(to < self.seat.size() && to != self.seat.rank, "{} sends to {to}", self.seat);
        let call = Call::new(Operation::Send, &x, self.seat.size())?;
        if call::is_dry(&x) {
            return Ok(Pending::ready(x));
        }
        let header = Header { group: self.id, phase: Phase::Point, number: self.sends[to].fetch_add(1, Ordering::Relaxed), call };
        let (x, sent) = (Arc::new(x), Arc::new(Sent::default()));
        let payload = Payload::Tensor(x.clone(), 0..call::bytes(&x).len());
        self.mesh.hub.send(self.seat.members[to], header, payload, &sent).with_context(|| prefix(&self.seat, &header))?;
        let (hub, seat) = (self.mesh.hub.clone(), self.seat.clone());
        Ok(Pending::later(move || {
            let until = Instant::now() + hub.deadline;
            // Nothing is to come from there, but others may ask whom this rank waits for.
            let peer = Address { group: header.group, phase: Phase::Goodbye, number: header.number, from: seat.members[to] };
            let awaited = Arc::new(Mutex::new(vec![peer]));
            let written = hub.waiting(what(&header), &awaited, || hub.all_sent(&sent, Some(until)));
            written.map_err(|ending| give_up(&hub, &seat, &header, ending, vec![seat.members[to]]))?;
            Ok(Arc::try_unwrap(x).expect("a tensor is let go before its last message counts as written"))
        }))
    }

    fn receive(&self, from: usize, mut x: Tensor) -> Result<Pending> {
        assert!(from < self.seat.size() && from != self.seat.rank, "{} receives from {from}", self.seat);
        let call = Call::new(Operation::Receive, &x, self.seat.size())?;
        if call::is_dry(&x) {
            return Ok(Pending::ready(x));
        }
        let header = Header { group: self.id, phase: Phase::Point, number: self.receives[from].fetch_add(1, Ordering::Relaxed), call };
        let address = Address { group: self.id, phase: Phase::Point, number: header.number, from: self.seat.members[from] };
        let (hub, seat) = (self.mesh.hub.clone(), self.seat.clone());
        Ok(Pending::later(move || {
            let until = Instant::now() + hub.deadline;
            let awaited = Arc::new(Mutex::new(vec![address]));
            let taken = hub.waiting(what(&header), &awaited, || hub.take(address, Some(until))).and_then(|parcel| {
                let same = parcel.header.call.tensor == call.tensor;
                if same { Ok(parcel) } else { Err(mismatch(&hub, &seat, &header, from, parcel.header.call)) }
            });
            let parcel = taken.map_err(|ending| give_up(&hub, &seat, &header, ending, vec![seat.members[from]]))?;
            call::bytes_mut(&mut x).copy_from_slice(parcel.buffer.bytes());
            Ok(x)
        }))
    }

    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (hub, seat) = (&self.mesh.hub, &self.seat);
        let header = self.header(Call::EXCHANGE);
        let mut buffer = Memory::allocate(&hub.memory, mine.len());
        buffer.bytes_mut().copy_from_slice(mine);
        let (buffer, sent, until) = (Arc::new(buffer), Arc::new(Sent::default()), Instant::now() + hub.deadline);
        for peer in others(seat) {
            let posted = hub.send(seat.members[peer], header, Payload::Buffer(buffer.clone()), &sent);
            posted.with_context(|| prefix(seat, &header))?;
        }
        let address = |from: usize| Address { group: self.id, phase: header.phase, number: header.number, from: seat.members[from] };
        let awaited = Arc::new(Mutex::new(others(seat).map(address).collect::<Vec<_>>()));
        let mut all = vec![mine.to_vec(); seat.size()];
        for from in others(seat) {
            let parcel = hub.waiting(what(&header), &awaited, || hub.take(address(from), Some(until))).and_then(|parcel| {
                let same = parcel.header.call == header.call;
                if same { Ok(parcel) } else { Err(mismatch(hub, seat, &header, from, parcel.header.call)) }
            });
            let parcel = parcel.map_err(|ending| give_up(hub, seat, &header, ending, hub.missing(&awaited)))?;
            awaited.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| *other != address(from));
            all[from] = parcel.buffer.bytes().to_vec();
        }
        // Whoever comes back from here may leave: what others need of it must be on its way.
        hub.all_sent(&sent, Some(until)).map_err(|ending| give_up(hub, seat, &header, ending, Vec::new()))?;
        Ok(all)
    }
}
