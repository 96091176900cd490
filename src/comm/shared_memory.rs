//! Memory that the ranks of one host share: each rank of a group has a segment that it alone writes to and the others map to read.
//!
//! A segment is a memfd: it has no name in any file system, takes nothing of `/dev/shm`, and is gone when the last process that maps it
//! is, however that ends. Ranks offer theirs to each other over their connections, as a process and a number of its open files; whoever
//! can open that, and finds inside the random words that came with the offer, is on the same host beyond doubt. Containers that do not
//! see each other's processes cannot, and stay with sockets.
//!
//! There are two lanes. On the first a rank gives each peer a piece of its own, or one to all, and says which call it is in; on the
//! second it gives one piece to all. Rounds of a lane are numbered from 0 for as long as the group lives; round `k` uses buffer
//! `k % DEPTH`, so memory is bounded whatever the tensors' size.
//!
//! Invariant: a rank writes the buffer of round `k` only after every peer has taken round `k - DEPTH`, and reads a peer's buffer only
//! between that peer's `given` reaching `k + 1` and its own `taken` doing so.
#![allow(unsafe_code)]

use crate::comm::frame::HEADER;
use crate::comm::mesh::Ending;
use anyhow::{Context, Result, ensure};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, memfd_create};
use rustix::thread::futex;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Rounds of a lane that may be under way: while one is read the next is written.
const DEPTH: usize = 2;
/// The largest piece, small enough that what all ranks of a host have under way stays in the last cache.
const PIECE: usize = 128 << 10;
/// What the pieces for all peers may take in one round.
const PIECES: usize = 1 << 20;
const PAGE: usize = 4096;
/// Looks at a counter before its reader sleeps: a peer that runs at the same time needs a few microseconds for what is small.
const SPINS: usize = 200;
/// The longest sleep: failures are heard of through the mesh, which cannot wake a sleeper here.
const NAP: Duration = Duration::from_millis(10);
/// Where the counters of a segment lie, behind its random words: a cache line for each, `given` and `taken` of both lanes.
const COUNTERS: usize = 64;
/// Where the calls of a segment lie, one for each buffer of the first lane.
const CALLS: usize = 1024;
const CALL: usize = 128;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    First = 0,
    Second = 1,
}

/// Whether the peers get a piece each, or one that is for all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pieces {
    Each,
    Same,
}

/// How others find a segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Differs between hosts, and each time that one starts.
    boot: [u8; 36],
    process: u32,
    file: u32,
    words: [u8; 32],
}

const OFFER: usize = 36 + 4 + 4 + 32;

/// One rank's segment, as its owner or as a peer maps it.
pub struct Segment {
    map: MmapRaw,
    shape: Shape,
    /// Kept by the owner until all peers have opened it.
    file: Option<File>,
}

/// How a segment is cut, the same for all members of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Shape {
    ranks: usize,
    piece: usize,
}

/// What a rank does before it sleeps for want of these peers: an error ends the wait.
pub type Watch<'a> = dyn Fn(&[usize]) -> Result<(), Ending> + 'a;

impl Shape {
    fn new(ranks: usize) -> Shape {
        Shape { ranks, piece: (PIECES / ranks / PAGE * PAGE).clamp(PAGE, PIECE) }
    }

    fn bytes(self) -> usize {
        PAGE + DEPTH * (self.ranks + 2) * self.piece
    }

    /// Where the piece of a round for rank `to` lies.
    fn place(self, lane: Lane, pieces: Pieces, round: u32, to: usize) -> usize {
        let index = match (lane, pieces) {
            (Lane::First, Pieces::Each) => to,
            (Lane::First, Pieces::Same) => self.ranks,
            (Lane::Second, Pieces::Same) => self.ranks + 1,
            (Lane::Second, Pieces::Each) => panic!("the second lane has one piece for all"),
        };
        PAGE + (round as usize % DEPTH * (self.ranks + 2) + index) * self.piece
    }
}

