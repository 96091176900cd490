// Functions of src/ops/functions.rs and src/device/cpu/vector.rs, operation by operation: the same bits as on the CPU. Included after
// prelude.cuh.
#pragma once

// A NaN stays one.
DEVICE float clamp(float x, float least, float most) {
  x = x < least ? least : x;
  return x > most ? most : x;
}

// 1.5 * 2^23, and the bias of an exponent: adding it rounds to a whole number, whose biased exponent then stands in the low bits.
#define ROUNDER (12582912.0f + 127.0f)

// 2^(rest + n) for shifted = n + ROUNDER.
DEVICE float two_to_the(float rest, float shifted) {
  float power = fmaf(rest, 0.0013264728f, 0.009671513f);
  power = fmaf(rest, power, 0.055507336f);
  power = fmaf(rest, power, 0.24022242f);
  power = fmaf(rest, power, 0.693147f);
  return fmaf(rest, power, 1.0f) * __int_as_float(__float_as_int(shifted) << 23);
}

// 2^x for x within -126 .. 127, or NaN.
DEVICE float exp2_within(float x) {
  float shifted = x + ROUNDER;
  return two_to_the(x - (shifted - ROUNDER), shifted);
}

// e^x for x within -87.3 .. 88, or NaN.
DEVICE float exp_within(float x) {
  const float LOG2_E = 1.44269504f;
  float shifted = fmaf(x, LOG2_E, ROUNDER);
  return two_to_the(fmaf(x, LOG2_E, ROUNDER - shifted), shifted);
}

struct Sigmoid {
  float value, complement;
};

// 1 / (1 + e^-x) and 1 - that, from e^-x.
DEVICE Sigmoid sigmoid(float decay) {
  float s = 1.0f / (1.0f + decay);
  return {s, decay * s};
}
