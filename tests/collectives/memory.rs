//! Ranks of one host share memory where they can: the same bits, the same refusals, and nothing left behind.

use crate::tcp::{groups, hear, leave, processes, worlds};
use crate::{PATIENT, each, errors, every_collective, ones};
use ferrotron::comm::Reduction;
use ferrotron::comm::call::{Call, Operation};
use ferrotron::comm::frame::{Header, Payload, Phase};
use ferrotron::comm::mesh::{Address, Hub};
use ferrotron::comm::shared_memory::{Offer, Segment};
use ferrotron::device::Device;
use ferrotron::device::memory::Memory;
use ferrotron::rng::fnv1a;
use half::bf16;
use std::collections::BTreeSet;
use std::fs;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Some ranks keep to sockets, the others share memory: all, none, and a part of a group.
fn check(size: usize, sockets: &[usize], slice: usize, ragged: usize) {
    let worlds = worlds(size, PATIENT);
    sockets.iter().for_each(|rank| worlds[*rank].mesh.hub.keep_to_sockets());
    let results = each(groups(&worlds, "large"), |group| {
        every_collective::<bf16>(&*group, &Device::cpu(1), slice / 9, ragged, 2)?;
        every_collective::<f32>(&*group, &Device::cpu(1), slice, ragged, 1)
    });
    for (rank, result) in results.into_iter().enumerate() {
        result.unwrap_or_else(|error| panic!("{size} ranks, {sockets:?} over sockets, rank {rank}: {error:#}"));
    }
    leave(worlds);
}

#[test]
fn memory_and_sockets_give_the_same_bits() {
    for size in 2..=5 {
        check(size, &[], 20_000, size - 1);
    }
    check(3, &[0, 1, 2], 20_000, 2);
    check(3, &[1, 2], 20_000, 1);
}

#[test]
fn a_group_that_shares_memory_in_part_gives_the_same_bits() {
    check(3, &[0], 20_000, 2);
    check(4, &[2], 20_000, 3);
    check(5, &[0, 4], 20_000, 3);
}

/// More rounds than there are buffers, and a slice that ends within a piece.
#[test]
fn many_rounds_give_the_same_bits() {
    check(2, &[], 80_001, 1);
    check(3, &[1], 80_001, 2);
}

/// Groups that have the same ranks at work at the same time do not get into each other's memory.
#[test]
fn groups_share_memory_apart_from_each_other() {
    let worlds = worlds(4, PATIENT);
    let (first, second) = (groups(&worlds, "first"), groups(&worlds, "second"));
    let both = first.into_iter().zip(second).collect::<Vec<_>>();
    std::thread::scope(|scope| {
        for (first, second) in both {
            scope.spawn(move || {
                let device = Device::cpu(1);
                for round in 0..4 {
                    let under_way = first.all_reduce(ones(100_000), Reduction::Sum).expect("posted");
                    every_collective::<f32>(&*second, &device, 10_000, 1, round).expect("well");
                    assert_eq!(under_way.wait().expect("reduced").to_vec::<f32>(), vec![4.0; 100_000]);
                }
            });
        }
    });
    leave(worlds);
}

#[test]
fn different_calls_are_refused_over_memory() {
    // The first call of the group, and one after they have agreed to share memory.
    for (odd, calls_before) in (0..5).flat_map(|odd| [(odd, 0), (odd, 2)]) {
        let worlds = worlds(3, PATIENT);
        let messages = errors(groups(&worlds, "all"), PATIENT / 2, |group| {
            for _ in 0..calls_before {
                group.all_reduce(ones(60_000), Reduction::Sum)?.wait()?;
            }
            let strange = group.rank() == 2;
            let x = if strange && odd == 0 { ones(9) } else { ones(60_000) };
            match odd {
                1 if strange => group.all_gather(x)?.wait()?,
                2 if strange => group.all_reduce(x, Reduction::Max)?.wait()?,
                3 if strange => group.reduce_scatter(x, Reduction::Sum)?.wait()?,
                4 if strange => group.exchange(b"something").map(|_| x)?,
                _ => group.all_reduce(x, Reduction::Sum)?.wait()?,
            };
            group.barrier()
        });
        for message in &messages {
            let parts = ["f32 [9]", "all_gather", "(max)", "reduce_scatter", "exchange"];
            let both = ["all_reduce (sum) of f32 [60000]", parts[odd], "rank 2"];
            assert!(both.iter().all(|part| message.contains(part)), "odd {odd} after {calls_before}: {message}");
        }
        leave(worlds);
    }
}

/// A rank that leaves in peace in the middle of what the others do.
#[test]
fn a_rank_that_leaves_ends_a_call_over_memory() {
    let mut worlds = worlds(3, PATIENT);
    let mut groups = groups(&worlds, "all");
    let (gone, left) = (worlds.pop().expect("three"), groups.pop().expect("three"));
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            left.all_reduce(ones(60_000), Reduction::Sum).and_then(|pending| pending.wait()).expect("all are there");
            drop((left, gone));
        });
        for group in groups {
            scope.spawn(move || {
                group.all_reduce(ones(60_000), Reduction::Sum).and_then(|pending| pending.wait()).expect("all are there");
                let error = group.all_reduce(ones(60_000), Reduction::Sum).and_then(|pending| pending.wait()).expect_err("one has left");
                assert!(format!("{error:#}").contains("rank 2 has left"), "{error:#}");
            });
        }
    });
    assert!(start.elapsed() < PATIENT / 2, "{:?}", start.elapsed());
    leave(worlds);
}

/// What a rank that is played by a test says and hears, over the connections of its mesh.
struct Played<'a> {
    hub: &'a Arc<Hub>,
    header: Header,
}

