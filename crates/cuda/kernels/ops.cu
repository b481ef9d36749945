// Test kernel of the small ops.
#include "all_reduce.cuh"
#include "ops.cuh"
KERNEL void __launch_bounds__(OPS_THREADS, 1) ops(const __grid_constant__ OpArgs a) { ops_body(a); }
