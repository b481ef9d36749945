// The resident kernel: a walk over a program of instructions (resident.cuh).
#include "resident_linear.cuh"
KERNEL void __launch_bounds__(RESIDENT_THREADS, 1) resident(const __grid_constant__ StepArgs a) { resident_body(a); }
// Sizes as the device compiler has them: StepArgs, Instr, StepState, shared memory before x.
KERNEL void resident_layout(uint64_t* out) { out[0] = sizeof(StepArgs); out[1] = sizeof(Instr); out[2] = sizeof(StepState); out[3] = (uint64_t)(uintptr_t)((ResidentShared*)0)->x; }
