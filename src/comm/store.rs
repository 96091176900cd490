//! A rank's side of the rendezvous: set and get, add, barrier, and the bell that rings when any rank has failed.
//!
//! Invariant: no call outlasts its deadline, and every call fails as soon as the failure of a rank is known.

use crate::comm::door::{self, Job, Purpose};
use crate::comm::rendezvous::{Kind, Status, read_frame, request};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::collections::HashMap;
use std::io::Write;
use std::net::{IpAddr, Shutdown, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub struct Store {
    rank: usize,
    world: usize,
    numbers: AtomicU64,
    writing: Arc<Mutex<TcpStream>>,
    inbox: Arc<Inbox>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

/// Called once, with the first failure.
type Bell = Box<dyn FnOnce(&str) + Send>;
/// Says whom this rank waits for.
type Witness = Box<dyn Fn() -> String + Send>;

#[derive(Default)]
struct State {
    answers: HashMap<u64, Answer>,
    failure: Option<String>,
    /// Rank 0 has closed the store in peace, or this rank has left it.
    closed: bool,
    /// No more answers will come.
    lost: bool,
    bells: Vec<Bell>,
    witness: Option<Witness>,
}

/// None: asked, not answered.
type Answer = Option<Result<Vec<u8>, String>>;

impl Store {
    /// `address` is `host:port`; rank 0 may still be about to open it.
    pub fn connect(address: &str, job: &Job, rank: usize, deadline: Duration) -> Result<Store> {
        let until = Instant::now() + deadline;
        let addresses = address.to_socket_addrs().with_context(|| format!("looking up {address:?}, the address of the rendezvous"))?;
        let addresses: Vec<_> = addresses.collect();
        let stream = door::knock(&addresses, job, Purpose::Rendezvous, rank, until)
            .with_context(|| format!("joining the rendezvous at {address}"))?;
        let inbox = Arc::new(Inbox::default());
        let (reading, inside) = (stream.try_clone()?, inbox.clone());
        let writing = Arc::new(Mutex::new(stream));
        let replying = writing.clone();
        let reader = std::thread::Builder::new().name("rendezvous".to_string()).spawn(move || inside.hear(reading, &replying))?;
        Ok(Store { rank, world: job.world, numbers: AtomicU64::new(1), writing, inbox, reader: Some(reader) })
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks the job has.
    pub fn world(&self) -> usize {
        self.world
    }

    /// The addresses of this rank and of rank 0 on the way between them.
    pub fn route(&self) -> Result<(IpAddr, IpAddr)> {
        let stream = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let route = stream.local_addr().and_then(|here| Ok((here.ip(), stream.peer_addr()?.ip())));
        route.context("asking for the two ends of the connection to the rendezvous")
    }

    pub fn set(&self, key: &str, value: &[u8], deadline: Duration) -> Result<()> {
        self.ask(Kind::Set, key, value, deadline).with_context(|| format!("rank {} sets {key:?}", self.rank)).map(drop)
    }

    /// Waits until some rank sets `key`.
    pub fn get(&self, key: &str, deadline: Duration) -> Result<Vec<u8>> {
        self.ask(Kind::Get, key, &[], deadline).with_context(|| format!("rank {} waits for {key:?} in the rendezvous", self.rank))
    }

    /// Adds to a number, which starts at 0, and gives the sum.
    pub fn add(&self, key: &str, amount: i64, deadline: Duration) -> Result<i64> {
        let sum = self.ask(Kind::Add, key, &amount.to_le_bytes(), deadline);
        let sum = sum.with_context(|| format!("rank {} adds to {key:?}", self.rank))?;
        Ok(i64::from_le_bytes(sum.as_slice().try_into().context("a number has eight bytes")?))
    }

    /// Returns when every rank of the job has come to the barrier of this name. It can be used again.
    pub fn barrier(&self, name: &str, deadline: Duration) -> Result<()> {
        let Err(error) = self.ask(Kind::Barrier, name, &[], deadline) else { return Ok(()) };
        let missing = self.ask(Kind::Missing, name, &[], Duration::from_secs(2)).unwrap_or_default();
        let missing = match missing.as_slice() {
            [] => String::new(),
            names => format!(", still missing: rank {}", String::from_utf8_lossy(names)),
        };
        Err(error.context(format!("rank {} at the barrier {name:?}{missing}", self.rank)))
    }

    /// Tells every rank that this one has failed. The first failure of the job is the one that is told.
    pub fn fail(&self, sentence: &str) {
        // Where the rendezvous cannot be reached the others see that connection end.
        self.ask(Kind::Fail, "", sentence.as_bytes(), Duration::from_secs(2)).ok();
    }

    /// The first failure, once it is known here.
    pub fn failure(&self) -> Option<String> {
        self.inbox.lock().failure.clone()
    }

    /// `bell` is called with the first failure, at once if there has been one. It must not wait.
    pub fn on_failure(&self, bell: impl FnOnce(&str) + Send + 'static) {
        let mut state = self.inbox.lock();
        match state.failure.clone() {
            Some(failure) => {
                drop(state);
                bell(&failure);
            }
            None => state.bells.push(Box::new(bell)),
        }
    }

    /// `witness` answers for this rank when another one asks whom it waits for. It must not wait.
    pub fn on_survey(&self, witness: impl Fn() -> String + Send + 'static) {
        self.inbox.lock().witness = Some(Box::new(witness));
    }

    /// What each other rank says of itself. Those that say nothing within `deadline` have stopped, or cannot be reached. An error: rank 0
    /// itself says nothing.
    pub fn survey(&self, deadline: Duration) -> Result<HashMap<usize, String>> {
        let until = Instant::now() + deadline;
        let mut replies = HashMap::new();
        let survey = self.ask(Kind::Survey, "", &[], deadline)?;
        let survey = String::from_utf8_lossy(&survey).into_owned();
        while replies.len() + 1 < self.world && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
            let lines = self.ask(Kind::Replies, &survey, &[], deadline)?;
            let lines = String::from_utf8_lossy(&lines).into_owned();
            let parse = |line: &str| line.split_once(':').and_then(|(rank, words)| Some((rank.parse().ok()?, words.to_string())));
            replies = lines.lines().filter_map(parse).collect();
        }
        Ok(replies)
    }

    /// Says goodbye: from now on the end of this rank's connection is no failure, and every call here is an error.
    pub fn leave(&self) {
        if std::mem::replace(&mut self.inbox.lock().closed, true) {
            return;
        }
        let goodbye = request(0, Kind::Goodbye, "", &[]).expect("a goodbye is short");
        let mut stream = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(&goodbye).ok();
        stream.shutdown(Shutdown::Both).ok();
    }

    fn ask(&self, kind: Kind, key: &str, value: &[u8], deadline: Duration) -> Result<Vec<u8>> {
        let until = Instant::now() + deadline;
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let frame = request(number, kind, key, value)?;
        self.inbox.lock().answers.insert(number, None);
        // When this fails the connection has ended, which the reading thread sees as well and tells below.
        self.writing.lock().unwrap_or_else(PoisonError::into_inner).write_all(&frame).ok();
        let mut state = self.inbox.lock();
        // News of a failure ends what waits for other ranks; what the rendezvous answers by itself is still heard.
        let waits = matches!(kind, Kind::Get | Kind::Barrier);
        loop {
            if let Some(Some(_)) = state.answers.get(&number) {
                let answer = state.answers.remove(&number).flatten().expect("just seen");
                return answer.map_err(|sentence| anyhow!(sentence));
            }
            let left = until.saturating_duration_since(Instant::now());
            let failure = state.failure.clone().filter(|_| waits || state.lost);
            if failure.is_some() || state.closed || left.is_zero() {
                state.answers.remove(&number);
                ensure!(!state.closed, "the rendezvous is closed: this rank or rank 0 is through");
                bail!(failure.unwrap_or_else(|| format!("gave up after {:.1} s", deadline.as_secs_f64())));
            }
            state = self.inbox.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, mut stream: TcpStream, replying: &Mutex<TcpStream>) {
        loop {
            let frame = read_frame(&mut stream).and_then(|frame| {
                ensure!(frame.len() >= 9, "an answer of {} bytes, the shortest has 9", frame.len());
                Ok(frame)
            });
            let mut state = self.lock();
            let failure = match &frame {
                Ok(frame) => {
                    let number = u64::from_le_bytes(frame[..8].try_into().expect("eight bytes"));
                    let value = &frame[9..];
                    match frame[8] {
                        status if status == Status::Failure as u8 => Some(String::from_utf8_lossy(value).into_owned()),
                        status if status == Status::Closed as u8 => {
                            state.closed = true;
                            None
                        }
                        status if status == Status::Survey as u8 => {
                            let words = state.witness.as_ref().map_or_else(|| "has no groups yet".to_string(), |witness| witness());
                            let reply = request(0, Kind::Reply, &String::from_utf8_lossy(value), words.as_bytes());
                            let reply = reply.expect("the words of a witness are few");
                            replying.lock().unwrap_or_else(PoisonError::into_inner).write_all(&reply).ok();
                            None
                        }
                        status => {
                            let done = status == Status::Done as u8;
                            let answer = if done { Ok(value.to_vec()) } else { Err(String::from_utf8_lossy(value).into_owned()) };
                            // One that nobody waits for any more is dropped.
                            if let Some(place) = state.answers.get_mut(&number) {
                                *place = Some(answer);
                            }
                            None
                        }
                    }
                }
                Err(_) if state.closed => None,
                Err(error) => Some(format!("rank 0 is gone, the connection to its rendezvous ended: {error:#}")),
            };
            state.lost = frame.is_err();
            let mut bells = Vec::new();
            if let (Some(failure), true) = (&failure, state.failure.is_none()) {
                state.failure = Some(failure.clone());
                bells = std::mem::take(&mut state.bells);
            }
            drop(state);
            self.changed.notify_all();
            if let Some(failure) = failure {
                bells.into_iter().for_each(|bell| bell(&failure));
            }
            if frame.is_err() {
                return;
            }
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail(&format!("rank {} panicked", self.rank));
        }
        self.leave();
        if let Some(reader) = self.reader.take() {
            reader.join().ok();
        }
    }
}
