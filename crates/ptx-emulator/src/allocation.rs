//! The bytes of one allocation, in cells of four.
//!
//! Invariant: callers have checked offsets; an offset past the end is a bug of the emulator and panics. A store of less than a cell
//! leaves the other bytes of the cell alone, also when another thread changes those at the same time and `crowded` says so.

use crate::ranges::Ranges;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

const PAGE_CELLS: usize = 1 << 14;

#[derive(Debug)]
enum Cells {
    Dense(Box<[AtomicU32]>),
    /// Pages of 64 KiB that are made at the first write.
    Sparse(Box<[OnceLock<Box<[AtomicU32]>>]>),
}

#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) base: u64,
    pub(crate) bytes: u64,
    cells: Cells,
    /// Held while several threads change values of eight bytes.
    wide: Mutex<()>,
    /// The bytes that somebody has written.
    initialised: Mutex<Ranges>,
    /// All count as written: a launch that was not checked wrote here.
    trusted: AtomicBool,
}

/// What a sparse allocation reads as before a write.
static ZERO: AtomicU32 = AtomicU32::new(0);

fn cells(count: usize, value: u32) -> Box<[AtomicU32]> {
    (0..count).map(|_| AtomicU32::new(value)).collect()
}

impl Allocation {
    pub(crate) fn new(base: u64, bytes: usize, sparse: bool) -> Allocation {
        let count = bytes.div_ceil(4);
        let cells = if sparse {
            Cells::Sparse((0..count.div_ceil(PAGE_CELLS)).map(|_| OnceLock::new()).collect())
        } else {
            Cells::Dense(cells(count, !0))
        };
        Allocation {
            base,
            bytes: bytes as u64,
            cells,
            wide: Mutex::default(),
            initialised: Mutex::default(),
            trusted: AtomicBool::new(sparse),
        }
    }

    #[inline(always)]
    pub(crate) fn trust(&self) {
        if !self.trusted.load(Ordering::Relaxed) {
            self.trusted.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn initialise(&self, begin: u64, end: u64) {
        self.initialised.lock().unwrap_or_else(PoisonError::into_inner).insert(begin, end);
    }

    /// The parts of a range that somebody has written.
    pub(crate) fn initialised(&self, begin: u64, end: u64) -> Vec<(u64, u64)> {
        if self.trusted.load(Ordering::Relaxed) {
            return vec![(begin, end)];
        }
        self.initialised.lock().unwrap_or_else(PoisonError::into_inner).within(begin, end).collect()
    }

    /// Takes over what a range of another allocation knows of its bytes.
    pub(crate) fn initialise_like(&self, offset: u64, bytes: u64, pieces: &[(u64, u64)]) {
        let mut ranges = self.initialised.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.remove(offset, offset + bytes);
        for (begin, end) in pieces {
            ranges.insert(offset + begin, offset + end);
        }
    }

    #[inline(always)]
    fn cell(&self, index: usize) -> &AtomicU32 {
        match &self.cells {
            Cells::Dense(cells) => &cells[index],
            Cells::Sparse(pages) => match pages[index / PAGE_CELLS].get() {
                Some(page) => &page[index % PAGE_CELLS],
                None => &ZERO,
            },
        }
    }

    #[inline(always)]
    fn cell_to_write(&self, index: usize) -> &AtomicU32 {
        match &self.cells {
            Cells::Dense(cells) => &cells[index],
            Cells::Sparse(pages) => &pages[index / PAGE_CELLS].get_or_init(|| cells(PAGE_CELLS, 0))[index % PAGE_CELLS],
        }
    }

    #[inline(always)]
    pub(crate) fn load_word(&self, offset: u64) -> u32 {
        self.cell(offset as usize / 4).load(Ordering::Relaxed)
    }

    #[inline(always)]
    pub(crate) fn store_word(&self, offset: u64, value: u32) {
        self.cell_to_write(offset as usize / 4).store(value, Ordering::Relaxed);
    }

    /// 1, 2, 4 or 8 bytes at a multiple of their number.
    #[inline(always)]
    pub(crate) fn load(&self, offset: u64, bytes: usize) -> u64 {
        match bytes {
            4 => u64::from(self.load_word(offset)),
            8 => u64::from(self.load_word(offset)) | u64::from(self.load_word(offset + 4)) << 32,
            _ => u64::from(self.load_word(offset)) >> (8 * (offset % 4)) & ((1 << (8 * bytes)) - 1),
        }
    }

    #[inline(always)]
    pub(crate) fn store(&self, offset: u64, bytes: usize, value: u64, crowded: bool) {
        match bytes {
            4 => self.store_word(offset, value as u32),
            8 => {
                let _guard = crowded.then(|| self.wide.lock().unwrap_or_else(PoisonError::into_inner));
                self.store_word(offset, value as u32);
                self.store_word(offset + 4, (value >> 32) as u32);
            }
            _ => self.store_part(offset, bytes, value as u32, crowded),
        }
    }

    #[inline(always)]
    fn store_part(&self, offset: u64, bytes: usize, value: u32, crowded: bool) {
        let shift = 8 * (offset % 4) as u32;
        let mask = ((1u32 << (8 * bytes)) - 1) << shift;
        let cell = self.cell_to_write(offset as usize / 4);
        let change = |old: u32| (old & !mask) | (value << shift & mask);
        if crowded {
            cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(change(old))).expect("the change is never refused");
        } else {
            cell.store(change(cell.load(Ordering::Relaxed)), Ordering::Relaxed);
        }
    }

    /// Replaces 2, 4 or 8 bytes in one step and returns what was there.
    pub(crate) fn update(&self, offset: u64, bytes: usize, crowded: bool, f: impl Fn(u64) -> u64) -> u64 {
        if !crowded || bytes == 8 {
            let _guard = crowded.then(|| self.wide.lock().unwrap_or_else(PoisonError::into_inner));
            let old = self.load(offset, bytes);
            let new = f(old);
            if bytes == 8 {
                self.store_word(offset, new as u32);
                self.store_word(offset + 4, (new >> 32) as u32);
            } else {
                self.store(offset, bytes, new, false);
            }
            return old;
        }
        let shift = 8 * (offset % 4) as u32;
        let mask = if bytes == 4 { !0 } else { 0xFFFF << shift };
        let part = |cell: u32| u64::from((cell & mask) >> shift);
        let change = |cell: u32| Some((cell & !mask) | ((f(part(cell)) as u32) << shift & mask));
        let cell = self.cell_to_write(offset as usize / 4);
        part(cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change).expect("the change is never refused"))
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        self.initialise(offset, offset + bytes.len() as u64);
        self.write_bytes(offset, bytes);
    }

