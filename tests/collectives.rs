//! Every collective on every transport gives, bit for bit, what a plain loop over the ranks' inputs gives; and no fault makes it hang.

#[path = "collectives/faults.rs"]
mod faults;
#[path = "collectives/memory.rs"]
mod memory;
#[path = "collectives/rendezvous.rs"]
mod rendezvous;
#[path = "collectives/tcp.rs"]
mod tcp;

use anyhow::Result;
use ferrotron::comm::metered::{Count, Meter, Metered};
use ferrotron::comm::threads::Threads;
use ferrotron::comm::{Group, Pending, Reduction};
use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::{Dtype, Element, Stored};
use ferrotron::rng::Stream;
use half::{bf16, f16};
use proptest::prelude::{ProptestConfig, any};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATIENT: Duration = Duration::from_secs(60);

/// Runs `body` once for each rank, each in a thread of its own, and gives the results in rank order.
fn each<R: Send>(groups: Vec<Arc<dyn Group>>, body: impl Fn(Arc<dyn Group>) -> R + Sync) -> Vec<R> {
    let body = &body;
    std::thread::scope(|scope| {
        let running: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || body(group))).collect();
        running.into_iter().map(|thread| thread.join().expect("a rank's thread does not panic")).collect()
    })
}

fn threads(size: usize, deadline: Duration) -> Vec<Arc<dyn Group>> {
    let threads = Threads::new(size, deadline);
    let members: Vec<usize> = (0..size).collect();
    (0..size).map(|rank| threads.group(rank, &members, "all").expect("a fresh group")).collect()
}

/// Numbers of a dtype, made from a stream.
trait Sample: Stored {
    fn sample(stream: &Stream, index: u64) -> Self;
    fn bits(self) -> u32;
    fn combine(self, other: Self, reduction: Reduction) -> Self;
}

macro_rules! sample_float {
    ($($T:ty),*) => {$(
        impl Sample for $T {
            fn sample(stream: &Stream, index: u64) -> Self {
                <$T as Element>::from_f32(stream.normal(index) as f32)
            }
            fn bits(self) -> u32 {
                Element::to_f32(self).to_bits()
            }
            fn combine(self, other: Self, reduction: Reduction) -> Self {
                match reduction {
                    Reduction::Sum => <$T as Element>::from_f32(Element::to_f32(self) + Element::to_f32(other)),
                    Reduction::Max => if self > other { self } else { other },
                }
            }
        }
    )*};
}
sample_float!(f32, bf16, f16);

impl Sample for u32 {
    fn sample(stream: &Stream, index: u64) -> Self {
        stream.word(index) as u32
    }
    fn bits(self) -> u32 {
        self
    }
    fn combine(self, other: Self, _: Reduction) -> Self {
        self.max(other)
    }
}

/// The tree by its definition: adjacent pairs are combined, level by level, the odd one passes up.
fn tree<T: Sample>(inputs: &[Vec<T>], reduction: Reduction) -> Vec<T> {
    let one = |i: usize| {
        let mut row: Vec<T> = inputs.iter().map(|input| input[i]).collect();
        while row.len() > 1 {
            row = row.chunks(2).map(|pair| if pair.len() == 2 { pair[0].combine(pair[1], reduction) } else { pair[0] }).collect();
        }
        row[0]
    };
    (0..inputs[0].len()).map(one).collect()
}

fn same<T: Sample>(what: &str, got: &[T], expected: &[T]) {
    let bits = |values: &[T]| values.iter().map(|value| value.bits()).collect::<Vec<_>>();
    assert!(bits(got) == bits(expected), "{what} in {} over {} elements", T::DTYPE, expected.len());
}

