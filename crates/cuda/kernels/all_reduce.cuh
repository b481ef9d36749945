// One-shot sum over ranks inside the kernel: each rank pushes its partial sums into every rank's inbox as they are finished;
// a word says itself when it is there; the sum is taken in rank order, so every rank gets the same bits.
//
//   inbox of a rank: [epoch & 1][from rank][words], 3 f32 a word
// Two halves are enough, without clearing: the thread that owns word i overwrites half h in epoch e + 2 only after it has read
// word i of every rank for e + 1, which that rank's owner of word i sent after reading epoch e. On one GPU the peers' inboxes
// are the rank's own (looped back).
#pragma once
#include "layout.h"

struct Inboxes { dev::Word* const* of; int ranks, rank, words; };  // of: one inbox a rank

DEV uint64_t inbox_at(const Inboxes& b, uint32_t epoch, int from, int word) { return ((uint64_t)(epoch & 1) * b.ranks + from) * b.words + word; }
DEV void all_reduce_push(const Inboxes& b, uint32_t epoch, int word, const float* v) {
  ROLLED for (int i = 0; i < b.ranks; i++) {
    const int to = (b.rank + i) % b.ranks;  // start with oneself, then spread over the links
    dev::put(b.of[to] + inbox_at(b, epoch, b.rank, word), dev::bits(v[0]), dev::bits(v[1]), dev::bits(v[2]), epoch);
  }
}
// All ranks' words are asked for before the first is looked at.
DEV void all_reduce_collect(const Inboxes& b, uint32_t epoch, int word, float* sum) {
  const uint32_t tag = PLANTED(WRONG_EPOCH) ? epoch + 1 : epoch;
  const dev::Word* own = b.of[b.rank] + inbox_at(b, epoch, 0, word);
  uint32_t v[RANKS_MAX][3];
  ROLLED for (;;) {  // all of them again, after waiting for the first that is missing: less code than a wait for each
    int missing = -1;
    UNROLL for (int j = RANKS_MAX - 1; j >= 0; j--) { v[j][0] = v[j][1] = v[j][2] = 0; if (j < b.ranks && !dev::get(own + j * b.words, tag, v[j])) missing = j; }
    if (missing < 0 || PLANTED(STALE_WORD)) break;
    uint32_t there[3]; dev::get_wait(own + missing * b.words, tag, there);
  }
  UNROLL for (int i = 0; i < 3; i++) { sum[i] = 0.0f; UNROLL for (int j = 0; j < RANKS_MAX; j++) sum[i] += dev::number(v[j][i]); }
}
