// Cross-entropy over a vocabulary that may be cut. Logits are read twice and written once: `segments` takes from a row, in one reading,
// its maximum and its sum of exponentials, each relative to its own segment's maximum; `sums` brings them to the maximum of the whole row.
//
// A virtual shard of the vocabulary is cut into segments of SEGMENT tokens from its start, the last may be narrower. What a segment gives
// depends on its logits alone, a shard's sum takes its segments in order, and shards are added in the tree: so bits depend on the row and on
// the width of a shard, not on which rank holds it, on the alignment of its rows or on how many rows a call has.
#include "prelude.cuh"

enum { THREADS = 256, WARPS = THREADS / WARP, EACH = 32, SEGMENT = THREADS * EACH };

#define IGNORED 0xffffffffu

// e^x for x <= 0. Below the least normal number it is zero.
DEVICE float exp_fast(float x) { return exp2_fast(x * 1.44269504f); }

// parts[row, segment] = (max, sum of exp(logit - max)). per: segments of a whole shard; count: segments of a row.
//
// A block takes one segment, each thread 32 logits of it in packs of 16 bytes, which stay in registers: sizeof(T) bytes an element, read
// once. Any width; where a row does not start at a multiple of 16 bytes, a thread reads the same logits one by one, and a warp's request
// then touches sectors that its next requests find in the first-level cache.
template <typename T> DEVICE void segments(float2* parts, const T* logits, size_t v, size_t shard, size_t per, size_t count) {
  constexpr int COUNT = Pack<T>::COUNT, PACKS = EACH / COUNT;
  __shared__ float scratch[WARPS];
  size_t row = blockIdx.x / count, segment = blockIdx.x % count;
  size_t start = segment / per * shard + segment % per * SEGMENT;
  size_t end = min(min(start + SEGMENT, (segment / per + 1) * shard), v);
  const T* x = logits + row * v + start;
  int width = int(end - start);
  bool packed = is_aligned(x);
  Pack<T> packs[PACKS];
  float most = -INFINITY;
#pragma unroll
  for (int k = 0; k < PACKS; k++) {
    int first = (k * THREADS + int(threadIdx.x)) * COUNT;
    if (packed && first + COUNT <= width) {
      packs[k] = load_pack(x + first);
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; i++) packs[k].at[i] = first + i < width ? x[first + i] : from_float<T>(-INFINITY);
    }
  }
#pragma unroll
  for (int k = 0; k < PACKS; k++) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) most = fmaxf(most, to_float(packs[k].at[i]));
  }
  most = over_block<Max, THREADS>(most, scratch);
  // Where all is masked, exponentials are relative to zero: none of them is then a NaN, unless a logit is.
  float relative = most == -INFINITY ? 0.0f : most, sum = 0.0f;
#pragma unroll
  for (int k = 0; k < PACKS; k++) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum += exp_fast(to_float(packs[k].at[i]) - relative);
  }
  sum = over_block<Sum, THREADS>(sum, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = make_float2(most, sum);
}

#define SEGMENTS(T, suffix) \
  KERNEL(THREADS) cross_entropy_segments_##suffix(float2* parts, const T* logits, size_t v, size_t shard, size_t per, size_t count) { \
    segments(parts, logits, v, shard, per, count); \
  }
EXPORT_ALL(SEGMENTS)

// max[row] = the greatest over its parts [n, count]. A warp takes a row: 8 bytes for each segment.
KERNEL(THREADS) cross_entropy_row_max(float* max, const float2* parts, size_t n, size_t count) {
  size_t row = size_t(blockIdx.x) * WARPS + warp();
  if (row >= n) return;
  float most = -INFINITY;
  for (size_t i = lane(); i < count; i += WARP) most = fmaxf(most, parts[row * count + i].x);
  most = over_warp<Max>(most);
  if (lane() == 0) max[row] = most;
}

// sums[row] = (sum over the shards, target's logit - max). A warp takes a row: lanes bring 32 parts at a time to the row's maximum, then
// all lanes add them in order. 8 bytes for each segment, and one logit of a row.
template <typename T>
DEVICE void sums(float* sums, const float2* parts, const T* logits, const float* max, const uint32_t* targets, size_t n, size_t v,
                 size_t first, size_t per, size_t count) {
  size_t row = size_t(blockIdx.x) * WARPS + warp();
  if (row >= n) return;
  float most = max[row], shard = 0.0f;
  size_t inner = 0;
  Tree shards;
  for (size_t start = 0; start < count; start += WARP) {
    float term = 0.0f;
    if (start + lane() < count) {
      float2 part = parts[row * count + start + lane()];
      term = part.y * exp_fast(part.x - most);
    }
    int here = int(min(count - start, size_t(WARP)));
    for (int i = 0; i < here; i++) {
      shard += __shfl_sync(ALL_LANES, term, i);
      if (++inner == per) {
        shards.push(shard);
        shard = 0.0f;
        inner = 0;
      }
    }
  }
  if (inner > 0) shards.push(shard);
  if (lane() == 0) {
    size_t column = size_t(targets[row]) - first;
    bool here = targets[row] != IGNORED && column < v;
    sums[2 * row] = shards.total();
    sums[2 * row + 1] = here ? to_float(logits[row * v + column]) - most : 0.0f;
  }
}

