//! A thousand seeded faults on ranks that are threads: every rank ends in time, and says which peer and which call.

use crate::{each, ones, threads};
use anyhow::Result;
use ferrotron::comm::faulty::{Fault, Faulty};
use ferrotron::comm::{Group, Reduction};
use ferrotron::rng::Stream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_millis(400);
const CALLS: u64 = 12;

/// `CALLS` calls, drawn from the seed, the same on every rank.
fn program(group: &dyn Group, seed: u64) -> Result<()> {
    let stream = Stream::new(seed, "calls");
    let (size, rank) = (group.size(), group.rank());
    let mut call = 0;
    while call < CALLS {
        let x = ones(size * (1 + stream.word(2 * call) as usize % 50));
        let kind = if call + 2 >= CALLS { 5 } else { stream.word(2 * call + 1) % 6 };
        call += if kind == 4 { 2 } else { 1 };
        match kind {
            0 => group.all_reduce(x, Reduction::Sum)?.wait()?,
            1 => group.reduce_scatter(x, Reduction::Max)?.wait()?,
            2 => group.all_gather(x)?.wait()?,
            3 => group.all_to_all(x)?.wait()?,
            4 => {
                let sending = group.send((rank + 1) % size, ones(x.shape().numel()))?;
                group.receive((rank + size - 1) % size, x)?.wait()?;
                sending.wait()?
            }
            _ => {
                group.barrier()?;
                x
            }
        };
    }
    Ok(())
}

/// Runs the program of `seed` on `groups`, of which one rank has the fault of `seed`.
pub fn run(seed: u64, deadline: Duration, groups: Vec<Arc<dyn Group>>) {
    let size = groups.len();
    let (bad, at, fault) = Fault::draw(seed, size, CALLS, deadline);
    let groups = groups
        .into_iter()
        .enumerate()
        .map(|(rank, group)| if rank == bad { Arc::new(Faulty::new(group, fault, at)) as Arc<dyn Group> } else { group });
    let start = Instant::now();
    let results = each(groups.collect(), |group| program(&*group, seed));
    let took = start.elapsed();
    assert!(took < deadline * 6, "seed {seed}, {fault:?}: the ranks took {took:?}");
    for (rank, result) in results.into_iter().enumerate() {
        let message = result.err().map(|error| format!("{error:#}"));
        match fault {
            Fault::FlippedBits => assert_eq!(message, None, "seed {seed}, rank {rank}"),
            Fault::Delay(time) if time < deadline => assert_eq!(message, None, "seed {seed}, rank {rank}"),
            // Bytes of an exchange have no shape, and an exchange may be what was asked for.
            Fault::WrongShape | Fault::WrongCall if message.is_none() => {}
            _ => {
                let message = message.unwrap_or_else(|| panic!("seed {seed}, {fault:?} on rank {bad}: rank {rank} notices nothing"));
                let named = message.contains(&format!("rank {bad} ")) && (rank == bad || message.contains("in call"));
                assert!(named, "seed {seed}, {fault:?} on rank {bad}, rank {rank} says: {message}");
            }
        }
    }
}

#[test]
fn a_thousand_faults_make_nobody_hang() {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                while let seed @ 0..1000 = next.fetch_add(1, Ordering::Relaxed) {
                    run(seed, DEADLINE, threads(2 + seed as usize % 4, DEADLINE));
                }
            });
        }
    });
}
