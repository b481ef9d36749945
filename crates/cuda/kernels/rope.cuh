// Rotary embedding of one head by one warp, rotate-half pairing. Definition: model/src/reference/rope.rs.
// head: [head_dim] f32, the first `dims` turn; turn: [dims / 2] pairs (cos, sin) of this position, made on the host in f64
// (device sine of a large angle is not the definition's).
#pragma once
#include "dev.cuh"

DEV void rope_head(float* head, int dims, const float* turn) {
  const int half = dims / 2;
  for (int i = dev::tid() % 32; i < half; i += 32) {
    const float c = turn[2 * i], s = turn[2 * i + 1], a = head[i], b = head[i + half];
    head[i] = a * c - b * s;
    head[i + half] = b * c + a * s;
  }
}