impl Offer {
    pub fn encode(&self) -> Vec<u8> {
        [&self.boot[..], &self.process.to_le_bytes(), &self.file.to_le_bytes(), &self.words].concat()
    }

    /// None: nothing is offered.
    pub fn decode(bytes: &[u8]) -> Option<Offer> {
        let bytes: &[u8; OFFER] = bytes.try_into().ok()?;
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        Some(Offer {
            boot: bytes[..36].try_into().expect("36 bytes"),
            process: number(36),
            file: number(40),
            words: bytes[44..].try_into().expect("32 bytes"),
        })
    }

    /// Whether the rank that offers this runs on the host that this one believes to run on.
    pub fn is_of_this_host(&self) -> bool {
        boot().is_ok_and(|boot| boot == self.boot)
    }
}

fn boot() -> Result<[u8; 36]> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    text.trim().as_bytes().try_into().with_context(|| format!("{path} holds {:?}, not 36 letters", text.trim()))
}

/// What a segment is called where the kernel lists open files.
fn name(words: &[u8; 32]) -> String {
    let start: String = words[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("ferrotron-{start}")
}

impl Segment {
    /// A segment of this process for a group of `ranks`, and what to offer to its peers.
    pub fn create(ranks: usize) -> Result<(Segment, Offer)> {
        let shape = Shape::new(ranks);
        let mut words = [0; 32];
        File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut words)).context("reading /dev/urandom")?;
        let file = memfd_create(name(&words), MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).context("making a memfd")?;
        let file = File::from(file);
        // All pages at once: one that is missing later would be a signal in the middle of a step, not an error.
        fallocate(&file, FallocateFlags::empty(), 0, shape.bytes() as u64)
            .with_context(|| format!("allocating {} bytes of memory to share", shape.bytes()))?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).context("fixing the size of a memfd")?;
        let map = MmapOptions::new().len(shape.bytes()).map_raw(&file).context("mapping a memfd")?;
        // SAFETY: the map is writable and longer than a page, and nobody else has opened the file yet.
        unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), map.as_mut_ptr(), words.len()) };
        let offer = Offer { boot: boot()?, process: std::process::id(), file: file.as_raw_fd() as u32, words };
        Ok((Segment { map, shape, file: Some(file) }, offer))
    }

    /// The segment of a peer in a group of `ranks`. An error: it is not here, or not what was offered.
    pub fn open(offer: &Offer, ranks: usize) -> Result<Segment> {
        let shape = Shape::new(ranks);
        let path = format!("/proc/{}/fd/{}", offer.process, offer.file);
        // Its name before it is opened: this may be another process altogether, whose files are not for us.
        let named = fs::read_link(&path).with_context(|| format!("looking at {path}"))?;
        let expected = format!("/memfd:{} (deleted)", name(&offer.words));
        ensure!(named.as_os_str() == expected.as_str(), "{path} is {}, not {expected}", named.display());
        let file = File::open(&path).with_context(|| format!("opening {path}"))?;
        let seals = fcntl_get_seals(&file).with_context(|| format!("asking whether the size of {path} is fixed"))?;
        ensure!(seals.contains(SealFlags::SHRINK), "{path} could be cut short while it is read");
        let bytes = file.metadata().with_context(|| format!("asking for the size of {path}"))?.len();
        ensure!(bytes == shape.bytes() as u64, "{path} has {bytes} bytes, expected {}", shape.bytes());
        let map = MmapOptions::new().len(shape.bytes()).map_raw_read_only(&file).with_context(|| format!("mapping {path}"))?;
        let mut words = [0; 32];
        // SAFETY: the map is longer than a page and its file sealed against shrinking. The owner wrote these words before it offered the
        // segment, and the offer came through a socket, so they are there and do not change.
        unsafe { std::ptr::copy_nonoverlapping(map.as_ptr(), words.as_mut_ptr(), words.len()) };
        ensure!(words == offer.words, "{path} does not hold the words that were offered with it");
        Ok(Segment { map, shape, file: None })
    }

    fn counter(&self, lane: Lane, which: Counter) -> &AtomicU32 {
        let at = COUNTERS * (1 + 2 * lane as usize + which as usize);
        // SAFETY: the place is within the first page of the map, aligned to a cache line, and used for nothing but this counter, by any
        // process. Peers only load from it, so that a map without the right to write is enough for them.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().add(at).cast()) }
    }

    /// Moves one of the own counters to `rounds` and wakes the peers that wait for it.
    fn advance(&self, lane: Lane, which: Counter, rounds: u32) {
        let counter = self.counter(lane, which);
        // Release: whoever sees the new count also sees the bytes written before it, or may overwrite those read before it.
        counter.store(rounds, Ordering::Release);
        // Nobody may be waiting; there is nothing else that could go wrong.
        futex::wake(counter, futex::Flags::empty(), i32::MAX as u32).ok();
    }

    fn reached(&self, lane: Lane, which: Counter, rounds: u32) -> bool {
        // Acquire: pairs with the store of `advance`. Counters run around after 2^32 rounds; no two are ever further apart than DEPTH.
        let count = self.counter(lane, which).load(Ordering::Acquire);
        count.wrapping_sub(rounds) as i32 >= 0
    }

    /// Sleeps until a counter changes, at most for a nap.
    fn sleep(&self, lane: Lane, which: Counter, rounds: u32) {
        let counter = self.counter(lane, which);
        let count = counter.load(Ordering::Acquire);
        if (count.wrapping_sub(rounds) as i32) < 0 {
            let nap = futex::Timespec { tv_sec: 0, tv_nsec: NAP.as_nanos() as futex::Nsecs };
            // The kernel compares with `count` once more before it lets this thread sleep: no change is slept through. However it
            // ends, the counter is looked at again.
            futex::wait(counter, futex::Flags::empty(), count, Some(&nap)).ok();
        }
    }

    fn call(&self, round: u32) -> *mut [u8; HEADER] {
        const { assert!(CALLS + DEPTH * CALL <= PAGE && HEADER <= CALL) };
        self.map.as_mut_ptr().wrapping_add(CALLS + round as usize % DEPTH * CALL).cast()
    }

    fn piece(&self, lane: Lane, pieces: Pieces, round: u32, to: usize) -> *mut u8 {
        let at = self.shape.place(lane, pieces, round, to);
        assert!(to < self.shape.ranks && at + self.shape.piece <= self.map.len(), "piece for rank {to} of {} at {at}", self.shape.ranks);
        self.map.as_mut_ptr().wrapping_add(at)
    }
}

