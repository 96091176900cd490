//! The door of a listening rank: who is let in, and how a rank knocks.
//!
//! Four messages of fixed size: the caller's challenge, the host's, the caller's proof that it knows the job's token together with what it
//! believes of the job, and the host's verdict, which carries the host's own proof. A proof is a keyed hash over both challenges, so a
//! recorded one is worthless. After the handshake the connection itself is trusted.
//!
//! Invariant: before a peer has proved itself it costs a fixed number of bytes and one of a fixed number of small threads, for a few
//! seconds at most. When too many knock at once, those that have waited longest are sent away: a real rank needs one round trip, and
//! knocks again.

use anyhow::{Context, Result, anyhow, bail, ensure};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const MAGIC: [u8; 8] = *b"ferrotr1";
/// How long a peer may take to prove itself.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Peers that have not proved themselves yet.
const PENDING: usize = 128;
/// Refusals that are remembered.
const REMEMBERED: usize = 32;
const SENTENCE: usize = 400;

/// What all ranks of one job have in common, and nobody else has.
#[derive(Clone)]
pub struct Job {
    key: [u8; 32],
    id: [u8; 32],
    configuration: [u8; 32],
    pub world: usize,
}

/// What a connection is for: a caller at the wrong door is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    Rendezvous = 1,
    Data = 2,
}

impl Job {
    /// `token` is the secret of the job; `configuration` is whatever text must be the same on all ranks.
    pub fn new(id: &str, token: &str, configuration: &str, world: usize) -> Job {
        Job {
            key: blake3::derive_key("ferrotron 2026 job token", token.as_bytes()),
            id: *blake3::hash(id.as_bytes()).as_bytes(),
            configuration: *blake3::hash(configuration.as_bytes()).as_bytes(),
            world,
        }
    }

    fn proof(&self, side: &[u8], purpose: Purpose, challenges: &[[u8; 32]; 2], claim: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(side).update(&[purpose as u8]).update(&challenges[0]).update(&challenges[1]).update(claim);
        hasher.finalize()
    }

    /// What a rank says of itself: rank, world, job, configuration.
    fn claim(&self, rank: usize) -> Vec<u8> {
        let mut claim = Vec::with_capacity(72);
        claim.extend((rank as u32).to_le_bytes());
        claim.extend((self.world as u32).to_le_bytes());
        claim.extend(self.id);
        claim.extend(self.configuration);
        claim
    }

    /// The rank that a proven claim speaks of, or why it cannot be one of ours.
    fn judge(&self, claim: &[u8]) -> Result<usize, String> {
        let number = |at: usize| u32::from_le_bytes(claim[at..at + 4].try_into().expect("four bytes")) as usize;
        let (rank, world) = (number(0), number(4));
        if claim[8..40] != self.id {
            return Err("it is of another job, started with the same token: give each job an id of its own".to_string());
        }
        if claim[40..72] != self.configuration {
            return Err(format!("rank {rank} runs another configuration: every rank must be started with the same configuration"));
        }
        if world != self.world {
            return Err(format!("rank {rank} believes in a world of {world} ranks, here it has {}", self.world));
        }
        if rank >= world {
            return Err(format!("there is no rank {rank}, the ranks of this job are 0 to {}", world - 1));
        }
        Ok(rank)
    }
}

/// Says to a caller that it may come in.
pub type Welcome<'a> = &'a dyn Fn(&TcpStream) -> io::Result<()>;

/// Decides about a rank that has proved itself: registers it after having welcomed it, or says in a sentence why not.
pub type Admit = dyn Fn(usize, TcpStream, Welcome) -> Result<(), String> + Send + Sync;

pub struct Door {
    address: SocketAddr,
    hall: Arc<Hall>,
    keeper: Option<JoinHandle<()>>,
}

struct Hall {
    job: Job,
    purpose: Purpose,
    admit: Box<Admit>,
    closing: AtomicBool,
    pending: Mutex<VecDeque<(u64, TcpStream)>>,
    refusals: Mutex<Refusals>,
}

#[derive(Default)]
struct Refusals {
    last: VecDeque<String>,
    logged: Option<Instant>,
    unlogged: usize,
}

