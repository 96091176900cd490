// Causal attention, forward: o = softmax(q k^T scale) v, and the logarithm of each row's sum of exponentials.
//
// A block takes 128 queries of one head of one sequence and goes over the keys they see, from the first on, a tile at a time; tiles that
// none of its rows sees, by causality, window or start, are left out, and the mask is applied only to tiles that some row sees in
// part. Tiles begin at multiples of their size within the sequence, and what a row gets from a tile it does not see is nothing, bit for bit.
//
// Softmax goes in base 2. A row's weights are taken relative to a maximum that is raised only when a score exceeds it by a factor of
// 2^8: each row decides for itself, and most tiles need no scaling of what was summed.
//
// Bytes: each query and result once; keys and values once per block of queries, mostly from L2 (see `Geometry::section`). The lse of a row
// are apart by the number of heads, so a block writes sectors of which it fills one float in eight; other heads' blocks fill the rest.
#include "attention_fma.cuh"
#include "attention_tiles.cuh"

// To D = 128, 128 threads of at most 255 registers: two blocks on a multiprocessor, on sm_80, too; D = 32: three. D = 256: 256 threads, one block.
// Shared memory: queries and three tiles of keys or values. D = 32: 20 KiB, 64: 40, 96: 60, 128: 68, 256: 112. No bank conflicts. Per product
// of matrix units, a warp reads 0.3 fragments of 512 bytes from there (D = 256: 0.6).
template <int D> struct Forward {
  enum {
    // Sixteen queries of a warp each: two read each key and value for 32 queries.
    ROW_TILES = D <= 128 ? 2 : 1,
    WARPS = D <= 128 ? 4 : 8,
    THREADS = WARPS * WARP,
    QUERIES = 128,
    KEYS = D <= 96 ? 64 : D <= 128 ? 48 : 32,
    QUERY_BYTES = QUERIES * D * 2,
    KEY_BYTES = KEYS * D * 2,
    // While one tile is worked on, two are on their way.
    RING = 3,
  };
};

// How far a row's scores may exceed its maximum, in base 2, before the sums are scaled down.
enum { SLACK = 8 };

// The running softmax of a lane's rows, [m][half] as in `Sums`. `sum` is this lane's part of it.
template <int ROW_TILES> struct Softmax {
  float maximum[ROW_TILES][2];
  float sum[ROW_TILES][2];

  DEVICE Softmax() {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) maximum[m][half] = -INFINITY, sum[m][half] = 0.0f;
    }
  }

  // Makes weights of scores, scales `totals` to their maximum where it changes.
  template <int KEY_TILES, int COLUMN_TILES>
  DEVICE void step(Sums<ROW_TILES, KEY_TILES>& scores, Sums<ROW_TILES, COLUMN_TILES>& totals, float scale) {
    float shrink[ROW_TILES][2];
    bool any = false;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float highest = -INFINITY;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) {
          highest = fmaxf(highest, fmaxf(scores.at[m][n][half * 2], scores.at[m][n][half * 2 + 1]));
        }
        highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 2)) * scale;
        float& old = maximum[m][half];
        bool grows = highest > old + SLACK;
        shrink[m][half] = grows ? exp2_fast(old - highest) : 1.0f;
        old = grows ? highest : old;
        any |= grows;
      }
    }
    if (__any_sync(ALL_LANES, any)) totals.over([&](int m, int, int i, float& total) { total *= shrink[m][i / 2]; });
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        // A row that has seen nothing has no maximum; its scores are all -inf.
        float base = maximum[m][half] == -INFINITY ? 0.0f : maximum[m][half];
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) {
#pragma unroll
          for (int i = half * 2; i < half * 2 + 2; i++) {
            float& score = scores.at[m][n][i];
            score = exp2_fast(fmaf(score, scale, -base));
            added += score;
          }
        }
        sum[m][half] = fmaf(sum[m][half], shrink[m][half], added);
      }
    }
  }

  // The sum over all lanes that share a row.
  DEVICE float total(int m, int half) const {
    float x = sum[m][half];
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
  }
};

