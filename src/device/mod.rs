//! Where numbers live. A closed set: the host's processor, and a device that only counts.

pub mod cpu;
pub mod mapped;
pub mod memory;
pub mod tensor;

use crate::dtype::Dtype;
use crate::shape::Shape;
use anyhow::Result;
use cpu::Cpu;
use mapped::OffloadFile;
use memory::Memory;
use std::path::Path;
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

/// Where tensors that live as long as a run are put.
#[derive(Debug)]
pub enum Shelf {
    Device,
    /// None on a device without numbers.
    File(Option<OffloadFile>),
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

    /// A place for tensors of `sizes` bytes: the device's memory, or a file in `folder`.
    pub fn shelf(&self, folder: Option<&Path>, sizes: impl IntoIterator<Item = usize>) -> Result<Shelf> {
        match (self, folder) {
            (_, None) => Ok(Shelf::Device),
            (Device::Dry(_), Some(_)) => Ok(Shelf::File(None)),
            (Device::Cpu(_), Some(folder)) => {
                let bytes = sizes.into_iter().map(mapped::bytes_taken).sum();
                Ok(Shelf::File(Some(OffloadFile::create(folder, bytes)?)))
            }
        }
    }

    /// Zeros in the place that `shelf` is.
    pub fn zeros_on(&self, shelf: &mut Shelf, shape: impl Into<Shape>, dtype: Dtype) -> Result<Tensor> {
        let shape = shape.into();
        let bytes = shape.numel() * dtype.bytes();
        let file = match shelf {
            Shelf::Device => return Ok(self.zeros(shape, dtype)),
            Shelf::File(file) => file.as_mut().map(|file| file.take(bytes)).transpose()?,
        };
        // A new file reads as zeros.
        Ok(Tensor::from_parts(self.clone(), Memory::adopt(self.memory(), file, bytes), shape, dtype))
    }
}
