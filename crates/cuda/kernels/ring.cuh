// The ring of pages in shared memory: loaders fill it far ahead, consumer warps empty it (resident.cuh).
//
//   full[stage]   completed by the copy engine      empty[stage]   one arrival of each warp
// Fill n of a stage is always awaited by the same threads, so no wait can mistake an older phase for its own. Loaders ask for no more
// than four pages of 26 KB, which is all that fits: what is under way queues in front of the small words that the dependency chain waits for
// (bench/cuda-chain-skeleton-h200.csv), but asking for less before an instruction begins costs more (bench/cuda-resident-h200.csv).
#pragma once
#include "dev.cuh"

static const int GROUP_THREADS = 128;
// Arrivals of a warp that has read its part of a page: one lane's, after the warp has come together. compute-sanitizer's racecheck
// does not follow that order (a ring of one page with it is reported, with 32 arrivals it is not), nor from a barrier of the consumers over one
// thread's arrival to a loader; so in a build for it, -DRACECHECK, every thread says and waits for itself.
#if defined(RACECHECK)
static const int WARP_ARRIVALS = 32;
static const bool ALL_SAY = true;
#else
static const int WARP_ARRIVALS = 1;
static const bool ALL_SAY = false;
#endif
DEV void page_read(uint64_t* empty) {
  dev::sync_warp();
  if (dev::tid() % 32 < WARP_ARRIVALS && !PLANTED(NO_ARRIVE)) dev::mbar_arrive(empty);
}

// A position in the ring.
struct Cursor {
  int stage = 0; uint32_t fill = 0;
  DEV void next(int stages) { if (++stage == stages) { stage = 0; fill++; } }
};