/// One rank's side of every collective, on slices of `slice` elements; `ragged` elements more where no equal slices are needed.
fn every_collective<T: Sample>(group: &dyn Group, device: &Device, slice: usize, ragged: usize, seed: u64) -> Result<()> {
    let (size, rank) = (group.size(), group.rank());
    let input = |of: usize, length: usize| -> Vec<T> {
        let stream = Stream::new(seed, &format!("rank {of}"));
        (0..length).map(|i| T::sample(&stream, i as u64)).collect()
    };
    let even: Vec<Vec<T>> = (0..size).map(|of| input(of, slice * size)).collect();
    let uneven: Vec<Vec<T>> = (0..size).map(|of| input(of, slice * size + ragged)).collect();
    let tensor = |values: &[T]| Tensor::from_slice(device, [values.len()], values);
    let window = |of: usize| of * slice..(of + 1) * slice;

    let reductions = if T::DTYPE == Dtype::U32 { vec![Reduction::Max] } else { vec![Reduction::Sum, Reduction::Max] };
    for reduction in reductions {
        // Several under way at once, waited for in another order than they were started.
        let first = group.all_reduce(tensor(&uneven[rank]), reduction)?;
        let second = group.reduce_scatter(tensor(&even[rank]), reduction)?;
        same("reduce_scatter", &second.wait()?.to_vec::<T>()[window(rank)], &tree(&even, reduction)[window(rank)]);
        same("all_reduce", &first.wait()?.to_vec::<T>(), &tree(&uneven, reduction));
    }

    let mut mine = vec![T::default(); slice * size];
    mine[window(rank)].copy_from_slice(&even[rank][window(rank)]);
    let gathered: Vec<T> = (0..size).flat_map(|of| even[of][window(of)].to_vec()).collect();
    same("all_gather", &group.all_gather(tensor(&mine))?.wait()?.to_vec::<T>(), &gathered);

    let exchanged: Vec<T> = (0..size).flat_map(|of| even[of][window(rank)].to_vec()).collect();
    same("all_to_all", &group.all_to_all(tensor(&even[rank]))?.wait()?.to_vec::<T>(), &exchanged);

    if size > 1 {
        let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
        let sends = [group.send(next, tensor(&uneven[rank]))?, group.send(next, tensor(&even[rank]))?];
        let blank = |length: usize| device.zeros([length], T::DTYPE);
        let received = group.receive(previous, blank(slice * size + ragged))?.wait()?;
        same("send and receive", &received.to_vec::<T>(), &uneven[previous]);
        same("a second send", &group.receive(previous, blank(slice * size))?.wait()?.to_vec::<T>(), &even[previous]);
        for (send, sent) in sends.into_iter().zip([&uneven, &even]) {
            same("a tensor that was sent", &send.wait()?.to_vec::<T>(), &sent[rank]);
        }
    }

    let facts = group.exchange(format!("rank {rank}{}", "!".repeat(rank)).as_bytes())?;
    let expected: Vec<Vec<u8>> = (0..size).map(|of| format!("rank {of}{}", "!".repeat(of)).into_bytes()).collect();
    assert_eq!(facts, expected);
    group.barrier()
}

/// All dtypes, one after the other, on the same groups.
fn check(groups: Vec<Arc<dyn Group>>, slice: usize, ragged: usize, seed: u64) {
    let results = each(groups, |group| {
        let device = Device::cpu(1);
        every_collective::<f32>(&*group, &device, slice, ragged, seed)?;
        every_collective::<bf16>(&*group, &device, slice, ragged, seed)?;
        every_collective::<f16>(&*group, &device, slice, ragged, seed)?;
        every_collective::<u32>(&*group, &device, slice, ragged, seed)
    });
    for (rank, result) in results.into_iter().enumerate() {
        result.unwrap_or_else(|error| panic!("rank {rank}: {error:#}"));
    }
}

/// The errors of all ranks. Fails when a rank does not fail, or takes too long to.
fn errors(groups: Vec<Arc<dyn Group>>, within: Duration, body: impl Fn(Arc<dyn Group>) -> Result<()> + Sync) -> Vec<String> {
    let start = Instant::now();
    let results = each(groups, body);
    assert!(start.elapsed() < within, "the ranks took {:?}", start.elapsed());
    results.into_iter().map(|result| format!("{:#}", result.expect_err("this rank fails"))).collect()
}

fn ones(length: usize) -> Tensor {
    Tensor::from_slice(&Device::cpu(1), [length], &vec![1f32; length])
}

