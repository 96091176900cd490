//! The connections of one rank to the others: a thread that writes for each peer it sends to, a thread that reads for each peer that
//! sends to it, and the messages that have arrived and are not yet asked for.
//!
//! Connections are one-way and made when first needed; where a peer listens is told by the rendezvous. Readers always drain their
//! socket, so no two ranks can block each other by sending.
//!
//! Invariant: messages from one peer arrive in the order in which they were sent. The first failure ends every wait on this rank, and is
//! told to all others through the rendezvous.

use crate::comm::call::Call;
use crate::comm::door::{self, Door, Job, Purpose, Welcome};
use crate::comm::frame::{self, Header, Payload, Phase};
use crate::comm::store::Store;
use crate::device::memory::{Buffer, Memory};
use anyhow::{Context, Result, anyhow};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufReader};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One rank's end of all its connections. Dropping it says goodbye to all peers.
pub struct Mesh {
    pub hub: Arc<Hub>,
    door: Option<Door>,
}

/// What the threads of a mesh share.
pub struct Hub {
    pub rank: usize,
    pub deadline: Duration,
    /// Messages on their way; not part of any device's account.
    pub memory: Arc<Memory>,
    job: Job,
    store: Arc<Store>,
    state: Mutex<State>,
    changed: Condvar,
    outgoing: Mutex<BTreeMap<usize, Outgoing>>,
    sockets_only: AtomicBool,
    noted: AtomicBool,
}

#[derive(Default)]
struct State {
    parcels: HashMap<Address, Parcel>,
    /// Peers that read from a connection of theirs: false once they have said goodbye.
    incoming: BTreeMap<usize, bool>,
    failure: Option<String>,
    /// What the callers on this rank stand still for at the moment.
    waits: BTreeMap<u64, Wait>,
    waits_ever: u64,
}

/// A call in which this rank waits, and the messages that it needs.
struct Wait {
    call: String,
    awaited: Awaited,
}

/// The messages that a call still needs. Some may have come in the meantime.
pub type Awaited = Arc<Mutex<Vec<Address>>>;

/// What a message is asked for by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Address {
    pub group: u64,
    pub phase: Phase,
    pub number: u64,
    /// Rank of the world.
    pub from: usize,
}

pub struct Parcel {
    pub header: Header,
    pub buffer: Buffer,
}

struct Outgoing {
    queue: Sender<Letter>,
    writer: JoinHandle<()>,
    line: Arc<Mutex<Line>>,
}

/// The connection to one peer. While it has no backlog, small messages are written by whoever sends them: no thread need wake up.
#[derive(Default)]
struct Line {
    /// None until the writer has connected.
    stream: Option<TcpStream>,
    /// Letters that the writer has not written yet.
    backlog: usize,
}

struct Letter {
    header: Header,
    payload: Option<Payload>,
    sent: Arc<Sent>,
}

/// Messages of one call that are not yet written.
#[derive(Default)]
pub struct Sent(AtomicUsize);

