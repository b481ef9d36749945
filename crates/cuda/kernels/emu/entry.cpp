// What the tests call: each function runs one kernel body on the emulated machine and says how it ended.
#define EMU_MAIN
#include "all_reduce.cuh"
#include "ops.cuh"
#include "resident_linear.cuh"

static const size_t REPORT_BYTES = 1024;

void known_body(const void* args);

static bool run(int ranks, int ctas, int threads, size_t smem, uint64_t seed, int bug, char* report, std::function<void(int)> body) {
  emu::planted = (emu::Bug)(bug & 0xffff); emu::one_term = bug >> 16 & 1; emu::kv_fp8 = bug >> 17 & 1; emu::wide = bug >> 19 & 1; emu::kv_wide = bug >> 20 & 1;
  const std::string end = emu::launch(ranks, ctas, threads, smem, seed, body);
  emu::planted = emu::NONE; emu::one_term = emu::kv_fp8 = emu::wide = emu::kv_wide = false;
  snprintf(report, REPORT_BYTES, "%s", end.c_str());
  return end.empty();
}

extern "C" bool emu_ops(const OpArgs* a, uint64_t seed, char* report) { return run(1, 1, OPS_THREADS, sizeof(OpsShared), seed, 0, report, [&](int) { ops_body(*a); }); }

// Sums `in` [ranks][words * 3] over ranks, `epochs` times with in * epoch; out: [ranks][words * 3] of the last. `inbox`: [ranks][2][ranks][words].
extern "C" bool emu_all_reduce(int ranks, int words, int epochs, uint64_t seed, int bug, const float* in, float* out, dev::Word* inbox, char* report) {
  return run(ranks, 2, 32, 0, seed, bug, report, [&](int rank) {
    dev::Word* of[RANKS_MAX];
    Inboxes b; b.ranks = ranks; b.rank = rank; b.words = words; b.of = of;
    for (int i = 0; i < ranks; i++) of[i] = inbox + (size_t)i * 2 * ranks * words;
    for (int e = 1; e <= epochs; e++) for (int w = dev::cta() * 32 + dev::tid(); w < words; w += dev::ctas() * 32) {
      float v[3], sum[3];
      for (int i = 0; i < 3; i++) v[i] = in[((size_t)rank * words + w) * 3 + i] * (float)e;
      all_reduce_push(b, e, w, v); all_reduce_collect(b, e, w, sum);
      for (int i = 0; i < 3; i++) out[((size_t)rank * words + w) * 3 + i] = sum[i];
    }
  });
}

// `args`: one for each rank. `host(context)` is called now and then while the kernel waits for the host.
extern "C" bool emu_resident(int ranks, int ctas, uint64_t seed, int bug, const StepArgs* args, void (*host)(void*), void* context, char* report) {
  emu::host = [=] { host(context); };
  const bool known = bug >> 18 & 1;
  const bool ok = run(ranks, ctas, RESIDENT_THREADS, RESIDENT_HEADER_BYTES + args->x_bytes, seed, bug, report, [&](int rank) { if (known) known_body(args + rank); else resident_body(args[rank]); });
  emu::host = nullptr;
  return ok;
}
