// What the tests call: each function runs one kernel body on the emulated machine and says how it ended.
#define EMU_MAIN
#include "linear.cuh"

static const size_t REPORT_BYTES = 1024;

static bool run(int ranks, int ctas, int threads, int cluster, size_t smem, uint64_t seed, int bug, char* report, std::function<void(int)> body) {
  emu::planted = (emu::Bug)bug;
  const std::string end = emu::launch(ranks, ctas, threads, cluster, smem, seed, body);
  emu::planted = emu::NONE;
  snprintf(report, REPORT_BYTES, "%s", end.c_str());
  return end.empty();
}

extern "C" bool emu_linear(int format, int ctas, uint64_t seed, int bug, const uint8_t* weights, const float* x, float* out, int tiles, int k, char* report) {
  const LinearArgs a = {weights, x, out, tiles, k};
  if (format == 0) return run(1, ctas, LINEAR_THREADS, 1, sizeof(LinearShared<Fp4, LINEAR_STAGES>) + k * 16, seed, bug, report, [&](int) { linear_body<Fp4, LINEAR_STAGES>(a); });
  return run(1, ctas, LINEAR_THREADS, 1, sizeof(LinearShared<Fp8, LINEAR_STAGES>) + k * 16, seed, bug, report, [&](int) { linear_body<Fp8, LINEAR_STAGES>(a); });
}
