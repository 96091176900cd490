// Normalisation of rows (src/ops/norm.rs), with and without the sum with the residual stream.
//
// A row belongs to a team of threads, 32 to 1024 of them as its length asks for: one warp, several of which share a block, or one block.
// A row is read once: its packs of 16 bytes, at most PACKS for each thread, stay in registers between the passes over it. The weight is
// read for every row, by many rows at a time, so mostly from the first-level cache.
//
// What is element by element has the CPU's roundings. Sums have another order, and terms are added in one rounding with their product:
// each thread adds up its own elements in order, then the threads' sums are added over the warp and over the team. Which elements are a
// thread's depends on c and the dtype alone: packs where c is a multiple of their size and they fit the team's registers, else single
// elements. What cannot be read in packs, because a view starts between two multiples of 16 bytes, is read element by element, more than
// once, in that same order; a warp's accesses then touch each sector several times, which the first-level cache answers. The same goes
// for rows that are not whole packs or longer than 1024 threads hold; there a warp's accesses are side by side.
#include "prelude.cuh"
#include "chunks.cuh"

enum {
  // Of a row, in the registers of one thread.
  PACKS = 4,
  TEAM_MOST = 1024,
};

// Shared memory in which the warps of a team exchange at most two sums.
typedef float Scratch[2][TEAM_MOST / WARP];

// The threads that work on one row, and this one's share of it.
template <typename T> struct Team {
  enum { COUNT = Pack<T>::COUNT };
  uint32_t size, thread;
  size_t row, c;
  // A thread has packs of elements, or single ones.
  bool in_packs;

  DEVICE Team(uint32_t size, size_t c) : size(size), thread(threadIdx.x % size), c(c) {
    row = size_t(blockIdx.x) * (blockDim.x / size) + threadIdx.x / size;
    in_packs = c % COUNT == 0 && c <= size_t(size) * PACKS * COUNT;
  }

  // Calls each(p, column) for the packs of this thread.
  template <typename Each> DEVICE void over_packs(Each each) const {
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      uint32_t column = (p * size + thread) * COUNT;
      if (column < c) each(p, column);
    }
  }

  // Calls each(column) for the elements of this thread, in the same order.
  template <typename Each> DEVICE void over_elements(Each each) const {
    size_t width = in_packs ? COUNT : 1;
#pragma unroll 1
    for (size_t first = thread * width; first < c; first += size * width) {
#pragma unroll 1
      for (size_t column = first; column < first + width; column++) each(column);
    }
  }

  // Every thread of the team gets the sums over it.
  template <int SUMS> DEVICE void sum(float (&x)[SUMS], Scratch& scratch) const {
#pragma unroll
    for (int i = 0; i < SUMS; i++) x[i] = over_warp<Sum>(x[i]);
    if (size == WARP) return;
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
      if (lane() == 0) scratch[i][warp()] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SUMS; i++) x[i] = over_warp<Sum>(lane() < size / WARP ? scratch[i][lane()] : 0.0f);
    // The scratch may be used again.
    __syncthreads();
  }

  DEVICE float sum(float x, Scratch& scratch) const {
    float one[1] = {x};
    sum(one, scratch);
    return one[0];
  }
};

template <typename T, bool LAYER> DEVICE T normed(float x, float mean, float r, T w, T b) {
  return from_float<T>(LAYER ? ((x - mean) * r) * to_float(w) + to_float(b) : to_float(w) * (x * r));
}

// The pack of a bias, where there is one.
template <typename T, bool LAYER> DEVICE Pack<T> load_bias(const T* b, size_t column) {
  Pack<T> none = {};
  return LAYER ? load_pack(b + column) : none;
}

template <typename T> DEVICE Pack<T> sum_of(const Pack<T>& a, const Pack<T>& b) {
  Pack<T> sums;
#pragma unroll
  for (int i = 0; i < Pack<T>::COUNT; i++) sums.at[i] = from_float<T>(to_float(a.at[i]) + to_float(b.at[i]));
  return sums;
}

// What is computed from the pack again is computed again, instead of being kept in as many registers as the pack has elements.
template <typename T> DEVICE void forget(Pack<T>& pack) {
  uint4& words = reinterpret_cast<uint4&>(pack);
  hide(words.x), hide(words.y), hide(words.z), hide(words.w);
}

// What a kernel of the forward pass reads and writes. `residual` is null, or is added to x, which then becomes the sum.
template <typename T> struct Forward {
  T* y;
  float* stats;
  T* x;
  const T* residual;
  const T* w;
  const T* b;
  size_t n;
  float eps;
};

