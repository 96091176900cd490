//! The driver of a GPU that is not there: the kernels' PTX runs on this machine's processor, and streams are as lazy as they may be.
//!
//! Work that is queued on a stream is not begun before somebody waits for it, and then only what is waited for is done, with what that
//! waits for in its turn. So a wait that a program has forgotten shows as a wrong number, every time. With a seed, threads, warps and
//! blocks take turns at random, and other streams run on by a random share.
//!
//! Each buffer is an allocation of its own, poisoned before its first use and after its end: what is read too early, too late or out of
//! bounds is an error with the source line that does it.

use crate::device::cpu::Cpu;
use crate::device::cpu::gemm;
use crate::device::cpu::pack::{self, Along};
use crate::device::gpu::driver::{Argument, Driver, Event, Gemm, Grid, Operand, Order, Stream};
use crate::device::gpu::kernels::{self, Architecture, Source};
use crate::dispatch;
use crate::dtype::{Element, Stored};
use crate::rng;
use anyhow::{Context, Result, ensure};
use ptx_emulator::{Counters, Launch, Memory, Module, Options};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Debug)]
pub struct Emulated {
    memory: Memory,
    options: Options,
    cpu: Cpu,
    /// Where PTX is read from instead of what the program brings along.
    ptx: Option<PathBuf>,
    counted: Option<Counted>,
    state: Mutex<State>,
}

/// What launches have counted, by kernel, in the order in which they ran. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Counted(Arc<Mutex<Vec<(String, Counters)>>>);

impl Counted {
    /// What was counted since the last time somebody asked. Work that is queued has not run yet.
    pub fn take(&self) -> Vec<(String, Counters)> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[derive(Default)]
struct State {
    streams: HashMap<Stream, VecDeque<Work>>,
    recorded: u64,
    done: HashSet<Event>,
    modules: HashMap<&'static str, Arc<Module>>,
    /// Counts random choices.
    draws: u64,
}

enum Work {
    Launch { kernel: String, grid: Grid, arguments: Vec<Argument> },
    Gemm(Gemm),
    Zero { address: u64, bytes: usize },
    Copy { to: u64, from: u64, bytes: usize },
    Upload { to: u64, bytes: Vec<u8> },
    Free(u64),
    Record(Event),
    Wait(Event),
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} modules, {} events", self.modules.len(), self.recorded)
    }
}

fn parse(source: &Source, ptx: &str) -> Result<Arc<Module>> {
    Ok(Arc::new(Module::parse(ptx).with_context(|| format!("reading the PTX of {}.cu", source.name))?))
}

/// A file that the program brings along, read once for all devices.
fn brought_along(source: &Source) -> Result<Arc<Module>> {
    static MODULES: Mutex<BTreeMap<&str, Arc<Module>>> = Mutex::new(BTreeMap::new());
    let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
    if !modules.contains_key(source.name) {
        modules.insert(source.name, parse(source, source.ptx(Architecture::Sm80))?);
    }
    Ok(modules[source.name].clone())
}

impl Emulated {
    /// `seed`: of the random order in which threads take turns; none is a fixed order. `checked`: races, reads of what nobody wrote and
    /// misused barriers are errors, too. `threads`: how many of this machine's threads run blocks and matrix products.
    pub fn new(seed: Option<u64>, checked: bool, threads: usize) -> Emulated {
        let options = Options { seed, checked, threads, ..Options::default() };
        Emulated { memory: Memory::new(), options, cpu: Cpu::new(threads), ptx: None, counted: None, state: Mutex::default() }
    }

    /// The same with the kernels of `folder`: files named like those of `cuda/ptx/`.
    pub fn with_ptx_of(self, folder: &Path) -> Emulated {
        Emulated { ptx: Some(folder.to_path_buf()), ..self }
    }

    /// The same, and every launch tells `counted` what it has counted.
    pub fn with_counters(self, counted: &Counted) -> Emulated {
        Emulated { options: Options { counters: true, ..self.options }, counted: Some(counted.clone()), ..self }
    }

