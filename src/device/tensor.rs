//! Tensors own their numbers; views borrow them. Everything is contiguous and row-major.
//!
//! Ops take views, return fresh tensors, and add weight gradients into a `ViewMut`.

use crate::device::Device;
use crate::device::gpu::driver::{Argument, Stream};
use crate::device::memory::Buffer;
use crate::dispatch;
use crate::dtype::{Dtype, Element, Stored};
use crate::shape::Shape;
use anyhow::Result;
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use std::ops::Range;

/// Bytes that a thread clears at least, so that waking it pays.
const BYTES_CLEARED: usize = 1 << 18;

#[derive(Debug)]
pub struct Tensor {
    device: Device,
    buffer: Buffer,
    shape: Shape,
    dtype: Dtype,
}

/// A shaped window into a tensor. `start` counts elements.
#[derive(Clone, Copy)]
pub struct View<'a> {
    device: &'a Device,
    buffer: &'a Buffer,
    start: usize,
    shape: Shape,
    dtype: Dtype,
}

pub struct ViewMut<'a> {
    device: &'a Device,
    buffer: &'a mut Buffer,
    start: usize,
    shape: Shape,
    dtype: Dtype,
}

impl Tensor {
    pub fn from_parts(device: Device, buffer: Buffer, shape: Shape, dtype: Dtype) -> Tensor {
        Tensor { device, buffer, shape, dtype }
    }

    /// Copies host numbers to `device`.
    pub fn from_slice<T: Stored>(device: &Device, shape: impl Into<Shape>, values: &[T]) -> Tensor {
        let shape = shape.into();
        assert_eq!(shape.numel(), values.len(), "a {shape} tensor from {} values", values.len());
        let mut tensor = device.empty(shape, T::DTYPE);
        tensor.view_mut().write(values);
        tensor
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// What the tensor takes of its device's memory.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes_taken()
    }

    /// What it keeps out of there, in a file.
    pub fn bytes_offloaded(&self) -> usize {
        self.buffer.bytes_offloaded()
    }

    pub fn view(&self) -> View<'_> {
        View { device: &self.device, buffer: &self.buffer, start: 0, shape: self.shape, dtype: self.dtype }
    }

    pub fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut { device: &self.device, buffer: &mut self.buffer, start: 0, shape: self.shape, dtype: self.dtype }
    }

    /// The same numbers under another shape.
    pub fn reshape(mut self, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        assert_eq!(self.shape.numel(), shape.numel(), "reshape {} to {shape}", self.shape);
        self.shape = shape;
        self
    }

    /// A copy on the same device.
    pub fn duplicate(&self) -> Tensor {
        let mut copy = self.device.empty(self.shape, self.dtype);
        copy.view_mut().copy_from(self.view());
        copy
    }

    /// The numbers on the host.
    pub fn to_vec<T: Stored>(&self) -> Vec<T> {
        self.view().to_vec()
    }
}

