// The products of the resident kernel and their epilogues, and the walk that ties all ops together.
#pragma once
#include "resident_ops.cuh"

// Adds this warpgroup's pages of first .. last of a tile of expert `e`; `x`: staged activations of block 0.
template <class F, int BYTES> DEV void multiply_pages(const Instr& i, Walk& w, int e, int first, int last, const uint8_t* x, const float* factors, float (&acc)[4]) {
  ResidentShared* s = shared();
  const int group = dev::tid() / GROUP_THREADS, warp = dev::tid() % GROUP_THREADS / 32, strip = warp < i.strips ? warp : i.strips - 1;
  const int pages = (i.blocks + i.page_blocks - 1) / i.page_blocks;
  for (int p = first; p < last; p++) {
    if (((e * pages + p) & 1) != group) continue;
    dev::mbar_wait(&s->full[group][w.at.stage], w.at.fill);
    const uint8_t* page = s->pages[group][w.at.stage] + strip * BYTES;
    const int begin = p * i.page_blocks, n = i.blocks - begin < i.page_blocks ? i.blocks - begin : i.page_blocks;
    for (int b = 0; b < n; b++) F::multiply(page + b * i.strips * BYTES, x + (uint64_t)(begin + b) * 2048, factors + (begin + b) * 4 * TOKENS, acc);
    dev::sync_warp();
    if (dev::tid() % 32 == 0 && !PLANTED(NO_ARRIVE)) dev::mbar_arrive(&s->empty[group][w.at.stage]);
    w.at.next(RING_STAGES);
  }
}
DEV void multiply(const Instr& i, Walk& w, int e, int first, int last, const uint8_t* x, const float* factors, float (&acc)[4]) {
  if (i.format == STRIP_FP4) multiply_pages<StripFp4, 1088>(i, w, e, first, last, x, factors, acc);
  else if (i.format == STRIP_FP8) multiply_pages<StripFp8, 2064>(i, w, e, first, last, x, factors, acc);
  else if (i.format == STRIP_BF16) multiply_pages<StripBf16, 4096>(i, w, e, first, last, x, factors, acc);
  else multiply_pages<StripF32, 8192>(i, w, e, first, last, x, factors, acc);
}
// The tile's sums, [row][token], for all consumers; the caller synchronises before the next tile.
DEV const float (*reduce_tile(const Instr& i, const float (&acc)[4]))[TOKENS + 1] {
  ResidentShared* s = shared();
  const int group = dev::tid() / GROUP_THREADS, t = dev::tid() % GROUP_THREADS, row = t / 32 * 16 + t % 32 / 4, token = t % 4 * 2;
  const float unit = strip_unit(i.format);
  if (group == 1) { s->red[1][row][token] = acc[0]; s->red[1][row][token + 1] = acc[1]; s->red[1][row + 8][token] = acc[2]; s->red[1][row + 8][token + 1] = acc[3]; }
  consumers_sync();
  if (group == 0) {
    s->red[0][row][token] = (acc[0] + s->red[1][row][token]) * unit; s->red[0][row][token + 1] = (acc[1] + s->red[1][row][token + 1]) * unit;
    s->red[0][row + 8][token] = (acc[2] + s->red[1][row + 8][token]) * unit; s->red[0][row + 8][token + 1] = (acc[3] + s->red[1][row + 8][token + 1]) * unit;
  }
  consumers_sync();
  return s->red[0];
}

