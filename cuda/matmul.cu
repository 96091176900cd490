// Matrix products: out[m, n] = sum over k of a[m, k] b[n, k], in the three forms of src/ops/matmul.rs.
//
//   forward          rows of a and b lie along k        out = sum, rounded, + bias
//   backward_input   rows of a; b has a row for each k  out = sum, rounded
//   backward_weight  both have a row for each k         out (f32) += sum
//
// A block makes a tile of out, 128 x 128 or, where those would be too few for a GPU, 64 x 64. Both go over all of k in order, in the same
// steps, and add in f32 as matrix units do (f32: one fused chain, the CPU's bits): the bits of an element depend on its row of a, its row of b
// and k, on nothing else. K is never cut, however few tiles there are. Any m, n and k, any address and stride: 16 bytes at a time go to shared
// memory beside the threads where rows begin at multiples of 16 bytes, else element by element through registers, where nothing hides how
// long the first takes.
//
// Bytes: out once (backward_weight: twice); a once for each column of tiles and b once for each row of them, mostly from L2. No bank conflicts,
// and sectors are full where rows begin at them. On a multiprocessor of sm_80 stand two blocks of 128 x 128 or four of 64 x 64 (f32: three),
// by their registers.
//
// Blocks: tiles, in the order of `Place`. Threads: 128 (f32: 256). Dynamic shared memory: src/device/gpu/matmul.rs.
#include "matmul_fma.cuh"
#include "matmul_tiles.cuh"

#define FORM(threads, form, EDGE, T, suffix, Out) \
  KERNEL(threads) matmul_##form##_##EDGE##_##suffix( \
      Out* out, const T* a, const T* b, const T* bias, size_t m, size_t n, size_t k, size_t a_stride, size_t b_stride)

#define TILED(EDGE, T, suffix) \
  FORM(Tiling<EDGE>::THREADS, forward, EDGE, T, suffix, T) { \
    multiply_into<T, EDGE, false>(out, a, b, bias, m, n, k, a_stride, b_stride); \
  } \
  FORM(Tiling<EDGE>::THREADS, backward_input, EDGE, T, suffix, T) { \
    multiply_into<T, EDGE, true>(out, a, b, nullptr, m, n, k, a_stride, b_stride); \
  } \
  FORM(Tiling<EDGE>::THREADS, backward_weight, EDGE, T, suffix, float) { \
    multiply_onto<T, EDGE>(out, a, b, m, n, k, a_stride, b_stride); \
  }

#define FMA(EDGE) \
  FORM(FmaTiling<EDGE>::THREADS, forward, EDGE, float, f32, float) { \
    multiply_floats<EDGE, false, false, false>(out, a, b, bias, m, n, k, a_stride, b_stride); \
  } \
  FORM(FmaTiling<EDGE>::THREADS, backward_input, EDGE, float, f32, float) { \
    multiply_floats<EDGE, false, true, false>(out, a, b, nullptr, m, n, k, a_stride, b_stride); \
  } \
  FORM(FmaTiling<EDGE>::THREADS, backward_weight, EDGE, float, f32, float) { \
    multiply_floats<EDGE, true, true, true>(out, a, b, nullptr, m, n, k, a_stride, b_stride); \
  }

TILED(64, bf16, bf16) TILED(64, f16, f16) TILED(128, bf16, bf16) TILED(128, f16, f16)
FMA(64) FMA(128)
