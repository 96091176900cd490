// Sums over rows by the chunk rule (src/ops/reduce.rs), on the whole GPU: the gradients of norm weights and of biases.
//
// The n rows are consecutive parts of `part` rows each: part p = sequence * chunks + chunk. A part is cut into blocks of at most SUM_ROWS
// rows. First pass (`sum_block`, in the kernel of the op): each block of rows is summed, the sums go to `partials` [parts * blocks, c],
// where blocks = ceil(part / SUM_ROWS). Second pass (chunks.cu): the partials of each part are added up and, one sequence after the
// other, added to the gradient's row of the chunk.
//
// The order of a column's additions depends on `part` alone: not on c, on the column, on alignment, or on how many parts a call has.
//
// Included after prelude.cuh.
#pragma once

enum {
  SUM_THREADS = 256,
  SUM_WARPS = SUM_THREADS / WARP,
  // As in src/ops/chunks.rs. Each warp sums every eighth of them.
  SUM_ROWS = 64,
};

// The columns of one thread: COUNT consecutive ones where PACKED, which is one access of 16 bytes; else COUNT that are WARP apart, so that
// a warp's accesses of single elements fill whole sectors.
template <typename T, bool PACKED> struct Columns {
  enum {
    COUNT = Pack<T>::COUNT,
    // In shared memory, the sum of column i of lane l stands at i * STRIDE + l. Lanes write side by side, and the 32 neighbouring columns
    // that a warp reads lie in 32 banks in both orders of columns.
    STRIDE = WARP + WARP / COUNT,
  };
  typedef float Sums[COUNT * STRIDE];
  size_t first, c;

  // What `row` has in these columns. Beyond its end stands its last element again, for sums that nobody asks for: so the loads of
  // several rows need no branches between them.
  DEVICE void load(const T* row, float (&values)[COUNT]) const {
    if (PACKED) {
      Pack<T> pack = load_pack(row + first);
#pragma unroll
      for (int i = 0; i < COUNT; i++) values[i] = to_float(pack.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; i++) values[i] = to_float(row[min(first + i * WARP, c - 1)]);
    }
  }
};

// Block x of the grid sums the rows of its block of rows in the columns of tile y: WARP * COUNT columns, 512 bytes of a row. Each warp
// takes every eighth row, two of them in flight; the eight sums of a column meet in shared memory and are added in the order of warps.
//
// `term(row, columns, sums)` adds to `sums` what `row` gives to `columns`, which is a Columns<T, PACKED>, through columns.load. It is an
// object with a template of operator(), as below: the compiler takes lambdas with `auto` for host code.
template <typename T, bool PACKED, typename Term>
DEVICE void sum_block_of(typename Columns<T, PACKED>::Sums* of_warps, float* partials, size_t c, size_t part, Term term) {
  using Mine = Columns<T, PACKED>;
  constexpr int COUNT = Mine::COUNT, STRIDE = Mine::STRIDE, TILE = WARP * COUNT;
  size_t blocks = (part + SUM_ROWS - 1) / SUM_ROWS, block = blockIdx.x % blocks;
  size_t first = blockIdx.x / blocks * part + block * SUM_ROWS;
  size_t tile = size_t(blockIdx.y) * TILE;
  Mine mine = {tile + (PACKED ? lane() * COUNT : lane()), c};
  int rows = PACKED && mine.first >= c ? 0 : int(min(part - block * SUM_ROWS, size_t(SUM_ROWS)));
  float sums[COUNT] = {};
#pragma unroll 2
  for (int row = warp(); row < rows; row += SUM_WARPS) term(first + row, mine, sums);
#pragma unroll
  for (int i = 0; i < COUNT; i++) of_warps[warp()][i * STRIDE + lane()] = sums[i];
  __syncthreads();
  if (threadIdx.x < TILE && tile + threadIdx.x < c) {
    int of_lane = PACKED ? threadIdx.x / COUNT : threadIdx.x % WARP, i = PACKED ? threadIdx.x % COUNT : threadIdx.x / WARP;
    float sum = of_warps[0][i * STRIDE + of_lane];
#pragma unroll
    for (int w = 1; w < SUM_WARPS; w++) sum += of_warps[w][i * STRIDE + of_lane];
    partials[blockIdx.x * c + tile + threadIdx.x] = sum;
  }
}

// `aligned`: all rows that `term` reads start at multiples of 16 bytes if c is a multiple of COUNT.
template <typename T, typename Term> DEVICE void sum_block(float* partials, size_t c, size_t part, bool aligned, Term term) {
  __shared__ typename Columns<T, true>::Sums of_warps[SUM_WARPS];
  if (aligned && c % Pack<T>::COUNT == 0) sum_block_of<T, true>(of_warps, partials, c, part, term);
  else sum_block_of<T, false>(of_warps, partials, c, part, term);
}

// A kernel of the first pass looks like this; src/ops/chunks.rs launches it and the second pass:
//
//   template <typename T> struct Itself {
//     const T* dy;
//     size_t c;
//     template <typename Columns> DEVICE void operator()(size_t row, Columns columns, float (&sums)[Columns::COUNT]) const {
//       float values[Columns::COUNT];
//       columns.load(dy + row * c, values);
//   #pragma unroll
//       for (int i = 0; i < Columns::COUNT; i++) sums[i] += values[i];
//     }
//   };
//   KERNEL(SUM_THREADS) reduce_sum_rows_bf16(float* partials, size_t c, size_t part, const bf16* dy) {
//     sum_block<bf16>(partials, c, part, is_aligned(dy), Itself<bf16>{dy, c});
//   }
