//! A launch: its arguments checked, its blocks executed.
//!
//! Invariant: nothing runs before grid, block, shared memory and arguments were found to be what the kernel takes.

use crate::address::{SHARED_BEGIN, SHARED_BYTES, SHARED_BYTES_STATIC};
use crate::counters::Counters;
use crate::fault::{Fault, FaultKind};
use crate::kernel::Kernel;
use crate::machine::{Machine, Setup};
use crate::memory::Memory;
use crate::random::Random;
use crate::watch::Watch;
use crate::watch::check::Check;
use crate::watch::count::Count;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    pub kernel: &'a Kernel,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Dynamic shared memory per block.
    pub shared_bytes: u32,
    /// The bytes of each argument.
    pub arguments: &'a [&'a [u8]],
    /// Only these blocks, by linear number (x fastest): a launch of production size of which a test looks at a few blocks.
    pub blocks: Option<&'a [u64]>,
}

/// How to run it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// None: a fixed order. A number: blocks, warps and lanes in a random order that the number repeats.
    pub seed: Option<u64>,
    /// Races, reads of what nobody wrote and their like are faults, too.
    pub checked: bool,
    /// Count instructions and accesses.
    pub counters: bool,
    /// Threads of the host that execute blocks; 0 and 1 are one. With a seed, or checked, or counting, it is always one: the order
    /// of the blocks then is part of the result.
    pub threads: usize,
}

/// Most threads of a block.
const THREADS: u64 = 1024;

/// Executes a kernel on a memory.
pub fn launch(memory: &Memory, launch: &Launch<'_>, options: &Options) -> Result<Counters, Fault> {
    let parameters = checked_parameters(launch)?;
    check_shape(launch)?;
    let kernel = launch.kernel;
    let static_end = SHARED_BEGIN as usize + kernel.shared_static;
    let dynamic_begin = static_end.next_multiple_of(kernel.dynamic_align);
    let shared_end = if launch.shared_bytes > 0 { dynamic_begin + launch.shared_bytes as usize } else { static_end };
    if shared_end - SHARED_BEGIN as usize > SHARED_BYTES {
        let message = format!("{} bytes of shared memory; a block can have {SHARED_BYTES}", shared_end - SHARED_BEGIN as usize);
        return Err(refused(launch, message));
    }
    let ordered = options.seed.is_some() || options.checked || options.counters;
    let threads = if ordered { 1 } else { options.threads.clamp(1, count(launch.grid).min(64) as usize) };
    let _running = memory.run();
    let image = memory.image(&kernel.image);
    let setup = Setup {
        kernel,
        grid: launch.grid,
        block: launch.block,
        parameters,
        table: memory.table(),
        image,
        shared_dynamic: launch.shared_bytes,
        dynamic_begin: dynamic_begin as u32,
        shared_end: shared_end as u32,
        crowded: threads > 1,
        seed: options.seed,
        trusting: !options.checked,
    };
    let mut blocks: Vec<u64> = match launch.blocks {
        Some(blocks) => blocks.to_vec(),
        None => (0..count(launch.grid)).collect(),
    };
    if let Some(seed) = options.seed {
        Random::new(seed).shuffle(&mut blocks);
    }
    if !options.checked && !options.counters {
        run(&setup, &blocks, threads)?;
        return Ok(Counters::default());
    }
    let mut machine = Machine::new(&setup);
    machine.watch = Some(Box::new(Watch {
        counts: if options.counters { vec![Count::default(); kernel.code.len()] } else { Vec::new() },
        check: options.checked.then(|| Check::new(shared_end)),
    }));
    blocks.iter().try_for_each(|number| machine.run_block(*number))?;
    machine.checking(|check, machine| check.end(machine));
    Ok(machine.watch.map_or_else(Counters::default, |watch| Counters::of(kernel, &watch.counts)))
}

/// Executes the blocks in their order, or, by several threads, each as soon as a thread is free.
fn run(setup: &Setup<'_>, blocks: &[u64], threads: usize) -> Result<(), Fault> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut machine = Machine::new(setup);
        while let Some(number) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(fault) = machine.run_block(*number) {
                next.store(blocks.len(), Ordering::Relaxed);
                return Err(fault);
            }
        }
        Ok(())
    };
    if threads == 1 {
        return work();
    }
    let results: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join()).collect()
    });
    // A panic of a worker is a bug of the emulator: it goes on in the caller's thread.
    results.into_iter().try_for_each(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

fn refused(launch: &Launch<'_>, message: String) -> Fault {
    Fault::of_host(FaultKind::Launch, format!("launch of {}: {message}", launch.kernel.name))
}

fn count(sizes: [u32; 3]) -> u64 {
    sizes.iter().map(|size| u64::from(*size)).product()
}

fn check_shape(launch: &Launch<'_>) -> Result<(), Fault> {
    let kernel = launch.kernel;
    let limits = [("grid", launch.grid, [i32::MAX as u32, 65535, 65535]), ("block", launch.block, [1024, 1024, 64])];
    for (name, sizes, most) in limits {
        if (0..3).any(|i| sizes[i] == 0 || sizes[i] > most[i]) {
            return Err(refused(launch, format!("a {name} of {sizes:?}; possible are 1 to {most:?}")));
        }
    }
    let threads = count(launch.block);
    let most = kernel.max_threads.map_or(THREADS, u64::from).min(THREADS);
    if threads > most {
        return Err(refused(launch, format!("blocks of {threads} threads; the kernel is made for at most {most} (.maxntid)")));
    }
    if kernel.shared_static > SHARED_BYTES_STATIC {
        let message = format!("{} bytes of static shared memory; at most {SHARED_BYTES_STATIC} are possible", kernel.shared_static);
        return Err(refused(launch, message));
    }
    let blocks = count(launch.grid);
    match launch.blocks.and_then(|numbers| numbers.iter().find(|number| **number >= blocks)) {
        Some(number) => Err(refused(launch, format!("block {number} of a grid of {blocks} blocks"))),
        None => Ok(()),
    }
}

fn checked_parameters(launch: &Launch<'_>) -> Result<Vec<u8>, Fault> {
    let kernel = launch.kernel;
    if launch.arguments.len() != kernel.parameters.len() {
        let message = format!("{} arguments, the kernel takes {}", launch.arguments.len(), kernel.parameters.len());
        return Err(refused(launch, message));
    }
    let mut bytes = vec![0; kernel.parameter_bytes];
    for (index, (argument, parameter)) in launch.arguments.iter().zip(&kernel.parameters).enumerate() {
        if argument.len() != parameter.bytes {
            let message = format!("argument {index} has {} bytes, the kernel expects {}", argument.len(), parameter.bytes);
            return Err(refused(launch, message));
        }
        bytes[parameter.offset..parameter.offset + parameter.bytes].copy_from_slice(argument);
    }
    Ok(bytes)
}