#[test]
fn threads_agree_with_the_plain_tree() {
    for size in 1..=8 {
        check(threads(size, PATIENT), 37, size - 1, size as u64);
    }
    check(threads(3, PATIENT), 0, 0, 1);
    check(threads(4, PATIENT), 30_000, 3, 2);
}

proptest::proptest! {
    #![proptest_config(ProptestConfig { cases: 30, ..ProptestConfig::default() })]
    #[test]
    fn threads_agree_for_any_size(size in 1usize..=8, slice in 0usize..1500, ragged in 0usize..9, seed in any::<u64>()) {
        check(threads(size, PATIENT), slice, ragged, seed);
    }
}

#[test]
fn groups_of_some_ranks_work_beside_each_other() {
    let world = Threads::new(6, PATIENT);
    std::thread::scope(|scope| {
        for rank in 0..6 {
            let world = &world;
            scope.spawn(move || {
                let row: Vec<usize> = (rank / 3 * 3..rank / 3 * 3 + 3).collect();
                let column = [rank % 3, rank % 3 + 3];
                let across = world.group(rank, &row, "tp").expect("a group of three");
                let down = world.group(rank, &column, "dp").expect("a group of two");
                let (device, seed) = (Device::cpu(1), rank as u64);
                every_collective::<f32>(&*across, &device, 5, 1, seed / 3).expect("tp");
                every_collective::<f32>(&*down, &device, 7, 1, seed % 3).expect("dp");
            });
        }
    });
}

#[test]
fn waiting_late_holds_nobody_up() {
    each(threads(2, PATIENT), |group| {
        let early = group.all_reduce(ones(1000), Reduction::Sum).expect("posted");
        if group.rank() == 0 {
            // Rank 0 waits for the collective only after rank 1 has its result and says so.
            group.receive(1, ones(1)).expect("posted").wait().expect("rank 1 has finished");
            early.wait().expect("finished");
        } else {
            assert_eq!(early.wait().expect("finished").to_vec::<f32>(), vec![2.0; 1000]);
            group.send(0, ones(1)).expect("posted").wait().expect("taken");
        }
    });
}

#[test]
fn a_device_without_numbers_waits_for_nobody() {
    let device = Device::dry();
    let group = threads(4, PATIENT).remove(2);
    let blank = || device.empty([8, 4], Dtype::Bf16);
    let calls = [
        group.all_reduce(blank(), Reduction::Sum),
        group.reduce_scatter(blank(), Reduction::Sum),
        group.all_gather(blank()),
        group.all_to_all(blank()),
        group.send(1, blank()),
        group.receive(0, blank()),
    ];
    for call in calls {
        assert_eq!(call.expect("posted").wait().expect("at once").shape().dims(), [8, 4]);
    }
}

#[test]
fn a_rank_that_never_calls_is_named() {
    let deadline = Duration::from_millis(100);
    let messages = errors(threads(3, deadline), deadline * 20, |group| {
        if group.rank() == 1 {
            std::thread::sleep(deadline * 3);
            anyhow::bail!("asleep")
        }
        group.all_reduce(ones(4), Reduction::Sum)?.wait().map(drop)
    });
    let expected = "rank 0 (0 of 3 in group \"all\") in call 0, all_reduce (sum) of f32 [4]: gave up after 0.1 s, \
                    still missing: rank 1 (1 of group \"all\"); rank 1 waits for nobody";
    assert!(messages[0] == expected || messages[0].contains("the group has failed: rank 2"), "{}", messages[0]);
    assert!(messages[2].contains("still missing: rank 1"), "{}", messages[2]);
}

#[test]
fn a_rank_that_leaves_is_named_at_once() {
    let messages = errors(threads(4, PATIENT), PATIENT / 10, |group| {
        if group.rank() == 3 {
            anyhow::bail!("leaves")
        }
        group.barrier()?;
        Ok(())
    });
    for message in &messages[..3] {
        assert!(message.contains("rank 3 (3 of group \"all\") has left") && message.contains("exchange"), "{message}");
    }
}

