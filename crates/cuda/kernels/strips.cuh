// Weights of the resident engine in strips of 16 rows, and their product with split activations, by one warpgroup.
//
// A strip-block is 16 rows x 128 columns in fragment order: lane l of the warp that takes it holds rows l / 4 and l / 4 + 8.
//   STRIP_FP4  [half 0..1][lane][16 B] codes as in weights.cuh, [row][4] E8M0                                    1088 B
//   STRIP_FP8  [step 0..3][lane][16 B] codes, f32 scale of rows 0..7, f32 scale of rows 8..15, 8 B               2064 B
//   STRIP_BF16 [step 0..7][lane][16 B]: columns 2 (l % 4) + {0, 1} of rows l / 4, l / 4 + 8, then columns + 8    4096 B
//   STRIP_F32  two STRIP_BF16, high part and rest (an f32 weight to 2^-17)                                       8192 B
// A page is [block][strip]. Warp w of a warpgroup takes strip w; a tile has 1 to 4 strips, warps past them repeat the last
// one and drop the result (wgmma wants the whole warpgroup).
// Activations: [k / 16][hi, lo][8 rows][16 codes], then factors [k / 32][8 rows] f32: x = factor * (hi + lo / 16).
#pragma once
#include "split.cuh"
#include "weights.cuh"

DEV int strip_bytes(int format) { return format == STRIP_FP4 ? 1088 : format == STRIP_FP8 ? 2064 : format == STRIP_BF16 ? 4096 : 8192; }
DEV float strip_unit(int format) { return format == STRIP_FP4 ? 64.0f : 1.0f; }

// acc += scale of rows r and r + 8 times the factors of tokens 2 (lane % 4) and + 1 times this step's sums.
DEV void strip_add(const float (&d)[8], float s, float s8, const float* factors, float (&acc)[4]) {
  const int token = dev::tid() % 4 * 2;
  const float f0 = factors[token], f1 = factors[token + 1];
  acc[0] += s * f0 * dev::fma_(0.0625f, d[4], d[0]); acc[1] += s * f1 * dev::fma_(0.0625f, d[5], d[1]);
  acc[2] += s8 * f0 * dev::fma_(0.0625f, d[6], d[2]); acc[3] += s8 * f1 * dev::fma_(0.0625f, d[7], d[3]);
}
DEV void strip_mma(uint32_t (&a)[4][4], const uint8_t* x, float (&d)[4][8]) {
  dev::mma_begin();
  UNROLL for (int i = 0; i < 4; i++) dev::mma(d[i], a[i], x + i * 512, false);
  dev::mma_end();
}
struct StripFp4 {
  DEV static void multiply(const uint8_t* p, const uint8_t* x, const float* factors, float (&acc)[4]) {
    const int lane = dev::tid() % 32, r = lane / 4;
    uint32_t w[8], a[4][4]; float d[4][8];
    dev::load16(p + lane * 16, w); dev::load16(p + 512 + lane * 16, w + 4);
    const uint32_t sr = *(const uint32_t*)(p + 1024 + r * 4), sr8 = *(const uint32_t*)(p + 1056 + r * 4);
    UNROLL for (int i = 0; i < 4; i++) { e2m1_to_e4m3(w[2 * i], a[i][0], a[i][1]); e2m1_to_e4m3(w[2 * i + 1], a[i][2], a[i][3]); }
    strip_mma(a, x, d);
    UNROLL for (int i = 0; i < 4; i++) strip_add(d[i], dev::number((sr >> (8 * i) & 255u) << 23), dev::number((sr8 >> (8 * i) & 255u) << 23), factors + 8 * i, acc);
  }
};
struct StripFp8 {
  DEV static void multiply(const uint8_t* p, const uint8_t* x, const float* factors, float (&acc)[4]) {
    const int lane = dev::tid() % 32;
    const float s = *(const float*)(p + 2048), s8 = *(const float*)(p + 2052);
    uint32_t a[4][4]; float d[4][8];
    UNROLL for (int i = 0; i < 4; i++) dev::load16(p + i * 512 + lane * 16, a[i]);
    strip_mma(a, x, d);
    UNROLL for (int i = 0; i < 4; i++) strip_add(d[i], s, s8, factors + 8 * i, acc);  // each 32 columns taken out: weights.cuh says why
  }
};
// Activations of columns 2 (lane % 4) + {0, 1} of row lane / 4, as two bf16: exact, hi + lo / 16 has at most 8 bits.
DEV uint32_t strip_x_bf16(const uint8_t* x) {
  const int lane = dev::tid() % 32, at = lane / 4 * 16 + lane % 4 * 2;
  float ha, hb, la, lb;
  dev::from_e4m3x2(*(const uint16_t*)(x + at), ha, hb); dev::from_e4m3x2(*(const uint16_t*)(x + 128 + at), la, lb);
  return dev::to_bf16x2(dev::fma_(0.0625f, la, ha), dev::fma_(0.0625f, lb, hb));
}
struct StripBf16 {
  DEV static void half_product(const uint8_t* p, const uint8_t* x, const float* factors, float (&acc)[4]) {
    const int lane = dev::tid() % 32, token = lane % 4 * 2;
    UNROLL for (int i = 0; i < 4; i++) {
      float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      UNROLL for (int j = 0; j < 2; j++) {
        uint32_t a[4]; dev::load16(p + (2 * i + j) * 512 + lane * 16, a);
        const uint8_t* at = x + (2 * i + j) * 256;
        dev::mma16(d, a, strip_x_bf16(at), strip_x_bf16(at + 8));
      }
      const float f0 = factors[8 * i + token], f1 = factors[8 * i + token + 1];
      acc[0] += f0 * d[0]; acc[1] += f1 * d[1]; acc[2] += f0 * d[2]; acc[3] += f1 * d[3];
    }
  }
  DEV static void multiply(const uint8_t* p, const uint8_t* x, const float* factors, float (&acc)[4]) { half_product(p, x, factors, acc); }
};
struct StripF32 {
  DEV static void multiply(const uint8_t* p, const uint8_t* x, const float* factors, float (&acc)[4]) {
    StripBf16::half_product(p, x, factors, acc); StripBf16::half_product(p + 4096, x, factors, acc);
  }
};
