// Causal attention, backward: the gradients of queries, keys and values.
//
// Three kernels, none of which adds to what another block adds to: `dots` prepares what both others need of each row; `keys` takes a tile of
// keys and goes over all queries that see it, the query heads of its group in order and each head's queries in order; `queries` takes a
// tile of queries and goes over the keys they see, in order. Both compute the weights again, from the logarithms that the forward pass left.
// Weights and their gradients are rounded to the dtype before they are multiplied. Tiles begin at multiples of their size within the
// sequence; of those that have nothing to do with each other none is read, and the mask is applied only where it cuts a tile.
#include "attention_backward_fma.cuh"
#include "attention_tiles.cuh"

// ---- dots ----

enum { DOTS_THREADS = 256, DOTS_ROWS = 32 };

// sums[row] = sum of dout o over the columns of a head, for those of a block's rows that are there. A row goes to LANES lanes, each of
// which adds up its own chunks in order.
template <int LANES, typename T> DEVICE void sums_of_rows(float* sums, const T* dout, const T* o, size_t stride, uint32_t dim, uint32_t there) {
  constexpr uint32_t COUNT = Pack<T>::COUNT, ABREAST = DOTS_THREADS / LANES;
  const bool packed = is_aligned(dout) && is_aligned(o) && dim % COUNT == 0 && stride % COUNT == 0;
#pragma unroll
  for (uint32_t begin = 0; begin < DOTS_ROWS; begin += ABREAST) {
    const uint32_t row = begin + threadIdx.x / LANES;
    float sum = 0.0f;
    for (uint32_t column = threadIdx.x % LANES * COUNT; row < there && column < dim; column += LANES * COUNT) {
      const T *a = dout + row * stride + column, *b = o + row * stride + column;
      if (packed) {
        const Pack<T> as = load_pack(a), bs = load_pack(b);
#pragma unroll
        for (uint32_t i = 0; i < COUNT; i++) sum = fmaf(to_float(as.at[i]), to_float(bs.at[i]), sum);
      } else {
        for (uint32_t i = 0; i < COUNT && column + i < dim; i++) sum = fmaf(to_float(a[i]), to_float(b[i]), sum);
      }
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (threadIdx.x % LANES == 0) sums[row] = sum;
  }
}

// A block takes 32 rows of a head: rows[sequence, head, row] = (lse in base 2, sum of dout o), in the order in which tiles of rows are then
// read; and for each 32 rows bounds[sequence, row / 32] = (least, greatest first key). Bytes: dout and o once, in whole sectors where rows
// are aligned; an lse is one float of a sector that other heads' blocks share.
template <typename T>
DEVICE void dots(float2* rows, uint2* bounds, const T* dout, const T* o, const float* lse, const uint32_t* starts, const Geometry& geometry) {
  __shared__ float sums[DOTS_ROWS];
  const uint32_t t = geometry.t, dim = geometry.dim, tiles = (t + DOTS_ROWS - 1) / DOTS_ROWS;
  const uint32_t head = blockIdx.x % geometry.query, tile = blockIdx.x / geometry.query % tiles, sequence = blockIdx.x / geometry.query / tiles;
  const uint32_t begin = tile * DOTS_ROWS, there = min(t - begin, uint32_t(DOTS_ROWS)), chunks = (dim * sizeof(T) + 15) / 16;
  const size_t first = size_t(sequence) * t + begin, stride = size_t(geometry.query) * dim;
  const size_t at = first * stride + size_t(head) * dim;
  if (chunks <= 8) {
    sums_of_rows<8>(sums, dout + at, o + at, stride, dim, there);
  } else if (chunks <= 16) {
    sums_of_rows<16>(sums, dout + at, o + at, stride, dim, there);
  } else {
    sums_of_rows<32>(sums, dout + at, o + at, stride, dim, there);
  }
  __syncthreads();
  const uint32_t row = threadIdx.x;
  if (row < there) {
    const float binary = lse[(first + row) * geometry.query + head] * LOG2_E;
    rows[(size_t(sequence) * geometry.query + head) * t + begin + row] = make_float2(binary, sums[row]);
  }
  if (head == 0 && row < DOTS_ROWS) {
    // Rows beyond the end count like the last.
    const uint32_t key = geometry.first_key_of(starts + size_t(sequence) * t, begin + min(row, there - 1));
    const uint32_t least = lowest_of_warp(key), greatest = highest_of_warp(key);
    if (row == 0) bounds[size_t(sequence) * tiles + tile] = make_uint2(least, greatest);
  }
}

// ---- keys ----

// A warp has 16 or 32 keys and holds the sums of their gradients; scores stand with keys as rows, so that weights are at once an operand of
// the next product. To D = 64, 128 threads and two blocks on a multiprocessor; above, one block: of 256 threads, D = 256 of 128. Shared memory: keys,
// values, and queries and dout of this step and the next. D = 32: 25 KiB, 64: 49, 96: 98, 128: 130, 256: 129. No bank conflicts. Per product
// of matrix units, a warp reads 0.4 fragments of 512 bytes from there, 0.6 from D = 96 on.
template <int D> struct OfKeys {
  enum {
    ROW_TILES = D <= 64 ? 2 : 1,
    WARPS = D <= 64 || D > 128 ? 4 : 8,
    THREADS = WARPS * WARP,
    KEYS = WARPS * ROW_TILES * 16,
    QUERIES = D <= 64 || D > 128 ? 32 : 64,
    // Beyond 128 columns, the sums of two gradients fill the registers: a block has half of them, and there are twice as many blocks.
    PARTS = D <= 128 ? 1 : 2,
    COLUMNS = D / PARTS,
    KEY_BYTES = KEYS * D * 2,
    QUERY_BYTES = QUERIES * D * 2,
    // Of the queries of a step: themselves, dout, (lse, dot), starts, bounds.
    ROWS_AT = 2 * QUERY_BYTES,
    STARTS_AT = ROWS_AT + QUERIES * 8,
    BOUNDS_AT = STARTS_AT + QUERIES * 4,
    STAGE_BYTES = BOUNDS_AT + 128,
  };
};

template <typename T, int D>
DEVICE void of_keys(T* dqkv, const T* dout, const T* qkv, const float2* rows, const uint2* bounds, const uint32_t* starts,
                    const Geometry& geometry, const Scales& scales) {
  typedef OfKeys<D> K;
  constexpr uint32_t ROWS = K::ROW_TILES * 16, BOUNDS = K::QUERIES / 32;
  extern __shared__ __align__(128) uint4 shared[];
  const uint32_t t = geometry.t, group = geometry.query / geometry.kv;
  // The first tile is seen by most queries, and comes first.
  const Place place(geometry, geometry.kv * K::PARTS, (t + K::KEYS - 1) / K::KEYS);
  // `part`: the first chunk of the columns of this block's results.
  const uint32_t key_head = place.head / K::PARTS, part = place.head % K::PARTS * (K::COLUMNS / 8);
  const uint32_t begin = place.tile * K::KEYS, end = min(t, begin + K::KEYS);
  const uint32_t k_head = geometry.query + key_head, v_head = k_head + geometry.kv;

  const uint32_t k_tile = shared_address(shared), v_tile = k_tile + K::KEY_BYTES, stages = v_tile + K::KEY_BYTES;
  auto rows_of_head = [&](uint32_t head) { return rows_of(qkv, geometry, place.sequence, head, geometry.heads()); };
  auto load_queries = [&](uint32_t head, uint32_t first, uint32_t stage) {
    load_tile<T, D, K::QUERIES, K::THREADS>(stage, rows_of_head(head), first, t);
    const Rows<T> douts = rows_of(dout, geometry, place.sequence, head, geometry.query);
    load_tile<T, D, K::QUERIES, K::THREADS>(stage + K::QUERY_BYTES, douts, first, t);
    const size_t sequence = opaque(place.sequence);
    if (threadIdx.x < K::QUERIES) {
      const uint32_t q = first + threadIdx.x;
      const size_t from = q < t ? q : 0;
      copy_8_async(stage + K::ROWS_AT + threadIdx.x * 8, rows + (sequence * geometry.query + head) * t + from, q < t ? 8 : 0);
      copy_4_async(stage + K::STARTS_AT + threadIdx.x * 4, starts + sequence * t + from, q < t ? 4 : 0);
    }
    if (threadIdx.x < BOUNDS) {
      // A part beyond the end counts like the one before it.
      const uint32_t count = (t + 31) / 32;
      copy_8_async(stage + K::BOUNDS_AT + threadIdx.x * 8, bounds + sequence * count + min(first / 32 + threadIdx.x, count - 1), 8);
    }
    end_copies();
  };
  // Queries from this block's first key on see it, up to the last 32 of which one sees a key of it.
  const uint32_t first_query = begin / K::QUERIES * K::QUERIES;
  uint32_t head = key_head * group, query = first_query;
  load_tile<T, D, K::KEYS, K::THREADS>(k_tile, rows_of_head(k_head), begin, t);
  load_tile<T, D, K::KEYS, K::THREADS>(v_tile, rows_of_head(v_head), begin, t);
  load_queries(head, query, stages);
  const uint32_t last_query = last_seeing<K::THREADS>(bounds + size_t(place.sequence) * ((t + 31) / 32), t, end, end);

  const uint32_t warp_row = warp() * ROWS, warp_begin = begin + warp_row;
  const uint32_t k_lane = k_tile + warp_row * D * 2 + rows_of_lane<D>();
  Sums<K::ROW_TILES, K::COLUMNS / 8> dk, dv;
  dk.clear(), dv.clear();
  for (uint32_t step = 0; head < (key_head + 1) * group; step++) {
    const uint32_t stage = stages + step % 2 * K::STAGE_BYTES, first = query;
    query += K::QUERIES;
    if (query >= last_query) query = first_query, head++;
    await_copies<0>();
    __syncthreads();
    if (head < (key_head + 1) * group) load_queries(head, query, stages + (step + 1) % 2 * K::STAGE_BYTES);

    uint2 seen = load_8_shared(stage + K::BOUNDS_AT);
    if (BOUNDS == 2) {
      uint2 more = load_8_shared(stage + K::BOUNDS_AT + 8);
      seen = make_uint2(min(seen.x, more.x), max(seen.y, more.y));
    }
    if (warp_begin >= first + K::QUERIES || warp_begin + ROWS <= seen.x) continue;
    const bool cut = warp_begin + ROWS > first + 1 || warp_begin < seen.y;
    const uint32_t q_tile = stage, dout_tile = stage + K::QUERY_BYTES;
    Sums<K::ROW_TILES, K::QUERIES / 8> weights, gradients;
    weights.clear();
    multiply_rows<T, D, 2>(weights, k_lane, q_tile + columns_of_lane<D>());
    if (cut) {
      weights.over([&](int m, int n, int i, float& weight) {
        uint32_t key = warp_begin + m * 16 + i / 2 * 8 + lane() / 4, column = n * 8 + lane() % 4 * 2 + i % 2, q = first + column;
        uint32_t start = max(load_4_shared(stage + K::STARTS_AT + column * 4), q + 1 > geometry.window ? q + 1 - geometry.window : 0);
        if (key > q || key < start) weight = -INFINITY;
      });
    }
    const uint32_t of_rows = stage + K::ROWS_AT + lane() % 4 * 16;
#pragma unroll
    for (int n = 0; n < K::QUERIES / 8; n++) {
      const uint4 two = load_16_shared(of_rows + n * 64);
      const float lse[2] = {__uint_as_float(two.x), __uint_as_float(two.z)};
#pragma unroll
      for (int m = 0; m < K::ROW_TILES; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) weights.at[m][n][i] = exp2_fast(fmaf(weights.at[m][n][i], scales.binary, -lse[i % 2]));
      }
    }
    multiply_columns<D>(dv, Rounded<T, K::ROW_TILES, K::QUERIES / 8>(weights), dout_tile + rows_of_lane<D>(), part / 2);
    gradients.clear();
    multiply_rows<T, D, 2>(gradients, k_lane + K::KEY_BYTES, dout_tile + columns_of_lane<D>());
    float dots[K::QUERIES / 8][2];
#pragma unroll
    for (int n = 0; n < K::QUERIES / 8; n++) {
      const uint4 two = load_16_shared(of_rows + n * 64);
      dots[n][0] = __uint_as_float(two.y), dots[n][1] = __uint_as_float(two.w);
    }
    differentiate(gradients, weights, cut, [&](int, int n, int i) { return dots[n][i % 2]; });
    multiply_columns<D>(dk, Rounded<T, K::ROW_TILES, K::QUERIES / 8>(gradients), q_tile + rows_of_lane<D>(), part / 2);
  }

  // Results go by the place of the keys and values, whose rows only this warp reads.
  const uint32_t mine = k_tile + warp_row * D * 2, rows_there = end > warp_begin ? end - warp_begin : 0;
  __syncwarp();
  store_sums<T, D>(dk, mine, [&](int, int) { return scales.natural; }, part);
  store_sums<T, D>(dv, mine + K::KEY_BYTES, [](int, int) { return 1.0f; }, part);
  const Rows<T> to = rows_of<T>(dqkv, geometry, place.sequence, k_head, geometry.heads());
  T* dks = const_cast<T*>(to.at) + warp_begin * to.stride;
  store_rows<T, D, ROWS, K::COLUMNS>(dks, to.stride, to.dim, mine, rows_there, part);
  store_rows<T, D, ROWS, K::COLUMNS>(dks + size_t(geometry.kv) * to.dim, to.stride, to.dim, mine + K::KEY_BYTES, rows_there, part);
}

