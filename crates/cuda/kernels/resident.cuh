// The resident kernel: one persistent grid walks the instructions of a decode step (src/program.rs) for any number of steps.
//
// A CTA = GROUPS consumer warpgroups and one of loaders: the first lane of a warp for each stage of the ring (a whole warpgroup, so that its
// registers go to the others). Loaders walk the same instructions far ahead and fill the ring with weight pages, which all warps read; they wait
// only for the router's choice. Consumers wait for an instruction's counter, stage its activations in shared memory, multiply, and finish each
// tile in an epilogue. Every CTA arrives at every instruction's counter once a step
// (also without work), so that "all have arrived" also says that all earlier reads of a buffer are over: one slot a buffer.
// Sums over ranks are words with tags (all_reduce.cuh). A row's arithmetic depends on no other row: a tile belongs to one
// CTA over all of K, or goes on in the next one with the sums so far (Deal); its blocks are dealt to warps by expert and block number alone.
// Files: this one (shared memory, loader, walk), resident_ops.cuh (small ops), resident_attention.cuh, resident_run.cuh (choice,
// acceptance, run), resident_draft.cuh, resident_linear.cuh (products).
#pragma once
#include "accept.cuh"
#include "all_reduce.cuh"
#include "attention.cuh"
#include "ring.cuh"
#include "rope.cuh"
#include "strips.cuh"

static const int CONSUMERS = GROUPS * GROUP_THREADS, RESIDENT_THREADS = CONSUMERS + GROUP_THREADS, CONSUMER_BAR = 1, WARPS = CONSUMERS / 32;

struct Walk { Cursor at; uint32_t stagings; };  // a warp's place in the ring; activations staged so far

struct ResidentShared {
  dev::Place place;
  uint64_t listed, unlisted, staged[STAGE_PIECES], tile;  // the list of experts is there; all loaders have read it; pieces of the activations, a tile of attention are there
  uint64_t full[RING_STAGES], empty[RING_STAGES];
  uint32_t tiles;                     // tiles of attention asked for
  Walk walk[WARPS];
  int rows;                           // of the pass
  int position;                       // of the verify pass's first row
  int stopped;                        // consumers have ended the run: the loader ends too
  uint32_t lists, lists_read[RING_STAGES];  // lists made so far; those that each loader has waited for
  int count, list[SLOTS_MAX];         // distinct experts of the step
  float weight[SLOTS_MAX][TOKENS];    // of a row's expert, where the row is in the expert's mask
  uint8_t mask[SLOTS_MAX], first[SLOTS_MAX];  // rows of a distinct expert; their first column of Inner
  alignas(16) uint16_t column[SLOTS_MAX][TOKENS];  // a row's column times 8 bytes; of a row that the expert has not, the column of zeros
  int expert[TOKENS][ACTIVE_MAX];   // a row's experts
  uint32_t chosen[TOKENS][EXPERTS_MAX / 32]; uint8_t before[TOKENS][EXPERTS_MAX / 32];  // a row's experts; how many in the words before
  float rms[TOKENS];
  union {
    alignas(16) float red[WARPS * 32][TOKENS + 1];     // partial sums of a tile [share, row][token]
    float scores[TOKENS][EXPERTS_MAX];                 // while a row's experts are chosen
  };
  alignas(16) Instr instr[2];         // this instruction and the next
  alignas(128) uint8_t pages[RING_STAGES][PAGE_BYTES];
  alignas(128) uint8_t x[1];          // StepArgs::x_bytes: activations, or what attention needs
};
static_assert(sizeof(ResidentShared) <= RESIDENT_HEADER_BYTES + 128, "src/layout.rs plans shared memory with this");
DEV ResidentShared* shared() { return (ResidentShared*)dev::smem(); }
DEV int consumer_warp() { return dev::tid() / 32; }
DEV void consumers_sync() { dev::bar_sync(CONSUMER_BAR, CONSUMERS); }

