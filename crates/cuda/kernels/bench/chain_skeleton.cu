// The dependency chain of one decode step, without the arithmetic: which schedule keeps the memory busy?
//
// Real bytes and real waits of rank 0 of 8 of MiMo-V2.5-Pro at T = 8 rows, 70 layers, on one GPU. Against the first
// skeleton (counter, barrier and bulk fetch between phases: 59 to 60 us a layer) this one differs in four ways:
//   1. data says itself when it is ready: 16-byte words, 12 bytes of payload and a tag that is the epoch, written and
//      read by one b128 access. No counters, no barrier over the grid, nothing to clear;
//   2. K is split over a cluster (default 4 CTAs): a CTA fetches a quarter of the activations, and the four partial
//      sums meet in shared memory by st.async, which carries its own completion;
//   3. sliding attention runs redundantly in every cluster: the cluster's quarter of the heads is exactly the quarter of
//      o_proj's K which that CTA multiplies, so the attention result never leaves the SM. K/V come through the ring;
//   4. only the loader's expert pages wait for the router; everything else is requested as early as the ring allows.
// The peers' part of every all-reduce is looped back; `ns_hop` stands for the link and is a parameter of each row.
#include <cuda_runtime.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>
#define CK(x) do { cudaError_t e = (x); if (e != cudaSuccess) { printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e)); exit(1); } } while (0)
#define DEV __device__ __forceinline__

constexpr int PAGE = 16384, WARPS = 8, THREADS = WARPS * 32, RANKS = 8;
constexpr long long SPIN_CYCLES_MAX = 400000000;  // 0.2 s, then trap

struct Plan {
  int layers, steps, ctas;
  int qkv, kv, o, router, gate_up, down;                       // pages of one CTA and layer
  int ns_hop, ns_norm, ns_attn, ns_router, ns_topk;            // what the arithmetic and the link would add
  int attn_hop, reduce, wait;                                      // 1: attention is its own phase; 0: no cluster sums; 0: no waits at all
  int window;                                                  // pages a loader keeps in flight; 0: as many as the ring holds
  int early, quiet, soft;                                            // early: pages taken into registers while their activations are awaited; quiet: skip all communication; soft: groups
                                                               // without a hardware cluster: partial sums through L2, so that all 132 SMs stream
};
enum Mark { AR0, X0, QKV, RED0, Q, ATTN, O, RED1, AR1, X1, ROUTER, LOGITS, FIRST, GATE_UP, H, DOWN, MARKS };

