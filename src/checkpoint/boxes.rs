//! Boxes of tensors: which part of a stored box a piece wants, and moving numbers between the two orders and dtypes.
//!
//! Invariant: a number lands where its global position says, whatever boxes it was stored in.

use crate::checkpoint::folder::CHUNK;
use crate::checkpoint::safetensors::Reader;
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::plan::layout::Piece;
use anyhow::{Context, Result, bail, ensure};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

/// Row segments at least this long are read one by one; shorter ones by reading whole rows and leaving most of them.
const SEGMENT: usize = 16 << 10;

/// A box of a tensor of one or two dims. A vector is one row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Area {
    pub rows: Range<usize>,
    pub columns: Range<usize>,
}

impl Area {
    /// The box, checked against the dims of its tensor.
    pub fn of(shape: &[usize], start: &[usize], size: &[usize]) -> Result<Area> {
        let dims = shape.len();
        ensure!((1..=2).contains(&dims), "a tensor has one or two dims here, not the shape {shape:?}");
        ensure!(start.len() == dims && size.len() == dims, "the box at {start:?} of {size:?} has not the dims of the shape {shape:?}");
        for dim in 0..dims {
            let end = start[dim].checked_add(size[dim]);
            let inside = size[dim] > 0 && end.is_some_and(|end| end <= shape[dim]);
            ensure!(inside, "the box at {start:?} of {size:?} is empty or leaves the shape {shape:?}");
        }
        let last = dims - 1;
        let rows = if dims == 2 { start[0]..start[0] + size[0] } else { 0..1 };
        Ok(Area { rows, columns: start[last]..start[last] + size[last] })
    }

    pub fn whole(shape: &[usize]) -> Result<Area> {
        Area::of(shape, &vec![0; shape.len()], shape)
    }

    pub fn height(&self) -> usize {
        self.rows.len()
    }

    pub fn width(&self) -> usize {
        self.columns.len()
    }

    pub fn volume(&self) -> u128 {
        self.height() as u128 * self.width() as u128
    }

    pub fn intersection(&self, other: &Area) -> Option<Area> {
        let rows = self.rows.start.max(other.rows.start)..self.rows.end.min(other.rows.end);
        let columns = self.columns.start.max(other.columns.start)..self.columns.end.min(other.columns.end);
        (rows.start < rows.end && columns.start < columns.end).then_some(Area { rows, columns })
    }
}

/// Fails unless the areas lie inside the tensor and cover it exactly once.
pub fn check_tiling(shape: &[usize], areas: &[Area]) -> Result<()> {
    let whole = Area::whole(shape)?;
    let mut sorted: Vec<&Area> = areas.iter().collect();
    sorted.sort_by_key(|area| (area.rows.start, area.columns.start));
    // A line sweeps down the rows; `open` holds the boxes it cuts, by their first column, and `ends` says where they stop.
    let mut open: BTreeMap<usize, &Area> = BTreeMap::new();
    let mut ends: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut covered = 0u128;
    for area in sorted {
        while let Some(end) = ends.first_entry().filter(|end| *end.key() <= area.rows.start) {
            for column in end.remove() {
                open.remove(&column);
            }
        }
        let left = open.range(..=area.columns.start).next_back().filter(|(_, other)| other.columns.end > area.columns.start);
        let right = open.range(area.columns.start..).next().filter(|(column, _)| **column < area.columns.end);
        if let Some((_, other)) = left.or(right) {
            bail!(
                "two boxes overlap: rows {:?} columns {:?}, and rows {:?} columns {:?}",
                other.rows,
                other.columns,
                area.rows,
                area.columns
            );
        }
        open.insert(area.columns.start, area);
        ends.entry(area.rows.end).or_default().push(area.columns.start);
        covered += area.volume();
    }
    ensure!(covered == whole.volume(), "the boxes cover {covered} of the {} elements of the shape {shape:?}", whole.volume());
    Ok(())
}

/// The area of a piece, checked against its tensor and its buffer of `elements`.
pub fn area_of(piece: &Piece, elements: usize) -> Result<Area> {
    let area = Area::of(&piece.shape, &piece.start, &piece.size).with_context(|| format!("the piece of {:?}", piece.name))?;
    let fits = piece.flat.start <= piece.flat.end && piece.flat.end <= elements;
    ensure!(fits, "the piece of {:?} is the range {:?} of a buffer of {elements} elements", piece.name, piece.flat);
    let long = area.volume() == piece.flat.len() as u128;
    ensure!(long, "the piece of {:?} has {} elements and the range {:?} for them", piece.name, area.volume(), piece.flat);
    Ok(area)
}

