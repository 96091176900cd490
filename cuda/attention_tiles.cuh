// What the attention kernels of 16-bit formats share: tiles in shared memory, fragments of them, products on matrix units.
//
// A tile is rows of D elements in shared memory, D a multiple of 32, zeros where a head is narrower than D or the sequence ends. The 16-byte
// chunks of a row are permuted (`swizzled`), so that eight neighbouring rows of a column of chunks lie in eight different groups of
// four banks: `load_matrices`, the writes of tiles and those of results have no bank conflict.
#pragma once

#include "attention_geometry.cuh"

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

// Rows of one head somewhere in memory.
template <typename T> struct Rows {
  const T* at;
  size_t stride;
  uint32_t dim;
  // Whether all rows are of whole chunks at multiples of 16 bytes.
  bool packed;

  DEVICE Rows(const T* at, size_t stride, uint32_t dim)
      : at(at), stride(stride), dim(dim), packed(is_aligned(at) && stride % 8 == 0 && dim % 8 == 0) {}
};

// Rows first..first + COUNT of `rows` become a tile, those from `end` on zeros. Neighbouring threads copy neighbouring chunks of a row, 64
// bytes of it or more. The copies belong to the thread's current group.
template <typename T, int D, int COUNT, int THREADS> DEVICE void load_tile(uint32_t tile, const Rows<T>& rows, uint32_t first, uint32_t end) {
  constexpr uint32_t CHUNKS = D / 8;
  if (rows.packed) {
    // A pass copies ABREAST chunks of STEP rows, a power of two: so a thread's rows differ by multiples of 8, and are permuted alike.
    constexpr uint32_t ABREAST = CHUNKS & -CHUNKS, STEP = THREADS / ABREAST;
    static_assert(STEP % 8 == 0 && COUNT % STEP == 0, "whole passes");
    const uint32_t row = threadIdx.x / ABREAST, chunk = threadIdx.x % ABREAST;
    const uint32_t to = tile + swizzled<D>(row, chunk);
    const T* from = rows.at + (first + row) * rows.stride + chunk * 8;
#pragma unroll
    for (uint32_t down = 0; down < COUNT; down += STEP) {
#pragma unroll
      for (uint32_t right = 0; right < CHUNKS; right += ABREAST) {
        bool there = first + row + down < end && (chunk + right) * 8 < rows.dim;
        copy_16_async(to + down * D * 2 + right * 16, there ? from + right * 8 : rows.at, there ? 16 : 0);
      }
      from = opaque(from + STEP * rows.stride);
    }
  } else {
#pragma unroll 1
    for (uint32_t index = threadIdx.x; index < COUNT * CHUNKS; index += THREADS) {
      uint32_t row = index / CHUNKS, chunk = index % CHUNKS;
      const T* from = rows.at + (first + row) * rows.stride + chunk * 8;
      uint32_t two[4] = {};
#pragma unroll
      for (uint32_t i = 0; i < 8; i++) {
        if (first + row < end && chunk * 8 + i < rows.dim) two[i / 2] |= uint32_t(from[i].bits) << (i % 2 * 16);
      }
      store_16_shared(tile + swizzled<D>(row, chunk), make_uint4(two[0], two[1], two[2], two[3]));
    }
  }
}

// Writes `count` rows of a tile, which hold results, to rows first.. of `to`, those before `end`. Called by a whole warp, whose rows they are.
template <typename T, int D> DEVICE void store_rows(T* to, size_t stride, uint32_t dim, uint32_t tile, uint32_t row, uint32_t count, uint32_t end) {
  constexpr uint32_t CHUNKS = D / 8;
  bool packed = Rows<T>(to, stride, dim).packed;
  for (uint32_t index = lane(); index < count * CHUNKS; index += WARP) {
    uint32_t of_tile = row + index / CHUNKS, chunk = index % CHUNKS;
    if (of_tile >= end || chunk * 8 >= dim) continue;
    uint4 values = load_16_shared(tile + swizzled<D>(of_tile, chunk));
    T* at = to + of_tile * stride + chunk * 8;
    if (packed) {
      *reinterpret_cast<uint4*>(at) = values;
    } else {
      uint32_t two[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (uint32_t i = 0; i < 8; i++) {
        if (chunk * 8 + i < dim) at[i].bits = uint16_t(two[i / 2] >> (i % 2 * 16));
      }
    }
  }
}

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

  // Rounded, as the left operand of a product over columns 16 `pair` and on.
  template <typename T> DEVICE void operand(uint32_t (&a)[4], int m, int pair) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float(&two)[4] = at[m][2 * pair + i / 2];
      a[i] = two_from_float<T>(two[i % 2 * 2], two[i % 2 * 2 + 1]);
    }
  }
};

// sums += a b^T for tiles a (its rows from `a` on, by `rows_of_lane`) and b (by `columns_of_lane`) of D columns.
template <typename T, int D, int ROW_TILES, int COLUMN_TILES>
DEVICE void multiply_rows(Sums<ROW_TILES, COLUMN_TILES>& sums, uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t left[ROW_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) load_matrices(left[m], along<D>(a, k) + m * 16 * D * 2);
#pragma unroll
    for (int n = 0; n < COLUMN_TILES / 2; n++) {
      uint32_t right[4];
      load_matrices(right, along<D>(b, k) + n * 16 * D * 2);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) {
        multiply<T>(sums.at[m][2 * n], left[m], right[0], right[1]);
        multiply<T>(sums.at[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// sums += left b for a tile b (by `rows_of_lane`), of which columns from 16 `first` on are taken; `left` is rounded.
template <typename T, int D, int ROW_TILES, int INNER_TILES, int COLUMN_TILES>
DEVICE void multiply_columns(Sums<ROW_TILES, COLUMN_TILES>& sums, const Sums<ROW_TILES, INNER_TILES>& left, uint32_t b, int first = 0) {
#pragma unroll
  for (int k = 0; k < INNER_TILES / 2; k++) {
    uint32_t a[ROW_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) left.template operand<T>(a[m], m, k);
#pragma unroll
    for (int n = 0; n < COLUMN_TILES / 2; n++) {
      uint32_t right[4];
      load_matrices_transposed(right, along<D>(b, first + n) + k * 16 * D * 2);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) {
        multiply<T>(sums.at[m][2 * n], a[m], right[0], right[1]);
        multiply<T>(sums.at[m][2 * n + 1], a[m], right[2], right[3]);
      }
    }
  }
}

// Rounds sums, each row times its factor(m, i / 2), and writes them to a warp's rows of a tile, from `tile` on.
template <typename T, int D, int ROW_TILES, int COLUMN_TILES, typename Factor>
DEVICE void store_sums(const Sums<ROW_TILES, COLUMN_TILES>& sums, uint32_t tile, Factor factor) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t row = m * 16 + half * 8 + lane() / 4;
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) {
        const float(&four)[4] = sums.at[m][n];
        float by = factor(m, half);
        store_4_shared(tile + swizzled<D>(row, n) + lane() % 4 * 4, two_from_float<T>(four[half * 2] * by, four[half * 2 + 1] * by));
      }
    }
  }
  __syncwarp();
}
