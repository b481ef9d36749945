// The products of the resident kernel and their epilogues, and the walk that ties all ops together.
#pragma once
#include "resident_draft.cuh"

// ---- A warpgroup's blocks of a tile, in order
// Pages first .. last of expert list[slot] (of `down`: of the first `slots`), of which this warpgroup takes one in GROUPS.
struct Blocks {
  PageShape shape; int strip_at, mine, group, first, last, slot, slots, columns, stages, page_bytes; bool routed;
  const uint8_t* x; const float* factors; uint32_t staging; bool staged;  // staged: pieces of x may still be on their way
  DEV void wait(const Walk& w, int end) const {
    ResidentShared* s = shared();
    if (staged && !PLANTED(NO_STAGE_WAIT)) { const int piece = (end - 1) / PIECE_BLOCKS; dev::mbar_wait(&s->staged[0], staging); dev::mbar_wait(&s->staged[piece < STAGE_PIECES ? piece : STAGE_PIECES - 1], staging); }
    dev::mbar_wait(&s->full[group][w.at.stage], w.at.fill);
  }
  // Block `n` of the page that begins with block `begin` of the tile and lies at `from`.
  template <int C> DEV Operand<C> operand(const uint8_t* from, int begin, int n, int column) const {
    const int side = C ? C : columns;
    Operand<C> o; o.weights = from + n * shape.block_bytes; o.columns = side;
    o.x = x + (begin + n) * 256 * side + column * 16; o.factors = factors + (begin + n) * 4 * side + column;
    return o;
  }
};
// This warp has the page's weights in registers.
DEV void give_back(const Blocks& b, const Walk& w) { page_read(&shared()->empty[b.group][w.at.stage]); }
// acc += blocks of a page by wgmma. Two products are under way at a time; an odd last one is multiplied twice and counted once, so
// that wgmma's registers are never touched under a condition.
template <class F> DEV void multiply_page(const Blocks& b, const Walk& w, const uint8_t* from, int begin, int n, float (&acc)[4]) {
  for (int k = 0; k < n; k += 2) {
    StripHeld even, odd;
    const Operand<TOKENS> first = b.operand<TOKENS>(from, begin, k, 0), second = b.operand<TOKENS>(from, begin, k + 1 < n ? k + 1 : k, 0);
    F::load(even, first, b.mine); F::load(odd, second, b.mine);
    dev::mma_begin();
    F::issue(even, first); F::issue(odd, second);
    if (k + 2 >= n) give_back(b, w);
    F::template wait<1>(even); F::end(even, first, acc);
    F::template wait<0>(odd); if (k + 1 < n) F::end(odd, second, acc);
  }
}
// acc += blocks of a page whose products finish where they begin, one after the other.
template <class F> DEV void add_page(const Blocks& b, const Walk& w, const uint8_t* from, int begin, int n, float (&acc)[4]) {
  ROLLED for (int k = 0; k < n; k++) {
    StripHeld held;
    const Operand<TOKENS> operand = b.operand<TOKENS>(from, begin, k, 0);
    F::load(held, operand, b.mine);
    if (k + 1 == n) give_back(b, w);
    F::end(held, operand, acc);
  }
}
// acc += this warpgroup's pages of one expert's tile.
template <class F> DEV void run_blocks(const Blocks& b, Walk& w, float (&acc)[4]) {
  ResidentShared* s = shared();
  const PageShape& shape = b.shape;
  const int e = b.routed ? s->list[b.slot] : 0;
  for (int page = b.first + (b.group + GROUPS - (e * shape.pages + b.first) % GROUPS) % GROUPS; page < b.last; page += GROUPS) {
    const int begin = page * shape.page_blocks, n = shape.blocks - begin < shape.page_blocks ? shape.blocks - begin : shape.page_blocks;
    b.wait(w, begin + n);
    const uint8_t* from = s->pages[b.group] + w.at.stage * b.page_bytes + b.strip_at;
    if constexpr (F::ASYNC) multiply_page<F>(b, w, from, begin, n, acc);
    else add_page<F>(b, w, from, begin, n, acc);
    w.at.next(b.stages);
  }
}
// Warps that share a strip of 16-bit weights, 1 where wgmma multiplies or strips do not divide the warps.
DEV int strip_shares(const Instr& i) { return i.format >= STRIP_BF16 && i.strips != 3 ? 4 / i.strips : 1; }
DEV Blocks blocks_of(const StepArgs& a, const Instr& i, const Walk& w) {
  const int warp = dev::tid_anew() % GROUP_THREADS / 32, shares = strip_shares(i), strip = shares > 1 ? warp % i.strips : warp < i.strips ? warp : i.strips - 1;
  Blocks b; b.mine = shares == 1 ? 15 : shares == 2 ? 5 << (warp / i.strips) : 1 << (warp / i.strips); b.shape = page_shape(i); b.strip_at = strip * strip_bytes(i.format); b.group = dev::tid() / GROUP_THREADS;
  b.first = 0; b.last = b.shape.pages; b.slots = 1; b.columns = TOKENS; b.stages = stages_of(a); b.page_bytes = RING_BYTES / stages_of(a);
  b.x = shared()->x; b.factors = (const float*)(b.x + (uint64_t)i.blocks * 2048); b.staging = w.stagings; b.staged = true; b.routed = false;
  b.slot = 0;
  return b;
}
// acc += pages first .. last of a tile, for columns that are the step's rows.
DEV void multiply(const Instr& i, Walk& w, const Blocks& b, float (&acc)[4]) {
  if (i.format == STRIP_FP4) run_blocks<StripFp4Even>(b, w, acc);
  else if (i.format == STRIP_FP8) run_blocks<StripFp8Even>(b, w, acc);
  else if (i.format == STRIP_BF16) run_blocks<StripBf16>(b, w, acc);
  else run_blocks<StripF32>(b, w, acc);
}
// ---- `down`: all experts of a tile
// The lowest rows of `rows` that follow each other: in Inner they lie as they do in the result.
DEV uint32_t first_run(uint32_t rows) { return rows & ~(rows + (rows & (0u - rows))); }
// Column of Inner at which a product has to begin for the rows of `run` to come out in their places.
DEV int run_column(int slot, uint32_t run) {
  const uint32_t below = (run & (0u - run)) - 1u;
  return shared()->first[slot] + dev::count_bits(shared()->mask[slot] & below) - dev::count_bits(below);
}
// acc += a page of an expert's `down` for the rows that have it, whose weights are in the factors: a product for each run of them, with
// the page's weights in registers.
template <class F> DEV void down_page(const Blocks& b, const Walk& w, const uint8_t* from, int begin, int n, int slot, float (&acc)[4]) {
  const uint32_t mask = shared()->mask[slot];
  ROLLED for (int k = 0; k < n; k += F::ASYNC ? 2 : 1) {
    StripHeld even, odd; const int next = k + 1 < n ? k + 1 : k; const bool last = k + (F::ASYNC ? 2 : 1) >= n;
    if constexpr (F::ASYNC) { F::load(even, b.operand<0>(from, begin, k, 0), b.mine); F::load(odd, b.operand<0>(from, begin, next, 0), b.mine); if (last) give_back(b, w); }
    ROLLED for (uint32_t rest = mask; rest;) {
      const uint32_t run = first_run(rest); const int column = run_column(slot, run);
      const Operand<0> first = b.operand<0>(from, begin, k, column), second = b.operand<0>(from, begin, next, column);
      if constexpr (F::ASYNC) {
        dev::mma_begin();
        F::issue(even, first); F::issue(odd, second);
        F::template wait<1>(even); F::end(even, first, acc, run);
        F::template wait<0>(odd); if (k + 1 < n) F::end(odd, second, acc, run);
      } else { F::load(even, first, b.mine); F::end(even, first, acc, run); }
      rest &= ~run;
    }
    if (!F::ASYNC && last) give_back(b, w);
  }
}
// acc += all experts of a tile of `down`.
template <class F> DEV void down_blocks(const Blocks& b, Walk& w, float (&acc)[4]) {
  ResidentShared* s = shared();
  const PageShape& shape = b.shape;
  ROLLED for (int slot = 0; slot < b.slots; slot++) {
    const int e = b.routed ? s->list[slot] : 0;
    ROLLED for (int page = (b.group + GROUPS - e * shape.pages % GROUPS) % GROUPS; page < shape.pages; page += GROUPS) {
      const int begin = page * shape.page_blocks, n = shape.blocks - begin < shape.page_blocks ? shape.blocks - begin : shape.page_blocks;
      b.wait(w, begin + n);
      down_page<F>(b, w, s->pages[b.group] + w.at.stage * b.page_bytes + b.strip_at, begin, n, slot, acc);
      w.at.next(b.stages);
    }
  }
}