template <typename T, bool LAYER> DEVICE float mean_of(const Team<T>& team, float sum, Scratch& scratch) {
  return LAYER ? team.sum(sum, scratch) / float(team.c) : 0.0f;
}

template <bool LAYER> DEVICE void write_statistics(float* stats, size_t row, float mean, float r) {
  if (LAYER) {
    stats[2 * row] = mean;
    stats[2 * row + 1] = r;
  } else {
    stats[row] = r;
  }
}

template <typename T, bool LAYER> DEVICE void forward_packs(const Team<T>& team, const Forward<T>& of, Scratch& scratch) {
  constexpr int COUNT = Pack<T>::COUNT;
  size_t start = team.row * team.c;
  Pack<T> x[PACKS];
  team.over_packs([&](int p, uint32_t column) { x[p] = load_pack(of.x + start + column); });
  if (of.residual) {
    // Two packs of it at a time: there are no registers for all four.
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Pack<T> residual[PACKS];
      auto in_half = [=](int p) { return p / (PACKS / 2) == half; };
      team.over_packs([&](int p, uint32_t column) {
        if (in_half(p)) residual[p] = load_pack(of.residual + start + column);
      });
      team.over_packs([&](int p, uint32_t column) {
        if (!in_half(p)) return;
        x[p] = sum_of(x[p], residual[p]);
        store_pack(of.x + start + column, x[p]);
      });
    }
  }
  float sum = 0.0f, squares = 0.0f;
  if (LAYER) {
    team.over_packs([&](int p, uint32_t) {
#pragma unroll
      for (int i = 0; i < COUNT; i++) sum += to_float(x[p].at[i]);
    });
  }
  float mean = mean_of<T, LAYER>(team, sum, scratch);
  team.over_packs([&](int p, uint32_t) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      float centred = to_float(x[p].at[i]) - mean;
      squares = fmaf(centred, centred, squares);
    }
  });
  float r = 1.0f / sqrtf(team.sum(squares, scratch) / float(team.c) + of.eps);
  team.over_packs([&](int p, uint32_t column) {
    Pack<T> w = load_pack(of.w + column), b = load_bias<T, LAYER>(of.b, column), y;
#pragma unroll
    for (int i = 0; i < COUNT; i++) y.at[i] = normed<T, LAYER>(to_float(x[p].at[i]), mean, r, w.at[i], b.at[i]);
    store_pack(of.y + start + column, y);
  });
  if (team.thread == 0) write_statistics<LAYER>(of.stats, team.row, mean, r);
}

template <typename T, bool LAYER> DEVICE void forward_elements(const Team<T>& team, const Forward<T>& of, Scratch& scratch) {
  T *x = of.x + team.row * team.c, *y = of.y + team.row * team.c;
  if (of.residual) {
    const T* residual = of.residual + team.row * team.c;
    team.over_elements([&](size_t i) { x[i] = from_float<T>(to_float(x[i]) + to_float(residual[i])); });
  }
  float sum = 0.0f, squares = 0.0f;
  if (LAYER) team.over_elements([&](size_t i) { sum += to_float(x[i]); });
  float mean = mean_of<T, LAYER>(team, sum, scratch);
  team.over_elements([&](size_t i) {
    float centred = to_float(x[i]) - mean;
    squares = fmaf(centred, centred, squares);
  });
  float r = 1.0f / sqrtf(team.sum(squares, scratch) / float(team.c) + of.eps);
  team.over_elements([&](size_t i) { y[i] = normed<T, LAYER>(to_float(x[i]), mean, r, of.w[i], LAYER ? of.b[i] : of.w[i]); });
  if (team.thread == 0) write_statistics<LAYER>(of.stats, team.row, mean, r);
}

// y, stats <- x, with x += residual before where there is one. A team has one row. Bytes per element: x read and y written; with a
// residual it is read too and x written. 4 or 8 bytes of statistics per row.
template <typename T, bool LAYER> DEVICE void forward(const Forward<T>& of, size_t c, uint32_t size) {
  __shared__ Scratch scratch;
  Team<T> team(size, c);
  // Teams of several warps are whole blocks: either all threads of a barrier leave here or none.
  if (team.row >= of.n) return;
  bool aligned = is_aligned(of.x) && is_aligned(of.y) && is_aligned(of.w) && is_aligned(of.residual) && (!LAYER || is_aligned(of.b));
  if (team.in_packs && aligned) forward_packs<T, LAYER>(team, of, scratch);
  else forward_elements<T, LAYER>(team, of, scratch);
}

