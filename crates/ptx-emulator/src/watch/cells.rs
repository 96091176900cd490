//! What is known of each two bytes of memory in a checked launch.
//!
//! Invariant: a cell remembers its last writer and its last two readers since then; bytes of a cell that different lanes write are
//! told apart by their masks as long as one writer is remembered.

/// Who touched a cell: a segment of a warp's time (0: nobody), and the instruction and lane in one number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Who {
    pub(crate) segment: u32,
    site: u32,
}

impl Who {
    pub(crate) fn new(segment: u32, pc: u32, lane: u8) -> Who {
        Who { segment, site: pc << 6 | u32::from(lane) }
    }

    pub(crate) fn pc(self) -> u32 {
        self.site >> 6
    }

    pub(crate) fn lane(self) -> u8 {
        (self.site & 63) as u8
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cell {
    pub(crate) writer: Who,
    pub(crate) readers: [Who; 2],
    /// One bit per byte, in each.
    pub(crate) initialised: u8,
    pub(crate) written: u8,
    pub(crate) read: [u8; 2],
    /// A copy into it is under way.
    pub(crate) pending: bool,
    /// The writer, or the reader, is an atomic or another strong access.
    pub(crate) strong_writer: bool,
    pub(crate) strong_readers: [bool; 2],
    /// Written by an ordinary store at this count of accesses; 0: by none or by an asynchronous copy.
    pub(crate) stored: u32,
}

pub(crate) const CELL: u64 = 2;
const PAGE: usize = 256;

/// The cells of a stretch of memory, made as they are touched.
#[derive(Debug, Default)]
pub(crate) struct Cells {
    pages: Vec<Option<Box<[Cell]>>>,
}

impl Cells {
    pub(crate) fn new(bytes: u64) -> Cells {
        let count = (bytes.div_ceil(CELL) as usize).div_ceil(PAGE);
        Cells { pages: (0..count).map(|_| None).collect() }
    }

    /// The cell of an offset; `fresh` says which bytes of a range are initialised when its page is made.
    pub(crate) fn get(&mut self, offset: u64, fresh: impl FnOnce(u64, u64, &mut [Cell])) -> &mut Cell {
        let index = (offset / CELL) as usize;
        let page = self.pages[index / PAGE].get_or_insert_with(|| {
            let mut cells = vec![Cell::default(); PAGE].into_boxed_slice();
            let begin = (index / PAGE * PAGE) as u64 * CELL;
            fresh(begin, begin + PAGE as u64 * CELL, &mut cells);
            cells
        });
        &mut page[index % PAGE]
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.pages.fill_with(|| None);
    }

    /// Tells the ranges of bytes that are initialised, of pages that were touched.
    pub(crate) fn initialised(&self, mut tell: impl FnMut(u64, u64)) {
        let mut run = (0, 0);
        for (number, page) in self.pages.iter().enumerate() {
            let Some(page) = page else { continue };
            for (index, cell) in page.iter().enumerate() {
                let begin = (number * PAGE + index) as u64 * CELL;
                for at in (begin..begin + CELL).filter(|at| cell.initialised >> (at - begin) & 1 != 0) {
                    if at != run.1 {
                        tell(run.0, run.1);
                        run.0 = at;
                    }
                    run.1 = at + 1;
                }
            }
        }
        tell(run.0, run.1);
    }
}
