//! Ranks that are threads of one process.
//!
//! A collective posts its tensor into a slot that all ranks of the group share. The work is cut into one share for each rank, and
//! whoever waits takes the shares nobody has taken yet, so a rank that computes on before it waits holds nobody up.
//!
//! Invariant: a tensor in a slot is only read until every share is done; then its owner, and nobody else, holds it and writes to it.
//! No wait outlasts the deadline, and a rank whose handle is dropped fails the others at once.

use crate::comm::call::{self, Call, Operation, Seat};
use crate::comm::{Group, Pending, Reduction, tree};
use crate::device::memory::{Buffer, Memory};
use crate::device::tensor::Tensor;
use anyhow::{Result, anyhow, ensure};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The ranks of one world, all in this process.
pub struct Threads {
    world: usize,
    deadline: Duration,
    rooms: Mutex<Rooms>,
}

/// By name and members: groups of one axis share a name.
type Rooms = HashMap<(String, Vec<usize>), Arc<Room>>;

impl Threads {
    /// `deadline`: how long any one wait may take.
    pub fn new(world: usize, deadline: Duration) -> Arc<Threads> {
        Arc::new(Threads { world, deadline, rooms: Mutex::default() })
    }

    /// The handle by which `rank` takes part in the group of `members` (ranks of the world, in the group's rank order).
    ///
    /// Every member asks for it once, with the same name and members. Dropping the handle is leaving the group for good.
    pub fn group(&self, rank: usize, members: &[usize], name: &str) -> Result<Arc<dyn Group>> {
        let seat = Seat::new(name, rank, members, self.world)?;
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        let room = rooms.entry((name.to_string(), members.to_vec())).or_insert_with(|| Arc::new(Room::new(members.len(), self.deadline)));
        let mut state = room.lock();
        ensure!(!state.present[seat.rank], "{seat} joins a second time");
        state.present[seat.rank] = true;
        drop(state);
        Ok(Arc::new(Member { room: room.clone(), seat: Arc::new(seat), calls: AtomicU64::new(0) }))
    }
}

/// What the ranks of one group share.
struct Room {
    deadline: Duration,
    /// Results on their way between ranks; not part of any device's account.
    memory: Arc<Memory>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    slots: HashMap<u64, Slot>,
    links: HashMap<(usize, usize), Link>,
    present: Vec<bool>,
    /// Why a member will never call again.
    gone: Vec<Option<&'static str>>,
    /// The first failure: nobody waits for others after it.
    failure: Option<String>,
    /// Whom each member stands still for, and in which call.
    waits: Vec<Option<Wait>>,
}

#[derive(Clone)]
struct Wait {
    missing: Vec<usize>,
    number: u64,
    call: Call,
}

/// One collective, from its first arrival until every rank has its result.
struct Slot {
    first: (usize, Call),
    arrived: Vec<bool>,
    /// Lent to the workers on shares until all shares are done.
    tensors: Vec<Option<Arc<Tensor>>>,
    shares: Vec<Share>,
    collected: usize,
}

enum Share {
    Free,
    Taken,
    Done(Arc<Buffer>),
}

/// Tensors between two ranks, one way. Either side may come first; the second one copies.
#[derive(Default)]
struct Link {
    posted: [u64; 2],
    /// All sends or all receives, never both: a pair is taken out when its second half comes.
    open: VecDeque<Offer>,
    /// Tensors whose owner has not come back for them, by call number: of senders and of receivers.
    finished: [HashMap<u64, Tensor>; 2],
}

struct Offer {
    call: Call,
    number: u64,
    x: Tensor,
}

struct Member {
    room: Arc<Room>,
    seat: Arc<Seat>,
    calls: AtomicU64,
}

impl Room {
    fn new(size: usize, deadline: Duration) -> Room {
        let state = State {
            slots: HashMap::new(),
            links: HashMap::new(),
            present: vec![false; size],
            gone: vec![None; size],
            failure: None,
            waits: vec![None; size],
        };
        Room { deadline, memory: Arc::new(Memory::of_host()), state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody in this group waits any more. The first failure is the one that is remembered.
    fn fail(&self, mut state: MutexGuard<'_, State>, sentence: String) -> anyhow::Error {
        state.failure.get_or_insert(sentence.clone());
        drop(state);
        self.changed.notify_all();
        anyhow!(sentence)
    }

    /// Sleeps until something changes, or fails when the deadline is over.
    fn sleep<'a>(&self, mut state: MutexGuard<'a, State>, seat: &Seat, wait: Wait, until: Instant) -> Result<MutexGuard<'a, State>> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let rest =
                format!("gave up after {:.1} s, still missing: {}", self.deadline.as_secs_f64(), state.describe(seat, &wait.missing));
            let sentence = sentence(seat, wait.number, wait.call, &rest);
            return Err(self.fail(state, sentence));
        }
        state.waits[seat.rank] = Some(wait);
        let mut state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        state.waits[seat.rank] = None;
        Ok(state)
    }

    fn scratch(&self, source: &[u8]) -> Arc<Buffer> {
        let mut buffer = Memory::allocate(&self.memory, source.len());
        buffer.bytes_mut().copy_from_slice(source);
        Arc::new(buffer)
    }
}