    /// The same by a kernel, whose launch keeps track of what is initialised.
    pub(crate) fn write_bytes(&self, offset: u64, bytes: &[u8]) {
        let (head, rest) = bytes.split_at(bytes.len().min((4 - offset as usize % 4) % 4));
        for (i, byte) in head.iter().enumerate() {
            self.store_part(offset + i as u64, 1, u32::from(*byte), true);
        }
        let offset = offset + head.len() as u64;
        let words = rest.chunks_exact(4);
        let tail = words.remainder();
        for (i, word) in words.enumerate() {
            self.store_word(offset + 4 * i as u64, u32::from_le_bytes(word.try_into().expect("chunks of four")));
        }
        let offset = offset + (rest.len() - tail.len()) as u64;
        for (i, byte) in tail.iter().enumerate() {
            self.store_part(offset + i as u64, 1, u32::from(*byte), true);
        }
    }

    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let skip = at as usize % 4;
            let (now, later) = rest.split_at_mut(rest.len().min(4 - skip));
            now.copy_from_slice(&self.load_word(at).to_le_bytes()[skip..skip + now.len()]);
            at += now.len() as u64;
            rest = later;
        }
    }

    pub(crate) fn fill(&self, offset: u64, byte: u8, bytes: usize) {
        let buffer = [byte; 4096];
        let mut done = 0;
        while done < bytes {
            let begin = offset + done as u64;
            let count = (bytes - done).min(buffer.len() - begin as usize % buffer.len());
            // Pages that nobody has written are zero already.
            if byte != 0 || self.has_page(begin) {
                self.write(begin, &buffer[..count]);
            }
            done += count;
        }
    }

    fn has_page(&self, offset: u64) -> bool {
        match &self.cells {
            Cells::Dense(_) => true,
            Cells::Sparse(pages) => pages[offset as usize / 4 / PAGE_CELLS].get().is_some(),
        }
    }
}
