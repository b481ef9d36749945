// Weights of the resident engine in strips of 16 rows, and their product with split activations, by one warpgroup.
//
// A strip-block is 16 rows x 128 columns in fragment order: lane l of the warp that takes it holds rows l / 4 and l / 4 + 8.
//   STRIP_FP4  [half 0..1][lane][16 B] codes as strip_codes wants them, [row][4] E8M0                              1088 B
//   STRIP_FP8  [step 0..3][lane][16 B] codes, f32 scale of rows 0..7, f32 scale of rows 8..15, 8 B               2064 B
//   STRIP_BF16 [step 0..7][lane][16 B]: columns 2 (l % 4) + {0, 1} of rows l / 4, l / 4 + 8, then columns + 8    4096 B
//   STRIP_F32  two STRIP_BF16, high part and rest (an f32 weight to 2^-17)                                       8192 B
// A page is [block][strip]. Warp w of a warpgroup takes strip w; a tile has 1 to 4 strips. Warps past them repeat the last one and
// drop the result (wgmma wants the whole warpgroup), or, of 16-bit formats, share the strips: 32 columns of a block each in turn.
// Activations: [k / 16][hi, lo][columns][16 codes], then factors [k / 32][columns] f32: x = factor * (hi + lo / 16). Columns are
// the 8 rows of a step, or more (Inner): a product takes 8 neighbouring ones from any first column on.
#pragma once
#include "split.cuh"
#include "weights.cuh"

DEV int strip_bytes(int format) { return format == STRIP_FP4 ? 1088 : format == STRIP_FP8 ? 2064 : format == STRIP_BF16 ? 4096 : 8192; }
static const uint32_t ALL_COLUMNS = 0xff;
DEV float strip_unit(int format) { return format == STRIP_FP4 ? 64.0f : 1.0f; }

// Where the product of a strip-block finds its operands; COLUMNS is how many there are side by side, 0: `columns` says it.
template <int COLUMNS> struct Operand {
  const uint8_t* weights; const uint8_t* x; const float* factors; int columns;
  DEV int stride() const { return COLUMNS ? COLUMNS : columns; }
  DEV uint32_t apart() const { return stride() * 16; }
};
// A product under way: registers that wgmma reads and writes until dev::mma_wait.
struct StripHeld { uint32_t a[4][4]; float d[4][8]; float s, s8; uint32_t e, e8; };

