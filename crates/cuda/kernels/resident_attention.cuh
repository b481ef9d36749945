// Attention of the resident kernel: a (row, head) at a time by a CTA.
//
// Cached keys and values come into shared memory in tiles, by copies that start before QKV is waited for; rows of this step
// are made from Qkv by every CTA that sees them, and the first head of a group keeps its own row's. Chunks of 16 absolute
// positions go to warp (position / 16) % 8, two lanes a key, so that a row's sums depend on its position alone.
// Definition: model/src/reference/attention.rs with keys and values in BF16.
#pragma once
#include "resident_ops.cuh"

static const int CHUNK = 16, FRESH_STRIDE = 528;
struct AttentionShared { float q[256], scores[8][CHUNK], m[8], l[8]; alignas(16) uint8_t rows[1]; };
// Rows of this step, then the warps' sums: where tiles of products are reduced otherwise.
struct FreshRows { alignas(16) uint8_t keys[TOKENS][FRESH_STRIDE], values[TOKENS][FRESH_STRIDE]; };
static_assert(sizeof(FreshRows) <= sizeof(((ResidentShared*)0)->red) && 8 * 256 * 4 <= sizeof(((ResidentShared*)0)->red), "both lie there");

// One (row, head) and its tile of the caches. Strides in bytes; a key's is an odd number of 16, so that lanes meet all banks.
struct Attend {
  AttentionShared* s; FreshRows* fresh; uint8_t *keys, *values; const uint8_t *cached_keys, *cached_values;
  int row, head, group, position, first, end, key_columns, key_stride, value_stride, positions, tile; bool wide;
};
DEV Attend attend_unit(const StepArgs& a, const Instr& i, int u, int position) {
  Attend t; const int heads = i.heads;
  t.s = (AttentionShared*)shared()->x; t.fresh = (FreshRows*)&shared()->red;
  t.row = u / heads; t.head = u % heads; t.group = t.head / (heads / i.kv_heads); t.position = position;
  t.end = position + t.row + 1; t.first = i.window >= 0 && t.end - 1 > i.window ? t.end - 1 - i.window : 0;
  t.key_columns = (i.qk_dim + 15) / 16 * 16; t.key_stride = (t.key_columns * 2 / 16 | 1) * 16; t.value_stride = (i.v_dim * 2 + 15) / 16 * 16;
  t.positions = (a.x_bytes - (int)sizeof(AttentionShared)) / (t.key_stride + t.value_stride) / CHUNK * CHUNK;
  t.keys = t.s->rows; t.values = t.keys + t.positions * t.key_stride;
  t.cached_keys = (const uint8_t*)i.keys + (uint64_t)t.group * a.context * i.qk_dim * 2; t.cached_values = (const uint8_t*)i.values + (uint64_t)t.group * a.context * i.v_dim * 2;
  t.wide = i.qk_dim % 16 == 0 && i.v_dim % 8 == 0; t.tile = t.first / CHUNK * CHUNK;
  return t;
}
// A row of `dim` values: 16 bytes a copy, or, where rows are not aligned to that, one by one and zeros up to `columns`.
DEV void copy_row(uint8_t* to, const uint8_t* from, int dim, int columns, bool wide) {
  const int lane = dev::tid() % 32;
  if (wide) { for (int p = lane; p < dim / 8; p += 32) dev::copy16(to + p * 16, from + p * 16); return; }
  for (int d = lane; d < columns; d += 32) ((uint16_t*)to)[d] = d < dim ? ((const uint16_t*)from)[d] : (uint16_t)0;
}
// Starts the copies of the tile's cached positions.
DEV void copy_tile(const Instr& i, const Attend& t) {
  const int to = t.tile + t.positions < t.position ? t.tile + t.positions : t.position, qk_dim = i.qk_dim, v_dim = i.v_dim;
  for (int p = t.tile + consumer_warp(); p < to && p < t.end; p += 8) {
    if (p < t.first) continue;
    copy_row(t.keys + (p - t.tile) * t.key_stride, t.cached_keys + (uint64_t)p * qk_dim * 2, qk_dim, t.key_columns, t.wide);
    copy_row(t.values + (p - t.tile) * t.value_stride, t.cached_values + (uint64_t)p * v_dim * 2, v_dim, v_dim, t.wide);
  }
}
// Column d of a head after rotation, straight from memory: no lane waits for another's load.
DEV float turned(const float* head, int d, int dims, const float* turn) {
  const int half = dims / 2;
  if (d >= 2 * half) return head[d];
  const int at = d < half ? d : d - half;
  const float c = turn[2 * at], s = turn[2 * at + 1], x = head[d], y = head[d < half ? d + half : d - half];
  return d < half ? x * c - y * s : x * c + y * s;
}
// Key and value of row `warp` of this step, as the caches have them; into the caches too when `keep`.
DEV void fresh_row(const StepArgs& a, const Instr& i, const Attend& t, bool keep) {
  const int row = consumer_warp(), lane = dev::tid() % 32, qk_dim = i.qk_dim, v_dim = i.v_dim; const uint64_t position = t.position + row;
  const float* qkv = (const float*)i.x + (uint64_t)row * i.qkv_rows;
  const float *key = qkv + i.k_first + t.group * qk_dim, *value = qkv + i.v_first + t.group * v_dim, *turn = (const float*)i.turns + position * i.rope_dims;
  float k[8], v[8];
  UNROLL for (int j = 0; j < 8; j++) { const int d = lane + 32 * j; k[j] = d < qk_dim ? turned(key, d, i.rope_dims, turn) : 0.0f; v[j] = d < v_dim ? value[d] * i.value_scale : 0.0f; }
  uint16_t *keys = (uint16_t*)(t.cached_keys + position * qk_dim * 2), *values = (uint16_t*)(t.cached_values + position * v_dim * 2);
  UNROLL for (int j = 0; j < 8; j++) {
    const int d = lane + 32 * j; const uint16_t kd = (uint16_t)dev::to_bf16x2(k[j], 0.0f), vd = (uint16_t)dev::to_bf16x2(v[j], 0.0f);
    ((uint16_t*)t.fresh->keys[row])[d] = kd; ((uint16_t*)t.fresh->values[row])[d] = vd;
    if (keep && d < qk_dim) keys[d] = kd;
    if (keep && d < v_dim) values[d] = vd;
  }
}
DEV void query(const Instr& i, const Attend& t) {
  const int lane = dev::tid() % 32, qk_dim = i.qk_dim;
  const float *q = (const float*)i.x + (uint64_t)t.row * i.qkv_rows + t.head * qk_dim, *turn = (const float*)i.turns + (uint64_t)(t.position + t.row) * i.rope_dims;
  float v[8];
  UNROLL for (int j = 0; j < 8; j++) { const int d = lane + 32 * j; v[j] = d < qk_dim ? turned(q, d, i.rope_dims, turn) : 0.0f; }
  UNROLL for (int j = 0; j < 8; j++) t.s->q[lane + 32 * j] = v[j];
}
// What a warp has added up so far: columns 4 lane .. + 3 and 128 further.
struct Sums { float m, l, o[8]; };

