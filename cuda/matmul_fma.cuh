// Matrix products of f32 with fused multiply-adds: one tile of out by one block.
//
// Each element is one chain over K in order, as on the CPU, and has its bits.
#pragma once

#include "matmul_place.cuh"

// EDGE x EDGE elements of out by 16 x 16 threads of EACH x EACH. Shared memory: 128: 50 KiB, 64: 26 KiB.
template <int EDGE> struct FmaTiling {
  enum {
    ABREAST = 16,
    THREADS = ABREAST * ABREAST,
    EACH = EDGE / ABREAST,
    // Elements along K of one step.
    DEPTH = 16,
    STAGES = 3,
    // Floats from one k to the next in shared memory: reads of four at a time are aligned, and writes of eight k of four rows go to all banks.
    PITCH = EDGE + 4,
    OPERAND_FLOATS = DEPTH * PITCH,
    STAGE_FLOATS = 2 * OPERAND_FLOATS,
  };
};

// EDGE rows of an operand, from `first` on. OUTER: memory has a row for each k, else a row of all k for each of ours.
template <int EDGE, bool OUTER> struct FmaOperand {
  typedef FmaTiling<EDGE> Of;
  const float* at;
  size_t stride;
  // How many of the rows there are.
  uint32_t there;

  DEVICE FmaOperand(const float* all, size_t stride, size_t first, size_t count)
      : at(all + (OUTER ? first : first * stride)), stride(stride), there(uint32_t(min(count - first, size_t(EDGE)))) {}

  // The step of K that begins at `begin`, k by k. What is not there becomes zeros. A warp reads whole sectors where rows begin at them.
  DEVICE void load(uint32_t tile, size_t begin, size_t k) const {
    const uint32_t depth = uint32_t(min(k - begin, size_t(Of::DEPTH)));
    if (OUTER) {
      const uint32_t row = threadIdx.x % EDGE, first = threadIdx.x / EDGE;
      const float* from = at + (begin + first) * stride + row;
#pragma unroll
      for (uint32_t i = first; i < first + Of::DEPTH; i += Of::THREADS / EDGE) {
        copy_4_async(tile + (i * Of::PITCH + row) * 4, from, i < depth && row < there ? 4 : 0);
        from += Of::THREADS / EDGE * stride;
      }
    } else {
      const uint32_t inner = threadIdx.x % 8, first = threadIdx.x / 8;
      const float* from = at + first * stride + begin + inner;
#pragma unroll
      for (uint32_t row = 0; row < EDGE; row += Of::THREADS / 8) {
#pragma unroll
        for (uint32_t i = 0; i < Of::DEPTH; i += 8) {
          copy_4_async(tile + ((i + inner) * Of::PITCH + first + row) * 4, from + i, first + row < there && i + inner < depth ? 4 : 0);
        }
        from += Of::THREADS / 8 * stride;
      }
    }
  }
};

// The rows or columns of a thread: four neighbours, and four that are 64 further on.
template <int EDGE> DEVICE uint32_t part_of_thread(uint32_t thread, int i) { return i / 4 * 64 + thread * 4 + i % 4; }

