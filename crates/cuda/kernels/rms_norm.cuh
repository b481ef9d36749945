// RMSNorm of one row by one warp. Definition: model/src/reference/rms_norm.rs.
// x, weight, out: [hidden] f32; out may be x. The sum of squares is a tree over lanes: fixed, whatever else is in the step.
#pragma once
#include "dev.cuh"

DEV float sum_warp(float v) {
  for (int m = 16; m; m >>= 1) v += dev::shuffle_xor(v, m);
  return v;
}
DEV void rms_norm_row(const float* x, const float* weight, float eps, int hidden, float* out) {
  const int lane = dev::tid() % 32;
  float sum = 0.0f;
  for (int i = lane; i < hidden; i += 32) sum = dev::fma_(x[i], x[i], sum);
  const float scale = 1.0f / dev::sqrt_(sum_warp(sum) / hidden + eps);
  for (int i = lane; i < hidden; i += 32) out[i] = x[i] * scale * weight[i];
}