// What a compiler may be told of the model (src/images.rs); resident_init refuses arguments that say otherwise.
#if defined(SHAPE_RANKS)
DEV int ranks_of(const StepArgs&) { return SHAPE_RANKS; }
#else
DEV int ranks_of(const StepArgs& a) { return a.ranks; }
#endif
#if defined(SHAPES_KNOWN)
DEV int ctas() { return SHAPE_CTAS; }
DEV int x_bytes_of(const StepArgs&) { return SHAPE_X_BYTES; }
#else
DEV int ctas() { return dev::ctas_anew(); }
DEV int x_bytes_of(const StepArgs& a) { return a.x_bytes; }
#endif

// What both sides of the ring know of an instruction's pages: read once, because a wait makes the compiler read again.
struct PageShape { const uint8_t* base; uint64_t tile_bytes; int op, experts, tiles, parts, blocks, page_blocks, pages, block_bytes, together; };  // together: experts of a page of `down`
template <class I> DEV PageShape page_shape(const I& i) {
  PageShape s;
  s.base = i.pages; s.op = i.op; s.experts = i.experts; s.tiles = i.tiles; s.parts = i.parts; s.blocks = i.blocks; s.page_blocks = i.page_blocks;
  s.pages = (i.blocks + i.page_blocks - 1) / i.page_blocks; s.block_bytes = i.strips * strip_bytes(i.format); s.tile_bytes = (uint64_t)i.blocks * s.block_bytes;
  s.together = i.op == DO_DOWN && s.pages == 1 ? PAGE_BYTES / (int)s.tile_bytes : 1;
  return s;
}

// ---- Units of work of a CTA: every so many tiles, or, of gate and up where each CTA has one or more, an equal share of all pages. Then a
// CTA's last tile may end in the next CTA, which goes on with its sums: the same order of additions as in one CTA. It does that part
// first, and what it takes over last, so that nobody waits.
struct Part { int unit, first, last; bool gives, takes; };  // pages first .. last of a tile
struct Deal {
  int whole, count, step, gives, takes, given, taken, pages;
  DEV Deal(int units, int pages_, bool shared_) {
    const int cta = dev::cta(), grid = ctas();
    pages = pages_; gives = takes = given = taken = 0; whole = cta; step = grid; count = cta < units ? (units - cta + grid - 1) / grid : 0;
    if (!shared_ || units < grid || pages == 1) return;
    const uint32_t all = units * pages, begin = all * cta / grid, end = all * (cta + 1) / grid;  // far below 2^32: 64 experts x 64 tiles x 56 pages x 132
    whole = (begin + pages - 1) / pages; step = 1; count = end / pages - whole;
    given = end % pages; gives = given > 0; taken = begin % pages; takes = taken > 0;
  }
  DEV int parts() const { return gives + count + takes; }
  DEV Part part(int k) const {
    Part p; p.first = 0; p.last = pages; p.gives = gives && k == 0; p.takes = false; p.unit = whole + (k - gives) * step;
    if (p.gives) { p.unit = whole + count; p.last = given; }
    else if (k - gives == count) { p.unit = whole - 1; p.first = taken; p.takes = true; }
    return p;
  }
};