template <int EDGE> struct FmaTile {
  typedef FmaTiling<EDGE> Of;
  float at[Of::EACH][Of::EACH];

  // Adds one k, of which the tiles have a row each.
  DEVICE void add(uint32_t a, uint32_t b) {
    float left[Of::EACH], right[Of::EACH];
#pragma unroll
    for (int i = 0; i < Of::EACH; i += 4) {
      const uint4 four = load_16_shared(a + part_of_thread<EDGE>(threadIdx.x / Of::ABREAST, i) * 4);
      const uint4 others = load_16_shared(b + part_of_thread<EDGE>(threadIdx.x % Of::ABREAST, i) * 4);
      left[i] = __uint_as_float(four.x), left[i + 1] = __uint_as_float(four.y);
      left[i + 2] = __uint_as_float(four.z), left[i + 3] = __uint_as_float(four.w);
      right[i] = __uint_as_float(others.x), right[i + 1] = __uint_as_float(others.y);
      right[i + 2] = __uint_as_float(others.z), right[i + 3] = __uint_as_float(others.w);
    }
#pragma unroll
    for (int i = 0; i < Of::EACH; i++) {
#pragma unroll
      for (int j = 0; j < Of::EACH; j++) at[i][j] = fmaf(left[i], right[j], at[i][j]);
    }
  }

  template <bool A_OUTER, bool B_OUTER>
  DEVICE FmaTile(uint32_t ring, const FmaOperand<EDGE, A_OUTER>& a, const FmaOperand<EDGE, B_OUTER>& b, size_t k) {
    const uint32_t steps = uint32_t((k + Of::DEPTH - 1) / Of::DEPTH);
    auto load = [&](uint32_t step) {
      if (step < steps) {
        const uint32_t stage = ring + step % Of::STAGES * (Of::STAGE_FLOATS * 4);
        a.load(stage, size_t(step) * Of::DEPTH, k);
        b.load(stage + Of::OPERAND_FLOATS * 4, size_t(step) * Of::DEPTH, k);
      }
      end_copies();
    };
#pragma unroll
    for (int i = 0; i < Of::EACH; i++) {
#pragma unroll
      for (int j = 0; j < Of::EACH; j++) at[i][j] = 0.0f;
    }
#pragma unroll 1
    for (uint32_t step = 0; step < Of::STAGES - 1; step++) load(step);
#pragma unroll 1
    for (uint32_t step = 0; step < steps; step++) {
      // This step is there, and all warps have left the one before it, whose place is free.
      await_copies<Of::STAGES - 2>();
      __syncthreads();
      load(step + Of::STAGES - 1);
      const uint32_t left = ring + step % Of::STAGES * (Of::STAGE_FLOATS * 4), right = left + Of::OPERAND_FLOATS * 4;
      // No zeros are added behind the last k: they would change a sum of -0.
      const uint32_t depth = uint32_t(min(k - size_t(step) * Of::DEPTH, size_t(Of::DEPTH)));
      if (depth == Of::DEPTH) {
#pragma unroll
        for (uint32_t i = 0; i < Of::DEPTH; i++) add(left + i * (Of::PITCH * 4), right + i * (Of::PITCH * 4));
      } else {
#pragma unroll 1
        for (uint32_t i = 0; i < depth; i++) add(left + i * (Of::PITCH * 4), right + i * (Of::PITCH * 4));
      }
    }
  }

  // Calls result(at, column, count, sums) for each four neighbours, of which `count` are there: where they stand in out, and in which column.
  template <typename Result> DEVICE void over(const Place<EDGE>& place, size_t n, uint32_t rows, uint32_t columns, Result result) const {
#pragma unroll
    for (int i = 0; i < Of::EACH; i++) {
      const uint32_t row = part_of_thread<EDGE>(threadIdx.x / Of::ABREAST, i);
      if (row >= rows) continue;
#pragma unroll
      for (int j = 0; j < Of::EACH; j += 4) {
        const uint32_t column = part_of_thread<EDGE>(threadIdx.x % Of::ABREAST, j);
        if (column >= columns) continue;
        result((place.row + row) * n + place.column + column, place.column + column, min(columns - column, 4), &at[i][j]);
      }
    }
  }
};

// A tile of out[m, n]; `bias` may be null. ONTO: added to what is there.
template <int EDGE, bool A_OUTER, bool B_OUTER, bool ONTO>
DEVICE void multiply_floats(
    float* out, const float* a, const float* b, const float* bias, size_t m, size_t n, size_t k, size_t a_stride, size_t b_stride) {
  extern __shared__ __align__(128) uint4 shared[];
  const Place<EDGE> place(m, n);
  const FmaOperand<EDGE, A_OUTER> rows(a, a_stride, place.row, m);
  const FmaOperand<EDGE, B_OUTER> columns(b, b_stride, place.column, n);
  const FmaTile<EDGE> tile(shared_address(shared), rows, columns, k);
  const bool packed = is_aligned(out) && n % 4 == 0;
  tile.over(place, n, rows.there, columns.there, [&](size_t at, size_t column, uint32_t count, const float* sums) {
    float four[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) four[i] = bias != nullptr && i < count ? sums[i] + bias[column + i] : sums[i];
    if (packed) {
      // Lanes side by side fill whole sectors; without this they fill them in four accesses.
      if (ONTO) {
        const float4 old = *reinterpret_cast<const float4*>(out + at);
        four[0] += old.x, four[1] += old.y, four[2] += old.z, four[3] += old.w;
      }
      store_16_global(
          out + at, make_uint4(__float_as_uint(four[0]), __float_as_uint(four[1]), __float_as_uint(four[2]), __float_as_uint(four[3])));
    } else {
#pragma unroll
      for (uint32_t i = 0; i < 4; i++) {
        if (i < count) out[at + i] = ONTO ? four[i] + out[at + i] : four[i];
      }
    }
  });
}