impl<'a> View<'a> {
    pub fn device(&self) -> &'a Device {
        self.device
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The elements `range`, counted within this view, under `shape`.
    pub fn part(&self, range: Range<usize>, shape: impl Into<Shape>) -> View<'a> {
        let shape = shape.into();
        assert!(range.end <= self.shape.numel(), "{range:?} of a view {}", self.shape);
        assert_eq!(range.len(), shape.numel(), "{range:?} as {shape}");
        View { start: self.start + range.start, shape, ..*self }
    }

    /// Rows `rows` of a view seen as a matrix of `shape().columns()` columns.
    pub fn rows(&self, rows: Range<usize>) -> View<'a> {
        let columns = self.shape.columns();
        self.part(rows.start * columns..rows.end * columns, [rows.len(), columns])
    }

    pub fn reshape(&self, shape: impl Into<Shape>) -> View<'a> {
        self.part(0..self.shape.numel(), shape)
    }

    /// The elements as a slice of host memory. Only where the device is the CPU.
    pub fn slice<T: Stored>(&self) -> &'a [T] {
        assert_eq!(self.dtype, T::DTYPE, "a slice of another dtype");
        let bytes = self.start * self.dtype.bytes()..(self.start + self.shape.numel()) * self.dtype.bytes();
        bytemuck::cast_slice(&self.buffer.bytes()[bytes])
    }

    /// Where a GPU finds the window.
    pub fn address(&self) -> u64 {
        self.buffer.address() + (self.start * self.dtype.bytes()) as u64
    }

    /// What the window takes of memory.
    pub fn bytes(&self) -> usize {
        self.shape.numel() * self.dtype.bytes()
    }

    /// The window's bytes on the host.
    pub fn to_bytes(&self) -> Vec<u8> {
        let start = self.start * self.dtype.bytes();
        match self.device {
            Device::Cpu(_) => self.buffer.bytes()[start..start + self.bytes()].to_vec(),
            Device::Gpu(_) | Device::Dry(_) => {
                let mut bytes = vec![0; self.bytes()];
                self.read_from_gpu(&mut bytes);
                bytes
            }
        }
    }

    pub fn to_vec<T: Stored>(&self) -> Vec<T> {
        match self.device {
            Device::Cpu(_) => self.slice::<T>().to_vec(),
            Device::Gpu(_) | Device::Dry(_) => {
                assert_eq!(self.dtype, T::DTYPE, "numbers of another dtype");
                let mut values = vec![T::default(); self.shape.numel()];
                self.read_from_gpu(bytemuck::cast_slice_mut(&mut values));
                values
            }
        }
    }

    /// Waits for the work that makes the window. After a failure the bytes stay as they are: who uses them asks `Device::check` first.
    fn read_from_gpu(&self, bytes: &mut [u8]) {
        if let Device::Gpu(gpu) = self.device {
            gpu.queue().run(|driver| driver.download(Stream::Compute, self.address(), bytes));
        }
    }
}

