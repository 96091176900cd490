// The functions of src/ops/functions.rs, operation by operation: the same bits as on the CPU. Included after prelude.cuh.
#pragma once

// A NaN stays one.
DEVICE float clamp(float x, float least, float most) {
  x = x < least ? least : x;
  return x > most ? most : x;
}

DEVICE float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// e^x for x within -104 .. 89, or NaN.
DEVICE float exp_within(float x) {
  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
  const float ROUNDER = 12582912.0f;
  float shifted = x * 1.44269504f + ROUNDER;
  float n = shifted - ROUNDER;
  float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float q = 1.0f / 5040.0f;
  q = q * r + 1.0f / 720.0f;
  q = q * r + 1.0f / 120.0f;
  q = q * r + 1.0f / 24.0f;
  q = q * r + 1.0f / 6.0f;
  q = q * r + 0.5f;
  float p = 1.0f + (r + (r * r) * q);
  int exponent = __float_as_int(shifted) - __float_as_int(ROUNDER), half = exponent >> 1;
  return p * power_of_two(half) * power_of_two(exponent - half);
}

// e^x. Overflows to infinity, underflows through the denormals to zero; NaN stays NaN.
DEVICE float exp_exact(float x) { return exp_within(clamp(x, -104.0f, 89.0f)); }

struct Sigmoid {
  float value, complement;
};

// 1 / (1 + e^-x) and 1 - that.
DEVICE Sigmoid sigmoid(float x) {
  float e = exp_within(-clamp(x, -88.0f, 88.0f));
  float s = 1.0f / (1.0f + e);
  return {s, e * s};
}
