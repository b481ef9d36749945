// The choice of a token a row, and what a step leaves behind: accepted drafts, next anchor, tokens for the host, the run's end.
//
// CTA 0 of every rank decides the same from the same words. Tokens go to the host as words of a ring in its memory: the tag is the
// number of the token, counted from 1 since the ring began, so that neither side resets anything; the host says how many it has
// taken. Definition of acceptance: model/src/reference/accept.rs.
//   word of the ring: token, index in the sequence, drafted | kept << 8 | reason << 16 (of the step; reason only with a run's last token)
#pragma once
#include "resident_ops.cuh"

// The best of the CTAs' bests, then of the ranks'. `stop`: some rank's host wants the run to end.
DEV Best best_of_ranks(const StepArgs& a, const Instr& i, int step, int row, bool& stop) {
  const int lane = dev::tid() % 32;
  const uint32_t said = a.ring && row == 0 && lane == 0 ? (uint32_t)(dev::host_said(a.host) >> 32) : 0u;
  Best best; best.value = -3.4e38f; best.token = 0x7fffffff;
  ROLLED for (int c = lane; c < ctas(); c += 32) best = better(best, ((const Best*)i.bests)[c * TOKENS + row]);
  for (int m = 16; m; m >>= 1) { Best b; b.value = dev::shuffle_xor(best.value, m); b.token = (int)dev::shuffle_xor((uint32_t)best.token, m); best = better(best, b); }
  const uint32_t tag = epoch_of(a, step, i.index);
  const int half = tag & 1;
  if (lane == 0) ROLLED for (int to = 0; to < ranks_of(a); to++) dev::put(a.choice[to] + ((half * ranks_of(a) + a.rank) * TOKENS + row), dev::bits(best.value), (uint32_t)best.token, said, tag);
  stop = false;
  ROLLED for (int from = 0; from < ranks_of(a); from++) {
    uint32_t v[3]; dev::get_wait(a.choice[a.rank] + ((half * ranks_of(a) + from) * TOKENS + row), tag, v);
    Best b; b.value = dev::number(v[0]); b.token = (int)v[1];
    best = from == 0 ? b : better(best, b);
    stop = stop || v[2] != 0;
  }
  return best;
}

// Token `r` that the step gives: accepted drafts, then the target's own.
DEV int token_of(const StepState* s, int r) { return r < s->accepted ? s->tokens[r + 1] : s->best[s->accepted]; }
DEV bool stops(const StepState* s, int token) {
  ROLLED for (int k = 0; k < s->stop_count; k++) if (s->stops[k] == token) return true;
  return false;
}
// How many tokens of the step are part of a run's text, and why it ends with them.
DEV int tokens_of_run(const StepState* s, bool stop, int& reason) {
  int n = s->accepted + 1;
  ROLLED for (int r = 0; r < n; r++) if (stops(s, token_of(s, r))) { n = r + 1; reason = END_STOP_ID; }
  if (n > s->left || (n == s->left && reason == END_NONE)) { n = s->left; reason = END_COUNT; }
  if (reason == END_NONE && s->position + n + 1 >= s->limit) reason = END_CONTEXT;
  if (reason == END_NONE && stop) reason = END_HOST;
  return n;
}
DEV void put_tokens(const StepArgs& a, StepState* s, int n, int reason) {
  if (a.ring) dev::host_room(a.host, s->produced + n, a.ring_words);
  ROLLED for (int r = 0; r < n; r++) {
    const uint32_t number = s->produced++, last = r + 1 == n ? (uint32_t)reason << 16 : 0u;
    if (a.ring) dev::put(a.ring + (number & (a.ring_words - 1)), (uint32_t)token_of(s, r), (uint32_t)(s->position + 1 + r), (uint32_t)(s->rows - 1) | (uint32_t)s->accepted << 8 | last, number + 1);
  }
  s->left -= n;
}
// The widest step that the sequence has room for, and the drafter's block for it.
DEV void next_rows(StepState* s) {
  const int room = s->limit - s->position - 1;
  s->rows = s->width < room ? s->width : room;
  const int block = s->block_max < room ? s->block_max : room;
  s->block = block > s->rows ? block : s->rows;
}
// One thread: from the rows' choices to the next step. Without a chain the host decides, so all rows are kept.
DEV void advance(const StepArgs& a, StepState* s, bool stop) {
  const int accepted = accept_greedy(s->best, s->tokens + 1, s->rows - 1);
  s->accepted = s->simulate ? (s->simulate < s->rows ? s->simulate - 1 : s->rows - 1) : accepted;
  s->steps++; s->drafted += s->rows - 1; s->kept += s->accepted;
  s->committed = s->rows; s->committed_position = s->position; s->running = 1; s->reason = END_NONE;
  if (!s->chain) return;
  int n = s->accepted + 1, reason = END_NONE;
  if (s->limit > 0) { n = tokens_of_run(s, stop, reason); put_tokens(a, s, n, reason); }
  const int anchor = token_of(s, n - 1);
  s->committed = n; s->running = reason == END_NONE; s->reason = reason;
  // Without a drafter (benches) the next drafts are the tokens just chosen.
  ROLLED for (int r = 1; r < s->rows; r++) s->tokens[r] = s->best[r];
  s->tokens[0] = anchor;
  if (s->chain > 1) s->position += n;
  if (s->limit > 0 && s->running) next_rows(s);
}
DEV void choose_op(const StepArgs& a, const Instr& i, int step) {
  StepState* state = a.state;
  if (dev::cta() != 0) return;
  const int row = consumer_warp(); bool stop = false;
  if (row < state->rows) { const Best b = best_of_ranks(a, i, step, row, stop); if (dev::tid() % 32 == 0) state->best[row] = b.token; }
  consumers_sync();
  if (dev::tid() == 0) advance(a, state, stop);
}
// The drafter's choices become the rows that the target verifies; the anchor stays.
DEV void draft_choose_op(const StepArgs& a, const Instr& i, int step) {
  StepState* state = a.state;
  const int row = consumer_warp(); bool stop;
  if (dev::cta() != 0 || row >= state->block) return;
  const Best b = best_of_ranks(a, i, step, row, stop);
  if (row > 0 && dev::tid() % 32 == 0) state->tokens[row] = b.token;
}
