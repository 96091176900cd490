// One function for each machine instruction that C++ has no word for. Included through prelude.cuh.
#pragma once

#define DEVICE __device__ __forceinline__

// No instruction: the compiler no longer knows where `x` comes from, and so nothing that it has computed from it.
DEVICE void hide(uint32_t& x) { asm volatile("" : "+r"(x)); }

// ---- conversions, to nearest even ----

DEVICE uint16_t bf16_from_float(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

DEVICE uint16_t f16_from_float(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

DEVICE float float_from_f16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// ---- approximate functions: errors of 2 ulp or so, denormals flushed ----

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
