//! How far an all-reduce between ranks of one host is from the copies that it cannot do without.
//!
//! An all-reduce of S bytes over n ranks sends 2 (n-1)/n S bytes from each rank; over a socket each of them is copied in and out, and the
//! result is copied into place: (4 (n-1)/n + 1) S bytes. The yardstick is that many bytes copied between two buffers, by n threads at
//! the same time. `cargo bench --bench collectives [MiB] [rounds]`.

use anyhow::Result;
use ferrotron::comm::connect::{Groups, Transport, World};
use ferrotron::comm::door::Job;
use ferrotron::comm::threads::Threads;
use ferrotron::comm::{Group, Reduction};
use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use std::net::TcpListener;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

const RANKS: usize = 4;
const DEADLINE: Duration = Duration::from_secs(120);

fn main() -> Result<()> {
    let numbers: Vec<usize> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let (mebibytes, rounds) = (numbers.first().copied().unwrap_or(64), numbers.get(1).copied().unwrap_or(5));
    let bytes = mebibytes << 20;
    let gigabytes = |seconds: f64| bytes as f64 / seconds / 1e9;
    let copied = copies(bytes, rounds);
    println!("{mebibytes} MiB over {RANKS} ranks, best of {rounds}");
    println!("  copies alone      {:8.1} ms  {:6.2} GB/s", copied * 1e3, gigabytes(copied));
    for (name, seconds) in [("threads", threads(bytes, rounds)?), ("tcp", tcp(bytes, rounds)?)] {
        let ratio = seconds / copied;
        println!("  {name:<8} all-reduce {:6.1} ms  {:6.2} GB/s  {ratio:5.2} x the copies", seconds * 1e3, gigabytes(seconds));
    }
    for (name, seconds) in [("threads", threads(4096, 300)?), ("tcp", tcp(4096, 300)?)] {
        println!("  {name:<8} all-reduce of 4 KiB {:6.0} us", seconds * 1e6);
    }
    Ok(())
}

/// Seconds of the fastest round, in which every rank does `work` once. Rank 0 holds the clock.
fn fastest(rounds: usize, ranks: Vec<impl FnMut() + Send>) -> f64 {
    let line = Barrier::new(ranks.len());
    let line = &line;
    std::thread::scope(|scope| {
        let run = |mut work: Box<dyn FnMut() + Send + '_>| {
            let mut best = f64::INFINITY;
            // One round more: the first one touches its memory for the first time.
            for _ in 0..=rounds {
                line.wait();
                let start = Instant::now();
                work();
                line.wait();
                best = best.min(start.elapsed().as_secs_f64());
            }
            best
        };
        let running: Vec<_> = ranks.into_iter().map(|work| scope.spawn(move || run(Box::new(work)))).collect();
        running.into_iter().map(|thread| thread.join().expect("no panic")).fold(0.0, f64::max)
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
    fastest(rounds, (0..RANKS).map(rank).collect())
}

fn all_reduces(groups: Vec<Arc<dyn Group>>, bytes: usize, rounds: usize) -> f64 {
    let rank = |group: Arc<dyn Group>| {
        let mut x = Some(Tensor::from_slice(&Device::cpu(1), [bytes / 4], &vec![1f32; bytes / 4]));
        move || {
            let pending = group.all_reduce(x.take().expect("put back"), Reduction::Sum).expect("posted");
            x = Some(pending.wait().expect("reduced"));
        }
    };
    fastest(rounds, groups.into_iter().map(rank).collect())
}

fn connect(transports: &[Transport]) -> Result<Vec<Arc<dyn Group>>> {
    let wanted = [("all".to_string(), (0..RANKS).collect())];
    let connect = |(rank, transport)| Ok(Groups::connect(transport, rank, RANKS, &wanted)?.get("all"));
    transports.iter().enumerate().map(connect).collect()
}

fn threads(bytes: usize, rounds: usize) -> Result<f64> {
    Ok(all_reduces(connect(&vec![Transport::Threads(Threads::new(RANKS, DEADLINE)); RANKS])?, bytes, rounds))
}

fn tcp(bytes: usize, rounds: usize) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let mut listeners = vec![Some(listener)];
    listeners.resize_with(RANKS, || None);
    let job = Job::new("bench", "token", "", RANKS);
    let worlds: Vec<World> = std::thread::scope(|scope| {
        let join = |(rank, listener)| {
            let (address, job) = (&address, &job);
            scope.spawn(move || World::join(address, listener, job, rank, None, DEADLINE, DEADLINE))
        };
        let joining: Vec<_> = listeners.into_iter().enumerate().map(join).collect();
        joining.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Result<_>>()
    })?;
    let transports: Vec<Transport> = worlds.iter().map(World::transport).collect();
    let seconds = all_reduces(connect(&transports)?, bytes, rounds);
    drop(transports);
    std::thread::scope(|scope| worlds.into_iter().for_each(|world| drop(scope.spawn(move || drop(world)))));
    Ok(seconds)
}
