// Sums without any rounding, as integers: of squares and of losses.
#include "prelude.cuh"

enum { THREADS = 256 };

// ---- the sum of squares, as integers ----

// A square is an integer of 48 bits times a power of four that the exponent gives. A thread adds up squares of WINDOW neighbouring exponents
// in registers, shifted to the least of them, `base`, as three words of 32 bits; whatever does not fit in its window goes to a table in
// shared memory, and so does its own sum where the window moves. Entry e of the table is in units of the square of exponent e's last place.
enum { WINDOW = 16, EXPONENTS = 256, LIMBS = 3, ENTRIES = EXPONENTS * LIMBS, PACKS_OF_TILE = 4, TILE = THREADS * PACKS_OF_TILE * 4 };

// A table of 64-bit numbers in two halves: shared memory adds 32 bits at a time by itself.
struct Table {
  uint32_t* low;
  uint32_t* high;

  DEVICE void add(int entry, uint64_t value) const {
    uint32_t half = uint32_t(value), up = uint32_t(value >> 32);
    if (half) up += atomicAdd(&low[entry], half) > ~half;
    if (up) atomicAdd(&high[entry], up);
  }
};

struct Window {
  uint64_t limbs[LIMBS] = {};
  // No window yet where zero.
  uint32_t base = 0;

  // What is added to a limb is below 2^32, less than 2^31 times.
  DEVICE void flush(const Table& table) {
#pragma unroll
    for (int i = 0; i < LIMBS; i++) {
      // What passes 32 bits belongs to the next limb; the last takes it all.
      uint64_t here = i + 1 < LIMBS ? limbs[i] & 0xffffffff : limbs[i];
      if (i + 1 < LIMBS) limbs[i + 1] += limbs[i] >> 32;
      table.add(base * LIMBS + i, here);
      limbs[i] = 0;
    }
  }

  // Lets squares around those of exponent `top` fit. It moves only when it must: neighbouring tiles are of a size.
  DEVICE void move_to(uint32_t top, const Table& table) {
    if (top - base - WINDOW / 2 < WINDOW / 2) return;
    uint32_t fresh = uint32_t(min(max(int(top) - 12, 1), 255 - WINDOW));
    if (fresh == base) return;
    if (base != 0) flush(table);
    base = fresh;
  }

  DEVICE void add(float x, const Table& table) {
    uint32_t bits = __float_as_uint(x) & 0x7fffffff, exponent = max(bits >> 23, 1u);
    uint32_t significand = (bits & 0x7fffff) | (bits >= 0x800000 ? 0x800000 : 0);
    uint64_t square = uint64_t(significand) * significand;
    uint32_t low = uint32_t(square), high = uint32_t(square >> 32), above = exponent - base;
    if (above < WINDOW) {
      limbs[0] += low << 2 * above;
      limbs[1] += __funnelshift_l(low, high, 2 * above);
      limbs[2] += __funnelshift_l(high, 0, 2 * above);
    } else if (significand != 0) {
      table.add(exponent * LIMBS, low);
      table.add(exponent * LIMBS + 1, high);
    }
  }
};

// table [256, 3] += the squares of x, by exponent, in limbs of 32 bits; n < 2^31.
//
// A block takes a tile of 4096 elements at a time, a thread 4 packs of 16 bytes of it; a grid strides over all. 4 bytes an element. At the
// end a block adds what it found, a dozen entries or so, to the table in global memory. Any alignment; elements go one by one where x is not
// aligned.
KERNEL(THREADS) exact_squares(uint64_t* table, const float* x, size_t n) {
  __shared__ uint32_t low[ENTRIES], high[ENTRIES];
  for (int i = threadIdx.x; i < ENTRIES; i += THREADS) low[i] = high[i] = 0;
  __syncthreads();
  Table shared = {low, high};
  Window window;
  bool aligned = is_aligned(x);
  for (size_t start = size_t(blockIdx.x) * TILE; start < n; start += size_t(gridDim.x) * TILE) {
    Pack<float> packs[PACKS_OF_TILE];
    bool whole = aligned && n - start >= TILE;
#pragma unroll
    for (int k = 0; k < PACKS_OF_TILE; k++) {
      size_t first = start + (k * THREADS + threadIdx.x) * 4;
      if (whole) {
        packs[k] = load_pack(x + first);
      } else {
        // Side by side: their order does not matter.
#pragma unroll
        for (int i = 0; i < 4; i++) {
          size_t at = start + (k * 4 + i) * THREADS + threadIdx.x;
          packs[k].at[i] = at < n ? x[at] : 0.0f;
        }
      }
    }
    uint32_t top = 0;
#pragma unroll
    for (int k = 0; k < PACKS_OF_TILE; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) top = max(top, __float_as_uint(packs[k].at[i]) & 0x7fffffff);
    }
    if (top == 0) continue;
    window.move_to(top >> 23, shared);
#pragma unroll
    for (int k = 0; k < PACKS_OF_TILE; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) window.add(packs[k].at[i], shared);
    }
  }
  if (window.base != 0) window.flush(shared);
  __syncthreads();
  for (int i = threadIdx.x; i < ENTRIES; i += THREADS) {
    uint64_t sum = uint64_t(high[i]) << 32 | low[i];
    if (sum) atomicAdd(&table[i], sum);
  }
}

// ---- the sum of losses, as an integer in units of 2^-60 ----

enum { LOSS_LIMBS = 4 };

// table[0..4] += the losses as signed limbs of 32 bits; table[4] += how many were not finite, or 2^63 and beyond. n < 2^31.
//
// A thread takes one loss at a time: 4 bytes; at the end each warp adds its limbs to the table.
KERNEL(THREADS) exact_losses(uint64_t* table, const float* losses, size_t n) {
  uint64_t limbs[LOSS_LIMBS] = {}, nonfinite = 0;
  for (size_t i = thread_of_grid(); i < n; i += threads_of_grid()) {
    uint32_t bits = __float_as_uint(losses[i]), rest = bits & 0x7fffffff, exponent = max(rest >> 23, 1u);
    if (rest >= (127u + 63) << 23) {
      nonfinite++;
      continue;
    }
    // The last place of a loss is 2^(exponent - 150), and so 2^(exponent - 90) units.
    uint32_t significand = (rest & 0x7fffff) | (rest >= 0x800000 ? 0x800000 : 0), up = exponent < 90 ? 0 : exponent - 90;
    if (exponent < 90) significand >>= min(90 - exponent, 31u);
    uint64_t shifted = uint64_t(significand) << up % 32;
#pragma unroll
    for (uint32_t limb = 0; limb < LOSS_LIMBS; limb++) {
      uint32_t here = limb == up / 32 ? uint32_t(shifted) : limb == up / 32 + 1 ? uint32_t(shifted >> 32) : 0;
      limbs[limb] += bits >> 31 ? -uint64_t(here) : here;
    }
  }
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int limb = 0; limb < LOSS_LIMBS; limb++) limbs[limb] += __shfl_xor_sync(ALL_LANES, limbs[limb], distance);
    nonfinite += __shfl_xor_sync(ALL_LANES, nonfinite, distance);
  }
  if (lane() == 0) {
#pragma unroll
    for (int limb = 0; limb < LOSS_LIMBS; limb++) {
      if (limbs[limb]) atomicAdd(&table[limb], limbs[limb]);
    }
    if (nonfinite) atomicAdd(&table[LOSS_LIMBS], nonfinite);
  }
}
