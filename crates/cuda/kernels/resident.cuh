// The resident kernel: one persistent grid walks the instructions of a decode step (src/program.rs) for any number of steps.
//
// A CTA = two consumer warpgroups and a loader warp. The loader walks the same instructions far ahead and fills the ring with
// weight pages; it waits only for the router's choice. Consumers wait for an instruction's counter, stage its activations in
// shared memory, multiply, and finish each tile in an epilogue. Every CTA arrives at every instruction's counter once a step
// (also without work), so that "all have arrived" also says that all earlier reads of a buffer are over: one slot a buffer.
// Sums over ranks are words with tags (all_reduce.cuh). A row's arithmetic depends on no other row: a tile belongs to one
// CTA over all of K, its pages are split between warpgroups by expert and page number alone.
// Files: this one (shared memory, loader, walk), resident_ops.cuh (small ops), resident_linear.cuh (products).
#pragma once
#include "accept.cuh"
#include "all_reduce.cuh"
#include "attention.cuh"
#include "ring.cuh"
#include "rope.cuh"
#include "strips.cuh"

static const int CONSUMERS = 2 * GROUP_THREADS, RESIDENT_THREADS = CONSUMERS + 32, CONSUMER_BAR = 1;

struct ResidentShared {
  dev::Place place;
  uint64_t staged, listed;            // activations are there; the list of experts is there
  uint64_t full[2][RING_STAGES], empty[2][RING_STAGES];
  int count, list[SLOTS_MAX];         // distinct experts of the step
  float weight[SLOTS_MAX][TOKENS];    // of a row's expert; 0: not routed
  signed char pair[SLOTS_MAX][TOKENS];  // row of Inner; -1: not routed
  signed char slot[SLOTS_MAX];        // of a row of Inner
  int expert[TOKENS][ACTIVE_MAX]; float expert_weight[TOKENS][ACTIVE_MAX];
  uint32_t chosen[TOKENS][EXPERTS_MAX / 32], any[EXPERTS_MAX / 32]; int base[EXPERTS_MAX / 32];
  float rms[TOKENS];
  float red[2][64][TOKENS + 1];       // partial sums of the second warpgroup, then the tile
  alignas(128) uint8_t pages[2][RING_STAGES][RING_PAGE_BYTES];
  alignas(128) uint8_t x[1];          // StepArgs::x_bytes: activations, or what attention needs
};
static_assert(sizeof(ResidentShared) <= RESIDENT_HEADER_BYTES + 128, "src/layout.rs plans shared memory with this");
DEV ResidentShared* shared() { return (ResidentShared*)dev::smem(); }
DEV int consumer_warp() { return dev::tid() / 32; }
DEV void consumers_sync() { dev::bar_sync(CONSUMER_BAR, CONSUMERS); }

// ---- The loader: one lane. Order of pages is the consumers' order; warpgroup of page p of expert e is (e * pages + p) & 1.
struct PageLoader {
  Cursor even, odd;
  DEV void load(int group, const uint8_t* from, uint32_t bytes) {
    ResidentShared* s = shared(); Cursor c = group ? odd : even;
    if (c.fill > 0 && !PLANTED(NO_SLOT_WAIT)) dev::mbar_wait(&s->empty[group][c.stage], c.fill - 1);
    dev::mbar_expect(&s->full[group][c.stage], bytes);
    dev::bulk_load(s->pages[group][c.stage], from, bytes, &s->full[group][c.stage], false);
    c.next(RING_STAGES);
    if (group) odd = c; else even = c;
  }
  // Pages first .. last of a tile of expert `e`.
  DEV void tile(const Instr& i, int e, int tile, int first, int last) {
    const uint32_t block = i.strips * strip_bytes(i.format);
    const int pages = (i.blocks + i.page_blocks - 1) / i.page_blocks;
    const uint8_t* base = i.pages + ((uint64_t)e * i.tiles + tile) * i.blocks * block;
    for (int p = first; p < last; p++) {
      const int n = i.blocks - p * i.page_blocks < i.page_blocks ? i.blocks - p * i.page_blocks : i.page_blocks;
      load((e * pages + p) & 1, base + (uint64_t)p * i.page_blocks * block, n * block);
    }
  }
  DEV void instruction(const Instr& i) {
    ResidentShared* s = shared();
    const int pages = (i.blocks + i.page_blocks - 1) / i.page_blocks;
    const bool routed = i.experts > 0;
    if (i.op == DO_GATE_UP) {
      const int units = (routed ? s->count : 1) * i.tiles;
      for (int u = dev::cta(); u < units; u += dev::ctas()) tile(i, routed ? s->list[u / i.tiles] : 0, u % i.tiles, 0, pages);
    } else if (i.op == DO_DOWN) {
      for (int t = dev::cta(); t < i.tiles; t += dev::ctas())
        for (int k = 0; k < (routed ? s->count : 1); k++) tile(i, routed ? s->list[k] : 0, t, 0, pages);
    } else {
      for (int u = dev::cta(); u < i.tiles * i.parts; u += dev::ctas()) tile(i, 0, u / i.parts, pages * (u % i.parts) / i.parts, pages * (u % i.parts + 1) / i.parts);
    }
  }
};
DEV void loader_walk(const StepArgs& a) {
  ResidentShared* s = shared();
  PageLoader loader; uint32_t lists = 0;
  for (int step = 0; step < a.steps; step++) for (int n = 0; n < a.instructions; n++) {
    const Instr& i = a.program[n];
    s->place.loader = n; s->place.loader_step = step;
    if (i.op == DO_GATE_UP && i.experts > 0) dev::mbar_wait(&s->listed, lists++);
    if (i.tiles > 0) loader.instruction(i);
  }
}

// ---- What consumers carry from instruction to instruction
struct Walk { Cursor at; uint32_t stagings = 0; int step = 0; };

// All of this CTA's consumer threads have finished writing: say so.
DEV void arrive(const StepArgs& a, int n) {
  dev::fence_proxy();
  consumers_sync();
  if (dev::tid() == 0) dev::signal(a.counters + n);
}
// Waits until every CTA has finished instruction `n` of this step (or, `before`, of the step before).
DEV void wait_for(const StepArgs& a, int n, int step, bool before) {
  if (dev::tid() == 0) dev::await(a.counters + n, (uint32_t)(a.first_step + step + (before ? 0 : 1)) * dev::ctas());
  consumers_sync();
}
// One bulk copy sequence of K / 128 blocks of activations with their factors into shared memory; all consumers wait for it.
DEV void stage(const Instr& i, Walk& w) {
  ResidentShared* s = shared();
  if (dev::tid() == 0) {
    const uint32_t bytes = i.blocks * 128 * 17;
    dev::fence_proxy();
    dev::mbar_expect(&s->staged, bytes);
    for (uint32_t at = 0; at < bytes; at += 16384) dev::bulk_load(s->x + at, (const uint8_t*)i.x + at, bytes - at < 16384 ? bytes - at : 16384, &s->staged, true);
  }
  dev::mbar_wait(&s->staged, w.stagings++);
}
