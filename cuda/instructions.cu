// One small kernel for each form of instruction that the kernels take their numbers through, so that a GPU and the emulator can be held
// to each other instruction by instruction (tests/instructions.rs). Nothing that trains launches these.
//
// All have the same parameters: `in` is three operands of n words each, `out` is n words; n is a multiple of 1024. Blocks of 256 threads,
// of which each makes 1, 2 or 4 words. 16 bytes an element at most; nothing here is made for speed.
#include "prelude.cuh"

enum { THREADS = 256 };

DEVICE float f(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t u(float x) { return __float_as_uint(x); }
DEVICE uint64_t wide(uint32_t high, uint32_t low) { return uint64_t(high) << 32 | low; }

// out[i] = word, of a, b and c at i.
#define EACH(name, word) \
  DEVICE uint32_t word_of_##name(uint32_t a, uint32_t b, uint32_t c) { return word; } \
  KERNEL(THREADS) instructions_##name(uint32_t* out, const uint32_t* in, size_t n) { \
    size_t i = thread_of_grid(); \
    out[i] = word_of_##name(in[i], in[n + i], in[2 * n + i]); \
  }

// ---- conversions ----

EACH(bf16_from_float, bf16_from_float(f(a)))
EACH(f16_from_float, f16_from_float(f(a)))
EACH(float_from_f16, u(float_from_f16(uint16_t(a))))
EACH(two_bf16_from_float, two_bf16_from_float(f(a), f(b)))
EACH(two_f16_from_float, two_f16_from_float(f(a), f(b)))
EACH(truncate, u(truncf(f(a))))
EACH(unsigned_from_float, uint32_t(f(a)))
EACH(float_from_wide, u(float(wide(a, b))))
EACH(float_from_double, u(float(double(f(a)) * double(f(b)) + double(f(c)))))

// ---- arithmetic ----

EACH(add, u(f(a) + f(b)))
EACH(subtract, u(f(a) - f(b)))
EACH(multiply, u(f(a) * f(b)))
EACH(multiply_add, u(fmaf(f(a), f(b), f(c))))
EACH(divide, u(f(a) / f(b)))
EACH(reciprocal, u(1.0f / f(a)))
EACH(square_root, u(sqrtf(f(a))))
EACH(maximum, u(fmaxf(f(a), f(b))))
EACH(divide_double, u(float(double(f(a)) / double(f(b)))))
EACH(exp2_fast, u(exp2_fast(f(a))))
EACH(log2_fast, u(log2_fast(f(a))))
EACH(reciprocal_fast, u(reciprocal_fast(f(a))))
EACH(divide_wide, uint32_t(wide(a, b) / (c | 1)))
EACH(remainder_wide, uint32_t(wide(a, b) % (c | 1)))
EACH(multiply_wide, uint32_t(wide(a, b) * wide(c, a) >> 32))
EACH(shift_funnel, __funnelshift_l(a, b, c))
EACH(count_ones, uint32_t(__popc(a)))

// ---- between the lanes of a warp ----

EACH(shuffle_xor, __shfl_xor_sync(ALL_LANES, a, 5))
EACH(shuffle_from, __shfl_sync(ALL_LANES, a, b % 32))
EACH(ballot, __ballot_sync(ALL_LANES, a & 1))
EACH(any, uint32_t(__any_sync(ALL_LANES, a % 32 == 0)))

// ---- shared memory, and copies into it ----

// Word t ^ 1 of the block comes back from where its neighbour put it.
KERNEL(THREADS) instructions_shared_words(uint32_t* out, const uint32_t* in, size_t n) {
  __shared__ uint32_t shared[THREADS];
  size_t i = thread_of_grid();
  store_4_shared(shared_address(&shared[threadIdx.x ^ 1]), in[i]);
  __syncthreads();
  out[i] = load_4_shared(shared_address(&shared[threadIdx.x]));
}

// Each thread makes 4 words: as many bytes of them as b says, of 0 to 16, and zeros.
KERNEL(THREADS) instructions_copy_16(uint32_t* out, const uint32_t* in, size_t n) {
  __shared__ alignas(16) uint32_t shared[THREADS * 4];
  size_t i = thread_of_grid();
  uint32_t place = shared_address(&shared[threadIdx.x * 4]);
  copy_16_async(place, in + i * 4, in[n + i] % 17);
  end_copies();
  await_copies<0>();
  *reinterpret_cast<uint4*>(out + i * 4) = load_16_shared(place);
}

