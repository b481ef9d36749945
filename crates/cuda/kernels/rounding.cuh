// Powers of two and roundings of activations.
#pragma once
#include "dev.cuh"

// The power of two that takes `largest` into (224, 448], so that e4m3 has it too; 1 for zeros. Clamped to 2^-60..2^60.
DEV float activation_scale(float largest) {
  if (!(largest > 0.0f)) return 1.0f;
  uint32_t e = dev::bits(448.0f / largest) >> 23;
  e = e < 67 ? 67 : e > 187 ? 187 : e;
  return dev::number(e << 23);
}
// Two bf16 that add up to v, with 16 bits, for two values.
DEV void split_bf16(float a, float b, uint32_t& hi, uint32_t& lo) {
  hi = dev::to_bf16x2(a, b);
  lo = dev::to_bf16x2(a - dev::number(hi << 16), b - dev::number(hi & 0xffff0000u));
}
DEV float round_bf16(float v) {
  const uint32_t u = dev::bits(v);
  return dev::number((u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u);
}
