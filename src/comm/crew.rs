//! The thread of a group whose members reach each other over a mesh: it carries out the collectives that have been called.
//!
//! A reduce-scatter is an all-to-all of slices and a local sum in the canonical tree; an all-reduce is that and an all-gather. Slices go to
//! peers of other hosts in one message each; to peers that share memory they go in rounds of small pieces (`shared_memory`), so that a sum
//! is made from what the peers have written, without a copy between. Who shares memory the members find out in the first call, which is
//! announced over sockets to all alike.
//!
//! Invariant: which way the bytes go decides nothing: the pieces of a sum are its slices cut between elements. After the first failure
//! of a group nothing more is carried out in it.

use crate::comm::call::{self, Call, Operation, Seat};
use crate::comm::frame::{HEADER, Header, Payload, Phase};
use crate::comm::mesh::{Address, Awaited, Ending, Hub, Parcel, Sent};
use crate::comm::shared_memory::{Lane, Lanes, Offer, Pieces, Segment, Watch};
use crate::comm::{Reduction, tree};
use crate::device::memory::{Buffer, Memory};
use crate::device::tensor::Tensor;
use anyhow::{Context, Result, anyhow};
use std::ops::Range;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Bytes of a slice that are summed at a time where no memory is shared.
const PIECE: usize = 128 << 10;

/// A collective on its way through the crew.
pub struct Work {
    pub header: Header,
    pub x: Arc<Tensor>,
    pub sent: Arc<Sent>,
    pub done: Arc<Done>,
    /// Whether this is the first call of the group.
    pub first: bool,
    /// Whether its slices have been sent, to those who get them over a socket.
    pub posted: bool,
}

/// Where the crew leaves the outcome, and for the time until then, which messages it waits for.
#[derive(Default)]
pub struct Done {
    pub outcome: Mutex<Option<Result<Tensor, Ending>>>,
    pub awaited: Awaited,
}

impl Done {
    fn await_only(&self, addresses: Vec<Address>) {
        *self.awaited.lock().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    fn has_come(&self, address: Address) {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| *other != address);
    }
}

/// By rank of the group: whether it shares memory with this one. Agreed on in the first collective.
pub type Near = OnceLock<Vec<bool>>;

/// What the thread of a group needs: no mesh, so that it does not keep the connections alive.
pub struct Crew {
    hub: Arc<Hub>,
    seat: Arc<Seat>,
    near: Arc<Near>,
    /// None: no peer shares memory with this rank, or it is not known yet.
    lanes: Option<Lanes>,
    over: Option<Ending>,
}

pub fn others(seat: &Seat) -> impl Iterator<Item = usize> + use<> {
    let (rank, size) = (seat.rank, seat.size());
    // Each rank starts with its neighbour, so that they do not all write to the same one at once.
    (1..size).map(move |step| (rank + step) % size)
}

pub fn prefix(seat: &Seat, header: &Header) -> String {
    format!("{seat} in {}", what(header))
}

pub fn what(header: &Header) -> String {
    format!("call {}, {}", header.number, header.call)
}

