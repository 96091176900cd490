//! The dims of a tensor: up to four, row-major, always contiguous.

use std::fmt;
use std::ops::Index;

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; 4],
    rank: usize,
}

impl Shape {
    pub fn new(dims: &[usize]) -> Shape {
        assert!(dims.len() <= 4, "a shape has at most four dims, not {dims:?}");
        let mut all = [1; 4];
        all[..dims.len()].copy_from_slice(dims);
        Shape { dims: all, rank: dims.len() }
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.dims.iter().product()
    }

    /// The last dim: the length of a row.
    pub fn columns(&self) -> usize {
        *self.dims().last().expect("a shape with at least one dim")
    }

    /// All dims but the last, multiplied: the number of rows.
    pub fn rows(&self) -> usize {
        self.dims()[..self.rank - 1].iter().product()
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Shape {
        Shape::new(&dims)
    }
}

impl Index<usize> for Shape {
    type Output = usize;
    fn index(&self, dim: usize) -> &usize {
        &self.dims()[dim]
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