// Rows to f32 [part][token][rows]; the norm's factor joins in except for the router, whose reader adds parts first.
DEV void store_tile(const StepArgs& a, const Instr& i, const float (*tile)[TOKENS + 1], int t, int part) {
  const int token = consumer_warp(), height = i.strips * 16, rows = i.tiles * height;
  if (token >= a.state->rows) return;
  const float scale = i.op == DO_ROUTER ? 1.0f : shared()->rms[token];
  float* out = (float*)i.out + ((uint64_t)part * TOKENS + token) * rows + t * height;
  for (int r = dev::tid() % 32; r < height; r += 32) out[r] = tile[r][token] * scale;
}
// Rows of a sum over ranks: pushed to every rank as they are.
DEV void push_tile(const StepArgs& a, const Instr& i, const float (*tile)[TOKENS + 1], int t, int step) {
  const int token = consumer_warp(), lane = dev::tid() % 32, k = t * i.strips * 16 + lane * 2;
  if (token >= a.state->rows || lane >= i.strips * 8 || k >= i.hidden) return;
  const float v[3] = {tile[lane * 2][token], tile[lane * 2 + 1][token], 0.0f};
  all_reduce_push(inboxes(a), epoch_of(a, step, i.index), token * (i.hidden_padded / 2) + k / 2, v);
}
// 32 inner columns of a slot's rows: the gate row of column c is 16 (c / 8) + c % 8, its up row 8 further.
DEV void swiglu_tile(const Instr& i, const float (*tile)[TOKENS + 1], int slot, int t) {
  ResidentShared* s = shared();
  const int token = consumer_warp(), lane = dev::tid() % 32, row = lane / 8 * 16 + lane % 8, pair = s->pair[slot][token], k = t * 32 + lane;
  if (pair < 0) return;
  const float v = round_bf16(swiglu(tile[row][token] * s->rms[token], tile[row + 8][token] * s->rms[token]));
  const float scale = split_scale(dev::number(dev::max_warp(dev::bits(dev::abs_(v)))));
  uint32_t hi, lo; split_pair(v, 0.0f, scale, hi, lo);
  uint8_t* inner = (uint8_t*)i.out + (uint64_t)pair * i.pair_bytes;
  inner[k] = (uint8_t)hi; inner[i.inner_padded + k] = (uint8_t)lo;
  if (lane == 0) ((float*)(inner + 2 * i.inner_padded))[t] = 1.0f / scale;
}
DEV void logits_tile(const StepArgs& a, const Instr& i, const float (*tile)[TOKENS + 1], int t, Best& best) {
  const int token = consumer_warp(), height = i.strips * 16;
  for (int r = dev::tid() % 32; r < height && token < a.state->rows; r += 32) {
    Best b; b.value = tile[r][token] * shared()->rms[token]; b.token = i.first_token + t * height + r;
    if (t * height + r < i.rows) best = better(best, b);
  }
  store_tile(a, i, tile, t, 0);
}
DEV void store_best(const Instr& i, Best best) {
  for (int m = 16; m; m >>= 1) { Best b; b.value = dev::shuffle_xor(best.value, m); b.token = (int)dev::shuffle_xor((uint32_t)best.token, m); best = better(best, b); }
  if (dev::tid() % 32 == 0) ((Best*)i.bests)[dev::cta() * TOKENS + consumer_warp()] = best;
}

// QKV, o_proj, router, lm_head.
DEV void linear_op(const StepArgs& a, const Instr& i, Walk& w) {
  const uint8_t* x = shared()->x; const float* factors = (const float*)(x + (uint64_t)i.blocks * 2048);
  const int pages = (i.blocks + i.page_blocks - 1) / i.page_blocks;
  Best best; best.value = -3.4e38f; best.token = 0x7fffffff;
  for (int u = dev::cta(); u < i.tiles * i.parts; u += dev::ctas()) {
    const int t = u / i.parts, part = u % i.parts;
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply(i, w, 0, pages * part / i.parts, pages * (part + 1) / i.parts, x, factors, acc);
    const auto tile = reduce_tile(i, acc);
    if (i.op == DO_O_PROJ) push_tile(a, i, tile, t, w.step); else if (i.op == DO_LM_HEAD) logits_tile(a, i, tile, t, best); else store_tile(a, i, tile, t, part);
  }
  if (i.op == DO_LM_HEAD) store_best(i, best);
}
DEV void gate_up_op(const Instr& i, Walk& w) {
  const uint8_t* x = shared()->x; const float* factors = (const float*)(x + (uint64_t)i.blocks * 2048);
  const int pages = (i.blocks + i.page_blocks - 1) / i.page_blocks, units = shared()->count * i.tiles;
  for (int u = dev::cta(); u < units; u += dev::ctas()) {
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply(i, w, shared()->list[u / i.tiles], 0, pages, x, factors, acc);
    swiglu_tile(i, reduce_tile(i, acc), u / i.tiles, u % i.tiles);
  }
}
// Builds the operands of slots first .. end from the rows of Inner: a row without the expert gets zeros.
DEV void assemble_zeros(const Instr& i, int first, int end) {
  const uint32_t zero[4] = {0, 0, 0, 0};
  const int pieces = (end - first) * i.blocks * 136;
  for (int n = dev::tid(); n < pieces; n += CONSUMERS) dev::store16(shared()->x + n * 16, zero);
}
// A warp takes every eighth row of Inner; loads of four rows are in flight before the first is stored.
DEV void assemble_rows(const StepArgs& a, const Instr& i, int first, int end) {
  ResidentShared* s = shared();
  const int lane = dev::tid() % 32, pieces = i.blocks * 16, active = i.experts > 0 ? i.active : 1, pairs = a.state->rows * active;
  const uint32_t slot_bytes = i.blocks * 128 * 17;
  for (int begin = consumer_warp(); begin < pairs; begin += 32) for (int piece = lane; piece < pieces; piece += 32) {
    uint32_t v[4][4]; float factor[4]; int slot[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const int pair = begin + 8 * j;
      slot[j] = pair < pairs ? s->slot[pair] : -1;
      if (slot[j] < first || slot[j] >= end) { slot[j] = -1; continue; }
      const uint8_t* inner = (const uint8_t*)i.x + (uint64_t)pair * i.pair_bytes;
      dev::load16(inner + (piece & 1) * i.inner_padded + piece / 2 * 16, v[j]);
      factor[j] = piece < i.blocks * 4 ? ((const float*)(inner + 2 * i.inner_padded))[piece] : 0.0f;
    }
    UNROLL for (int j = 0; j < 4; j++) {
      if (slot[j] < 0) continue;
      const int row = (begin + 8 * j) / active;
      uint8_t* to = s->x + (slot[j] - first) * slot_bytes;
      dev::store16(to + piece * 128 + row * 16, v[j]);
      if (piece < i.blocks * 4) ((float*)(to + i.blocks * 2048))[piece * TOKENS + row] = s->weight[slot[j]][row] * factor[j];
    }
  }
  dev::fence_async();
}
DEV void down_op(const StepArgs& a, const Instr& i, Walk& w) {
  ResidentShared* s = shared();
  const int pages = (i.blocks + i.page_blocks - 1) / i.page_blocks, slot_bytes = i.blocks * 128 * 17, chunk = a.x_bytes / slot_bytes;
  for (int t = dev::cta(); t < i.tiles; t += dev::ctas()) {
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int first = 0; first < s->count; first += chunk) {
      const int end = first + chunk < s->count ? first + chunk : s->count;
      consumers_sync();
      assemble_zeros(i, first, end);
      consumers_sync();
      assemble_rows(a, i, first, end);
      consumers_sync();
      for (int slot = first; slot < end; slot++) {
        const uint8_t* x = s->x + (slot - first) * slot_bytes;
        multiply(i, w, s->list[slot], 0, pages, x, (const float*)(x + i.blocks * 2048), acc);
      }
    }
    push_tile(a, i, reduce_tile(i, acc), t, w.step);
  }
}

