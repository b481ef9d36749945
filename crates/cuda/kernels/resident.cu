// The resident kernel: a walk over a program of instructions (resident.cuh).
#include "resident_linear.cuh"
KERNEL void __launch_bounds__(RESIDENT_THREADS, 1) resident(const __grid_constant__ StepArgs a) { resident_body(a); }
#if defined(SHAPES_KNOWN)
static const uint64_t SHAPES = SHAPES_KNOWN;
#else
static const uint64_t SHAPES = 0;
#endif
// What the device compiler made of it: sizes of StepArgs, Instr, StepState, shared memory before x; the model's shapes, 0: any.
KERNEL void resident_layout(uint64_t* out) { out[0] = sizeof(StepArgs); out[1] = sizeof(Instr); out[2] = sizeof(StepState); out[3] = (uint64_t)(uintptr_t)((ResidentShared*)0)->x; out[4] = SHAPES; }

// Valid random weights for speed measurements: `count` strips of a format. BF16 also serves tables.
KERNEL void resident_fill(uint32_t* p, uint64_t words, int format, uint32_t seed) {
  const uint32_t strip = strip_bytes(format) / 4, scales = format == STRIP_FP4 ? 256 : format == STRIP_FP8 ? 512 : strip;
  for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (uint64_t)gridDim.x * blockDim.x) {
    uint32_t h = (uint32_t)i * 0x9E3779B1u ^ (uint32_t)(i >> 32) * 0x85EBCA77u ^ seed; h ^= h >> 15; h *= 0x2C1B3C6Du; h ^= h >> 12; h *= 0x297A2D39u; h ^= h >> 15;
    const bool scale = i % strip >= scales;
    if (format == STRIP_FP4) p[i] = scale ? 0x78787878u : h;
    else if (format == STRIP_FP8) p[i] = scale ? 0x3CF5C28Fu : (h & 0xC387C387u) | 0x18301830u;
    else p[i] = (h & 0x807F807Fu) | 0x3C803C80u;
  }
}
// Reads `pages` pages of 16 KiB and drops them: the memory's limit, measured in the same run as a step.
static const int STREAM_STAGES = 8;
struct StreamShared { uint64_t full[STREAM_STAGES]; alignas(128) uint8_t pages[STREAM_STAGES][16384]; };
KERNEL void resident_stream(const uint8_t* p, uint64_t pages) {
  StreamShared* s = (StreamShared*)dev::smem();
  if (dev::tid() != 0) return;
  for (int k = 0; k < STREAM_STAGES; k++) dev::mbar_init(&s->full[k], 1);
  dev::mbar_init_fence();
  Cursor fill, done; uint64_t behind = 0;
  for (uint64_t i = dev::cta(); i < pages; i += dev::ctas()) {
    if (behind == STREAM_STAGES) { dev::mbar_wait(&s->full[done.stage], done.fill); done.next(STREAM_STAGES); behind--; }
    dev::mbar_expect(&s->full[fill.stage], 16384);
    dev::bulk_load(s->pages[fill.stage], p + i * 16384, 16384, &s->full[fill.stage], false);
    fill.next(STREAM_STAGES); behind++;
  }
  for (; behind; behind--) { dev::mbar_wait(&s->full[done.stage], done.fill); done.next(STREAM_STAGES); }
}
