//! Where numbers live. A closed set: the host's processor, a GPU, and a device that only counts.

pub mod beside;
pub mod cpu;
pub mod gpu;
pub mod mapped;
pub mod memory;
pub mod tensor;

use crate::dtype::Dtype;
use crate::shape::Shape;
use anyhow::Result;
use beside::Beside;
use cpu::Cpu;
use cpu::processors::Share;
use gpu::Gpu;
use gpu::cuda::Cuda;
use gpu::cuda::context::Context;
use gpu::cuda::probe::Found;
use gpu::driver::Driver;
use gpu::emulated::Emulated;
use mapped::OffloadFile;
use memory::Memory;
use std::path::Path;
use std::sync::Arc;
use tensor::Tensor;

/// Cloning is cheap: clones share threads and memory.
///
/// `Gpu` may be a real one or an emulated one: an op cannot tell.
///
/// `Dry` holds no numbers: a tensor on it has a shape and is counted, ops on it check their shapes and compute nothing.
/// The same code that trains, run on it, tells the memory that training will take (see `train/rehearsal.rs`).
#[derive(Clone, Debug)]
pub enum Device {
    Cpu(Arc<Cpu>),
    Gpu(Arc<Gpu>),
    Dry(Arc<Memory>),
}

/// Where tensors that live as long as a run are put.
#[derive(Debug)]
pub enum Shelf {
    Device,
    File {
        /// None on a device without numbers.
        file: Option<OffloadFile>,
        /// Whose tensors they are: this device where it is the host, else the host beside it.
        host: Device,
    },
}

impl Device {
    /// `threads`: how many threads ops use, the calling one included.
    pub fn cpu(threads: usize) -> Device {
        Device::Cpu(Arc::new(Cpu::new(threads)))
    }

    /// The host's processor, with the share of it that a rank has.
    pub fn cpu_on(share: Share) -> Device {
        Device::Cpu(Arc::new(Cpu::on(share)))
    }

    /// A GPU that runs on this machine's processor; see `gpu/emulated.rs`.
    pub fn emulated(seed: Option<u64>, checked: bool, threads: usize) -> Device {
        Device::gpu(Box::new(Emulated::new(seed, checked, threads)))
    }

    pub fn gpu(driver: Box<dyn Driver>) -> Device {
        Device::Gpu(Arc::new(Gpu::new(driver)))
    }

    /// A real GPU, with `bytes` of its memory; `help`: what to do where they run out. Without a library, products are kernels of our own.
    pub fn cuda(context: Context, library: Option<Found>, bytes: usize, help: String) -> Result<Device> {
        let own = library.is_none();
        let device = Device::gpu(Box::new(Cuda::new(context, library, bytes, help)?));
        Ok(if own { device.with_own_products() } else { device })
    }

    /// The same device, where on a GPU matrix products are kernels of the program's own.
    pub fn with_own_products(&self) -> Device {
        match self {
            Device::Gpu(gpu) => Device::Gpu(Arc::new(gpu.with_own_products())),
            Device::Cpu(_) | Device::Dry(_) => self.clone(),
        }
    }

    /// A device that only counts what the CPU would take.
    pub fn dry() -> Device {
        Device::Dry(Arc::new(Memory::of_nothing(false)))
    }

    /// A device that only counts what a GPU would take.
    pub fn dry_gpu() -> Device {
        Device::Dry(Arc::new(Memory::of_nothing(true)))
    }

    /// Whether this is a GPU, or counts for one.
    pub fn is_gpu(&self) -> bool {
        self.memory().is_of_gpu()
    }

    /// Room that only a GPU's path of an op has need of.
    pub fn gpu_scratch(&self, shape: impl Into<Shape>, dtype: Dtype) -> Option<Tensor> {
        self.is_gpu().then(|| self.empty(shape, dtype))
    }

    /// Waits for all work, and tells what of it has failed.
    pub fn check(&self) -> Result<()> {
        match self {
            Device::Gpu(gpu) => gpu.check(),
            Device::Cpu(_) | Device::Dry(_) => Ok(()),
        }
    }

    /// In words.
    pub fn name(&self) -> String {
        match self {
            Device::Cpu(cpu) => format!("{} thread{}", cpu.threads(), if cpu.threads() == 1 { "" } else { "s" }),
            Device::Gpu(gpu) => gpu.name(),
            Device::Dry(_) => "a device that only counts".to_string(),
        }
    }

    /// Does `work` where ops need not wake anybody up from outside: on the CPU, on a thread of its pool.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match self {
            Device::Cpu(cpu) => cpu.install(work),
            Device::Gpu(_) | Device::Dry(_) => work(),
        }
    }

    /// Does `work` beside what is called otherwise: on the CPU, on a thread of its pool that has nothing else to do. Other devices do
    /// it at once.
    pub fn beside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Beside<T> {
        Beside::new(work, |work| match self {
            Device::Cpu(cpu) => cpu.spawn(work),
            Device::Gpu(_) | Device::Dry(_) => work(),
        })
    }

    pub fn memory(&self) -> &Arc<Memory> {
        match self {
            Device::Cpu(cpu) => &cpu.memory,
            Device::Gpu(gpu) => &gpu.memory,
            Device::Dry(memory) => memory,
        }
    }

    /// A tensor whose content is whatever was there before: the caller writes all of it.
    pub fn empty(&self, shape: impl Into<Shape>, dtype: Dtype) -> Tensor {
        let shape = shape.into();
        let buffer = Memory::allocate(self.memory(), shape.numel() * dtype.bytes());
        Tensor::from_parts(self.clone(), buffer, shape, dtype)
    }

    pub fn zeros(&self, shape: impl Into<Shape>, dtype: Dtype) -> Tensor {
        let shape = shape.into();
        let buffer = Memory::allocate(self.memory(), shape.numel() * dtype.bytes());
        let is_new = buffer.is_new();
        let mut tensor = Tensor::from_parts(self.clone(), buffer, shape, dtype);
        if !is_new {
            tensor.view_mut().fill_zero();
        }
        tensor
    }

    /// A place for tensors of `sizes` bytes: the device's memory, or a file in `folder`, which the host maps.
    pub fn shelf(&self, folder: Option<&Path>, sizes: impl IntoIterator<Item = usize>) -> Result<Shelf> {
        let Some(folder) = folder else { return Ok(Shelf::Device) };
        let host = match self {
            Device::Cpu(_) => self.clone(),
            Device::Gpu(_) => Device::cpu(std::thread::available_parallelism().map_or(1, usize::from)),
            Device::Dry(_) if self.is_gpu() => Device::dry(),
            Device::Dry(_) => self.clone(),
        };
        let bytes = sizes.into_iter().map(mapped::bytes_taken).sum();
        let file = if matches!(host, Device::Dry(_)) { None } else { Some(OffloadFile::create(folder, bytes)?) };
        Ok(Shelf::File { file, host })
    }

    /// Zeros in the place that `shelf` is.
    pub fn zeros_on(&self, shelf: &mut Shelf, shape: impl Into<Shape>, dtype: Dtype) -> Result<Tensor> {
        let shape = shape.into();
        let bytes = shape.numel() * dtype.bytes();
        let (file, host) = match shelf {
            Shelf::Device => return Ok(self.zeros(shape, dtype)),
            Shelf::File { file, host } => (file.as_mut().map(|file| file.take(bytes)).transpose()?, host.clone()),
        };
        // A new file reads as zeros.
        let buffer = Memory::adopt(host.memory(), file, bytes);
        Ok(Tensor::from_parts(host, buffer, shape, dtype))
    }
}
