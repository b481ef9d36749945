// Weights in fragment order, and their product with split activations.
//
// A block is 64 rows x 128 columns, in the order in which the threads of a warpgroup want it as wgmma's A operand:
// thread t holds rows r = 16 (t / 32) + (t % 32) / 4 and r + 8, columns 4 (t % 4) .. + 3 of each 16. What each fragment
// row stands for is the layout generator's choice (src/pages.rs), e.g. gate rows below and up rows 8 above them.
//   FP4 block: [half 0..1][thread][16 B] codes, then [row][4] E8M0 bytes, one for each 32 columns.     4352 bytes
//     a 4-byte word holds 4 columns of row r in the low nibbles and of row r + 8 in the high ones.
//   FP8 block: [step 0..3][thread][16 B] codes, then f32 scale of rows r, f32 scale of rows r + 8, 8 B. 8208 bytes
// E2M1 to e4m3 is a shift and a mask and scales by 2^-6, undone by WEIGHT_UNIT. E8M0 byte 0 (2^-127) reads as 0.
#pragma once
#include "dev.cuh"
#include "layout.h"

DEV void e2m1_to_e4m3(uint32_t w, uint32_t& low, uint32_t& high) {
  high = (w & 0x80808080u) | ((w >> 2) & 0x1C1C1C1Cu);
  w <<= 4;
  low = (w & 0x80808080u) | ((w >> 2) & 0x1C1C1C1Cu);
}

struct Fp4 {
  static const int BLOCK_BYTES = FP4_BLOCK_BYTES, BLOCKS = FP4_BLOCKS_PER_PAGE;
  DEV static float unit() { return 64.0f; }
  // acc[0..1]: row r, tokens 2 (lane % 4) and + 1; acc[2..3]: row r + 8. x: split activations of the block's first column.
  DEV static void multiply(const uint8_t* block, const uint8_t* x, float (&acc)[4]) {
    const int t = dev::tid() % 128, r = t / 32 * 16 + t % 32 / 4;
    uint32_t w[8];
    dev::load16(block + t * 16, w); dev::load16(block + 2048 + t * 16, w + 4);
    const uint32_t sr = *(const uint32_t*)(block + 4096 + r * 4), sr8 = *(const uint32_t*)(block + 4096 + (r + 8) * 4);
    uint32_t a[4][4]; float d[4][8];
    UNROLL for (int i = 0; i < 4; i++) { e2m1_to_e4m3(w[2 * i], a[i][0], a[i][1]); e2m1_to_e4m3(w[2 * i + 1], a[i][2], a[i][3]); }
    dev::mma_begin();
    UNROLL for (int i = 0; i < 4; i++) dev::mma(d[i], a[i], x + i * 512, false);
    dev::mma_end();
    UNROLL for (int i = 0; i < 4; i++) {
      const float s = dev::number((sr >> (8 * i) & 255u) << 23), s8 = dev::number((sr8 >> (8 * i) & 255u) << 23);
      acc[0] += s * dev::fma_(0.0625f, d[i][4], d[i][0]); acc[1] += s * dev::fma_(0.0625f, d[i][5], d[i][1]);
      acc[2] += s8 * dev::fma_(0.0625f, d[i][6], d[i][2]); acc[3] += s8 * dev::fma_(0.0625f, d[i][7], d[i][3]);
    }
  }
};

struct Fp8 {
  static const int BLOCK_BYTES = FP8_BLOCK_BYTES, BLOCKS = FP8_BLOCKS_PER_PAGE;
  DEV static float unit() { return 1.0f; }
  DEV static void multiply(const uint8_t* block, const uint8_t* x, float (&acc)[4]) {
    const int t = dev::tid() % 128;
    const float s = *(const float*)(block + 8192), s8 = *(const float*)(block + 8196);
    uint32_t a[4][4]; float d[4][8];
    UNROLL for (int i = 0; i < 4; i++) dev::load16(block + i * 2048 + t * 16, a[i]);
    dev::mma_begin();
    UNROLL for (int i = 0; i < 4; i++) dev::mma(d[i], a[i], x + i * 512, false);
    dev::mma_end();
    // Hopper's FP8 tensor cores keep about 14 bits of a running sum: adding up 128 columns inside wgmma costs 3.0e-4 of
    // relative L2 error (H200, 2026-11-21), so each 32 columns are taken out and added in f32.
    UNROLL for (int i = 0; i < 4; i++) {
      acc[0] += s * dev::fma_(0.0625f, d[i][4], d[i][0]); acc[1] += s * dev::fma_(0.0625f, d[i][5], d[i][1]);
      acc[2] += s8 * dev::fma_(0.0625f, d[i][6], d[i][2]); acc[3] += s8 * dev::fma_(0.0625f, d[i][7], d[i][3]);
    }
  }
};
