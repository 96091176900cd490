//! Ranks that are processes and talk over sockets.
//!
//! A collective's first messages leave when it is called; a thread of the group does the rest while this rank computes. A reduce-scatter
//! is an all-to-all of slices and a local sum in the canonical tree; an all-reduce is that and an all-gather.
//!
//! Invariant: the collectives of a group are carried out in the order in which they were called. A tensor is lent to the threads that
//! write until its messages are written, and only then written to. Every wait ends: by its deadline, by a failure on any rank, or well.

use crate::comm::call::{self, Call, Operation, Seat};
use crate::comm::frame::{Header, Payload, Phase};
use crate::comm::mesh::{Address, Awaited, Ending, Hub, Mesh, Parcel, Sent};
use crate::comm::{Group, Pending, Reduction, tree};
use crate::device::memory::Memory;
use crate::device::tensor::Tensor;
use crate::rng::fnv1a;
use anyhow::{Context, Result, anyhow};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// One rank's handle of a group whose members reach each other over a mesh.
pub struct Tcp {
    mesh: Arc<Mesh>,
    seat: Arc<Seat>,
    id: u64,
    calls: AtomicU64,
    /// How many sends to, and receives from, each member there have been.
    sends: Vec<AtomicU64>,
    receives: Vec<AtomicU64>,
    worker: Sender<Work>,
}

/// A collective on its way through the worker.
struct Work {
    header: Header,
    x: Arc<Tensor>,
    sent: Arc<Sent>,
    done: Arc<Done>,
}

/// Where the worker leaves the outcome, and for the time until then, which messages it waits for.
#[derive(Default)]
struct Done {
    outcome: Mutex<Option<Result<Tensor, Ending>>>,
    awaited: Awaited,
}