/// Pieces that cover a tensor in row-major order, each with its own buffer that begins at 0 and, unless a row is longer, is at most
/// `elements` long.
pub fn slabs(name: &str, shape: &[usize], elements: usize) -> Result<Vec<Piece>> {
    let whole = Area::whole(shape).with_context(|| format!("the tensor {name:?}"))?;
    let row = if shape.len() == 2 { whole.width() } else { 1 };
    let at_once = (elements / row).max(1);
    let slab = |first: usize| {
        let (mut start, mut size) = (vec![0; shape.len()], shape.to_vec());
        (start[0], size[0]) = (first, at_once.min(shape[0] - first));
        let flat = 0..size.iter().product();
        Piece { name: name.to_owned(), shape: shape.to_vec(), start, size, transposed: false, flat }
    };
    Ok((0..shape[0]).step_by(at_once).map(slab).collect())
}

/// Hands the numbers of a piece to `write` as they lie in the public tensor: row after row of the box.
pub fn stream(piece: &Piece, dtype: Dtype, bytes: &[u8], mut write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let element = dtype.bytes();
    let area = area_of(piece, bytes.len() / element)?;
    let flat = &bytes[piece.flat.start * element..piece.flat.end * element];
    let (height, width) = (area.height(), area.width());
    if !piece.transposed || height == 1 || width == 1 {
        return write(flat);
    }
    let rows_at_once = (CHUNK / (width * element)).clamp(1, height);
    let mut block = vec![0; rows_at_once * width * element];
    for first in (0..height).step_by(rows_at_once) {
        let rows = rows_at_once.min(height - first);
        let source = Matrix { start: first, rows: width, columns: rows, stride: height };
        let out = &mut block[..rows * width * element];
        transpose(element, flat, source, out, Matrix { start: 0, rows, columns: width, stride: width });
        write(out)?;
    }
    Ok(())
}

/// Where a stored box lies in its file.
pub struct Stored<'a> {
    pub reader: &'a Reader,
    pub begin: u64,
    pub dtype: Dtype,
    pub area: Area,
}

/// Copies what the stored box and the piece share into `out`, the buffer that `piece.flat` counts in. Says how many elements.
pub fn read(stored: &Stored<'_>, piece: &Piece, dtype: Dtype, out: &mut [u8]) -> Result<u128> {
    let wanted = area_of(piece, out.len() / dtype.bytes())?;
    let Some(common) = stored.area.intersection(&wanted) else {
        return Ok(0);
    };
    let element = stored.dtype.bytes();
    let stride = stored.area.width();
    let run = if common.width() == stride && common.width() == wanted.width() { common.height() } else { 1 } * common.width();
    let all = run as u128 == common.volume();
    if stored.dtype == dtype && !piece.transposed && (all || run * element >= SEGMENT) {
        read_directly(stored, &common, piece, &wanted, out)?;
        return Ok(common.volume());
    }
    // Whole rows when the wanted part of them is most of them, or too short to be worth a read of its own.
    let whole_rows = common.width() == stride || common.width() * element < SEGMENT;
    let span = if whole_rows { stored.area.columns.clone() } else { common.columns.clone() };
    let columns_at_once = (CHUNK / element).min(span.len());
    let rows_at_once = if whole_rows { (CHUNK / (span.len() * element)).clamp(1, common.height()) } else { 1 };
    let mut block = vec![0; rows_at_once * columns_at_once * element];
    for first_row in common.rows.clone().step_by(rows_at_once) {
        let rows = first_row..(first_row + rows_at_once).min(common.rows.end);
        for first_column in span.clone().step_by(columns_at_once) {
            let columns = first_column..(first_column + columns_at_once).min(span.end);
            let read = Area { rows: rows.clone(), columns };
            let Some(part) = read.intersection(&common) else { continue };
            let block = &mut block[..read.height() * read.width() * element];
            let offset = (rows.start - stored.area.rows.start) * stride + (read.columns.start - stored.area.columns.start);
            stored.reader.read_at(stored.begin + (offset * element) as u64, block)?;
            place(block, stored.dtype, &read, &part, piece, &wanted, dtype, out)?;
        }
    }
    Ok(common.volume())
}

/// Reads what needs neither turning nor converting to where it belongs: all of it at once where both sides hold whole rows.
fn read_directly(stored: &Stored<'_>, common: &Area, piece: &Piece, wanted: &Area, out: &mut [u8]) -> Result<()> {
    let element = stored.dtype.bytes();
    let whole_rows = common.width() == stored.area.width() && common.width() == wanted.width();
    let rows_at_once = if whole_rows { common.height() } else { 1 };
    for row in common.rows.clone().step_by(rows_at_once) {
        let from = (row - stored.area.rows.start) * stored.area.width() + (common.columns.start - stored.area.columns.start);
        let to = piece.flat.start + (row - wanted.rows.start) * wanted.width() + (common.columns.start - wanted.columns.start);
        let count = rows_at_once * common.width();
        stored.reader.read_at(stored.begin + (from * element) as u64, &mut out[to * element..(to + count) * element])?;
    }
    Ok(())
}

