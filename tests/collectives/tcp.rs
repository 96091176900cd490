//! The same collectives over real sockets, between threads and between processes, some of which are killed.

use crate::{PATIENT, check, each, errors, ones};
use anyhow::{Context, Result};
use ferrotron::comm::connect::{Groups, World};
use ferrotron::comm::door::Job;
use ferrotron::comm::{Group, Reduction};
use ferrotron::device::Device;
use ferrotron::dtype::Dtype;
use ferrotron::rng::Stream;
use proptest::prelude::{ProptestConfig, any};
use rustix::process::{Pid, Signal};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn job(world: usize) -> Job {
    Job::new("a test", "a secret", "layers = 2", world)
}

/// Ranks that are threads and have a world each, as processes would.
pub fn worlds(size: usize, deadline: Duration) -> Vec<World> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    let mut listeners = vec![Some(listener)];
    listeners.resize_with(size, || None);
    std::thread::scope(|scope| {
        let join = |(rank, listener)| {
            let address = &address;
            scope.spawn(move || World::join(address, listener, &job(size), rank, None, PATIENT, deadline).expect("joined"))
        };
        let joining: Vec<_> = listeners.into_iter().enumerate().map(join).collect();
        joining.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// The same, but nobody shares memory.
fn worlds_apart(size: usize, deadline: Duration) -> Vec<World> {
    let worlds = worlds(size, deadline);
    worlds.iter().for_each(|world| world.mesh.hub.keep_to_sockets());
    worlds
}

/// With memory that the ranks share, and without.
const BOTH: [fn(usize, Duration) -> Vec<World>; 2] = [worlds, worlds_apart];

pub fn groups(worlds: &[World], name: &str) -> Vec<Arc<dyn Group>> {
    let wanted = [(name.to_string(), (0..worlds.len()).collect())];
    let connect =
        |(rank, world): (usize, &World)| Groups::connect(&world.transport(), rank, worlds.len(), &wanted).expect("a group").get(name);
    worlds.iter().enumerate().map(connect).collect()
}

/// The last one to leave waits for the others, so all leave at the same time.
pub fn leave(worlds: Vec<World>) {
    std::thread::scope(|scope| worlds.into_iter().for_each(|world| drop(scope.spawn(move || drop(world)))));
}

#[test]
fn sockets_agree_with_the_plain_tree() {
    for (size, worlds) in (1..=8).flat_map(|size| BOTH.map(|worlds| (size, worlds))) {
        let worlds = worlds(size, PATIENT);
        check(groups(&worlds, "small"), 37, size - 1, size as u64);
        check(groups(&worlds, "empty"), 0, 0, 1);
        leave(worlds);
    }
    let worlds = worlds_apart(4, PATIENT);
    check(groups(&worlds, "large"), 70_000, 3, 2);
    leave(worlds);
}

proptest::proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]
    #[test]
    fn sockets_agree_for_any_size(size in 1usize..=8, slice in 0usize..1500, ragged in 0usize..9, seed in any::<u64>()) {
        let worlds = BOTH[seed as usize % 2](size, PATIENT);
        check(groups(&worlds, "all"), slice, ragged, seed);
        leave(worlds);
    }
}

#[test]
fn calls_run_on_while_a_rank_computes() {
    for worlds in BOTH {
        calls_run_on(worlds(2, PATIENT));
    }
}

fn calls_run_on(worlds: Vec<World>) {
    each(groups(&worlds, "all"), |group| {
        let early = group.all_reduce(ones(100_000), Reduction::Sum).expect("posted");
        if group.rank() == 0 {
            group.receive(1, ones(1)).expect("posted").wait().expect("rank 1 has finished");
            early.wait().expect("finished");
        } else {
            assert_eq!(early.wait().expect("finished").to_vec::<f32>(), vec![2.0; 100_000]);
            group.send(0, ones(1)).expect("posted").wait().expect("taken");
        }
    });
    leave(worlds);
}