DEV uint32_t su(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
DEV void mbar_init(uint64_t* b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(su(b)), "r"(n)); }
DEV void mbar_expect(uint64_t* b, uint32_t n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(su(b)), "r"(n) : "memory"); }
DEV void mbar_arrive(uint64_t* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(su(b)) : "memory"); }
DEV void mbar_wait(uint64_t* b, uint32_t phase) {
  uint32_t done = 0; long long t0 = clock64();
  while (true) {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0,1,0,p;}" : "=r"(done) : "r"(su(b)), "r"(phase) : "memory");
    if (done) return;
    if (clock64() - t0 > SPIN_CYCLES_MAX) __trap();
  }
}
DEV bool mbar_test(uint64_t* b, uint32_t phase) { uint32_t done; asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0,1,0,p;}" : "=r"(done) : "r"(su(b)), "r"(phase) : "memory"); return done; }
DEV void bulk(void* d, const void* s, uint32_t n, uint64_t* b, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(su(d)), "l"(s), "r"(n), "r"(su(b)), "l"(policy) : "memory");
}
DEV void pause_ns(int ns) { if (ns <= 0) return; long long c0 = clock64(); long long n = (long long)(ns * 1.9); while (clock64() - c0 < n); }
struct alignas(16) Word { uint32_t v[3]; uint32_t tag; };
DEV void put(Word* p, uint32_t a, uint32_t b, uint32_t c, uint32_t tag) {
  uint64_t lo = a | ((uint64_t)b << 32), hi = c | ((uint64_t)tag << 32);
  asm volatile("{.reg .b128 t; mov.b128 t, {%1,%2}; st.relaxed.sys.global.b128 [%0], t;}" ::"l"(p), "l"(lo), "l"(hi) : "memory");
}
DEV bool get(const Word* p, uint32_t tag, uint32_t* v) {
  uint64_t lo, hi;
  asm volatile("{.reg .b128 t; ld.relaxed.sys.global.b128 t, [%2]; mov.b128 {%0,%1}, t;}" : "=l"(lo), "=l"(hi) : "l"(p) : "memory");
  v[0] = (uint32_t)lo; v[1] = (uint32_t)(lo >> 32); v[2] = (uint32_t)hi; return (uint32_t)(hi >> 32) == tag;
}
DEV void get_wait(const Word* p, uint32_t tag, uint32_t* v) { long long t0 = clock64(); while (!get(p, tag, v)) if (clock64() - t0 > SPIN_CYCLES_MAX) __trap(); }
// n words into shared memory. A thread asks for U words at once; while any is missing it polls one, so that waiting costs L2 little
template <int U> DEV void collect(const Word* p, int n, uint32_t tag, char* sink, bool wait) {
  if (!wait) return;
  for (int i0 = threadIdx.x; i0 < n; i0 += THREADS * U) {
    uint32_t v[U][3], missing;
    while (true) {
      missing = 0;
      #pragma unroll
      for (int j = 0; j < U; j++) if (!get(p + min(i0 + j * THREADS, n - 1), tag, v[j])) missing |= 1u << j;
      if (!missing) break;
      uint32_t skip[3]; get_wait(p + min(i0 + (__ffs(missing) - 1) * THREADS, n - 1), tag, skip);
    }
    #pragma unroll
    for (int j = 0; j < U; j++) if (i0 + j * THREADS < n) { uint32_t* d = (uint32_t*)(sink + (i0 + j * THREADS) * 12); d[0] = v[j][0]; d[1] = v[j][1]; d[2] = v[j][2]; }
  }
}
DEV void sync_consumers() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

struct Buffers { const char* w; size_t wpages; const char* kv; Word *sums, *x, *aux, *q, *att, *logits, *h, *ar; uint32_t* out; long long* prof; };

template <int CS, int ST> struct Smem {  // CS: CTAs that share K; a hardware cluster unless P.soft
  uint64_t full[ST], empty[ST], go, red[2]; long long prof[MARKS]; alignas(16) char recv[2][CS][1536]; };

