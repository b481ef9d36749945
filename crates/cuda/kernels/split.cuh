// Exact activations on FP8 tensor cores: a bf16 value has 8 significant bits, e4m3 has 4, so
//   x * s = hi + lo / 16,   hi = e4m3(x * s),   lo = e4m3(16 * (x * s - hi)),   s a power of two for each row.
// Relative error of the pair is at most 2^-9 of the value, or 2^-13 of the row's unit 1 / s where hi is subnormal.
// hi of 8 rows are columns 0..7 and lo columns 8..15 of one wgmma's B, so that the weights are converted once for both.
#pragma once
#include "dev.cuh"

// The power of two that takes `largest` into (224, 448]; 1 for a row of zeros. Clamped to 2^-60..2^60.
DEV float split_scale(float largest) {
  if (!(largest > 0.0f)) return 1.0f;
  uint32_t e = dev::bits(448.0f / largest) >> 23;
  e = e < 67 ? 67 : e > 187 ? 187 : e;
  return dev::number(e << 23);
}
// Two neighbouring columns of a row: codes in the low 16 bits of `hi` and `lo`.
DEV void split_pair(float a, float b, float scale, uint32_t& hi, uint32_t& lo) {
  float ha, hb;
  hi = dev::to_e4m3x2(a * scale, b * scale);
  dev::from_e4m3x2(hi, ha, hb);
  lo = dev::to_e4m3x2(16.0f * dev::fma_(a, scale, -ha), 16.0f * dev::fma_(b, scale, -hb));
}
DEV float round_bf16(float v) {
  const uint32_t u = dev::bits(v);
  return dev::number((u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u);
}
// Byte offset of column pair `k` (even) of row `row` in B, the operand of dev::mma; lo sits 128 bytes after hi.
DEV int split_offset(int row, int k) { return (k >> 4) * 256 + row * 16 + (k & 15); }
