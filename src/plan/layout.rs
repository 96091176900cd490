//! How the parameters of a unit lie in a flat buffer, and which boxes of which public tensors a range of it holds.
//!
//! A unit's matrices come first and its vectors after them, so that what decays is usually one range; within each group the order
//! is the catalog's, without gaps, so that neighbours can be seen as one taller matrix. The end is padded to a multiple of `align`.
//! A head that virtual shards share lies there once for each of them, one copy after the other.
//!
//! Invariant: the pieces that all ranks answer for tile every public tensor exactly once.

use crate::plan::catalog::{Cut, Entry, Unit};
use std::ops::Range;

/// A box of a public tensor, and the run of a flat buffer that holds its numbers.
///
/// The box has `size.len()` dims (one or two). The run is row-major over the box, or, where `transposed`, column-major: element
/// `(i, j)` of the box lies at `flat.start + j * size[0] + i`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The name of the public tensor, as Hugging Face spells it.
    pub name: String,
    /// Dims of the whole public tensor.
    pub shape: Vec<usize>,
    /// Corner of the box.
    pub start: Vec<usize>,
    /// Dims of the box.
    pub size: Vec<usize>,
    pub transposed: bool,
    /// Elements of the flat buffer, as many as the box has.
    pub flat: Range<usize>,
}

/// Where the elements of a run lie in a public tensor, row-major: `first` is the place of the first; neighbours are `near` apart, of each
/// `length` that follow each other; the first of the next `length` is `far` from that of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    pub first: u64,
    pub length: u64,
    pub near: u64,
    pub far: u64,
}

impl Piece {
    pub fn places(&self) -> Places {
        let columns = *self.shape.last().expect("a tensor has dims") as u64;
        let (row, column) = match self.start[..] {
            [column] => (0, column as u64),
            [row, column] => (row as u64, column as u64),
            _ => unreachable!("boxes have one or two dims"),
        };
        let first = row * columns + column;
        let width = *self.size.last().expect("a box has dims") as u64;
        if self.transposed {
            Places { first, length: self.size[0] as u64, near: columns, far: 1 }
        } else if width == columns {
            // Whole rows follow each other without a gap.
            Places { first, length: self.flat.len() as u64, near: 1, far: 0 }
        } else {
            Places { first, length: width, near: 1, far: columns }
        }
    }
}

/// The part of the canonical shards that one tensor-parallel rank owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Virtual shards of the run's geometry.
    pub shards: usize,
    /// The tensor-parallel rank and its group's size, which divides `shards`.
    pub rank: usize,
    pub size: usize,
}

impl Share {
    pub const WHOLE: Share = Share { shards: 1, rank: 0, size: 1 };

    /// Virtual shards that this rank owns.
    pub fn local(&self) -> usize {
        self.shards / self.size
    }

    /// Which of `length` rows, columns or ids this rank owns. Every virtual shard has `length / shards` of them, rounded up, so
    /// that the last ones may have fewer.
    pub fn range(&self, length: usize) -> Range<usize> {
        let width = self.width(length);
        let at = |shard: usize| (shard * width).min(length);
        at(self.rank * self.local())..at((self.rank + 1) * self.local())
    }

    /// How many of `length` one virtual shard has.
    pub fn width(&self, length: usize) -> usize {
        length.div_ceil(self.shards)
    }

    /// How many of `heads` heads this rank computes with. Shards that are more than heads have a copy each.
    pub fn heads(&self, heads: usize) -> usize {
        if heads < self.shards { self.local() } else { self.range(heads).len() }
    }

    /// Of `heads` heads, fewer than shards, the one that each local virtual shard has a copy of, and whether it is the first to.
    fn copies(&self, heads: usize) -> impl Iterator<Item = (usize, bool)> {
        assert!(self.shards.is_multiple_of(heads), "{heads} heads are shared unevenly by {} shards", self.shards);
        let sharers = self.shards / heads;
        (self.rank * self.local()..(self.rank + 1) * self.local()).map(move |shard| (shard / sharers, shard.is_multiple_of(sharers)))
    }
}