template <int CS, int ST> struct Cta {
  static_assert(ST % 2 == 0, "a stage belongs to one warpgroup: with an odd count a group would skip a phase of its barrier and mistake the one before it");
  Plan P; Buffers B; Smem<CS, ST>* s; char* ring; char* acts; int slot = 0; uint32_t phase; int rank; uint32_t acc = 0, reds = 0, count = 0, stamp; long long last;
  DEV void mark(int m) { if (threadIdx.x == 0) { long long t = clock64(); s->prof[m] += t - last; last = t; } }
  // The two warpgroups take alternate pages. `next` is the stage at the front of the ring, seen by this warp.
  DEV void next() { count++; if (++slot == ST) { slot = 0; phase ^= 1; } }
  DEV void eat(int n) {
    for (int k = 0; k < n; k++, next()) {
      if ((count & 1) != (threadIdx.x >> 7)) continue;
      mbar_wait(&s->full[slot], phase); const uint4* v = (const uint4*)(ring + slot * PAGE) + threadIdx.x % 128; uint4 x[8];
      #pragma unroll
      for (int i = 0; i < 8; i++) x[i] = v[i * 128];
      #pragma unroll
      for (int i = 0; i < 8; i++) acc ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
      __syncwarp(); if (threadIdx.x % 32 == 0) mbar_arrive(&s->empty[slot]);
    }
  }
  // While `p` is not there yet, take up to `n` pages of the phase that waits for it (in the engine: into the registers that feed wgmma). Returns those left.
  DEV int eat_early(const Word* p, uint32_t tag, int n) {
    if (!P.wait || !P.early) return n;
    long long t0 = clock64(); uint32_t v[3];
    while (!__all_sync(~0u, get(p, tag, v))) {
      if (clock64() - t0 > SPIN_CYCLES_MAX) __trap();
      if (!n) continue;
      if ((count & 1) != (threadIdx.x >> 7)) { next(); n--; } else if (mbar_test(&s->full[slot], phase)) { eat(1); n--; }
    }
    return n;
  }
  // `chunks` of 16 bytes to every other CTA of the cluster; waits for theirs
  DEV void cluster_sum(int chunks) {
    if (CS == 1 || !P.reduce) { sync_consumers(); return; }
    if (P.soft) {
      const int words = (chunks * 4 + 2) / 3, group = blockIdx.x / CS; Word* box = B.sums + (size_t)((reds % 4) * P.ctas + group * CS) * CS * 128; const uint32_t tag = stamp + reds + 1;  // box[to][from][128]
      for (int i = threadIdx.x; i < (CS - 1) * words; i += THREADS) { int d = i / words; d += d >= rank; put(box + (d * CS + rank) * 128 + i % words, acc, 0, 0, tag); }
      if (P.wait) for (int i = threadIdx.x; i < (CS - 1) * words; i += THREADS) { int f = i / words; f += f >= rank; uint32_t v[3]; get_wait(box + (rank * CS + f) * 128 + i % words, tag, v); acc += v[0]; }
      reds++; sync_consumers(); return;
    }
    const int par = reds & 1; if (threadIdx.x == 0) mbar_expect(&s->red[par], (CS - 1) * chunks * 16);
    for (int i = threadIdx.x; i < (CS - 1) * chunks; i += THREADS) {
      int d = i / chunks; d += d >= rank; uint32_t to, bar;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(su(&s->recv[par][rank][(i % chunks) * 16])), "r"(d));
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(bar) : "r"(su(&s->red[par])), "r"(d));
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%1,%1,%1}, [%2];" ::"r"(to), "r"(acc), "r"(bar) : "memory");
    }
    mbar_wait(&s->red[par], (reds >> 1) & 1); for (int r = 0; r < CS; r++) if (threadIdx.x < chunks) acc += *(uint32_t*)&s->recv[par][r][threadIdx.x * 16]; reds++;
  }
  // this CTA's 48 rows x 8 tokens of f32 to every rank; collect theirs; publish the new bf16 rows and their sums of squares
  DEV void all_reduce(uint32_t tag, int which) {
    Word* a = B.ar + (size_t)(which * 2 + (tag & 1)) * RANKS * P.ctas * 128 + blockIdx.x * 128; Word* x = B.x + (size_t)(which * 2 + (tag & 1)) * P.ctas * 64; Word* aux = B.aux + (size_t)(which * 2 + (tag & 1)) * P.ctas * 6;
    if (threadIdx.x < 128) {
      #pragma unroll
      for (int r = 0; r < RANKS; r++) put(a + (size_t)r * P.ctas * 128 + threadIdx.x, acc, r, 0, tag);
      pause_ns(P.ns_hop); uint32_t v[RANKS][3]; bool ok[RANKS];
      #pragma unroll
      for (int r = 0; r < RANKS; r++) ok[r] = get(a + (size_t)r * P.ctas * 128 + threadIdx.x, tag, v[r]);
      #pragma unroll
      for (int r = 0; r < RANKS; r++) if (!ok[r] && P.wait) get_wait(a + (size_t)r * P.ctas * 128 + threadIdx.x, tag, v[r]);
      #pragma unroll
      for (int r = 0; r < RANKS; r++) acc += v[r][0] + v[r][1];
      uint32_t m = acc; for (int i = 16; i; i >>= 1) m += __shfl_xor_sync(~0u, m, i);  // sum of squares of a token over the CTA's rows
      asm volatile("bar.sync 2, 128;" ::: "memory");
      if (threadIdx.x < 64) put(x + blockIdx.x * 64 + threadIdx.x, acc, m, 0, tag); else if (threadIdx.x < 70) put(aux + blockIdx.x * 6 + threadIdx.x - 64, m, 0, 0, tag);
    }
    mark(which ? AR1 : AR0);
  }
  DEV int fetch_x(uint32_t tag, int which, int pages) {
    const int own = P.ctas / CS; const size_t o = (size_t)(which * 2 + (tag & 1)) * P.ctas; const int n = eat_early(B.x + (o + rank * own) * 64 + threadIdx.x, tag, pages);
    collect<8>(B.x + (o + rank * own) * 64, own * 64, tag, acts, P.wait); collect<3>(B.aux + o * 6, P.ctas * 6, tag, acts + own * 768, P.wait);
    sync_consumers(); pause_ns(P.ns_norm); asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); sync_consumers(); mark(which ? X1 : X0); return n;
  }
  DEV void consume(uint32_t tag0) {
    for (int it = 0; it < P.steps; it++) for (int l = 0; l < P.layers; l++) {
      const uint32_t tag = tag0 + it * P.layers + l + 1; const size_t par = tag & 1;
      if (P.quiet) { eat(P.qkv + P.kv + P.o + P.router + P.gate_up + P.down); continue; }
      all_reduce(tag, 0); eat(fetch_x(tag, 0, P.qkv)); mark(QKV); cluster_sum(54); if (threadIdx.x < 36) put(B.q + (par * P.ctas + blockIdx.x) * 36 + threadIdx.x, acc, 0, 0, tag); mark(RED0);
      if (!P.attn_hop) {  // a quarter of the heads for every cluster, K/V from the ring
        const int own = P.ctas / CS; collect<5>(B.q + (par * P.ctas + rank * own) * 36, own * 36, tag, acts, P.wait); collect<2>(B.q + (par * P.ctas) * 36, 11 * 36, tag, acts + own * 36 * 12, P.wait); sync_consumers(); mark(Q);
        eat(P.kv); pause_ns(P.ns_attn); sync_consumers(); mark(ATTN);
      }
      int left_o = P.o; if (P.attn_hop) {
        if (blockIdx.x < 64) { collect<4>(B.q + par * P.ctas * 36 + (blockIdx.x / 8) * 12 * 36, 24 * 36, tag, acts, P.wait); sync_consumers(); mark(Q); pause_ns(P.ns_attn); if (threadIdx.x < 43) put(B.att + (par * 64 + blockIdx.x) * 43 + threadIdx.x, acc, 0, 0, tag); }
        left_o = eat_early(B.att + par * 64 * 43 + rank * (64 / CS) * 43 + threadIdx.x, tag, left_o);
        collect<3>(B.att + par * 64 * 43 + rank * (64 / CS) * 43, 64 / CS * 43, tag, acts, P.wait); sync_consumers(); mark(ATTN);
      }
      eat(left_o); mark(O); cluster_sum(96); mark(RED1); all_reduce(tag, 1);
      eat(fetch_x(tag, 1, P.router)); pause_ns(P.ns_router); cluster_sum(6); if (threadIdx.x < 8) put(B.logits + (par * P.ctas + blockIdx.x) * 8 + threadIdx.x, acc, 0, 0, tag); mark(ROUTER);
      collect<5>(B.logits + par * P.ctas * 8, P.ctas * 8, tag, acts + P.ctas / CS * 768, P.wait); sync_consumers(); pause_ns(P.ns_topk); if (threadIdx.x == 0) mbar_arrive(&s->go); mark(LOGITS);
      eat(1); mark(FIRST); int left = P.gate_up - 1; while (left > 0) { int n = min(left, 12); eat(n); left -= n; cluster_sum(32); }
      if (threadIdx.x < 24) put(B.h + (par * P.ctas + blockIdx.x) * 24 + threadIdx.x, acc, 0, 0, tag); mark(GATE_UP);
      const int own = P.ctas / CS; collect<3>(B.h + (par * P.ctas + rank * own) * 24, own * 24, tag, acts, P.wait); sync_consumers(); mark(H);
      eat(P.down); cluster_sum(96); mark(DOWN);
    }
  }
  DEV void load(uint32_t) {
    const uint64_t stream = 0x12F0000000000000ull, keep = 0x14F0000000000000ull; uint32_t go = 0;
    for (int it = 0; it < P.steps; it++) for (int l = 0; l < P.layers; l++) {
      const size_t fixed = ((size_t)l * 977 * 40503u) % (B.wpages - 200000);
      const size_t moved = ((size_t)(it * 7919 + l * 104729 + 1299709) * 2654435761ull) % (B.wpages - 200000);
      int done = 0;
      auto pages = [&](size_t base, int n) { for (int k = 0; k < n; k++) fetch(B.w + (base + (size_t)k * P.ctas + blockIdx.x) * PAGE, stream); done += n; };
      pages(fixed, P.qkv);
      for (int k = 0; k < P.kv; k++) fetch(B.kv + ((size_t)l * 64 + k) * PAGE, keep);
      pages(fixed + (size_t)done * P.ctas, P.o); pages(fixed + (size_t)done * P.ctas, P.router);
      if (P.wait && !P.quiet) { mbar_wait(&s->go, go); go ^= 1; }
      pages(moved, P.gate_up); pages(moved + (size_t)P.gate_up * P.ctas, P.down);
    }
  }
  uint32_t issued = 0;
  DEV void fetch(const char* p, uint64_t policy) {
    if (P.window && issued >= (uint32_t)P.window) { const int b = slot - P.window; mbar_wait(&s->full[b < 0 ? b + ST : b], b < 0 ? phase ^ 1 : phase); }
    issued++; mbar_wait(&s->empty[slot], phase ^ 1); mbar_expect(&s->full[slot], PAGE); bulk(ring + slot * PAGE, p, PAGE, &s->full[slot], policy); if (++slot == ST) { slot = 0; phase ^= 1; }
  }
};

