// Matrix products of 16-bit formats on matrix units: one tile of out by one block.
#pragma once

#include "matmul_place.cuh"
#include "tiles.cuh"

// EDGE x EDGE elements of out, a quarter of them by each warp. Shared memory: 128: 64 KiB, 64: 32 KiB, of which the tile that is written takes
// up a part at the end. Per product of matrix units a warp reads 128 bytes of shared memory (EDGE 64: 256), and a block brings 64 of global
// memory there (EDGE 64: 128), mostly from L2 (see `Place`).
template <int EDGE> struct Tiling {
  enum {
    WARPS = 4,
    THREADS = WARPS * WARP,
    // Of a warp's square.
    SIDE = EDGE / 2,
    // Elements along K of one step.
    DEPTH = 32,
    // While one step is worked on, three are on their way.
    STAGES = 4,
    OPERAND_BYTES = EDGE * DEPTH * 2,
    STAGE_BYTES = 2 * OPERAND_BYTES,
  };
};

// Of ROWS x COLUMNS elements those in the first `rows` and `columns` become a tile, with zeros around them. Packed: rows begin at multiples
// of 16 bytes. The copies belong to the thread's current group.
template <typename T, int ROWS, int COLUMNS, int THREADS>
DEVICE void load_tile(uint32_t tile, const T* at, size_t stride, uint32_t rows, uint32_t columns, bool packed) {
  if (packed) {
    // Neighbouring threads copy neighbouring chunks of a row, 64 bytes of it or more.
    constexpr uint32_t CHUNKS = COLUMNS / 8, STEP = THREADS / CHUNKS;
    const uint32_t chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
    const uint32_t bytes = columns > chunk * 8 ? min(columns - chunk * 8, 8) * 2 : 0;
    const uint32_t to = tile + swizzled<COLUMNS>(row, chunk);
    const T* from = at + row * stride + chunk * 8;
#pragma unroll
    for (uint32_t down = 0; down < ROWS; down += STEP) {
      // Of what is not there nothing is read, whatever its address.
      copy_16_async(to + down * COLUMNS * 2, from, row + down < rows ? bytes : 0);
      from += STEP * stride;
    }
  } else {
    // Neighbouring threads copy neighbouring elements. All reads are on their way before the first is waited for.
    constexpr uint32_t COUNT = ROWS * COLUMNS / THREADS, STEP = THREADS / COLUMNS;
    const uint32_t column = threadIdx.x % COLUMNS, row = threadIdx.x / COLUMNS;
    const T* from = at + row * stride + column;
    uint16_t values[COUNT];
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
      values[i] = 0;
      if (row + i * STEP < rows && column < columns) values[i] = from->bits;
      from += STEP * stride;
    }
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
      store_2_shared(tile + swizzled<COLUMNS>(row + i * STEP, column / 8) + column % 8 * 2, values[i]);
    }
  }
}

// EDGE rows of an operand, from `first` on. OUTER: memory has a row for each k, else a row of all k for each of ours.
template <typename T, int EDGE, bool OUTER> struct Operand {
  typedef Tiling<EDGE> Of;
  enum { WIDTH = OUTER ? EDGE : int(Of::DEPTH) };
  const T* at;
  size_t stride;
  // How many of the rows there are.
  uint32_t there;
  bool packed;

  DEVICE Operand(const T* all, size_t stride, size_t first, size_t count)
      : at(all + (OUTER ? first : first * stride)),
        stride(stride),
        there(uint32_t(min(count - first, size_t(EDGE)))),
        packed(is_aligned(all) && stride % 8 == 0) {}

  // The step of K that begins at `begin`.
  DEVICE void load(uint32_t tile, size_t begin, size_t k) const {
    const uint32_t depth = uint32_t(min(k - begin, size_t(Of::DEPTH)));
    if (OUTER) load_tile<T, Of::DEPTH, WIDTH, Of::THREADS>(tile, at + begin * stride, stride, depth, there, packed);
    else load_tile<T, EDGE, WIDTH, Of::THREADS>(tile, at + begin, stride, there, depth, packed);
  }

  // What a lane adds to a tile's address for the fragments of a warp's rows, of which `first` is the first. LEFT: of a, else of b.
  template <bool LEFT> static DEVICE uint32_t of_lane(uint32_t first) {
    const uint32_t lane = LEFT != OUTER ? rows_of_lane<WIDTH>() : columns_of_lane<WIDTH>();
    return OUTER ? along<WIDTH>(lane, first / 16) : lane + first * WIDTH * 2;
  }

  // Sixteen of the warp's rows, from 16 `row` on, and sixteen elements along K, from 16 `step` on. `address`: a tile's and `of_lane`.
  static DEVICE void fragment(uint32_t (&to)[4], uint32_t address, uint32_t row, uint32_t step) {
    if (OUTER) load_matrices_transposed(to, along<WIDTH>(address, row) + step * 16 * WIDTH * 2);
    else load_matrices(to, along<WIDTH>(address, step) + row * 16 * WIDTH * 2);
  }
};