// ---- A finished tile: the warpgroups' sums, [row][token]
struct Tile {
  const float (*red)[64][TOKENS + 1]; float unit; int height;  // height: rows after which the next share of a strip follows
  DEV float at(int row, int token) const {
    float sum = 0.0f;
    for (int r = row; r < 64; r += height) UNROLL for (int g = 0; g < GROUPS; g++) sum += red[g][r][token];
    return sum * unit;
  }
};
// For all consumers; valid until the next but one.
DEV Tile reduce_tile(const Instr& i, Walk& w, const float (&acc)[4]) {
  ResidentShared* s = shared();
  const int t = dev::tid_anew() % GROUP_THREADS, row = t / 32 * 16 + t % 32 / 4, token = t % 4 * 2;
  float (*red)[64][TOKENS + 1] = s->red[w.turn++ & 1], (*own)[TOKENS + 1] = red[dev::tid() / GROUP_THREADS];
  own[row][token] = acc[0]; own[row][token + 1] = acc[1]; own[row + 8][token] = acc[2]; own[row + 8][token + 1] = acc[3];
  consumers_sync();
  Tile tile; tile.red = red; tile.unit = strip_unit(i.format); tile.height = strip_shares(i) > 1 ? i.strips * 16 : 64;
  return tile;
}

