//! The innermost loop of matrix products: a tile of a few rows and vectors of columns, its sums in registers.
//!
//! A *unit* is 32 bits of an operand: one f32, or two bf16 that are neighbours along K. A tile of R rows and V vectors reads one unit of
//! A for each row and V vectors of units of B at each step.
//!
//! Invariant: every element of a tile is one chain `sum = a * b + sum` over the units in order, fused, in f32, whatever the tile's
//! size and the instructions used. For a unit of two bf16 that is two links, first the odd element and then the even one, where
//! denormal inputs count as zero and a result that is too small for a normal number becomes zero: the definition of `vdpbf16ps`,
//! which `Flushing` computes where the instruction is missing.
#![allow(unsafe_code)]

use crate::device::cpu::Isa;
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::lanes::Dots;
use crate::device::cpu::lanes::{Flushing, Lanes, Plain};
use crate::dtype::Dtype;
use half::bf16;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, __m512};
use std::ops::Range;

/// What the units of packed operands hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// One element as f32.
    Single,
    /// One bf16 element as f32, denormals as zero, the elements of each pair along K in swapped order.
    Swapped,
    /// Two bf16 elements.
    Pair,
}

impl Unit {
    /// How many units `elements` elements along K fill; what is missing to a whole pair is zero.
    pub fn count(self, elements: usize) -> usize {
        match self {
            Unit::Single => elements,
            Unit::Swapped => elements.next_multiple_of(2),
            Unit::Pair => elements.div_ceil(2),
        }
    }

    /// Elements of one unit.
    pub fn elements(self) -> usize {
        if self == Unit::Pair { 2 } else { 1 }
    }

    /// Whether neighbours along K in memory are units as they stand.
    pub fn lies_in_memory(self, dtype: Dtype) -> bool {
        match self {
            Unit::Single => dtype == Dtype::F32,
            Unit::Swapped => false,
            Unit::Pair => dtype == Dtype::Bf16,
        }
    }
}

/// One tile: where its operands lie and where its sums go.
#[derive(Clone, Copy)]
pub struct Tile {
    pub units: usize,
    /// The unit of row r at step u lies `r * a_row + u * a_unit` bytes further.
    pub a: *const u8,
    pub a_row: usize,
    pub a_unit: usize,
    /// `[units][columns]` units.
    pub b: *const u32,
    /// Row r begins `r * c_row` elements further.
    pub c: *mut f32,
    pub c_row: usize,
    pub sums: Sums,
    /// Where given, sums end there instead of in `c`.
    pub rounded: Option<Rounded>,
    /// The sum of the lowest exponents in A and B, see `pack`.
    pub lowest: u32,
}

/// Where sums go that are done: a bias is added, and they are rounded to bf16.
#[derive(Clone, Copy)]
pub struct Rounded {
    /// Row r begins `r * row` elements further.
    pub out: *mut bf16,
    pub row: usize,
    /// One for each column.
    pub bias: Option<*const bf16>,
}

/// How the sums of a tile meet what stands in `c`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sums {
    /// c = chain from zero.
    Store,
    /// c = chain that goes on from c.
    Resume,
    /// c = c + chain from zero.
    Add,
    /// c = 0 + chain from zero: what `Add` makes of a zero, without reading it.
    Begin,
}

/// One implementation of tiles.
#[derive(Clone, Copy)]
pub struct Micro {
    pub unit: Unit,
    /// The most rows of a tile.
    pub rows: usize,
    /// Columns of one vector.
    pub lanes: usize,
    /// The most vectors of columns of a tile.
    pub vectors: usize,
    run: Run,
    /// For products that may underflow, where `run` does not flush them.
    careful: Option<Run>,
}

/// A tile of so many rows and vectors.
type Run = unsafe fn(usize, usize, &Tile);

/// From this sum of biased exponents on, products of bf16 cannot underflow, nor can their sums: the product of numbers from 2^a and 2^b on
/// is a multiple of 2^(a + b - 14), sums and roundings keep that, and where it is 2^-126 or more there are no denormal multiples.
const SAFE: u32 = 127 + 127 - 126 + 14;
/// A sum that is resumed is a multiple of 2^-126 when it is at least this or zero.
const SAFE_SUM: f32 = 1.0 / (1u128 << 103) as f32;

/// The most columns of a tile of any implementation.
pub const COLUMNS: usize = 48;
/// The most rows of a tile of any implementation.
pub const ROWS: usize = 8;