DEV void stamp(const StepArgs& a, int n, int which) { if (a.stamps && dev::tid() == 0) a.stamps[((uint64_t)dev::cta() * a.instructions + n) * 3 + which] = dev::cycles(); }

DEV void execute(const StepArgs& a, const Instr& i, Walk& w) {
  const bool units = dev::cta() < i.tiles * i.parts;
  if (i.op == DO_EMBED) embed_op(a, i);
  else if (i.op == DO_ATTENTION) attention_op(a, i);
  else if (i.op == DO_ALL_REDUCE) all_reduce_op(a, i, w.step);
  else if (i.op == DO_CHOOSE) choose_op(a, i, w.step);
  else if (i.op == DO_GATE_UP) gate_up_op(i, w);
  else if (i.op == DO_DOWN) down_op(a, i, w);
  else if (units || i.op == DO_LM_HEAD) linear_op(a, i, w);
}
// What has to be there before the op itself: activations in shared memory, the norm's factors, the routing.
DEV void prepare(const StepArgs& a, const Instr& i, Walk& w) {
  if (i.stage) stage(i, w);
  if (i.squares && i.op != DO_EMBED && i.op != DO_ALL_REDUCE) rms_rows(i);
  if (i.op == DO_GATE_UP) { if (i.experts > 0) route_rows(a, i); else route_dense(a); }
}
DEV void consumer_walk(const StepArgs& a) {
  ResidentShared* s = shared();
  Walk w;
  for (; w.step < a.steps; w.step++) for (int n = 0; n < a.instructions; n++) {
    const Instr& i = a.program[n];
    if (dev::tid() == 0) { s->place.instruction = n; s->place.step = w.step; }
    stamp(a, n, 0);
    if (i.wait >= 0) wait_for(a, i.wait, w.step, i.op == DO_EMBED);
    prepare(a, i, w);
    stamp(a, n, 1);
    execute(a, i, w);
    arrive(a, n);
    stamp(a, n, 2);
  }
}
DEV void resident_init(const StepArgs& a) {
  ResidentShared* s = shared();
  dev::mbar_init(&s->staged, 1); dev::mbar_init(&s->listed, 1);
  for (int g = 0; g < 2; g++) for (int k = 0; k < RING_STAGES; k++) { dev::mbar_init(&s->full[g][k], 1); dev::mbar_init(&s->empty[g][k], GROUP_THREADS / 32); }
  dev::mbar_init_fence();
  dev::fault_record = a.fault;
}
DEV void resident_body(const StepArgs& a) {
  if (dev::tid() == 0) resident_init(a);
  dev::bar_sync(0, RESIDENT_THREADS);
  if (dev::tid() >= CONSUMERS) { if (dev::tid() % 32 == 0) loader_walk(a); } else consumer_walk(a);
}