/// Copies `part` of the row-major `block`, which is the area `read`, to its places in the buffer of the piece.
#[expect(clippy::too_many_arguments, reason = "two areas inside two buffers: a struct would only rename them")]
fn place(block: &[u8], from: Dtype, read: &Area, part: &Area, piece: &Piece, wanted: &Area, to: Dtype, out: &mut [u8]) -> Result<()> {
    let block = converted(block, from, to)?;
    let element = to.bytes();
    let out = &mut out[piece.flat.start * element..piece.flat.end * element];
    let start = (part.rows.start - read.rows.start) * read.width() + (part.columns.start - read.columns.start);
    let source = Matrix { start, rows: part.height(), columns: part.width(), stride: read.width() };
    let (row, column) = (part.rows.start - wanted.rows.start, part.columns.start - wanted.columns.start);
    if piece.transposed {
        let stride = wanted.height();
        transpose(
            element,
            &block,
            source,
            out,
            Matrix { start: column * stride + row, rows: source.columns, columns: source.rows, stride },
        );
        return Ok(());
    }
    for row_of_part in 0..source.rows {
        let at = (source.start + row_of_part * source.stride) * element;
        let to = ((row + row_of_part) * wanted.width() + column) * element;
        let bytes = source.columns * element;
        out[to..to + bytes].copy_from_slice(&block[at..at + bytes]);
    }
    Ok(())
}

/// A matrix inside a buffer, counted in elements.
#[derive(Clone, Copy)]
struct Matrix {
    start: usize,
    rows: usize,
    columns: usize,
    stride: usize,
}

fn transpose(element: usize, source: &[u8], from: Matrix, out: &mut [u8], to: Matrix) {
    match element {
        2 => transpose_elements::<2>(bytemuck::cast_slice(source), from, bytemuck::cast_slice_mut(out), to),
        4 => transpose_elements::<4>(bytemuck::cast_slice(source), from, bytemuck::cast_slice_mut(out), to),
        other => panic!("elements have two or four bytes, not {other}"),
    }
}

/// `out[j, i] = source[i, j]`, in tiles that stay in the nearest cache.
fn transpose_elements<const E: usize>(source: &[[u8; E]], from: Matrix, out: &mut [[u8; E]], to: Matrix) {
    assert_eq!((from.rows, from.columns), (to.columns, to.rows), "dims of a matrix and of its transpose");
    const TILE: usize = 32;
    for first_row in (0..from.rows).step_by(TILE) {
        for first_column in (0..from.columns).step_by(TILE) {
            for row in first_row..(first_row + TILE).min(from.rows) {
                for column in first_column..(first_column + TILE).min(from.columns) {
                    out[to.start + column * to.stride + row] = source[from.start + row * from.stride + column];
                }
            }
        }
    }
}

/// The same numbers in another dtype, rounded to nearest even.
pub fn converted(bytes: &[u8], from: Dtype, to: Dtype) -> Result<Cow<'_, [u8]>> {
    if from == to {
        return Ok(Cow::Borrowed(bytes));
    }
    ensure!(from != Dtype::U32 && to != Dtype::U32, "{from} numbers were stored, and {to} is asked for: they do not mix");
    let mut out = vec![0; bytes.len() / from.bytes() * to.bytes()];
    dispatch!(from, A => dispatch!(to, B => convert::<A, B>(bytes, &mut out)));
    Ok(Cow::Owned(out))
}

fn convert<A: Element, B: Element>(bytes: &[u8], out: &mut [u8]) {
    for (x, y) in bytes.chunks_exact(size_of::<A>()).zip(out.chunks_exact_mut(size_of::<B>())) {
        let value: A = bytemuck::pod_read_unaligned(x);
        y.copy_from_slice(bytemuck::bytes_of(&B::from_f32(value.to_f32())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(rows: Range<usize>, columns: Range<usize>) -> Area {
        Area { rows, columns }
    }

    #[test]
    fn tilings_are_told_from_overlaps_and_holes() {
        let good = [area(0..2, 0..4), area(2..5, 0..1), area(2..3, 1..4), area(3..5, 1..4)];
        check_tiling(&[5, 4], &good).expect("these cover it once");
        check_tiling(&[5, 4], &good[..3]).expect_err("a hole");
        let overlap = [area(0..2, 0..4), area(2..5, 0..2), area(2..3, 1..4), area(3..5, 2..4)];
        assert!(check_tiling(&[5, 4], &overlap).expect_err("an overlap").to_string().contains("overlap"));
        let twice = [area(0..5, 0..2), area(0..5, 0..2)];
        check_tiling(&[5, 4], &twice).expect_err("one box twice");
    }

    #[test]
    fn boxes_stay_inside_their_tensor() {
        assert!(Area::of(&[4, 4], &[0, 2], &[4, 3]).is_err());
        assert!(Area::of(&[4, 4], &[usize::MAX, 2], &[4, 3]).is_err());
        assert!(Area::of(&[4, 4], &[0, 0], &[4, 0]).is_err());
        assert!(Area::of(&[4], &[0, 0], &[4, 1]).is_err());
        assert!(Area::of(&[2, 2, 2], &[0, 0, 0], &[1, 1, 1]).is_err());
        assert_eq!(Area::of(&[4], &[1], &[3]).expect("inside"), area(0..1, 1..4));
    }
}
