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

  DEVICE size_t columns() const { return size_t(query + 2 * kv) * dim; }
  // The first key that row q of a sequence sees, from the starts of its rows; the last is q itself. A row beyond the end sees itself alone.
  DEVICE uint32_t first_key_of(const uint32_t* starts, uint32_t q) const {
    if (q >= t) return q;
    uint32_t start = starts[q];
    if (start > q) trap();
    return max(start, q + 1 > window ? q + 1 - window : 0);
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
