// What the attention kernels of 16-bit formats share: tiles of rows of heads, zeros where a head is narrower than D or the sequence ends, and
// what is done with fragments of them.
#pragma once

#include "attention_geometry.cuh"
#include "tiles.cuh"

// ---- rows of heads ----

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

// Those of one of `heads` heads that lie side by side, in one sequence. For use in a loop that needs its registers for something else.
template <typename T> DEVICE Rows<T> rows_of(const T* all, const Geometry& geometry, uint32_t sequence, uint32_t head, uint32_t heads) {
  const uint32_t dim = opaque(geometry.dim);
  const size_t stride = size_t(heads) * dim;
  return Rows<T>(all + sequence * (geometry.t * stride) + size_t(head) * dim, stride, dim);
}

// Rows first..first + COUNT of `rows` become a tile, those from `end` on zeros. Neighbouring threads copy neighbouring chunks of a row, 64
// bytes of it or more. The copies belong to the thread's current group.
template <typename T, int D, int COUNT, int THREADS> DEVICE void load_tile(uint32_t tile, const Rows<T>& rows, uint32_t first, uint32_t end) {
  constexpr uint32_t CHUNKS = D / 8;
  if (rows.packed) {
    // A pass copies ABREAST chunks of STEP rows, a power of two: so a thread's rows differ by multiples of 8, and are permuted alike.
    constexpr int WIDEST = CHUNKS & -CHUNKS, ABREAST = WIDEST < THREADS / 8 ? WIDEST : THREADS / 8, STEP = THREADS / ABREAST;
    static_assert(STEP % 8 == 0 && COUNT % STEP == 0, "whole passes");
    const uint32_t row = threadIdx.x / ABREAST, chunk = threadIdx.x % ABREAST;
    const uint32_t to = tile + swizzled<D>(row, chunk);
    const T* from = rows.at + (first + row) * rows.stride + chunk * 8;
    const int rows_left = int(end) - int(first + row), columns_left = int(rows.dim) - int(chunk * 8);
#pragma unroll
    for (int down = 0; down < COUNT; down += STEP) {
#pragma unroll
      for (int right = 0; right < D; right += ABREAST * 8) {
        // Of what is not there nothing is read, whatever its address.
        copy_16_async(to + down * D * 2 + right * 2, from + right, down < rows_left && right < columns_left ? 16 : 0);
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

// Copies columns 8 `first`.. of COLUMNS of a warp's rows, ROWS from `tile` on, to memory, of which rows before `end` and columns before
// `dim` are there. Lanes side by side write 64 bytes or more of a row.
template <typename T, int D, int ROWS, int COLUMNS>
DEVICE void store_rows(T* to, size_t stride, uint32_t dim, uint32_t tile, uint32_t end, uint32_t first = 0) {
  constexpr uint32_t CHUNKS = COLUMNS / 8;
  const bool packed = Rows<T>(to, stride, dim).packed;
#pragma unroll 2
  for (uint32_t index = lane(); index < ROWS * CHUNKS; index += WARP) {
    uint32_t row = index / CHUNKS, column = (first + index % CHUNKS) * 8;
    if (row >= end || column >= dim) continue;
    uint4 values = load_16_shared(tile + swizzled<D>(row, column / 8));
    T* at = to + row * stride + column;
    if (packed) {
      *reinterpret_cast<uint4*>(at) = values;
    } else {
      uint32_t two[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (uint32_t i = 0; i < 8; i++) {
        if (column + i < dim) at[i].bits = uint16_t(two[i / 2] >> (i % 2 * 16));
      }
    }
  }
}

// ---- fragments ----

// Sums, rounded: the left operand of a product over their columns. Half as many registers.
template <typename T, int ROW_TILES, int COLUMN_TILES> struct Rounded {
  uint32_t at[ROW_TILES][COLUMN_TILES / 2][4];

  DEVICE Rounded(const Sums<ROW_TILES, COLUMN_TILES>& sums) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) {
        const float(&four)[4] = sums.at[m][n];
        at[m][n / 2][n % 2 * 2] = two_from_float<T>(four[0], four[1]);
        at[m][n / 2][n % 2 * 2 + 1] = two_from_float<T>(four[2], four[3]);
      }
    }
  }
};

// sums += a b^T for tiles a (its rows from `a` on, by `rows_of_lane`) and b (by `columns_of_lane`) of D columns. UNROLLED steps of 16 columns
// stand side by side: more of them overlap better, and take registers.
template <typename T, int D, int UNROLLED, int ROW_TILES, int COLUMN_TILES>
DEVICE void multiply_rows(Sums<ROW_TILES, COLUMN_TILES>& sums, uint32_t a, uint32_t b) {
#pragma unroll(UNROLLED)
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

// sums += left b for a tile b (by `rows_of_lane`), of which columns from 16 `first` on are taken.
template <int D, typename T, int ROW_TILES, int INNER_TILES, int COLUMN_TILES>
DEVICE void multiply_columns(Sums<ROW_TILES, COLUMN_TILES>& sums, const Rounded<T, ROW_TILES, INNER_TILES>& left, uint32_t b, uint32_t first = 0) {
#pragma unroll
  for (int k = 0; k < INNER_TILES / 2; k++) {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES / 2; n++) {
      uint32_t right[4];
      load_matrices_transposed(right, along<D>(b, first + n) + k * 16 * D * 2);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) {
        multiply<T>(sums.at[m][2 * n], left.at[m][k], right[0], right[1]);
        multiply<T>(sums.at[m][2 * n + 1], left.at[m][k], right[2], right[3]);
      }
    }
  }
}

// Scores of a warp's queries from `begin` on and keys from `key` on, where not seen: -inf. `first_keys`: those of its rows.
template <int ROW_TILES, int KEY_TILES>
DEVICE void hide(Sums<ROW_TILES, KEY_TILES>& scores, const uint32_t* first_keys, uint32_t begin, uint32_t key) {
  scores.over([&](int m, int n, int i, float& score) {
    uint32_t row = m * 16 + i / 2 * 8 + lane() / 4, column = key + n * 8 + lane() % 4 * 2 + i % 2;
    if (column > begin + row || column < first_keys[row]) score = -INFINITY;
  });
}

// Gradients of scaled scores: weight * (dweight - dot(m, n, i)), from weights and their gradients. Where the mask has cut the tile, a
// weight of 0 gives 0, whatever stands there.
template <int ROW_TILES, int COLUMN_TILES, typename Dot>
DEVICE void differentiate(Sums<ROW_TILES, COLUMN_TILES>& dweights, const Sums<ROW_TILES, COLUMN_TILES>& weights, bool cut, Dot dot) {
  dweights.over([&](int m, int n, int i, float& x) { x = weights.at[m][n][i] * (x - dot(m, n, i)); });
  if (cut) {
    dweights.over([&](int m, int n, int i, float& x) {
      if (weights.at[m][n][i] == 0.0f) x = 0.0f;
    });
  }
}