// ---- queries ----

// A warp has 32 queries (D = 256: 16), a block 128 (64). While one tile of keys is worked on, the one of values is on its way, and so on
// in turn. 128 threads of at most 255 registers: two blocks on a multiprocessor, of sm_80, too. Shared memory: D = 32: 24 KiB, 64: 48, 96: 60,
// 128: 80, 256: 96 (one block on sm_80). No bank conflicts. Per product, 0.4 fragments (D = 256: 0.7).
template <int D> struct OfQueries {
  enum {
    ROW_TILES = D <= 128 ? 2 : 1,
    WARPS = 4,
    THREADS = WARPS * WARP,
    QUERIES = WARPS * ROW_TILES * 16,
    KEYS = D <= 64 ? 64 : 32,
    QUERY_BYTES = QUERIES * D * 2,
    KEY_BYTES = KEYS * D * 2,
  };
};

template <typename T, int D>
DEVICE void of_queries(T* dqkv, const T* dout, const T* qkv, const float2* rows, const uint32_t* starts, const Geometry& geometry,
                       const Scales& scales) {
  typedef OfQueries<D> Q;
  constexpr uint32_t ROWS = Q::ROW_TILES * 16;
  extern __shared__ __align__(128) uint4 shared[];
  __shared__ uint32_t first_keys[Q::QUERIES];
  const uint32_t t = geometry.t, tiles = (t + Q::QUERIES - 1) / Q::QUERIES;
  const Place place(geometry, geometry.query, tiles);
  const uint32_t begin = (tiles - 1 - place.tile) * Q::QUERIES, end = min(t, begin + Q::QUERIES);
  const uint32_t k_head = geometry.query + place.head / (geometry.query / geometry.kv), v_head = k_head + geometry.kv;
  const Seen seen = what_is_seen<Q::QUERIES, Q::THREADS, ROWS>(first_keys, geometry, starts + size_t(place.sequence) * t, begin);
  const uint32_t q_tile = shared_address(shared), dout_tile = q_tile + Q::QUERY_BYTES;
  const uint32_t k_tile = dout_tile + Q::QUERY_BYTES, v_tile = k_tile + Q::KEY_BYTES;
  uint32_t key = seen.of_block / Q::KEYS * Q::KEYS;
  auto rows_of_head = [&](uint32_t head) { return rows_of(qkv, geometry, place.sequence, head, geometry.heads()); };
  const Rows<T> douts = rows_of(dout, geometry, place.sequence, place.head, geometry.query);
  load_tile<T, D, Q::QUERIES, Q::THREADS>(dout_tile, douts, begin, end);
  load_tile<T, D, Q::KEYS, Q::THREADS>(v_tile, rows_of_head(v_head), key, end);
  load_tile<T, D, Q::QUERIES, Q::THREADS>(q_tile, rows_of_head(place.head), begin, end);
  end_copies();

  const uint32_t warp_row = warp() * ROWS, warp_begin = begin + warp_row;
  const uint32_t q_lane = q_tile + warp_row * D * 2 + rows_of_lane<D>();
  float2 of_row[Q::ROW_TILES][2];
#pragma unroll
  for (int i = 0; i < Q::ROW_TILES * 2; i++) {
    uint32_t at = warp_begin + i * 8 + lane() / 4;
    of_row[i / 2][i % 2] = at < end ? rows[(size_t(place.sequence) * geometry.query + place.head) * t + at] : make_float2(0.0f, 0.0f);
  }
  Sums<Q::ROW_TILES, D / 8> dq;
  dq.clear();
  for (; key < end; key += Q::KEYS) {
    const bool any = key < warp_begin + ROWS && key + Q::KEYS > seen.of_warp;
    const bool cut = key + Q::KEYS > warp_begin + 1 || key < seen.by_all;
    Sums<Q::ROW_TILES, Q::KEYS / 8> weights, gradients;
    // Values are there, and all warps have left the keys before.
    await_copies<0>();
    __syncthreads();
    load_tile<T, D, Q::KEYS, Q::THREADS>(k_tile, rows_of_head(k_head), key, end);
    end_copies();
    if (any) {
      gradients.clear();
      multiply_rows<T, D, 2>(gradients, q_lane + Q::QUERY_BYTES, v_tile + columns_of_lane<D>());
    }
    await_copies<0>();
    __syncthreads();
    if (key + Q::KEYS < end) load_tile<T, D, Q::KEYS, Q::THREADS>(v_tile, rows_of_head(v_head), key + Q::KEYS, end);
    end_copies();
    if (!any) continue;
    weights.clear();
    multiply_rows<T, D, 2>(weights, q_lane, k_tile + columns_of_lane<D>());
    if (cut) hide(weights, first_keys + warp_row, warp_begin, key);
    weights.over([&](int m, int, int i, float& weight) { weight = exp2_fast(fmaf(weight, scales.binary, -of_row[m][i / 2].x)); });
    differentiate(gradients, weights, cut, [&](int m, int, int i) { return of_row[m][i / 2].y; });
    multiply_columns<D>(dq, Rounded<T, Q::ROW_TILES, Q::KEYS / 8>(gradients), k_tile + rows_of_lane<D>());
  }

  const uint32_t mine = q_tile + warp_row * D * 2;
  __syncwarp();
  store_sums<T, D>(dq, mine, [&](int, int) { return scales.natural; });
  const Rows<T> to = rows_of<T>(dqkv, geometry, place.sequence, place.head, geometry.heads());
  store_rows<T, D, ROWS, D>(const_cast<T*>(to.at) + warp_begin * to.stride, to.stride, to.dim, mine, end > warp_begin ? end - warp_begin : 0);
}

