// Rows of a table, looked up by id and by position, and their gradient.
//
// The gradient of a row of the table is a sum over the rows of dy that have its id, in their order. `sort` finds that order, by counting
// for every row how many come before it by (id, row); `backward` then lets one warp walk over the rows of one id. Both take at most CHUNK rows
// at a time, so counting stays cheap; the chunks of a call follow each other, which keeps the order.
#include "prelude.cuh"

enum { THREADS = 256, WARPS = THREADS / WARP, CHUNK = 8192 };

// The row of an id in a part of the table that starts at `first`, or at least `local` where it is not there.
DEVICE size_t local_row(uint32_t id, size_t first) { return size_t(id) - first; }

// y[i] = table[ids[i] - first], zero where the id is not in this part; or y[i] += table[ids[i] - first], where every id is.
//
// A warp takes 4 packs of 16 bytes a lane of one row, all read before the first is written; slabs: how many of these a row has.
// sizeof(T) bytes an element read and written, and as much again read where rows are added. Any width: where rows or their parts do not start
// at a multiple of 16 bytes, lanes take elements one by one, side by side.
template <typename T, bool ADDS>
DEVICE void look_up(T* y, const uint32_t* ids, const T* table, size_t n, size_t c, size_t first, size_t local, size_t slabs) {
  constexpr int COUNT = Pack<T>::COUNT, PACKS = 4, WIDTH = WARP * COUNT * PACKS;
  size_t item = size_t(blockIdx.x) * WARPS + warp();
  if (item >= n * slabs) return;
  size_t row = item / slabs, start = item % slabs * WIDTH, from = local_row(ids[row], first);
  int width = int(min(c - start, size_t(WIDTH)));
  bool here = from < local;
  // The CPU stops at a position that no table has, too.
  if (ADDS && !here) __trap();
  // An id that is nowhere reads the row that the table starts with, and throws it away.
  const T* source = table + (here ? from : 0) * c + start;
  T* out = y + row * c + start;
  if (c % COUNT == 0 && is_aligned(y) && is_aligned(table)) {
    Pack<T> packs[PACKS], old[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
      int at = (k * WARP + lane()) * COUNT;
      if (at < width && here) packs[k] = load_pack(source + at);
      if (at < width && ADDS) old[k] = load_pack(out + at);
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
      int at = (k * WARP + lane()) * COUNT;
      if (at >= width) continue;
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        if (!here) packs[k].at[i] = from_float<T>(0.0f);
        if (ADDS) packs[k].at[i] = from_float<T>(to_float(old[k].at[i]) + to_float(packs[k].at[i]));
      }
      store_whole(out + at, packs[k]);
    }
  } else {
    for (int at = lane(); at < width; at += WARP) {
      T x = here ? source[at] : from_float<T>(0.0f);
      out[at] = ADDS ? from_float<T>(to_float(out[at]) + to_float(x)) : x;
    }
  }
}

#define LOOK_UP(T, suffix) \
  KERNEL(THREADS) \
  embedding_forward_##suffix(T* y, const uint32_t* ids, const T* table, size_t n, size_t c, size_t first, size_t local, size_t slabs) { \
    look_up<T, false>(y, ids, table, n, c, first, local, slabs); \
  } \
  KERNEL(THREADS) \
  embedding_positions_forward_##suffix(T* x, const uint32_t* positions, const T* table, size_t n, size_t c, size_t local, size_t slabs) { \
    look_up<T, true>(x, positions, table, n, c, 0, local, slabs); \
  }
EXPORT_ALL(LOOK_UP)

// Ids in sorted order: `order` holds the rows, `keys` their rows of the table. Ids that are not in this part come last, as ELSEWHERE.
#define ELSEWHERE 0xfffffffeu
#define NOTHING 0xffffffffu

