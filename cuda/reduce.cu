// Sums over rows by the chunk rule and in a tree, and a search for what is not finite.
#include "prelude.cuh"
#include "chunks.cuh"

enum { THREADS = 256, WARPS = THREADS / WARP };

// total[c] = the sum of the rows of dw [chunks, c] in the balanced binary tree.
//
// A thread takes a column, eight rows at a time: a warp reads 128 bytes of each. 4 bytes an element of dw. Any width; rows that do not start
// at a multiple of 128 bytes share a sector with the neighbouring warp.
KERNEL(THREADS) reduce_tree_rows(float* total, const float* dw, size_t chunks, size_t c) {
  size_t column = thread_of_grid();
  if (column >= c) return;
  Tree tree;
  size_t chunk = 0;
  for (; chunk + 8 <= chunks; chunk += 8) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = dw[(chunk + i) * c + column];
    tree.push_at<3>(((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])));
  }
  for (; chunk < chunks; chunk++) tree.push(dw[chunk * c + column]);
  total[column] = tree.total();
}

template <typename T> DEVICE bool is_finite(T x) { return (__float_as_uint(to_float(x)) & 0x7f800000) != 0x7f800000; }

DEVICE uint64_t least_of_warp(uint64_t x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) x = min(x, uint64_t(__shfl_xor_sync(ALL_LANES, x, distance)));
  return x;
}

// least[block] = the index of the first element that is not finite among those of this block, or n.
//
// A thread takes 16 bytes at a time, a grid strides over all: sizeof(T) bytes an element. Any alignment: packs start at the first multiple of
// 16 bytes.
template <typename T> DEVICE void first_nonfinite(uint64_t* least, const T* x, size_t n) {
  constexpr int COUNT = Pack<T>::COUNT;
  __shared__ uint64_t of_warps[WARPS];
  size_t head = min((16 - reinterpret_cast<size_t>(x) % 16) % 16 / sizeof(T), n), packs = (n - head) / COUNT;
  uint64_t found = n;
#pragma unroll 4
  for (size_t pack = thread_of_grid(); pack < packs; pack += threads_of_grid()) {
    size_t start = head + pack * COUNT;
    Pack<T> xs = load_pack(x + start);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (!is_finite(xs.at[i])) found = min(found, uint64_t(start + i));
    }
  }
  size_t loose = n - packs * COUNT;
  for (size_t at = thread_of_grid(); at < loose; at += threads_of_grid()) {
    size_t i = at < head ? at : at + packs * COUNT;
    if (!is_finite(x[i])) found = min(found, uint64_t(i));
  }
  found = least_of_warp(found);
  if (lane() == 0) of_warps[warp()] = found;
  __syncthreads();
  if (warp() == 0) {
    found = least_of_warp(lane() < WARPS ? of_warps[lane()] : uint64_t(n));
    if (lane() == 0) least[blockIdx.x] = found;
  }
}

#define FIRST_NONFINITE(T, suffix) \
  KERNEL(THREADS) reduce_first_nonfinite_##suffix(uint64_t* least, const T* x, size_t n) { first_nonfinite(least, x, n); }
EXPORT_ALL(FIRST_NONFINITE)

// What a row gives to the sum of rows: itself.
template <typename T> struct Itself {
  const T* dy;
  size_t c;

  template <typename Columns> DEVICE void operator()(size_t row, Columns columns, float (&sums)[Columns::COUNT]) const {
    float values[Columns::COUNT];
    columns.load(dy + row * c, values);
#pragma unroll
    for (int i = 0; i < Columns::COUNT; i++) sums[i] += values[i];
  }
};

// The first pass of the sum of rows: sizeof(T) bytes an element, and 4 for each column of a block of rows.
#define SUM_ROWS_OF(T, suffix) \
  KERNEL(SUM_THREADS) reduce_sum_rows_##suffix(float* partials, size_t c, size_t part, const T* dy) { \
    sum_block<T>(partials, c, part, is_aligned(dy), Itself<T>{dy, c}); \
  }
EXPORT_ALL(SUM_ROWS_OF)
