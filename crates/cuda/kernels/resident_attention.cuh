// Attention of the resident kernel, on tensor cores: a unit is one row, up to 16 heads of one group and a share of the positions, or, where
// the positions are not shared, up to 4 heads: a few CTAs more, each with fewer heads to turn and to finish.
//
// Cached keys and values come into shared memory in tiles, two copies that start before QKV is waited for: a cached row is as long as a
// row of the tile, with what keeps lanes off each other's banks. Rows of this step are made from Qkv by every CTA that sees them, and one of
// them keeps its own row's. A warp has 16 positions of a tile for good, scores, weights and values: scores are keys times
// queries, so that 16 positions are the rows of a product and 8 heads its columns; their weights, turned around in registers, are
// the columns of values times weights. Warps meet once, at the end of a unit, where their sums are merged in order. Queries and
// weights are two bf16 each, so that products keep 16 bits. Full attention is split over CTAs, and the one that finishes last merges
// the parts in order. Tiles and splits depend on the row's position alone, never on other rows. Definition:
// model/src/reference/attention.rs with keys and values in BF16, or, of the target and where SHAPE_KV_FP8 says so, in e4m3
// (nearest even, saturating, scale 1): bytes in the caches and in a tile, widened where they are read. Where SHAPE_KV_WIDE says so, the
// target's are two bf16 each, 16 bits: a cached row is all first ones, then all second ones. Of products the two second terms' is left out.
#pragma once
#include "resident_ops.cuh"

static const int FEW_HEADS = 4, VALUE_TILES = VALUE_COLUMNS / 16;  // VALUE_TILES: 16 columns each, of a unit at most
// What is wanted again when a unit is finished, which need not stay in registers until then.
struct Finish { int row, head, heads, column, columns, slot, split, splits, unit, units, position, rows, parts, sums; };  // parts: warps that have positions; sums: where their parts are among x
struct AttentionShared { int last; float sink[HEADS]; Finish finish; alignas(16) uint8_t rows[1]; };

// The target's attention, of which the compiler may know sizes, and a drafter's.
template <bool BLOCK> struct AttendingOf { typedef AttentionInstr type; };
template <> struct AttendingOf<true> { typedef DraftAttentionInstr type; };
template <bool BLOCK> using Attending = typename AttendingOf<BLOCK>::type;

// Whether keys and values are e4m3; a drafter's BLOCK has bf16.
template <bool BLOCK> DEV bool kv_fp8() { return KV_FP8 && !BLOCK; }
// Whether they are two bf16 each. Then bytes from the first ones of a row to the second ones.
template <bool BLOCK> DEV bool kv_wide() { return KV_WIDE && !BLOCK; }
DEV int kv_second(int columns) { return (columns + 15) / 16 * 32; }
// Two e4m3 codes (the low 16 bits) as bf16, exactly.
DEV uint32_t widened(uint32_t codes) { return dev::bf16x2_of_f16x2(dev::f16x2_of_e4m3(codes)); }

