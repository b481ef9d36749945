// The primitive layer: everything a kernel asks of the machine goes through `dev::`.
//
// Under nvcc and NVRTC it is PTX for sm_90a. Under a host compiler with -DEMU it is emu/emu.h: every CUDA thread is a
// fiber, scheduling is random by seed, bulk copies and remote stores arrive late, and a wrong wait is reported.
// Rules that make the two worlds one:
//   - waits name the fill they wait for, counted from 0 (not a parity), so that the emulator sees a wait that would take
//     an older phase of the same barrier for the one it wants;
//   - what crosses CTAs or ranks without a barrier is a `Word`: 12 bytes of payload and a tag, one 16-byte access;
//   - every spin has a budget of cycles; past it a fault record is written and the kernel traps.
#pragma once

#if defined(EMU)
#include "emu/emu.h"
#else

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#else
#include <stdint.h>
#endif

#define DEV __device__ __forceinline__
#define DEV_CALL __device__ __noinline__  // a function of its own: its registers are no burden to the others
#define KERNEL extern "C" __global__
#define UNROLL _Pragma("unroll")
#define DEV_PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(n) DEV_PRAGMA(unroll n)
#define ROLLED _Pragma("unroll 1")  // code that runs once a layer is fetched anew each time: short loops beat long straight lines
#if defined(SHAPE_ONE_TERM)
#define ONE_TERM true  // plain e4m3 activations (src/images.rs)
#else
#define ONE_TERM false
#endif
#if defined(SHAPE_KV_FP8)
#define KV_FP8 true  // the target's keys and values in e4m3
#else
#define KV_FP8 false
#endif
#if defined(SHAPE_WIDE)
#define WIDE true  // an activation is two f16
#else
#define WIDE false
#endif
#if defined(SHAPE_KV_WIDE)
#define KV_WIDE true  // the target's keys and values are two bf16
#else
#define KV_WIDE false
#endif
#define PLANTED(bug) false  // bugs that the emulator can switch on, to show that it catches them

namespace dev {

// What a wait was for, when it ran out of time. Written once, by the first thread that gives up.
struct Fault { uint32_t set, what, cta, thread, instruction, step; uint64_t wanted, seen, at; };  // at: address of what was waited for, a barrier's in shared memory
enum FaultKind { FAULT_BARRIER = 1, FAULT_WORD = 2, FAULT_COUNTER = 3, FAULT_HOST = 4 };
__device__ Fault* fault_record;                             // host memory, because the context is lost with a trap
struct Place { int instruction, step, loader, loader_step; };  // first in shared memory where a kernel keeps it
static const uint32_t SPIN_CYCLES_MAX = 2000000000u;  // about one second at 1.98 GHz; counted in 32 bits, which costs less code

// `at`: an address, of a barrier that in shared memory.
__device__ __noinline__ void fault(uint32_t what, uint32_t wanted, uint64_t at) {
  extern __shared__ __align__(1024) uint8_t dev_smem[];
  volatile Fault* record = fault_record;
  if (record && atomicExch_system((unsigned int*)&record->set, 1u) == 0) {
    const Place* place = (const Place*)dev_smem; const bool loader = threadIdx.x >= blockDim.x - 128;
    if (what == FAULT_BARRIER) at -= __cvta_generic_to_shared(dev_smem);
    record->what = what; record->cta = blockIdx.x; record->thread = threadIdx.x;
    record->instruction = loader ? place->loader : place->instruction; record->step = loader ? place->loader_step : place->step;
    record->wanted = wanted; record->at = at;
    record->seen = what == FAULT_BARRIER ? *(volatile const uint64_t*)(dev_smem + at) : ((volatile const uint32_t*)at)[what == FAULT_WORD ? 3 : 0]; __threadfence_system();
  }
  __trap();
}

DEV void refuse() { __trap(); }
DEV int tid() { return threadIdx.x; }
// The same, read anew: what is computed from it does not stay in registers from the kernel's beginning on.
DEV int tid_anew() { int t; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t)); return t; }
DEV int ctas_anew() { int n; asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(n)); return n; }
// The same of a value in memory.
DEV int again(const int& v) { return *(const volatile int*)&v; }
DEV int cta() { return blockIdx.x; }
DEV int ctas() { return gridDim.x; }
DEV uint8_t* smem() { extern __shared__ __align__(1024) uint8_t dev_smem[]; return dev_smem; }
DEV uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
DEV long long cycles() { return clock64(); }
DEV uint32_t ticks() { uint32_t t; asm volatile("mov.u32 %0, %%clock;" : "=r"(t)); return t; }