/// The error of a wait that has ended badly. A deadline is a failure of the whole job, so everybody is told. `missing`: of the world.
pub fn give_up(hub: &Hub, seat: &Seat, header: &Header, ending: Ending, missing: Vec<usize>) -> anyhow::Error {
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
pub fn mismatch(hub: &Hub, seat: &Seat, header: &Header, from: usize, theirs: Call) -> Ending {
    let rest = format!("{} calls {theirs} instead, all ranks must make the same calls", seat.member(from));
    let sentence = format!("{}: {rest}", prefix(seat, header));
    hub.fail(&sentence);
    Ending::Failure(sentence)
}

/// Sends the first messages of a collective. False: its slices are for the crew to send, for it is not known yet who shares memory.
pub fn post(hub: &Arc<Hub>, seat: &Seat, near: &Near, header: &Header, x: &Arc<Tensor>, first: bool, sent: &Arc<Sent>) -> Result<bool> {
    if first {
        for peer in others(seat) {
            hub.send(seat.members[peer], *header, Payload::Nothing, sent).with_context(|| prefix(seat, header))?;
        }
    }
    let Some(near) = near.get().filter(|_| !first) else { return Ok(false) };
    post_slices(hub, seat, header, x, sent, others(seat).filter(|peer| !near[*peer]))?;
    Ok(true)
}

fn post_slices(
    hub: &Arc<Hub>,
    seat: &Seat,
    header: &Header,
    x: &Arc<Tensor>,
    sent: &Arc<Sent>,
    peers: impl Iterator<Item = usize>,
) -> Result<()> {
    for peer in peers {
        // Of an all-gather, and of the second half of an all-reduce, everybody gets my slice; of the others each peer gets its own.
        let mine = header.call.operation == Operation::AllGather || header.phase == Phase::Gather;
        let slice = if mine { seat.rank } else { peer };
        let payload = Payload::Tensor(x.clone(), call::slice_bytes(x, seat.size(), slice));
        hub.send(seat.members[peer], *header, payload, sent).with_context(|| prefix(seat, header))?;
    }
    Ok(())
}

/// How a tensor is cut: into a slice for each rank, and each of these into pieces.
struct Cut {
    slices: Vec<Range<usize>>,
    piece: usize,
}

impl Cut {
    fn rounds(&self) -> usize {
        self.slices.iter().map(|slice| slice.len().div_ceil(self.piece)).max().unwrap_or(0)
    }

    /// Empty, where the slice has fewer pieces than others.
    fn piece(&self, slice: usize, round: usize) -> Range<usize> {
        let Range { start, end } = self.slices[slice];
        (start + round * self.piece).min(end)..(start + (round + 1) * self.piece).min(end)
    }

    /// Copies what others have given in this round to where it belongs.
    fn place(&self, x: &mut Tensor, given: &[Option<&[u8]>], round: usize) {
        for (from, given) in given.iter().enumerate() {
            let range = self.piece(from, round);
            if let Some(given) = given {
                call::bytes_mut(x)[range.clone()].copy_from_slice(&given[..range.len()]);
            }
        }
    }

    /// Sums up the slice of rank `mine`, as far as this round goes, from what is there of each rank.
    fn sum(&self, x: &mut Tensor, sources: &Sources, mine: usize, round: usize, reduction: Reduction, scratch: &mut Buffer) {
        let (range, start) = (self.piece(mine, round), round * self.piece);
        let input = |from: usize| match (sources.given[from], &sources.parcels[from]) {
            (Some(given), _) => &given[..range.len()],
            (None, Some(parcel)) => &parcel.buffer.bytes()[start..start + range.len()],
            (None, None) => &call::bytes(x)[range.clone()],
        };
        let inputs: Vec<&[u8]> = (0..self.slices.len()).map(input).collect();
        let sum = &mut scratch.bytes_mut()[..range.len()];
        tree::reduce(sum, &inputs, x.dtype(), reduction);
        call::bytes_mut(x)[range].copy_from_slice(sum);
    }
}

/// What has come from each rank: through memory, of this round, or over a socket, whole. Neither: it is this rank.
struct Sources<'a> {
    given: &'a [Option<&'a [u8]>],
    parcels: &'a [Option<Parcel>],
}

impl Crew {
    pub fn new(hub: Arc<Hub>, seat: Arc<Seat>, near: Arc<Near>) -> Crew {
        Crew { hub, seat, near, lanes: None, over: None }
    }

    pub fn work(mut self, queue: Receiver<Work>) {
        for work in queue {
            let done = work.done.clone();
            let outcome = match &self.over {
                Some(ending) => Err(ending.clone()),
                None => self.carry_out(work),
            };
            self.over = outcome.as_ref().err().cloned();
            *done.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            self.hub.announce();
        }
    }

    fn address(&self, header: &Header, phase: Phase, from: usize) -> Address {
        Address { group: header.group, phase, number: header.number, from: self.seat.members[from] }
    }

    /// One message of this phase from each of these members; by rank, none from the others.
    fn gather(&self, header: &Header, phase: Phase, from: &[usize], done: &Done) -> Result<Vec<Option<Parcel>>, Ending> {
        done.await_only(from.iter().map(|from| self.address(header, phase, *from)).collect());
        let mut parcels: Vec<Option<Parcel>> = (0..self.seat.size()).map(|_| None).collect();
        for &from in from {
            let address = self.address(header, phase, from);
            let parcel = self.hub.take(address, None)?;
            done.has_come(address);
            if parcel.header.call != header.call {
                return Err(mismatch(&self.hub, &self.seat, header, from, parcel.header.call));
            }
            parcels[from] = Some(parcel);
        }
        Ok(parcels)
    }

