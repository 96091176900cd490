// Products of f32 tiles by fused multiply-adds, for the f32 forms of the attention kernels: made to be right, not fast.
//
// A block is 256 threads, 16 x 16: thread (y, x) has rows y and y + 16 of a product, and of those columns x and x + 16 where they are rows
// of another tile, or x * 4 and the next three of every 64 where they are columns. A tile is 32 rows of D elements, 4 more apart: rows that are
// read side by side begin in different banks.
#pragma once

#include "attention_geometry.cuh"

enum { FMA_THREADS = 256, SIDE = 16, FMA_ROWS = 2 * SIDE, WEIGHT_STRIDE = FMA_ROWS + 4 };

template <int D> struct FmaTile {
  enum { STRIDE = D + 4, FLOATS = FMA_ROWS * STRIDE };
};

DEVICE uint32_t y_of_block() { return threadIdx.x / SIDE; }
DEVICE uint32_t x_of_block() { return threadIdx.x % SIDE; }

// Over the threads of one y.
template <typename Reduction> DEVICE float over_side(float x) {
#pragma unroll
  for (int distance = SIDE / 2; distance > 0; distance /= 2) x = Reduction::of(x, __shfl_xor_sync(ALL_LANES, x, distance));
  return x;
}

// Rows first.. of `from`, zeros from `end` on and beyond `dim`.
template <int D> DEVICE void load_floats(float* tile, const float* from, size_t stride, uint32_t dim, uint32_t first, uint32_t end) {
#pragma unroll 4
  for (uint32_t index = threadIdx.x; index < FMA_ROWS * D; index += FMA_THREADS) {
    uint32_t row = index / D, column = index % D;
    bool there = first + row < end && column < dim;
    tile[row * FmaTile<D>::STRIDE + column] = there ? from[(first + row) * stride + column] : 0.0f;
  }
}

// a b^T
template <int D> DEVICE void multiply_floats(float (&products)[2][2], const float* a, const float* b) {
  a += y_of_block() * FmaTile<D>::STRIDE, b += x_of_block() * FmaTile<D>::STRIDE;
#pragma unroll
  for (int i = 0; i < 4; i++) products[i / 2][i % 2] = 0.0f;
#pragma unroll 4
  for (int k = 0; k < D; k += 4) {
    float4 left[2], right[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      left[i] = *reinterpret_cast<const float4*>(a + i * SIDE * FmaTile<D>::STRIDE + k);
      right[i] = *reinterpret_cast<const float4*>(b + i * SIDE * FmaTile<D>::STRIDE + k);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float4 l = left[i / 2], r = right[i % 2];
      float& sum = products[i / 2][i % 2];
      sum = fmaf(l.w, r.w, fmaf(l.z, r.z, fmaf(l.y, r.y, fmaf(l.x, r.x, sum))));
    }
  }
}

// Puts a thread's weights where `add_floats` finds them.
DEVICE void store_weights(float* to, const float (&weights)[2][2]) {
#pragma unroll
  for (int i = 0; i < 4; i++) to[(y_of_block() + i / 2 * SIDE) * WEIGHT_STRIDE + x_of_block() + i % 2 * SIDE] = weights[i / 2][i % 2];
}

// A thread's sums: two rows, four of every 64 columns.
template <int D> struct FmaSums {
  float at[2][D / 64][4];

  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 2 * D / 16; i++) at[i / (D / 16)][i / 4 % (D / 64)][i % 4] = 0.0f;
  }

  DEVICE void scale(const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < 2 * D / 16; i++) at[i / (D / 16)][i / 4 % (D / 64)][i % 4] *= factors[i / (D / 16)];
  }

  // += weights tile
  DEVICE void add(const float* weights, const float* tile) {
    weights += y_of_block() * WEIGHT_STRIDE, tile += x_of_block() * 4;
#pragma unroll 4
    for (int k = 0; k < FMA_ROWS; k++) {
#pragma unroll
      for (int part = 0; part < D / 64; part++) {
        float4 right = *reinterpret_cast<const float4*>(tile + k * FmaTile<D>::STRIDE + part * 64);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float left = weights[i * SIDE * WEIGHT_STRIDE + k];
          at[i][part][0] = fmaf(left, right.x, at[i][part][0]);
          at[i][part][1] = fmaf(left, right.y, at[i][part][1]);
          at[i][part][2] = fmaf(left, right.z, at[i][part][2]);
          at[i][part][3] = fmaf(left, right.w, at[i][part][3]);
        }
      }
    }
  }

  // To rows first.., those before `end`. One float at a time: each of a thread's four accesses touches the same sectors.
  DEVICE void store(float* to, size_t stride, uint32_t dim, uint32_t first, uint32_t end) const {
#pragma unroll
    for (int i = 0; i < 2 * D / 16; i++) {
      uint32_t row = first + y_of_block() + i / (D / 16) * SIDE, column = i / 4 % (D / 64) * 64 + x_of_block() * 4 + i % 4;
      if (row < end && column < dim) to[row * stride + column] = at[i / (D / 16)][i / 4 % (D / 64)][i % 4];
    }
  }
};