/// One parameter's place, or that of one copy of one of its heads.
#[derive(Clone, Debug)]
pub struct Place {
    pub entry: Entry,
    /// Where virtual shards share heads: which head this is a copy of.
    pub head: Option<usize>,
    /// Of all places that hold these numbers, on all tensor-parallel ranks, this one counts.
    owned: bool,
    /// Where the local part begins in the whole parameter (ours: rows, columns).
    pub start: [usize; 2],
    /// Dims of the local part: `[rows, columns]`, or `[length]` of a vector.
    pub dims: Vec<usize>,
    /// Elements of the flat buffer.
    pub flat: Range<usize>,
}

/// The flat buffer of one unit on one tensor-parallel rank.
#[derive(Clone, Debug)]
pub struct UnitLayout {
    pub places: Vec<Place>,
    /// Elements that hold parameters; the rest is padding.
    pub used: usize,
    /// Elements in all, a multiple of `align`.
    pub numel: usize,
    share: Share,
}

/// A parameter whose heads are shared by virtual shards.
pub struct Shared<'a> {
    /// Of the whole model.
    pub heads: usize,
    /// The copies of this rank, one for each of its virtual shards, in order.
    pub copies: &'a [Place],
}

impl Shared<'_> {
    /// Elements of one head.
    pub fn head_length(&self) -> usize {
        self.copies[0].flat.len()
    }
}

impl UnitLayout {
    pub fn new(unit: &Unit, share: Share, align: usize) -> UnitLayout {
        let (matrices, vectors): (Vec<&Entry>, Vec<&Entry>) = unit.entries.iter().partition(|entry| entry.dims.len() == 2);
        let mut places: Vec<Place> = Vec::new();
        for entry in matrices.into_iter().chain(vectors) {
            let next = |places: &[Place]| places.last().map_or(0, |place| place.flat.end);
            match entry.cut {
                Cut::Heads(heads) if heads < share.shards => {
                    for (head, first) in share.copies(heads) {
                        places.push(Place::copy(entry, [head, heads], first, next(&places)));
                    }
                }
                _ => places.push(Place::new(entry, share, next(&places))),
            }
        }
        let used = places.last().map_or(0, |place| place.flat.end);
        UnitLayout { places, used, numel: used.next_multiple_of(align), share }
    }

    /// The parameters of which this rank holds copies.
    pub fn shared(&self) -> impl Iterator<Item = Shared<'_>> {
        let roles = self.places.chunk_by(|a, b| a.entry.role == b.entry.role);
        roles.filter_map(|copies| match (copies[0].head, copies[0].entry.cut) {
            (Some(_), Cut::Heads(heads)) => Some(Shared { heads, copies }),
            _ => None,
        })
    }

    /// Elements of all heads, of the whole model, of the parameters of which this rank holds copies.
    pub fn shared_length(&self) -> usize {
        self.shared().map(|shared| shared.heads * shared.head_length()).sum()
    }

    /// Whether some head is shared by virtual shards of different tensor-parallel ranks.
    pub fn shares_across_ranks(&self) -> bool {
        self.shared().any(|shared| !self.share.local().is_multiple_of(self.share.shards / shared.heads))
    }

    /// The indices of all places of the parameter with this role: one, or one for each copy.
    pub fn find_all(&self, role: &str) -> Vec<usize> {
        let first = self.find(role);
        (first..self.places.len()).take_while(|&at| self.places[at].entry.role == role).collect()
    }

    /// The index of the parameter with this role, or of its first copy.
    pub fn find(&self, role: &str) -> usize {
        self.places.iter().position(|place| place.entry.role == role).unwrap_or_else(|| panic!("the catalog has no {role} in this unit"))
    }

    /// The vectors that every tensor-parallel rank holds whole, whose gradients are sums over rows of the stream, each with the number
    /// of elements before it.
    pub fn stream_places(&self) -> impl Iterator<Item = (&Place, usize)> {
        let vectors = self.places.iter().filter(|place| place.is_of_stream());
        vectors.scan(0, |next, place| {
            let offset = *next;
            *next += place.flat.len();
            Some((place, offset))
        })
    }

    pub fn stream_length(&self) -> usize {
        self.stream_places().map(|(place, _)| place.flat.len()).sum()
    }

    /// The boxes that the elements `range` hold, in order.
    pub fn pieces(&self, range: Range<usize>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for place in &self.places {
            let (from, to) = (range.start.max(place.flat.start), range.end.min(place.flat.end));
            if from < to {
                place.push_boxes(from..to, &mut pieces);
            }
        }
        pieces
    }

    /// The boxes of `range` that this rank answers for: of a parameter that tensor-parallel ranks hold in common, only the first's count.
    pub fn pieces_owned(&self, range: Range<usize>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for counted in self.counted(range) {
            pieces.extend(self.pieces(counted));
        }
        pieces
    }

    /// The parts of `range` that hold parameters this rank answers for, merged where they touch: each parameter of the model is
    /// counted on exactly one tensor-parallel rank.
    pub fn counted(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut parts: Vec<Range<usize>> = Vec::new();
        for place in self.places.iter().filter(|place| place.owned) {
            let part = range.start.max(place.flat.start)..range.end.min(place.flat.end);
            if part.is_empty() {
                continue;
            }
            match parts.last_mut() {
                Some(last) if last.end == part.start => last.end = part.end,
                _ => parts.push(part),
            }
        }
        parts
    }

    /// `range` cut where what decays meets what does not, with "decays". Padding does not.
    pub fn decay_ranges(&self, range: Range<usize>) -> Vec<(Range<usize>, bool)> {
        let mut parts: Vec<(Range<usize>, bool)> = Vec::new();
        let padding = (self.used..self.numel, false);
        for (flat, decays) in self.places.iter().map(|place| (place.flat.clone(), place.entry.decay)).chain([padding]) {
            let part = range.start.max(flat.start)..range.end.min(flat.end);
            match parts.last_mut() {
                _ if part.is_empty() => {}
                Some((last, same)) if *same == decays => last.end = part.end,
                _ => parts.push((part, decays)),
            }
        }
        parts
    }
}

