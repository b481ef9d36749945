// Expert choice of one token by one warp, and the list of distinct experts of a step. Definition: model/src/reference/router.rs.
//
// Every CTA runs this on the same logits rather than wait for another to tell it. A lane holds experts lane, lane + 32, ..;
// each of the k rounds is two warp reductions: the largest key, then the lowest expert that has it.
// Out: expert[0..k) ascending, weight[0..k); bit e of `chosen` is set for each (words of 32 experts, ORed by the caller).
#pragma once
#include "swiglu.cuh"

static const int ROUTER_PER_LANE = 16;  // up to 512 experts

// Order of f32 as order of integers (total_cmp).
DEV uint32_t sortable(float v) { const uint32_t u = dev::bits(v); return u & 0x80000000u ? ~u : u | 0x80000000u; }

template <class Logits> DEV void route_token(Logits logits, const float* bias, int experts, int k, bool normalise, float scaling, int* expert, float* weight, uint32_t* chosen) {
  const int lane = dev::tid() % 32;
  uint32_t key[ROUTER_PER_LANE], taken = 0;
  UNROLL for (int i = 0; i < ROUTER_PER_LANE; i++) { const int e = lane + 32 * i; key[i] = e < experts ? sortable(sigmoid(logits[e]) + bias[e]) : 0u; }
  for (int round = 0; round < k; round++) {
    uint32_t best = 0, at = 0xffffffffu;
    UNROLL for (int i = 0; i < ROUTER_PER_LANE; i++) if (!(taken >> i & 1u) && key[i] > best) { best = key[i]; at = lane + 32 * i; }
    const uint32_t top = dev::max_warp(best), first = dev::min_warp(best == top ? at : 0xffffffffu);
    if (first % 32 == (uint32_t)lane) taken |= 1u << (first / 32);
  }
  // taken bit i of lane l is expert 32 i + l: gather words of 32 experts, then every lane knows the ascending list
  float sum = 0.0f; int n = 0;
  for (int i = 0; i < (experts + 31) / 32; i++) {
    uint32_t word = dev::or_warp(taken >> i & 1u ? 1u << lane : 0u);
    if (lane == 0) chosen[i] = word;
    for (; word; word &= word - 1) { const int e = 32 * i + dev::count_bits((word & (0u - word)) - 1u); const float s = sigmoid(logits[e]); sum += s; if (lane == 0) { expert[n] = e; weight[n] = s; } n++; }
  }
  if (lane == 0) for (int i = 0; i < n; i++) weight[i] = weight[i] / (normalise ? sum + 1e-20f : 1.0f) * scaling;
}

// Ascending list of the experts whose bit is set in any of `tokens` masks ([tokens][words]); returns how many. One thread.
DEV int distinct_experts(const uint32_t* chosen, int tokens, int words, int* list) {
  int n = 0;
  for (int i = 0; i < words; i++) {
    uint32_t any = 0;
    for (int t = 0; t < tokens; t++) any |= chosen[t * words + i];
    for (; any; any &= any - 1) list[n++] = 32 * i + dev::count_bits((any & (0u - any)) - 1u);
  }
  return n;
}
