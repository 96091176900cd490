// The backward pass of attention for f32, by fused multiply-adds: the structure of attention_backward.cu, 32 queries and 32 keys at a time.
#pragma once

#include "attention_fma.cuh"

// Weights, and gradients of scaled scores, of 32 rows and 32 columns.
struct FmaWeights {
  float *weights, *gradients;

  DEVICE FmaWeights(float* at) : weights(at), gradients(at + FMA_ROWS * WEIGHT_STRIDE) {}
};

template <int D>
DEVICE void of_keys_fma(float* dqkv, const float* dout, const float* qkv, const float2* rows, const uint2* bounds, const uint32_t* starts,
                        const Geometry& geometry, const Scales& scales) {
  extern __shared__ __align__(128) uint4 shared[];
  float* k = reinterpret_cast<float*>(shared);
  float *v = k + FmaTile<D>::FLOATS, *q = v + FmaTile<D>::FLOATS, *douts = q + FmaTile<D>::FLOATS;
  const FmaWeights to(douts + FmaTile<D>::FLOATS);
  const uint32_t t = geometry.t, dim = geometry.dim, group = geometry.query / geometry.kv;
  const Place place(geometry, geometry.kv, (t + FMA_ROWS - 1) / FMA_ROWS);
  const uint32_t begin = place.tile * FMA_ROWS, end = min(t, begin + FMA_ROWS);
  const size_t row = size_t(place.sequence) * t, stride = size_t(geometry.heads()) * dim, o_stride = size_t(geometry.query) * dim;
  const float* qs = qkv + row * stride;
  const size_t k_at = size_t(geometry.query + place.head) * dim, v_at = k_at + size_t(geometry.kv) * dim;
  load_floats<D>(k, qs + k_at, stride, dim, begin, t);
  load_floats<D>(v, qs + v_at, stride, dim, begin, t);
  const uint32_t last_query = last_seeing<FMA_THREADS>(bounds + size_t(place.sequence) * ((t + 31) / 32), t, end, end);

  FmaSums<D> dk, dv;
  dk.clear(), dv.clear();
  for (uint32_t head = place.head * group; head < (place.head + 1) * group; head++) {
    for (uint32_t first = begin; first < last_query; first += FMA_ROWS) {
      __syncthreads();
      load_floats<D>(q, qs + size_t(head) * dim, stride, dim, first, t);
      load_floats<D>(douts, dout + row * o_stride + size_t(head) * dim, o_stride, dim, first, t);
      __syncthreads();
      float weights[2][2], gradients[2][2];
      multiply_floats<D>(weights, k, q);
      multiply_floats<D>(gradients, v, douts);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint32_t query = first + x_of_block() + j * SIDE, seen = geometry.first_key_of(starts + row, query);
        const float2 of_row = query < t ? rows[(size_t(place.sequence) * geometry.query + head) * t + query] : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const uint32_t key = begin + y_of_block() + i * SIDE;
          const bool hidden = key < seen || key > query;
          weights[i][j] = hidden ? 0.0f : exp2_fast(fmaf(weights[i][j], scales.binary, -of_row.x));
          gradients[i][j] = hidden ? 0.0f : weights[i][j] * (gradients[i][j] - of_row.y);
        }
      }
      store_weights(to.weights, weights);
      store_weights(to.gradients, gradients);
      __syncthreads();
      dv.add(to.weights, douts);
      dk.add(to.gradients, q);
    }
  }
  const float factors[2] = {scales.natural, scales.natural};
  dk.scale(factors);
  dk.store(dqkv + row * stride + k_at, stride, dim, begin, end);
  dv.store(dqkv + row * stride + v_at, stride, dim, begin, end);
}

template <int D>
DEVICE void of_queries_fma(float* dqkv, const float* dout, const float* qkv, const float2* rows, const uint32_t* starts,
                           const Geometry& geometry, const Scales& scales) {
  extern __shared__ __align__(128) uint4 shared[];
  float* q = reinterpret_cast<float*>(shared);
  float *douts = q + FmaTile<D>::FLOATS, *k = douts + FmaTile<D>::FLOATS, *v = k + FmaTile<D>::FLOATS;
  const FmaWeights to(v + FmaTile<D>::FLOATS);
  const uint32_t t = geometry.t, dim = geometry.dim, tiles = (t + FMA_ROWS - 1) / FMA_ROWS;
  const Place place(geometry, geometry.query, tiles);
  const uint32_t begin = (tiles - 1 - place.tile) * FMA_ROWS, end = min(t, begin + FMA_ROWS);
  const size_t row = size_t(place.sequence) * t, stride = size_t(geometry.heads()) * dim, o_stride = size_t(geometry.query) * dim;
  const float* qs = qkv + row * stride;
  const size_t k_at = size_t(geometry.query + place.head / (geometry.query / geometry.kv)) * dim, v_at = k_at + size_t(geometry.kv) * dim;
  load_floats<D>(q, qs + size_t(place.head) * dim, stride, dim, begin, end);
  load_floats<D>(douts, dout + row * o_stride + size_t(place.head) * dim, o_stride, dim, begin, end);

  const uint32_t lowest = lowest_of_warp(geometry.first_key_of(starts + row, begin + lane()));
  uint32_t seen[2];
  float2 of_row[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t query = begin + y_of_block() + i * SIDE;
    seen[i] = geometry.first_key_of(starts + row, query);
    of_row[i] = query < t ? rows[(size_t(place.sequence) * geometry.query + place.head) * t + query] : make_float2(0.0f, 0.0f);
  }
  FmaSums<D> dq;
  dq.clear();
  for (uint32_t key = lowest / FMA_ROWS * FMA_ROWS; key < end; key += FMA_ROWS) {
    __syncthreads();
    load_floats<D>(k, qs + k_at, stride, dim, key, end);
    load_floats<D>(v, qs + v_at, stride, dim, key, end);
    __syncthreads();
    float weights[2][2], gradients[2][2];
    multiply_floats<D>(weights, q, k);
    multiply_floats<D>(gradients, douts, v);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t query = begin + y_of_block() + i / 2 * SIDE, column = key + x_of_block() + i % 2 * SIDE;
      const bool hidden = column < seen[i / 2] || column > query;
      const float weight = hidden ? 0.0f : exp2_fast(fmaf(weights[i / 2][i % 2], scales.binary, -of_row[i / 2].x));
      gradients[i / 2][i % 2] = hidden ? 0.0f : weight * (gradients[i / 2][i % 2] - of_row[i / 2].y);
    }
    store_weights(to.gradients, gradients);
    __syncthreads();
    dq.add(to.gradients, k);
  }
  const float factors[2] = {scales.natural, scales.natural};
  dq.scale(factors);
  dq.store(dqkv + row * stride + size_t(place.head) * dim, stride, dim, begin, end);
}
