//! The global memory of an emulated device.
//!
//! Invariant: an address belongs to one allocation for ever: freed ranges are not given out again, and between two allocations lie
//! bytes that belong to none. All bytes are kept in atomic cells of four, so that blocks on several threads may touch them.

use crate::address::GLOBAL;
use crate::allocation::Allocation;
use crate::fault::{Fault, FaultKind};
use crate::kernel::Image;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bytes between allocations, at least.
const GAP: u64 = 4096;
const ALIGN: u64 = 256;

#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    /// Sorted by address.
    live: Vec<Arc<Allocation>>,
    /// Ranges given back: begin and bytes, sorted too.
    freed: Vec<(u64, u64)>,
    next: u64,
    /// Where the variables of each module lie.
    images: HashMap<u64, u64>,
}

/// The memory of one device. Launches that use it run one after the other; host calls wait for them.
#[derive(Debug)]
pub struct Memory {
    table: RwLock<Arc<Table>>,
    /// Held for writing by a launch, for reading by copies of the host.
    running: RwLock<()>,
}

impl Default for Memory {
    fn default() -> Memory {
        Memory::new()
    }
}

impl Table {
    fn add(&mut self, bytes: usize, sparse: bool) -> u64 {
        let base = GLOBAL + self.next;
        self.next += (bytes as u64 + GAP).next_multiple_of(ALIGN);
        self.live.push(Arc::new(Allocation::new(base, bytes, sparse)));
        base
    }

    fn index(&self, address: u64) -> Option<usize> {
        self.live.partition_point(|a| a.base <= address).checked_sub(1)
    }

    pub(crate) fn find(&self, address: u64, bytes: u64) -> Option<(usize, &Allocation)> {
        let index = self.index(address)?;
        let allocation = &self.live[index];
        (address - allocation.base + bytes <= allocation.bytes).then_some((index, allocation.as_ref()))
    }

    pub(crate) fn allocation(&self, index: usize) -> Option<&Allocation> {
        self.live.get(index).map(Arc::as_ref)
    }

    /// Why an access finds no allocation.
    pub(crate) fn blame(&self, address: u64, bytes: u64) -> (FaultKind, String) {
        let freed = self.freed.partition_point(|(begin, _)| *begin <= address).checked_sub(1).map(|index| self.freed[index]);
        if let Some((begin, size)) = freed.filter(|(begin, size)| address - begin < *size) {
            let message =
                format!("{bytes} bytes at {address:#x}, {} bytes into an allocation of {size} bytes that was freed", address - begin);
            return (FaultKind::Freed, message);
        }
        let Some(index) = self.index(address) else {
            let hint = if address < GLOBAL { ", which is no device address" } else { "" };
            return (FaultKind::OutOfBounds, format!("{bytes} bytes at {address:#x}{hint}"));
        };
        let near = &self.live[index];
        let (offset, size) = (address - near.base, near.bytes);
        let where_to = if offset < size {
            format!("of which {} are past the end of an allocation of {size} bytes", offset + bytes - size)
        } else if let Some(next) = self.live.get(index + 1).filter(|next| next.base - address < offset - size) {
            format!("{} bytes before an allocation of {} bytes", next.base - address, next.bytes)
        } else {
            format!("{} bytes past the end of an allocation of {size} bytes", offset - size)
        };
        (FaultKind::OutOfBounds, format!("{bytes} bytes at {address:#x}, {where_to}"))
    }
}

impl Memory {
    pub fn new() -> Memory {
        Memory { table: RwLock::default(), running: RwLock::default() }
    }

    /// A snapshot of the allocations.
    pub(crate) fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change<T>(&self, f: impl FnOnce(&mut Table) -> T) -> T {
        f(Arc::make_mut(&mut self.table.write().unwrap_or_else(PoisonError::into_inner)))
    }

    pub(crate) fn run(&self) -> RwLockWriteGuard<'_, ()> {
        self.running.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn quiet(&self) -> RwLockReadGuard<'_, ()> {
        self.running.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes at a new address, a multiple of 256. All are 0xFF until written, a NaN in every format.
    pub fn allocate(&self, bytes: usize) -> u64 {
        self.change(|table| table.add(bytes, false))
    }

    /// The same for tensors larger than the host's memory: pages are made when first written, and read as zero before.
    pub fn allocate_sparse(&self, bytes: usize) -> u64 {
        self.change(|table| table.add(bytes, true))
    }

    /// Gives an allocation back. Its addresses are remembered: an access says that they were freed.
    pub fn free(&self, address: u64) -> Result<(), Fault> {
        let _quiet = self.quiet();
        let found = self.change(|table| {
            let index = table.live.iter().position(|a| a.base == address)?;
            let allocation = table.live.remove(index);
            let at = table.freed.partition_point(|(begin, _)| *begin < address);
            table.freed.insert(at, (address, allocation.bytes));
            Some(())
        });
        found.ok_or_else(|| {
            let (kind, near) = self.table().blame(address, 1);
            let kind = if kind == FaultKind::Freed { kind } else { FaultKind::OutOfBounds };
            Fault::of_host(kind, format!("free of {address:#x}, where no allocation begins ({near})"))
        })
    }

    /// The variables of a module, made at their first use.
    pub(crate) fn image(&self, image: &Image) -> u64 {
        if let Some(address) = self.table().images.get(&image.number) {
            return *address;
        }
        self.change(|table| {
            let address = table.add(image.bytes.len(), false);
            if let Some((_, allocation)) = table.find(address, image.bytes.len() as u64) {
                allocation.write(0, &image.bytes);
            }
            table.images.insert(image.number, address);
            address
        })
    }

    fn with<T>(&self, what: &str, address: u64, bytes: usize, f: impl FnOnce(&Allocation, u64) -> T) -> Result<T, Fault> {
        let table = self.table();
        match table.find(address, bytes as u64) {
            Some((_, allocation)) => Ok(f(allocation, address - allocation.base)),
            None => {
                let (kind, message) = table.blame(address, bytes as u64);
                Err(Fault::of_host(kind, format!("the host {what} {message}")))
            }
        }
    }

    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let _quiet = self.quiet();
        self.with("writes", address, bytes.len(), |allocation, offset| allocation.write(offset, bytes))
    }

    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let _quiet = self.quiet();
        self.with("reads", address, bytes.len(), |allocation, offset| allocation.read(offset, bytes))
    }

    /// The ranges may overlap. Bytes that nobody has written stay what they are: a checked launch still knows them.
    pub fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Fault> {
        let _quiet = self.quiet();
        let mut buffer = vec![0; bytes];
        let pieces: Vec<(u64, u64)> = self.with("reads", from, bytes, |allocation, offset| {
            allocation.read(offset, &mut buffer);
            let pieces = allocation.initialised(offset, offset + bytes as u64);
            pieces.into_iter().map(|(begin, end)| (begin - offset, end - offset)).collect()
        })?;
        self.with("writes", to, bytes, |allocation, offset| {
            allocation.write(offset, &buffer);
            allocation.initialise_like(offset, bytes as u64, &pieces);
        })
    }

    pub fn fill(&self, address: u64, byte: u8, bytes: usize) -> Result<(), Fault> {
        let _quiet = self.quiet();
        self.with("fills", address, bytes, |allocation, offset| allocation.fill(offset, byte, bytes))
    }
}
