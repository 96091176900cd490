// Adam with decoupled weight decay over flat slices, element by element: the very operations of src/ops/adamw.rs, so the very bits.
//
// A thread takes four elements at a time, 16 bytes of p, m, v and g each, and a grid strides over all: 16 bytes read and 12 written an
// element, and what the weights take where they are written, too. Any alignment: packs start at the first multiple of 16 bytes of p, and
// where another operand is not aligned there, elements go one by one.
#include "prelude.cuh"

enum { THREADS = 256, COUNT = 4 };

template <typename T> struct alignas(COUNT * sizeof(T)) Four {
  T at[COUNT];
};

// The scalars of one update; src/ops/adamw.rs says what they are.
struct Scalars {
  float scale, keep, blend, beta2, fresh, rate, root, eps;
};

DEVICE void update(float& p, float& m, float& v, float g, const Scalars& with) {
  g = g * with.scale;
  m = with.blend < 0.5f ? m + with.blend * (g - m) : g - (g - m) * (1.0f - with.blend);
  v = v * with.beta2 + (with.fresh * g) * g;
  p = p * with.keep + (with.rate * m) / (sqrtf(v) / with.root + with.eps);
}

// ---- chance ----

struct Words {
  uint32_t at[4];
  DEVICE uint32_t pick(uint32_t i) const { return i < 2 ? (i == 0 ? at[0] : at[1]) : (i == 2 ? at[2] : at[3]); }
};

// Philox4x32-10, as in src/rng.rs.
DEVICE Words philox(uint64_t index, uint64_t tag, uint64_t seed) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = uint32_t(tag), c3 = uint32_t(tag >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// p, rounded to one of its two neighbours: what is cut off, as a share of the last place, is the chance of the one of greater magnitude.
template <typename T> DEVICE T by_chance(float p, uint32_t word);
template <> DEVICE bf16 by_chance<bf16>(float p, uint32_t word) {
  uint32_t bits = __float_as_uint(p);
  if ((bits & 0x7fffffff) >= 0x7f800000) return from_float<bf16>(p);
  return {uint16_t((bits + (word >> 16)) >> 16)};
}

template <> DEVICE f16 by_chance<f16>(float p, uint32_t word) {
  uint32_t sign = __float_as_uint(p) >> 16 & 0x8000, rest = __float_as_uint(p) & 0x7fffffff;
  if (rest >= 0x47800000) return from_float<f16>(p);
  if (rest < 0x38800000) {
    // Denormal: in units of 2^-24, with 32 bits of what is cut off.
    float units = __uint_as_float(rest) * 16777216.0f, whole = truncf(units);
    uint32_t cut = uint32_t((units - whole) * 4294967296.0f);
    return {uint16_t(sign | (uint32_t(whole) + (word < cut)))};
  }
  return {uint16_t(sign | (rest - (112u << 23) + (word >> 19)) >> 13)};
}

// Where the elements of a slice lie in their tensor: runs of `run` elements, `near` apart from each other; runs begin `far` apart.
struct Chance {
  uint64_t seed, tag, first, run, near, far;
  DEVICE uint64_t number(size_t i) const { return first + i / run * far + i % run * near; }
  DEVICE uint32_t word(size_t i) const {
    uint64_t index = number(i);
    return philox(index / 4, tag, seed).pick(uint32_t(index) % 4);
  }
  // The words of the elements `start` to `start + 3`: where they lie side by side, those of at most two blocks of Philox.
  DEVICE void words(size_t start, uint32_t (&out)[COUNT]) const {
    if (near != 1 || start % run + COUNT > run) {
#pragma unroll 1
      for (uint32_t i = 0; i < COUNT; i++) {
        uint32_t one = word(start + i);
#pragma unroll
        for (uint32_t j = 0; j < COUNT; j++) out[j] = j == i ? one : out[j];
      }
      return;
    }
    uint64_t index = number(start);
    uint32_t offset = uint32_t(index) % 4;
    Words a = philox(index / 4, tag, seed), b = a;
    if (offset != 0) b = philox(index / 4 + 1, tag, seed);
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) out[i] = offset + i < 4 ? a.pick(offset + i) : b.pick(offset + i - 4);
  }
};

// ---- updates ----

