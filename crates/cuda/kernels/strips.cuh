// Weights of the resident engine in strips of 16 rows, and their product with a step's activations, by one warp.
//
// A strip-block is 16 rows x 128 columns in fragment order: lane l holds rows l / 4 and l / 4 + 8, and of each 32 columns the eight
// 4 (l % 4) + {0..3} and 16 + 4 (l % 4) + {0..3}.
//   STRIP_FP4  [half 0..1][lane][16 B] codes as strip_codes4 wants them, [half][r 0..7][row r, r + 8][2] E8M0         1088 B
//   STRIP_FP8  [step 0..3][lane][16 B] codes for strip_codes8, f32 scale of rows 0..7, f32 scale of rows 8..15, 8 B               2064 B
//   STRIP_BF16 [step 0..7][lane][16 B]: columns 4 (l % 4) + {0, 1} of rows l / 4, l / 4 + 8, then columns + 2      4096 B
//   STRIP_F32  two STRIP_BF16, high part and rest (an f32 weight to 2^-17)                                       8192 B
// A page is [block][strip]; a tile has 1 to 4 strips.
// Activations are f16 times a power of two for 64 columns of a row: exact for bf16 values down to 2^-22 of the largest of the 64. Where
// SHAPE_WIDE says so, an activation is the sum of two f16, 22 bits of an f32: each 32 columns are followed by their second terms.
// [k / 32][columns][32] in the lanes' order (x_place), then factors [k / 32][columns] f32. Columns are the rows of a step. Inner has a column
// for each row of each expert, factors of 32 as [k / 64][columns][2], and, where experts are routed, a last column of zeros.
// Weights of 4 and 8 bits are widened to f16, exactly, and multiplied by mma.sync: wgmma takes FP8 as it is, but needs bf16
// activations as two e4m3 terms, keeps 14 bits of a sum, and holds so many registers that an SM has two warps a scheduler for it.
// Weights of 16 bits are multiplied in bf16: activations have 8 bits.
#pragma once
#include "shapes.h"
#include "rounding.cuh"

DEV float strip_unit(int format) { return format == STRIP_FP4 ? 16384.0f : format == STRIP_FP8 ? 256.0f : 1.0f; }
// Place of column k of 32 among a row's 32 f16.
DEV int x_place(int k) { return k % 16 / 4 * 8 + k / 16 * 4 + k % 4; }
// Bytes of one column of K, of `columns` rows; what is kept of an activation.
DEV int x_column_bytes(int columns) { return columns * (WIDE ? 4 : 2); }
DEV float rounded_activation(float v) { return WIDE ? v : round_bf16(v); }
// Columns k and, of 32 bits, k + 1 (k even) of row `row` of `columns`, times their power of two.
template <class Code> DEV void put_activations(uint8_t* x, int columns, int row, int k, float a, float b) {
  uint8_t* to = x + (uint64_t)(k / 32 * 32) * x_column_bytes(columns) + row * 64 + x_place(k % 32) * 2;
  const uint32_t first = dev::to_f16x2(a, b);
  *(Code*)to = (Code)first;
  if (!WIDE) return;
  float c, d; dev::from_f16x2(first, c, d);
  *(Code*)(to + columns * 64) = (Code)dev::to_f16x2(a - c, b - d);
}

// What a warp needs of a strip-block's operands. x: this lane's eight values of the first 32 of K, of column lane / 4.
// TOKENS columns: one factor for 64 of K; factors are of the lane's first column of the result, the other's follows.
// INNER + n columns (0: `columns`), of Inner: factors of 32; `second`: bytes from the factor of the lane's first column of the result to that of its other.
static const int INNER = 1000;
template <int COLUMNS> struct Operand {
  const uint8_t* x; const float* factors; int lane, columns, second;
  static const bool ROWS = COLUMNS < INNER;
  DEV int stride() const { return ROWS ? COLUMNS : COLUMNS > INNER ? COLUMNS - INNER : columns; }
  DEV void get(int i, uint32_t (&b)[4], bool rounded, int term) const {
    dev::load16(x + (i * (WIDE ? 2 : 1) + term) * 64 * stride(), b);
    // Plain e4m3 activations: weights of 4 and 8 bits see the nearest e4m3, the router, lm_head and other 16-bit weights everything.
    if (ONE_TERM && rounded) UNROLL for (int j = 0; j < 4; j++) b[j] = dev::e4m3_of_f16x2(b[j]);
  }
  DEV const float* factor_at(int i) const { return factors + (ROWS ? COLUMNS * i : i / 2 * 2 * stride() + i % 2); }
  DEV float factor(int i) const { return *factor_at(i); }
  DEV float factor2(int i) const { return ROWS ? factor_at(i)[1] : *(const float*)((const uint8_t*)factor_at(i) + second); }
  // Factors of the first and the next 32 columns of Inner, for both columns of the result.
  DEV void two_factors(float (&f)[2][2]) const {
    UNROLL for (int j = 0; j < 2; j++) { const uint64_t v = *(const uint64_t*)((const uint8_t*)factors + (j ? second : 0)); f[0][j] = dev::number((uint32_t)v); f[1][j] = dev::number((uint32_t)(v >> 32)); }
  }
};