// A unit, its share of the positions and its tile of the caches.
struct Attend {
  AttentionShared* s; uint8_t *q, *keys, *values; const uint8_t *cached_keys, *cached_values;
  int row, group, head, heads, column, columns, slot, split, splits, position, tile, tile_end, to;
  int key_columns, q_stride, positions; bool keeper;
};
// Positions are SPLIT over CTAs, or not: two functions, each with registers and code for its own. Tiles of heads that a unit may have.
template <bool SPLIT> DEV constexpr int head_tiles() { return SPLIT ? HEADS / 8 : 1; }
// Units of a group: by heads, and by columns of the values.
template <bool SPLIT, class I> DEV int head_units(const I& i) { const int most = SPLIT ? HEADS : FEW_HEADS; return (i.heads / i.kv_heads + most - 1) / most; }
template <class I> DEV int column_units(const I& i) { return (i.v_dim + VALUE_COLUMNS - 1) / VALUE_COLUMNS; }
// Floats of a part: the largest scores and the sums of heads, then sums [head][part_stride].
DEV int part_stride(int columns) { return columns + 4; }
DEV int part_floats(int heads, int columns) { return 2 * HEADS + (heads + 7) / 8 * 8 * part_stride(columns); }
template <bool BLOCK, bool SPLIT> DEV Attend attend_unit(const StepArgs& a, const Attending<BLOCK>& i, int u, int position, int rows) {
  Attend t; const int each = i.heads / i.kv_heads, most = SPLIT ? HEADS : FEW_HEADS, heads = head_units<SPLIT>(i), columns = column_units(i);
  t.s = (AttentionShared*)shared()->x;
  t.split = 0; t.slot = u;
  if (SPLIT) { t.split = u % i.parts; t.slot = u / i.parts; }
  const int chunk = t.slot % (heads * columns), of_row = t.slot / (heads * columns);
  t.row = of_row / i.kv_heads; t.group = of_row % i.kv_heads; t.keeper = chunk == 0;
  const int from = chunk / columns * most;
  t.head = t.group * each + from; t.heads = each - from < most ? each - from : most;
  t.column = chunk % columns * VALUE_COLUMNS; t.columns = i.v_dim - t.column < VALUE_COLUMNS ? i.v_dim - t.column : VALUE_COLUMNS;
  const int at = position + t.row;
  t.position = position;
  int end = at + 1; const int first = i.window >= 0 && at > i.window ? at - i.window : 0;
  if (BLOCK) end = i.ahead >= 0 && at + 1 + i.ahead < position + rows ? at + 1 + i.ahead : position + rows;
  t.key_columns = (i.qk_dim + 15) / 16 * 16; t.q_stride = (t.key_columns + 8) * 2;
  // A tile's keys and values, or where they were, the parts of its warps.
  const int q_bytes = 2 * head_tiles<SPLIT>() * 8 * t.q_stride, row_bytes = i.key_stride + i.value_stride, widest = i.v_dim < VALUE_COLUMNS ? i.v_dim : VALUE_COLUMNS;
  const int part_bytes = (part_floats(HEADS, (widest + 15) / 16 * 16) * 4 + WARP_POSITIONS - 1) / WARP_POSITIONS;
  const int room = (x_bytes_of(a) - (int)sizeof(AttentionShared) - q_bytes) / (row_bytes > part_bytes ? row_bytes : part_bytes) / WARP_POSITIONS * WARP_POSITIONS;
  t.positions = room < i.rows ? room : i.rows;
  t.q = t.s->rows; t.keys = t.q + q_bytes; t.values = t.keys + t.positions * i.key_stride;
  t.cached_keys = (const uint8_t*)i.keys + (uint64_t)t.group * a.context * i.key_stride; t.cached_values = (const uint8_t*)i.values + (uint64_t)t.group * a.context * i.value_stride;
  const int tiles = (end - first + t.positions - 1) / t.positions;
  t.splits = 1; t.tile = first; t.to = end;
  if (SPLIT) {
    t.splits = tiles < i.parts ? tiles : i.parts;
    t.tile = first + tiles * t.split / t.splits * t.positions; t.to = first + tiles * (t.split + 1) / t.splits * t.positions;
    if (t.to > end) t.to = end;
  }
  return t;
}
// Starts the copies of the tile's cached positions.
template <class I> DEV void copy_tile(const I& i, Attend& t) {
  t.tile_end = t.tile + t.positions < t.to ? t.tile + t.positions : t.to;
  if (dev::tid() != 0) return;
  ResidentShared* s = shared();
  const int to = t.tile_end < t.position ? t.tile_end : t.position, rows = to - t.tile;
  s->tiles++;
  if (rows <= 0) { dev::mbar_arrive(&s->tile); return; }
  dev::fence_proxy_shared();
  dev::mbar_expect(&s->tile, rows * (i.key_stride + i.value_stride));
  dev::bulk_load(t.keys, t.cached_keys + (uint64_t)t.tile * i.key_stride, rows * i.key_stride, &s->tile, false);
  dev::bulk_load(t.values, t.cached_values + (uint64_t)t.tile * i.value_stride, rows * i.value_stride, &s->tile, false);
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
template <class I> DEV const float* turns_at(const I& i, int position) { return (const float*)i.turns + (uint64_t)position * i.rope_dims; }
// A key or value of this step as the caches have it: into the tile, and into the cache when `keep`.
template <class Code> DEV void put_code(uint8_t* tile, uint8_t* cache, uint32_t code, int d, int dim, int columns, bool keep) {
  if (d < columns) ((Code*)tile)[d] = (Code)code;
  if (keep && d < dim) ((Code*)cache)[d] = (Code)code;
}
template <bool BLOCK> DEV void put_fresh(uint8_t* tile, uint8_t* cache, const float (&v)[8], int dim, int columns, bool keep) {
  UNROLL for (int j = 0; j < 8; j++) {
    const int d = dev::tid() % 32 + 32 * j;
    if (kv_fp8<BLOCK>()) put_code<uint8_t>(tile, cache, dev::to_e4m3x2(v[j], 0.0f), d, dim, columns, keep);
    else if (kv_wide<BLOCK>()) {
      uint32_t hi, lo; split_bf16(v[j], 0.0f, hi, lo); const int second = kv_second(dim);
      put_code<uint16_t>(tile, cache, hi, d, dim, columns, keep); put_code<uint16_t>(tile + second, cache + second, lo, d, dim, columns, keep);
    } else put_code<uint16_t>(tile, cache, dev::to_bf16x2(v[j], 0.0f), d, dim, columns, keep);
  }
}
// What a warp makes of Qkv before the tile is looked at, one task after the other: tasks 0 .. 7 are rows of this step that the tile has, key and
// value, and those from 8 on, with the unit's first tile, the heads' queries, [high, low][head][column]; heads past the last are zeros.
// Also zeros in the values after the tile's end: weights there are 0, but 0 times NaN is not.
template <bool BLOCK, int TILES> DEV void turn_heads(const Attending<BLOCK>& i, const Attend& t, bool first) {
  const int warp = dev::tid_anew() / 32, lane = dev::tid_anew() % 32, n = t.tile_end - t.tile, qk_dim = i.qk_dim, v_dim = i.v_dim;
  const int tasks = first ? TOKENS + t.heads : TOKENS;
  ROLLED for (int r = n + warp; r < (n + WARP_POSITIONS - 1) / WARP_POSITIONS * WARP_POSITIONS; r += WARPS)
    ROLLED for (int d = lane; d < i.value_stride / 4; d += 32) ((uint32_t*)(t.values + r * i.value_stride))[d] = 0;
  if (first) ROLLED for (int head = t.heads + warp; head < (t.heads + 7) / 8 * 8; head += WARPS)
    ROLLED for (int d = lane; d < t.key_columns / 2; d += 32) { uint32_t* to = (uint32_t*)(t.q + head * t.q_stride) + d; to[0] = to[TILES * 2 * t.q_stride] = 0; }
  ROLLED for (int task = warp; task < tasks; task += WARPS) {
    const bool query = task >= TOKENS;
    const int head = task - TOKENS, row = query ? t.row : task, at = t.position + row;
    if (!query && !((BLOCK || row <= t.row) && at >= t.tile && at < t.tile_end)) continue;
    const float *qkv = (const float*)i.x + (uint64_t)row * i.qkv_rows, *from = qkv + (query ? (t.head + head) * qk_dim : i.k_first + t.group * qk_dim);
    float k[8], v[8];
    UNROLL for (int j = 0; j < 8; j++) { const int d = lane + 32 * j; v[j] = !query && d < v_dim ? qkv[i.v_first + t.group * v_dim + d] * i.value_scale : 0.0f; }
    load_turned<BLOCK>(from, qk_dim, i.rope_dims, turns_at(i, at), k, (const float*)(query ? i.q_norm : i.k_norm), i.eps);
    if (query) {
      uint16_t* to = (uint16_t*)(t.q + head * t.q_stride) + lane;
      UNROLL for (int j = 0; j < 8; j++) {
        uint32_t hi, lo; split_bf16(k[j], 0.0f, hi, lo);
        if (lane + 32 * j < t.key_columns) { to[32 * j] = (uint16_t)hi; to[32 * j + TILES * 4 * t.q_stride] = (uint16_t)lo; }
      }
      continue;
    }
    const bool keep = !BLOCK && row == t.row && t.keeper;
    put_fresh<BLOCK>(t.keys + (at - t.tile) * i.key_stride, (uint8_t*)t.cached_keys + (uint64_t)at * i.key_stride, k, qk_dim, t.key_columns, keep);
    put_fresh<BLOCK>(t.values + (at - t.tile) * i.value_stride, (uint8_t*)t.cached_values + (uint64_t)at * i.value_stride, v, v_dim, v_dim, keep);
  }
}

// What a warp holds of its positions, for heads 2 (lane % 4) and + 1 of each tile of 8: the largest score, this lane's sum of weights, and
// sums of values, columns lane / 4 and + 8 of each tile of 16.
template <int TILES> struct Sums { float m[TILES][2], l[TILES][2], of[VALUE_TILES][TILES][4]; };
// Over the lanes of equal heads.
template <class F> DEV float over_positions(float v, F f) { v = f(v, dev::shuffle_xor(v, 4)); v = f(v, dev::shuffle_xor(v, 8)); return f(v, dev::shuffle_xor(v, 16)); }
struct Larger { DEV float operator()(float a, float b) const { return dev::max_(a, b); } };
struct Added { DEV float operator()(float a, float b) const { return a + b; } };
// Keys of this warp's positions, columns k .. + 15, as the rows of a product.
template <bool BLOCK> DEV void key_fragment(const Attending<BLOCK>& i, const uint8_t* keys, int k, uint32_t (&a)[4]) {
  const int lane = dev::tid() % 32;
  if (!kv_fp8<BLOCK>()) { dev::load_matrices(a, keys + (lane % 16) * i.key_stride + (k + lane / 16 * 8) * 2); return; }
  UNROLL for (int j = 0; j < 4; j++) a[j] = widened(*(const uint16_t*)(keys + (lane / 4 + j % 2 * 8) * i.key_stride + k + lane % 4 * 2 + j / 2 * 8));
}
// Values of this warp's positions, columns c .. + 15, which are the rows of the product.
template <bool BLOCK> DEV void value_fragment(const Attending<BLOCK>& i, const uint8_t* values, int c, uint32_t (&a)[4]) {
  const int lane = dev::tid() % 32;
  if (!kv_fp8<BLOCK>()) { dev::load_matrices_turned(a, values + (lane / 16 * 8 + lane % 8) * i.value_stride + (c + lane / 8 % 2 * 8) * 2); return; }
  UNROLL for (int j = 0; j < 4; j++) {
    const uint8_t* at = values + (lane % 4 * 2 + j / 2 * 8) * i.value_stride + c + lane / 4 + j % 2 * 8;
    a[j] = widened(at[0] | (uint32_t)at[i.value_stride] << 8);
  }
}
// This warp's positions of the tile join its sums.
template <bool BLOCK, int TILES> DEV void attend_positions(const Attending<BLOCK>& i, const Attend& t, Sums<TILES>& sums) {
  const int lane = dev::tid_anew() % 32, first = dev::tid_anew() / 32 * WARP_POSITIONS;
  if (t.tile + first >= t.tile_end) return;
  const uint8_t *keys = t.keys + first * i.key_stride, *query = t.q + (lane / 16 * TILES * 8 + lane % 8) * t.q_stride + lane / 8 % 2 * 16;
  const bool both = t.heads > 8;
  // High and low terms of even and of odd steps of 16 columns: products that do not wait for each other.
  float s[TILES][4], terms[TILES][4][4];
  UNROLL for (int h = 0; h < TILES; h++) UNROLL for (int e = 0; e < 4; e++) UNROLL for (int n = 0; n < 4; n++) terms[h][n][e] = 0.0f;
  UNROLL_BY(2) for (int at = 0; at < t.key_columns; at += 32) UNROLL for (int odd = 0; odd < 2; odd++) {
    const int k = at + 16 * odd;
    if (odd && k >= t.key_columns) continue;
    uint32_t a[4], q[4];
    key_fragment<BLOCK>(i, keys, k, a);
    UNROLL for (int h = 0; h < TILES; h++) {
      if (h > 0 && !both) continue;
      dev::load_matrices(q, query + h * 8 * t.q_stride + k * 2);
      dev::mma16(terms[h][2 * odd], a, q[0], q[1]); dev::mma16(terms[h][2 * odd + 1], a, q[2], q[3]);
      if (kv_wide<BLOCK>()) { uint32_t second[4]; key_fragment<BLOCK>(i, keys + kv_second(i.qk_dim), k, second); dev::mma16(terms[h][2 * odd + 1], second, q[0], q[1]); }
    }
  }
  uint32_t high[TILES][2], rest[TILES][2];  // weights of positions 0 .. 7 and 8 .. 15
  UNROLL for (int h = 0; h < TILES; h++) {
    if (h > 0 && !both) continue;
    UNROLL for (int e = 0; e < 4; e++) s[h][e] = t.tile + first + lane / 4 + e / 2 * 8 < t.tile_end ? i.scaling * (terms[h][0][e] + terms[h][2][e] + (terms[h][1][e] + terms[h][3][e])) : ATTENTION_EMPTY;
    UNROLL for (int j = 0; j < 2; j++) {
      const float top = dev::max_(sums.m[h][j], over_positions(dev::max_(s[h][j], s[h][2 + j]), Larger())), keep = dev::exp_quick(sums.m[h][j] - top);
      UNROLL for (int e = j; e < 4; e += 2) s[h][e] = s[h][e] > ATTENTION_EMPTY ? dev::exp_quick(s[h][e] - top) : 0.0f;
      sums.m[h][j] = top; sums.l[h][j] = sums.l[h][j] * keep + (s[h][j] + s[h][2 + j]);
      UNROLL for (int n = 0; n < VALUE_TILES; n++) { sums.of[n][h][j] *= keep; sums.of[n][h][2 + j] *= keep; }
    }
    UNROLL for (int e = 0; e < 2; e++) {
      split_bf16(s[h][2 * e], s[h][2 * e + 1], high[h][e], rest[h][e]);
      high[h][e] = dev::turn_matrix(high[h][e]); rest[h][e] = dev::turn_matrix(rest[h][e]);
    }
  }
  const uint8_t* values = t.values + first * i.value_stride;
  UNROLL for (int n = 0; n < VALUE_TILES; n++) {
    if (n * 16 >= t.columns) continue;
    uint32_t a[4]; value_fragment<BLOCK>(i, values, t.column + n * 16, a);
    UNROLL for (int h = 0; h < TILES; h++) {
      if (h > 0 && !both) continue;
      dev::mma16(sums.of[n][h], a, high[h][0], high[h][1]); dev::mma16(sums.of[n][h], a, rest[h][0], rest[h][1]);
      if (kv_wide<BLOCK>()) { uint32_t second[4]; value_fragment<BLOCK>(i, values + kv_second(i.v_dim), t.column + n * 16, second); dev::mma16(sums.of[n][h], second, high[h][0], high[h][1]); }
    }
  }
}
template <bool BLOCK, int TILES> DEV void attend_tiles(const Attending<BLOCK>& i, Attend& t, Sums<TILES>& sums) {
  UNROLL for (int h = 0; h < TILES; h++) UNROLL for (int j = 0; j < 2; j++) { sums.m[h][j] = ATTENTION_EMPTY; sums.l[h][j] = 0.0f; }
  UNROLL for (int n = 0; n < VALUE_TILES; n++) UNROLL for (int h = 0; h < TILES; h++) UNROLL for (int e = 0; e < 4; e++) sums.of[n][h][e] = 0.0f;
  ROLLED for (bool first = true;; first = false) {
    turn_heads<BLOCK, TILES>(i, t, first);
    consumers_sync();
    dev::mbar_wait(&shared()->tile, shared()->tiles - 1);
    attend_positions<BLOCK, TILES>(i, t, sums);
    consumers_sync();
    if (t.tile_end == t.to) return;
    t.tile = t.tile_end;
    copy_tile(i, t);
  }
}

// Columns of a unit: known where all units have all of them.
template <class I> DEV int unit_columns(const I& i, const Finish& f) { return column_units(i) == 1 ? i.v_dim : f.columns; }
// Puts this warp's part at `to`.
template <int TILES, class I> DEV void put_part(const I& i, const Finish& f, const Sums<TILES>& sums, float* to) {
  const int lane = dev::tid_anew() % 32, columns = unit_columns(i, f), stride = part_stride(columns);
  UNROLL for (int h = 0; h < TILES; h++) {
    if (h > 0 && f.heads <= 8) continue;
    UNROLL for (int j = 0; j < 2; j++) {
      const int head = h * 8 + lane % 4 * 2 + j; float* of = to + 2 * HEADS + head * stride + lane / 4;
      const float l = over_positions(sums.l[h][j], Added());
      if (lane / 4 == 0) { to[head] = sums.m[h][j]; to[HEADS + head] = l; }
      UNROLL for (int n = 0; n < VALUE_TILES; n++) UNROLL for (int e = 0; e < 2; e++) if (n * 16 + lane / 4 + e * 8 < columns) of[n * 16 + e * 8] = sums.of[n][h][2 * e + j];
    }
  }
}
// `count` parts of a head, columns k and k + 1, added in order, so many at once: their loads are under way together, and they have one largest score.
static const int MERGED = 4;
struct Merged { float m, l, of[2]; };
template <class I> DEV Merged merge(const I& i, const Finish& f, const float* parts, int count, int head, int k) {
  const int columns = unit_columns(i, f), size = part_floats(f.heads, columns), own = 2 * HEADS + head * part_stride(columns) + k;
  Merged out; out.m = ATTENTION_EMPTY; out.l = out.of[0] = out.of[1] = 0.0f;
  ROLLED for (int first = 0; first < count; first += MERGED) {
    float v[MERGED][4], top = out.m;
    UNROLL for (int s = 0; s < MERGED; s++) {
      const float* part = parts + (first + s < count ? first + s : first) * size;
      v[s][0] = first + s < count ? part[head] : ATTENTION_EMPTY; v[s][1] = part[HEADS + head]; v[s][2] = part[own]; v[s][3] = part[own + 1];
      top = dev::max_(top, v[s][0]);
    }
    const float keep = dev::exp_quick(out.m - top);
    out.m = top; out.l *= keep; out.of[0] *= keep; out.of[1] *= keep;
    UNROLL for (int s = 0; s < MERGED; s++) {
      const float scale = v[s][0] > ATTENTION_EMPTY ? dev::exp_quick(v[s][0] - top) : 0.0f;
      out.l = dev::fma_(v[s][1], scale, out.l); out.of[0] = dev::fma_(v[s][2], scale, out.of[0]); out.of[1] = dev::fma_(v[s][3], scale, out.of[1]);
    }
  }
  return out;
}
// Parts of all splits of a unit.
template <class I> DEV float* splits_of(const I& i, const Finish& f) { return (float*)i.residual + (uint64_t)f.slot * i.parts * part_floats(HEADS, VALUE_COLUMNS); }
// Merged parts go to `to`, or, where there is none, become activations with the sink: 64 columns of a head a warp, two a lane.
template <class I> DEV void finish_heads(const I& i, const Finish& f, const float* parts, int count, float* to) {
  const int lane = dev::tid_anew() % 32, v_padded = (i.v_dim + 63) / 64 * 64, columns = unit_columns(i, f), blocks = (columns + 63) / 64;
  ROLLED for (int e = dev::tid_anew() / 32; e < f.heads * blocks; e += WARPS) {
    const int head = e / blocks, k = e % blocks * 64 + lane * 2; const float sink = ((const AttentionShared*)shared()->x)->sink[head];
    Merged p = merge(i, f, parts, count, head, k < columns ? k : 0);
    if (to) {
      float* at = to + 2 * HEADS + head * part_stride(columns) + k;
      if (k < columns) at[0] = p.of[0];
      if (k + 1 < columns) at[1] = p.of[1];
      if (k == 0) { to[head] = p.m; to[HEADS + head] = p.l; }
      continue;
    }
    const float top = dev::max_(p.m, sink), keep = dev::exp_quick(p.m - top), scale = keep / (p.l * keep + dev::exp_quick(sink - top));
    emit_activations((uint8_t*)i.out, i.columns_padded, f.row, (f.head + head) * v_padded + f.column + k, k < columns ? p.of[0] * scale : 0.0f, k + 1 < columns ? p.of[1] * scale : 0.0f);
  }
}
template <bool SPLIT, class I> DEV void finish_unit(const I& i, const Sums<head_tiles<SPLIT>()>& sums) {
  AttentionShared* s = (AttentionShared*)shared()->x; const Finish& f = s->finish; float* own = (float*)(shared()->x + f.sums);
  if (consumer_warp() < f.parts) put_part<head_tiles<SPLIT>()>(i, f, sums, own + consumer_warp() * part_floats(f.heads, unit_columns(i, f)));
  consumers_sync();
  if (!SPLIT) { finish_heads(i, f, own, f.parts, (float*)0); return; }
  const float* parts = own; int count = f.parts; bool all = f.splits == 1;
  ROLLED for (;;) {  // the warps' parts, then, in the CTA that finishes last, the splits'
    finish_heads(i, f, parts, count, all ? (float*)0 : splits_of(i, f) + f.split * part_floats(f.heads, unit_columns(i, f)));
    if (all) return;
    consumers_sync();
    if (dev::tid() == 0) s->last = dev::take((uint32_t*)i.bests + f.slot, f.splits - 1) == (uint32_t)f.splits - 1;
    consumers_sync();
    if (!s->last) return;
    parts = splits_of(i, f); count = f.splits; all = true;
  }
}
// BLOCK: the rows are a drafter's block. They see each other, heads have norms, and only the context stays in the caches.
template <bool BLOCK, bool SPLIT> DEV void attend(const StepArgs& a, const Attending<BLOCK>& i, int rows, int position) {
  // From the last CTA on: where QKV has not a tile for every CTA, those without one prepare earlier.
  int u = ctas() - 1 - dev::cta(), units = rows * i.kv_heads * head_units<SPLIT>(i) * column_units(i) * (SPLIT ? i.parts : 1);
  bool waited = false;
  ROLLED while (u < units) {
    Attend t = attend_unit<BLOCK, SPLIT>(a, i, u, position, rows);
    if (SPLIT && t.split >= t.splits) { u += ctas(); continue; }
    if (waited) consumers_sync();
    if (dev::tid() == 0) {
      Finish& f = t.s->finish; f.row = t.row; f.head = t.head; f.heads = t.heads; f.column = t.column; f.columns = t.columns; f.slot = t.slot; f.split = t.split; f.splits = t.splits;
      f.unit = u; f.units = units; f.position = position; f.rows = rows; f.sums = (int)(t.keys - shared()->x);
      f.parts = ((t.to - t.tile < t.positions ? t.to - t.tile : t.positions) + WARP_POSITIONS - 1) / WARP_POSITIONS;
    }
    copy_tile(i, t);
    // By the last warp: the first one has a counter to look at.
    const int sink = dev::tid_anew() - (CONSUMERS - 32);
    if (sink >= 0 && sink < t.heads) t.s->sink[sink] = i.sinks ? ((const float*)i.sinks)[t.head + sink] : ATTENTION_EMPTY;
    if (!waited) { await_all(a, i.wait); consumers_sync(); }
    waited = true;
    Sums<head_tiles<SPLIT>()> sums; attend_tiles<BLOCK>(i, t, sums);
    finish_unit<SPLIT>(i, sums);
    const Finish& f = ((const AttentionShared*)shared()->x)->finish;
    u = f.unit + ctas(); units = f.units; position = f.position; rows = f.rows;
  }
}
template <bool BLOCK> DEV void attend_any(const StepArgs& a, const Attending<BLOCK>& i, int rows, int position) {
  if (i.parts > 1) attend<BLOCK, true>(a, i, rows, position); else attend<BLOCK, false>(a, i, rows, position);
}
DEV_CALL void attention_op(const StepArgs& a, const Instr& i, int rows) { attend_any<false>(a, (const AttentionInstr&)i, rows, shared()->position); }