#[test]
fn a_silent_rank_is_named_over_sockets() {
    let deadline = Duration::from_millis(500);
    for (call, worlds) in (0..3).flat_map(|call| BOTH.map(|worlds| (call, worlds))) {
        let worlds = worlds(3, deadline);
        let messages = errors(groups(&worlds, "dp"), deadline * 20, |group| {
            if group.rank() == 1 {
                std::thread::sleep(deadline * 3);
                anyhow::bail!("rank 1 was in call of sleep")
            }
            match call {
                0 => group.all_reduce(ones(4), Reduction::Sum)?.wait().map(drop),
                1 => group.receive(1, ones(4))?.wait().map(drop),
                _ => group.barrier(),
            }
        });
        for message in &messages {
            assert!(message.contains("rank 1 ") && message.contains("in call"), "{message}");
            assert!(message.contains("rank 1 waits for nobody") || message.contains("rank 1 was in call of sleep"), "{message}");
        }
        leave(worlds);
    }
}

#[test]
fn different_calls_are_refused_over_sockets() {
    for (odd, worlds) in (0..4).flat_map(|odd| BOTH.map(|worlds| (odd, worlds))) {
        let worlds = worlds(3, PATIENT);
        let messages = errors(groups(&worlds, "all"), PATIENT / 2, |group| {
            let strange = group.rank() == 2;
            let x = if strange && odd == 0 { ones(9) } else { ones(6) };
            match odd {
                1 if strange => group.all_gather(x)?.wait()?,
                2 if strange => group.all_reduce(x, Reduction::Max)?.wait()?,
                3 if strange => group.all_reduce(Device::cpu(1).zeros([6], Dtype::Bf16), Reduction::Sum)?.wait()?,
                _ => group.all_reduce(x, Reduction::Sum)?.wait()?,
            };
            // Those who sent last may have what they need and be told only later.
            group.barrier()
        });
        for message in &messages {
            let both = ["all_reduce (sum) of f32 [6]", ["f32 [9]", "all_gather", "(max)", "bf16 [6]"][odd], "rank 2"];
            assert!(both.iter().all(|part| message.contains(part)), "{message}");
        }
        leave(worlds);
    }
}

#[test]
fn a_receive_of_another_shape_is_refused_over_sockets() {
    let worlds = worlds(2, PATIENT);
    let messages = errors(groups(&worlds, "pp"), PATIENT / 2, |group| {
        match group.rank() {
            0 => group.send(1, ones(4))?.wait()?,
            _ => group.receive(0, ones(5))?.wait()?,
        };
        group.barrier()
    });
    assert!(messages.iter().all(|message| message.contains("send of f32 [4]") && message.contains("receive of f32 [5]")), "{messages:?}");
    leave(worlds);
}

/// Some of the faults of `faults.rs`, over sockets.
#[test]
fn faults_over_sockets_make_nobody_hang() {
    let deadline = Duration::from_millis(600);
    for seed in 0..32 {
        let size = 2 + seed as usize % 3;
        let worlds = BOTH[seed as usize / 3 % 2](size, deadline);
        crate::faults::run(seed, deadline, groups(&worlds, "all"));
        leave(worlds);
    }
}

/// Rank 1 is reached by a hostname's worth of detours: it listens everywhere and is found through the rendezvous' host.
#[test]
fn a_rank_that_listens_everywhere_is_found() {
    let listener = TcpListener::bind("0.0.0.0:0").expect("a free port");
    let address = format!("127.0.0.1:{}", listener.local_addr().expect("bound").port());
    let mut listeners = [Some(listener), None].into_iter().enumerate();
    let everywhere = "0.0.0.0".parse().ok();
    std::thread::scope(|scope| {
        listeners.by_ref().for_each(|(rank, listener)| {
            let address = &address;
            scope.spawn(move || {
                let world = World::join(address, listener, &job(2), rank, everywhere, PATIENT, PATIENT).expect("joined");
                let wanted = [("all".to_string(), vec![0, 1])];
                Groups::connect(&world.transport(), rank, 2, &wanted).expect("a group").get("all").barrier().expect("both are there");
            });
        });
    });
}