// The stable order of n <= CHUNK ids. A block finds the places of 64 of them, four lanes each; all ids lie in shared memory, from where a lane
// reads four at a time: the four lanes of an id read 16 neighbours, the ids of a warp the same, so no two words share a bank. Bytes: 4 a row
// for each block, and 8 written, each row's to its place in the order, in sectors of their own: 32 KiB at most.
KERNEL(THREADS) embedding_sort(uint32_t* order, uint32_t* keys, const uint32_t* ids, uint32_t n, size_t first, size_t local) {
  constexpr int LANES = 4, BATCH = 4 * LANES;
  __shared__ alignas(16) uint32_t all[CHUNK];
  uint32_t padded = (n + BATCH - 1) / BATCH * BATCH;
  for (uint32_t j = threadIdx.x; j < padded; j += THREADS) {
    size_t row = j < n ? local_row(ids[j], first) : 0;
    all[j] = j >= n ? NOTHING : row < local ? uint32_t(row) : ELSEWHERE;
  }
  __syncthreads();
  uint32_t i = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES, part = threadIdx.x % LANES;
  uint32_t key = i < n ? all[i] : NOTHING, before = 0;
  for (uint32_t j = part * 4; j < padded; j += BATCH) {
    uint4 four = *reinterpret_cast<const uint4*>(all + j);
    before += four.x < key + (j < i);
    before += four.y < key + (j + 1 < i);
    before += four.z < key + (j + 2 < i);
    before += four.w < key + (j + 3 < i);
  }
  before += __shfl_xor_sync(ALL_LANES, before, 1);
  before += __shfl_xor_sync(ALL_LANES, before, 2);
  if (i < n && part == 0) {
    order[before] = i;
    keys[before] = key;
  }
}

template <typename T> struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// dw[key] += the rows of dy in `order` that have the key, one after the other.
//
// A warp takes 128 columns of one id: the warp that stands at the id's first place in the order does it, the others leave. Eight rows are
// under way at a time. sizeof(T) bytes an element of dy, and 8 for each element of dw that is touched. Any width and alignment: lanes then take
// columns one by one, side by side.
template <typename T>
DEVICE void backward(float* dw, const T* dy, const uint32_t* order, const uint32_t* keys, uint32_t n, size_t c, size_t slabs) {
  constexpr int COUNT = 4, WIDTH = WARP * COUNT, AHEAD = 8;
  size_t item = size_t(blockIdx.x) * WARPS + warp();
  if (item >= n * slabs) return;
  uint32_t place = uint32_t(item / slabs), key = keys[place];
  if (key == ELSEWHERE || (place > 0 && keys[place - 1] == key)) return;
  size_t start = item % slabs * WIDTH;
  int width = int(min(c - start, size_t(WIDTH)));
  bool packed = c % COUNT == 0 && is_aligned(dw) && reinterpret_cast<size_t>(dy) % sizeof(Four<T>) == 0;
  // Columns of this lane: four side by side, or every 32nd.
  int step = packed ? 1 : WARP, first = packed ? lane() * COUNT : lane();
  float* out = dw + key * c + start;
  const T* in = dy + start;
  float sums[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; i++) sums[i] = 0.0f;
  if (packed && first < width) {
    Four<float> old = *reinterpret_cast<const Four<float>*>(out + first);
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[i] = old.at[i];
  } else if (!packed) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (first + i * step < width) sums[i] = out[first + i * step];
    }
  }
  while (true) {
    uint32_t candidate = place + lane();
    bool same = candidate < n && keys[candidate] == key;
    uint32_t row = same ? order[candidate] : 0;
    int count = __popc(__ballot_sync(ALL_LANES, same));
    for (int k = 0; k < count; k += AHEAD) {
      Four<T> terms[AHEAD] = {};
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        size_t from = __shfl_sync(ALL_LANES, row, (k + a) % WARP) * c;
        if (k + a >= count) continue;
        if (packed) {
          if (first < width) terms[a] = *reinterpret_cast<const Four<T>*>(in + from + first);
        } else {
#pragma unroll
          for (int i = 0; i < COUNT; i++) {
            if (first + i * step < width) terms[a].at[i] = in[from + first + i * step];
          }
        }
      }
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
          if (k + a < count) sums[i] += to_float(terms[a].at[i]);
        }
      }
    }
    if (count < WARP) break;
    place += WARP;
  }
  if (packed) {
    if (first < width) *reinterpret_cast<Four<float>*>(out + first) = {{sums[0], sums[1], sums[2], sums[3]}};
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (first + i * step < width) out[first + i * step] = sums[i];
    }
  }
}

#define BACKWARD(T, suffix) \
  KERNEL(THREADS) \
  embedding_backward_##suffix(float* dw, const T* dy, const uint32_t* order, const uint32_t* keys, uint32_t n, size_t c, size_t slabs) { \
    backward(dw, dy, order, keys, n, c, slabs); \
  }
EXPORT_ALL(BACKWARD)
