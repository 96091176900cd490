// Tiles of 16-bit numbers in shared memory, fragments of them in a warp's registers, products of these on matrix units. Included after
// prelude.cuh.
//
// A tile is rows of D elements, D a multiple of 32. The 16-byte chunks of a row are permuted (`swizzled`), so that eight neighbouring rows of
// a column of chunks lie in eight different groups of four banks: `load_matrices`, the writes of tiles and those of results have no bank
// conflict.
#pragma once

// ---- tiles ----

// Where a chunk of a row stands, in bytes from the start of the tile, which is a multiple of 128.
template <int D> DEVICE uint32_t swizzled(uint32_t row, uint32_t chunk) {
  // Rows of 64 bytes more than a multiple of 128 come in pairs that fill all banks.
  uint32_t permuted = D % 64 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
  return row * (D * 2) + permuted * 16;
}

// Chunks 2 `pair` and on, from the address of chunk 0 or 1 of the same row: what `swizzled` gives, in one operation or none.
template <int D> DEVICE uint32_t along(uint32_t address, uint32_t pair) {
  constexpr uint32_t PERMUTED = D % 64 == 0 ? 96 : 32;
  return (address ^ (pair * 32 & PERMUTED)) + (pair * 32 & ~PERMUTED);
}

// What a lane adds to a tile's address for `load_matrices` of 16 rows and 16 columns: rows in pairs of matrices, then columns.
template <int D> DEVICE uint32_t rows_of_lane() { return swizzled<D>(lane() % 16, lane() / 16); }
// The same, columns first.
template <int D> DEVICE uint32_t columns_of_lane() { return swizzled<D>(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2); }

// ---- fragments ----

template <typename T> DEVICE uint32_t two_from_float(float low, float high);
template <> DEVICE uint32_t two_from_float<bf16>(float low, float high) { return two_bf16_from_float(low, high); }
template <> DEVICE uint32_t two_from_float<f16>(float low, float high) { return two_f16_from_float(low, high); }

template <typename T> DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> DEVICE void multiply<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply_bf16(d, a, b0, b1); }
template <> DEVICE void multiply<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply_f16(d, a, b0, b1); }

// Sums of a warp: 16 x ROW_TILES rows, 8 x COLUMN_TILES columns. Element [m][n][i] of a lane stands in row 16 m + lane / 4 + 8 (i / 2) and
// column 8 n + 2 (lane % 4) + i % 2.
template <int ROW_TILES, int COLUMN_TILES> struct Sums {
  float at[ROW_TILES][COLUMN_TILES][4];

  DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) at[m][n][i] = 0.0f;
      }
    }
  }

  // Calls `each(m, n, i, element)`.
  template <typename Each> DEVICE void over(Each each) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) each(m, n, i, at[m][n][i]);
      }
    }
  }
};

// Rounds sums, each row times its factor(m, half), and writes them to a warp's rows of a tile, from `tile` on, and columns 8 `first`...
template <typename T, int D, int ROW_TILES, int COLUMN_TILES, typename Factor>
DEVICE void store_sums(const Sums<ROW_TILES, COLUMN_TILES>& sums, uint32_t tile, Factor factor, uint32_t first = 0) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t row = m * 16 + half * 8 + lane() / 4;
      float by = factor(m, half);
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) {
        const float(&four)[4] = sums.at[m][n];
        store_4_shared(tile + swizzled<D>(row, first + n) + lane() % 4 * 4, two_from_float<T>(four[half * 2] * by, four[half * 2 + 1] * by));
      }
    }
  }
  __syncwarp();
}
