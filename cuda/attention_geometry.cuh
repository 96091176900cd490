// What all attention kernels share: what they are told, which rows a block has, what a row sees.
#pragma once

#include "prelude.cuh"

#define LN_2 0.69314718f
#define LOG2_E 1.44269504f

// What all attention kernels are told. Row q of a sequence sees key k when starts[q] <= k <= q and q - window < k.
struct Geometry {
  uint32_t t, query, kv, dim, window;
  // Heads of sequences (`lanes`) that run side by side, so that their keys and values stay in the L2 cache.
  uint32_t section;

  // Heads of a row of qkv.
  DEVICE uint32_t heads() const { return query + 2 * kv; }
  // The first key that row q of a sequence sees, from its start; the last is q itself.
  DEVICE uint32_t first_key(uint32_t start, uint32_t q) const { return max(start, q + 1 > window ? q + 1 - window : 0); }

  // The same from the starts of all rows of the sequence. A row beyond the end sees itself alone.
  DEVICE uint32_t first_key_of(const uint32_t* starts, uint32_t q) const {
    if (q >= t) return q;
    if (starts[q] > q) trap();
    return first_key(starts[q], q);
  }
};

// The sequence, head and tile of a block: sections one after the other, in each the tiles one after the other for all its lanes.
struct Place {
  uint32_t sequence, head, tile;

  DEVICE Place(const Geometry& geometry, uint32_t heads, uint32_t tiles) {
    uint32_t lanes = gridDim.x / tiles, of_section = geometry.section * tiles;
    uint32_t start = blockIdx.x / of_section * geometry.section, rest = blockIdx.x % of_section;
    uint32_t width = min(geometry.section, lanes - start);
    uint32_t lane = start + rest % width;
    tile = rest / width;
    sequence = lane / heads;
    head = lane % heads;
  }
};

// Over the warp.
DEVICE uint32_t lowest_of_warp(uint32_t x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) x = min(x, __shfl_xor_sync(ALL_LANES, x, distance));
  return x;
}

DEVICE uint32_t highest_of_warp(uint32_t x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, distance));
  return x;
}

// The end of the last 32 rows of a sequence of which one sees a key before `end`. `bounds`: for each 32 rows the least and the greatest
// first key. `least`: an answer that is sure not to be too great. A block's part of `bounds` may begin in the middle of a sector.
template <int THREADS> DEVICE uint32_t last_seeing(const uint2* bounds, uint32_t rows, uint32_t end, uint32_t least) {
  __shared__ uint32_t of_warps[THREADS / WARP];
  uint32_t last = least;
  for (uint32_t at = least / 32 + threadIdx.x; at * 32 < rows; at += THREADS) {
    if (bounds[at].x < end) last = at * 32 + 32;
  }
  last = highest_of_warp(last);
  if (lane() == 0) of_warps[warp()] = last;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < THREADS / WARP; i++) last = max(last, of_warps[i]);
  return last;
}

// The first key that a block's rows see, that a warp's rows see, and the first that all of a warp's rows see.
struct Seen {
  uint32_t of_block, of_warp, by_all;
};

// Fills `first_keys`, in shared memory, for the QUERIES of a block from `begin` on, of which a warp has ROWS.
template <int QUERIES, int THREADS, int ROWS>
DEVICE Seen what_is_seen(uint32_t* first_keys, const Geometry& geometry, const uint32_t* starts, uint32_t begin) {
  for (uint32_t i = threadIdx.x; i < QUERIES; i += THREADS) first_keys[i] = geometry.first_key_of(starts, begin + i);
  __syncthreads();
  uint32_t lowest = first_keys[lane()];
#pragma unroll
  for (int i = WARP; i < QUERIES; i += WARP) lowest = min(lowest, first_keys[i + lane()]);
  uint32_t own = first_keys[warp() * ROWS + lane() % ROWS];
  return {lowest_of_warp(lowest), lowest_of_warp(own), highest_of_warp(own)};
}

// Of scores, and of scores as powers of two.
struct Scales {
  float natural, binary;
};
