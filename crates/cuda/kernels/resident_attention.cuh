// Attention of the resident kernel, on tensor cores: a unit is one row, up to 16 heads of one group and a share of the positions, or, where
// the positions are not shared, up to 4 heads: a few CTAs more, each with fewer heads to turn and to finish.
//
// Cached keys and values come into shared memory in tiles, by copies that start before QKV is waited for; rows of this step
// are made from Qkv by every CTA that sees them, and one of them keeps its own row's. Warps share a tile's positions for the
// scores and the columns for the values; queries and weights are two bf16 each, so that products keep 16 bits. Full attention
// is split over CTAs, and the one that finishes last merges the parts in order. Tiles and splits depend on the row's position
// alone, never on other rows. Definition: model/src/reference/attention.rs with keys and values in BF16, or, of the target and where
// SHAPE_KV_FP8 says so, in e4m3 (nearest even, saturating, scale 1): bytes in the caches and in a tile, widened where they are read.
#pragma once
#include "resident_ops.cuh"

// Two warpgroups attend; the others turn queries and wait at the instruction's end.
static const int ATTENTION_WARPS = 8, ATTENTION_BAR = 2;
DEV bool attends() { return dev::tid_anew() < ATTENTION_WARPS * 32; }
DEV void attention_sync() { dev::bar_sync(ATTENTION_BAR, ATTENTION_WARPS * 32); }
static const int HEADS = 16, SCORE_TILES = 3, VALUE_TILES = 4;  // rows of a product; tiles of 8 that a warp takes at most
// What is wanted again when a unit is finished, which need not stay in registers until then.
struct Finish { int row, head, heads, slot, split, splits, unit, units, position, rows; };
struct AttentionShared { float m[8][HEADS], l[8][HEADS]; int last; Finish finish; alignas(16) uint8_t rows[1]; };
// Two bf16 that add up to v, with 16 bits, for two values.
DEV void split_bf16(float a, float b, uint32_t& hi, uint32_t& lo) {
  hi = dev::to_bf16x2(a, b);
  lo = dev::to_bf16x2(a - dev::number(hi << 16), b - dev::number(hi & 0xffff0000u));
}

// Whether keys and values are e4m3; a drafter's BLOCK has bf16. Then their bytes in caches and tiles.
template <bool BLOCK> DEV bool kv_fp8() { return KV_FP8 && !BLOCK; }
template <bool BLOCK> DEV int kv_bytes() { return kv_fp8<BLOCK>() ? 1 : 2; }
// Two e4m3 codes (the low 16 bits) as bf16, exactly.
DEV uint32_t widened(uint32_t codes) { return dev::bf16x2_of_f16x2(dev::f16x2_of_e4m3(codes)); }