impl Played<'_> {
    fn say(&self, phase: Phase, bytes: &[u8]) {
        let mut buffer = Memory::allocate(&self.hub.memory, bytes.len());
        buffer.bytes_mut().copy_from_slice(bytes);
        let payload = Payload::Buffer(Arc::new(buffer));
        self.hub.send(0, Header { phase, ..self.header }, payload, &Arc::default()).expect("rank 0 listens");
    }

    fn hear(&self, phase: Phase) -> Vec<u8> {
        let address = Address { group: self.header.group, phase, number: self.header.number, from: 0 };
        let parcel = self.hub.take(address, Some(Instant::now() + PATIENT)).expect("rank 0 says it");
        parcel.buffer.bytes().to_vec()
    }
}

/// Rank 1 offers something that is not its own memory and says that it can read what rank 0 offers. It gets its slices over a socket.
fn lie(offer: impl Fn(Vec<u8>) -> Vec<u8>) {
    let worlds = worlds(2, PATIENT);
    let group = groups(&worlds, "all").remove(0);
    std::thread::scope(|scope| {
        let honest = scope.spawn(move || group.all_reduce(ones(50_000), Reduction::Sum)?.wait());
        let call = Call::new(Operation::AllReduce(Reduction::Sum), &ones(50_000), 2).expect("a sound call");
        let id = fnv1a(format!("all {:?}", [0, 1]).as_bytes());
        let played = Played { hub: &worlds[1].mesh.hub, header: Header { group: id, phase: Phase::Scatter, number: 0, call } };
        assert!(played.hear(Phase::Scatter).is_empty(), "a first call is announced without its numbers");
        played.say(Phase::Scatter, &[]);
        let theirs = played.hear(Phase::Offer);
        assert!(Segment::open(&Offer::decode(&theirs).expect("an offer"), 2).is_ok(), "what is offered in earnest can be opened");
        played.say(Phase::Offer, &offer(theirs));
        assert_eq!(played.hear(Phase::Verdict), [0]);
        played.say(Phase::Verdict, &[1]);
        let half: Vec<u8> = [2f32; 25_000].iter().flat_map(|x| x.to_le_bytes()).collect();
        played.say(Phase::Slices, &half);
        assert_eq!(played.hear(Phase::Slices).len(), half.len());
        played.say(Phase::Gather, &half);
        assert_eq!(played.hear(Phase::Gather).len(), half.len());
        let sum = honest.join().expect("no panic").expect("reduced").to_vec::<f32>();
        assert!(sum[..25_000].iter().all(|x| *x == 3.0) && sum[25_000..].iter().all(|x| *x == 2.0));
    });
    leave(worlds);
}

#[test]
fn a_peer_that_lies_about_its_memory_is_refused() {
    // Memory of another rank, as its own: under other words, it is not found by its name.
    lie(|theirs| [&theirs[..44], &[7; 32][..]].concat());
    // The name is right, what is inside is not.
    lie(|theirs| [&theirs[..52], &[7; 24][..]].concat());
    // No such process, no such file, nothing that can be understood, and nothing at all.
    lie(|theirs| [&theirs[..36], &u32::MAX.to_le_bytes()[..], &theirs[40..]].concat());
    lie(|theirs| [&theirs[..40], &9_999u32.to_le_bytes()[..], &theirs[44..]].concat());
    lie(|_| b"my memory is your memory".to_vec());
    lie(|_| Vec::new());
    // Of another host, or of this one before it was started again.
    lie(|theirs| [&[b'0'; 36][..], &theirs[36..]].concat());
    // For a group of another size.
    let (kept, offer) = Segment::create(3).expect("memory to share");
    lie(|_| offer.encode());
    drop(kept);
}

/// The memory of ferrotron that a process maps or has open, by name.
fn held(process: &Path) -> BTreeSet<String> {
    let mut words = fs::read_to_string(process.join("maps")).unwrap_or_default();
    for file in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
        words += &fs::read_link(file.path()).unwrap_or_default().to_string_lossy();
        words.push('\n');
    }
    let of_line = |line: &str| line.split_once("/memfd:ferrotron-").map(|(_, name)| name.trim_end_matches("(deleted)").trim().to_string());
    words.lines().filter_map(of_line).collect()
}

fn in_dev_shm() -> BTreeSet<String> {
    let names = fs::read_dir("/dev/shm").into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains("ferrotron")).collect()
}

#[test]
fn killed_processes_leave_no_memory_behind() {
    let mut running = processes(4, PATIENT, "loop");
    let mut outputs: Vec<_> = running.iter_mut().map(|process| BufReader::new(process.stdout.take().expect("piped"))).collect();
    outputs.iter_mut().for_each(|output| drop(hear(output, "READY")));
    let start = Instant::now();
    let shared = loop {
        let of_each: Vec<_> = running.iter().map(|process| held(Path::new(&format!("/proc/{}", process.id())))).collect();
        if of_each.iter().all(|names| names.len() == 4) {
            break of_each.into_iter().flatten().collect::<BTreeSet<_>>();
        }
        assert!(start.elapsed() < PATIENT, "not all share memory: {of_each:?}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(shared.len(), 4, "one for each rank: {shared:?}");
    running[2].kill().expect("it runs");
    for (rank, output) in outputs.iter_mut().enumerate().filter(|(rank, _)| *rank != 2) {
        assert!(hear(output, "ENDED").contains("rank 2 "), "rank {rank}");
    }
    for process in &mut running {
        process.wait().expect("ended");
    }
    for process in fs::read_dir("/proc").expect("a folder").flatten() {
        let still: Vec<_> = held(&process.path()).intersection(&shared).cloned().collect();
        assert!(still.is_empty(), "{} holds {still:?}", process.path().display());
    }
    assert_eq!(in_dev_shm(), BTreeSet::new());
}