impl<'a> ViewMut<'a> {
    pub fn device(&self) -> &'a Device {
        self.device
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn view(&self) -> View<'_> {
        View { device: self.device, buffer: self.buffer, start: self.start, shape: self.shape, dtype: self.dtype }
    }

    /// Where a GPU finds the window.
    pub fn address(&self) -> u64 {
        self.view().address()
    }

    /// A shorter borrow of the same window.
    pub fn again(&mut self) -> ViewMut<'_> {
        ViewMut { device: self.device, buffer: self.buffer, start: self.start, shape: self.shape, dtype: self.dtype }
    }

    pub fn part(self, range: Range<usize>, shape: impl Into<Shape>) -> ViewMut<'a> {
        let shape = shape.into();
        assert!(range.end <= self.shape.numel(), "{range:?} of a view {}", self.shape);
        assert_eq!(range.len(), shape.numel(), "{range:?} as {shape}");
        ViewMut { start: self.start + range.start, shape, ..self }
    }

    pub fn rows(self, rows: Range<usize>) -> ViewMut<'a> {
        let columns = self.shape.columns();
        self.part(rows.start * columns..rows.end * columns, [rows.len(), columns])
    }

    pub fn reshape(self, shape: impl Into<Shape>) -> ViewMut<'a> {
        let count = self.shape.numel();
        self.part(0..count, shape)
    }

    /// The elements as a slice of host memory. Only where the device is the CPU.
    pub fn into_slice<T: Stored>(self) -> &'a mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "a slice of another dtype");
        let bytes = self.start * self.dtype.bytes()..(self.start + self.shape.numel()) * self.dtype.bytes();
        bytemuck::cast_slice_mut(&mut self.buffer.bytes_mut()[bytes])
    }

    pub fn slice_mut<T: Stored>(&mut self) -> &mut [T] {
        self.again().into_slice()
    }

    pub fn fill_zero(self) {
        match self.device {
            Device::Cpu(cpu) => {
                let bytes = self.start * self.dtype.bytes()..(self.start + self.shape.numel()) * self.dtype.bytes();
                cpu.for_rows(&mut self.buffer.bytes_mut()[bytes], 1, BYTES_CLEARED, |_, bytes| bytes.fill(0));
            }
            Device::Gpu(gpu) => {
                let bytes = self.view().bytes();
                gpu.queue().run(|driver| driver.zero(Stream::Compute, self.address(), bytes));
            }
            Device::Dry(_) => {}
        }
    }

    /// Copies host numbers into the window.
    pub fn write<T: Stored>(mut self, values: &[T]) {
        assert_eq!(self.shape.numel(), values.len(), "{} values into {}", values.len(), self.shape);
        match self.device {
            Device::Cpu(_) => self.slice_mut::<T>().copy_from_slice(values),
            Device::Gpu(gpu) => {
                assert_eq!(self.dtype, T::DTYPE, "numbers of another dtype");
                gpu.queue().run(|driver| driver.upload(Stream::Compute, self.address(), bytemuck::cast_slice(values)));
            }
            Device::Dry(_) => {}
        }
    }

    /// Lets `fill` write the numbers of the window: in place where they lie on the host, else in a buffer of zeros that is then copied.
    pub fn fill_with<T: Stored>(mut self, fill: impl FnOnce(&mut [T]) -> Result<()>) -> Result<()> {
        if let Device::Cpu(_) = self.device {
            return fill(self.slice_mut::<T>());
        }
        let mut values = vec![bytemuck::Zeroable::zeroed(); self.shape.numel()];
        fill(&mut values)?;
        self.write(&values);
        Ok(())
    }

    /// The same, with f32 numbers that are rounded to the window's dtype.
    pub fn fill_rounded(self, fill: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
        if self.dtype == Dtype::F32 {
            return self.fill_with(fill);
        }
        let mut values = vec![0f32; self.shape.numel()];
        fill(&mut values)?;
        dispatch!(self.dtype, T => {
            let rounded: Vec<T> = values.par_iter().map(|&x| <T as Element>::from_f32(x)).collect();
            self.write(&rounded);
        });
        Ok(())
    }

    /// Copies `source`, which has the same number of elements of the same dtype, and may lie on another device.
    pub fn copy_from(self, source: View<'_>) {
        assert_eq!(self.dtype, source.dtype, "a copy does not convert");
        assert_eq!(self.shape.numel(), source.shape.numel(), "copy {} into {}", source.shape, self.shape);
        let size = self.dtype.bytes();
        let from = source.start * size..(source.start + source.shape.numel()) * size;
        let to = self.start * size..(self.start + self.shape.numel()) * size;
        match (self.device, source.device) {
            (Device::Cpu(_), Device::Cpu(_)) => self.buffer.bytes_mut()[to].copy_from_slice(&source.buffer.bytes()[from]),
            (Device::Cpu(_), Device::Gpu(_)) => source.read_from_gpu(&mut self.buffer.bytes_mut()[to]),
            (Device::Gpu(gpu), Device::Cpu(_)) => {
                gpu.queue().run(|driver| driver.upload(Stream::Compute, self.address(), &source.buffer.bytes()[from]));
            }
            (Device::Gpu(gpu), Device::Gpu(_)) => {
                gpu.queue().run(|driver| driver.copy(Stream::Compute, self.address(), source.address(), source.bytes()));
            }
            (Device::Dry(_), _) | (_, Device::Dry(_)) => {}
        }
    }
}

impl From<View<'_>> for Argument {
    fn from(view: View<'_>) -> Argument {
        Argument::from(view.address())
    }
}

impl From<ViewMut<'_>> for Argument {
    fn from(view: ViewMut<'_>) -> Argument {
        Argument::from(view.address())
    }
}

impl From<&ViewMut<'_>> for Argument {
    fn from(view: &ViewMut<'_>) -> Argument {
        Argument::from(view.address())
    }
}