// A unit, its share of the positions and its tile of the caches. Strides in bytes, chosen so that lanes meet all banks.
struct Attend {
  AttentionShared* s; uint8_t *q, *keys, *values; const uint8_t *cached_keys, *cached_values;
  int row, group, head, heads, slot, split, splits, position, first, end, tile, tile_end, to;
  int key_columns, key_stride, value_stride, q_stride, positions; bool wide, keeper;
};
// Heads of a unit, and units of a group.
DEV int unit_heads(const Instr& i) { return i.parts == 1 ? 4 : HEADS; }
DEV int group_units(const Instr& i) { return (i.heads / i.kv_heads + unit_heads(i) - 1) / unit_heads(i); }
template <bool BLOCK> DEV Attend attend_unit(const StepArgs& a, const Instr& i, int u, int position, int rows) {
  Attend t; const int each = i.heads / i.kv_heads, most = unit_heads(i), chunks = group_units(i);
  t.s = (AttentionShared*)shared()->x;
  t.split = u % i.parts; t.slot = u / i.parts;
  t.row = t.slot / (chunks * i.kv_heads); t.group = t.slot / chunks % i.kv_heads; t.keeper = t.slot % chunks == 0;
  const int from = t.slot % chunks * most;
  t.head = t.group * each + from; t.heads = each - from < most ? each - from : most;
  const int at = position + t.row;
  t.position = position; t.end = at + 1; t.first = i.window >= 0 && at > i.window ? at - i.window : 0;
  if (BLOCK) t.end = i.ahead >= 0 && at + 1 + i.ahead < position + rows ? at + 1 + i.ahead : position + rows;
  t.key_columns = (i.qk_dim + 15) / 16 * 16; t.key_stride = (t.key_columns * kv_bytes<BLOCK>() / 16 | (t.key_columns < 64 ? 5 : 1)) * 16; t.value_stride = ((i.v_dim * kv_bytes<BLOCK>() + 15) / 16 | 1) * 16;
  t.q_stride = (t.key_columns + 8) * 2;
  const int q_bytes = 2 * HEADS * t.q_stride, room = (a.x_bytes - (int)sizeof(AttentionShared) - q_bytes) / (t.key_stride + t.value_stride) / 16 * 16;
  t.positions = room < i.rows ? room : i.rows;
  t.q = t.s->rows; t.keys = t.q + q_bytes; t.values = t.keys + t.positions * t.key_stride;
  t.cached_keys = (const uint8_t*)i.keys + (uint64_t)t.group * a.context * i.qk_dim * kv_bytes<BLOCK>(); t.cached_values = (const uint8_t*)i.values + (uint64_t)t.group * a.context * i.v_dim * kv_bytes<BLOCK>();
  t.wide = i.qk_dim % 16 == 0 && i.v_dim % (kv_fp8<BLOCK>() ? 16 : 8) == 0;
  const int tiles = (t.end - t.first + t.positions - 1) / t.positions;
  t.splits = tiles < i.parts ? tiles : i.parts;
  t.tile = t.first + tiles * t.split / t.splits * t.positions; t.to = t.first + tiles * (t.split + 1) / t.splits * t.positions;
  if (t.to > t.end) t.to = t.end;
  return t;
}
// A row of `dim` values: 16 bytes a copy, or, where rows are not aligned to that, one by one and zeros up to `columns`.
template <bool BLOCK> DEV void copy_row(uint8_t* to, const uint8_t* from, int dim, int columns, bool wide) {
  const int lane = dev::tid() % 32;
  if (wide) { ROLLED for (int p = lane; p < dim / (16 / kv_bytes<BLOCK>()); p += 32) dev::copy16(to + p * 16, from + p * 16); return; }
  if (kv_fp8<BLOCK>()) { ROLLED for (int d = lane; d < columns; d += 32) to[d] = d < dim ? from[d] : (uint8_t)0; return; }
  ROLLED for (int d = lane; d < columns; d += 32) ((uint16_t*)to)[d] = d < dim ? ((const uint16_t*)from)[d] : (uint16_t)0;
}
// Starts the copies of the tile's cached positions.
template <bool BLOCK> DEV void copy_tile(const Instr& i, Attend& t) {
  t.tile_end = t.tile + t.positions < t.to ? t.tile + t.positions : t.to;
  if (!attends()) return;
  const int to = t.tile_end < t.position ? t.tile_end : t.position, qk_dim = i.qk_dim, v_dim = i.v_dim;
  ROLLED for (int p = t.tile + consumer_warp(); p < to; p += 8) {
    copy_row<BLOCK>(t.keys + (p - t.tile) * t.key_stride, t.cached_keys + (uint64_t)p * qk_dim * kv_bytes<BLOCK>(), qk_dim, t.key_columns, t.wide);
    copy_row<BLOCK>(t.values + (p - t.tile) * t.value_stride, t.cached_values + (uint64_t)p * v_dim * kv_bytes<BLOCK>(), v_dim, v_dim, t.wide);
  }
}
// A head after rotation, columns lane + 32 j, 0 past the end. All loads are made without a branch between them: they are under
// way together. NORMED: after its own norm, whose weights are `norm`.
template <bool NORMED> DEV void load_turned(const float* head, int dim, int dims, const float* turn, float (&v)[8], const float* norm, float eps) {
  const int half = dims / 2;
  float y[8], c[8], s[8], squares = 0.0f;
  UNROLL for (int j = 0; j < 8; j++) {
    const int d = dev::tid() % 32 + 32 * j, away = d < half ? half : -half; const bool turns = d < 2 * half;
    const float* at = turn + 2 * (d < half ? d : d - half);
    v[j] = d < dim ? head[d] : 0.0f; y[j] = turns ? head[d + away] : 0.0f; c[j] = turns ? at[0] : 1.0f; s[j] = turns ? at[1] : 0.0f;
  }
  if (NORMED) UNROLL for (int j = 0; j < 8; j++) {
    const int d = dev::tid() % 32 + 32 * j, away = d < half ? half : -half;
    squares = dev::fma_(v[j], v[j], squares); v[j] *= d < dim ? norm[d] : 0.0f; y[j] *= d < 2 * half ? norm[d + away] : 0.0f;
  }
  UNROLL for (int j = 0; j < 8; j++) v[j] = v[j] * c[j] + (dev::tid() % 32 + 32 * j < half ? -y[j] : y[j]) * s[j];
  if (!NORMED) return;
  const float scale = 1.0f / dev::sqrt_(sum_warp(squares) / dim + eps);
  UNROLL for (int j = 0; j < 8; j++) v[j] *= scale;
}
DEV const float* turns_at(const Instr& i, int position) { return (const float*)i.turns + (uint64_t)position * i.rope_dims; }
// A key or value of this step as the caches have it: into the tile, and into the cache when `keep`.
template <class Code> DEV void put_code(uint8_t* tile, uint8_t* cache, uint32_t code, int d, int dim, int columns, bool keep) {
  if (d < columns) ((Code*)tile)[d] = (Code)code;
  if (keep && d < dim) ((Code*)cache)[d] = (Code)code;
}
template <bool BLOCK> DEV void put_fresh(uint8_t* tile, uint8_t* cache, const float (&v)[8], int dim, int columns, bool keep) {
  UNROLL for (int j = 0; j < 8; j++) {
    const int d = dev::tid() % 32 + 32 * j;
    if (kv_fp8<BLOCK>()) put_code<uint8_t>(tile, cache, dev::to_e4m3x2(v[j], 0.0f), d, dim, columns, keep);
    else put_code<uint16_t>(tile, cache, dev::to_bf16x2(v[j], 0.0f), d, dim, columns, keep);
  }
}
// Key and value of row `warp` of this step.
template <bool BLOCK> DEV void fresh_row(const Instr& i, const Attend& t, bool keep) {
  const int row = consumer_warp(), at = t.position + row, qk_dim = i.qk_dim, v_dim = i.v_dim;
  const float *qkv = (const float*)i.x + (uint64_t)row * i.qkv_rows, *value = qkv + i.v_first + t.group * v_dim;
  float k[8], v[8];
  UNROLL for (int j = 0; j < 8; j++) { const int d = dev::tid() % 32 + 32 * j; v[j] = d < v_dim ? value[d] * i.value_scale : 0.0f; }
  load_turned<BLOCK>(qkv + i.k_first + t.group * qk_dim, qk_dim, i.rope_dims, turns_at(i, at), k, (const float*)i.k_norm, i.eps);
  put_fresh<BLOCK>(t.keys + (at - t.tile) * t.key_stride, (uint8_t*)t.cached_keys + (uint64_t)at * qk_dim * kv_bytes<BLOCK>(), k, qk_dim, t.key_columns, keep);
  put_fresh<BLOCK>(t.values + (at - t.tile) * t.value_stride, (uint8_t*)t.cached_values + (uint64_t)at * v_dim * kv_bytes<BLOCK>(), v, v_dim, v_dim, keep);
}
// Rows of this step that the tile has, and zeros in the values after its end: weights there are 0, but 0 times NaN is not.
template <bool BLOCK> DEV void fresh_rows(const Instr& i, const Attend& t) {
  const int warp = consumer_warp(), p = t.position + warp;
  if ((BLOCK || warp <= t.row) && p >= t.tile && p < t.tile_end) fresh_row<BLOCK>(i, t, !BLOCK && warp == t.row && t.keeper);
  const int n = t.tile_end - t.tile;
  ROLLED for (int r = n + warp; r < (n + 15) / 16 * 16; r += 8)
    ROLLED for (int d = dev::tid() % 32; d < t.value_stride / 4; d += 32) ((uint32_t*)(t.values + r * t.value_stride))[d] = 0;
}
// The heads' queries, [high, low][head][column]; heads past the last are zeros.
template <bool BLOCK> DEV void queries(const Instr& i, const Attend& t) {
  const float *qkv = (const float*)i.x + (uint64_t)t.row * i.qkv_rows, *turn = turns_at(i, t.position + t.row);
  // The first heads are for warps that do not make rows of this step.
  const int warp = dev::tid_anew() / 32;
  ROLLED for (int h = warp < ATTENTION_WARPS ? warp + WARPS - ATTENTION_WARPS : warp - ATTENTION_WARPS; h < HEADS; h += WARPS) {
    float v[8];
    UNROLL for (int j = 0; j < 8; j++) v[j] = 0.0f;
    if (h < t.heads) load_turned<BLOCK>(qkv + (t.head + h) * i.qk_dim, i.qk_dim, i.rope_dims, turn, v, (const float*)i.q_norm, i.eps);
    uint16_t* to = (uint16_t*)(t.q + h * t.q_stride) + dev::tid() % 32;
    UNROLL for (int j = 0; j < 8; j++) {
      uint32_t hi, lo; split_bf16(v[j], 0.0f, hi, lo);
      if (dev::tid() % 32 + 32 * j < t.key_columns) { to[32 * j] = (uint16_t)hi; to[32 * j + HEADS * t.q_stride / 2] = (uint16_t)lo; }
    }
  }
}