/// Counts the rounds of a lane that a rank has given to all its peers, or taken from all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Counter {
    Given = 0,
    Taken = 1,
}

/// One rank's end of the lanes of a group: its own segment, and those of the peers that share theirs with it.
pub struct Lanes {
    own: Segment,
    /// By rank of the group. None: this rank itself, and whom it reaches over a socket.
    peers: Vec<Option<Segment>>,
    rank: usize,
    given: [u32; 2],
    taken: [u32; 2],
}

impl Lanes {
    /// `rank` counts in the group. Every peer here has opened `own`, and this rank has opened theirs.
    pub fn new(mut own: Segment, peers: Vec<Option<Segment>>, rank: usize) -> Lanes {
        assert_eq!(peers.len(), own.shape.ranks, "peers of a segment for so many ranks");
        own.file = None;
        Lanes { own, peers, rank, given: [0; 2], taken: [0; 2] }
    }

    /// The most bytes of one piece: a multiple of every element's size.
    pub fn piece(&self) -> usize {
        self.own.shape.piece
    }

    /// The next round of a lane, in call `call`: `fill` writes the piece for a rank, or for all, and then the rank is this one.
    pub fn give(
        &mut self,
        (lane, pieces): (Lane, Pieces),
        call: &[u8; HEADER],
        watch: &Watch,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), Ending> {
        let round = self.given[lane as usize];
        self.wait(lane, Counter::Taken, round.wrapping_add(1).wrapping_sub(DEPTH as u32), watch)?;
        if lane == Lane::First {
            // SAFETY: the place is in the first page of this rank's own segment; as for the pieces below, nobody reads it now.
            unsafe { self.own.call(round).write(*call) };
        }
        let ranks = (0..self.peers.len()).filter(|to| match pieces {
            Pieces::Each => self.peers[*to].is_some(),
            Pieces::Same => *to == self.rank,
        });
        for to in ranks {
            // SAFETY: `piece` lies within the map of this rank's own segment, which nobody else writes to; `&mut self` keeps other threads
            // out. Peers read this buffer for round `round - DEPTH`, which the wait above has seen all of them take (acquire), and for
            // `round` only after the release below.
            let piece = unsafe { std::slice::from_raw_parts_mut(self.own.piece(lane, pieces, round, to), self.piece()) };
            fill(to, piece);
        }
        self.given[lane as usize] = round.wrapping_add(1);
        self.own.advance(lane, Counter::Given, round.wrapping_add(1));
        Ok(())
    }

