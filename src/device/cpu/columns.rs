//! A row-major matrix cut into runs of columns that threads may write at the same time.
//!
//! Invariant: the runs of one cut do not overlap and do not outlive the matrix.
#![allow(unsafe_code)]

use std::marker::PhantomData;

/// Some neighbouring columns of all rows of a matrix.
pub struct Columns<'a, T> {
    start: *mut T,
    stride: usize,
    rows: usize,
    width: usize,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: a run of columns is a mutable borrow of elements that no other run has.
unsafe impl<T: Send> Send for Columns<'_, T> {}

impl<'a, T> Columns<'a, T> {
    /// Cuts the rows of `matrix` into runs of these widths, from left to right; a row is as long as all of them together.
    pub fn split(matrix: &'a mut [T], widths: impl Iterator<Item = usize> + Clone) -> Vec<Columns<'a, T>> {
        let stride: usize = widths.clone().sum();
        assert!(stride > 0 && matrix.len().is_multiple_of(stride), "{} elements in rows of {stride}", matrix.len());
        let rows = matrix.len() / stride;
        let start = matrix.as_mut_ptr();
        let mut column = 0;
        widths
            .map(|width| {
                // The first row may not exist: then no element is ever asked for.
                let run = Columns { start: start.wrapping_add(column), stride, rows, width, matrix: PhantomData };
                column += width;
                run
            })
            .collect()
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row exists, these columns of it belong to this run alone, and `self` is borrowed as long as the slice.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.width) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_tile_the_matrix() {
        let mut matrix = vec![0; 5 * 7];
        for (index, mut run) in Columns::split(&mut matrix, [2, 1, 4].into_iter()).into_iter().enumerate() {
            for row in 0..run.rows() {
                run.row(row).iter_mut().for_each(|element| *element += 10 * row + index + 1);
            }
        }
        let expected: Vec<usize> = (0..5).flat_map(|row| [1, 1, 2, 3, 3, 3, 3].map(|index| 10 * row + index)).collect();
        assert_eq!(matrix, expected);
    }
}