impl Mesh {
    /// Opens this rank's door on `ip` and tells the others where it is. Without `ip` it is the address by which this rank reaches the
    /// rendezvous. A loopback address is one of the rendezvous' host, so `place_of` takes the address of that host as it knows it.
    pub fn join(store: Arc<Store>, job: Job, ip: Option<IpAddr>, deadline: Duration) -> Result<Mesh> {
        let rank = store.rank();
        let ip = ip.map_or_else(|| store.route().map(|(here, _)| here), Ok)?;
        let listener = TcpListener::bind((ip, 0)).with_context(|| format!("rank {rank} listens on a free port of {ip}"))?;
        let hub = Arc::new(Hub {
            rank,
            deadline,
            memory: Arc::new(Memory::of_host()),
            job: job.clone(),
            store: store.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
            outgoing: Mutex::default(),
            sockets_only: AtomicBool::new(false),
            noted: AtomicBool::new(false),
        });
        let inside = Arc::downgrade(&hub);
        let admit = move |peer: usize, stream: TcpStream, welcome: Welcome| match inside.upgrade() {
            Some(hub) => hub.admit(peer, stream, welcome),
            None => Err(format!("rank {rank} has left")),
        };
        let door = Door::open(listener, job, Purpose::Data, Box::new(admit))?;
        store.set(&place(rank), door.address().to_string().as_bytes(), deadline)?;
        let bell = Arc::downgrade(&hub);
        store.on_failure(move |sentence| {
            if let Some(hub) = bell.upgrade() {
                hub.hear_failure(sentence);
            }
        });
        let witness = Arc::downgrade(&hub);
        store.on_survey(move || witness.upgrade().map_or_else(|| "has left".to_string(), |hub| hub.testify()));
        Ok(Mesh { hub, door: Some(door) })
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        let outgoing = std::mem::take(&mut *self.hub.outgoing.lock().unwrap_or_else(PoisonError::into_inner));
        let header = Header { group: 0, phase: Phase::Goodbye, number: 0, call: Call::EXCHANGE };
        // A thread that unwinds is no peaceful end: without a goodbye the peers see that this rank has failed. After a failure nobody
        // waits for writers, which may be stuck on a peer that has stopped; they end by themselves.
        let peaceful = !std::thread::panicking() && self.hub.lock().failure.is_none();
        for (_, Outgoing { queue, writer, .. }) in outgoing {
            if peaceful {
                queue.send(Letter { header, payload: None, sent: Arc::default() }).ok();
                drop(queue);
                writer.join().ok();
            }
        }
        self.hub.hear_failure("this rank has left");
        self.door = None;
    }
}