// Blocks: tiles of 32 rows x sequences x heads.
#define DOTS(T, suffix) \
  KERNEL(DOTS_THREADS) attention_backward_dots_##suffix( \
      float2* rows, uint2* bounds, const T* dout, const T* o, const float* lse, const uint32_t* starts, uint32_t t, uint32_t query, \
      uint32_t kv, uint32_t dim, uint32_t window) { \
    dots(rows, bounds, dout, o, lse, starts, {t, query, kv, dim, window, 1}); \
  }
EXPORT_ALL(DOTS)

// `scale` is that of scores, `binary` the same for base 2. Blocks of `keys`: tiles of keys x key heads x parts x sequences; of `queries`:
// tiles of queries x heads x sequences.
#define BACKWARD_OF(D, T, suffix, threads_of_keys, keys, threads_of_queries, queries) \
  KERNEL_ALONE(threads_of_keys) attention_backward_keys_##D##_##suffix( \
      T* dqkv, const T* dout, const T* qkv, const float2* rows, const uint2* bounds, const uint32_t* starts, uint32_t t, uint32_t query, \
      uint32_t kv, uint32_t dim, uint32_t window, uint32_t section, float scale, float binary) { \
    keys(dqkv, dout, qkv, rows, bounds, starts, {t, query, kv, dim, window, section}, {scale, binary}); \
  } \
  KERNEL_ALONE(threads_of_queries) attention_backward_queries_##D##_##suffix( \
      T* dqkv, const T* dout, const T* qkv, const float2* rows, const uint32_t* starts, uint32_t t, uint32_t query, uint32_t kv, \
      uint32_t dim, uint32_t window, uint32_t section, float scale, float binary) { \
    queries(dqkv, dout, qkv, rows, starts, {t, query, kv, dim, window, section}, {scale, binary}); \
  }
#define TILED_OF(D, T, suffix) \
  BACKWARD_OF(D, T, suffix, OfKeys<D>::THREADS, (of_keys<T, D>), OfQueries<D>::THREADS, (of_queries<T, D>))
#define TILED(D) TILED_OF(D, bf16, bf16) TILED_OF(D, f16, f16)
#define FMA(D) BACKWARD_OF(D, float, f32, FMA_THREADS, of_keys_fma<D>, FMA_THREADS, of_queries_fma<D>)
TILED(32) TILED(64) TILED(96) TILED(128) TILED(256)
FMA(64) FMA(128) FMA(256)