/// A wire that flips one bit of what passes, some bytes after the handshake.
fn bad_wire(to: String, after: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    std::thread::spawn(move || {
        let (mut caller, _) = listener.accept().expect("the caller comes");
        let mut host = TcpStream::connect(to).expect("the host is there");
        let (mut back, mut forth) = (host.try_clone().expect("a second handle"), caller.try_clone().expect("a second handle"));
        std::thread::spawn(move || std::io::copy(&mut back, &mut forth));
        let (mut passed, mut bytes) = (0, [0; 4096]);
        while let Ok(count @ 1..) = caller.read(&mut bytes) {
            if (passed..passed + count).contains(&(145 + after)) {
                bytes[145 + after - passed] ^= 1 << (after % 8);
            }
            passed += count;
            if host.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        // Ends the copying the other way as well.
        host.shutdown(std::net::Shutdown::Both).ok();
    });
    address
}

#[test]
fn a_flipped_bit_on_the_wire_is_noticed() {
    let stream = Stream::new(1, "bad wires");
    for round in 0..12 {
        let worlds = worlds_apart(2, PATIENT);
        let key = "data address of rank 1";
        let place = String::from_utf8(worlds[0].store.get(key, PATIENT).expect("published")).expect("text");
        let wire = bad_wire(place, if round == 0 { 30 } else { stream.word(round) as usize % 200_000 });
        worlds[0].store.set(key, wire.as_bytes(), PATIENT).expect("set");
        let messages = errors(groups(&worlds, "dp"), PATIENT / 2, |group| {
            for _ in 0..20 {
                group.all_reduce(ones(10_000), Reduction::Sum)?.wait()?;
            }
            Ok(())
        });
        for message in &messages {
            let named = message.contains("rank 0 has sent what cannot be, as rank 1 sees it") && message.contains("corrupt");
            assert!(named && message.contains("in call"), "round {round}: {message}");
        }
        leave(worlds);
    }
}

#[test]
fn a_world_that_is_not_complete_says_who_is_missing() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    let brief = Duration::from_millis(300);
    let error = World::join(&address, Some(listener), &job(3), 0, None, brief, brief).err().expect("rank 1 and 2 are not there");
    assert!(format!("{error:#}").contains("still missing: rank 1, 2"), "{error:#}");
}

#[test]
fn a_rank_that_panics_stops_the_others() {
    let worlds = worlds(3, PATIENT);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let everybody: Vec<usize> = vec![0, 1, 2];
        for (rank, world) in worlds.into_iter().enumerate() {
            let wanted = [("tp".to_string(), everybody.clone())];
            scope.spawn(move || {
                let group = Groups::connect(&world.transport(), rank, 3, &wanted).expect("a group").get("tp");
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    // The world is unwound with this rank.
                    let _world = world;
                    assert!(rank != 2, "rank 2 panics on purpose");
                    group.all_reduce(ones(6), Reduction::Sum).and_then(|pending| pending.wait()).map(drop)
                }));
                match result {
                    Ok(result) => assert!(format!("{:#}", result.expect_err("rank 2 is gone")).contains("rank 2")),
                    Err(_) => assert_eq!(rank, 2),
                }
            });
        }
    });
    assert!(start.elapsed() < PATIENT / 2, "{:?}", start.elapsed());
}

const PART: &str = "FERROTRON_TEST_PART";

