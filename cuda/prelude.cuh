// What every kernel starts from: number formats, blocks of memory, sums in a fixed order. The only header that a kernel includes.
//
// Kernels are templates on the element type `T` (float, bf16, f16); arithmetic is in float, and a narrow format is only how a value rests in
// memory, rounded to nearest even. The compiler may not contract a * b + c (scripts/kernels.py): where one rounding is wanted, `fmaf` says so.
//
// Names of exported kernels: <file>_<pass>_<dtype>. Counts and offsets that may pass 2^31 elements are `size_t`.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;

#include "ptx.cuh"

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

// The same for a kernel that wants registers more than company: one block on a multiprocessor is enough.
#define KERNEL_ALONE(threads) extern "C" __global__ void __launch_bounds__(threads, 1)

// Exports `name<T>` for every element type: EXPORT_ALL(KERNELS) with `#define KERNELS(T, suffix) KERNEL(256) x_##suffix(...) { ... }`.
#define EXPORT_ALL(kernels) kernels(float, f32) kernels(bf16, bf16) kernels(f16, f16)

#define INFINITY __int_as_float(0x7f800000)
#define ALL_LANES 0xffffffffu

enum { WARP = 32 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// ---- number formats ----

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float to_float(f16 x) { return float_from_f16(x.bits); }

template <typename T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE bf16 from_float<bf16>(float x) { return {bf16_from_float(x)}; }
template <> DEVICE f16 from_float<f16>(float x) { return {f16_from_float(x)}; }

// ---- 16 bytes at a time ----

// As many elements as one thread reads with one instruction.
template <typename T> struct alignas(16) Pack {
  enum { COUNT = 16 / sizeof(T) };
  T at[COUNT];
};

template <typename T> DEVICE Pack<T> load_pack(const T* from) {
  Pack<T> pack;
  *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(from);
  return pack;
}

template <typename T> DEVICE void store_pack(T* to, const Pack<T>& pack) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&pack);
}

template <typename T> DEVICE bool is_aligned(const T* address) { return reinterpret_cast<size_t>(address) % 16 == 0; }

// ---- where a thread is ----

DEVICE int lane() { return threadIdx.x % WARP; }
DEVICE int warp() { return threadIdx.x / WARP; }
// The number of this thread in a grid of one dimension.
DEVICE size_t thread_of_grid() { return size_t(blockIdx.x) * blockDim.x + threadIdx.x; }
DEVICE size_t threads_of_grid() { return size_t(gridDim.x) * blockDim.x; }

// ---- reductions over a warp and over a block, in an order that depends on nothing but the number of threads ----

struct Sum {
  static DEVICE float identity() { return 0.0f; }
  static DEVICE float of(float a, float b) { return a + b; }
};

struct Max {
  static DEVICE float identity() { return -INFINITY; }
  static DEVICE float of(float a, float b) { return fmaxf(a, b); }
};

// Every lane gets the reduction over the warp.
template <typename Reduction> DEVICE float over_warp(float x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) x = Reduction::of(x, __shfl_xor_sync(ALL_LANES, x, distance));
  return x;
}

// Every thread of a block of THREADS gets the reduction over the block. `scratch` is shared memory of THREADS / 32 floats, which may be
// used again at once.
template <typename Reduction, int THREADS> DEVICE float over_block(float x, float* scratch) {
  constexpr int WARPS = THREADS / WARP;
  static_assert(THREADS % WARP == 0 && WARPS <= WARP, "whole warps, at most 32");
  x = over_warp<Reduction>(x);
  if (lane() == 0) scratch[warp()] = x;
  __syncthreads();
  x = over_warp<Reduction>(lane() < WARPS ? scratch[lane()] : Reduction::identity());
  __syncthreads();
  return x;
}

// The sum of terms that come in order, in the balanced binary tree: adjacent pairs are added, an odd one passes up. Up to 2^24 - 1 terms.
struct Tree {
  enum { LEVELS = 24 };
  // Level k holds the sum of 2^k terms that wait for their neighbours, where bit k of `count` is set.
  float at[LEVELS];
  uint32_t count = 0;

  DEVICE void push(float x) { push_at<0>(x); }

  // A sum of 2^LEVEL terms, in whose place none of them came alone.
  template <int LEVEL> DEVICE void push_at(float x) {
    bool done = false;
#pragma unroll
    for (int level = LEVEL; level < LEVELS; level++) {
      if (!done) {
        done = !(count >> level & 1);
        if (done) at[level] = x;
        else x = at[level] + x;
      }
    }
    count += 1u << LEVEL;
  }

  DEVICE float total() const {
    float x = 0.0f;
    bool any = false;
#pragma unroll
    for (int level = 0; level < LEVELS; level++) {
      if (count >> level & 1) {
        x = any ? at[level] + x : at[level];
        any = true;
      }
    }
    return x;
  }
};

// ---- packs that were put together in branches ----

// Stores a pack whose elements differ by branch. Of `store_pack` the compiler may make four stores of 4 bytes there, each of which touches
// all sectors of a warp's 512 bytes.
template <typename T> DEVICE void store_whole(T* to, const Pack<T>& pack) { store_16_global(to, *reinterpret_cast<const uint4*>(&pack)); }