impl Tcp {
    /// Every member makes the group with the same name and members (ranks of the world, in the group's rank order).
    pub fn new(mesh: Arc<Mesh>, members: &[usize], name: &str, world: usize) -> Result<Tcp> {
        let seat = Arc::new(Seat::new(name, mesh.hub.rank, members, world)?);
        let id = fnv1a(format!("{name} {members:?}").as_bytes());
        let (worker, queue) = channel();
        let crew = Crew { hub: mesh.hub.clone(), seat: seat.clone() };
        let thread = std::thread::Builder::new().name(format!("group-{name}"));
        thread.spawn(move || crew.work(queue)).with_context(|| format!("starting the thread of group {name:?}"))?;
        let counters = || members.iter().map(|_| AtomicU64::new(0)).collect();
        Ok(Tcp { mesh, seat, id, calls: AtomicU64::new(0), sends: counters(), receives: counters(), worker })
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
        for peer in others(&self.seat) {
            // In an all-gather everybody gets my slice, in the others each peer gets its own.
            let slice = if operation == Operation::AllGather { self.seat.rank } else { peer };
            let payload = Payload::Tensor(x.clone(), call::slice_bytes(&x, self.seat.size(), slice));
            let posted = self.mesh.hub.send(self.seat.members[peer], header, payload, &sent);
            posted.with_context(|| prefix(&self.seat, &header))?;
        }
        let work = Work { header, x, sent, done: done.clone() };
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

fn others(seat: &Seat) -> impl Iterator<Item = usize> + use<> {
    let (rank, size) = (seat.rank, seat.size());
    // Each rank starts with its neighbour, so that they do not all write to the same one at once.
    (1..size).map(move |step| (rank + step) % size)
}

fn prefix(seat: &Seat, header: &Header) -> String {
    format!("{seat} in {}", what(header))
}

fn what(header: &Header) -> String {
    format!("call {}, {}", header.number, header.call)
}

/// The error of a wait that has ended badly. A deadline is a failure of the whole job, so everybody is told. `missing`: of the world.
fn give_up(hub: &Hub, seat: &Seat, header: &Header, ending: Ending, missing: Vec<usize>) -> anyhow::Error {
    let prefix = prefix(seat, header);
    match ending {
        Ending::Failure(failure) => anyhow!("{prefix}: {failure}"),
        Ending::Deadline => {
            let members = missing.iter().filter_map(|rank| seat.members.iter().position(|member| member == rank));
            let who = if missing.is_empty() { "a message of its own to be written".to_string() } else { seat.list(members) };
            let gave_up = format!("{prefix}: gave up after {:.1} s, still missing: {who}", hub.deadline.as_secs_f64());
            let sentence = format!("{gave_up}{}", hub.survey());
            let first = hub.fail(&sentence);
            // What is learnt after a failure is of ranks that are on their way out.
            if first == sentence { anyhow!(sentence) } else { anyhow!("{gave_up}; the first failure was: {first}") }
        }
    }
}

/// A message that is not the one asked for.
fn mismatch(hub: &Hub, seat: &Seat, header: &Header, from: usize, theirs: Call) -> Ending {
    let rest = format!("{} calls {theirs} instead, all ranks must make the same calls", seat.member(from));
    let sentence = format!("{}: {rest}", prefix(seat, header));
    hub.fail(&sentence);
    Ending::Failure(sentence)
}

/// What the thread of a group needs: no mesh, so that it does not keep the connections alive.
struct Crew {
    hub: Arc<Hub>,
    seat: Arc<Seat>,
}

impl Crew {
    fn work(self, queue: Receiver<Work>) {
        for Work { header, x, sent, done } in queue {
            let outcome = self.carry_out(&header, x, &sent, &done);
            *done.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            self.hub.announce();
        }
    }

    fn address(&self, header: &Header, phase: Phase, from: usize) -> Address {
        Address { group: header.group, phase, number: header.number, from: self.seat.members[from] }
    }

    /// One message of this phase from every other member, in rank order; none from this rank.
    fn gather(&self, header: &Header, phase: Phase, done: &Done) -> Result<Vec<Option<Parcel>>, Ending> {
        let addresses = others(&self.seat).map(|from| self.address(header, phase, from)).collect();
        *done.awaited.lock().unwrap_or_else(PoisonError::into_inner) = addresses;
        let mut parcels: Vec<Option<Parcel>> = (0..self.seat.size()).map(|_| None).collect();
        for from in others(&self.seat) {
            let address = self.address(header, phase, from);
            let parcel = self.hub.take(address, None)?;
            done.awaited.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| *other != address);
            if parcel.header.call != header.call {
                return Err(mismatch(&self.hub, &self.seat, header, from, parcel.header.call));
            }
            parcels[from] = Some(parcel);
        }
        Ok(parcels)
    }

    fn carry_out(&self, header: &Header, x: Arc<Tensor>, sent: &Arc<Sent>, done: &Done) -> Result<Tensor, Ending> {
        let (rank, size) = (self.seat.rank, self.seat.size());
        let mut parcels = self.gather(header, Phase::Scatter, done)?;
        let mut own = None;
        if let Operation::AllReduce(reduction) | Operation::ReduceScatter(reduction) = header.call.operation {
            let mine = &call::bytes(&x)[call::slice_bytes(&x, size, rank)];
            let inputs: Vec<&[u8]> = parcels.iter().map(|parcel| parcel.as_ref().map_or(mine, |parcel| parcel.buffer.bytes())).collect();
            let mut sum = Memory::allocate(&self.hub.memory, mine.len());
            tree::reduce(sum.bytes_mut(), &inputs, x.dtype(), reduction);
            own = Some(Arc::new(sum));
        }
        if let (Operation::AllReduce(_), Some(sum)) = (header.call.operation, &own) {
            for peer in others(&self.seat) {
                let header = Header { phase: Phase::Gather, ..*header };
                let posted = self.hub.send(self.seat.members[peer], header, Payload::Buffer(sum.clone()), sent);
                posted.map_err(|error| Ending::Failure(format!("{error:#}")))?;
            }
            parcels = self.gather(header, Phase::Gather, done)?;
        }
        if let Operation::ReduceScatter(_) = header.call.operation {
            parcels.clear();
        }
        self.hub.all_sent(sent, None)?;
        let mut x = Arc::try_unwrap(x).expect("a tensor is let go before its last message counts as written");
        for (from, parcel) in parcels.iter().enumerate() {
            if let Some(parcel) = parcel {
                let range = call::slice_bytes(&x, size, from);
                call::bytes_mut(&mut x)[range].copy_from_slice(parcel.buffer.bytes());
            }
        }
        if let Some(sum) = own {
            let range = call::slice_bytes(&x, size, rank);
            call::bytes_mut(&mut x)[range].copy_from_slice(sum.bytes());
        }
        Ok(x)
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