/// What a process of the tests below does; as a test of its own, nothing.
#[test]
fn part_of_a_process() {
    let Ok(part) = std::env::var(PART) else { return };
    let words: Vec<&str> = part.split(' ').collect();
    let number = |i: usize| words[i].parse::<usize>().expect("a number");
    let (rank, size, milliseconds) = (number(1), number(2), number(3));
    let run = || -> Result<()> {
        let deadline = Duration::from_millis(milliseconds as u64);
        let world = World::join(words[0], None, &job(size), rank, None, PATIENT, deadline)?;
        let wanted = [("all".to_string(), (0..size).collect())];
        let group = Groups::connect(&world.transport(), rank, size, &wanted)?.get("all");
        if words[4] == "check" {
            crate::every_collective::<f32>(&*group, &Device::cpu(1), 1000, 1, 1)?;
            return crate::every_collective::<half::bf16>(&*group, &Device::cpu(1), 50_000, 1, 2);
        }
        println!("READY");
        loop {
            group.all_reduce(ones(50_000), Reduction::Sum)?.wait().context("summing for ever")?;
        }
    };
    let ended = run();
    println!("ENDED {}", ended.as_ref().map_or_else(|error| format!("{error:#}"), |()| "well".to_string()));
    std::process::exit(if ended.is_ok() { 0 } else { 3 });
}

/// This test binary once for each rank, as processes.
pub fn processes(size: usize, deadline: Duration, what: &str) -> Vec<Child> {
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    let start = |rank: usize| {
        Command::new(std::env::current_exe().expect("the own path"))
            .args(["--exact", "tcp::part_of_a_process", "--nocapture"])
            .env(PART, format!("{free} {rank} {size} {} {what}", deadline.as_millis()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("this test binary starts again")
    };
    (0..size).map(start).collect()
}

/// Reads until a line holds `word`, and gives what follows it.
pub fn hear(output: &mut impl BufRead, word: &str) -> String {
    let mut line = String::new();
    while output.read_line(&mut line).expect("a line") > 0 {
        if let Some((_, rest)) = line.split_once(word) {
            return rest.trim().to_string();
        }
        line.clear();
    }
    panic!("the process ended without saying {word:?}")
}

#[test]
fn processes_agree_with_the_plain_tree() {
    for mut process in processes(4, PATIENT, "check") {
        let mut output = BufReader::new(process.stdout.take().expect("piped"));
        assert_eq!(hear(&mut output, "ENDED"), "well");
        assert!(process.wait().expect("ended").success());
    }
}

/// Kills or stops one of four processes at some moment: the others end soon, with its name and their call.
fn lose_one(seed: u64, signal: Signal, deadline: Duration) {
    let stream = Stream::new(seed, "losses");
    let mut running = processes(4, deadline, "loop");
    let mut outputs: Vec<_> = running.iter_mut().map(|process| BufReader::new(process.stdout.take().expect("piped"))).collect();
    outputs.iter_mut().for_each(|output| drop(hear(output, "READY")));
    std::thread::sleep(Duration::from_millis(stream.word(0) % 100));
    let lost = (stream.word(1) % 4) as usize;
    let start = Instant::now();
    rustix::process::kill_process(Pid::from_child(&running[lost]), signal).expect("it runs");
    for (rank, output) in outputs.iter_mut().enumerate().filter(|(rank, _)| *rank != lost) {
        let message = hear(output, "ENDED");
        let stopped = signal != Signal::STOP || message.contains(&format!("rank {lost} does not answer"));
        let named = message.contains(&format!("rank {lost} ")) && message.contains("in call") && stopped;
        assert!(named, "seed {seed}, {signal:?} to rank {lost}: rank {rank} says: {message}");
        assert_eq!(running[rank].wait().expect("ended").code(), Some(3));
    }
    let took = start.elapsed();
    assert!(took < deadline + Duration::from_secs(10), "seed {seed}, {signal:?} to rank {lost}: the others took {took:?}");
    running[lost].kill().expect("still ours");
    running[lost].wait().expect("killed");
}

#[test]
fn a_killed_process_stops_the_others() {
    (0..6).for_each(|seed| lose_one(seed, Signal::KILL, PATIENT));
}

#[test]
fn a_stopped_process_stops_the_others() {
    (0..3).for_each(|seed| lose_one(seed, Signal::STOP, Duration::from_secs(2)));
}
