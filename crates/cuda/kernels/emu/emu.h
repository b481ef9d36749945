// The device layer on a CPU: runs the real kernel sources in `cargo test`.
//
// Every CUDA thread of every CTA of every rank is a fiber with its own stack. One host thread runs them in an order drawn
// from a seed. Bulk copies land late and in any order; until then their target is poison. Waits are
// checked: an mbarrier that gets too many arrivals, a wait for a fill that has been overtaken, a misaligned copy and a
// deadlock each end the run with a report of rank, CTA and thread. Refused: more than one launch at a time.
// Limits: memory is sequentially consistent (a missing fence passes here), and time does not exist.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#define DEV inline
#define DEV_CALL inline
#define KERNEL static
#define ROLLED
#define UNROLL
#define UNROLL_BY(n)
#define __launch_bounds__(...)
#define PLANTED(bug) (emu::planted == emu::bug)
#define ONE_TERM (emu::one_term)
#define KV_FP8 (emu::kv_fp8)
#define WIDE (emu::wide)
#define KV_WIDE (emu::kv_wide)

namespace emu {
enum Bug { NONE, NO_SLOT_WAIT, NO_ARRIVE, WRONG_EPOCH, STALE_WORD, NO_SIGNAL, ONE_TOO_FEW, STEP_BEFORE, NO_STAGE_WAIT, NO_LIST_WAIT, NO_BATON, BUGS };
inline Bug planted = NONE; inline bool one_term = false, kv_fp8 = false, wide = false, kv_wide = false;
struct Fiber { void* sp = nullptr; int rank = 0, cta = 0, tid = 0; bool done = false, blocked = false; const char* why = "start"; const void* on = nullptr; uint64_t wanted = 0, since = 0; std::vector<std::pair<void*, const void*>> copies; };
struct Warp { int here = 0; uint64_t round = 0; uint32_t v[32] = {}; uint32_t a[32][4] = {}, b[32][2] = {}; };
struct Named { int here = 0; uint64_t round = 0; };
struct Block { std::vector<uint8_t> smem; std::vector<Warp> warps; Named bars[16]; };
struct Mbar { uint64_t fills : 20, init : 10, pending : 10; int64_t tx : 24; };
static_assert(sizeof(Mbar) == 8, "an mbarrier is 8 bytes");
struct Late { uint8_t* to; const uint8_t* from; uint32_t size; uint64_t* barrier; };
struct World {
  std::vector<Fiber> fibers; std::vector<int> ready; std::unordered_map<const void*, std::vector<int>> waiting; std::vector<Block> blocks; std::vector<Late> late;
  Fiber* now = nullptr; void* main_sp = nullptr; uint64_t rng = 1, waits = 0; int ctas = 0, threads = 0; bool failed = false; std::string report;
};
inline World W;
inline std::function<void(int)> body;
inline std::function<void()> host;  // what the host does now and then while a launch runs

inline uint64_t draw() { auto& x = W.rng; x ^= x << 13; x ^= x >> 7; x ^= x << 17; return x; }
inline Block& block() { return W.blocks[(size_t)W.now->rank * W.ctas + W.now->cta]; }

extern "C" void emu_switch(void** save, void* to);
#ifdef EMU_MAIN
asm(R"(
.text
.globl emu_switch
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#endif

inline void leave() { emu_switch(&W.now->sp, W.main_sp); }
// The run is over: the scheduler drops all fibers.
inline void fail(const char* format, ...) {
  char text[256]; va_list args; va_start(args, format); vsnprintf(text, sizeof text, format, args); va_end(args);
  if (!W.failed) { char where[96] = ""; if (W.now) snprintf(where, sizeof where, " (rank %d, CTA %d, thread %d)", W.now->rank, W.now->cta, W.now->tid); W.report = std::string(text) + where; }
  W.failed = true; if (W.now) { leave(); abort(); }
}
inline void yield(const char* why, const void* on) { W.now->why = why; W.now->on = on; leave(); }
// Whoever waits is asked again only when somebody has touched `on`: every change that a wait may be for says wake(its address).
template <class F> inline void wait_until(const char* why, const void* on, F f, uint64_t wanted = 0) {
  W.now->wanted = wanted; W.now->since = ++W.waits;
  while (!f()) { W.now->blocked = true; W.waiting[on].push_back((int)(W.now - W.fibers.data())); yield(why, on); }
}
inline void wake(const void* on) {
  auto found = W.waiting.find(on); if (found == W.waiting.end()) return;
  for (int i : found->second) { W.fibers[i].blocked = false; W.ready.push_back(i); }
  W.waiting.erase(found);
}
inline void settle(Mbar* m) { if (m->pending == 0 && m->tx == 0) { m->fills = m->fills + 1; m->pending = m->init; wake(m); } }
inline void entry() { body(W.now->rank); W.now->done = true; leave(); abort(); }

inline void land(size_t i) {
  const Late l = W.late[i]; W.late[i] = W.late.back(); W.late.pop_back();
  memcpy(l.to, l.from, l.size); Mbar* m = (Mbar*)l.barrier; m->tx = m->tx - (int64_t)l.size; settle(m);
}
}  // namespace emu
namespace dev {
struct Place { int instruction, step, loader, loader_step; };
struct Fault { uint32_t set, what, cta, thread, instruction, step; uint64_t wanted, seen, at; };
struct FaultRecords { Fault* of[64] = {}; void operator=(Fault* f) { of[emu::W.now->rank] = f; } };  // a rank's own, as on GPUs
inline FaultRecords fault_record;
void give_up();
}  // namespace dev
namespace emu {
// Who waits: the first thread of each kind of wait.
inline void deadlock() {
  size_t left = 0; std::string where; char line[160];
  for (auto& f : W.fibers) {
    if (f.done) continue;
    left++;
    if (where.find(std::string("waits in ") + f.why + "]") != std::string::npos) continue;
    snprintf(line, sizeof line, " [rank %d CTA %d thread %d waits in %s]", f.rank, f.cta, f.tid, f.why); where += line;
  }
  snprintf(line, sizeof line, "deadlock with %zu threads left:", left); W.report = line + where; W.failed = true;
}
// Runs `k(rank)` on ranks x ctas x threads. Empty string: every thread returned. Otherwise what went wrong.
inline std::string launch(int ranks, int ctas, int threads, size_t smem, uint64_t seed, std::function<void(int)> k) {
  W = World(); W.rng = seed * 0x9E3779B97F4A7C15ull | 1; W.ctas = ctas; W.threads = threads; body = k;
  const int count = ranks * ctas * threads; const size_t STACK = 65536;
  W.blocks.resize((size_t)ranks * ctas); for (auto& b : W.blocks) { b.smem.assign(smem + 1024, 0xCD); b.warps.resize((threads + 31) / 32); }
  W.fibers.resize(count); W.ready.resize(count);
  std::unique_ptr<uint8_t, decltype(&free)> stacks((uint8_t*)calloc(count, STACK), &free);  // pages that no fiber reaches cost nothing
  for (int i = 0; i < count; i++) {
    auto& f = W.fibers[i]; f.rank = i / (ctas * threads); f.cta = i / threads % ctas; f.tid = i % threads; W.ready[i] = i;
    void** s = (void**)((uintptr_t)(stacks.get() + (size_t)(i + 1) * STACK) & ~(uintptr_t)63); *--s = nullptr; *--s = (void*)entry; for (int j = 0; j < 6; j++) *--s = nullptr; f.sp = s;
  }
  while (!W.failed) {
    if (!W.late.empty() && (W.ready.empty() || draw() % 8 == 0)) { land(draw() % W.late.size()); continue; }
    if (W.ready.empty()) break;
    const size_t j = draw() % W.ready.size(); const int i = W.ready[j];
    W.now = &W.fibers[i]; W.now->blocked = false;
    emu_switch(&W.main_sp, W.now->sp);
    if (W.now->done || W.now->blocked) { W.ready[j] = W.ready.back(); W.ready.pop_back(); }
    W.now = nullptr;
  }
  for (auto& f : W.fibers) if (!f.done && !W.failed) { deadlock(); dev::give_up(); }
  return W.failed ? W.report : "";
}
}  // namespace emu

namespace dev {
using emu::W;
DEV int tid() { return W.now->tid; }
DEV int again(const int& v) { return v; }
DEV int tid_anew() { return tid(); }
DEV int cta() { return W.now->cta; }
DEV int ctas() { return W.ctas; }
DEV int ctas_anew() { return ctas(); }
DEV uint8_t* smem() { return (uint8_t*)(((uintptr_t)emu::block().smem.data() + 1023) & ~(uintptr_t)1023); }
DEV long long cycles() { return 0; }
DEV void refuse() { emu::fail("the arguments are not those that the kernel was compiled for"); }

DEV void bar_sync(int id, int threads) {
  auto& b = emu::block().bars[id]; const uint64_t round = b.round;
  if (++b.here == threads) { b.here = 0; b.round++; emu::wake(&b); } else emu::wait_until("bar.sync", &b, [&b, round] { return b.round != round; });
}
DEV emu::Warp& warp() { return emu::block().warps[tid() / 32]; }
DEV void sync_warp() { auto& w = warp(); const uint64_t round = w.round; if (++w.here == 32) { w.here = 0; w.round++; emu::wake(&w); } else emu::wait_until("warp", &w, [&w, round] { return w.round != round; }); }

DEV void mbar_init(uint64_t* p, uint32_t n) { auto* m = (emu::Mbar*)p; m->fills = 0; m->init = n; m->pending = n; m->tx = 0; }
DEV void mbar_init_fence() {}
DEV void mbar_arrive(uint64_t* p) { auto* m = (emu::Mbar*)p; if (m->pending == 0) emu::fail("an mbarrier got more arrivals than it counts"); m->pending = m->pending - 1; emu::settle(m); if (emu::draw() % 4 == 0) emu::yield("arrive", p); }
DEV void mbar_expect(uint64_t* p, uint32_t n) { auto* m = (emu::Mbar*)p; m->tx = m->tx + (int64_t)n; mbar_arrive(p); }
// Fill `fill` has completed. The device sees one bit of the count: more than one fill past, and it would hang or run early.
DEV bool mbar_try(uint64_t* p, uint32_t fill) {
  const uint32_t fills = ((emu::Mbar*)p)->fills;
  if (fills > fill + 1) emu::fail("a wait for fill %u of an mbarrier came after fill %u", fill, fills - 1);
  if (fills + 1 < fill + 1 && ((fill - fills) & 1)) emu::fail("a wait for fill %u of an mbarrier would take fill %u for it", fill, fills - 1);
  return fills == fill + 1;
}
DEV void mbar_wait(uint64_t* b, uint32_t fill) { emu::wait_until("mbarrier", b, [b, fill] { return mbar_try(b, fill); }, fill); }

// Time does not exist here: in a deadlock the budget of whoever waits longest runs out.
inline void give_up() {
  const emu::Fiber* first = nullptr; uint32_t what = 0;
  auto after = [](const emu::Fiber& f) { return f.since + (f.tid >= W.threads - 128 ? 1ull << 62 : 0); };  // loaders last, as in dev.cuh
  for (auto& f : W.fibers) {
    const uint32_t kind = f.done ? 0 : !strcmp(f.why, "mbarrier") ? 1 : !strcmp(f.why, "word") ? 2 : !strcmp(f.why, "counter") ? 3 : 0;
    if (kind && (!first || after(f) < after(*first))) { first = &f; what = kind; }
  }
  Fault* record = first ? fault_record.of[first->rank] : nullptr;
  if (!record || record->set) return;
  W.now = const_cast<emu::Fiber*>(first);
  const Place* place = (const Place*)smem(); const bool loader = first->tid >= W.threads - 128; const uint8_t* on = (const uint8_t*)first->on;
  *record = {1, what, (uint32_t)first->cta, (uint32_t)first->tid, (uint32_t)(loader ? place->loader : place->instruction), (uint32_t)(loader ? place->loader_step : place->step), first->wanted, 0, what == 1 ? (uint64_t)(on - smem()) : (uint64_t)on};
  record->seen = what == 1 ? ((const emu::Mbar*)on)->fills : what == 2 ? ((const uint32_t*)on)[3] : *(const uint32_t*)on;
  W.now = nullptr;
}
static const char OR_STOP[] = "mbarrier";  // told apart by its address
DEV bool mbar_wait_or(uint64_t* b, uint32_t fill, const volatile int* stop) {
  emu::wait_until(OR_STOP, b, [b, fill, stop] { return mbar_try(b, fill) || *stop; }, fill);
  return mbar_try(b, fill);
}
DEV void say_stop(volatile int* stop) {
  *stop = 1;
  for (auto& f : W.fibers) if (f.blocked && f.why == OR_STOP && f.rank == W.now->rank && f.cta == W.now->cta) emu::wake(f.on);
}

DEV void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* b, bool) {
  if (((uintptr_t)to | (uintptr_t)from | bytes) & 15) emu::fail("a bulk copy of %u bytes is not aligned to 16", bytes);
  memset(to, 0xEE, bytes); W.late.push_back({(uint8_t*)to, (const uint8_t*)from, bytes, b});
}
DEV void aligned(const void* p, int bytes) { if ((uintptr_t)p % bytes) emu::fail("an access of %d bytes is not aligned", bytes); }
DEV void load16(const void* p, uint32_t* v) { aligned(p, 16); memcpy(v, p, 16); }
DEV void store16(void* p, const uint32_t* v) { aligned(p, 16); memcpy(p, v, 16); }
DEV void copy16(void* to, const void* from) {
  if (((uintptr_t)to | (uintptr_t)from) & 15) emu::fail("a copy of 16 bytes is not aligned");
  memset(to, 0xEE, 16); W.now->copies.push_back({to, from});
}
DEV void copies_wait() { for (auto& c : W.now->copies) memcpy(c.first, c.second, 16); W.now->copies.clear(); }

struct alignas(16) Word { uint32_t v[3]; uint32_t tag; };
DEV void put(Word* p, uint32_t a, uint32_t b, uint32_t c, uint32_t tag) { p->v[0] = a; p->v[1] = b; p->v[2] = c; p->tag = tag; emu::wake(p); if (emu::draw() % 4 == 0) emu::yield("put", p); }
DEV bool get(const Word* p, uint32_t tag, uint32_t* v) { for (int i = 0; i < 3; i++) v[i] = p->v[i]; return p->tag == tag; }
DEV void get_wait(const Word* p, uint32_t tag, uint32_t* v) { emu::wait_until("word", p, [p, tag] { return p->tag == tag; }, tag); get(p, tag, v); }

DEV uint64_t host_said(const void* p) { if (emu::host && emu::draw() % 2) emu::host(); return *(const volatile uint64_t*)p; }
DEV void host_room(const void* p, uint32_t end, uint32_t words) {
  for (int tries = 0; end - (uint32_t)*(const volatile uint64_t*)p > words; tries++) {
    if (tries == 1000) emu::fail("the host did not take tokens out of its ring");
    if (emu::host && emu::draw() % 4 == 0) emu::host();
    emu::yield("the host's ring", p);
  }
}

DEV void signal(uint32_t* counter) { ++*counter; emu::wake(counter); if (emu::draw() % 4 == 0) emu::yield("signal", counter); }
DEV uint32_t take(uint32_t* counter, uint32_t last) { const uint32_t old = *counter; *counter = old >= last ? 0 : old + 1; emu::wake(counter); if (emu::draw() % 4 == 0) emu::yield("take", counter); return old; }
DEV void await(const uint32_t* counter, uint32_t target) { emu::wait_until("counter", counter, [counter, target] { return (int)(*counter - target) >= 0; }, target); }
DEV void fence_proxy() {}
DEV void fence_proxy_shared() {}

DEV uint32_t exchange(uint32_t v, int from) { auto& w = warp(); w.v[tid() & 31] = v; sync_warp(); const uint32_t r = w.v[from]; sync_warp(); return r; }
DEV uint32_t shuffle_xor(uint32_t v, int mask) { return exchange(v, (tid() & 31) ^ mask); }
DEV uint32_t shuffle(uint32_t v, int from) { return exchange(v, from & 31); }
DEV float shuffle(float v, int from) { uint32_t u; memcpy(&u, &v, 4); u = exchange(u, from & 31); memcpy(&v, &u, 4); return v; }
DEV float shuffle_xor(float v, int mask) { uint32_t u; memcpy(&u, &v, 4); u = exchange(u, (tid() & 31) ^ mask); memcpy(&v, &u, 4); return v; }
template <class F> DEV uint32_t fold_warp(uint32_t v, F f) { auto& w = warp(); w.v[tid() & 31] = v; sync_warp(); uint32_t r = w.v[0]; for (int i = 1; i < 32; i++) r = f(r, w.v[i]); sync_warp(); return r; }
DEV uint32_t max_warp(uint32_t v) { return fold_warp(v, [](uint32_t a, uint32_t b) { return a > b ? a : b; }); }
DEV uint32_t min_warp(uint32_t v) { return fold_warp(v, [](uint32_t a, uint32_t b) { return a < b ? a : b; }); }
DEV uint32_t or_warp(uint32_t v) { return fold_warp(v, [](uint32_t a, uint32_t b) { return a | b; }); }
DEV uint32_t add_warp(uint32_t v) { return fold_warp(v, [](uint32_t a, uint32_t b) { return a + b; }); }
DEV void or_shared(uint32_t* p, uint32_t v) { *p |= v; }
DEV int count_bits(uint32_t v) { return __builtin_popcount(v); }

DEV uint32_t bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
DEV float number(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
DEV float exp_(float x) { return std::exp(x); }
DEV float exp_quick(float x) { return std::exp(x); }
DEV float sqrt_(float x) { return std::sqrt(x); }
DEV float reciprocal(float x) { return 1.0f / x; }
DEV float max_(float a, float b) { return std::fmax(a, b); }
DEV float abs_(float a) { return std::fabs(a); }
DEV float fma_(float a, float b, float c) { return std::fma(a, b, c); }
struct E4m3Values {
  float of[256];
  E4m3Values() { for (int c = 0; c < 256; c++) { const int e = c >> 3 & 15, m = c & 7; const float v = e == 15 && m == 7 ? NAN : e ? std::ldexp(1.0f + m / 8.0f, e - 7) : std::ldexp((float)m, -9); of[c] = c & 0x80 ? -v : v; } }
};
inline const E4m3Values e4m3_values;
DEV float from_e4m3(uint32_t code) { return e4m3_values.of[code & 255]; }
DEV uint32_t to_e4m3(float v) {
  const uint32_t sign = bits(v) >> 24 & 0x80; if (std::isnan(v)) return sign | 0x7F;
  const float m = std::fmin(std::fabs(v), 448.0f); int e = 0; std::frexp(m, &e); e = e - 1 < -6 ? -6 : e - 1;
  const uint32_t steps = (uint32_t)std::nearbyint(std::ldexp(m, 3 - e)); const uint32_t code = steps < 8 ? steps : (e + 6) * 8 + steps;
  return sign | (code > 0x7E ? 0x7E : code);
}
DEV uint32_t to_e4m3x2(float a, float b) { return to_e4m3(a) | to_e4m3(b) << 8; }

template <int N> DEV void registers_less() {}
template <int N> DEV void registers_more() {}
// One warp's 16 rows of m64n16k32: rows belong to the quads of the warp, B comes from shared memory as the descriptor says.
DEV void mma(float (&d)[8], const uint32_t (&a)[4], const void* columns, bool add) {
  const uint8_t* b = (const uint8_t*)columns;
  if ((uintptr_t)b % 16) emu::fail("an operand of wgmma is not aligned to 16");
  auto& w = warp(); const int lane = tid() & 31; memcpy(w.a[lane], a, 16); sync_warp();
  for (int i = 0; i < 8; i++) {
    const int row = lane / 4 + 8 * (i >> 1 & 1), column = (i >> 2) * 8 + (lane & 3) * 2 + (i & 1); float sum = 0;
    for (int k = 0; k < 32; k++) {
      const uint32_t reg = w.a[(row & 7) * 4 + k % 16 / 4][(row >> 3) + 2 * (k / 16)];
      sum += from_e4m3(reg >> (8 * (k & 3)) & 255) * from_e4m3(b[k / 16 * 256 + column / 8 * 128 + column % 8 * 16 + k % 16]);
    }
    d[i] = add ? d[i] + sum : sum;
  }
  sync_warp();
}
DEV uint32_t to_bf16x2(float a, float b) {
  auto round = [](float v) { const uint32_t u = bits(v); return (u + 0x7fffu + (u >> 16 & 1u)) >> 16; };
  return round(a) | round(b) << 16;
}
// f16 and back, by the host's own conversions.
DEV float from_f16(uint32_t h) {
  const int e = h >> 10 & 31, m = h & 1023; const float v = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1.0f + m / 1024.0f, e - 15) : std::ldexp((float)m, -24);
  return h & 0x8000 ? -v : v;
}
DEV uint32_t to_f16(float v) {
  const uint32_t sign = bits(v) >> 16 & 0x8000; if (std::isnan(v)) return sign | 0x7E00;
  const float m = std::fabs(v); int e = 0; std::frexp(m, &e); e = e - 1 < -14 ? -14 : e - 1;
  if (std::isinf(m) || e > 15) return sign | 0x7C00;
  const uint32_t steps = (uint32_t)std::nearbyint(std::ldexp(m, 10 - e)), code = steps < 1024 ? steps : (e + 14) * 1024 + steps;
  return sign | (code > 0x7C00 ? 0x7C00 : code);
}
DEV uint32_t to_f16x2(float a, float b) { return to_f16(a) | to_f16(b) << 16; }
DEV uint32_t f16x2_of_e4m3(uint32_t codes) { return to_f16x2(from_e4m3(codes & 255), from_e4m3(codes >> 8 & 255)); }
DEV void from_f16x2(uint32_t v, float& a, float& b) { a = from_f16(v & 0xffff); b = from_f16(v >> 16); }
DEV uint32_t bf16x2_of_f16x2(uint32_t v) { return to_bf16x2(from_f16(v & 0xffff), from_f16(v >> 16)); }
DEV uint32_t e4m3_of_f16x2(uint32_t v) { return f16x2_of_e4m3(to_e4m3x2(from_f16(v & 0xffff), from_f16(v >> 16))); }
template <uint32_t S> DEV uint32_t high_bytes(uint32_t v) { uint32_t r = 0; for (int k = 0; k < 4; k++) { const uint32_t from = S >> (4 * k) & 7; r |= (from < 4 ? v >> (8 * from) & 255u : 0u) << (8 * k); } return r; }
// m16n8k16 by one warp, with operands that `value` reads from 16 bits.
template <class V> DEV void mma16_of(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, V value) {
  auto& w = warp(); const int lane = tid() & 31;
  memcpy(w.a[lane], a, 16); w.b[lane][0] = b0; w.b[lane][1] = b1; sync_warp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i >> 1), column = (lane & 3) * 2 + (i & 1); float sum = 0;
    for (int k = 0; k < 16; k++) {
      const int from = k % 8 / 2, shift = 16 * (k & 1);
      sum += value(w.a[(row & 7) * 4 + from][(row >> 3) + 2 * (k / 8)] >> shift & 0xffffu) * value(w.b[column * 4 + from][k / 8] >> shift & 0xffffu);
    }
    d[i] += sum;
  }
  sync_warp();
}
DEV void mma16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma16_of(d, a, b0, b1, [](uint32_t v) { return number(v << 16); }); }
DEV void mma16h(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma16_of(d, a, b0, b1, from_f16); }
// Row `row` of matrix j, as its lane said.
DEV void load_matrices(uint32_t (&v)[4], const void* row) {
  const int lane = tid() & 31; auto& w = warp();
  w.v[lane] = (uint32_t)((const uint8_t*)row - smem()); sync_warp();
  for (int j = 0; j < 4; j++) memcpy(&v[j], smem() + w.v[8 * j + lane / 4] + lane % 4 * 4, 4);
  sync_warp();
}
DEV void load_matrices_turned(uint32_t (&v)[4], const void* row) {
  const int lane = tid() & 31; auto& w = warp();
  w.v[lane] = (uint32_t)((const uint8_t*)row - smem()); sync_warp();
  for (int j = 0; j < 4; j++) { uint16_t of[2]; for (int k = 0; k < 2; k++) memcpy(&of[k], smem() + w.v[8 * j + lane % 4 * 2 + k] + lane / 4 * 2, 2); v[j] = of[0] | (uint32_t)of[1] << 16; }
  sync_warp();
}
DEV uint32_t turn_matrix(uint32_t v) {
  const int lane = tid() & 31; auto& w = warp();
  w.v[lane] = v; sync_warp();
  uint32_t of[2]; for (int k = 0; k < 2; k++) of[k] = w.v[(lane % 4 * 2 + k) * 4 + lane / 8] >> (lane / 4 % 2 * 16) & 0xffffu;
  sync_warp();
  return of[0] | of[1] << 16;
}
}  // namespace dev
