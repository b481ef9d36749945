// out[row][token] = sum over k of weight[row][k] * bf16(x[token][k]), for 8 tokens: the product that QKV, o_proj, gate/up,
// down, router and lm_head share. Definition: model/src/reference/linear.rs on weights decoded to f32.
//
// One persistent CTA = two consumer warpgroups and a loader warp. A warpgroup owns a tile of 64 rows over all of K and adds
// its pages in order, so a row's sum does not depend on how many tiles or tokens there are.
// Arguments: LinearArgs of layout.h (src/layout.rs). x: [8][k] f32; out: [tiles * 64][8] f32, rows in fragment order.
// Shapes: K a multiple of the page's columns (512 for FP4, 256 for FP8), weights [tiles][K / columns][page].
#pragma once
#include "ring.cuh"
#include "split.cuh"
#include "weights.cuh"

static const int LINEAR_TOKENS = 8, LINEAR_GROUPS = 2, LINEAR_THREADS = LINEAR_GROUPS * GROUP_THREADS + 32;

template <class F, int STAGES> struct LinearShared {
  static const int PAGE_BYTES = F::BLOCK_BYTES * F::BLOCKS;
  Ring<LINEAR_GROUPS, STAGES, PAGE_BYTES> ring;
  float scale[LINEAR_TOKENS];
  alignas(128) uint8_t x[1];  // k * 16 bytes, split
};

// Splits row `warp` of x: all 8 consumer warps, a row each.
DEV void linear_split_row(const LinearArgs& a, uint8_t* x, float* scale) {
  const int row = dev::tid() / 32, lane = dev::tid() % 32;
  const float* v = a.x + (uint64_t)row * a.k;
  float largest = 0.0f;
  for (int k = lane; k < a.k; k += 32) largest = dev::max_(largest, dev::abs_(round_bf16(v[k])));
  const float s = split_scale(dev::number(dev::max_warp(dev::bits(largest))));
  for (int k = lane * 2; k < a.k; k += 64) {
    uint32_t hi, lo;
    split_pair(round_bf16(v[k]), round_bf16(v[k + 1]), s, hi, lo);
    uint8_t* at = x + split_offset(row, k);
    *(uint16_t*)at = (uint16_t)hi; *(uint16_t*)(at + 128) = (uint16_t)lo;
  }
  if (lane == 0) scale[row] = s;
  dev::fence_async();
}

template <class F, int STAGES> DEV void linear_load(const LinearArgs& a, LinearShared<F, STAGES>* s) {
  typedef LinearShared<F, STAGES> S;
  Loader<decltype(s->ring), LINEAR_WINDOW> loader; loader.ring = &s->ring;
  const int pages = a.k / 128 / F::BLOCKS;
  for (int first = dev::cta() * LINEAR_GROUPS; first < a.tiles; first += dev::ctas() * LINEAR_GROUPS)
    for (int p = 0; p < pages; p++)
      for (int g = 0; g < LINEAR_GROUPS && first + g < a.tiles; g++)
        loader.load(g, a.weights + ((uint64_t)(first + g) * pages + p) * S::PAGE_BYTES, S::PAGE_BYTES);
}

template <class F, int STAGES> DEV void linear_multiply(const LinearArgs& a, LinearShared<F, STAGES>* s) {
  const int group = dev::tid() / GROUP_THREADS, t = dev::tid() % GROUP_THREADS, lane = t % 32, row = t / 32 * 16 + lane / 4, token = lane % 4 * 2;
  Reader<decltype(s->ring)> reader; reader.ring = &s->ring; reader.group = group;
  const int pages = a.k / 128 / F::BLOCKS;
  const float unit0 = F::unit() / s->scale[token], unit1 = F::unit() / s->scale[token + 1];
  for (int tile = dev::cta() * LINEAR_GROUPS + group; tile < a.tiles; tile += dev::ctas() * LINEAR_GROUPS) {
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int p = 0; p < pages; p++) {
      const uint8_t* page = reader.wait();
      UNROLL for (int b = 0; b < F::BLOCKS; b++) F::multiply(page + b * F::BLOCK_BYTES, s->x + (uint64_t)(p * F::BLOCKS + b) * 128 * 16, acc);
      reader.release();
    }
    float* out = a.out + ((uint64_t)tile * 64 + row) * LINEAR_TOKENS + token;
    out[0] = acc[0] * unit0; out[1] = acc[1] * unit1; out[8 * LINEAR_TOKENS] = acc[2] * unit0; out[8 * LINEAR_TOKENS + 1] = acc[3] * unit1;
  }
}

template <class F, int STAGES> DEV void linear_body(const LinearArgs& a) {
  LinearShared<F, STAGES>* s = (LinearShared<F, STAGES>*)dev::smem();
  if (dev::tid() == 0) s->ring.init(&s->ring);
  dev::bar_sync(0, LINEAR_THREADS);
  if (dev::tid() >= LINEAR_GROUPS * GROUP_THREADS) { if (dev::tid() % 32 == 0) linear_load<F, STAGES>(a, s); return; }
  linear_split_row(a, s->x, s->scale);
  dev::bar_sync(1, LINEAR_GROUPS * GROUP_THREADS);
  linear_multiply<F, STAGES>(a, s);
}