// Rows to f32 [part][token][rows]; the norm's factor joins in except for the router, whose reader adds parts first.
DEV void store_tile(const Walk& w, const Instr& i, const Tile& tile, int t, int part) {
  const int thread = dev::tid_anew(), token = thread / 32, height = i.strips * 16, rows = i.tiles * height;
  if (token >= w.rows) return;
  const float scale = i.op == DO_ROUTER ? 1.0f : shared()->rms[token];
  float* out = (float*)i.out + ((uint64_t)part * TOKENS + token) * rows + t * height;
  const float* bias = (const float*)i.bias;
  for (int r = thread % 32; r < height; r += 32) out[r] = tile.at(r, token) * scale + (bias ? bias[t * height + r] : 0.0f);
}
// Rows of a sum over ranks: pushed to every rank as they are.
DEV void push_tile(const StepArgs& a, const Instr& i, const Walk& w, const Tile& tile, int t) {
  const int thread = dev::tid_anew(), token = thread / 32, lane = thread % 32, k = t * i.strips * 16 + lane * 2;
  if (token >= w.rows || lane >= i.strips * 8 || k >= i.hidden) return;
  const float *bias = (const float*)i.bias, v[3] = {tile.at(lane * 2, token) + (bias ? bias[k] : 0.0f), tile.at(lane * 2 + 1, token) + (bias ? bias[k + 1] : 0.0f), 0.0f};
  all_reduce_push(inboxes(a), epoch_of(a, w.step, i.index), token * (i.hidden_padded / 2) + k / 2, v);
}
// 32 inner columns of a slot's rows: the gate row of column c is 16 (c / 8) + c % 8, its up row 8 further.
DEV void swiglu_tile(const Instr& i, const Tile& tile, int slot, int t) {
  ResidentShared* s = shared();
  const int thread = dev::tid_anew(), token = thread / 32, lane = thread % 32, row = lane / 8 * 16 + lane % 8, k = t * 32 + lane, columns = i.pair_columns;
  const uint32_t mask = s->mask[slot];
  if (!(mask >> token & 1u)) return;
  const int column = s->first[slot] + dev::count_bits(mask & ((1u << token) - 1u));
  const float v = round_bf16(swiglu(tile.at(row, token) * s->rms[token], tile.at(row + 8, token) * s->rms[token]));
  const float scale = split_scale(dev::number(dev::max_warp(dev::bits(dev::abs_(v)))));
  uint32_t hi, lo; split_pair(v, 0.0f, scale, hi, lo);
  uint8_t* inner = (uint8_t*)i.out + (k / 16 * 2 * columns + column) * 16 + k % 16;
  inner[0] = (uint8_t)hi; inner[columns * 16] = (uint8_t)lo;
  if (lane == 0) ((float*)((uint8_t*)i.out + i.inner_padded * 2 * columns))[t * columns + column] = s->weight[slot][token] / scale;
}
DEV void logits_tile(const Walk& w, const Instr& i, const Tile& tile, int t, Best& best) {
  const int thread = dev::tid_anew(), token = thread / 32, height = i.strips * 16;
  for (int r = thread % 32; r < height && token < w.rows; r += 32) {
    Best b; b.value = tile.at(r, token) * shared()->rms[token]; b.token = i.first_token + t * height + r;
    if (t * height + r < i.rows) best = better(best, b);
  }
  store_tile(w, i, tile, t, 0);
}
DEV void store_best(const Instr& i, Best best) {
  for (int m = 16; m; m >>= 1) { Best b; b.value = dev::shuffle_xor(best.value, m); b.token = (int)dev::shuffle_xor((uint32_t)best.token, m); best = better(best, b); }
  if (dev::tid() % 32 == 0 && consumer_warp() < TOKENS) ((Best*)i.bests)[dev::cta() * TOKENS + consumer_warp()] = best;
}