// ---- A loader: one lane, which fills one stage of the ring. Order of pages is the consumers' order.
struct PageLoader {
  Cursor at; int own; uint32_t filled = 0; bool stopped = false;
  // The next stage, for a page of that many bytes, if it is this loader's: all warps have read it. Null otherwise, or when the run has ended.
  DEV uint8_t* page(uint32_t bytes) {
    ResidentShared* s = shared();
    if (stopped || at.stage != own) return 0;
    if (at.fill > 0 && !PLANTED(NO_SLOT_WAIT) && !dev::mbar_wait_or(&s->empty[own], at.fill - 1, &s->stopped)) { stopped = true; return 0; }
    dev::mbar_expect(&s->full[own], bytes);
    filled++;
    return s->pages[own];
  }
  // Pages first .. last of a tile of expert `e`.
  DEV void tile(const PageShape& i, int e, int tile, int first, int last) {
    const int each = i.page_blocks * i.block_bytes, all = (int)i.tile_bytes;
    const uint8_t* from = i.base + ((uint64_t)e * i.tiles + tile) * i.tile_bytes + (uint64_t)first * each;
    ROLLED for (int done = first * each; first < last; first++, done += each, from += each, at.next(RING_STAGES)) {
      const int bytes = all - done < each ? all - done : each;
      if (uint8_t* to = page(bytes)) dev::bulk_load(to, from, bytes, &shared()->full[own], false);
    }
  }
  // All distinct experts of a tile of `down`, several in a page where they fit.
  DEV void tile_of_all(const PageShape& i, int t) {
    ResidentShared* s = shared();
    const int count = s->count, bytes = (int)i.tile_bytes; const uint64_t expert = i.tile_bytes * i.tiles; const uint8_t* base = i.base + t * i.tile_bytes;
    ROLLED for (int k = 0; k < count; k += i.together) {
      if (i.together == 1) { tile(i, s->list[k], t, 0, i.pages); continue; }
      const int n = count - k < i.together ? count - k : i.together;
      if (uint8_t* to = page(n * bytes)) ROLLED for (int j = 0; j < n; j++) dev::bulk_load(to + j * bytes, base + s->list[k + j] * expert, bytes, &s->full[own], false);
      at.next(RING_STAGES);
    }
  }
  DEV void instruction(const PageShape& i) {
    ResidentShared* s = shared();
    const bool routed = i.experts > 0;
    if (i.op == DO_GATE_UP) {
      const Deal deal((routed ? s->count : 1) * i.tiles, i.pages, true);
      ROLLED for (int k = 0; k < deal.parts(); k++) { const Part p = deal.part(k); tile(i, routed ? s->list[p.unit / i.tiles] : 0, p.unit % i.tiles, p.first, p.last); }
    } else if (i.op == DO_DOWN && routed) {
      ROLLED for (int t = dev::cta(); t < i.tiles; t += ctas()) tile_of_all(i, t);
    } else {
      ROLLED for (int u = dev::cta(); u < i.tiles * i.parts; u += ctas()) tile(i, 0, u / i.parts, i.pages * (u % i.parts) / i.parts, i.pages * (u % i.parts + 1) / i.parts);
    }
  }
};
DEV void loader_walk(const StepArgs& a, int own) {
  ResidentShared* s = shared();
  PageLoader loader; loader.own = own; s->lists_read[own] = 0;
  ROLLED for (int step = 0; step < a.steps && !loader.stopped; step++) ROLLED for (int n = a.begin; n < a.end && !loader.stopped; n++) {
    const PageShape i = page_shape(a.program[n]);
    if (own == 0) { s->place.loader = n; s->place.loader_step = step; }
    if (i.op == DO_GATE_UP && i.experts > 0 && !PLANTED(NO_LIST_WAIT) && !dev::mbar_wait_or(&s->listed, s->lists_read[own]++, &s->stopped)) loader.stopped = true;
    if (i.tiles > 0 && !loader.stopped) loader.instruction(i);
    if (i.op == DO_DOWN && i.experts > 0) dev::mbar_arrive(&s->unlisted);
  }
  // A copy that nobody will read must land before the CTA ends.
  if (loader.stopped && loader.filled) dev::mbar_wait(&s->full[own], loader.filled - 1);
}

// Before the list is written again: loaders are through with the last one.
DEV void await_unlisted() { const uint32_t lists = shared()->lists; if (lists > 0) dev::mbar_wait(&shared()->unlisted, lists - 1); }

// ---- What a warp carries from product to product: in shared memory, because what lives across a call costs a register in all others
DEV Walk recall() { return shared()->walk[consumer_warp()]; }
DEV void keep(const Walk& w) { dev::sync_warp(); if (dev::tid() % 32 == 0) shared()->walk[consumer_warp()] = w; dev::sync_warp(); }
DEV int rows_now() { return dev::again(shared()->rows); }
DEV int step_now() { return dev::again(shared()->place.step); }