// This lane's activations of 32 columns: one f16 each, or two.
struct Terms {
  uint32_t first[4], second[4];
  template <int C> DEV void get(const Operand<C>& o, int i, bool rounded) { o.get(i, first, rounded, 0); if (WIDE) o.get(i, second, rounded, 1); }
  // d += A x columns 8 j .. + 15 (j 0 or 2), in the lanes' order.
  DEV void multiply(float (&d)[4], const uint32_t (&a)[4], int j) const {
    dev::mma16h(d, a, first[j], first[j + 1]);
    if (WIDE) dev::mma16h(d, a, second[j], second[j + 1]);
  }
  // The same as bf16, one each, or three, of which the last has 8 of the second term's bits; gives how many.
  DEV int to_bf16(uint32_t (&t)[3][4]) const {
    UNROLL for (int j = 0; j < 4; j++) {
      if (!WIDE) { t[0][j] = dev::bf16x2_of_f16x2(first[j]); continue; }
      float a, b; dev::from_f16x2(first[j], a, b);
      split_bf16(a, b, t[0][j], t[1][j]); t[2][j] = dev::bf16x2_of_f16x2(second[j]);
    }
    return WIDE ? 3 : 1;
  }
};
// Eight codes of E2M1 as f16 times 2^-14: a[0] columns 0 and 1 of row r, a[1] of row r + 8, a[2] and a[3] columns 2 and 3. An f16's high
// byte has such a code at bits 7 and 3..1. A byte has one of row r there and one of row r + 8 at bits 0 and 6..4; columns 0 to 3 are bytes
// 1, 3, 0, 2 (src/strips.rs). Shifts, masks and byte moves: the conversion from e4m3 that the chip has is slower, and of these the left
// shifts run on the multipliers, beside the rest.
DEV void strip_codes4(uint32_t w, uint32_t (&a)[4]) {
  const uint32_t r8 = ((w >> 3) & 0x0E0E0E0Eu) | ((w << 7) & 0x80808080u);
  a[0] = w & 0x8E008E00u; a[2] = (w << 8) & 0x8E008E00u; a[1] = r8 & 0xFF00FF00u; a[3] = dev::high_bytes<0x2404>(r8);
}
// Four codes of E4M3 as f16 times 2^-8: columns 0 and 1 (bits 15, 13..7 of a half-word), columns 2 and 3 (bits 14, 6..0).
DEV void strip_codes8(uint32_t w, uint32_t& a, uint32_t& b) {
  a = w & 0xBF80BF80u;
  b = ((w << 7) & 0x3F803F80u) | ((w << 1) & 0x80008000u);
}
// acc[0..1]: row lane / 4, columns 2 (lane % 4) and + 1; acc[2..3]: row + 8. `add`: acc += the product of STRIPS strip-blocks, which share the
// activations; `inner`: of one's columns `piece` of PIECES. Both take pieces that `load` has found in a page: where HELD, all of them is in
// registers, and the page may be given back before the products.
struct StripFp4 {
  static const int PIECES = 2, BYTES = 1088, PAIRED = 2;  // PAIRED: strips of a warp, where a tile's number is a multiple of it
  static const bool HELD = true;
  struct Piece { uint32_t w[4], e; };  // codes; scales of rows lane / 4 (bytes 0 and 1) and + 8
  // E8M0 byte i becomes the exponent of an f32.
  DEV static float scale(uint32_t e, int i) { return dev::number(i == 3 ? (e >> 1) & 0x7F800000u : (e << (23 - 8 * i)) & 0x7F800000u); }
  DEV static Piece load(const uint8_t* block, int piece, int lane) {
    Piece p; dev::load16(block + piece * 512 + lane * 16, p.w); p.e = *(const uint32_t*)(block + 1024 + piece * 32 + lane / 4 * 4);
    return p;
  }
  DEV static void product(const uint32_t* w, const Terms& b, float (&d)[4]) {
    uint32_t a[4];
    UNROLL for (int j = 0; j < 4; j++) d[j] = 0.0f;
    UNROLL for (int j = 0; j < 2; j++) { strip_codes4(w[j], a); b.multiply(d, a, 2 * j); }
  }
  template <int STRIPS> DEV static void add(const Operand<TOKENS>& o, const Piece (&p)[STRIPS][PIECES], float (&acc)[2][4]) {
    UNROLL for (int half = 0; half < 2; half++) {
      Terms b[2];
      UNROLL for (int i = 0; i < 2; i++) b[i].get(o, 2 * half + i, true);
      const float f[2] = {o.factor(2 * half), o.factor2(2 * half)};
      UNROLL for (int k = 0; k < STRIPS; k++) {
        float sum[4];
        UNROLL for (int i = 0; i < 2; i++) {
          float d[4]; product(p[k][half].w + 2 * i, b[i], d);
          UNROLL for (int j = 0; j < 4; j++) { const float s = scale(p[k][half].e, j / 2 * 2 + i); sum[j] = i == 0 ? s * d[j] : dev::fma_(s, d[j], sum[j]); }
        }
        UNROLL for (int j = 0; j < 4; j++) acc[k][j] = dev::fma_(f[j & 1], sum[j], acc[k][j]);
      }
    }
  }
  template <int C> DEV static void inner(const Operand<C>& o, const Piece& p, float (&acc)[4]) {
    float f[2][2]; o.two_factors(f);
    UNROLL for (int i = 0; i < 2; i++) {
      Terms b; float d[4];
      b.get(o, i, true); product(p.w + 2 * i, b, d);
      UNROLL for (int j = 0; j < 4; j++) acc[j] = dev::fma_(scale(p.e, j / 2 * 2 + i) * f[i][j & 1], d[j], acc[j]);
    }
  }
};
// 64 columns of one factor (C) or 32 (Inner) are summed inside the products, which keep f32.
struct StripFp8 {
  static const int PIECES = 1, BYTES = 2064;
  static const bool HELD = true;
  struct Piece { uint32_t w[4][4]; float s[2]; };  // codes; scales of rows lane / 4 and + 8
  DEV static Piece load(const uint8_t* block, int, int lane) {
    Piece p; UNROLL for (int i = 0; i < 4; i++) dev::load16(block + i * 512 + lane * 16, p.w[i]);
    p.s[0] = *(const float*)(block + 2048); p.s[1] = *(const float*)(block + 2052);
    return p;
  }
  template <int STRIPS> DEV static void add(const Operand<TOKENS>& o, const Piece (&p)[STRIPS][PIECES], float (&acc)[2][4]) { inner(o, p[0][0], acc[0]); }
  template <int C> DEV static void inner(const Operand<C>& o, const Piece& piece, float (&acc)[4]) {
    const int STEP = Operand<C>::ROWS ? 2 : 1;
    UNROLL for (int p = 0; p < 4; p += STEP) {
      float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      UNROLL for (int i = p; i < p + STEP; i++) {
        uint32_t a[4]; Terms b;
        b.get(o, i, true);
        UNROLL for (int j = 0; j < 4; j += 2) { strip_codes8(piece.w[i][j], a[0], a[2]); strip_codes8(piece.w[i][j + 1], a[1], a[3]); b.multiply(d, a, j); }
      }
      const float f[2] = {o.factor(p), o.factor2(p)};
      UNROLL for (int j = 0; j < 4; j++) acc[j] = dev::fma_(piece.s[j / 2] * f[j & 1], d[j], acc[j]);
    }
  }
};
// PARTS: 1, or 2 for an f32 weight as two bf16.
template <int PARTS> struct StripBf16 {
  static const int PIECES = 1, BYTES = PARTS * 4096;
  static const bool HELD = false;
  struct Piece { const uint8_t* weights; };
  DEV static Piece load(const uint8_t* block, int, int) { Piece p; p.weights = block; return p; }
  template <int STRIPS> DEV static void add(const Operand<TOKENS>& o, const Piece (&p)[STRIPS][PIECES], float (&acc)[2][4]) { inner(o, p[0][0], acc[0]); }
  template <int C> DEV static void inner(const Operand<C>& o, const Piece& piece, float (&acc)[4]) {
    const int lane = o.lane, STEP = Operand<C>::ROWS ? 2 : 1;
    UNROLL for (int p = 0; p < 4; p += STEP) {
      float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      UNROLL for (int i = p; i < p + STEP; i++) {
        Terms b; uint32_t bf16[3][4];
        b.get(o, i, false);
        const int terms = b.to_bf16(bf16);
        UNROLL for (int part = 0; part < PARTS; part++) UNROLL for (int j = 0; j < 2; j++) {
          uint32_t a[4]; dev::load16(piece.weights + part * 4096 + (2 * i + j) * 512 + lane * 16, a);
          UNROLL for (int t = 0; t < terms; t++) dev::mma16(d, a, bf16[t][2 * j], bf16[t][2 * j + 1]);
        }
      }
      const float f[2] = {o.factor(p), o.factor2(p)};
      UNROLL for (int j = 0; j < 4; j++) acc[j] = dev::fma_(f[j & 1], d[j], acc[j]);
    }
  }
};
DEV int strip_bytes(int format) { return format == STRIP_FP4 ? StripFp4::BYTES : format == STRIP_FP8 ? StripFp8::BYTES : format == STRIP_BF16 ? StripBf16<1>::BYTES : StripBf16<2>::BYTES; }