// Registers of a thread from here on, for a whole warpgroup: what one gives up, others may take.
template <int N> DEV void registers_less() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEV void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// ---- Barriers inside a CTA
DEV void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEV void sync_warp() { __syncwarp(); }
DEV void mbar_init(uint64_t* b, uint32_t arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory"); }
DEV void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void mbar_arrive(uint64_t* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory"); }
DEV void mbar_expect(uint64_t* b, uint32_t bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory"); }
DEV bool mbar_try(uint64_t* b, uint32_t fill) {
  uint32_t done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0,1,0,p;}" : "=r"(done) : "r"(shared_address(b)), "r"(fill & 1) : "memory");
  return done;
}
DEV void mbar_wait(uint64_t* b, uint32_t fill) {
  if (mbar_try(b, fill)) return;
  const uint32_t start = ticks();
  ROLLED while (!mbar_try(b, fill)) if (ticks() - start > SPIN_CYCLES_MAX) fault(FAULT_BARRIER, fill, shared_address(b));
}
// The same, or until `*stop` is set by another thread of the CTA: then false. For loaders, which run ahead and so wait longer than whoever
// keeps them waiting: they let the others speak first.
DEV bool mbar_wait_or(uint64_t* b, uint32_t fill, const volatile int* stop) {
  const uint32_t start = ticks();
  ROLLED while (!mbar_try(b, fill)) { if (*stop) return false; if (ticks() - start > SPIN_CYCLES_MAX / 2 * 3) fault(FAULT_BARRIER, fill, shared_address(b)); }
  return true;
}
DEV void say_stop(volatile int* stop) { *stop = 1; }

// ---- Copies. Sizes and addresses are multiples of 16 bytes.
DEV void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* b, bool keep_in_l2) {
  const uint64_t policy = keep_in_l2 ? 0x14F0000000000000ull : 0x12F0000000000000ull;  // evict last, evict first
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b)), "l"(policy) : "memory");
}
DEV void load16(const void* p, uint32_t* v) { const uint4 q = *(const uint4*)p; v[0] = q.x; v[1] = q.y; v[2] = q.z; v[3] = q.w; }
DEV void store16(void* p, const uint32_t* v) { *(uint4*)p = make_uint4(v[0], v[1], v[2], v[3]); }
// 16 bytes into shared memory, not waited for; copies_wait: this thread's are there.
DEV void copy16(void* to, const void* from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory"); }
DEV void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- Words: data that says itself when it is ready
struct alignas(16) Word { uint32_t v[3]; uint32_t tag; };
DEV void put(Word* p, uint32_t a, uint32_t b, uint32_t c, uint32_t tag) {
  const uint64_t lo = a | ((uint64_t)b << 32), hi = c | ((uint64_t)tag << 32);
  asm volatile("{.reg .b128 t; mov.b128 t, {%1,%2}; st.relaxed.sys.global.b128 [%0], t;}" ::"l"(p), "l"(lo), "l"(hi) : "memory");
}
DEV bool get(const Word* p, uint32_t tag, uint32_t* v) {
  uint64_t lo, hi;
  asm volatile("{.reg .b128 t; ld.relaxed.sys.global.b128 t, [%2]; mov.b128 {%0,%1}, t;}" : "=l"(lo), "=l"(hi) : "l"(p) : "memory");
  v[0] = (uint32_t)lo; v[1] = (uint32_t)(lo >> 32); v[2] = (uint32_t)hi;
  return (uint32_t)(hi >> 32) == tag;
}
DEV void get_wait(const Word* p, uint32_t tag, uint32_t* v) {
  const uint32_t start = ticks();
  ROLLED while (!get(p, tag, v)) if (ticks() - start > SPIN_CYCLES_MAX) fault(FAULT_WORD, tag, (uint64_t)p);
}

// ---- What the host says, 8 bytes of its memory: tokens that it has taken, and in the high half whether to stop
DEV uint64_t host_said(const void* p) { uint64_t v; asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory"); return v; }
// Waits until a ring of `words` has room for tokens up to `end`. Half of a wait's budget: peers wait for this rank meanwhile.
DEV void host_room(const void* p, uint32_t end, uint32_t words) {
  const uint32_t start = ticks();
  ROLLED while (end - (uint32_t)host_said(p) > words) if (ticks() - start > SPIN_CYCLES_MAX / 2) fault(FAULT_HOST, end, (uint64_t)p);
}

// ---- Counters: only ever grow; one arrival makes everything that the CTA wrote before its barrier visible to who waits
DEV void signal(uint32_t* counter) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory"); }
// Counts to `last` and from there to 0; gives what was there. Orders like signal and await together.
DEV uint32_t take(uint32_t* counter, uint32_t last) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
  return old;
}
DEV void await(const uint32_t* counter, uint32_t target) {
  const uint32_t start = ticks(); uint32_t seen;
  ROLLED do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    if ((int)(seen - target) < 0 && ticks() - start > SPIN_CYCLES_MAX) fault(FAULT_COUNTER, target, (uint64_t)counter);
  } while ((int)(seen - target) < 0);
}
// Between ordinary and bulk-copy accesses of the same memory. Global: by who wrote it, before saying so, which is enough for whoever reads after
// hearing of it (PTX ISA, memory consistency model, causality order: a proxy fence on the path). Shared: by who asks for the copy.
DEV void fence_proxy() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
DEV void fence_proxy_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Warps
DEV float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEV uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEV float shuffle(float v, int from) { return __shfl_sync(0xffffffffu, v, from); }
DEV uint32_t shuffle(uint32_t v, int from) { return __shfl_sync(0xffffffffu, v, from); }
DEV uint32_t max_warp(uint32_t v) { return __reduce_max_sync(0xffffffffu, v); }
DEV uint32_t min_warp(uint32_t v) { return __reduce_min_sync(0xffffffffu, v); }
DEV uint32_t or_warp(uint32_t v) { return __reduce_or_sync(0xffffffffu, v); }
DEV uint32_t add_warp(uint32_t v) { return __reduce_add_sync(0xffffffffu, v); }
DEV void or_shared(uint32_t* p, uint32_t v) { atomicOr(p, v); }  // of shared memory
DEV int count_bits(uint32_t v) { return __popc(v); }