impl State {
    /// The ranks that are missing, and what holds them up: whoever is in no call holds up the others.
    fn describe(&self, seat: &Seat, missing: &[usize]) -> String {
        let mut words = if missing.is_empty() { "a result".to_string() } else { seat.list(missing.iter().copied()) };
        let mut reached = missing.to_vec();
        let mut next = 0;
        while let Some(&rank) = reached.get(next) {
            next += 1;
            let world = seat.members[rank];
            match &self.waits[rank] {
                Some(Wait { missing, number, call }) => {
                    words += &format!("; rank {world} waits for {} in call {number}, {call}", seat.list(missing.iter().copied()));
                    let new: Vec<usize> = missing.iter().copied().filter(|other| *other != seat.rank && !reached.contains(other)).collect();
                    reached.extend(new);
                }
                None => words += &format!("; rank {world} waits for nobody"),
            }
        }
        words
    }
}

impl Slot {
    fn new(rank: usize, call: Call, size: usize) -> Slot {
        let shares = std::iter::repeat_with(|| Share::Free).take(size).collect();
        Slot { first: (rank, call), arrived: vec![false; size], tensors: vec![None; size], shares, collected: 0 }
    }

    /// A share to work on, `own` before any other.
    fn take_share(&mut self, own: usize) -> Option<usize> {
        let size = self.shares.len();
        let index = (0..size).map(|i| (own + i) % size).find(|&i| matches!(self.shares[i], Share::Free))?;
        self.shares[index] = Share::Taken;
        Some(index)
    }

    /// The results of all shares, once they are all there.
    fn results(&self) -> Option<Vec<Arc<Buffer>>> {
        self.shares.iter().map(|share| if let Share::Done(buffer) = share { Some(buffer.clone()) } else { None }).collect()
    }
}

impl Member {
    fn sentence(&self, number: u64, call: Call, rest: &str) -> String {
        sentence(&self.seat, number, call, rest)
    }

    /// Enters a collective. What is in `lent` is read by others until all shares are done; `mine` is this rank's share, if it has it now.
    fn post(&self, call: Call, lent: Option<Tensor>, mine: Option<Arc<Buffer>>) -> Result<u64> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let rank = self.seat.rank;
        let mut state = self.room.lock();
        if let Some(failure) = &state.failure {
            return Err(anyhow!(self.sentence(number, call, &format!("the group has failed: {failure}"))));
        }
        let slot = state.slots.entry(number).or_insert_with(|| Slot::new(rank, call, self.seat.size()));
        if slot.first.1 != call {
            let (other, theirs) = slot.first;
            let rest = format!("{} calls {theirs} instead, all ranks must make the same calls", self.seat.member(other));
            let sentence = self.sentence(number, call, &rest);
            return Err(self.room.fail(state, sentence));
        }
        slot.arrived[rank] = true;
        slot.tensors[rank] = lent.map(Arc::new);
        if let Some(mine) = mine {
            slot.shares[rank] = Share::Done(mine);
        }
        drop(state);
        self.room.changed.notify_all();
        Ok(number)
    }
}

fn sentence(seat: &Seat, number: u64, call: Call, rest: &str) -> String {
    format!("{seat} in call {number}, {call}: {rest}")
}