template <int CS, int ST> __global__ void __launch_bounds__(THREADS + 32, 1) skeleton(Plan P, Buffers B, uint32_t tag0) {
  extern __shared__ __align__(128) char sm[]; __shared__ Smem<CS, ST> s;
  if (threadIdx.x == 0) { for (int i = 0; i < ST; i++) { mbar_init(&s.full[i], 1); mbar_init(&s.empty[i], WARPS / 2); } mbar_init(&s.go, 1); mbar_init(&s.red[0], 1); mbar_init(&s.red[1], 1); asm volatile("fence.mbarrier_init.release.cluster;"); }
  if (threadIdx.x < MARKS) s.prof[threadIdx.x] = 0;
  __syncthreads(); if (CS > 1 && !P.soft) { asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory"); }
  Cta<CS, ST> c; c.P = P; c.B = B; c.s = &s; c.ring = sm; c.acts = sm + ST * PAGE; c.rank = blockIdx.x % CS; c.phase = 0; c.stamp = tag0 * 16; c.last = clock64();
  if (threadIdx.x >= THREADS) { if (threadIdx.x == THREADS) c.load(tag0); } else { c.consume(tag0); if (c.acc == 0x1234567) *B.out = c.acc; if (threadIdx.x == 0) for (int m = 0; m < MARKS; m++) B.prof[blockIdx.x * MARKS + m] = s.prof[m]; }
  if (CS > 1 && !P.soft) { __syncwarp(); asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory"); }
}

static const char* const NAMES[MARKS] = {"all-reduce", "fetch x", "qkv", "sum+publish", "fetch q", "attention", "o_proj", "sum", "all-reduce 2", "fetch x 2", "router", "logits+top-k", "first page", "gate/up", "fetch h", "down+sum"};
static FILE* csv; static double limit = 4.70e12;

template <int CS, int ST> double run(const char* name, Plan P, Buffers B, bool split = false) {
  const int smem = ST * PAGE + P.ctas / CS * 768 + P.ctas * 96;
  if (smem + (int)sizeof(Smem<CS, ST>) > 232448) { printf("%-64s too much shared memory\n", name); return 0; }
  auto k = skeleton<CS, ST>; CK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, smem)); if (CS > 8) CK(cudaFuncSetAttribute(k, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchConfig_t L = {}; cudaLaunchAttribute at[1]; at[0].id = cudaLaunchAttributeClusterDimension; at[0].val.clusterDim.x = P.soft ? 1 : CS; at[0].val.clusterDim.y = at[0].val.clusterDim.z = 1;
  L.blockDim = THREADS + 32; L.dynamicSmemBytes = smem; L.attrs = at; L.numAttrs = 1; L.gridDim = P.soft ? 1 : CS; int fit = 0; CK(cudaOccupancyMaxActiveClusters(&fit, k, &L));
  if (fit * (P.soft ? 1 : CS) < P.ctas) { printf("%-64s %d CTAs do not fit: %d clusters of %d\n", name, P.ctas, fit, CS); return 0; }
  L.gridDim = P.ctas; double bytes = (double)(P.qkv + P.o + P.router + P.gate_up + P.down) * P.ctas * PAGE * P.layers; cudaEvent_t e0, e1; cudaEventCreate(&e0); cudaEventCreate(&e1); std::vector<float> v;
  static uint32_t tag0 = 0;
  for (int i = 0; i < 5; i++) { cudaEventRecord(e0); CK(cudaLaunchKernelEx(&L, k, P, B, tag0)); tag0 += P.steps * P.layers; cudaEventRecord(e1); CK(cudaDeviceSynchronize()); float ms; cudaEventElapsedTime(&ms, e0, e1); v.push_back(ms / P.steps); }
  std::sort(v.begin(), v.end()); const double ms = v[2], us = ms * 1e3 / P.layers, share = bytes / (ms * 1e-3) / limit;
  printf("%-64s CTAs %3d cluster %d ring %3d KiB  %.3f ms/step %.2f us/layer %5.1f %%\n", name, P.ctas, CS, ST * 16, ms, us, share * 100);
  if (csv) fprintf(csv, "\"%s\",%d,%d,%d,%.4f,%.3f,%.4f,%.0f\n", name, P.ctas, CS, ST * 16, ms, us, share, bytes);
  if (split) { std::vector<long long> h(P.ctas * MARKS); CK(cudaMemcpy(h.data(), B.prof, h.size() * 8, cudaMemcpyDeviceToHost)); double tot = 0; for (int m = 0; m < MARKS; m++) for (int c = 0; c < P.ctas; c++) tot += h[c * MARKS + m];
    printf("    us/layer:"); for (int m = 0; m < MARKS; m++) { double a = 0; for (int c = 0; c < P.ctas; c++) a += h[c * MARKS + m]; printf(" %s %.2f;", NAMES[m], a / tot * us); } printf("\n"); }
  return ms;
}

int main(int argc, char** argv) {
  setvbuf(stdout, 0, _IONBF, 0); if (argc > 1) { csv = fopen(argv[1], "w"); fprintf(csv, "variant,ctas,cluster,ring_kib,ms_step,us_layer,share_of_limit,bytes_step\n"); }
  const size_t N = 64ull << 30; char* w; CK(cudaMalloc(&w, N));
  { std::vector<uint32_t> h(16 << 20); uint64_t s = 88172645463325252ull; for (auto& x : h) { s ^= s << 13; s ^= s >> 7; s ^= s << 17; x = (uint32_t)s; } CK(cudaMemcpy(w, h.data(), 64 << 20, cudaMemcpyHostToDevice)); for (size_t o = 64 << 20; o < N; o += 64 << 20) CK(cudaMemcpy(w + o, w, 64 << 20, cudaMemcpyDeviceToDevice)); }
  Buffers B = {}; B.w = w; B.wpages = N / PAGE; auto words = [&](size_t n) { Word* p; CK(cudaMalloc(&p, n * 16)); CK(cudaMemset(p, 0, n * 16)); return p; };
  char* kv; CK(cudaMalloc(&kv, (size_t)70 * 64 * PAGE)); CK(cudaMemcpy(kv, w, (size_t)70 * 64 * PAGE, cudaMemcpyDeviceToDevice)); B.kv = kv;
  B.sums = words((size_t)4 * 132 * 4 * 128); B.x = words(4 * 132 * 64); B.aux = words(4 * 132 * 6); B.q = words(2 * 132 * 36); B.att = words(2 * 64 * 43); B.logits = words(2 * 132 * 8); B.h = words(2 * 132 * 24); B.ar = words((size_t)4 * 8 * 132 * 128); CK(cudaMalloc(&B.out, 4)); CK(cudaMalloc(&B.prof, 132 * MARKS * 8));
  // 20.8 MB qkv, 12.6 MB o_proj (FP8), 4.7 MB router, 99.4 MB gate/up, 49.7 MB down; K/V of 137 keys in BF16: 88 KB
  auto plan = [](int ctas) { auto p = [&](double mb) { return (int)(mb * 1e6 / PAGE / ctas + 0.5); }; return Plan{70, 12, ctas, p(20.8), 0, p(12.6), p(4.7), p(99.4), p(49.7), 1200, 300, 1000, 0, 600, 1, 1, 1, 0}; };
  auto go4 = [&](const char* name, Plan p, bool split = false) { run<4, 10>(name, p, B, split); };
  auto go2 = [&](const char* name, Plan p, bool split = false) { run<2, 8>(name, p, B, split); };
  auto free_run = [](Plan p) { p.wait = p.reduce = p.attn_hop = 0; p.ns_hop = p.ns_norm = p.ns_attn = p.ns_topk = 0; return p; };
  Plan a4 = plan(120), a2 = plan(132);
  Plan s4 = plan(132); s4.soft = 1;
  { Plan p = free_run(s4); p.quiet = 1; go4("stream, groups of 4 without a cluster", p); p.window = 4; go4("stream, groups of 4, 4 pages in flight", p); }
  Plan c4 = a4; c4.attn_hop = 0; c4.kv = 3; Plan sc4 = s4; sc4.attn_hop = 0; sc4.kv = 3;
  auto fast = [](Plan p) { p.ns_hop = 700; p.ns_attn = 500; p.ns_topk = 400; p.ns_norm = 150; return p; };
  auto still = [](Plan p) { p.ns_hop = p.ns_attn = p.ns_topk = p.ns_norm = 0; return p; };
  const Plan kinds[] = {a4, c4, s4, sc4}; const char* const names[] = {"A own phase", "C in each cluster", "A own phase, soft groups", "C soft groups"};
  for (int w : {2, 3, 4}) for (int kind = 0; kind < 4; kind++) { Plan p = kinds[kind]; p.early = 1; p.window = w; char n[96];
    sprintf(n, "%s, in flight %d", names[kind], w); go4(n, p); sprintf(n, "%s, fast chain, in flight %d", names[kind], w); go4(n, fast(p), w == 3 && kind >= 2);
    sprintf(n, "%s, communication only, in flight %d", names[kind], w); go4(n, still(p), w == 3 && kind >= 2); }
  return 0;
}
