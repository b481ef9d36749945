// The ring of pages in shared memory: one loader lane fills it far ahead, warpgroups empty it.
//
//   pages    g0 s0 | g0 s1 | ... | g1 s0 | g1 s1 | ...      STAGES for each of GROUPS warpgroups
//   full     completed by the copy engine      empty   one arrival of each of a warpgroup's 4 warps
// A stage belongs to one warpgroup for good: fill n of a stage is always awaited by the same threads, so no wait can
// mistake an older phase for its own. The loader keeps at most WINDOW pages in flight: more do not stream faster, they
// queue in front of the small words that the dependency chain waits for (bench/cuda-chain-skeleton-h200.csv: 48 KiB in
// flight instead of 176 KiB shortens a layer from 58 to 54 us on an H200).
#pragma once
#include "dev.cuh"

static const int GROUP_THREADS = 128;
// Arrivals of a warp that has read its part of a page: one lane's, after the warp has come together. compute-sanitizer's racecheck
// does not follow that order (a ring of one page with it is reported, with 32 arrivals it is not), so a build for it says -DRACECHECK.
#if defined(RACECHECK)
static const int WARP_ARRIVALS = 32;
#else
static const int WARP_ARRIVALS = 1;
#endif
static const int PAGE_ARRIVALS = GROUP_THREADS / 32 * WARP_ARRIVALS;
DEV void page_read(uint64_t* empty) {
  dev::sync_warp();
  if (dev::tid() % 32 < WARP_ARRIVALS && !PLANTED(NO_ARRIVE)) dev::mbar_arrive(empty);
}

template <int GROUPS_, int STAGES_, int PAGE_BYTES_> struct Ring {
  static const int GROUPS = GROUPS_, STAGES = STAGES_, PAGE_BYTES = PAGE_BYTES_;
  static_assert(PAGE_BYTES % 128 == 0 || PAGE_BYTES % 16 == 0, "bulk copies move multiples of 16 bytes");
  uint64_t full[GROUPS][STAGES], empty[GROUPS][STAGES];
  alignas(128) uint8_t pages[GROUPS][STAGES][PAGE_BYTES];
  // One thread, before the CTA's first barrier.
  DEV void init(Ring* r) {
    for (int g = 0; g < GROUPS; g++) for (int s = 0; s < STAGES; s++) { dev::mbar_init(&r->full[g][s], 1); dev::mbar_init(&r->empty[g][s], PAGE_ARRIVALS); }
    dev::mbar_init_fence();
  }
};

// A position in a ring, or in one warpgroup's part of it.
struct Cursor {
  int stage = 0; uint32_t fill = 0;
  DEV void next(int stages) { if (++stage == stages) { stage = 0; fill++; } }
};

// The loader's side; one lane of one warp.
template <class R, int WINDOW> struct Loader {
  static_assert(WINDOW <= R::STAGES, "a page further back may be two fills old in its stage: its wait would take the fill to come for it and hang (an odd tile count showed it, on the H200 and then in the emulator)");
  R* ring; Cursor at[R::GROUPS]; uint64_t* pending[WINDOW + 1]; uint32_t pending_fill[WINDOW + 1]; uint32_t count = 0;  // WINDOW 0: no limit but the ring
  DEV void load(int group, const uint8_t* from, uint32_t bytes) {
    Cursor& c = at[group];
    if (c.fill > 0 && !PLANTED(NO_SLOT_WAIT)) dev::mbar_wait(&ring->empty[group][c.stage], c.fill - 1);
    if (WINDOW > 0 && count >= (uint32_t)WINDOW) dev::mbar_wait(pending[WINDOW > 0 ? WINDOW - 1 : 0], pending_fill[WINDOW > 0 ? WINDOW - 1 : 0]);
    UNROLL for (int i = WINDOW - 1; i > 0; i--) { pending[i] = pending[i - 1]; pending_fill[i] = pending_fill[i - 1]; }
    pending[0] = &ring->full[group][c.stage]; pending_fill[0] = c.fill; count++;
    dev::mbar_expect(pending[0], bytes);
    dev::bulk_load(ring->pages[group][c.stage], from, bytes, pending[0], false);
    c.next(R::STAGES);
  }
};

// A warpgroup's side.
template <class R> struct Reader {
  R* ring; int group; Cursor at;
  DEV const uint8_t* wait() { dev::mbar_wait(&ring->full[group][at.stage], at.fill); return ring->pages[group][at.stage]; }
  DEV void release() {
    page_read(&ring->empty[group][at.stage]);
    at.next(R::STAGES);
  }
};