/// Waits for a collective and works on its shares. Gives back the tensor that was lent, if one was, and every share's result.
fn collect(room: &Room, seat: &Seat, number: u64, call: Call) -> Result<(Option<Tensor>, Vec<Arc<Buffer>>)> {
    let until = Instant::now() + room.deadline;
    let mut state = room.lock();
    loop {
        let slot = state.slots.get_mut(&number).expect("a slot stays until every rank has collected");
        let missing: Vec<usize> = (0..seat.size()).filter(|&rank| !slot.arrived[rank]).collect();
        if missing.is_empty() {
            if let Some(results) = slot.results() {
                let lent = slot.tensors[seat.rank].take();
                slot.collected += 1;
                if slot.collected == seat.size() {
                    state.slots.remove(&number);
                }
                let lent = lent.map(|x| Arc::try_unwrap(x).expect("every reader lets go before its share is done"));
                return Ok((lent, results));
            }
            if let Some(index) = slot.take_share(seat.rank) {
                let inputs: Vec<Arc<Tensor>> = slot.tensors.iter().flatten().cloned().collect();
                drop(state);
                let result = work(room, inputs, index, call);
                state = room.lock();
                state.slots.get_mut(&number).expect("a slot stays until every rank has collected").shares[index] = Share::Done(result);
                room.changed.notify_all();
                continue;
            }
        } else if let Some(failure) = &state.failure {
            return Err(anyhow!(sentence(seat, number, call, &format!("the group has failed: {failure}"))));
        } else if let Some(rank) = missing.iter().copied().find(|&rank| state.gone[rank].is_some()) {
            let why = state.gone[rank].expect("just found");
            let sentence = sentence(seat, number, call, &format!("{} {why}", seat.member(rank)));
            return Err(room.fail(state, sentence));
        }
        state = room.sleep(state, seat, Wait { missing, number, call }, until)?;
    }
}

/// Share `index` of a collective: that slice of every rank's tensor, reduced or laid side by side.
fn work(room: &Room, inputs: Vec<Arc<Tensor>>, index: usize, call: Call) -> Arc<Buffer> {
    let ranks = inputs.len();
    let slices: Vec<&[u8]> = inputs.iter().map(|x| &call::bytes(x)[call::slice_bytes(x, ranks, index)]).collect();
    let buffer = match call.operation {
        Operation::AllReduce(reduction) | Operation::ReduceScatter(reduction) => {
            let mut buffer = Memory::allocate(&room.memory, slices[0].len());
            tree::reduce(buffer.bytes_mut(), &slices, inputs[0].dtype(), reduction);
            buffer
        }
        Operation::AllToAll => {
            let mut buffer = Memory::allocate(&room.memory, slices.iter().map(|slice| slice.len()).sum());
            let mut rest = buffer.bytes_mut();
            for slice in &slices {
                let (here, after) = rest.split_at_mut(slice.len());
                here.copy_from_slice(slice);
                rest = after;
            }
            buffer
        }
        other => panic!("the shares of {} are there from the start", other.name()),
    };
    Arc::new(buffer)
}

impl Member {
    /// A collective whose tensor is lent to the other ranks; `place` writes the results back into it.
    fn lend(&self, operation: Operation, x: Tensor, place: fn(&mut Tensor, usize, &[Arc<Buffer>])) -> Result<Pending> {
        let call = Call::new(operation, &x, self.seat.size())?;
        if call::is_dry(&x) {
            return Ok(Pending::ready(x));
        }
        let number = self.post(call, Some(x), None)?;
        let (room, seat) = (self.room.clone(), self.seat.clone());
        Ok(Pending::later(move || {
            let (lent, results) = collect(&room, &seat, number, call)?;
            let mut x = lent.expect("it was lent when the call was posted");
            place(&mut x, seat.rank, &results);
            Ok(x)
        }))
    }

    /// One half of a send and a receive. `side`: 0 sends, 1 receives.
    fn point(&self, operation: Operation, peer: usize, x: Tensor, side: usize) -> Result<Pending> {
        assert!(peer < self.seat.size() && peer != self.seat.rank, "{} and peer {peer}", self.seat);
        let call = Call::new(operation, &x, self.seat.size())?;
        if call::is_dry(&x) {
            return Ok(Pending::ready(x));
        }
        let key = if side == 0 { (self.seat.rank, peer) } else { (peer, self.seat.rank) };
        let mut state = self.room.lock();
        let failure = state.failure.clone();
        let link = state.links.entry(key).or_default();
        let number = link.posted[side];
        link.posted[side] += 1;
        if let Some(failure) = failure {
            return Err(anyhow!(self.sentence(number, call, &format!("the group has failed: {failure}"))));
        }
        if link.posted[1 - side] <= number {
            link.open.push_back(Offer { call, number, x });
            drop(state);
            let (room, seat) = (self.room.clone(), self.seat.clone());
            return Ok(Pending::later(move || meet(&room, &seat, call, key, number, side, peer)));
        }
        let other = link.open.pop_front().expect("the other side has posted more than this one");
        assert_eq!(other.number, number, "both sides of a link count alike");
        if other.call.tensor != call.tensor {
            let sentence = self.sentence(number, call, &format!("{} calls {} instead", self.seat.member(peer), other.call));
            return Err(self.room.fail(state, sentence));
        }
        drop(state);
        let (mine, theirs) = copy_over(x, other.x, side);
        let mut state = self.room.lock();
        state.links.entry(key).or_default().finished[1 - side].insert(number, theirs);
        drop(state);
        self.room.changed.notify_all();
        Ok(Pending::ready(mine))
    }
}