    fn queue(&self, stream: Stream, work: Work) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.streams.entry(stream).or_default().push_back(work);
        Ok(())
    }

    /// Does all that `stream` has to do.
    fn finish(&self, stream: Stream) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while self.one(&mut state, stream)? {
            if let Some(seed) = self.options.seed {
                // Another stream may well be ahead of where it must be.
                let other = if stream == Stream::Compute { Stream::Copies } else { Stream::Compute };
                state.draws += 1;
                if rng::Stream::new(seed, "emulated streams").word(state.draws).is_multiple_of(4) {
                    self.one(&mut state, other)?;
                }
            }
        }
        Ok(())
    }

    /// Does the next thing that `stream` has to do, and before it what it waits for. False: there is none.
    fn one(&self, state: &mut State, stream: Stream) -> Result<bool> {
        let Some(work) = state.streams.get_mut(&stream).and_then(VecDeque::pop_front) else { return Ok(false) };
        if let Work::Wait(event) = work {
            let other = if stream == Stream::Compute { Stream::Copies } else { Stream::Compute };
            while !state.done.contains(&event) {
                ensure!(self.one(state, other)?, "a stream waits for {event:?}, which nobody will record");
            }
            return Ok(true);
        }
        self.run(state, work)?;
        Ok(true)
    }

    fn run(&self, state: &mut State, work: Work) -> Result<()> {
        match work {
            Work::Launch { kernel, grid, arguments } => self.kernel(state, &kernel, grid, &arguments)?,
            Work::Gemm(gemm) => dispatch!(gemm.dtype, T => self.product::<T>(&gemm)?),
            Work::Zero { address, bytes } => self.memory.fill(address, 0, bytes)?,
            Work::Copy { to, from, bytes } => self.memory.copy(to, from, bytes)?,
            Work::Upload { to, bytes } => self.memory.write(to, &bytes)?,
            Work::Free(address) => self.memory.free(address)?,
            Work::Record(event) => drop(state.done.insert(event)),
            Work::Wait(_) => panic!("waits are done by whoever runs the streams"),
        }
        Ok(())
    }

    fn kernel(&self, state: &mut State, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        let source = kernels::find(kernel).with_context(|| format!("there is no kernel {kernel}"))?;
        if !state.modules.contains_key(source.name) {
            let own = self.ptx.as_ref().map(|folder| folder.join(format!("{}.sm_80.ptx", source.name)));
            let own = own.map(|path| fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))).transpose()?;
            let module = match own {
                Some(text) => parse(source, &text)?,
                None => brought_along(source)?,
            };
            state.modules.insert(source.name, module);
        }
        let arguments: Vec<&[u8]> = arguments.iter().map(Argument::bytes).collect();
        let launch = Launch {
            kernel: state.modules[source.name].kernel(kernel).with_context(|| format!("no kernel {kernel} in {}.cu", source.name))?,
            grid: grid.blocks,
            block: [grid.threads, 1, 1],
            shared_bytes: grid.shared_bytes,
            arguments: &arguments,
            blocks: None,
        };
        state.draws += 1;
        let seed = self.options.seed.map(|seed| seed.wrapping_add(state.draws));
        let counters = ptx_emulator::launch(&self.memory, &launch, &Options { seed, ..self.options })?;
        if let Some(Counted(counted)) = &self.counted {
            counted.lock().unwrap_or_else(PoisonError::into_inner).push((kernel.to_string(), counters));
        }
        Ok(())
    }

    fn product<T: Element>(&self, gemm: &Gemm) -> Result<()> {
        let Gemm { m, n, k, .. } = *gemm;
        let (a, b) = (self.operand::<T>(&gemm.a, m, k)?, self.operand::<T>(&gemm.b, n, k)?);
        let [a, b] =
            [(&a, gemm.a), (&b, gemm.b)].map(|(data, operand)| pack::Operand { data, stride: operand.stride, along: along(operand.order) });
        if gemm.accumulate {
            let mut out = self.read::<f32>(gemm.out, m * n)?;
            gemm::accumulate(&self.cpu, a, b, [m, n, k], std::slice::from_ref(&(0..k)), &mut out, false);
            return Ok(self.memory.write(gemm.out, bytemuck::cast_slice(&out))?);
        }
        let bias = gemm.bias.map(|bias| self.read::<T>(bias, n)).transpose()?;
        let mut out = vec![T::default(); m * n];
        let mut waiting = gemm::needs_waiting(T::DTYPE, k).then(|| vec![0f32; m * n]);
        gemm::product(&self.cpu, a, b, [m, n, k], bias.as_deref(), waiting.as_deref_mut(), &mut out);
        Ok(self.memory.write(gemm.out, bytemuck::cast_slice(&out))?)
    }

    /// The elements from the first to the last of an operand of `outer` x k.
    fn operand<T: Element>(&self, operand: &Operand, outer: usize, k: usize) -> Result<Vec<T>> {
        let (rows, columns) = if operand.order == Order::SummedInner { (outer, k) } else { (k, outer) };
        assert!(operand.stride >= columns, "rows of {columns} elements, {} from one to the next", operand.stride);
        self.read(operand.address, rows.saturating_sub(1) * operand.stride + columns)
    }

    fn read<T: Stored>(&self, address: u64, count: usize) -> Result<Vec<T>> {
        let mut values = vec![T::default(); count];
        self.memory.read(address, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}

fn along(order: Order) -> Along {
    match order {
        Order::SummedInner => Along::K,
        Order::SummedOuter => Along::X,
    }
}

impl Driver for Emulated {
    fn name(&self) -> String {
        "emulated GPU".to_string()
    }

    fn products(&self) -> String {
        "this machine's processor".to_string()
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        Ok(self.memory.allocate(bytes))
    }

    fn free(&self, address: u64, _: usize) -> Result<()> {
        self.queue(Stream::Compute, Work::Free(address))
    }

    fn launch(&self, stream: Stream, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        self.queue(stream, Work::Launch { kernel: kernel.to_string(), grid, arguments: arguments.to_vec() })
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.queue(Stream::Compute, Work::Gemm(*gemm))
    }

    fn zero(&self, stream: Stream, address: u64, bytes: usize) -> Result<()> {
        self.queue(stream, Work::Zero { address, bytes })
    }

    fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.queue(stream, Work::Copy { to, from, bytes })
    }

    fn upload(&self, stream: Stream, to: u64, bytes: &[u8]) -> Result<()> {
        self.queue(stream, Work::Upload { to, bytes: bytes.to_vec() })
    }

    fn download(&self, stream: Stream, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.finish(stream)?;
        Ok(self.memory.read(from, bytes)?)
    }

    fn record(&self, stream: Stream) -> Result<Event> {
        let event = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.recorded += 1;
            Event(state.recorded)
        };
        self.queue(stream, Work::Record(event))?;
        Ok(event)
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.queue(stream, Work::Wait(event))
    }

    fn synchronize(&self) -> Result<()> {
        self.finish(Stream::Compute)?;
        self.finish(Stream::Copies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `Compute` copies of what `Copies` has uploaded.
    fn copied(seed: Option<u64>, ordered: bool) -> Vec<u8> {
        let gpu = Emulated::new(seed, false, 1);
        let [from, to] = [(); 2].map(|()| gpu.allocate(64).expect("memory"));
        gpu.upload(Stream::Copies, from, &[7; 64]).expect("queued");
        if ordered {
            let event = gpu.record(Stream::Copies).expect("queued");
            gpu.wait(Stream::Compute, event).expect("queued");
        }
        gpu.copy(Stream::Compute, to, from, 64).expect("queued");
        let mut bytes = vec![0; 64];
        gpu.download(Stream::Compute, to, &mut bytes).expect("work that can be done");
        bytes
    }

    #[test]
    fn a_wait_that_is_missing_shows_as_wrong_numbers() {
        assert_ne!(copied(None, false), [7; 64]);
        assert!((0..8).any(|seed| copied(Some(seed), false) != [7; 64]));
        assert_eq!(copied(None, true), [7; 64]);
        assert!((0..8).all(|seed| copied(Some(seed), true) == [7; 64]));
    }

    #[test]
    fn failures_name_what_was_wrong_and_end_what_follows() {
        let gpu = Emulated::new(None, false, 1);
        gpu.launch(Stream::Compute, "elementwise_add_u8", Grid::blocks(1, 256), &[]).expect("queued");
        let error = gpu.synchronize().expect_err("no such kernel");
        assert!(error.to_string().contains("elementwise_add_u8"), "{error:#}");
        let freed = gpu.allocate(64).expect("memory");
        gpu.free(freed, 64).expect("queued");
        gpu.copy(Stream::Compute, freed, freed, 64).expect("queued");
        let error = gpu.synchronize().expect_err("freed memory is not to be used");
        assert!(error.to_string().contains("freed"), "{error:#}");
    }
}
