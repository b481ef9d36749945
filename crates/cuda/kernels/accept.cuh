// Greedy choice and acceptance. Definitions: model/src/reference/sample.rs (first_largest) and accept.rs (greedy).
// argmax: the first of the largest logits, by one warp; -0 and 0 are equal. Ranks of a split vocabulary merge (value, token)
// pairs in rank order with the same rule. accept_greedy: how many drafted tokens equal the target's own choice, in order.
#pragma once
#include "router.cuh"

struct Best { float value; int token; };
DEV Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a; }
DEV Best argmax_warp(const float* logits, int count, int first_token) {
  const int lane = dev::tid() % 32;
  Best best; best.value = -3.4e38f; best.token = 0x7fffffff;
  for (int i = lane; i < count; i += 32) { Best b; b.value = logits[i]; b.token = first_token + i; best = better(best, b); }
  for (int m = 16; m; m >>= 1) { Best b; b.value = dev::shuffle_xor(best.value, m); b.token = (int)dev::shuffle_xor((uint32_t)best.token, m); best = better(best, b); }
  return best;
}
DEV int accept_greedy(const int* best, const int* drafted, int count) {
  int n = 0;
  while (n < count && drafted[n] == best[n]) n++;
  return n;
}