// The next instruction on its way into shared memory; it is there after this thread's copies_wait and a barrier.
DEV void fetch(const StepArgs& a, int n, uint32_t slot) {
  static_assert(sizeof(Instr) % 16 == 0, "copied by 16 bytes");
  if (dev::tid() < (int)(sizeof(Instr) / 16)) dev::copy16((uint8_t*)&shared()->instr[slot & 1] + dev::tid() * 16, (const uint8_t*)(a.program + n) + dev::tid() * 16);
}
// All of this CTA's consumer threads have finished writing: say so. `bulk`: bulk copies will read what they wrote.
DEV void arrive(const StepArgs& a, bool bulk) {
  if (bulk) dev::fence_proxy();
  dev::copies_wait();
  consumers_sync();
  if (dev::tid() != 0) return;
  const int n = dev::again(shared()->place.instruction);
  if (!(PLANTED(NO_SIGNAL) && dev::cta() == 1 && n == 4)) dev::signal(a.counters + n);
}
// Waits until every CTA has finished instruction `n` of the step that thread 0 has noted in `place`.
DEV void await_all(const StepArgs& a, int n) {
  if (dev::tid() != 0) return;
  const uint32_t steps = a.first_step + dev::again(shared()->place.step) + (PLANTED(STEP_BEFORE) ? 0 : 1);
  dev::await(a.counters + n, steps * ctas() - (PLANTED(ONE_TOO_FEW) && n > 0 ? 1 : 0));
}
DEV void wait_for(const StepArgs& a, int n) {
  await_all(a, n);
  consumers_sync();
}
// Starts the copies of an instruction's activations, eight blocks of the rows a piece, the last one the rest; piece 0 also has the end, where
// the factors are. Every piece's barrier completes at every staging, also one without bytes. By the last warp: the first ones work out the norm's factors meanwhile.
static const int PIECE_BLOCKS = 8;
DEV uint32_t piece_bytes() { return PIECE_BLOCKS * BLOCK_COLUMNS * x_column_bytes(TOKENS); }
DEV void stage(const Instr& i) {
  ResidentShared* s = shared();
  if (dev::tid_anew() != CONSUMERS - 32) return;
  const uint32_t bytes = i.stage_bytes, all = (uint32_t)i.blocks * BLOCK_COLUMNS * x_column_bytes(TOKENS), codes = all < bytes ? all : bytes, each = piece_bytes();
  dev::fence_proxy_shared();
  ROLLED for (int p = 0; p < STAGE_PIECES; p++) {
    const uint32_t at = p * each, end = p + 1 < STAGE_PIECES && at + each < codes ? at + each : codes, n = at < codes ? end - at : 0, more = p == 0 ? bytes - codes : 0;
    if (n + more == 0) { dev::mbar_arrive(&s->staged[p]); continue; }
    dev::mbar_expect(&s->staged[p], n + more);
    if (more) dev::bulk_load(s->x + codes, (const uint8_t*)i.x + codes, more, &s->staged[0], true);
    if (n) dev::bulk_load(s->x + at, (const uint8_t*)i.x + at, n, &s->staged[p], true);
  }
}
// The first pieces, for all who read them; and all pieces, a warp each, before the barrier after which the next may be asked for.
DEV void staged_first(const Walk& w, int pieces) { if (PLANTED(NO_STAGE_WAIT)) return; ROLLED for (int p = 0; p < pieces; p++) dev::mbar_wait(&shared()->staged[p], w.stagings); }
DEV void staged_all(const Walk& w) { static_assert(STAGE_PIECES <= WARPS, "a warp each"); if (PLANTED(NO_STAGE_WAIT)) return; const int warp = dev::tid_anew() / 32; if (warp < STAGE_PIECES) dev::mbar_wait(&shared()->staged[warp], w.stagings); }