    fn carry_out(&mut self, work: Work) -> Result<Tensor, Ending> {
        let Work { header, x, sent, done, first, posted } = work;
        if first {
            let everybody: Vec<usize> = others(&self.seat).collect();
            self.gather(&header, Phase::Scatter, &everybody, &done)?;
            let near = self.agree(&header, &everybody, &done)?;
            self.near.set(near).expect("a group has one first call");
        }
        let near = self.near.get().expect("the first call has been carried out");
        let far: Vec<usize> = others(&self.seat).filter(|peer| !near[*peer]).collect();
        let phase = if first { Phase::Slices } else { Phase::Scatter };
        if !posted {
            self.post(&Header { phase, ..header }, &x, &sent, &far)?;
        }
        let mut parcels = self.gather(&header, phase, &far, &done)?;
        let mut x = self.whole(x, &sent)?;
        self.rounds(&header, &mut x, &parcels, &done)?;
        match header.call.operation {
            Operation::AllReduce(_) if !far.is_empty() => {
                let lent = Arc::new(x);
                self.post(&Header { phase: Phase::Gather, ..header }, &lent, &sent, &far)?;
                parcels = self.gather(&header, Phase::Gather, &far, &done)?;
                x = self.whole(lent, &sent)?;
            }
            Operation::AllToAll | Operation::AllGather => {}
            _ => parcels.clear(),
        }
        for (from, parcel) in parcels.iter().enumerate() {
            if let Some(parcel) = parcel {
                let range = call::slice_bytes(&x, self.seat.size(), from);
                call::bytes_mut(&mut x)[range].copy_from_slice(parcel.buffer.bytes());
            }
        }
        Ok(x)
    }

    /// Finds out which peers share memory with this rank: those whose segment it can open, and who can open its own.
    fn agree(&mut self, header: &Header, everybody: &[usize], done: &Done) -> Result<Vec<bool>, Ending> {
        let hub = &self.hub;
        let own = if hub.shares_memory() { Segment::create(self.seat.size()) } else { Err(anyhow!("this rank keeps to sockets")) };
        let own = own.map_err(|error| hub.note(&format!("no memory can be shared here: {error:#}"))).ok();
        let words = own.as_ref().map_or_else(Vec::new, |(_, offer)| offer.encode());
        self.tell(header, Phase::Offer, everybody, |_| words.clone())?;
        let offers = self.gather(header, Phase::Offer, everybody, done)?;
        let open = |(peer, parcel): (usize, &Option<Parcel>)| {
            let offer = own.as_ref().and(Offer::decode(parcel.as_ref()?.buffer.bytes())).filter(Offer::is_of_this_host)?;
            let opened = Segment::open(&offer, self.seat.size());
            opened.map_err(|error| hub.note(&format!("rank {} is on this host, but {error:#}", self.seat.members[peer]))).ok()
        };
        let mut peers: Vec<Option<Segment>> = offers.iter().enumerate().map(open).collect();
        self.tell(header, Phase::Verdict, everybody, |peer| vec![peers[peer].is_some().into()])?;
        for (peer, verdict) in peers.iter_mut().zip(self.gather(header, Phase::Verdict, everybody, done)?) {
            if verdict.is_none_or(|verdict| verdict.buffer.bytes() != [1]) {
                *peer = None;
            }
        }
        let near: Vec<bool> = peers.iter().map(Option::is_some).collect();
        if let (Some((own, _)), true) = (own, near.contains(&true)) {
            self.lanes = Some(Lanes::new(own, peers, self.seat.rank));
        }
        Ok(near)
    }

    /// A few bytes to each of these members.
    fn tell(&self, header: &Header, phase: Phase, peers: &[usize], bytes: impl Fn(usize) -> Vec<u8>) -> Result<(), Ending> {
        for &peer in peers {
            let bytes = bytes(peer);
            let mut buffer = Memory::allocate(&self.hub.memory, bytes.len());
            buffer.bytes_mut().copy_from_slice(&bytes);
            let (header, payload) = (Header { phase, ..*header }, Payload::Buffer(Arc::new(buffer)));
            let told = self.hub.send(self.seat.members[peer], header, payload, &Arc::default());
            told.map_err(|error| Ending::Failure(format!("{error:#}")))?;
        }
        Ok(())
    }

    fn post(&self, header: &Header, x: &Arc<Tensor>, sent: &Arc<Sent>, peers: &[usize]) -> Result<(), Ending> {
        let posted = post_slices(&self.hub, &self.seat, header, x, sent, peers.iter().copied());
        posted.map_err(|error| Ending::Failure(format!("{error:#}")))
    }

