// Softmax attention of one query row and head over a range of positions, by one warp; partial results merge exactly.
// Definition: model/src/reference/attention.rs (window and sink included).
//
// keys [positions][qk_dim], values [positions][v_dim] of this head's group, bf16. A part is (m, l, o): the largest score, the
// sum of exp(score - m), and sum of exp(score - m) * value. A context split over CTAs is merged in the order of the parts,
// so the result depends on the split, which depends on the position alone, never on other rows.
#pragma once
#include "rms_norm.cuh"

static const int ATTENTION_V_PER_LANE = 8;  // v_dim up to 256
struct AttentionPart { float m, l, o[ATTENTION_V_PER_LANE]; };  // o: values lane, lane + 32, ..

DEV float from_bf16(uint16_t v) { return dev::number((uint32_t)v << 16); }
static const float ATTENTION_EMPTY = -3.0e38f;

DEV float attention_score(const float* q, const uint16_t* key, int qk_dim) {
  float sum = 0.0f;
  for (int d = 0; d < qk_dim; d++) sum = dev::fma_(q[d], from_bf16(key[d]), sum);
  return sum;
}
// Positions first..end of the visible range; scale = 1 / sqrt(qk_dim). `scores`: 32 floats of this warp's shared memory.
DEV AttentionPart attention_part(const float* q, const uint16_t* keys, const uint16_t* values, int first, int end, int qk_dim, int v_dim, float scale, float* scores) {
  const int lane = dev::tid() % 32;
  AttentionPart p; p.m = ATTENTION_EMPTY; p.l = 0.0f;
  UNROLL for (int i = 0; i < ATTENTION_V_PER_LANE; i++) p.o[i] = 0.0f;
  for (int base = first; base < end; base += 32) {
    const int at = base + lane, n = end - base < 32 ? end - base : 32;
    const float s = at < end ? scale * attention_score(q, keys + (uint64_t)at * qk_dim, qk_dim) : ATTENTION_EMPTY;
    float m = s;
    for (int k = 16; k; k >>= 1) m = dev::max_(m, dev::shuffle_xor(m, k));
    m = dev::max_(m, p.m);
    const float e = at < end ? dev::exp_(s - m) : 0.0f, keep = dev::exp_(p.m - m);
    p.l = p.l * keep + sum_warp(e); p.m = m;
    scores[lane] = e; dev::sync_warp();
    UNROLL for (int i = 0; i < ATTENTION_V_PER_LANE; i++) {
      const int d = lane + 32 * i; if (d >= v_dim) continue;
      float o = p.o[i] * keep;
      for (int k = 0; k < n; k++) o = dev::fma_(scores[k], from_bf16(values[(uint64_t)(base + k) * v_dim + d]), o);
      p.o[i] = o;
    }
    dev::sync_warp();
  }
  return p;
}
// `into` absorbs `p`.
DEV void attention_merge(AttentionPart& into, const AttentionPart& p) {
  const float m = dev::max_(into.m, p.m), a = dev::exp_(into.m - m), b = dev::exp_(p.m - m);
  into.m = m; into.l = into.l * a + p.l * b;
  UNROLL for (int i = 0; i < ATTENTION_V_PER_LANE; i++) into.o[i] = into.o[i] * a + p.o[i] * b;
}
// The sink joins the softmax and is dropped. out: [v_dim] f32.
DEV void attention_finish(const AttentionPart& p, const float* sink, int v_dim, float* out) {
  float m = p.m, l = p.l, scale = 1.0f;
  if (sink) { m = dev::max_(m, *sink); scale = dev::exp_(p.m - m); l = l * scale + dev::exp_(*sink - m); }
  UNROLL for (int i = 0; i < ATTENTION_V_PER_LANE; i++) { const int d = dev::tid() % 32 + 32 * i; if (d < v_dim) out[d] = p.o[i] * scale / l; }
}
