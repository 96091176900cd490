//! The place where the ranks of a job find each other: a small key-value store that rank 0 keeps, and that hears of every failure.
//!
//! A frame is its length (u32, little endian) and a body. A request is its number (u64), its kind, the length of its key (u16), the key
//! and a value; an answer is the request's number, a status and a value. Answer number 0 is for news that nobody asked for.
//!
//! Invariant: only ranks that the door let in are heard, each rank has one connection, and no frame is longer than 64 MiB. The first
//! failure is told to every rank; a connection that ends without a goodbye is one.

use crate::comm::door::{Door, Job, Purpose, Welcome};
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest frame, and so the largest value.
pub const FRAME: usize = 64 << 20;
/// The most that all values together may take on rank 0.
const STORED: usize = 1 << 30;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Set = 1,
    /// Answered when the key is set.
    Get = 2,
    Add = 3,
    /// Answered when every rank has come.
    Barrier = 4,
    /// Which ranks a barrier still waits for.
    Missing = 5,
    Fail = 6,
    Goodbye = 7,
    /// Asks every other rank whom it waits for. Answered at once, with the number of the survey.
    Survey = 8,
    /// A rank's reply to a survey, whose number is the key.
    Reply = 9,
    /// The replies to the survey of this number, so far: the rank, a colon and its words, a line each.
    Replies = 10,
}

impl Kind {
    fn of(code: u8) -> Option<Kind> {
        use Kind::{Add, Barrier, Fail, Get, Goodbye, Missing, Replies, Reply, Set, Survey};
        [Set, Get, Add, Barrier, Missing, Fail, Goodbye, Survey, Reply, Replies].into_iter().find(|kind| *kind as u8 == code)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Done = 0,
    Refused = 1,
    /// News: some rank has failed.
    Failure = 2,
    /// News: rank 0 is through and closes the store in peace.
    Closed = 3,
    /// News: some rank asks whom this one waits for.
    Survey = 4,
}

pub struct Rendezvous {
    door: Door,
    hall: Arc<Hall>,
}

struct Hall {
    world: usize,
    tables: Mutex<Tables>,
    /// A rank has left, or failed.
    changed: Condvar,
}

#[derive(Default)]
struct Tables {
    values: HashMap<String, Vec<u8>>,
    bytes: usize,
    /// Who waits for a key: rank and request.
    waiting: HashMap<String, Vec<(usize, u64)>>,
    /// Who has come to a barrier: rank and request.
    barriers: HashMap<String, BTreeMap<usize, u64>>,
    clients: BTreeMap<usize, Client>,
    departed: BTreeSet<usize>,
    /// The replies to each survey. Surveys are rare: each one precedes the end of a job.
    surveys: Vec<BTreeMap<usize, String>>,
    failure: Option<String>,
}

struct Client {
    stream: TcpStream,
    answers: Sender<Vec<u8>>,
    writer: JoinHandle<()>,
}

impl Rendezvous {
    /// Serves the ranks of `job` until it is dropped.
    pub fn open(listener: TcpListener, job: Job) -> Result<Rendezvous> {
        let hall = Arc::new(Hall { world: job.world, tables: Mutex::default(), changed: Condvar::new() });
        let inside = hall.clone();
        let admit = move |rank: usize, stream: TcpStream, welcome: Welcome| inside.clone().admit(rank, stream, welcome);
        let door = Door::open(listener, job, Purpose::Rendezvous, Box::new(admit))?;
        Ok(Rendezvous { door, hall })
    }

    pub fn address(&self) -> SocketAddr {
        self.door.address()
    }

    /// The last peers that were not let in, and why.
    pub fn refusals(&self) -> Vec<String> {
        self.door.refusals()
    }