/// Copies from the sender's tensor to the receiver's, whichever of the two `mine` is.
fn copy_over(mut mine: Tensor, mut theirs: Tensor, side: usize) -> (Tensor, Tensor) {
    match side {
        0 => theirs.view_mut().copy_from(mine.view()),
        _ => mine.view_mut().copy_from(theirs.view()),
    }
    (mine, theirs)
}

/// Waits until the other side of a send or receive has come and has copied.
fn meet(room: &Room, seat: &Seat, call: Call, key: (usize, usize), number: u64, side: usize, peer: usize) -> Result<Tensor> {
    let until = Instant::now() + room.deadline;
    let mut state = room.lock();
    loop {
        let link = state.links.entry(key).or_default();
        if let Some(x) = link.finished[side].remove(&number) {
            return Ok(x);
        }
        let met = link.posted[1 - side] > number;
        if let Some(failure) = &state.failure {
            return Err(anyhow!(sentence(seat, number, call, &format!("the group has failed: {failure}"))));
        }
        if let (false, Some(why)) = (met, state.gone[peer]) {
            let sentence = sentence(seat, number, call, &format!("{} {why}", seat.member(peer)));
            return Err(room.fail(state, sentence));
        }
        let missing = if met { Vec::new() } else { vec![peer] };
        state = room.sleep(state, seat, Wait { missing, number, call }, until)?;
    }
}

fn place_all(x: &mut Tensor, _: usize, results: &[Arc<Buffer>]) {
    for (i, result) in results.iter().enumerate() {
        let range = call::slice_bytes(x, results.len(), i);
        call::bytes_mut(x)[range].copy_from_slice(result.bytes());
    }
}

fn place_own_slice(x: &mut Tensor, rank: usize, results: &[Arc<Buffer>]) {
    let range = call::slice_bytes(x, results.len(), rank);
    call::bytes_mut(x)[range].copy_from_slice(results[rank].bytes());
}

fn place_own_share(x: &mut Tensor, rank: usize, results: &[Arc<Buffer>]) {
    call::bytes_mut(x).copy_from_slice(results[rank].bytes());
}

impl Group for Member {
    fn size(&self) -> usize {
        self.seat.size()
    }

    fn rank(&self) -> usize {
        self.seat.rank
    }

    fn all_reduce(&self, x: Tensor, reduction: Reduction) -> Result<Pending> {
        self.lend(Operation::AllReduce(reduction), x, place_all)
    }

    fn reduce_scatter(&self, x: Tensor, reduction: Reduction) -> Result<Pending> {
        self.lend(Operation::ReduceScatter(reduction), x, place_own_slice)
    }

    fn all_gather(&self, mut x: Tensor) -> Result<Pending> {
        let call = Call::new(Operation::AllGather, &x, self.seat.size())?;
        if call::is_dry(&x) {
            return Ok(Pending::ready(x));
        }
        let range = call::slice_bytes(&x, self.seat.size(), self.seat.rank);
        let mine = self.room.scratch(&call::bytes(&x)[range]);
        let number = self.post(call, None, Some(mine))?;
        let (room, seat) = (self.room.clone(), self.seat.clone());
        Ok(Pending::later(move || {
            let (_, results) = collect(&room, &seat, number, call)?;
            place_all(&mut x, seat.rank, &results);
            Ok(x)
        }))
    }

    fn all_to_all(&self, x: Tensor) -> Result<Pending> {
        self.lend(Operation::AllToAll, x, place_own_share)
    }

    fn send(&self, to: usize, x: Tensor) -> Result<Pending> {
        self.point(Operation::Send, to, x, 0)
    }

    fn receive(&self, from: usize, x: Tensor) -> Result<Pending> {
        self.point(Operation::Receive, from, x, 1)
    }

    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let number = self.post(Call::EXCHANGE, None, Some(self.room.scratch(mine)))?;
        let (_, results) = collect(&self.room, &self.seat, number, Call::EXCHANGE)?;
        Ok(results.iter().map(|result| result.bytes().to_vec()).collect())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let why = if std::thread::panicking() { "has left: its thread panicked" } else { "has left the group" };
        self.room.lock().gone[self.seat.rank] = Some(why);
        self.room.changed.notify_all();
    }
}