#define FORWARD(T, suffix) \
  KERNEL(TEAM_MOST) \
  norm_rms_forward_##suffix(T* y, float* r, T* x, const T* residual, const T* w, size_t n, size_t c, float eps, uint32_t team) { \
    forward<T, false>({y, r, x, residual, w, w, n, eps}, c, team); \
  } \
  KERNEL(TEAM_MOST) \
  norm_layer_forward_##suffix( \
      T* y, float* stats, T* x, const T* residual, const T* w, const T* b, size_t n, size_t c, float eps, uint32_t team) { \
    forward<T, true>({y, stats, x, residual, w, b, n, eps}, c, team); \
  }
EXPORT_ALL(FORWARD)

struct Statistics {
  float mean, r;
};

template <bool LAYER> DEVICE Statistics statistics(const float* stats, size_t row) {
  return LAYER ? Statistics{stats[2 * row], stats[2 * row + 1]} : Statistics{0.0f, stats[row]};
}

// y <- x and the statistics that the forward pass gave: its bits. A team has one row. Bytes per element: x read and y written.
template <typename T, bool LAYER>
DEVICE void again(T* y, const T* x, const T* w, const T* b, const float* stats, size_t n, size_t c, uint32_t size) {
  constexpr int COUNT = Pack<T>::COUNT;
  Team<T> team(size, c);
  if (team.row >= n) return;
  Statistics of = statistics<LAYER>(stats, team.row);
  y += team.row * c;
  x += team.row * c;
  if (team.in_packs && is_aligned(y) && is_aligned(x) && is_aligned(w) && (!LAYER || is_aligned(b))) {
    team.over_packs([&](int, uint32_t column) {
      Pack<T> xs = load_pack(x + column), ws = load_pack(w + column), bs = load_bias<T, LAYER>(b, column), ys;
#pragma unroll
      for (int i = 0; i < COUNT; i++) ys.at[i] = normed<T, LAYER>(to_float(xs.at[i]), of.mean, of.r, ws.at[i], bs.at[i]);
      store_pack(y + column, ys);
    });
  } else {
    team.over_elements([&](size_t i) { y[i] = normed<T, LAYER>(to_float(x[i]), of.mean, of.r, w[i], LAYER ? b[i] : w[i]); });
  }
}

#define AGAIN(T, suffix) \
  KERNEL(TEAM_MOST) \
  norm_rms_again_##suffix(T* y, const T* x, const T* w, const float* r, size_t n, size_t c, uint32_t team) { \
    again<T, false>(y, x, w, w, r, n, c, team); \
  } \
  KERNEL(TEAM_MOST) \
  norm_layer_again_##suffix(T* y, const T* x, const T* w, const T* b, const float* stats, size_t n, size_t c, uint32_t team) { \
    again<T, true>(y, x, w, b, stats, n, c, team); \
  }
EXPORT_ALL(AGAIN)

// What a kernel of the backward pass reads and writes. `residual` is null, or is added to the gradient once that is rounded.
template <typename T> struct Backward {
  T* dx;
  const T* dy;
  const T* x;
  const T* w;
  const float* stats;
  const T* residual;
  size_t n;
};

// The terms of an element: dh, which is dy times the weight, and h, the normed x.
struct Terms {
  float dh, h;
};

template <typename T> DEVICE Terms terms(T dy, T x, T w, Statistics stats) {
  return {to_float(dy) * to_float(w), (to_float(x) - stats.mean) * stats.r};
}

// For both norms: subtracting a mean or a flat part of zero changes no bit.
template <typename T> DEVICE T gradient(Terms of, float flat, float along, float r) {
  return from_float<T>(r * ((of.dh - flat) - of.h * along));
}

template <typename T, bool LAYER> DEVICE void backward_packs(const Team<T>& team, const Backward<T>& of, Scratch& scratch) {
  constexpr int COUNT = Pack<T>::COUNT;
  Statistics stats = statistics<LAYER>(of.stats, team.row);
  size_t start = team.row * team.c;
  Pack<T> dy[PACKS], x[PACKS];
  team.over_packs([&](int p, uint32_t column) {
    dy[p] = load_pack(of.dy + start + column);
    x[p] = load_pack(of.x + start + column);
  });
  // The second, of dh alone, is the layer norm's.
  constexpr int SUMS = LAYER ? 2 : 1;
  float sums[SUMS] = {};
  team.over_packs([&](int p, uint32_t column) {
    Pack<T> w = load_pack(of.w + column);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      Terms each = terms(dy[p].at[i], x[p].at[i], w.at[i], stats);
      if (LAYER) sums[SUMS - 1] += each.dh;
      sums[0] = fmaf(each.dh, each.h, sums[0]);
    }
  });
  team.sum(sums, scratch);
  float along = sums[0] / float(team.c), flat = LAYER ? sums[SUMS - 1] / float(team.c) : 0.0f;
  team.over_packs([&](int p, uint32_t column) {
    forget(dy[p]);
    forget(x[p]);
    Pack<T> w = load_pack(of.w + column), dx;
#pragma unroll
    for (int i = 0; i < COUNT; i++) dx.at[i] = gradient<T>(terms(dy[p].at[i], x[p].at[i], w.at[i], stats), flat, along, stats.r);
    if (of.residual) dx = sum_of(dx, load_pack(of.residual + start + column));
    store_pack(of.dx + start + column, dx);
  });
}

