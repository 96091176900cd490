//! Where numbers live. A closed set: the host's processor, and a device that only counts.

pub mod cpu;
pub mod memory;
pub mod tensor;

use crate::dtype::Dtype;
use crate::shape::Shape;
use cpu::Cpu;
use memory::Memory;
use std::sync::Arc;
use tensor::Tensor;

/// Cloning is cheap: clones share threads and memory.
///
/// `Dry` holds no numbers: a tensor on it has a shape and is counted, ops on it check their shapes and compute nothing.
/// The same code that trains, run on it, tells the memory that training will take (see `train/rehearsal.rs`).
#[derive(Clone, Debug)]
pub enum Device {
    Cpu(Arc<Cpu>),
    Dry(Arc<Memory>),
}

impl Device {
    /// `threads`: how many threads ops use, the calling one included.
    pub fn cpu(threads: usize) -> Device {
        Device::Cpu(Arc::new(Cpu::new(threads)))
    }

    pub fn dry() -> Device {
        Device::Dry(Arc::new(Memory::new(false)))
    }

    pub fn memory(&self) -> &Arc<Memory> {
        match self {
            Device::Cpu(cpu) => &cpu.memory,
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
        let mut tensor = self.empty(shape, dtype);
        tensor.view_mut().fill_zero();
        tensor
    }
}