impl Micro {
    pub fn new(isa: Isa, dtype: Dtype) -> Micro {
        // Sixteen registers hold 6 x 2 sums, two vectors of B and a unit of A; 32 hold 8 x 3 sums likewise.
        let plain = |unit, careful| Micro { unit, rows: 6, lanes: 8, vectors: 2, run: tile_portable, careful };
        match (isa, dtype) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Bf16, Dtype::Bf16) => Micro { rows: 8, lanes: 16, vectors: 3, run: tile_avx512_bf16, ..plain(Unit::Pair, None) },
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2 | Isa::Avx512, Dtype::Bf16) => Micro { run: tile_avx2, ..plain(Unit::Swapped, Some(tile_flushing_avx2)) },
            (_, Dtype::Bf16) => plain(Unit::Swapped, Some(tile_flushing)),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx512Bf16, _) => Micro { rows: 8, lanes: 16, vectors: 3, run: tile_avx512, ..plain(Unit::Single, None) },
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, _) => Micro { run: tile_avx2, ..plain(Unit::Single, None) },
            _ => plain(Unit::Single, None),
        }
    }

    /// The vectors of each panel, when `vectors` vectors are cut into panels that tiles can take, as even as they can be.
    pub fn panels(&self, vectors: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let count = vectors.div_ceil(self.vectors);
        (0..count).map(move |panel| panel * vectors / count..(panel + 1) * vectors / count)
    }

    /// Computes a tile of `rows` rows and `vectors` vectors.
    ///
    /// # Safety
    /// `tile` must point at that many rows and columns of operands and sums, and the processor must have the instructions of the `Isa`
    /// that this implementation was made for.
    pub unsafe fn run(&self, rows: usize, vectors: usize, tile: &Tile) {
        assert!(rows <= self.rows && (1..=self.vectors).contains(&vectors), "a tile of {rows} rows and {vectors} vectors");
        // SAFETY: what the caller vouches for.
        let run = match self.careful {
            Some(careful) if tile.lowest < SAFE || unsafe { resumes_low(tile, rows, vectors * self.lanes) } => careful,
            _ => self.run,
        };
        if rows == self.rows {
            // Most tiles are whole. A tile that was just written is not copied: its fields would be read back wider than they were stored.
            // SAFETY: what the caller vouches for.
            return unsafe { run(rows, vectors, tile) };
        }
        let (mut tile, mut left) = (*tile, rows);
        while left > 0 {
            // Powers of two, so that three or four compiled sizes serve every remainder of rows.
            let now = 1 << left.ilog2();
            // SAFETY: `now` rows from here on are among the rows that the caller vouches for.
            unsafe {
                run(now, vectors, &tile);
                tile.a = tile.a.wrapping_add(now * tile.a_row);
                tile.c = tile.c.wrapping_add(now * tile.c_row);
                if let Some(rounded) = &mut tile.rounded {
                    rounded.out = rounded.out.wrapping_add(now * rounded.row);
                }
            }
            left -= now;
        }
    }
}

/// Whether a tile resumes sums with bits below 2^-126.
///
/// # Safety
/// As for `Micro::run`.
unsafe fn resumes_low(tile: &Tile, rows: usize, columns: usize) -> bool {
    let low = |sum: f32| sum != 0.0 && sum.abs() < SAFE_SUM;
    // SAFETY: what the caller vouches for.
    let row = |row: usize| unsafe { std::slice::from_raw_parts(tile.c.add(row * tile.c_row), columns) };
    tile.sums == Sums::Resume && (0..rows).any(|index| row(index).iter().any(|&sum| low(sum)))
}

/// A cache line.
const PREFETCH_BYTES: usize = 64;