// The same of 2 words and 0 to 8 bytes.
KERNEL(THREADS) instructions_copy_8(uint32_t* out, const uint32_t* in, size_t n) {
  __shared__ alignas(16) uint32_t shared[THREADS * 2];
  size_t i = thread_of_grid();
  uint32_t place = shared_address(&shared[threadIdx.x * 2]);
  copy_8_async(place, in + i * 2, in[n + i] % 9);
  end_copies();
  await_copies<0>();
  *reinterpret_cast<uint2*>(out + i * 2) = load_8_shared(place);
}

// One word and 0 to 4 bytes, in two groups of which the first is waited for first.
KERNEL(THREADS) instructions_copy_4(uint32_t* out, const uint32_t* in, size_t n) {
  __shared__ uint32_t shared[THREADS * 2];
  size_t i = thread_of_grid();
  uint32_t first = shared_address(&shared[threadIdx.x * 2]);
  copy_4_async(first, in + i, in[n + i] % 5);
  end_copies();
  copy_4_async(first + 4, in + 2 * n + i, 4);
  end_copies();
  await_copies<1>();
  uint32_t x = load_4_shared(first);
  await_copies<0>();
  out[i] = x ^ load_4_shared(first + 4);
}

// Sums of b by a % 64. `out` is 256 words more than there are threads, all zero: first 64 numbers of 64 bits, the sums over the grid, by
// additions in global memory; then for each block 256 words, of which 64 are its own sums, by additions of 32 bits in shared memory. In
// what order those go nobody can tell, but how often one passes 32 bits is certain: that many times 2^40 the numbers of 64 bits get too.
KERNEL(THREADS) instructions_atomic_add(uint32_t* out, const uint32_t* in, size_t n) {
  __shared__ uint32_t sums[64];
  size_t i = thread_of_grid();
  if (threadIdx.x < 64) sums[threadIdx.x] = 0;
  __syncthreads();
  uint32_t slot = in[i] % 64, value = in[n + i];
  uint32_t before = atomicAdd(&sums[slot], value);
  atomicAdd(reinterpret_cast<uint64_t*>(out) + slot, uint64_t(value) + (uint64_t(before > ~value) << 40));
  __syncthreads();
  out[(1 + size_t(blockIdx.x)) * THREADS + threadIdx.x] = threadIdx.x < 64 ? sums[threadIdx.x] : 0;
}

// ---- matrices ----

// Four 8x8 matrices of 16 bits a warp, of which lane l gives the address of row l ^ 6: 4 words a thread.
template <bool TRANSPOSED> DEVICE void matrices(uint32_t* out, const uint32_t* in) {
  __shared__ alignas(16) uint32_t shared[THREADS * 4];
  size_t i = thread_of_grid();
  store_16_shared(shared_address(&shared[threadIdx.x * 4]), *reinterpret_cast<const uint4*>(in + i * 4));
  __syncwarp();
  uint32_t to[4], row = shared_address(&shared[(threadIdx.x ^ 6) * 4]);
  if (TRANSPOSED) load_matrices_transposed(to, row);
  else load_matrices(to, row);
  *reinterpret_cast<uint4*>(out + i * 4) = make_uint4(to[0], to[1], to[2], to[3]);
}

KERNEL(THREADS) instructions_load_matrices(uint32_t* out, const uint32_t* in, size_t n) { matrices<false>(out, in); }
KERNEL(THREADS) instructions_load_matrices_transposed(uint32_t* out, const uint32_t* in, size_t n) { matrices<true>(out, in); }

// d = a b + c by each warp: a lane holds 4 words of the first operand, the first 2 of 4 of the second, and 4 of the third.
#define PRODUCT(suffix) \
  KERNEL(THREADS) instructions_multiply_##suffix(uint32_t* out, const uint32_t* in, size_t n) { \
    size_t i = thread_of_grid() * 4; \
    uint32_t a[4] = {in[i], in[i + 1], in[i + 2], in[i + 3]}; \
    float d[4] = {f(in[2 * n + i]), f(in[2 * n + i + 1]), f(in[2 * n + i + 2]), f(in[2 * n + i + 3])}; \
    multiply_##suffix(d, a, in[n + i], in[n + i + 1]); \
    for (int k = 0; k < 4; k++) out[i + k] = u(d[k]); \
  }
PRODUCT(bf16)
PRODUCT(f16)