impl Place {
    fn new(entry: &Entry, share: Share, at: usize) -> Place {
        let mut dims = entry.dims.clone();
        let mut start = [0, 0];
        if let Some(dim) = match entry.cut {
            Cut::Whole => None,
            Cut::Rows | Cut::Heads(_) => Some(0),
            Cut::Columns => Some(1),
        } {
            let range = share.range(dims[dim]);
            start[dim] = range.start;
            dims[dim] = range.len();
        }
        let numel: usize = dims.iter().product();
        let owned = entry.cut != Cut::Whole || share.rank == 0;
        Place { entry: entry.clone(), head: None, owned, start, dims, flat: at..at + numel }
    }

    /// A copy of head `head` of `heads`.
    fn copy(entry: &Entry, [head, heads]: [usize; 2], owned: bool, at: usize) -> Place {
        let mut dims = entry.dims.clone();
        assert_eq!(dims[0] % heads, 0, "{} has {} rows in {heads} heads", entry.name, dims[0]);
        dims[0] /= heads;
        let (start, numel) = ([head * dims[0], 0], dims.iter().product::<usize>());
        Place { entry: entry.clone(), head: Some(head), owned, start, dims, flat: at..at + numel }
    }

    fn is_of_stream(&self) -> bool {
        self.dims.len() == 1 && self.entry.cut == Cut::Whole
    }

    /// A run of a row-major matrix is at most three boxes: the end of a row, whole rows, the beginning of a row.
    fn push_boxes(&self, run: Range<usize>, pieces: &mut Vec<Piece>) {
        let columns = *self.dims.last().expect("a parameter has dims");
        let mut at = run.start;
        while at < run.end {
            let (row, column) = ((at - self.flat.start) / columns, (at - self.flat.start) % columns);
            let left = run.end - at;
            let (rows, width) = if column == 0 && left >= columns { (left / columns, columns) } else { (1, left.min(columns - column)) };
            pieces.push(self.piece(row, column, rows, width, at));
            at += rows * width;
        }
    }

    fn piece(&self, row: usize, column: usize, rows: usize, width: usize, at: usize) -> Piece {
        let entry = &self.entry;
        let flat = at..at + rows * width;
        let (start, size) = if self.dims.len() == 1 {
            (vec![self.start[0] + column], vec![width])
        } else if entry.transposed {
            (vec![self.start[1] + column, self.start[0] + row], vec![width, rows])
        } else {
            (vec![self.start[0] + row, self.start[1] + column], vec![rows, width])
        };
        let start = start.iter().zip(&entry.public_start).map(|(a, b)| a + b).collect();
        Piece { name: entry.name.clone(), shape: entry.public_shape.clone(), start, size, transposed: entry.transposed, flat }
    }
}