template <int C> DEV void strip_issue(StripHeld& h, const Operand<C>& o) {
  const dev::Columns columns = dev::columns_at(o.x, o.apart());
  UNROLL for (int i = 0; i < 4; i++) dev::mma(h.d[i], h.a[i], columns, i * 4 * o.apart(), false);
  dev::mma_commit();
}
// A product's two terms as one sum. Plain e4m3 activations (ONE_TERM) leave the second out: weights of 4 and 8 bits see the first
// term alone, the router, lm_head and other 16-bit weights both. It changes what is computed, not what is read.
DEV float terms(float low, float high) { return ONE_TERM ? high : dev::fma_(0.0625f, low, high); }
// acc += scales of rows r and r + 8 times the factors of columns 2 (lane % 4) and + 1 times a block's sums, for the columns of
// `run`: what lies in others may be anything. `scale(i, row8)`: of columns 32 i .. + 31.
template <int C, class S> DEV void strip_add(const StripHeld& h, const Operand<C>& o, S scale, float (&acc)[4], uint32_t run) {
  const int token = dev::tid() % 4 * 2;
  UNROLL for (int j = 0; j < 2; j++) {
    if (!(run & 0x55u << j)) continue;  // the same for all lanes
    float f[4], x = 0.0f, x8 = 0.0f;
    UNROLL for (int i = 0; i < 4; i++) f[i] = o.factors[o.stride() * i + token + j];
    UNROLL for (int i = 0; i < 4; i++) {
      x = dev::fma_(scale(i, false) * f[i], terms(h.d[i][4 + j], h.d[i][j]), x);
      x8 = dev::fma_(scale(i, true) * f[i], terms(h.d[i][6 + j], h.d[i][2 + j]), x8);
    }
    const bool own = run >> (token + j) & 1u;
    acc[j] += own ? x : 0.0f; acc[2 + j] += own ? x8 : 0.0f;
  }
}
// Four columns of rows r and r + 8 from a word: bits 7 and 4..2 of a byte are row r's code as e4m3 has it; of row r + 8 the sign is
// bit 5, the exponent bits 6 and 1, the mantissa bit 0. Both scaled by 2^-6, which strip_unit undoes.
DEV void strip_codes(uint32_t w, uint32_t& r, uint32_t& r8) {
  r = w & 0x9C9C9C9Cu;
  r8 = ((w << 2) & 0x8C8C8C8Cu) | ((w >> 2) & 0x10101010u);
}
struct StripFp4 {
  static const int BYTES = 1088; static const bool ASYNC = true;
  template <int C> DEV static void load(StripHeld& h, const Operand<C>& o, int) {
    const int lane = dev::tid() % 32, r = lane / 4;
    uint32_t w[8];
    dev::load16(o.weights + lane * 16, w); dev::load16(o.weights + 512 + lane * 16, w + 4);
    h.e = *(const uint32_t*)(o.weights + 1024 + r * 4); h.e8 = *(const uint32_t*)(o.weights + 1056 + r * 4);
    UNROLL for (int i = 0; i < 4; i++) { strip_codes(w[2 * i], h.a[i][0], h.a[i][1]); strip_codes(w[2 * i + 1], h.a[i][2], h.a[i][3]); }
    dev::mma_own(h.a, h.d);
  }
  template <int C> DEV static void issue(StripHeld& h, const Operand<C>& o) { strip_issue(h, o); }
  template <int N> DEV static void wait(StripHeld& h) { dev::mma_wait<N>(); dev::mma_own(h.a, h.d); }
  // E8M0 byte i becomes the exponent of an f32.
  DEV static float scale(uint32_t e, int i) { return dev::number(i == 3 ? (e >> 1) & 0x7F800000u : (e << (23 - 8 * i)) & 0x7F800000u); }
  template <int C> DEV static void end(const StripHeld& h, const Operand<C>& o, float (&acc)[4], uint32_t run) {
    strip_add(h, o, [&](int i, bool row8) { return scale(row8 ? h.e8 : h.e, i); }, acc, run);
  }
};
// d of 32 columns, high and low added: rows r then r + 8, tokens 2 (lane % 4) and + 1.
DEV float strip_sum(const float (&d)[8], int row8, int token) { return terms(d[4 + 2 * row8 + token], d[2 * row8 + token]); }
// The same where every 64 columns have one factor (emit_activations): it comes in twice a block instead of four times.
struct StripFp4Even : StripFp4 {
  template <int C> DEV static void end(const StripHeld& h, const Operand<C>& o, float (&acc)[4]) {
    const int token = dev::tid() % 4 * 2;
    UNROLL for (int i = 0; i < 4; i += 2) {
      const float* f = o.factors + o.stride() * i + token; const float f0 = f[0], f1 = f[1];
      const float s = scale(h.e, i), s8 = scale(h.e8, i), t = scale(h.e, i + 1), t8 = scale(h.e8, i + 1);
      acc[0] = dev::fma_(f0, dev::fma_(t, strip_sum(h.d[i + 1], 0, 0), s * strip_sum(h.d[i], 0, 0)), acc[0]);
      acc[1] = dev::fma_(f1, dev::fma_(t, strip_sum(h.d[i + 1], 0, 1), s * strip_sum(h.d[i], 0, 1)), acc[1]);
      acc[2] = dev::fma_(f0, dev::fma_(t8, strip_sum(h.d[i + 1], 1, 0), s8 * strip_sum(h.d[i], 1, 0)), acc[2]);
      acc[3] = dev::fma_(f1, dev::fma_(t8, strip_sum(h.d[i + 1], 1, 1), s8 * strip_sum(h.d[i], 1, 1)), acc[3]);
    }
  }
};
struct StripFp8 {
  static const int BYTES = 2064; static const bool ASYNC = true;
  template <int C> DEV static void load(StripHeld& h, const Operand<C>& o, int) {
    const int lane = dev::tid() % 32;
    h.s = *(const float*)(o.weights + 2048); h.s8 = *(const float*)(o.weights + 2052);
    UNROLL for (int i = 0; i < 4; i++) dev::load16(o.weights + i * 512 + lane * 16, h.a[i]);
    dev::mma_own(h.a, h.d);
  }
  template <int C> DEV static void issue(StripHeld& h, const Operand<C>& o) { strip_issue(h, o); }
  template <int N> DEV static void wait(StripHeld& h) { dev::mma_wait<N>(); dev::mma_own(h.a, h.d); }
  template <int C> DEV static void end(const StripHeld& h, const Operand<C>& o, float (&acc)[4], uint32_t run) {
    strip_add(h, o, [&](int, bool row8) { return row8 ? h.s8 : h.s; }, acc, run);  // each 32 columns taken out: weights.cuh says why
  }
};
struct StripFp8Even : StripFp8 {
  template <int C> DEV static void end(const StripHeld& h, const Operand<C>& o, float (&acc)[4]) {
    const int token = dev::tid() % 4 * 2;
    UNROLL for (int i = 0; i < 4; i += 2) {
      const float* f = o.factors + o.stride() * i + token; const float f0 = f[0], f1 = f[1];
      acc[0] = dev::fma_(h.s * f0, strip_sum(h.d[i], 0, 0) + strip_sum(h.d[i + 1], 0, 0), acc[0]);
      acc[1] = dev::fma_(h.s * f1, strip_sum(h.d[i], 0, 1) + strip_sum(h.d[i + 1], 0, 1), acc[1]);
      acc[2] = dev::fma_(h.s8 * f0, strip_sum(h.d[i], 1, 0) + strip_sum(h.d[i + 1], 1, 0), acc[2]);
      acc[3] = dev::fma_(h.s8 * f1, strip_sum(h.d[i], 1, 1) + strip_sum(h.d[i + 1], 1, 1), acc[3]);
    }
  }
};
// Activations of columns 2 (lane % 4) + {0, 1} of row lane / 4, as two bf16: exact, hi + lo / 16 has at most 8 bits.
DEV uint32_t strip_x_bf16(const uint8_t* x, uint32_t apart) {
  const int lane = dev::tid() % 32, at = lane / 4 * 16 + lane % 4 * 2;
  float ha, hb, la, lb;
  dev::from_e4m3x2(*(const uint16_t*)(x + at), ha, hb); dev::from_e4m3x2(*(const uint16_t*)(x + apart + at), la, lb);
  return dev::to_bf16x2(dev::fma_(0.0625f, la, ha), dev::fma_(0.0625f, lb, hb));
}
// Warp-wide products that finish where they begin: the weights' page may be given back after `load`. d[i]: columns 32 i .. + 31;
// a warp that shares its strip leaves those out of which `mine` says nothing.
template <int C> DEV void strip_bf16(StripHeld& h, const Operand<C>& o, const uint8_t* weights, bool add, int mine) {
  const int lane = dev::tid() % 32;
  UNROLL for (int i = 0; i < 4; i++) {
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (mine >> i & 1) UNROLL for (int j = 0; j < 2; j++) {
      uint32_t a[4]; dev::load16(weights + (2 * i + j) * 512 + lane * 16, a);
      const uint8_t* at = o.x + (2 * i + j) * 2 * o.apart();
      dev::mma16(d, a, strip_x_bf16(at, o.apart()), strip_x_bf16(at + 8, o.apart()));
    }
    UNROLL for (int j = 0; j < 4; j++) h.d[i][j] = add ? h.d[i][j] + d[j] : d[j];
  }
}
struct StripBf16 {
  static const int BYTES = 4096; static const bool ASYNC = false;
  template <int C> DEV static void load(StripHeld& h, const Operand<C>& o, int mine) { strip_bf16(h, o, o.weights, false, mine); }
  template <int C> DEV static void issue(StripHeld&, const Operand<C>&) {}
  template <int N> DEV static void wait(StripHeld&) {}
  template <int C> DEV static void end(const StripHeld& h, const Operand<C>& o, float (&acc)[4], uint32_t run = ALL_COLUMNS) {
    const int token = dev::tid() % 4 * 2;
    UNROLL for (int i = 0; i < 4; i++) {
      const float* f = o.factors + o.stride() * i + token;
      if (run >> token & 1u) { acc[0] += f[0] * h.d[i][0]; acc[2] += f[0] * h.d[i][2]; }
      if (run >> token & 2u) { acc[1] += f[1] * h.d[i][1]; acc[3] += f[1] * h.d[i][3]; }
    }
  }
};
struct StripF32 {
  static const int BYTES = 8192; static const bool ASYNC = false;
  template <int C> DEV static void load(StripHeld& h, const Operand<C>& o, int mine) { strip_bf16(h, o, o.weights, false, mine); strip_bf16(h, o, o.weights + 4096, true, mine); }
  template <int C> DEV static void issue(StripHeld&, const Operand<C>&) {}
  template <int N> DEV static void wait(StripHeld&) {}
  template <int C> DEV static void end(const StripHeld& h, const Operand<C>& o, float (&acc)[4], uint32_t run = ALL_COLUMNS) { StripBf16::end(h, o, acc, run); }
};