// ---- Numbers
DEV uint32_t bits(float f) { return __float_as_uint(f); }
DEV float number(uint32_t u) { return __uint_as_float(u); }
DEV float exp_(float x) { return expf(x); }
DEV float exp_quick(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x * 1.44269504f)); return r; }  // off by 2^-22 and |x| 2^-23 of itself
DEV float sqrt_(float x) { return __fsqrt_rn(x); }
DEV float reciprocal(float x) { float r; asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }  // to the last bit but one
DEV float max_(float a, float b) { return fmaxf(a, b); }
DEV float abs_(float a) { return fabsf(a); }
DEV float fma_(float a, float b, float c) { return fmaf(a, b, c); }
// Two f32 to two e4m3 codes, nearest even, saturating; `a` in the low byte.
DEV uint32_t to_e4m3x2(float a, float b) { uint16_t r; asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(b), "f"(a)); return r; }

// ---- mma.sync
// Two f32 to bf16, nearest even; `a` in the low half.
DEV uint32_t to_bf16x2(float a, float b) { uint32_t r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
// d[4] += A (16 x 16 bf16) x B (16 x 8 bf16), by one warp, fragments as in the PTX manual's m16n8k16.
DEV void mma16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same in f16.
DEV void mma16h(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four 8 x 8 matrices of 16-bit values, fragments as in the PTX manual's ldmatrix: lane l gives the address of row l % 8 of matrix l / 8.
DEV void load_matrices(uint32_t (&v)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(shared_address(row)) : "memory");
}
// The same, each turned around (rows become columns); a matrix in registers turned around.
DEV void load_matrices_turned(uint32_t (&v)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(shared_address(row)) : "memory");
}
DEV uint32_t turn_matrix(uint32_t v) { uint32_t r; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v)); return r; }
// Two e4m3 codes (the low 16 bits) as f16, exactly; two f16 as f32, exactly, and as bf16, nearest even; two f16 as the nearest e4m3 values, in f16.
DEV uint32_t f16x2_of_e4m3(uint32_t codes) { uint32_t h; asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"((uint16_t)codes)); return h; }
DEV void from_f16x2(uint32_t v, float& a, float& b) { asm("{.reg .b16 l, u; mov.b32 {l, u}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, u;}" : "=f"(a), "=f"(b) : "r"(v)); }
DEV uint32_t bf16x2_of_f16x2(uint32_t v) { float a, b; from_f16x2(v, a, b); return to_bf16x2(a, b); }
DEV uint32_t e4m3_of_f16x2(uint32_t v) { uint16_t c; asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(c) : "r"(v)); return f16x2_of_e4m3(c); }
// Two f32 to f16, nearest even; `a` in the low half.
DEV uint32_t to_f16x2(float a, float b) { uint32_t r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
// Bytes of `v` and zeros (4) as PRMT's selector names them.
template <uint32_t S> DEV uint32_t high_bytes(uint32_t v) { return __byte_perm(v, 0u, S); }
}  // namespace dev
#endif
