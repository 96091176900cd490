//! What a GPU does for ferrotron: memory, copies, kernels, matrix products. A real one and an emulated one do it.
//!
//! Work is queued on a stream and done in that stream's order. Work on two streams is ordered only by an event that one records and the
//! other waits for.

use crate::dtype::Dtype;
use anyhow::Result;
use std::fmt::Debug;

/// Ops run on `Compute`. Copies between the device and the host that need not hold it up run on `Copies`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stream {
    Compute,
    Copies,
}

/// A point in a stream's work.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Event(pub u64);

/// Blocks of a kernel, their threads and their dynamic shared memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grid {
    pub blocks: [u32; 3],
    pub threads: u32,
    pub shared_bytes: u32,
}

/// One argument of a kernel: its bytes, little-endian, and how many there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Argument {
    bytes: [u8; 8],
    size: usize,
}

/// How the numbers of a matrix that is an operand of a product lie in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Order {
    /// The dim that is summed over is the inner one.
    SummedInner,
    SummedOuter,
}

/// An operand of a product: of `Gemm::dtype`, `stride` elements from one outer index to the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operand {
    pub address: u64,
    pub stride: usize,
    pub order: Order,
}

/// out[m, n] = sum over k of a[m, k] b[n, k], in f32, rounded to `dtype`; or f32 out[m, n] += the same.
///
/// The bits of an element depend on its row of a, its row of b and k, never on m or n.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gemm {
    pub dtype: Dtype,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Operand,
    pub b: Operand,
    /// Rows of n elements, one after the other.
    pub out: u64,
    /// `out` is f32 and is added to.
    pub accumulate: bool,
    /// n elements of `dtype`, added to every row before it is rounded.
    pub bias: Option<u64>,
}

pub trait Driver: Send + Sync + Debug {
    /// The device in words, for headlines and errors.
    fn name(&self) -> String;
    /// Who does matrix products, in words.
    fn products(&self) -> String;
    /// Fails with what was asked for, what is taken and what would help.
    fn allocate(&self, bytes: usize) -> Result<u64>;
    /// When the work queued so far on `Compute` is done with it. Work on `Copies` that uses it has been waited for there.
    fn free(&self, address: u64, bytes: usize) -> Result<()>;
    fn launch(&self, stream: Stream, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()>;
    fn gemm(&self, gemm: &Gemm) -> Result<()>;
    fn zero(&self, stream: Stream, address: u64, bytes: usize) -> Result<()>;
    fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()>;
    /// Returns when `bytes` may be changed again.
    fn upload(&self, stream: Stream, to: u64, bytes: &[u8]) -> Result<()>;
    /// Returns when the bytes have arrived.
    fn download(&self, stream: Stream, from: u64, bytes: &mut [u8]) -> Result<()>;
    fn record(&self, stream: Stream) -> Result<Event>;
    fn wait(&self, stream: Stream, event: Event) -> Result<()>;
    /// Returns when all work queued so far is done; fails if any of it has failed.
    fn synchronize(&self) -> Result<()>;
}

impl Grid {
    pub fn blocks(count: usize, threads: u32) -> Grid {
        let count = u32::try_from(count).ok().filter(|&count| count <= i32::MAX as u32);
        let count = count.unwrap_or_else(|| panic!("a grid has at most {} blocks", i32::MAX));
        Grid { blocks: [count, 1, 1], threads, shared_bytes: 0 }
    }

    /// Enough blocks that each of `elements` gets its turn, `per_block` a block and round; kernels that go round have no need of more
    /// than a GPU runs at a time.
    pub fn over(elements: usize, per_block: usize, threads: u32) -> Grid {
        const MOST: usize = 4096;
        Grid::blocks(elements.div_ceil(per_block).min(MOST), threads)
    }

    pub fn with_shared(self, bytes: u32) -> Grid {
        Grid { shared_bytes: bytes, ..self }
    }
}

impl Argument {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.size]
    }
}

impl From<u64> for Argument {
    fn from(x: u64) -> Argument {
        Argument { bytes: x.to_le_bytes(), size: 8 }
    }
}

impl From<usize> for Argument {
    fn from(x: usize) -> Argument {
        Argument::from(x as u64)
    }
}

impl From<u32> for Argument {
    fn from(x: u32) -> Argument {
        Argument { bytes: (x as u64).to_le_bytes(), size: 4 }
    }
}

impl From<i32> for Argument {
    fn from(x: i32) -> Argument {
        Argument::from(x as u32)
    }
}

impl From<f32> for Argument {
    fn from(x: f32) -> Argument {
        Argument::from(x.to_bits())
    }
}