    /// A tensor that was lent to those who write, once they have let it go.
    fn whole(&self, x: Arc<Tensor>, sent: &Sent) -> Result<Tensor, Ending> {
        self.hub.all_sent(sent, None)?;
        Ok(Arc::try_unwrap(x).expect("a tensor is let go before its last message counts as written"))
    }

    /// What this rank has to sum up, and what goes through memory. Each round waits for what the peers did a round ago.
    fn rounds(&mut self, header: &Header, x: &mut Tensor, parcels: &[Option<Parcel>], done: &Done) -> Result<(), Ending> {
        let (rank, size) = (self.seat.rank, self.seat.size());
        let (hub, seat, operation) = (&self.hub, &self.seat, header.call.operation);
        let slices = (0..size).map(|slice| call::slice_bytes(x, size, slice)).collect();
        let cut = Cut { slices, piece: self.lanes.as_ref().map_or(PIECE, Lanes::piece) };
        let mut scratch = Memory::allocate(&hub.memory, cut.piece(rank, 0).len());
        let mut combine = |x: &mut Tensor, given: &[Option<&[u8]>], round: usize| match operation {
            Operation::AllReduce(reduction) | Operation::ReduceScatter(reduction) => {
                cut.sum(x, &Sources { given, parcels }, rank, round, reduction, &mut scratch);
            }
            _ => cut.place(x, given, round),
        };
        let Some(lanes) = &mut self.lanes else {
            (0..cut.rounds()).for_each(|round| combine(x, &vec![None; size], round));
            return Ok(());
        };
        let watch: &Watch = &|lagging| watch(hub, seat, header, lagging, done);
        let words = header.encode(0);
        let check =
            |from: usize, theirs: &[u8; HEADER]| if *theirs == words { Ok(()) } else { Err(other_call(hub, seat, header, from, theirs)) };
        let fill = |x: &Tensor, slice: usize, round: usize, piece: &mut [u8]| {
            let range = cut.piece(slice, round);
            piece[..range.len()].copy_from_slice(&call::bytes(x)[range]);
        };
        let first = (Lane::First, if operation == Operation::AllGather { Pieces::Same } else { Pieces::Each });
        let second = (Lane::Second, Pieces::Same);
        // Also where there is nothing to carry all must have made the same call.
        let rounds = cut.rounds().max(1);
        let twice = matches!(operation, Operation::AllReduce(_));
        for step in 0..rounds + 2 {
            if step < rounds {
                lanes.give(first, &words, watch, |slice, piece| fill(x, slice, step, piece))?;
            }
            if let Some(round) = step.checked_sub(1).filter(|round| *round < rounds) {
                lanes.take(first, check, watch, |given| combine(x, given, round))?;
                if twice {
                    lanes.give(second, &words, watch, |slice, piece| fill(x, slice, round, piece))?;
                }
            }
            if let (true, Some(round)) = (twice, step.checked_sub(2)) {
                lanes.take(second, check, watch, |given| cut.place(x, given, round))?;
            }
        }
        Ok(())
    }
}

/// What the crew does before it sleeps for want of these members, which give or take nothing.
fn watch(hub: &Hub, seat: &Seat, header: &Header, lagging: &[usize], done: &Done) -> Result<(), Ending> {
    let address = |rank: &usize| Address { group: header.group, phase: Phase::Gather, number: header.number, from: seat.members[*rank] };
    done.await_only(lagging.iter().map(address).collect());
    for from in lagging {
        // Somebody who should give me a piece has sent me a message: it exchanges words, where I am in a collective.
        if let Some(theirs) = hub.peek(Address { phase: Phase::Scatter, ..address(from) }) {
            return Err(mismatch(hub, seat, header, *from, theirs));
        }
    }
    let members: Vec<usize> = lagging.iter().map(|rank| seat.members[*rank]).collect();
    hub.ending(&members).map_or(Ok(()), Err)
}

/// A peer gives pieces of another call than this rank's.
fn other_call(hub: &Hub, seat: &Seat, header: &Header, from: usize, theirs: &[u8; HEADER]) -> Ending {
    match Header::decode(theirs) {
        Ok((theirs, _)) => mismatch(hub, seat, header, from, theirs.call),
        Err(error) => {
            Ending::Failure(hub.fail(&format!("{}: {} has shared what cannot be: {error:#}", prefix(seat, header), seat.member(from))))
        }
    }
}