template <typename T, int D>
DEVICE void forward(T* o, float* lse, const T* qkv, const uint32_t* starts, const Geometry& geometry, float scale) {
  typedef Forward<D> F;
  constexpr int ROWS = F::ROW_TILES * 16;
  extern __shared__ __align__(128) uint4 shared[];
  __shared__ uint32_t first_keys[F::QUERIES];
  const uint32_t t = geometry.t, tiles = (t + F::QUERIES - 1) / F::QUERIES;
  const Place place(geometry, geometry.query, tiles);
  // The last tile has most keys to see, and comes first.
  const uint32_t begin = (tiles - 1 - place.tile) * F::QUERIES, end = min(t, begin + F::QUERIES);
  const size_t row = size_t(place.sequence) * t;
  const uint32_t k_head = geometry.query + place.head / (geometry.query / geometry.kv), v_head = k_head + geometry.kv;
  const Seen seen = what_is_seen<F::QUERIES, F::THREADS, ROWS>(first_keys, geometry, starts + row, begin);
  const uint32_t warp_row = warp() * ROWS, warp_begin = begin + warp_row;
  const uint32_t q_tile = shared_address(shared), ring = q_tile + F::QUERY_BYTES;
  const uint32_t q_lane = q_tile + warp_row * D * 2 + rows_of_lane<D>();
  // Tiles of keys and values take turns in the ring; `slot` is that of the tile worked on.
  uint32_t slot = 0;
  auto load = [&](uint32_t tile, uint32_t head, uint32_t first) {
    if (first < end) {
      load_tile<T, D, F::KEYS, F::THREADS>(tile, rows_of(qkv, geometry, place.sequence, head, geometry.heads()), first, end);
    }
    end_copies();
  };
  auto next = [&](uint32_t head, uint32_t first) {
    // The tile to work on is there, and all warps have left the one before it, whose place is free.
    await_copies<1>();
    __syncthreads();
    load(ring + (slot == 0 ? F::RING - 1 : slot - 1) * F::KEY_BYTES, head, first);
    uint32_t tile = ring + slot * F::KEY_BYTES;
    slot = slot == F::RING - 1 ? 0 : slot + 1;
    return tile;
  };
  uint32_t key = seen.of_block / F::KEYS * F::KEYS;
  const Rows<T> queries = rows_of(qkv, geometry, place.sequence, place.head, geometry.heads());
  load_tile<T, D, F::QUERIES, F::THREADS>(q_tile, queries, begin, end);
  load(ring, k_head, key);
  load(ring + F::KEY_BYTES, v_head, key);

  Softmax<F::ROW_TILES> softmax;
  Sums<F::ROW_TILES, D / 8> totals;
  totals.clear();
  for (; key < end; key += F::KEYS) {
    const bool any = key < warp_begin + ROWS && key + F::KEYS > seen.of_warp;
    const uint32_t k_tile = next(k_head, key + F::KEYS);
    Sums<F::ROW_TILES, F::KEYS / 8> scores;
    scores.clear();
    if (any) {
      multiply_rows<T, D, D / 16>(scores, q_lane, k_tile + columns_of_lane<D>());
      if (key + F::KEYS > warp_begin + 1 || key < seen.by_all) hide(scores, first_keys + warp_row, warp_begin, key);
      softmax.step(scores, totals, scale);
    }
    const Rounded<T, F::ROW_TILES, F::KEYS / 8> weights(scores);
    const uint32_t v_tile = next(v_head, key + F::KEYS);
    if (any) multiply_columns<D>(totals, weights, v_tile + rows_of_lane<D>());
  }

  const size_t o_stride = size_t(geometry.query) * geometry.dim;
  float inverse[F::ROW_TILES][2];
#pragma unroll
  for (int m = 0; m < F::ROW_TILES; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = softmax.total(m, half);
      inverse[m][half] = 1.0f / sum;
      uint32_t at = warp_begin + m * 16 + half * 8 + lane() / 4;
      if (lane() % 4 == 0 && at < end) lse[(row + at) * geometry.query + place.head] = (softmax.maximum[m][half] + log2_fast(sum)) * LN_2;
    }
  }
  // Results go by the queries' own place, whose rows only this warp reads, before the last barrier.
  const uint32_t mine = q_tile + warp_row * D * 2;
  store_sums<T, D>(totals, mine, [&](int m, int half) { return inverse[m][half]; });
  T* to = o + (row + warp_begin) * o_stride + size_t(place.head) * geometry.dim;
  store_rows<T, D, ROWS, D>(to, o_stride, geometry.dim, mine, end > warp_begin ? end - warp_begin : 0);
}