// QKV, o_proj, router, lm_head, and the drafter's fc and context keys and values.
DEV void linear_op(const StepArgs& a, const Instr& i, Walk& w) {
  Blocks b = blocks_of(a, i, w);
  const int op = i.op, parts = i.parts, units = i.tiles * parts, pages = b.shape.pages;
  Best best; best.value = -3.4e38f; best.token = 0x7fffffff;
  for (int u = dev::cta(); u < units; u += dev::ctas()) {
    const int t = u / parts, part = u % parts;
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    b.first = pages * part / parts; b.last = pages * (part + 1) / parts;
    multiply(i, w, b, acc);
    const Tile tile = reduce_tile(i, w, acc);
    if (op == DO_O_PROJ || op == DO_FUSE) push_tile(a, i, w, tile, t); else if (op == DO_LM_HEAD) logits_tile(w, i, tile, t, best); else store_tile(w, i, tile, t, part);
  }
  if (op == DO_LM_HEAD) store_best(i, best);
}
DEV void gate_up_op(const StepArgs& a, const Instr& i, Walk& w) {
  Blocks b = blocks_of(a, i, w);
  const int tiles = i.tiles, units = shared()->count * tiles;
  b.routed = i.experts > 0; b.staged = i.stage != 0;
  for (int u = dev::cta(); u < units; u += dev::ctas()) {
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    b.slot = u / tiles;
    multiply(i, w, b, acc);
    swiglu_tile(i, reduce_tile(i, w, acc), u / tiles, u % tiles);
  }
}
DEV void down_op(const StepArgs& a, const Instr& i, Walk& w) {
  Blocks b = blocks_of(a, i, w);
  b.routed = i.experts > 0; b.slots = shared()->count; b.columns = i.pair_columns; b.staged = false;
  b.factors = (const float*)(b.x + (uint64_t)i.inner_padded * 2 * i.pair_columns);
  staged_all(w);
  for (int t = dev::cta(); t < i.tiles; t += dev::ctas()) {
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (i.format == STRIP_FP4) down_blocks<StripFp4>(b, w, acc);
    else if (i.format == STRIP_FP8) down_blocks<StripFp8>(b, w, acc);
    else if (i.format == STRIP_BF16) down_blocks<StripBf16>(b, w, acc);
    else down_blocks<StripF32>(b, w, acc);
    push_tile(a, i, w, reduce_tile(i, w, acc), t);
  }
}

DEV void stamp(const StepArgs& a, int n, int which) { if (a.stamps && dev::tid() == 0) a.stamps[((uint64_t)dev::cta() * a.instructions + n) * 3 + which] = dev::cycles(); }