    /// The next round of a lane: `read` gets the piece that each peer gives to this rank, by rank; none from itself and over sockets.
    /// Before, on the first lane, `check` is shown the call of each peer, and may end it all.
    pub fn take(
        &mut self,
        (lane, pieces): (Lane, Pieces),
        check: impl Fn(usize, &[u8; HEADER]) -> Result<(), Ending>,
        watch: &Watch,
        read: impl FnOnce(&[Option<&[u8]>]),
    ) -> Result<(), Ending> {
        let round = self.taken[lane as usize];
        self.wait(lane, Counter::Given, round.wrapping_add(1), watch)?;
        for (rank, peer) in self.peers.iter().enumerate().filter(|_| lane == Lane::First) {
            // SAFETY: the place is in the first page of the peer's segment; as for the pieces below, the peer does not write to it now.
            let call = peer.as_ref().map(|peer| unsafe { peer.call(round).cast_const().read() });
            call.map_or(Ok(()), |call| check(rank, &call))?;
        }
        let piece = |peer: &Segment| {
            // SAFETY: `piece` lies within the map of the peer's segment, whose size is sealed. The wait above has seen the peer give this
            // round (acquire), so it has written these bytes, and it writes them again only after it sees this rank's `taken` beyond the
            // round, which is stored after `read` has returned; the slices do not outlive it.
            unsafe { std::slice::from_raw_parts(peer.piece(lane, pieces, round, self.rank).cast_const(), self.piece()) }
        };
        let given: Vec<Option<&[u8]>> = self.peers.iter().map(|peer| peer.as_ref().map(piece)).collect();
        read(&given);
        self.taken[lane as usize] = round.wrapping_add(1);
        self.own.advance(lane, Counter::Taken, round.wrapping_add(1));
        Ok(())
    }

    /// Waits until a counter of every peer has reached `rounds`.
    fn wait(&self, lane: Lane, which: Counter, rounds: u32, watch: &Watch) -> Result<(), Ending> {
        for peer in self.peers.iter().flatten() {
            let spin = |_| {
                std::hint::spin_loop();
                peer.reached(lane, which, rounds)
            };
            if (0..SPINS).any(spin) {
                continue;
            }
            loop {
                // In this order: a peer that has left has done its part before.
                let verdict = watch(&self.lagging(lane, which, rounds));
                if peer.reached(lane, which, rounds) {
                    break;
                }
                verdict?;
                peer.sleep(lane, which, rounds);
            }
        }
        Ok(())
    }

    fn lagging(&self, lane: Lane, which: Counter, rounds: u32) -> Vec<usize> {
        let lags = |peer: &Option<Segment>| peer.as_ref().is_some_and(|peer| !peer.reached(lane, which, rounds));
        self.peers.iter().enumerate().filter(|(_, peer)| lags(peer)).map(|(rank, _)| rank).collect()
    }
}