// The same with fused multiply-adds: 32 queries and 32 keys at a time, and a running maximum.
template <int D>
DEVICE void forward_fma(float* o, float* lse, const float* qkv, const uint32_t* starts, const Geometry& geometry, float scale) {
  extern __shared__ __align__(128) uint4 shared[];
  float* q = reinterpret_cast<float*>(shared);
  float *k = q + FmaTile<D>::FLOATS, *v = k + FmaTile<D>::FLOATS, *weights = v + FmaTile<D>::FLOATS;
  const uint32_t t = geometry.t, dim = geometry.dim, tiles = (t + FMA_ROWS - 1) / FMA_ROWS;
  const Place place(geometry, geometry.query, tiles);
  const uint32_t begin = (tiles - 1 - place.tile) * FMA_ROWS, end = min(t, begin + FMA_ROWS);
  const size_t row = size_t(place.sequence) * t, stride = size_t(geometry.heads()) * dim;
  const uint32_t key_head = geometry.query + place.head / (geometry.query / geometry.kv);
  const float* qs = qkv + row * stride;
  const float* ks = qs + size_t(key_head) * dim;
  const float* vs = ks + size_t(geometry.kv) * dim;
  load_floats<D>(q, qs + size_t(place.head) * dim, stride, dim, begin, end);

  const uint32_t lowest = lowest_of_warp(geometry.first_key_of(starts + row, begin + lane()));
  uint32_t first[2];
  float maximum[2], sum[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    first[i] = geometry.first_key_of(starts + row, begin + y_of_block() + i * SIDE);
    maximum[i] = -INFINITY, sum[i] = 0.0f;
  }
  FmaSums<D> totals;
  totals.clear();
  for (uint32_t key = lowest / FMA_ROWS * FMA_ROWS; key < end; key += FMA_ROWS) {
    __syncthreads();
    load_floats<D>(k, ks, stride, dim, key, end);
    load_floats<D>(v, vs, stride, dim, key, end);
    __syncthreads();
    float scores[2][2], shrink[2];
    multiply_floats<D>(scores, q, k);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint32_t column = key + x_of_block() + j * SIDE;
        if (column < first[i] || column > begin + y_of_block() + i * SIDE) scores[i][j] = -INFINITY;
      }
      float highest = fmaxf(maximum[i], over_side<Max>(fmaxf(scores[i][0], scores[i][1])) * scale);
      // A row that has seen nothing has no maximum; its scores are all -inf.
      float base = highest == -INFINITY ? 0.0f : highest;
      shrink[i] = exp2_fast(maximum[i] - base);
      maximum[i] = highest;
      float added = 0.0f;
#pragma unroll
      for (int j = 0; j < 2; j++) added += scores[i][j] = exp2_fast(fmaf(scores[i][j], scale, -base));
      sum[i] = fmaf(sum[i], shrink[i], added);
    }
    store_weights(weights, scores);
    __syncthreads();
    totals.scale(shrink);
    totals.add(weights, v);
  }
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float all = over_side<Sum>(sum[i]);
    inverse[i] = 1.0f / all;
    uint32_t at = begin + y_of_block() + i * SIDE;
    if (x_of_block() == 0 && at < end) lse[(row + at) * geometry.query + place.head] = (maximum[i] + log2_fast(all)) * LN_2;
  }
  totals.scale(inverse);
  const size_t o_stride = size_t(geometry.query) * dim;
  totals.store(o + row * o_stride + size_t(place.head) * dim, o_stride, dim, begin, end);
}

// `scale` is that of scores, for base 2. Blocks: tiles of queries (128, f32: 32) x heads x sequences.
#define FORWARD_OF(D, T, suffix, threads, how) \
  KERNEL_ALONE(threads) attention_forward_##D##_##suffix( \
      T* o, float* lse, const T* qkv, const uint32_t* starts, uint32_t t, uint32_t query, uint32_t kv, uint32_t dim, uint32_t window, \
      uint32_t section, float scale) { \
    how(o, lse, qkv, starts, {t, query, kv, dim, window, section}, scale); \
  }
#define TILED(D) \
  FORWARD_OF(D, bf16, bf16, Forward<D>::THREADS, (forward<bf16, D>)) FORWARD_OF(D, f16, f16, Forward<D>::THREADS, (forward<f16, D>))
#define FMA(D) FORWARD_OF(D, float, f32, FMA_THREADS, forward_fma<D>)
TILED(32) TILED(64) TILED(96) TILED(128) TILED(256)
FMA(64) FMA(128) FMA(256)