#define SUMS(T, suffix) \
  KERNEL(THREADS) \
  cross_entropy_sums_##suffix(float* out, const float2* parts, const T* logits, const float* max, const uint32_t* targets, size_t n, \
                              size_t v, size_t first, size_t per, size_t count) { \
    sums(out, parts, logits, max, targets, n, v, first, per, count); \
  }
EXPORT_ALL(SUMS)

// The natural logarithm, by the same operations as `ln` of src/ops/functions.rs.
DEVICE double ln(double x) {
  if (!(x >= 0.0)) return __longlong_as_double(0x7ff8000000000000);
  if (x == 0.0) return __longlong_as_double(0xfff0000000000000);
  int64_t bits = __double_as_longlong(x);
  if (bits == 0x7ff0000000000000) return x;
  int exponent = int(bits >> 52) - 1023;
  double m = __longlong_as_double((bits & 0xfffffffffffff) | (1023ll << 52));
  if (m > 1.41421356237309504880) {
    m *= 0.5;
    exponent += 1;
  }
  double s = (m - 1.0) / (m + 1.0), square = s * s, series = 0.0;
#pragma unroll
  for (int k = 9; k >= 0; k--) series = series * square + 1.0 / double(2 * k + 1);
  return 2.0 * s * series + double(exponent) * 0.693147180559945309417;
}

// losses[row] from sums [n, 2]. A thread takes a row: 12 bytes read, 4 written.
KERNEL(THREADS) cross_entropy_losses(float* losses, const float* sums, const uint32_t* targets, size_t n) {
  size_t row = thread_of_grid();
  if (row >= n) return;
  float loss = float(ln(double(sums[2 * row])) - double(sums[2 * row + 1]));
  losses[row] = targets[row] == IGNORED ? 0.0f : loss;
}

// What turns the logits of one row into their gradients.
struct Finish {
  float max, share, scale;
  bool counts;

  template <typename T> DEVICE T of(T logit) const {
    return from_float<T>(counts ? (exp_fast(to_float(logit) - max) * share) * scale : 0.0f);
  }
  template <typename T> DEVICE T of_target(T logit) const { return from_float<T>((exp_fast(to_float(logit) - max) * share - 1.0f) * scale); }
};

// logits = their gradients. A block takes SEGMENT logits of a row, blocks: of a row. 2 sizeof(T) bytes an element, half of them where the
// row does not count. Packs of 16 bytes start at the first multiple of 16; what is before and behind them goes one by one.
template <typename T>
DEVICE void finish(T* logits, const float* max, const float* sums, const uint32_t* targets, size_t v, size_t first, size_t blocks, float scale) {
  constexpr int COUNT = Pack<T>::COUNT, PACKS = EACH / COUNT;
  size_t row = blockIdx.x / blocks, start = blockIdx.x % blocks * SEGMENT;
  T* x = logits + row * v + start;
  int width = int(min(v - start, size_t(SEGMENT)));
  Finish with = {max[row], 1.0f / sums[2 * row], scale, targets[row] != IGNORED};
  // The target's place in this segment; outside where there is none.
  size_t column = size_t(targets[row]) - first;
  int target = with.counts && column < v && column >= start && column - start < size_t(width) ? int(column - start) : -1;
  int head = min(int((16 - reinterpret_cast<size_t>(x) % 16) % 16 / sizeof(T)), width);
  int whole = (width - head) / COUNT;
  Pack<T> packs[PACKS];
#pragma unroll
  for (int k = 0; k < PACKS; k++) {
    int pack = k * THREADS + int(threadIdx.x);
    if (with.counts && pack < whole) packs[k] = load_pack(x + head + pack * COUNT);
  }
#pragma unroll
  for (int k = 0; k < PACKS; k++) {
    int pack = k * THREADS + int(threadIdx.x), at = head + pack * COUNT;
    if (pack >= whole) continue;
    Pack<T> gradient;
#pragma unroll
    for (int i = 0; i < COUNT; i++) gradient.at[i] = with.of(packs[k].at[i]);
    if (unsigned(target - at) < COUNT) {
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        if (target - at == i) gradient.at[i] = with.of_target(packs[k].at[i]);
      }
    }
    store_whole(x + at, gradient);
  }
  // Fewer than two packs are left: one thread for each element.
  int loose = width - whole * COUNT, at = int(threadIdx.x);
  if (at < loose) {
    if (at >= head) at += whole * COUNT;
    x[at] = at == target ? with.of_target(x[at]) : with.counts ? with.of(x[at]) : from_float<T>(0.0f);
  }
}

#define FINISH(T, suffix) \
  KERNEL(THREADS) \
  cross_entropy_finish_##suffix(T* logits, const float* max, const float* sums, const uint32_t* targets, size_t v, size_t first, \
                                size_t blocks, float scale) { \
    finish(logits, max, sums, targets, v, first, blocks, scale); \
  }
EXPORT_ALL(FINISH)