// What a warp holds: largest scores and sums of heads lane / 4 and + 8, and sums of its columns.
struct Sums { float m[2], l[2], of[VALUE_TILES][4]; };
// A fragment of 16 rows from [row][stride] bf16, rows of columns k .. + 15.
DEV void fragment(const uint8_t* from, int stride, int k, uint32_t (&a)[4]) {
  const uint8_t* at = from + dev::tid() % 32 / 4 * stride + (k + dev::tid() % 4 * 2) * 2;
  a[0] = *(const uint32_t*)at; a[1] = *(const uint32_t*)(at + 8 * stride); a[2] = *(const uint32_t*)(at + 16); a[3] = *(const uint32_t*)(at + 8 * stride + 16);
}
// Scores of positions 8 (warp + 8 n) .. + 7 of the tile, for heads lane / 4 and + 8.
template <bool BLOCK> DEV void scores(const Instr& i, const Attend& t, int padded, float (&s)[SCORE_TILES][4]) {
  const int lane = dev::tid() % 32, warp = consumer_warp();
  float low[SCORE_TILES][4];
  UNROLL for (int n = 0; n < SCORE_TILES; n++) UNROLL for (int e = 0; e < 4; e++) s[n][e] = low[n][e] = 0.0f;
  ROLLED for (int k = 0; k < t.key_columns; k += 16) {
    uint32_t high_q[4], low_q[4];
    fragment(t.q, t.q_stride, k, high_q); fragment(t.q + HEADS * t.q_stride, t.q_stride, k, low_q);
    UNROLL for (int n = 0; n < SCORE_TILES; n++) {
      const int p = 8 * (warp + 8 * n);
      if (p >= padded) continue;
      const uint8_t* key = t.keys + (p + lane / 4) * t.key_stride + (k + lane % 4 * 2) * kv_bytes<BLOCK>();
      const uint32_t b0 = kv_fp8<BLOCK>() ? widened(*(const uint16_t*)key) : *(const uint32_t*)key;
      const uint32_t b1 = kv_fp8<BLOCK>() ? widened(*(const uint16_t*)(key + 8)) : *(const uint32_t*)(key + 16);
      dev::mma16(s[n], high_q, b0, b1); dev::mma16(low[n], low_q, b0, b1);
    }
  }
  UNROLL for (int n = 0; n < SCORE_TILES; n++) UNROLL for (int e = 0; e < 4; e++) {
    const bool seen = t.tile + 8 * (warp + 8 * n) + lane % 4 * 2 + (e & 1) < t.tile_end;
    s[n][e] = seen ? i.scaling * (s[n][e] + low[n][e]) : ATTENTION_EMPTY;
  }
}
DEV float max_quad(float v) { v = dev::max_(v, dev::shuffle_xor(v, 1)); return dev::max_(v, dev::shuffle_xor(v, 2)); }
DEV float sum_quad(float v) { v += dev::shuffle_xor(v, 1); return v + dev::shuffle_xor(v, 2); }
// Scores become weights exp(score - largest), [high, low][head][position] where the tile's keys were.
DEV void weights(const Attend& t, int padded, float (&s)[SCORE_TILES][4], Sums& sums) {
  const int lane = dev::tid() % 32, warp = consumer_warp(), stride = (t.positions + 8) * 2;
  UNROLL for (int h = 0; h < 2; h++) {
    float top = ATTENTION_EMPTY;
    UNROLL for (int n = 0; n < SCORE_TILES; n++) top = dev::max_(top, dev::max_(s[n][2 * h], s[n][2 * h + 1]));
    top = max_quad(top);
    if (lane % 4 == 0) t.s->m[warp][lane / 4 + 8 * h] = top;
  }
  attention_sync();
  UNROLL for (int h = 0; h < 2; h++) {
    const int head = lane / 4 + 8 * h;
    float top = sums.m[h], l = 0.0f;
    UNROLL for (int w = 0; w < 8; w++) top = dev::max_(top, t.s->m[w][head]);
    UNROLL for (int n = 0; n < SCORE_TILES; n++) {
      const int p = 8 * (warp + 8 * n);
      if (p >= padded) continue;
      float e[2];
      UNROLL for (int j = 0; j < 2; j++) { e[j] = t.tile + p + lane % 4 * 2 + j < t.tile_end ? dev::exp_(s[n][2 * h + j] - top) : 0.0f; l += e[j]; }
      uint32_t* to = (uint32_t*)(t.keys + head * stride + (p + lane % 4 * 2) * 2);
      split_bf16(e[0], e[1], to[0], to[HEADS * stride / 4]);
    }
    l = sum_quad(l);
    if (lane % 4 == 0) t.s->l[warp][head] = l;
    const float keep = dev::exp_(sums.m[h] - top);
    sums.m[h] = top; sums.l[h] *= keep;
    UNROLL for (int n = 0; n < VALUE_TILES; n++) UNROLL for (int j = 0; j < 2; j++) sums.of[n][2 * h + j] *= keep;
  }
  attention_sync();
  UNROLL for (int h = 0; h < 2; h++) UNROLL for (int w = 0; w < 8; w++) sums.l[h] += t.s->l[w][lane / 4 + 8 * h];
}
// Tiles of 8 value columns that a warp takes.
DEV int value_tiles(const Instr& i) { return (i.v_dim + 63) / 64; }
template <bool BLOCK> DEV void add_values(const Instr& i, const Attend& t, int padded, Sums& sums) {
  const int lane = dev::tid() % 32, stride = (t.positions + 8) * 2, each = value_tiles(i), column = consumer_warp() * each * 8 + lane / 4;
  ROLLED for (int k = 0; k < padded; k += 16) {
    uint32_t high[4], low[4];
    fragment(t.keys, stride, k, high); fragment(t.keys + HEADS * stride, stride, k, low);
    UNROLL for (int n = 0; n < VALUE_TILES; n++) {
      if (n >= each || consumer_warp() * each * 8 + n * 8 >= i.v_dim) continue;
      const uint8_t* value = t.values + (k + lane % 4 * 2) * t.value_stride + (column + n * 8) * kv_bytes<BLOCK>();
      uint32_t v[4];
      UNROLL for (int j = 0; j < 4; j++) {
        const uint8_t* at = value + (j / 2 * 8 + (j & 1)) * t.value_stride;
        v[j] = kv_fp8<BLOCK>() ? *at : *(const uint16_t*)at;
      }
      const uint32_t b0 = kv_fp8<BLOCK>() ? widened(v[0] | v[1] << 8) : v[0] | v[1] << 16, b1 = kv_fp8<BLOCK>() ? widened(v[2] | v[3] << 8) : v[2] | v[3] << 16;
      dev::mma16(sums.of[n], high, b0, b1); dev::mma16(sums.of[n], low, b0, b1);
    }
  }
}
template <bool BLOCK> DEV void attend_tiles(const Instr& i, Attend& t, Sums& sums) {
  UNROLL for (int h = 0; h < 2; h++) { sums.m[h] = ATTENTION_EMPTY; sums.l[h] = 0.0f; }
  UNROLL for (int n = 0; n < VALUE_TILES; n++) UNROLL for (int e = 0; e < 4; e++) sums.of[n][e] = 0.0f;
  ROLLED for (;;) {
    if (attends()) { fresh_rows<BLOCK>(i, t); dev::copies_wait(); }
    consumers_sync();  // queries are there
    if (attends()) {
      const int padded = (t.tile_end - t.tile + 15) / 16 * 16;
      float s[SCORE_TILES][4];
      scores<BLOCK>(i, t, padded, s);
      weights(t, padded, s, sums);
      add_values<BLOCK>(i, t, padded, sums);
      attention_sync();
    }
    if (t.tile_end == t.to) return;
    t.tile = t.tile_end;
    copy_tile<BLOCK>(i, t);
  }
}

