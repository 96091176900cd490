//! How far an all-reduce between ranks of one host is from the copies that it cannot do without.
//!
//! An all-reduce of S bytes over n ranks sends 2 (n-1)/n S bytes from each rank; over a socket each of them is copied in and out, and the
//! result is copied into place: (4 (n-1)/n + 1) S bytes. The yardstick is that many bytes copied between two buffers, by n threads at
//! the same time. Ranks over sockets and over shared memory are processes. All figures are medians of rounds, as rank 0 sees them.
//! `cargo bench --bench collectives [MiB] [rounds]`.

use anyhow::{Context, Result, ensure};
use ferrotron::comm::connect::{Groups, Transport, World};
use ferrotron::comm::door::Job;
use ferrotron::comm::threads::Threads;
use ferrotron::comm::{Group, Reduction};
use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

const RANKS: usize = 4;
const DEADLINE: Duration = Duration::from_secs(120);

/// As the first word: this process is a rank. Its number, the rendezvous, the bytes, the rounds and the transport follow.
const RANK: &str = "--as-rank";

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [RANK, rest @ ..] = words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        return run_rank(rest);
    }
    let numbers: Vec<usize> = words.iter().filter_map(|word| word.parse().ok()).collect();
    let (mebibytes, rounds) = (numbers.first().copied().unwrap_or(64), numbers.get(1).copied().unwrap_or(5));
    let bytes = mebibytes << 20;
    let gigabytes = |seconds: f64| bytes as f64 / seconds / 1e9;
    let copied = copies(bytes, rounds);
    println!("{mebibytes} MiB over {RANKS} ranks, median of {rounds}");
    println!("  copies alone      {:8.1} ms  {:6.2} GB/s", copied * 1e3, gigabytes(copied));
    for (name, seconds) in all_ways(bytes, rounds)? {
        let ratio = seconds / copied;
        println!("  {name:<8} all-reduce {:6.1} ms  {:6.2} GB/s  {ratio:5.2} x the copies", seconds * 1e3, gigabytes(seconds));
    }
    for (name, seconds) in all_ways(4096, 300)? {
        println!("  {name:<8} all-reduce of 4 KiB {:6.0} us", seconds * 1e6);
    }
    Ok(())
}

fn all_ways(bytes: usize, rounds: usize) -> Result<[(&'static str, f64); 3]> {
    Ok([
        ("threads", threads(bytes, rounds)?),
        ("memory", processes(bytes, rounds, "memory")?),
        ("sockets", processes(bytes, rounds, "sockets")?),
    ])
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Seconds of a round, in which every rank does `work` once. Rank 0 holds the clock.
fn timed(rounds: usize, ranks: Vec<impl FnMut() + Send>) -> f64 {
    let line = Barrier::new(ranks.len());
    let line = &line;
    std::thread::scope(|scope| {
        let run = |mut work: Box<dyn FnMut() + Send + '_>| {
            let mut seconds = Vec::new();
            // Two rounds more: the first ones touch their memory for the first time.
            for _ in 0..rounds + 2 {
                line.wait();
                let start = Instant::now();
                work();
                seconds.push(start.elapsed().as_secs_f64());
            }
            median(seconds.split_off(2))
        };
        let running: Vec<_> = ranks.into_iter().map(|work| scope.spawn(move || run(Box::new(work)))).collect();
        let all: Vec<f64> = running.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        all[0]
    })
}

fn copies(bytes: usize, rounds: usize) -> f64 {
    let total = 4 * (RANKS - 1) * bytes / RANKS + bytes;
    let rank = |_| {
        let (from, mut to) = (vec![1u8; bytes], vec![2u8; bytes]);
        move || {
            for _ in 0..total / bytes {
                to.copy_from_slice(std::hint::black_box(&from));
                std::hint::black_box(&mut to);
            }
        }
    };
    // A rank that copies has nobody to wait for, so the slowest is what counts.
    let line = Barrier::new(RANKS);
    let line = &line;
    let whole = |mut work: Box<dyn FnMut() + Send>| {
        move || {
            work();
            line.wait();
        }
    };
    timed(rounds, (0..RANKS).map(rank).map(|work| whole(Box::new(work))).collect())
}

fn all_reduce(group: &dyn Group, x: &mut Option<Tensor>) -> Result<()> {
    let pending = group.all_reduce(x.take().context("put back by the round before")?, Reduction::Sum)?;
    *x = Some(pending.wait()?);
    Ok(())
}

fn ones(bytes: usize) -> Option<Tensor> {
    Some(Tensor::from_slice(&Device::cpu(1), [bytes / 4], &vec![1f32; bytes / 4]))
}

fn connect(transport: &Transport, rank: usize) -> Result<Arc<dyn Group>> {
    Ok(Groups::connect(transport, rank, RANKS, &[("all".to_string(), (0..RANKS).collect())])?.get("all"))
}

fn threads(bytes: usize, rounds: usize) -> Result<f64> {
    let transport = Transport::Threads(Threads::new(RANKS, DEADLINE));
    let groups = (0..RANKS).map(|rank| connect(&transport, rank)).collect::<Result<Vec<_>>>()?;
    let rank = |group: Arc<dyn Group>| {
        let mut x = ones(bytes);
        move || all_reduce(&*group, &mut x).expect("all ranks are there")
    };
    Ok(timed(rounds, groups.into_iter().map(rank).collect()))
}

/// The same between processes, which are this program again.
fn processes(bytes: usize, rounds: usize, transport: &str) -> Result<f64> {
    let free = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let start = |rank: usize| {
        let words = [RANK.to_string(), rank.to_string(), free.to_string(), bytes.to_string(), rounds.to_string(), transport.to_string()];
        Command::new(std::env::current_exe()?).args(words).stdout(Stdio::piped()).spawn().context("starting a rank")
    };
    let running = (0..RANKS).map(start).collect::<Result<Vec<_>>>()?;
    let mut said = Vec::new();
    for rank in running {
        let output = rank.wait_with_output()?;
        ensure!(output.status.success(), "a rank ended with {}", output.status);
        said.push(String::from_utf8(output.stdout)?);
    }
    said[0].trim().parse().with_context(|| format!("rank 0 says {:?}", said[0]))
}

fn run_rank(words: &[&str]) -> Result<()> {
    let [rank, address, bytes, rounds, transport] = words else { anyhow::bail!("five words tell a rank what to do, not {words:?}") };
    let (rank, bytes, rounds): (usize, usize, usize) = (rank.parse()?, bytes.parse()?, rounds.parse()?);
    let world = World::join(address, None, &Job::new("bench", "token", "", RANKS), rank, None, DEADLINE, DEADLINE)?;
    if *transport == "sockets" {
        world.mesh.hub.keep_to_sockets();
    }
    let group = connect(&world.transport(), rank)?;
    let (mut x, mut seconds) = (ones(bytes), Vec::new());
    for _ in 0..rounds + 2 {
        group.barrier()?;
        let start = Instant::now();
        all_reduce(&*group, &mut x)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    println!("{}", median(seconds.split_off(2)));
    Ok(())
}