// Half of a key's score: lanes 0 to 15 have the first half of the columns, the others the second.
DEV float half_score(const Attend& t, int p) {
  const int half = t.key_columns / 2, from = dev::tid() % 32 / CHUNK * half;
  const uint8_t* key = (p < t.position ? t.keys + (p - t.tile) * t.key_stride : t.fresh->keys[p - t.position]) + from * 2;
  const float* q = t.s->q + from;
  float sum[2] = {0.0f, 0.0f};
  for (int d = 0; d < half; d += 8) {
    uint32_t k[4], x[8]; dev::load16(key + d * 2, k); dev::load16(q + d, x); dev::load16(q + d + 4, x + 4);
    UNROLL for (int j = 0; j < 4; j++) { sum[0] = dev::fma_(dev::number(x[2 * j]), dev::number(k[j] << 16), sum[0]); sum[1] = dev::fma_(dev::number(x[2 * j + 1]), dev::number(k[j] & 0xffff0000u), sum[1]); }
  }
  return sum[0] + sum[1];
}
// Columns 4 lane .. + 3 and 128 further of a value row, two bf16 a word; zeros past its end.
DEV void value_columns(const uint16_t* row, int dim, uint32_t (&w)[4]) {
  const int d = dev::tid() % 32 * 4;
  UNROLL for (int k = 0; k < 2; k++) {
    const int at = d + 128 * k;
    w[2 * k] = w[2 * k + 1] = 0;
    if (at >= dim) continue;
    if (dim % 4 == 0) dev::load8(row + at, w + 2 * k);
    else UNROLL for (int j = 0; j < 4; j++) if (at + j < dim) w[2 * k + j / 2] |= (uint32_t)row[at + j] << (16 * (j & 1));
  }
}
DEV void attend_chunk(const Instr& i, const Attend& t, int base, Sums& sums) {
  const int warp = consumer_warp(), lane = dev::tid() % 32, p = base + lane % CHUNK; const bool seen = p >= t.first && p < t.end;
  float score = seen ? half_score(t, p) : 0.0f;
  score = seen ? i.scaling * (score + dev::shuffle_xor(score, CHUNK)) : ATTENTION_EMPTY + 0.0f * dev::shuffle_xor(score, CHUNK);
  float top = score;
  for (int k = CHUNK / 2; k; k >>= 1) top = dev::max_(top, dev::shuffle_xor(top, k));
  top = dev::max_(top, sums.m);
  const float e = seen ? dev::exp_(score - top) : 0.0f, keep = dev::exp_(sums.m - top);
  float l = e;
  for (int k = CHUNK / 2; k; k >>= 1) l += dev::shuffle_xor(l, k);
  sums.l = sums.l * keep + l; sums.m = top;
  if (lane < CHUNK) t.s->scores[warp][lane] = e;
  dev::sync_warp();
  UNROLL for (int k = 0; k < 8; k++) sums.o[k] *= keep;
  UNROLL for (int n = 0; n < CHUNK; n++) {
    const int at = base + n; uint32_t v[4] = {0, 0, 0, 0}; const float weight = t.s->scores[warp][n];
    if (at < t.first || at >= t.end) continue;
    value_columns((const uint16_t*)(at < t.position ? t.values + (at - t.tile) * t.value_stride : t.fresh->values[at - t.position]), i.v_dim, v);
    UNROLL for (int k = 0; k < 4; k++) { sums.o[2 * k] = dev::fma_(weight, dev::number(v[k] << 16), sums.o[2 * k]); sums.o[2 * k + 1] = dev::fma_(weight, dev::number(v[k] & 0xffff0000u), sums.o[2 * k + 1]); }
  }
  dev::sync_warp();
}
// Warp w merges columns 32 w .. of the eight warps' parts, in their order, and the sink.
DEV void finish_head(const Instr& i, const Attend& t, const float (*o)[256]) {
  const int lane = dev::tid() % 32, k = consumer_warp() * 32 + lane, v_padded = (i.v_dim + 31) / 32 * 32;
  if (consumer_warp() * 32 >= v_padded) return;
  const float* sinks = (const float*)i.sinks; const float sink = sinks ? sinks[t.head] : ATTENTION_EMPTY;
  float m = sink, sum = 0.0f;
  UNROLL for (int w = 0; w < 8; w++) m = dev::max_(m, t.s->m[w]);
  float l = sinks ? dev::exp_(sink - m) : 0.0f;
  UNROLL for (int w = 0; w < 8; w++) { const float scale = dev::exp_(t.s->m[w] - m); l += t.s->l[w] * scale; sum += o[w][k] * scale; }
  emit_activation((uint8_t*)i.out, i.columns_padded, t.row, t.head * v_padded + k, k < i.v_dim ? sum / l : 0.0f);
}
// Tile 0 is under way, and this step's rows are in shared memory after the first barrier.
DEV void attend(const Instr& i, Attend& t) {
  const int warp = consumer_warp(), lane = dev::tid() % 32;
  Sums sums; sums.m = ATTENTION_EMPTY; sums.l = 0.0f;
  UNROLL for (int k = 0; k < 8; k++) sums.o[k] = 0.0f;
  for (;;) {
    dev::copies_wait();
    consumers_sync();
    const int end = t.tile + t.positions < t.end ? t.tile + t.positions : t.end;
    for (int base = (t.tile / CHUNK + ((warp - t.tile / CHUNK) & 7)) * CHUNK; base < end; base += 8 * CHUNK) attend_chunk(i, t, base, sums);
    consumers_sync();
    if (end == t.end) break;
    t.tile += t.positions;
    copy_tile(i, t);
  }
  float (*o)[256] = (float (*)[256])&shared()->red;
  if (lane == 0) { t.s->m[warp] = sums.m; t.s->l[warp] = sums.l; }
  UNROLL for (int k = 0; k < 8; k++) o[warp][lane * 4 + k / 4 * 128 + k % 4] = sums.o[k];
  consumers_sync();
  finish_head(i, t, o);
}
DEV_CALL void attention_op(const StepArgs& a, const Instr& i, int rows, int position, int step) {
  const int warp = consumer_warp(), units = rows * i.heads;
  for (int u = dev::cta(); u < units; u += dev::ctas()) {
    Attend t = attend_unit(a, i, u, position);
    if (u >= dev::ctas()) consumers_sync();
    copy_tile(i, t);
    if (u < dev::ctas()) wait_for(a, i.wait, step, false);
    if (warp <= t.row) fresh_row(a, i, t, warp == t.row && t.head % (i.heads / i.kv_heads) == 0);
    if (warp == ((t.row + 1) & 7)) query(i, t);
    attend(i, t);
  }
}