template <typename T, bool LAYER> DEVICE void backward_elements(const Team<T>& team, const Backward<T>& of, Scratch& scratch) {
  Statistics stats = statistics<LAYER>(of.stats, team.row);
  size_t start = team.row * team.c;
  const T *dy = of.dy + start, *x = of.x + start;
  // The second, of dh alone, is the layer norm's.
  constexpr int SUMS = LAYER ? 2 : 1;
  float sums[SUMS] = {};
  team.over_elements([&](size_t i) {
    Terms each = terms(dy[i], x[i], of.w[i], stats);
    if (LAYER) sums[SUMS - 1] += each.dh;
    sums[0] = fmaf(each.dh, each.h, sums[0]);
  });
  team.sum(sums, scratch);
  float along = sums[0] / float(team.c), flat = LAYER ? sums[SUMS - 1] / float(team.c) : 0.0f;
  team.over_elements([&](size_t i) {
    T dx = gradient<T>(terms(dy[i], x[i], of.w[i], stats), flat, along, stats.r);
    if (of.residual) dx = from_float<T>(to_float(dx) + to_float(of.residual[start + i]));
    of.dx[start + i] = dx;
  });
}

// dx <- dy, x and the statistics, plus the residual where there is one. A team has one row. Bytes per element: dy and x read, dx written,
// the residual read.
template <typename T, bool LAYER> DEVICE void backward(const Backward<T>& of, size_t c, uint32_t size) {
  __shared__ Scratch scratch;
  Team<T> team(size, c);
  if (team.row >= of.n) return;
  bool aligned = is_aligned(of.dx) && is_aligned(of.dy) && is_aligned(of.x) && is_aligned(of.w) && is_aligned(of.residual);
  if (team.in_packs && aligned) backward_packs<T, LAYER>(team, of, scratch);
  else backward_elements<T, LAYER>(team, of, scratch);
}

#define BACKWARD_OF(NORM, LAYER, T, suffix) \
  KERNEL(TEAM_MOST) \
  norm_##NORM##_backward_##suffix( \
      T* dx, const T* dy, const T* x, const T* w, const float* stats, const T* residual, size_t n, size_t c, uint32_t team) { \
    backward<T, LAYER>({dx, dy, x, w, stats, residual, n}, c, team); \
  }
#define BACKWARD(T, suffix) BACKWARD_OF(rms, false, T, suffix) BACKWARD_OF(layer, true, T, suffix)
EXPORT_ALL(BACKWARD)

// What a row gives to the gradient of the weight: dy times the normed x.
template <typename T, bool LAYER> struct WeightTerm {
  const T* dy;
  const T* x;
  const float* stats;
  size_t c;

  template <typename Columns> DEVICE void operator()(size_t row, Columns columns, float (&sums)[Columns::COUNT]) const {
    Statistics of = statistics<LAYER>(stats, row);
    float dys[Columns::COUNT], xs[Columns::COUNT];
    columns.load(dy + row * c, dys);
    columns.load(x + row * c, xs);
#pragma unroll
    for (int i = 0; i < Columns::COUNT; i++) sums[i] = fmaf(dys[i], (xs[i] - of.mean) * of.r, sums[i]);
  }
};

// The first pass of the weight's gradient (chunks.cuh). Bytes per element: dy and x read; 4 / 64 of partials written.
#define WEIGHT_OF(NORM, LAYER, T, suffix) \
  KERNEL(SUM_THREADS) \
  norm_##NORM##_backward_weight_##suffix(float* partials, size_t c, size_t part, const T* dy, const T* x, const float* stats) { \
    sum_block<T>(partials, c, part, is_aligned(dy) && is_aligned(x), WeightTerm<T, LAYER>{dy, x, stats, c}); \
  }
#define WEIGHT(T, suffix) WEIGHT_OF(rms, false, T, suffix) WEIGHT_OF(layer, true, T, suffix)
EXPORT_ALL(WEIGHT)
