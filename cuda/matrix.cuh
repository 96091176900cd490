// Going over a matrix whose rows are not one behind the other in memory. Included after prelude.cuh.
#pragma once

// Calls each(row, column) for the items of this thread, of `rows` x `columns` that are numbered row by row: every one that is a multiple of
// the grid's threads after its first. One division for each thread, none for each item.
template <typename Each> DEVICE void over_matrix(size_t rows, size_t columns, Each each) {
  size_t row = thread_of_grid() / columns, column = thread_of_grid() % columns;
  size_t down = threads_of_grid() / columns, across = threads_of_grid() % columns;
  while (row < rows) {
    each(row, column);
    row += down;
    column += across;
    if (column >= columns) {
      column -= columns;
      row++;
    }
  }
}
