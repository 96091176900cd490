// The non-linearities of the MLP (src/ops/activation.rs): element by element, the same roundings as on the CPU, and so the same bits.
//
// A thread handles 16 bytes of each operand at a time, a grid strides over all; each operand is read or written once. Where a pointer is
// not a multiple of 16 bytes, or half a row is not whole packs, elements go one by one.
#include "prelude.cuh"
#include "functions.cuh"
#include "matrix.cuh"

enum { THREADS = 256 };

// ---- swiglu: gate_up [n, 2 f], the gates in the first half of each row ----

DEVICE Sigmoid sigmoid_of_gate(float gate) { return sigmoid(exp_within(-clamp(gate, -87.0f, 87.0f))); }

DEVICE float swiglu(float gate, float up) { return (gate * sigmoid_of_gate(gate).value) * up; }

// h [n, f]. 3 elements moved for each of h.
template <typename T> DEVICE void swiglu_forward(T* h, const T* gate_up, size_t n, size_t f) {
  constexpr int COUNT = Pack<T>::COUNT;
  if (f % COUNT == 0 && is_aligned(h) && is_aligned(gate_up)) {
    over_matrix(n, f / COUNT, [&](size_t row, size_t pack) {
      const T* gates = gate_up + row * 2 * f + pack * COUNT;
      Pack<T> gate = load_pack(gates), up = load_pack(gates + f), out;
#pragma unroll
      for (int i = 0; i < COUNT; i++) out.at[i] = from_float<T>(swiglu(to_float(gate.at[i]), to_float(up.at[i])));
      store_pack(h + row * f + pack * COUNT, out);
    });
  } else {
    over_matrix(n, f, [&](size_t row, size_t column) {
      const T* gate = gate_up + row * 2 * f + column;
      h[row * f + column] = from_float<T>(swiglu(to_float(gate[0]), to_float(gate[f])));
    });
  }
}

struct GateAndUp {
  float gate, up;
};

DEVICE GateAndUp swiglu_gradient(float dh, float gate, float up) {
  Sigmoid s = sigmoid_of_gate(gate);
  return {(dh * up) * (s.value * fmaf(gate, s.complement, 1.0f)), dh * (gate * s.value)};
}

// dgate_up [n, 2 f], which may be gate_up itself. 5 elements moved for each of dh.
template <typename T> DEVICE void swiglu_backward(T* dgate_up, const T* dh, const T* gate_up, size_t n, size_t f) {
  constexpr int COUNT = Pack<T>::COUNT;
  if (f % COUNT == 0 && is_aligned(dgate_up) && is_aligned(dh) && is_aligned(gate_up)) {
    over_matrix(n, f / COUNT, [&](size_t row, size_t pack) {
      size_t at = row * 2 * f + pack * COUNT;
      Pack<T> dhs = load_pack(dh + row * f + pack * COUNT), gate = load_pack(gate_up + at), up = load_pack(gate_up + at + f);
      Pack<T> dgate, dup;
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        GateAndUp d = swiglu_gradient(to_float(dhs.at[i]), to_float(gate.at[i]), to_float(up.at[i]));
        dgate.at[i] = from_float<T>(d.gate);
        dup.at[i] = from_float<T>(d.up);
      }
      store_pack(dgate_up + at, dgate);
      store_pack(dgate_up + at + f, dup);
    });
  } else {
    over_matrix(n, f, [&](size_t row, size_t column) {
      size_t at = row * 2 * f + column;
      GateAndUp d = swiglu_gradient(to_float(dh[row * f + column]), to_float(gate_up[at]), to_float(gate_up[at + f]));
      dgate_up[at] = from_float<T>(d.gate);
      dgate_up[at + f] = from_float<T>(d.up);
    });
  }
}

#define SWIGLU(T, suffix) \
  KERNEL(THREADS) activation_swiglu_forward_##suffix(T* h, const T* gate_up, size_t n, size_t f) { swiglu_forward(h, gate_up, n, f); } \
  KERNEL(THREADS) activation_swiglu_backward_##suffix(T* dgate_up, const T* dh, const T* gate_up, size_t n, size_t f) { \
    swiglu_backward(dgate_up, dh, gate_up, n, f); \
  }
EXPORT_ALL(SWIGLU)

// ---- gelu, in the form with tanh ----

#define TWICE_ROOT 1.595769f
#define CUBIC 0.044715f
#define FAR 10.0f

// Of an x within -FAR .. FAR.
DEVICE Sigmoid sigmoid_of_gelu(float x) {
  const float LINEAR = -TWICE_ROOT * 1.44269504f;
  return sigmoid(exp2_within(x * fmaf(x * x, CUBIC * LINEAR, LINEAR)));
}

DEVICE float gelu(float x) { return x * sigmoid_of_gelu(clamp(x, -FAR, FAR)).value; }

DEVICE float gelu_gradient(float dy, float x) {
  x = clamp(x, -FAR, FAR);
  Sigmoid s = sigmoid_of_gelu(x);
  float slope = x * fmaf(x * x, 3.0f * (CUBIC * TWICE_ROOT), TWICE_ROOT);
  return dy * (s.value * fmaf(slope, s.complement, 1.0f));
}

// Calls each(start, whole) for the packs of this thread, or for its elements.
template <typename T, typename Each> DEVICE void over_packs(size_t n, bool packed, Each each) {
  constexpr int COUNT = Pack<T>::COUNT;
  size_t packs = packed ? n / COUNT : 0;
  for (size_t pack = thread_of_grid(); pack < packs; pack += threads_of_grid()) each(pack * COUNT, true);
  for (size_t i = packs * COUNT + thread_of_grid(); i < n; i += threads_of_grid()) each(i, false);
}

// 2 elements moved for each of y.
template <typename T> DEVICE void gelu_forward(T* y, const T* x, size_t n) {
  over_packs<T>(n, is_aligned(y) && is_aligned(x), [&](size_t start, bool whole) {
    if (whole) {
      Pack<T> pack = load_pack(x + start);
#pragma unroll
      for (int i = 0; i < Pack<T>::COUNT; i++) pack.at[i] = from_float<T>(gelu(to_float(pack.at[i])));
      store_pack(y + start, pack);
    } else {
      y[start] = from_float<T>(gelu(to_float(x[start])));
    }
  });
}

// dx may be x itself. 3 elements moved for each of dx.
template <typename T> DEVICE void gelu_backward(T* dx, const T* dy, const T* x, size_t n) {
  over_packs<T>(n, is_aligned(dx) && is_aligned(dy) && is_aligned(x), [&](size_t start, bool whole) {
    auto gradient = [](T dy, T x) { return from_float<T>(gelu_gradient(to_float(dy), to_float(x))); };
    if (whole) {
      Pack<T> dys = load_pack(dy + start), xs = load_pack(x + start), out;
#pragma unroll
      for (int i = 0; i < Pack<T>::COUNT; i++) out.at[i] = gradient(dys.at[i], xs.at[i]);
      store_pack(dx + start, out);
    } else {
      dx[start] = gradient(dy[start], x[start]);
    }
  });
}

#define GELU(T, suffix) \
  KERNEL(THREADS) activation_gelu_forward_##suffix(T* y, const T* x, size_t n) { gelu_forward(y, x, n); } \
  KERNEL(THREADS) activation_gelu_backward_##suffix(T* dx, const T* dy, const T* x, size_t n) { gelu_backward(dx, dy, x, n); }
EXPORT_ALL(GELU)
