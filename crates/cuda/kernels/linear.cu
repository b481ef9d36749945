// Test and bench kernels of linear.cuh: one for each weight format.
#include "linear.cuh"
KERNEL void __launch_bounds__(LINEAR_THREADS, 1) linear_fp4(const __grid_constant__ LinearArgs a) { linear_body<Fp4, LINEAR_STAGES>(a); }
KERNEL void __launch_bounds__(LINEAR_THREADS, 1) linear_fp8(const __grid_constant__ LinearArgs a) { linear_body<Fp8, LINEAR_STAGES>(a); }
KERNEL void linear_layout(uint64_t* out) {
  out[0] = sizeof(LinearArgs); out[1] = (uint64_t)(uintptr_t)&((LinearArgs*)0)->x; out[2] = (uint64_t)(uintptr_t)&((LinearArgs*)0)->out;
  out[3] = (uint64_t)(uintptr_t)&((LinearArgs*)0)->tiles; out[4] = (uint64_t)(uintptr_t)&((LinearArgs*)0)->k;
  out[5] = (uint64_t)(uintptr_t)((LinearShared<Fp4, LINEAR_STAGES>*)0)->x; out[6] = (uint64_t)(uintptr_t)((LinearShared<Fp8, LINEAR_STAGES>*)0)->x;
}
