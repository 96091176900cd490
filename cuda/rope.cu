// Rotary positions (src/ops/rope.rs): element by element, the same roundings as on the CPU, and so the same bits.
#include "prelude.cuh"
#include "matrix.cuh"

enum { THREADS = 256 };

// The part of a head that one thread turns: `COUNT` elements of its left half with those of its right half.
template <typename T> DEVICE void turn_pack(T* left, size_t half, const float* cosines, float direction) {
  constexpr int COUNT = Pack<T>::COUNT;
  Pack<T> a = load_pack(left), b = load_pack(left + half);
  float cosine[COUNT], sine[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    Pack<float> c = load_pack(cosines + i), s = load_pack(cosines + half + i);
#pragma unroll
    for (int j = 0; j < 4; j++) cosine[i + j] = c.at[j], sine[i + j] = direction * s.at[j];
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    float x = to_float(a.at[i]), y = to_float(b.at[i]);
    a.at[i] = from_float<T>(x * cosine[i] - y * sine[i]);
    b.at[i] = from_float<T>(y * cosine[i] + x * sine[i]);
  }
  store_pack(left, a);
  store_pack(left + half, b);
}

// Turns the first `heads` heads of 2 half elements in each row of x [n, width], by its position's row of the table f32 [most, 2 half]:
// cosines, then sines.
//
// A thread turns one pack of a head at a time; neighbours turn neighbouring packs, a grid strides over all. Each element is read and
// written once; the table's row is read for each head, all but the first time from the first-level cache. There a thread of bf16 or f16
// reads 32 bytes of cosines in two accesses, each of half a sector, and sines likewise. Packs where half a head and
// width are multiples of one, and x and the table start at multiples of 16 bytes; else pairs of elements. A position beyond the table ends
// the kernel with an error.
template <typename T>
DEVICE void turn(T* x, const float* table, const uint32_t* positions, size_t n, size_t width, uint32_t heads, uint32_t half, uint32_t most,
                 float direction) {
  constexpr int COUNT = Pack<T>::COUNT;
  bool packed = half % COUNT == 0 && width % COUNT == 0 && is_aligned(x) && is_aligned(table);
  uint32_t each = packed ? COUNT : 1, of_head = half / each;
  over_matrix(n, size_t(heads) * of_head, [&](size_t row, size_t item) {
    uint32_t position = positions[row], head = uint32_t(item) / of_head, pair = uint32_t(item) % of_head * each;
    if (position >= most) __trap();
    T* left = x + row * width + size_t(head) * 2 * half + pair;
    const float* cosines = table + size_t(position) * 2 * half + pair;
    if (packed) {
      turn_pack(left, half, cosines, direction);
    } else {
      float a = to_float(left[0]), b = to_float(left[half]), cosine = cosines[0], sine = direction * cosines[half];
      left[0] = from_float<T>(a * cosine - b * sine);
      left[half] = from_float<T>(b * cosine + a * sine);
    }
  });
}

#define TURN(T, suffix) \
  KERNEL(THREADS) \
  rope_turn_##suffix(T* x, const float* table, const uint32_t* positions, size_t n, size_t width, uint32_t heads, uint32_t half, \
                     uint32_t most, float direction) { \
    turn(x, table, positions, n, width, heads, half, most, direction); \
  }
EXPORT_ALL(TURN)