impl Door {
    pub fn open(listener: TcpListener, job: Job, purpose: Purpose, admit: Box<Admit>) -> Result<Door> {
        let address = listener.local_addr().context("asking for the address that a listener is bound to")?;
        let hall = Hall { job, purpose, admit, closing: AtomicBool::new(false), pending: Mutex::default(), refusals: Mutex::default() };
        let hall = Arc::new(hall);
        let inside = hall.clone();
        let keeper = std::thread::Builder::new().name("door".to_string()).spawn(move || inside.keep(listener));
        Ok(Door { address, hall, keeper: Some(keeper.context("starting the thread that accepts connections")?) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The last peers that were not let in, and why.
    pub fn refusals(&self) -> Vec<String> {
        self.hall.refusals.lock().unwrap_or_else(PoisonError::into_inner).last.iter().cloned().collect()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.hall.closing.store(true, Ordering::SeqCst);
        // Wakes the keeper, which then sees that it is to close.
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
        }
        let woken = TcpStream::connect_timeout(&address, Duration::from_secs(1));
        if let (Ok(_), Some(keeper)) = (woken, self.keeper.take()) {
            keeper.join().ok();
        }
    }
}

impl Hall {
    fn keep(self: Arc<Hall>, listener: TcpListener) {
        for number in 0.. {
            let accepted = listener.accept();
            if self.closing.load(Ordering::SeqCst) {
                break;
            }
            let Ok((stream, from)) = accepted else {
                // Out of file descriptors, most likely: those of pending peers come free soon.
                std::thread::sleep(Duration::from_millis(20));
                continue;
            };
            let Ok(copy) = stream.try_clone() else { continue };
            {
                let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
                pending.push_back((number, copy));
                if pending.len() > PENDING
                    && let Some((_, oldest)) = pending.pop_front()
                {
                    oldest.shutdown(Shutdown::Both).ok();
                }
            }
            let hall = self.clone();
            let meet = move || hall.meet(number, stream, from);
            // Without a thread for it the peer is sent away, by the closure's end.
            if std::thread::Builder::new().name("handshake".to_string()).stack_size(256 << 10).spawn(meet).is_err() {
                self.forget(number);
            }
        }
    }

    fn forget(&self, number: u64) {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).retain(|(other, _)| *other != number);
    }

    fn meet(&self, number: u64, stream: TcpStream, from: SocketAddr) {
        let met = self.handshake(stream);
        self.forget(number);
        if let Err(error) = met {
            self.refused(format!("refused {from}: {error:#}"));
        }
    }

    fn handshake(&self, stream: TcpStream) -> Result<()> {
        let until = Instant::now() + HANDSHAKE;
        let mut hello = [0; 41];
        // The magic first: a peer that speaks something else is known after eight bytes.
        receive_by(&stream, &mut hello[..8], until)?;
        ensure!(hello[..8] == MAGIC, "it does not speak this protocol, its first bytes are {:?}", String::from_utf8_lossy(&hello[..8]));
        receive_by(&stream, &mut hello[8..], until)?;
        ensure!(hello[8] == self.purpose as u8, "it knocks at the wrong door, this one is for {:?}", self.purpose);
        let challenges = [hello[9..].try_into().expect("32 bytes"), challenge()?];
        let mut answer = MAGIC.to_vec();
        answer.extend(challenges[1]);
        send_by(&stream, &answer, until)?;
        let mut claim = [0; 104];
        receive_by(&stream, &mut claim, until)?;
        let (claim, proof) = claim.split_at(72);
        let expected = self.job.proof(b"caller", self.purpose, &challenges, claim);
        let refuse = |sentence: String| {
            let mut verdict = vec![0];
            let sentence = &sentence.as_bytes()[..sentence.len().min(SENTENCE)];
            verdict.extend((sentence.len() as u16).to_le_bytes());
            verdict.extend(sentence);
            send_by(&stream, &verdict, until).ok();
            anyhow!(String::from_utf8_lossy(sentence).into_owned())
        };
        // Hashes of this type compare in constant time.
        if expected != blake3::Hash::from_bytes(proof.try_into().expect("32 bytes")) {
            return Err(refuse("its token is not that of this job".to_string()));
        }
        let rank = self.job.judge(claim).map_err(&refuse)?;
        let proof = self.job.proof(b"host", self.purpose, &challenges, claim);
        let welcome = |stream: &TcpStream| {
            let mut verdict = vec![1];
            verdict.extend(proof.as_bytes());
            send_by(stream, &verdict, until).map_err(io::Error::other)?;
            stream.set_read_timeout(None)?;
            prepare(stream)
        };
        let copy = stream.try_clone().context("a second handle of the connection")?;
        (self.admit)(rank, copy, &welcome).map_err(&refuse)
    }

    /// Remembers the sentence; logs at most one line a second, however many knock.
    fn refused(&self, sentence: String) {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        if refusals.logged.is_none_or(|when| when.elapsed() > Duration::from_secs(1)) {
            tracing::warn!("{sentence} ({} more since the last such line)", refusals.unlogged);
            refusals.logged = Some(Instant::now());
            refusals.unlogged = 0;
        } else {
            refusals.unlogged += 1;
        }
        refusals.last.push_back(sentence);
        if refusals.last.len() > REMEMBERED {
            refusals.last.pop_front();
        }
    }
}

/// Knocks until someone answers. A refusal, and a host that cannot prove itself, end it at once.
pub fn knock(addresses: &[SocketAddr], job: &Job, purpose: Purpose, rank: usize, until: Instant) -> Result<TcpStream> {
    ensure!(!addresses.is_empty(), "no address to connect to");
    let mut pause = Duration::from_millis(5);
    loop {
        let mut last = None;
        for address in addresses {
            match attempt(address, job, purpose, rank, until) {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(refusal)) => bail!("rank {rank} is refused by {address}: {refusal}"),
                Err(error) => last = Some(error.context(format!("connecting to {address}"))),
            }
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let error = last.expect("there is at least one address");
            return Err(error.context(format!("rank {rank} gave up on {addresses:?}")));
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// One knock: a connection, a refusal in words, or a failure after which another knock may succeed.
fn attempt(address: &SocketAddr, job: &Job, purpose: Purpose, rank: usize, until: Instant) -> Result<Result<TcpStream, String>> {
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let stream = TcpStream::connect_timeout(address, left.min(HANDSHAKE))?;
    let until = until.min(Instant::now() + HANDSHAKE);
    stream.set_nodelay(true)?;
    let mine = challenge()?;
    let mut hello = MAGIC.to_vec();
    hello.push(purpose as u8);
    hello.extend(mine);
    send_by(&stream, &hello, until)?;
    let mut answer = [0; 40];
    receive_by(&stream, &mut answer, until)?;
    if answer[..8] != MAGIC {
        return Ok(Err("what listens there is no ferrotron job".to_string()));
    }
    let challenges = [mine, answer[8..].try_into().expect("32 bytes")];
    let claim = job.claim(rank);
    let mut message = claim.clone();
    message.extend(job.proof(b"caller", purpose, &challenges, &claim).as_bytes());
    send_by(&stream, &message, until)?;
    let mut verdict = [0];
    receive_by(&stream, &mut verdict, until)?;
    if verdict[0] != 1 {
        let mut length = [0; 2];
        receive_by(&stream, &mut length, until)?;
        let mut sentence = vec![0; (u16::from_le_bytes(length) as usize).min(SENTENCE)];
        receive_by(&stream, &mut sentence, until)?;
        return Ok(Err(String::from_utf8_lossy(&sentence).into_owned()));
    }
    let mut proof = [0; 32];
    receive_by(&stream, &mut proof, until)?;
    if job.proof(b"host", purpose, &challenges, &claim) != blake3::Hash::from_bytes(proof) {
        return Ok(Err("what listens there does not know the token of this job".to_string()));
    }
    stream.set_read_timeout(None)?;
    prepare(&stream)?;
    Ok(Ok(stream))
}

fn challenge() -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).context("reading a challenge from /dev/urandom")?;
    Ok(bytes)
}

/// Small messages leave at once, and a host that has lost its power is noticed within half a minute.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(None)?;
    rustix::net::sockopt::set_socket_keepalive(stream, true)?;
    rustix::net::sockopt::set_tcp_keepidle(stream, Duration::from_secs(10))?;
    rustix::net::sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    rustix::net::sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(())
}

/// Reads all of `bytes`, however slowly they come, but not beyond `until`.
fn receive_by(mut stream: &TcpStream, bytes: &mut [u8], until: Instant) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let left = until.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "it took too long to prove itself");
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes[done..]) {
            Ok(0) => bail!("the connection was closed during the handshake"),
            Ok(count) => done += count,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).context("reading during the handshake"),
        }
    }
    Ok(())
}

fn send_by(mut stream: &TcpStream, bytes: &[u8], until: Instant) -> Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    ensure!(!left.is_zero(), "it took too long to prove itself");
    stream.set_write_timeout(Some(left))?;
    stream.write_all(bytes).context("writing during the handshake")
}
