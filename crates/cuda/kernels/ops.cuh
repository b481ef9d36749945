// A thin kernel around each small op, for parity tests on the emulator and on a GPU. One CTA of OPS_THREADS threads; a warp
// takes every eighth row, head or token. What the slots of OpArgs mean:
//   RMS_NORM   p: x, weight, out              n: rows, hidden                        f: eps
//   ROPE       p: heads (in, out), turn       n: heads, head_dim, dims
//   SWIGLU     p: gate (in, out), up          n: count
//   ROUTER     p: logits, bias, expert, weight, chosen [tokens][words], list, count
//              n: tokens, experts, k, normalise                                       f: scaling
//   ATTENTION  p: q, keys, values, sinks, out n: heads, first, end, qk_dim, v_dim, parts, sinks?  f: scale
//   ARGMAX     p: logits, tokens              n: rows, count
//   ACCEPT     p: best, drafted, out          n: count
#pragma once
#include "accept.cuh"
#include "attention.cuh"
#include "layout.h"
#include "rope.cuh"

enum Op { OP_RMS_NORM, OP_ROPE, OP_SWIGLU, OP_ROUTER, OP_ATTENTION, OP_ARGMAX, OP_ACCEPT };
static const int OPS_THREADS = 256, OPS_WARPS = OPS_THREADS / 32;
struct OpsShared { float scores[OPS_WARPS][32]; };

DEV void attention_op(const OpArgs& a, int head, float* scores) {
  const int first = a.n[1], end = a.n[2], parts = a.n[5], each = (end - first + parts - 1) / parts;
  const float* q = (const float*)a.p[0] + head * a.n[3];
  AttentionPart all; all.m = ATTENTION_EMPTY; all.l = 0.0f;
  UNROLL for (int i = 0; i < ATTENTION_V_PER_LANE; i++) all.o[i] = 0.0f;
  for (int part = 0; part < parts; part++) {
    const int from = first + part * each, to = from + each < end ? from + each : end;
    attention_merge(all, attention_part(q, (const uint16_t*)a.p[1], (const uint16_t*)a.p[2], from, to, a.n[3], a.n[4], a.f[0], scores));
  }
  attention_finish(all, a.n[6] ? (const float*)a.p[3] + head : (const float*)0, a.n[4], (float*)a.p[4] + head * a.n[4]);
}
DEV void router_op(const OpArgs& a, int warp) {
  const int words = (a.n[1] + 31) / 32;
  for (int t = warp; t < a.n[0]; t += OPS_WARPS)
    route_token((const float*)a.p[0] + t * a.n[1], (const float*)a.p[1], a.n[1], a.n[2], a.n[3], a.f[0], (int*)a.p[2] + t * a.n[2], (float*)a.p[3] + t * a.n[2], (uint32_t*)a.p[4] + t * words);
  dev::bar_sync(0, OPS_THREADS);
  if (dev::tid() == 0) *(int*)a.p[6] = distinct_experts((const uint32_t*)a.p[4], a.n[0], words, (int*)a.p[5]);
}
DEV void ops_body(const OpArgs& a) {
  OpsShared* s = (OpsShared*)dev::smem();
  const int warp = dev::tid() / 32, rows = a.n[0];
  if (a.op == OP_RMS_NORM) for (int r = warp; r < rows; r += OPS_WARPS) rms_norm_row((const float*)a.p[0] + r * a.n[1], (const float*)a.p[1], a.f[0], a.n[1], (float*)a.p[2] + r * a.n[1]);
  if (a.op == OP_ROPE) for (int h = warp; h < rows; h += OPS_WARPS) rope_head((float*)a.p[0] + h * a.n[1], a.n[2], (const float*)a.p[1]);
  if (a.op == OP_SWIGLU) for (int i = dev::tid(); i < rows; i += OPS_THREADS) ((float*)a.p[0])[i] = swiglu(((float*)a.p[0])[i], ((const float*)a.p[1])[i]);
  if (a.op == OP_ROUTER) router_op(a, warp);
  if (a.op == OP_ATTENTION) for (int h = warp; h < rows; h += OPS_WARPS) attention_op(a, h, s->scores[warp]);
  if (a.op == OP_ARGMAX) for (int r = warp; r < rows; r += OPS_WARPS) { const Best b = argmax_warp((const float*)a.p[0] + r * a.n[1], a.n[1], 0); if (dev::tid() % 32 == 0) ((int*)a.p[1])[r] = b.token; }
  if (a.op == OP_ACCEPT && dev::tid() == 0) *(int*)a.p[2] = accept_greedy((const int*)a.p[0], (const int*)a.p[1], rows);
}