#[test]
fn different_calls_are_refused_on_all_ranks() {
    for odd in 0..4 {
        let messages = errors(threads(3, PATIENT), PATIENT / 10, |group| {
            let x = if group.rank() == 2 && odd == 0 { ones(9) } else { ones(6) };
            match odd {
                1 if group.rank() == 2 => group.all_gather(x)?.wait()?,
                2 if group.rank() == 2 => group.all_reduce(x, Reduction::Max)?.wait()?,
                3 if group.rank() == 2 => group.all_reduce(Device::cpu(1).zeros([6], Dtype::Bf16), Reduction::Sum)?.wait()?,
                _ => group.all_reduce(x, Reduction::Sum)?.wait()?,
            };
            Ok(())
        });
        for message in &messages {
            let both = ["all_reduce (sum) of f32 [6]", ["f32 [9]", "all_gather", "(max)", "bf16 [6]"][odd], "rank 2"];
            assert!(both.iter().all(|part| message.contains(part)), "{message}");
        }
    }
}

#[test]
fn a_receive_of_another_shape_is_refused_on_both_sides() {
    let messages = errors(threads(2, PATIENT), PATIENT / 10, |group| match group.rank() {
        0 => group.send(1, ones(4))?.wait().map(drop),
        _ => group.receive(0, ones(5))?.wait().map(drop),
    });
    assert!(messages.iter().all(|message| message.contains("send of f32 [4]") && message.contains("receive of f32 [5]")), "{messages:?}");
}

#[test]
fn calls_that_cannot_be_cut_are_refused() {
    let group = threads(3, PATIENT).remove(0);
    let refused = |call: Result<Pending>| format!("{:#}", call.err().expect("refused"));
    assert!(refused(group.reduce_scatter(ones(4), Reduction::Sum)).contains("4 elements cannot be cut into 3 equal slices"));
    assert!(refused(group.all_reduce(Device::cpu(1).zeros([3], Dtype::U32), Reduction::Sum)).contains("sums over ranks are of f32"));
    let world = Threads::new(2, PATIENT);
    assert!(world.group(0, &[0, 2], "g").err().expect("refused").to_string().contains("has a member 2"));
    assert!(world.group(0, &[1], "g").err().expect("refused").to_string().contains("whose members are [1]"));
    assert!(world.group(0, &[0, 1, 0], "g").err().expect("refused").to_string().contains("twice"));
}

#[test]
fn traffic_is_counted_to_the_byte() {
    let counts = each(threads(4, PATIENT), |group| {
        let meter = Meter::new("all");
        let group = Metered::new(group, meter.clone());
        for _ in 0..2 {
            group.all_reduce(ones(16), Reduction::Sum).expect("posted").wait().expect("reduced");
        }
        group.reduce_scatter(ones(16), Reduction::Sum).expect("posted").wait().expect("reduced");
        group.all_gather(Device::dry().empty([1 << 40], Dtype::Bf16)).expect("posted").wait().expect("counted only");
        if group.rank() == 0 {
            group.send(1, ones(3)).expect("posted").wait().expect("sent");
        } else if group.rank() == 1 {
            group.receive(0, ones(3)).expect("posted").wait().expect("received");
        }
        group.exchange(b"hello").expect("exchanged");
        meter.take()
    });
    let bytes = |count: Option<&Count>| count.map(|count| (count.calls, count.bytes));
    for (rank, traffic) in counts.iter().enumerate() {
        assert_eq!(bytes(traffic.get("all_reduce")), Some((2, 2 * 2 * 3 * 16)));
        assert_eq!(bytes(traffic.get("reduce_scatter")), Some((1, 3 * 16)));
        assert_eq!(bytes(traffic.get("all_gather")), Some((1, 3 * (2 << 40) / 4)));
        assert_eq!(bytes(traffic.get("exchange")), Some((1, 15)));
        assert_eq!(bytes(traffic.get("send")), (rank == 0).then_some((1, 12)));
        assert!(traffic.values().all(|count| count.seconds_exposed >= 0.0));
    }
}