    /// Returns when no rank is connected any more, or when some rank has failed, but no later than `deadline` from now.
    pub fn wait_until_left(&self, deadline: Duration) {
        let until = Instant::now() + deadline;
        let mut tables = self.hall.lock();
        while !tables.clients.is_empty() && tables.failure.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            tables = self.hall.changed.wait_timeout(tables, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Rendezvous {
    fn drop(&mut self) {
        let clients = std::mem::take(&mut self.hall.lock().clients);
        for (_, client) in clients {
            client.answers.send(answer(0, Status::Closed, b"rank 0 has closed the rendezvous")).ok();
            drop(client.answers);
            client.writer.join().ok();
            client.stream.shutdown(Shutdown::Both).ok();
        }
    }
}

impl Hall {
    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(self: Arc<Hall>, rank: usize, stream: TcpStream, welcome: Welcome) -> Result<(), String> {
        let mut tables = self.lock();
        if tables.clients.contains_key(&rank) || tables.departed.contains(&rank) {
            return Err(format!("there is a rank {rank} already: two processes were started with the same rank"));
        }
        let set_up = || -> io::Result<Client> {
            welcome(&stream)?;
            // A rank that has stopped reading must not keep rank 0 from closing.
            stream.set_write_timeout(Some(Duration::from_secs(20)))?;
            let (answers, queue) = channel();
            let (outgoing, incoming) = (stream.try_clone()?, stream.try_clone()?);
            let small = || std::thread::Builder::new().stack_size(256 << 10);
            let writer = small().name(format!("to-rank-{rank}")).spawn(move || write_all(outgoing, queue))?;
            let hall = self.clone();
            small().name(format!("from-rank-{rank}")).spawn(move || hall.serve(rank, incoming))?;
            Ok(Client { stream, answers, writer })
        };
        let client = set_up().map_err(|error| format!("its connection broke: {error}"))?;
        if let Some(failure) = &tables.failure {
            client.answers.send(answer(0, Status::Failure, failure.as_bytes())).ok();
        }
        tables.clients.insert(rank, client);
        Ok(())
    }

    /// Hears one rank until it leaves.
    fn serve(&self, rank: usize, mut stream: TcpStream) {
        let ending = loop {
            match read_frame(&mut stream).and_then(|frame| self.obey(rank, &frame)) {
                Ok(true) => {}
                Ok(false) => break None,
                Err(error) => break Some(error),
            }
        };
        let mut tables = self.lock();
        if let Some(client) = tables.clients.remove(&rank) {
            client.stream.shutdown(Shutdown::Both).ok();
            tables.departed.insert(rank);
            if let Some(error) = ending {
                tables.fail(format!("rank {rank} is gone, its connection to the rendezvous ended: {error:#}"));
            }
        }
        drop(tables);
        self.changed.notify_all();
    }

    /// Carries out one request. False after a goodbye.
    fn obey(&self, rank: usize, frame: &[u8]) -> Result<bool> {
        ensure!(frame.len() >= 11, "a request of {} bytes, the shortest has 11", frame.len());
        let number = u64::from_le_bytes(frame[..8].try_into().expect("eight bytes"));
        let length = u16::from_le_bytes(frame[9..11].try_into().expect("two bytes")) as usize;
        ensure!(frame.len() >= 11 + length, "a request whose key of {length} bytes does not fit into its {} bytes", frame.len());
        let key = std::str::from_utf8(&frame[11..11 + length]).context("a key that is not text")?.to_string();
        let value = &frame[11 + length..];
        let kind = Kind::of(frame[8]).with_context(|| format!("a request of unknown kind {}", frame[8]))?;
        let mut tables = self.lock();
        match kind {
            Kind::Set => match tables.set(key, value.to_vec()) {
                Ok(()) => tables.answer(rank, number, Status::Done, &[]),
                Err(error) => tables.answer(rank, number, Status::Refused, format!("{error:#}").as_bytes()),
            },
            Kind::Get => match tables.values.get(&key).cloned() {
                Some(value) => tables.answer(rank, number, Status::Done, &value),
                None => tables.waiting.entry(key).or_default().push((rank, number)),
            },
            Kind::Add => {
                let amount = i64::from_le_bytes(value.try_into().context("an amount to add has eight bytes")?);
                tables.add(rank, number, key, amount)?;
            }
            Kind::Barrier => {
                let present = tables.barriers.entry(key.clone()).or_default();
                present.insert(rank, number);
                if present.len() == self.world {
                    for (rank, number) in tables.barriers.remove(&key).expect("just entered") {
                        tables.answer(rank, number, Status::Done, &[]);
                    }
                }
            }
            Kind::Missing => {
                let present = tables.barriers.get(&key);
                let missing = (0..self.world).filter(|rank| present.is_none_or(|present| !present.contains_key(rank)));
                let names: Vec<String> = missing.map(|rank| rank.to_string()).collect();
                tables.answer(rank, number, Status::Done, names.join(", ").as_bytes());
            }
            Kind::Fail => {
                tables.fail(String::from_utf8_lossy(value).into_owned());
                tables.answer(rank, number, Status::Done, &[]);
                self.changed.notify_all();
            }
            Kind::Goodbye => return Ok(false),
            Kind::Survey => {
                let name = tables.surveys.len().to_string();
                ensure!(tables.surveys.len() < 1 << 16, "more surveys than any job needs");
                tables.surveys.push(BTreeMap::new());
                tables.answer(rank, number, Status::Done, name.as_bytes());
                for other in tables.clients.keys().filter(|other| **other != rank) {
                    tables.answer(*other, 0, Status::Survey, name.as_bytes());
                }
            }
            Kind::Reply => {
                if let Some(survey) = key.parse().ok().and_then(|survey: usize| tables.surveys.get_mut(survey)) {
                    survey.insert(rank, String::from_utf8_lossy(value).into_owned());
                }
            }
            Kind::Replies => {
                let survey = key.parse().ok().and_then(|survey: usize| tables.surveys.get(survey));
                let lines: String = survey.into_iter().flatten().map(|(rank, words)| format!("{rank}:{words}\n")).collect();
                tables.answer(rank, number, Status::Done, lines.as_bytes());
            }
        }
        Ok(true)
    }
}

impl Tables {
    fn set(&mut self, key: String, value: Vec<u8>) -> Result<()> {
        let before = self.values.get(&key).map_or(0, |old| key.len() + old.len());
        let bytes = self.bytes - before + key.len() + value.len();
        ensure!(bytes <= STORED, "the rendezvous holds {} MiB already, it takes no more than {}", self.bytes >> 20, STORED >> 20);
        self.bytes = bytes;
        for (rank, number) in self.waiting.remove(&key).unwrap_or_default() {
            self.answer(rank, number, Status::Done, &value);
        }
        self.values.insert(key, value);
        Ok(())
    }

    /// Adds to a number and answers with the sum.
    fn add(&mut self, rank: usize, number: u64, key: String, amount: i64) -> Result<()> {
        let before = self.values.get(&key).map_or(Some(0), |bytes| Some(i64::from_le_bytes(bytes.as_slice().try_into().ok()?)));
        let Some(before) = before else {
            self.answer(rank, number, Status::Refused, format!("{key:?} is no number to add to").as_bytes());
            return Ok(());
        };
        let sum = before.wrapping_add(amount).to_le_bytes();
        self.set(key, sum.to_vec())?;
        self.answer(rank, number, Status::Done, &sum);
        Ok(())
    }

    fn answer(&self, rank: usize, number: u64, status: Status, value: &[u8]) {
        if let Some(client) = self.clients.get(&rank) {
            client.answers.send(answer(number, status, value)).ok();
        }
    }

    fn fail(&mut self, sentence: String) {
        if self.failure.is_none() {
            for rank in self.clients.keys() {
                self.answer(*rank, 0, Status::Failure, sentence.as_bytes());
            }
            self.failure = Some(sentence);
        }
    }
}

fn write_all(mut stream: TcpStream, queue: Receiver<Vec<u8>>) {
    for frame in queue {
        if stream.write_all(&frame).is_err() {
            // The reading thread of this rank hears of it and says so.
            stream.shutdown(Shutdown::Both).ok();
            return;
        }
    }
}

fn answer(number: u64, status: Status, value: &[u8]) -> Vec<u8> {
    let mut frame = ((9 + value.len()) as u32).to_le_bytes().to_vec();
    frame.extend(number.to_le_bytes());
    frame.push(status as u8);
    frame.extend(value);
    frame
}

pub fn request(number: u64, kind: Kind, key: &str, value: &[u8]) -> Result<Vec<u8>> {
    let length = 11 + key.len() + value.len();
    ensure!(key.len() <= u16::MAX as usize, "a key of {} bytes, the longest has {}", key.len(), u16::MAX);
    ensure!(length <= FRAME, "the value of {key:?} takes {} bytes, the rendezvous carries {FRAME} at most", value.len());
    let mut frame = (length as u32).to_le_bytes().to_vec();
    frame.extend(number.to_le_bytes());
    frame.push(kind as u8);
    frame.extend((key.len() as u16).to_le_bytes());
    frame.extend(key.as_bytes());
    frame.extend(value);
    Ok(frame)
}

/// Memory grows with what has arrived, not with what a length promises.
pub fn read_frame(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).context("reading a frame")?;
    let length = u32::from_le_bytes(length) as usize;
    ensure!(length <= FRAME, "a frame of {length} bytes, the longest has {FRAME}");
    let mut frame = Vec::new();
    stream.take(length as u64).read_to_end(&mut frame).context("reading a frame")?;
    ensure!(frame.len() == length, "the connection ended {} bytes into a frame of {length}", frame.len());
    Ok(frame)
}
