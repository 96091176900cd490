//! How the parameters of a unit lie in a flat buffer, and which boxes of which public tensors a range of it holds.
//!
//! Invariant: the pieces of all ranks tile every public tensor exactly once.

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