/// Asks for the cache line at an address that will be used soon.
#[inline(always)]
pub fn prefetch<T>(at: *const T) {
    // SAFETY: a prefetch of any address is allowed.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// # Safety
/// As for `Micro::run`, with `R` rows and `V` vectors of `L::WIDTH` columns.
#[inline(always)]
unsafe fn tile<L: Lanes, const R: usize, const V: usize>(tile: &Tile) {
    // SAFETY: all addresses are those of the tile's rows, columns and units.
    unsafe {
        let mut sums = [[L::zero(); V]; R];
        if tile.sums == Sums::Resume {
            for (row, sums) in sums.iter_mut().enumerate() {
                for (vector, sum) in sums.iter_mut().enumerate() {
                    *sum = L::load(tile.c.add(row * tile.c_row + vector * L::WIDTH)).begin();
                }
            }
        }
        // The sums are needed at the end, and may come from far: a short chain ends before those of the rows below would be there.
        let ahead = if tile.sums == Sums::Add { 2 * R } else { R };
        match &tile.rounded {
            None => {
                for row in 0..ahead {
                    for line in (0..V * L::WIDTH).step_by(PREFETCH_BYTES / size_of::<f32>()) {
                        prefetch(tile.c.wrapping_add(row * tile.c_row + line));
                    }
                }
            }
            Some(rounded) => {
                for row in 0..R {
                    for line in (0..V * L::WIDTH).step_by(PREFETCH_BYTES / size_of::<bf16>()) {
                        prefetch(rounded.out.wrapping_add(row * rounded.row + line));
                    }
                }
            }
        }
        let (mut a, mut b) = (tile.a, tile.b);
        let mut left = tile.units;
        while left >= 4 {
            for _ in 0..4 {
                step::<L, R, V>(&mut sums, a, tile.a_row, b);
                a = a.add(tile.a_unit);
                b = b.add(V * L::WIDTH);
            }
            left -= 4;
        }
        for _ in 0..left {
            step::<L, R, V>(&mut sums, a, tile.a_row, b);
            a = a.add(tile.a_unit);
            b = b.add(V * L::WIDTH);
        }
        if let Some(rounded) = &tile.rounded {
            return round::<L, R, V>(sums, rounded);
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (vector, sum) in sums.into_iter().enumerate() {
                let c = tile.c.add(row * tile.c_row + vector * L::WIDTH);
                match tile.sums {
                    Sums::Store | Sums::Resume => sum.store(c),
                    Sums::Add => L::load(c).add(sum).store(c),
                    Sums::Begin => L::zero().add(sum).store(c),
                }
            }
        }
    }
}

/// # Safety
/// `rounded` must have `R` rows of `V` vectors of `L::WIDTH` elements, and its bias as many.
#[inline(always)]
unsafe fn round<L: Lanes, const R: usize, const V: usize>(sums: [[L; V]; R], rounded: &Rounded) {
    // SAFETY: what the caller vouches for.
    unsafe {
        let bias = rounded.bias.map(|bias| std::array::from_fn::<L, V, _>(|vector| L::widened(bias.add(vector * L::WIDTH))));
        for (row, sums) in sums.into_iter().enumerate() {
            for (vector, sum) in sums.into_iter().enumerate() {
                let sum = bias.map_or(sum, |bias| sum.add(bias[vector]));
                sum.round(rounded.out.add(row * rounded.row + vector * L::WIDTH));
            }
        }
    }
}

#[inline(always)]
unsafe fn step<L: Lanes, const R: usize, const V: usize>(sums: &mut [[L; V]; R], a: *const u8, a_row: usize, b: *const u32) {
    // SAFETY: as for `tile`; a unit of A may lie at any address, since bf16 rows may start at an odd element.
    unsafe {
        let mut columns = [L::splat(0); V];
        for (vector, units) in columns.iter_mut().enumerate() {
            *units = L::units(b.add(vector * L::WIDTH));
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            let unit = L::splat(a.add(row * a_row).cast::<u32>().read_unaligned());
            for (sum, units) in sums.iter_mut().zip(columns) {
                *sum = sum.link(unit, units);
            }
        }
    }
}

/// A function that picks the compiled size of a tile, with the instructions that its lanes need.
macro_rules! sizes {
    ($(#[$feature:meta])* $name:ident: $lanes:ty, $($rows:literal x $vectors:literal)*) => {
        /// # Safety
        /// As for `Micro::run`.
        $(#[$feature])*
        unsafe fn $name(rows: usize, vectors: usize, at: &Tile) {
            // SAFETY: what the caller vouches for.
            unsafe {
                match (rows, vectors) {
                    $(($rows, $vectors) => tile::<$lanes, $rows, $vectors>(at),)*
                    _ => unreachable!("no tile of {rows} rows and {vectors} vectors"),
                }
            }
        }
    };
}

sizes!(tile_portable: Plain, 1 x 1 2 x 1 4 x 1 6 x 1 1 x 2 2 x 2 4 x 2 6 x 2);
sizes!(tile_flushing: Flushing, 1 x 1 2 x 1 4 x 1 6 x 1 1 x 2 2 x 2 4 x 2 6 x 2);
#[cfg(target_arch = "x86_64")]
sizes!(#[target_feature(enable = "avx2,fma")] tile_flushing_avx2: Flushing, 1 x 1 2 x 1 4 x 1 6 x 1 1 x 2 2 x 2 4 x 2 6 x 2);
#[cfg(target_arch = "x86_64")]
sizes!(#[target_feature(enable = "avx2,fma")] tile_avx2: __m256, 1 x 1 2 x 1 4 x 1 6 x 1 1 x 2 2 x 2 4 x 2 6 x 2);
#[cfg(target_arch = "x86_64")]
sizes!(#[target_feature(enable = "avx512f")] tile_avx512: __m512, 1 x 1 2 x 1 4 x 1 8 x 1 1 x 2 2 x 2 4 x 2 8 x 2 1 x 3 2 x 3 4 x 3 8 x 3);
#[cfg(target_arch = "x86_64")]
sizes!(
    #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx512bf16")]
    tile_avx512_bf16: Dots, 1 x 1 2 x 1 4 x 1 8 x 1 1 x 2 2 x 2 4 x 2 8 x 2 1 x 3 2 x 3 4 x 3 8 x 3
);