// A part of a split: m and l of 16 heads, then [head][v_dim rounded up to 8] sums.
DEV int part_columns(const Instr& i) { return (i.v_dim + 7) / 8 * 8; }
DEV float* part_of(const Instr& i, const Finish& t, int split) { return (float*)i.residual + (uint64_t)(t.slot * i.parts + split) * (2 * HEADS + HEADS * part_columns(i)); }
// Puts this unit's part at `to`: memory of the merge, or shared memory.
DEV void put_part(const Instr& i, const Sums& sums, float* to) {
  const int lane = dev::tid() % 32, each = value_tiles(i), columns = part_columns(i);
  UNROLL for (int h = 0; h < 2; h++) {
    const int head = lane / 4 + 8 * h;
    if (consumer_warp() == 0 && lane % 4 == 0) { to[head] = sums.m[h]; to[HEADS + head] = sums.l[h]; }
    UNROLL for (int n = 0; n < VALUE_TILES; n++) {
      const int column = (consumer_warp() * each + n) * 8 + lane % 4 * 2;
      if (n >= each || column >= columns) continue;
      float* at = to + 2 * HEADS + head * columns + column;
      at[0] = sums.of[n][2 * h]; at[1] = sums.of[n][2 * h + 1];
    }
  }
}
// The parts of all splits, in order, and the sink, become activations: 64 columns of a head a warp, two a lane.
DEV void finish_heads(const Instr& i, const Finish& t, const float* parts, int splits) {
  const int lane = dev::tid() % 32, v_padded = (i.v_dim + 63) / 64 * 64, blocks = v_padded / 64, columns = part_columns(i), stride = 2 * HEADS + HEADS * columns;
  const float* sinks = (const float*)i.sinks;
  ROLLED for (int e = consumer_warp(); e < t.heads * blocks; e += 8) {
    const int head = e / blocks, k = e % blocks * 64 + lane * 2, in = k < columns ? k : 0; const float sink = sinks ? sinks[t.head + head] : ATTENTION_EMPTY;
    float m = sink, l = sinks ? 1.0f : 0.0f, sum[2] = {0.0f, 0.0f};
    ROLLED for (int s = 0; s < splits; s++) {
      const float* part = parts + s * stride; const float* o = part + 2 * HEADS + head * columns + in;
      const float v[4] = {part[head], part[HEADS + head], o[0], o[1]}, top = dev::max_(m, v[0]), keep = dev::exp_(m - top), scale = dev::exp_(v[0] - top);
      l = l * keep + v[1] * scale; sum[0] = sum[0] * keep + v[2] * scale; sum[1] = sum[1] * keep + v[3] * scale; m = top;
    }
    emit_activations((uint8_t*)i.out, i.columns_padded, t.row, (t.head + head) * v_padded + k, k < i.v_dim ? sum[0] / l : 0.0f, k + 1 < i.v_dim ? sum[1] / l : 0.0f);
  }
}
DEV void finish_unit(const Instr& i, const Attend& t, const Sums& sums) {
  const Finish& f = t.s->finish;
  const bool alone = f.splits == 1;
  put_part(i, sums, alone ? (float*)t.keys : part_of(i, f, f.split));
  attention_sync();
  if (!alone) {
    if (dev::tid() == 0) t.s->last = dev::take((uint32_t*)i.bests + f.slot, f.splits - 1) == (uint32_t)f.splits - 1;
    attention_sync();
    if (!t.s->last) return;
  }
  finish_heads(i, f, alone ? (const float*)t.keys : part_of(i, f, 0), f.splits);
}
// BLOCK: the rows are a drafter's block. They see each other, heads have norms, and only the context stays in the caches.
template <bool BLOCK> DEV void attend(const StepArgs& a, const Instr& i, int rows, int position) {
  // From the last CTA on: where QKV has not a tile for every CTA, those without one prepare earlier.
  int u = dev::ctas_anew() - 1 - dev::cta(), units = rows * i.kv_heads * group_units(i) * i.parts;
  bool waited = false;
  ROLLED while (u < units) {
    Attend t = attend_unit<BLOCK>(a, i, u, position, rows);
    if (t.split >= t.splits) { u += dev::ctas_anew(); continue; }
    if (waited) consumers_sync();
    if (dev::tid() == 0) {
      Finish& f = t.s->finish; f.row = t.row; f.head = t.head; f.heads = t.heads; f.slot = t.slot; f.split = t.split; f.splits = t.splits;
      f.unit = u; f.units = units; f.position = position; f.rows = rows;
    }
    copy_tile<BLOCK>(i, t);
    if (!waited) { await_all(a, i.wait); consumers_sync(); }
    waited = true;
    queries<BLOCK>(i, t);
    Sums sums; attend_tiles<BLOCK>(i, t, sums);
    if (attends()) finish_unit(i, t, sums);
    const Finish& f = ((const AttentionShared*)shared()->x)->finish;
    u = f.unit + dev::ctas_anew(); units = f.units; position = f.position; rows = f.rows;
  }
}
DEV_CALL void attention_op(const StepArgs& a, const Instr& i, int rows) { attend<false>(a, i, rows, shared()->position); }
