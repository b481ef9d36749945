// One-shot sum over ranks inside the kernel: each rank pushes its partial sums into every rank's inbox as they are finished;
// a word says itself when it is there; the sum is taken in rank order, so every rank gets the same bits.
//
//   inbox of a rank: [epoch & 1][from rank][words], 3 f32 a word
// Two halves are enough, without clearing: the thread that owns word i overwrites half h in epoch e + 2 only after it has read
// word i of every rank for e + 1, which that rank's owner of word i sent after reading epoch e. On one GPU the peers' inboxes
// are the rank's own (looped back).
#pragma once
#include "dev.cuh"

static const int RANKS_MAX = 8;
struct Inboxes { dev::Word* const* of; int ranks, rank, words; };  // of: one inbox a rank

DEV uint64_t inbox_at(const Inboxes& b, uint32_t epoch, int from, int word) { return ((uint64_t)(epoch & 1) * b.ranks + from) * b.words + word; }
DEV void all_reduce_push(const Inboxes& b, uint32_t epoch, int word, const float* v) {
  ROLLED for (int i = 0; i < b.ranks; i++) {
    const int to = (b.rank + i) % b.ranks;  // start with oneself, then spread over the links
    dev::put(b.of[to] + inbox_at(b, epoch, b.rank, word), dev::bits(v[0]), dev::bits(v[1]), dev::bits(v[2]), epoch);
  }
}
// Four ranks' words are asked for before the first is looked at: eight spill.
static const int COLLECTED = 4;
DEV void all_reduce_collect(const Inboxes& b, uint32_t epoch, int word, float* sum) {
  const uint32_t tag = PLANTED(WRONG_EPOCH) ? epoch + 1 : epoch;
  sum[0] = sum[1] = sum[2] = 0.0f;
  UNROLL for (int first = 0; first < RANKS_MAX; first += COLLECTED) {
    uint32_t v[COLLECTED][3] = {}, here = 0;  // {}: what is not asked for must not live on from a round before
    UNROLL for (int j = 0; j < COLLECTED; j++) if (first + j < b.ranks && dev::get(b.of[b.rank] + inbox_at(b, epoch, first + j, word), tag, v[j])) here |= 1u << j;
    UNROLL for (int j = 0; j < COLLECTED; j++) {
      if (first + j >= b.ranks) continue;
      if (!(here >> j & 1u) && !PLANTED(STALE_WORD)) dev::get_wait(b.of[b.rank] + inbox_at(b, epoch, first + j, word), tag, v[j]);
      for (int i = 0; i < 3; i++) sum[i] += dev::number(v[j][i]);
    }
  }
}