// One update of all n elements; `weights` = p, rounded, unless there are none.
template <typename T> DEVICE void step(float* p, float* m, float* v, const float* g, T* weights, size_t n, const Scalars& with) {
  size_t head = min((16 - reinterpret_cast<size_t>(p) % 16) % 16 / 4, n);
  bool packed = is_aligned(p + head) && is_aligned(m + head) && is_aligned(v + head) && is_aligned(g + head) &&
                reinterpret_cast<size_t>(weights + head) % sizeof(Four<T>) == 0;
  if (!packed) head = 0;
  size_t packs = packed ? (n - head) / COUNT : 0;
  for (size_t pack = thread_of_grid(); pack < packs; pack += threads_of_grid()) {
    size_t start = head + pack * COUNT;
    Pack<float> ps = load_pack(p + start), ms = load_pack(m + start), vs = load_pack(v + start), gs = load_pack(g + start);
    Four<T> rounded;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      update(ps.at[i], ms.at[i], vs.at[i], gs.at[i], with);
      rounded.at[i] = from_float<T>(ps.at[i]);
    }
    store_pack(p + start, ps);
    store_pack(m + start, ms);
    store_pack(v + start, vs);
    if (weights) *reinterpret_cast<Four<T>*>(weights + start) = rounded;
  }
  size_t loose = n - packs * COUNT;
  for (size_t at = thread_of_grid(); at < loose; at += threads_of_grid()) {
    size_t i = at < head ? at : at + packs * COUNT;
    update(p[i], m[i], v[i], g[i], with);
    if (weights) weights[i] = from_float<T>(p[i]);
  }
}

// The same for weights that are their own p, and are rounded by chance.
template <typename T>
DEVICE void step_by_chance(T* weights, float* m, float* v, const float* g, size_t n, const Scalars& with, const Chance& chance) {
  size_t head = min((16 - reinterpret_cast<size_t>(m) % 16) % 16 / 4, n);
  bool packed = is_aligned(m + head) && is_aligned(v + head) && is_aligned(g + head);
  packed = packed && reinterpret_cast<size_t>(weights + head) % sizeof(Four<T>) == 0;
  if (!packed) head = 0;
  size_t packs = packed ? (n - head) / COUNT : 0;
  for (size_t pack = thread_of_grid(); pack < packs; pack += threads_of_grid()) {
    size_t start = head + pack * COUNT;
    Pack<float> ms = load_pack(m + start), vs = load_pack(v + start), gs = load_pack(g + start);
    Four<T> ws = *reinterpret_cast<const Four<T>*>(weights + start);
    uint32_t words[COUNT] = {};
    chance.words(start, words);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      float p = to_float(ws.at[i]);
      update(p, ms.at[i], vs.at[i], gs.at[i], with);
      ws.at[i] = by_chance<T>(p, words[i]);
    }
    store_pack(m + start, ms);
    store_pack(v + start, vs);
    *reinterpret_cast<Four<T>*>(weights + start) = ws;
  }
  size_t loose = n - packs * COUNT;
  for (size_t at = thread_of_grid(); at < loose; at += threads_of_grid()) {
    size_t i = at < head ? at : at + packs * COUNT;
    float p = to_float(weights[i]);
    update(p, m[i], v[i], g[i], with);
    weights[i] = by_chance<T>(p, chance.word(i));
  }
}

#define STATE float *m, float *v, const float *g
#define SCALARS float scale, float keep, float blend, float beta2, float fresh, float rate, float root, float eps

KERNEL(THREADS) adamw_step(float* p, STATE, size_t n, SCALARS) {
  float* none = nullptr;
  step(p, m, v, g, none, n, {scale, keep, blend, beta2, fresh, rate, root, eps});
}

#define CAST(T, suffix) \
  KERNEL(THREADS) adamw_step_and_cast_##suffix(float* p, STATE, T* weights, size_t n, SCALARS) { \
    step(p, m, v, g, weights, n, {scale, keep, blend, beta2, fresh, rate, root, eps}); \
  }
EXPORT_ALL(CAST)

#define BY_CHANCE(T, suffix) \
  KERNEL(THREADS) \
  adamw_step_by_chance_##suffix(T* weights, STATE, size_t n, SCALARS, uint64_t seed, uint64_t tag, uint64_t first, uint64_t run, \
                                uint64_t near, uint64_t far) { \
    step_by_chance(weights, m, v, g, n, {scale, keep, blend, beta2, fresh, rate, root, eps}, {seed, tag, first, run, near, far}); \
  }
BY_CHANCE(bf16, bf16)
BY_CHANCE(f16, f16)