/// The key under which the rendezvous knows where a rank listens.
fn place(rank: usize) -> String {
    format!("data address of rank {rank}")
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(self: Arc<Hub>, peer: usize, stream: TcpStream, welcome: Welcome) -> Result<(), String> {
        let mut state = self.lock();
        if state.incoming.contains_key(&peer) {
            return Err(format!("rank {peer} has a connection here already"));
        }
        welcome(&stream).map_err(|error| format!("its connection broke: {error}"))?;
        state.incoming.insert(peer, true);
        drop(state);
        let hub = self.clone();
        let reader = std::thread::Builder::new().name(format!("from-rank-{peer}")).spawn(move || hub.read(peer, stream));
        reader.map(drop).map_err(|error| {
            self.fail(&format!("rank {} cannot start a thread that reads from rank {peer}: {error}", self.rank));
            "no thread for this connection".to_string()
        })
    }

    fn read(&self, peer: usize, stream: TcpStream) {
        let mut stream = BufReader::with_capacity(64 << 10, stream);
        loop {
            match frame::read(&mut stream, &self.memory) {
                Ok((header, _)) if header.phase == Phase::Goodbye => {
                    self.lock().incoming.insert(peer, false);
                    self.changed.notify_all();
                    return;
                }
                Ok((header, buffer)) => {
                    let address = Address { group: header.group, phase: header.phase, number: header.number, from: peer };
                    let before = self.lock().parcels.insert(address, Parcel { header, buffer });
                    self.changed.notify_all();
                    if before.is_some() {
                        self.fail(&format!("rank {peer} sent call {}, {}, twice", header.number, header.call));
                        return;
                    }
                }
                Err(error) => {
                    let what = if error.is::<io::Error>() { "is gone, its connection ended" } else { "has sent what cannot be" };
                    self.fail(&format!("rank {peer} {what}, as rank {} sees it: {error:#}", self.rank));
                    return;
                }
            }
        }
    }

    /// Sends a message to `to`, a rank of the world, or hands it to the thread that does. `sent` counts it until it is written.
    pub fn send(self: &Arc<Hub>, to: usize, header: Header, payload: Payload, sent: &Arc<Sent>) -> Result<()> {
        let mut all = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let outgoing = match all.entry(to) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let (queue, letters) = channel();
                let line = Arc::new(Mutex::new(Line::default()));
                let (hub, own) = (self.clone(), line.clone());
                let writer = std::thread::Builder::new().name(format!("to-rank-{to}")).spawn(move || hub.write(to, letters, &own));
                let writer = writer.with_context(|| format!("starting a thread that writes to rank {to}"))?;
                place.insert(Outgoing { queue, writer, line })
            }
        };
        let (queue, line) = (outgoing.queue.clone(), outgoing.line.clone());
        drop(all);
        // Held to the end: messages leave in the order in which they took the line.
        let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
        let Line { stream, backlog } = &mut *line;
        if let (Some(stream), 0, true) = (stream, *backlog, payload.bytes().len() <= frame::SMALL) {
            let written = frame::write(stream, &header, payload.bytes());
            drop(line);
            return written.map_err(|error| anyhow!(self.lost(to, &header, &error)));
        }
        *backlog += 1;
        sent.0.fetch_add(1, Ordering::SeqCst);
        let letter = Letter { header, payload: Some(payload), sent: sent.clone() };
        queue.send(letter).map_err(|_| anyhow!(self.store.failure().unwrap_or_else(|| format!("the connection to rank {to} has failed"))))
    }

    /// A peer that takes no more messages ends the job. Gives its first failure.
    fn lost(&self, to: usize, header: &Header, error: &anyhow::Error) -> String {
        let what = format!("call {}, {}", header.number, header.call);
        self.fail(&format!("rank {to} takes no more from rank {}, which sends {what}: {error:#}", self.rank))
    }

    fn place_of(&self, peer: usize) -> Result<SocketAddr> {
        let published = self.store.get(&place(peer), self.deadline)?;
        let mut address: SocketAddr = std::str::from_utf8(&published)?.parse().context("an address that was published")?;
        if address.ip().is_loopback() || address.ip().is_unspecified() {
            address.set_ip(self.store.route()?.1);
        }
        Ok(address)
    }

    fn write(&self, to: usize, letters: Receiver<Letter>, line: &Mutex<Line>) {
        let connect = || -> Result<(TcpStream, TcpStream)> {
            let address = self.place_of(to)?;
            let stream = door::knock(&[address], &self.job, Purpose::Data, self.rank, Instant::now() + self.deadline)?;
            stream.set_write_timeout(Some(self.deadline))?;
            Ok((stream.try_clone()?, stream))
        };
        let mut stream = match connect() {
            Ok((stream, shared)) => {
                line.lock().unwrap_or_else(PoisonError::into_inner).stream = Some(shared);
                stream
            }
            Err(error) => return drop(self.fail(&format!("rank {to} cannot be reached from rank {}: {error:#}", self.rank))),
        };
        for Letter { header, payload, sent } in letters {
            let written = frame::write(&mut stream, &header, payload.as_ref().map_or(&[], Payload::bytes));
            // The owner of the numbers gets them back whole: they are let go before they are counted.
            drop(payload);
            if let Err(error) = written {
                return drop(self.lost(to, &header, &error));
            }
            if header.phase == Phase::Goodbye {
                return;
            }
            line.lock().unwrap_or_else(PoisonError::into_inner).backlog -= 1;
            if sent.0.fetch_sub(1, Ordering::SeqCst) == 1 {
                drop(self.lock());
                self.changed.notify_all();
            }
        }
    }

    /// Ends the job. Rank 0 hears of it before this rank's own waits end: whoever acts on the failure acts later, so what its exit breaks
    /// cannot be taken for the cause. Gives the failure that was first, this one or another.
    pub fn fail(&self, sentence: &str) -> String {
        if self.lock().failure.is_none() {
            self.store.fail(sentence);
        }
        let first = self.store.failure().unwrap_or_else(|| sentence.to_string());
        self.hear_failure(&first)
    }

    /// Ends every wait on this rank. Gives the failure that it knew first.
    fn hear_failure(&self, sentence: &str) -> String {
        let first = self.lock().failure.get_or_insert(sentence.to_string()).clone();
        self.changed.notify_all();
        first
    }

    /// Waits until `ready` gives something, a failure is known, or `until` is over. `needed`: the peer whose leaving ends the wait.
    fn wait<R>(&self, until: Option<Instant>, needed: Option<usize>, mut ready: impl FnMut(&mut State) -> Option<R>) -> Result<R, Ending> {
        let mut state = self.lock();
        loop {
            if let Some(result) = ready(&mut state) {
                return Ok(result);
            }
            if let Some(ending) = state.ending(needed.as_slice()) {
                return Err(ending);
            }
            let left = until.map_or(Duration::from_secs(3600), |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(Ending::Deadline);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A failure that is known, or the leaving of one of the peers that are needed.
    pub fn ending(&self, needed: &[usize]) -> Option<Ending> {
        self.lock().ending(needed)
    }

    /// What the sender of this message calls, if it has come.
    pub fn peek(&self, address: Address) -> Option<Call> {
        self.lock().parcels.get(&address).map(|parcel| parcel.header.call)
    }

    /// From now on groups that have not agreed with their peers yet share no memory with them.
    pub fn keep_to_sockets(&self) {
        self.sockets_only.store(true, Ordering::Relaxed);
    }

    pub fn shares_memory(&self) -> bool {
        !self.sockets_only.load(Ordering::Relaxed)
    }

    /// Logs, once, why ranks of one host talk over sockets.
    pub fn note(&self, sentence: &str) {
        if !self.noted.swap(true, Ordering::Relaxed) {
            tracing::info!("rank {}: {sentence}; collectives between them use sockets, which are slower", self.rank);
        }
    }

    /// The message of this address, once it has come.
    pub fn take(&self, address: Address, until: Option<Instant>) -> Result<Parcel, Ending> {
        self.wait(until, Some(address.from), |state| state.parcels.remove(&address))
    }

    /// Waits until all messages counted in `sent` are written.
    pub fn all_sent(&self, sent: &Sent, until: Option<Instant>) -> Result<(), Ending> {
        self.wait(until, None, |_| (sent.0.load(Ordering::SeqCst) == 0).then_some(()))
    }

    /// Waits for something that another thread of this rank prepares and announces.
    pub fn wait_for<R>(&self, until: Instant, mut ready: impl FnMut() -> Option<R>) -> Result<R, Ending> {
        self.wait(Some(until), None, |_| ready())
    }

    /// Something that `wait_for` asks for may be there now.
    pub fn announce(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Tells the others, while `body` waits, in which call it does and for which messages.
    pub fn waiting<R>(&self, call: String, awaited: &Awaited, body: impl FnOnce() -> R) -> R {
        let mut state = self.lock();
        let number = state.waits_ever;
        state.waits_ever += 1;
        state.waits.insert(number, Wait { call, awaited: awaited.clone() });
        drop(state);
        let result = body();
        self.lock().waits.remove(&number);
        result
    }

    /// The ranks whose messages are awaited and have not come.
    pub fn missing(&self, awaited: &Awaited) -> Vec<usize> {
        self.lock().missing(awaited)
    }

    /// Whom this rank waits for, as it tells others.
    fn testify(&self) -> String {
        let state = self.lock();
        let mut words = Vec::new();
        for Wait { call, awaited } in state.waits.values() {
            let missing: Vec<String> = state.missing(awaited).iter().map(usize::to_string).collect();
            words.push(format!("waits for rank {} in {call}", missing.join(", ")));
        }
        if words.is_empty() { IDLE.to_string() } else { words.join(" and ") }
    }

    /// Asks all ranks whom they wait for. Whoever waits for nobody, or says nothing, holds up the others; they are given, or, where
    /// there are none, what everybody says.
    pub fn survey(&self) -> String {
        let Ok(replies) = self.store.survey(Duration::from_secs(1)) else { return "; rank 0 does not answer".to_string() };
        let others = (0..self.store.world()).filter(|rank| *rank != self.rank);
        let said: Vec<(usize, &str)> = others.map(|rank| (rank, replies.get(&rank).map_or("does not answer", String::as_str))).collect();
        let idle: Vec<_> = said.iter().copied().filter(|(rank, words)| *words == IDLE || !replies.contains_key(rank)).collect();
        let told = if idle.is_empty() { &said } else { &idle };
        told.iter().take(16).map(|(rank, words)| format!("; rank {rank} {words}")).collect()
    }
}

impl State {
    fn ending(&self, needed: &[usize]) -> Option<Ending> {
        let gone = || needed.iter().find(|peer| self.incoming.get(peer) == Some(&false)).map(|peer| format!("rank {peer} has left"));
        self.failure.clone().or_else(gone).map(Ending::Failure)
    }

    fn missing(&self, awaited: &Awaited) -> Vec<usize> {
        let awaited = awaited.lock().unwrap_or_else(PoisonError::into_inner);
        awaited.iter().filter(|address| !self.parcels.contains_key(address)).map(|address| address.from).collect()
    }
}

const IDLE: &str = "waits for nobody";

/// Why a wait ended without what it waited for.
#[derive(Clone, Debug)]
pub enum Ending {
    Failure(String),
    Deadline,
}