DEV void execute(const StepArgs& a, const Instr& i, Walk& w) {
  const int op = i.op;
  if (op == DO_EMBED) embed_op(a, i, w.rows);
  else if (op == DO_ATTENTION) attention_op(a, i, w.rows, w.step);
  else if (op == DO_ALL_REDUCE) all_reduce_op(a, i, w.rows, epoch_of(a, w.step, i.index));
  else if (op >= DO_CHOOSE) draft_op(a, i, w.step);
  else if (op == DO_GATE_UP) gate_up_op(a, i, w);
  else if (op == DO_DOWN) down_op(a, i, w);
  else linear_op(a, i, w);
}
// What has to be there before the op itself: activations under way to shared memory, the norm's factors, the routing.
DEV void prepare(const StepArgs& a, const Instr& i, Walk& w) {
  if (i.op == DO_GATE_UP && i.experts > 0) { route_rows(a, i, w.rows, w.step); return; }
  if (i.wait >= 0 && i.op != DO_ATTENTION && i.op != DO_DRAFT_ATTENTION) wait_for(a, i.wait, w.step, false);
  if (i.op == DO_EMBED) { w.rows = a.state->rows; if (dev::tid() == 0) shared()->position = a.state->position; }
  if (i.op == DO_DRAFT_EMBED) w.rows = a.state->block;
  if (i.stage) stage(i);
  if (i.squares && i.op != DO_EMBED && i.op != DO_ALL_REDUCE && i.op != DO_DRAFT_EMBED && i.op != DO_CONTEXT) rms_rows(i);
  if (i.op == DO_GATE_UP) route_dense(w.rows);
}
// What bulk copies will read is written by these.
DEV bool feeds_copies(int op) { return op == DO_EMBED || op == DO_ATTENTION || op == DO_ALL_REDUCE || op == DO_GATE_UP || op == DO_DRAFT_EMBED || op == DO_DRAFT_ATTENTION || op == DO_CONTEXT; }
// Between two steps: all CTAs are through the last one, and know whether there is another.
DEV bool ended(const StepArgs& a, const Walk& w) {
  if (w.step == 0) return false;
  wait_for(a, a.instructions - 1, w.step, true);
  if (a.state->running) return false;
  dev::copies_wait();
  if (dev::tid() == 0) dev::say_stop(&shared()->stopped);
  return true;
}
DEV void consumer_walk(const StepArgs& a) {
  ResidentShared* s = shared();
  Walk w;
  fetch(a, 0, 0); dev::copies_wait(); consumers_sync();
  for (; w.step < a.steps && !ended(a, w); w.step++) for (int n = 0; n < a.instructions; n++, w.done++) {
    const Instr& i = s->instr[w.done & 1];
    fetch(a, n + 1 < a.instructions ? n + 1 : 0, w.done + 1);
    if (dev::tid() == 0) { s->place.instruction = n; s->place.step = w.step; }
    stamp(a, n, 0);
    const bool executed = n >= a.begin && n < a.end;
    if (executed) prepare(a, i, w);
    stamp(a, n, 1);
    if (executed) execute(a, i, w);
    if (executed && i.stage) { staged_all(w); w.stagings++; }
    arrive(a, n, feeds_copies(i.op));
    stamp(a, n, 2);
  }
}
DEV void resident_init(const StepArgs& a) {
  ResidentShared* s = shared();
  dev::mbar_init(&s->listed, 1); s->stopped = 0;
  for (int p = 0; p < STAGE_PIECES; p++) dev::mbar_init(&s->staged[p], 1);
  if (ranks_of(a) != a.ranks || stages_of(a) != a.ring_stages) dev::refuse();
  for (int g = 0; g < GROUPS; g++) for (int k = 0; k < a.ring_stages; k++) { dev::mbar_init(&s->full[g][k], 1); dev::mbar_init(&s->empty[g][k], PAGE_ARRIVALS); }
  dev::mbar_init_fence();
  dev::fault_record = a.fault;
}
DEV void resident_body(const StepArgs& a) {
  if (dev::tid() == 0) resident_init(a);
  dev::bar_sync(0, RESIDENT_THREADS);
  if (dev::tid() >= CONSUMERS) { dev::registers_less<56>(); if (dev::tid() == CONSUMERS) loader_walk(a); } else { dev::registers_more<GROUPS == 2 ? 224 : 152>(); consumer_walk(a); }
}
