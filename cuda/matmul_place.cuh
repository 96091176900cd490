// Which tile of a product's result is a block's.
#pragma once

#include "prelude.cuh"

// Blocks run in about the order of their numbers, some hundreds side by side. They go over a band of sixteen rows of tiles, column by column,
// and so those that run side by side are about a square of tiles, which shares its rows of a and of b in L2.
template <int EDGE> struct Place {
  enum { BAND = 16 };
  // The first element.
  size_t row, column;

  DEVICE Place(size_t m, size_t n) {
    const size_t down = (m + EDGE - 1) / EDGE, across = (n + EDGE - 1) / EDGE;
    const size_t first = blockIdx.x / (BAND * across) * BAND;
    const size_t within = blockIdx.x % (BAND * across), height = min(down - first, size_t(BAND));
    row = (first + within % height) * EDGE;
    column = within / height * EDGE;
  }
};