// The sums of a warp's square. K is gone through in order, sixteen elements at a time whatever EDGE is, with zeros behind the last: an
// element's bits depend on its rows of a and b alone.
template <typename T, int EDGE, bool A_OUTER, bool B_OUTER>
DEVICE Sums<EDGE / 32, EDGE / 16> tile_of(uint32_t ring, const Operand<T, EDGE, A_OUTER>& a, const Operand<T, EDGE, B_OUTER>& b, size_t k) {
  typedef Tiling<EDGE> Of;
  typedef Operand<T, EDGE, A_OUTER> A;
  typedef Operand<T, EDGE, B_OUTER> B;
  const uint32_t steps = uint32_t((k + Of::DEPTH - 1) / Of::DEPTH);
  const uint32_t a_lane = ring + A::template of_lane<true>(warp() / 2 * Of::SIDE);
  const uint32_t b_lane = ring + Of::OPERAND_BYTES + B::template of_lane<false>(warp() % 2 * Of::SIDE);
  auto load = [&](uint32_t step) {
    if (step < steps) {
      const uint32_t stage = ring + step % Of::STAGES * Of::STAGE_BYTES;
      a.load(stage, size_t(step) * Of::DEPTH, k);
      b.load(stage + Of::OPERAND_BYTES, size_t(step) * Of::DEPTH, k);
    }
    end_copies();
  };
  Sums<EDGE / 32, EDGE / 16> sums;
  sums.clear();
#pragma unroll 1
  for (uint32_t step = 0; step < Of::STAGES - 1; step++) load(step);
#pragma unroll 1
  for (uint32_t step = 0; step < steps; step++) {
    // This step is there, and all warps have left the one before it, whose place is free.
    await_copies<Of::STAGES - 2>();
    __syncthreads();
    load(step + Of::STAGES - 1);
    const uint32_t stage = step % Of::STAGES * Of::STAGE_BYTES;
#pragma unroll
    for (uint32_t inner = 0; inner < Of::DEPTH / 16; inner++) {
      uint32_t left[EDGE / 32][4];
#pragma unroll
      for (uint32_t m = 0; m < EDGE / 32; m++) A::fragment(left[m], a_lane + stage, m, inner);
#pragma unroll
      for (uint32_t n = 0; n < EDGE / 32; n++) {
        uint32_t right[4];
        B::fragment(right, b_lane + stage, n, inner);
        // Of b's matrices, the two of the first eight rows come first, by memory of either order.
#pragma unroll
        for (uint32_t m = 0; m < EDGE / 32; m++) {
          multiply<T>(sums.at[m][2 * n], left[m], right[0], right[1]);
          multiply<T>(sums.at[m][2 * n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }
  return sums;
}

// Writes a warp's square, whose first element belongs at `to`, rounded; `rows` and `columns` of it are there. `tile`: room for it.
template <typename T, int SIDE>
DEVICE void store_square(T* to, size_t stride, uint32_t tile, const Sums<SIDE / 16, SIDE / 8>& sums, int rows, int columns) {
  store_sums<T, SIDE>(sums, tile, [](int, int) { return 1.0f; });
  if (is_aligned(to) && stride % 8 == 0) {
    // Lanes side by side write all of a row of 64 bytes or more.
    constexpr int CHUNKS = SIDE / 8;
#pragma unroll 2
    for (int index = lane(); index < SIDE * CHUNKS; index += WARP) {
      int row = index / CHUNKS, chunk = index % CHUNKS;
      // Rows of out are of whole chunks.
      if (row < rows && chunk * 8 < columns) store_16_global(to + row * stride + chunk * 8, load_16_shared(tile + swizzled<SIDE>(row, chunk)));
    }
  } else {
#pragma unroll 2
    for (int index = lane(); index < SIDE * SIDE; index += WARP) {
      int row = index / SIDE, column = index % SIDE;
      if (row < rows && column < columns) to[row * stride + column].bits = load_2_shared(tile + swizzled<SIDE>(row, column / 8) + column % 8 * 2);
    }
  }
}

// Adds a warp's square to f32 sums. Four lanes fill the 32 bytes of a sector.
template <int SIDE> DEVICE void add_square(float* to, size_t stride, Sums<SIDE / 16, SIDE / 8>& sums, int rows, int columns) {
  const bool in_pairs = reinterpret_cast<size_t>(to) % 8 == 0 && stride % 2 == 0;
#pragma unroll
  for (int m = 0; m < SIDE / 16; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = m * 16 + half * 8 + lane() / 4;
      if (row >= rows) continue;
      float* begin = to + row * stride;
#pragma unroll
      for (int n = 0; n < SIDE / 8; n++) {
        const int column = n * 8 + lane() % 4 * 2;
        const float low = sums.at[m][n][half * 2], high = sums.at[m][n][half * 2 + 1];
        if (in_pairs && column < columns) {
          float2* pair = reinterpret_cast<float2*>(begin + column);
          const float2 old = *pair;
          *pair = make_float2(old.x + low, old.y + high);
        } else {
          if (column < columns) begin[column] += low;
          if (column + 1 < columns) begin[column + 1] += high;
        }
      }
    }
  }
}

// A tile of out[m, n], rounded to T; `bias` may be null.
template <typename T, int EDGE, bool B_OUTER>
DEVICE void multiply_into(T* out, const T* a, const T* b, const T* bias, size_t m, size_t n, size_t k, size_t a_stride, size_t b_stride) {
  typedef Tiling<EDGE> Of;
  extern __shared__ __align__(128) uint4 shared[];
  const Place<EDGE> place(m, n);
  const uint32_t ring = shared_address(shared);
  const Operand<T, EDGE, false> rows(a, a_stride, place.row, m);
  const Operand<T, EDGE, B_OUTER> columns(b, b_stride, place.column, n);
  auto sums = tile_of<T, EDGE>(ring, rows, columns, k);
  const uint32_t row = warp() / 2 * Of::SIDE, column = warp() % 2 * Of::SIDE;
  const int rows_there = int(rows.there) - int(row), columns_there = int(columns.there) - int(column);
  if (bias != nullptr) {
    bias += place.column + column;
#pragma unroll
    for (int i = 0; i < Of::SIDE / 4; i++) {
      const int at = i / 2 * 8 + lane() % 4 * 2 + i % 2;
      const float added = at < columns_there ? to_float(bias[at]) : 0.0f;
#pragma unroll
      for (int m = 0; m < Of::SIDE / 16; m++) {
        sums.at[m][i / 2][i % 2] += added;
        sums.at[m][i / 2][2 + i % 2] += added;
      }
    }
  }
  // The tile's room is that of the first steps' operands, which other warps may still read.
  __syncthreads();
  T* to = out + (place.row + row) * n + place.column + column;
  store_square<T, Of::SIDE>(to, n, ring + warp() * (Of::SIDE * Of::SIDE * 2), sums, rows_there, columns_there);
}

// out[m, n] (f32) += a tile of the product.
template <typename T, int EDGE>
DEVICE void multiply_onto(float* out, const T* a, const T* b, size_t m, size_t n, size_t k, size_t a_stride, size_t b_stride) {
  typedef Tiling<EDGE> Of;
  extern __shared__ __align__(128) uint4 shared[];
  const Place<EDGE> place(m, n);
  const Operand<T, EDGE, true> rows(a, a_stride, place.row, m);
  const Operand<T, EDGE, true> columns(b, b_stride, place.column, n);
  auto sums = tile_of<T, EDGE>(shared_address(shared), rows, columns, k);
  const uint32_t row = warp() / 2 * Of::SIDE, column = warp() % 2 * Of::SIDE;
  add_square<Of::SIDE>(out + (place.row + row) * n + place.column + column, n, sums, int(rows.there) - int(row), int(columns.there) - int(column));
}
