// Sums, scalings and conversions of element by element.
//
// A thread handles 16 bytes of the widest operand at a time, a grid strides over all. Each result is one float operation, rounded once.
// Bytes per element are those of the operands: each is read once, and what changes is written once. Any alignment: where a pointer is not
// a multiple of 16 bytes, elements go one by one.
#include "prelude.cuh"

enum { THREADS = 256 };

// Calls `each(start, count)` for the elements of this thread: whole packs where `packed`, and single elements for the rest.
template <int COUNT, typename Each> DEVICE void over_elements(size_t n, bool packed, Each each) {
  size_t packs = packed ? n / COUNT : 0;
  for (size_t pack = thread_of_grid(); pack < packs; pack += threads_of_grid()) each(pack * COUNT, true);
  for (size_t i = packs * COUNT + thread_of_grid(); i < n; i += threads_of_grid()) each(i, false);
}

// y = new(y, x), where `READ_Y` says whether the old y matters.
template <typename Y, typename X, bool READ_Y, typename New> DEVICE void update(Y* y, const X* x, size_t n, New fresh) {
  // As many elements as fill 16 bytes of the wider format: the other's packs are then half used.
  constexpr int COUNT = int(Pack<Y>::COUNT) < int(Pack<X>::COUNT) ? Pack<Y>::COUNT : Pack<X>::COUNT;
  struct alignas(COUNT * sizeof(Y)) Ys { Y at[COUNT]; };
  struct alignas(COUNT * sizeof(X)) Xs { X at[COUNT]; };
  bool packed = is_aligned(y) && is_aligned(x);
  over_elements<COUNT>(n, packed, [&](size_t start, bool whole) {
    if (whole) {
      Xs xs = *reinterpret_cast<const Xs*>(x + start);
      Ys ys;
      if (READ_Y) ys = *reinterpret_cast<const Ys*>(y + start);
#pragma unroll
      for (int i = 0; i < COUNT; i++) ys.at[i] = from_float<Y>(fresh(READ_Y ? to_float(ys.at[i]) : 0.0f, to_float(xs.at[i])));
      *reinterpret_cast<Ys*>(y + start) = ys;
    } else {
      y[start] = from_float<Y>(fresh(READ_Y ? to_float(y[start]) : 0.0f, to_float(x[start])));
    }
  });
}

struct Add {
  DEVICE float operator()(float y, float x) const { return y + x; }
};

struct Take {
  DEVICE float operator()(float, float x) const { return x; }
};

// y += x
#define ADD(T, suffix) \
  KERNEL(THREADS) elementwise_add_##suffix(T* y, const T* x, size_t n) { update<T, T, true>(y, x, n, Add{}); }
EXPORT_ALL(ADD)

// dst += src, dst in float
#define ACCUMULATE(T, suffix) \
  KERNEL(THREADS) elementwise_accumulate_##suffix(float* dst, const T* src, size_t n) { update<float, T, true>(dst, src, n, Add{}); }
EXPORT_ALL(ACCUMULATE)

// dst = src
#define CAST_FROM(S, from, D, to) \
  KERNEL(THREADS) elementwise_cast_##to##_##from(D* dst, const S* src, size_t n) { update<D, S, false>(dst, src, n, Take{}); }
#define CAST(S, from) CAST_FROM(S, from, float, f32) CAST_FROM(S, from, bf16, bf16) CAST_FROM(S, from, f16, f16)
EXPORT_ALL(CAST)

// x *= factor
#define SCALE(T, suffix) \
  KERNEL(THREADS) elementwise_scale_##suffix(T* x, float factor, size_t n) { \
    update<T, T, true>(x, x, n, [=](float, float x) { return x * factor; }); \
  }
EXPORT_ALL(SCALE)

// y[n, c] += bias[c] in every row
template <typename T> DEVICE void add_row(T* y, const T* bias, size_t n, size_t c) {
  constexpr int COUNT = Pack<T>::COUNT;
  bool packed = is_aligned(y) && is_aligned(bias) && c % COUNT == 0;
  over_elements<COUNT>(n * c, packed, [&](size_t start, bool whole) {
    if (whole) {
      Pack<T> ys = load_pack(y + start), biases = load_pack(bias + start % c);
#pragma unroll
      for (int i = 0; i < COUNT; i++) ys.at[i] = from_float<T>(to_float(ys.at[i]) + to_float(biases.at[i]));
      store_pack(y + start, ys);
    } else {
      y[start] = from_float<T>(to_float(y[start]) + to_float(bias[start % c]));
    }
  });
}

#define ADD_ROW(T, suffix) \
  KERNEL(THREADS) elementwise_add_row_##suffix(T* y, const T* bias, size_t n, size_t c) { add_row(y, bias, n, c); }
EXPORT_ALL(ADD_ROW)
