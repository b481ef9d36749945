// The products of the resident kernel and their epilogues, and the walk that ties all ops together.
#pragma once
#include "resident_draft.cuh"

// ---- A warp's blocks of a tile
// All warps read every page. A warp has one strip of the tile for good (MXFP4: two, where it can, which share activations) and every
// `shares`th block of it (`down`: of an expert): who adds up what depends on no other row.
struct Blocks {
  PageShape shape; int strips, strip_at, share, shares, first, last, columns; bool staged;  // strips: of a warp; staged: pieces of x may still be on their way
  const uint8_t* x; const float* factors; uint32_t staging;
  // Activations of blocks before `end` are there; this warp's strips of the next page are.
  DEV void wait_staged(int end) const {
    if (!staged || PLANTED(NO_STAGE_WAIT)) return;
    const int piece = (end - 1) / PIECE_BLOCKS; dev::mbar_wait(&shared()->staged[0], staging); dev::mbar_wait(&shared()->staged[piece < STAGE_PIECES ? piece : STAGE_PIECES - 1], staging);
  }
  DEV const uint8_t* wait(const Walk& w) const {
    dev::mbar_wait(&shared()->full[w.at.stage], w.at.fill);
    return shared()->pages[w.at.stage] + strip_at;
  }
};
// This warp is done with the page.
DEV void give_back(Walk& w) { page_read(&shared()->empty[w.at.stage]); w.at.next(RING_STAGES); }
template <class I> DEV Blocks blocks_of(const I& i, const Walk& w) {
  const int warp = dev::tid_anew() / 32;
  Blocks b; b.shape = page_shape(i); b.strips = i.format == STRIP_FP4 && i.op != DO_DOWN && i.strips % StripFp4::PAIRED == 0 ? StripFp4::PAIRED : 1;
  const int groups = i.strips / b.strips;
  b.shares = WARPS / groups; b.share = warp / groups; b.strip_at = warp % groups * b.strips * strip_bytes(i.format);
  b.first = 0; b.last = b.shape.pages; b.columns = TOKENS; b.staged = true; b.staging = w.stagings;
  b.x = shared()->x; b.factors = (const float*)(b.x + (uint64_t)i.blocks * BLOCK_COLUMNS * x_column_bytes(TOKENS));
  return b;
}
// Pieces of strip-blocks that follow each other.
template <class F, int STRIPS> DEV void load_pieces(const uint8_t* block, int lane, typename F::Piece (&pieces)[STRIPS][F::PIECES]) {
  UNROLL for (int k = 0; k < STRIPS; k++) UNROLL for (int j = 0; j < F::PIECES; j++) pieces[k][j] = F::load(block + k * F::BYTES, j, lane);
}
// acc += this warp's blocks of pages first .. last of a tile, for columns that are the step's rows.
template <class F, int STRIPS> DEV void run_blocks(const Blocks& b, Walk& w, float (&acc)[2][4]) {
  const PageShape& shape = b.shape;
  const int lane = dev::tid_anew() % 32; const uint8_t* x = b.x + lane * 16; const float* factors = b.factors + lane % 4 * 2;
  const int first = b.first * shape.page_blocks;
  int block = first + (b.share + b.shares - first % b.shares) % b.shares;
  ROLLED for (int page = b.first; page < b.last; page++) {
    const int begin = page * shape.page_blocks, end = begin + shape.page_blocks < shape.blocks ? begin + shape.page_blocks : shape.blocks;
    b.wait_staged(end);
    const uint8_t* from = b.wait(w);
    ROLLED for (; block < end; block += b.shares) {
      Operand<TOKENS> o; o.lane = lane; o.x = x + block * BLOCK_COLUMNS * x_column_bytes(TOKENS); o.factors = factors + block * 4 * TOKENS;
      typename F::Piece pieces[STRIPS][F::PIECES]; load_pieces<F>(from + (block - begin) * shape.block_bytes, lane, pieces);
      F::template add<STRIPS>(o, pieces, acc);
    }
    give_back(w);
  }
}
// The same where a page has one block for every warp.
template <class F, int STRIPS> DEV void run_even_blocks(const Blocks& b, Walk& w, float (&acc)[2][4]) {
  const int at = b.share * b.shape.block_bytes, step = b.shares, last = b.last * step;
  int block = b.first * step + b.share;
  Operand<TOKENS> o; o.lane = dev::tid_anew() % 32; o.x = b.x + o.lane * 16 + block * BLOCK_COLUMNS * x_column_bytes(TOKENS); o.factors = b.factors + o.lane % 4 * 2 + block * 4 * TOKENS;
  ROLLED for (; block < last; block += step, o.x += step * BLOCK_COLUMNS * x_column_bytes(TOKENS), o.factors += step * 4 * TOKENS) {
    typename F::Piece pieces[STRIPS][F::PIECES]; load_pieces<F>(b.wait(w) + at, o.lane, pieces);
    if (F::HELD) give_back(w);
    b.wait_staged(block + step - b.share);
    F::template add<STRIPS>(o, pieces, acc);
    if (!F::HELD) give_back(w);
  }
}
template <class F, int STRIPS> DEV void run_tile(const Blocks& b, Walk& w, float (&acc)[2][4]) {
  if (b.shape.page_blocks == b.shares && b.shape.pages * b.shares == b.shape.blocks) run_even_blocks<F, STRIPS>(b, w, acc);
  else run_blocks<F, STRIPS>(b, w, acc);
}
template <class I> DEV void multiply(const I& i, Walk& w, const Blocks& b, float (&acc)[2][4]) {
  if (i.format == STRIP_FP4 && b.strips == StripFp4::PAIRED) run_tile<StripFp4, StripFp4::PAIRED>(b, w, acc);
  else if (i.format == STRIP_FP4) run_blocks<StripFp4, 1>(b, w, acc);
  else if (i.format == STRIP_FP8) run_tile<StripFp8, 1>(b, w, acc);
  else if (i.format == STRIP_BF16) run_blocks<StripBf16<1>, 1>(b, w, acc);
  else run_blocks<StripBf16<2>, 1>(b, w, acc);
}
// ---- `down`: all experts of a tile
// What a piece of an expert's columns is multiplied with, C of them: those of the expert's rows, and zeros for other rows. The rows' weights
// are in the factors.
template <class F, int C> DEV Operand<C> inner_operand(const Blocks& b, const uint16_t* of, int piece, int lane) {
  Operand<C> o; o.lane = lane; o.columns = b.columns;
  const int group = piece * (4 / F::PIECES); const uint32_t both = *(const uint32_t*)(of + lane % 4 * 2), first = both & 0xffffu;
  o.x = b.x + lane % 4 * 16 + group * 32 * x_column_bytes(o.stride()) + of[lane / 4] * 8;
  o.factors = (const float*)((const uint8_t*)(b.factors + group * o.stride()) + first); o.second = (int)(both >> 16) - (int)first;
  return o;
}
// A warp has every `shares`th piece of every expert, or, where an expert has fewer pieces, one piece of every expert in its
// class; warps that are left over have none.
static const int DOWN_TOGETHER = 4;  // pieces side by side: their loads and products do not wait for each other
template <class F, int C> DEV void down_blocks(const Blocks& b, Walk& w, bool routed, float (&acc)[4]) {
  ResidentShared* s = shared();
  const PageShape& shape = b.shape;
  const int slots = routed ? s->count : 1, lane = dev::tid_anew() % 32, pieces = shape.blocks * F::PIECES, few = pieces < b.shares ? pieces : b.shares;
  const int classes = b.shares / few, own = b.share / few < classes ? b.share / few : -1, each = b.share % few, own_pieces = pieces / few;
  const bool all = own == 0 && classes == 1 && shape.pages == 1 && own_pieces * few == pieces && shape.together * own_pieces == DOWN_TOGETHER;  // a page has so many of this warp
  ROLLED for (int slot = 0; slot < slots; slot += shape.together) {
    const int n = slots - slot < shape.together ? slots - slot : shape.together;
    int piece = each;
    ROLLED for (int page = 0; page < shape.pages; page++) {
      const int begin = page * shape.page_blocks, end = begin + shape.page_blocks < shape.blocks ? begin + shape.page_blocks : shape.blocks;
      const uint8_t* from = b.wait(w);
      if (all && n == shape.together) {
        typename F::Piece pieces[DOWN_TOGETHER];
        UNROLL for (int j = 0; j < DOWN_TOGETHER; j++) { const int p = each + j % own_pieces * few; pieces[j] = F::load(from + j / own_pieces * shape.tile_bytes + p / F::PIECES * shape.block_bytes, p % F::PIECES, lane); }
        if (F::HELD) give_back(w);
        UNROLL for (int j = 0; j < DOWN_TOGETHER; j++) F::inner(inner_operand<F, C>(b, s->column[slot + j / own_pieces], each + j % own_pieces * few, lane), pieces[j], acc);
        if (F::HELD) continue;
      } else ROLLED for (int k = 0; k < n; k++) {
        if (own < 0 || (classes > 1 && s->list[slot + k] % classes != own)) continue;
        ROLLED for (piece = n > 1 ? each : piece; piece < end * F::PIECES; piece += few)
          F::inner(inner_operand<F, C>(b, s->column[slot + k], piece, lane), F::load(from + k * shape.tile_bytes + (piece / F::PIECES - begin) * shape.block_bytes, piece % F::PIECES, lane), acc);
      }
      give_back(w);
    }
  }
}

// ---- A finished tile: the warps' sums, [share][row][token]
struct Tile {
  const float (*red)[TOKENS + 1]; float unit; int height, rows;  // height: rows after which the next share of the tile follows
  DEV float at(int row, int token) const {
    float sum = 0.0f;
    for (int r = row; r < rows; r += height) sum += red[r][token];
    return sum * unit;
  }
};
// For all consumers; valid until the next. `pages`: how many this warp has had of this instruction since the last tile. With more than the ring
// holds, every warp is through with that tile: the loader has waited for all of them to give back a page that came after it.
static const int MANY_PAGES = 1 << 20;
template <class I> DEV Tile reduce_tile(const I& i, int strips, int pages, const float (&acc)[2][4]) {
  const int t = dev::tid_anew(), token = t % 4 * 2;
  if (pages <= RING_STAGES || ALL_SAY) consumers_sync();
  Tile tile; tile.red = shared()->red; tile.unit = strip_unit(i.format); tile.height = i.strips * 16; tile.rows = WARPS * 16 * strips;
  UNROLL for (int k = 0; k < 2; k++) {
    if (k >= strips) continue;
    float* red = (float*)tile.red[(t / 32 * strips + k) * 16 + t % 32 / 4] + token;
    red[0] = acc[k][0]; red[1] = acc[k][1]; red[8 * (TOKENS + 1)] = acc[k][2]; red[8 * (TOKENS + 1) + 1] = acc[k][3];
  }
  consumers_sync();
  return tile;
}

// Rows to f32 [part][token][rows]; the norm's factor joins in except for the router, whose reader adds parts first.
template <class I> DEV void store_tile(const I& i, const Tile& tile, int t, int part) {
  const int thread = dev::tid_anew(), token = thread / 32, height = i.strips * 16, rows = i.tiles * height;
  if (token >= rows_now()) return;
  const float scale = i.op == DO_ROUTER ? 1.0f : shared()->rms[token];
  float* out = (float*)i.out + ((uint64_t)part * TOKENS + token) * rows + t * height;
  const float* bias = (const float*)i.bias;
  for (int r = thread % 32; r < height; r += 32) out[r] = tile.at(r, token) * scale + (bias ? bias[t * height + r] : 0.0f);
}
// Rows of a sum over ranks: pushed to every rank as they are.
template <class I> DEV void push_tile(const StepArgs& a, const I& i, const Tile& tile, int t) {
  const int thread = dev::tid_anew(), token = thread / 32, lane = thread % 32, k = t * i.strips * 16 + lane * 2;
  if (token >= rows_now() || lane >= i.strips * 8 || k >= i.hidden) return;
  const float *bias = (const float*)i.bias, v[3] = {tile.at(lane * 2, token) + (bias ? bias[k] : 0.0f), tile.at(lane * 2 + 1, token) + (bias ? bias[k + 1] : 0.0f), 0.0f};
  all_reduce_push(inboxes(a), epoch_of(a, step_now(), i.index), token * (i.hidden_padded / 2) + k / 2, v);
}
// 32 inner columns of a slot's rows: the gate row of column c is 16 (c / 8) + c % 8, its up row 8 further.
template <class I> DEV void swiglu_tile(const I& i, const Tile& tile, int slot, int t) {
  ResidentShared* s = shared();
  const int thread = dev::tid_anew(), token = thread / 32, lane = thread % 32, row = lane / 8 * 16 + lane % 8, k = t * 32 + lane, columns = i.pair_columns;
  const uint32_t mask = s->mask[slot];
  if (!(mask >> token & 1u)) return;
  const int column = s->first[slot] + dev::count_bits(mask & ((1u << token) - 1u));
  const float v = rounded_activation(swiglu(tile.at(row, token) * s->rms[token], tile.at(row + 8, token) * s->rms[token]));
  const float scale = activation_scale(dev::number(dev::max_warp(dev::bits(dev::abs_(v)))));
  put_activations<uint16_t>((uint8_t*)i.out, columns, column, k, v * scale, 0.0f);
  if (lane == 0) ((float*)((uint8_t*)i.out + i.inner_padded * x_column_bytes(columns)))[(t / 2 * columns + column) * 2 + t % 2] = s->weight[slot][token] / scale;
}
template <class I> DEV void logits_tile(const I& i, const Tile& tile, int t, Best& best) {
  const int thread = dev::tid_anew(), token = thread / 32, height = i.strips * 16, rows = rows_now();
  for (int r = thread % 32; r < height && token < rows; r += 32) {
    Best b; b.value = tile.at(r, token) * shared()->rms[token]; b.token = i.first_token + t * height + r;
    if (t * height + r < i.rows) best = better(best, b);
  }
  store_tile(i, tile, t, 0);
}
DEV void store_best(const Instr& i, Best best) {
  for (int m = 16; m; m >>= 1) { Best b; b.value = dev::shuffle_xor(best.value, m); b.token = (int)dev::shuffle_xor((uint32_t)best.token, m); best = better(best, b); }
  if (dev::tid() % 32 == 0 && consumer_warp() < TOKENS) ((Best*)i.bests)[dev::cta() * TOKENS + consumer_warp()] = best;
}

// What a thread hands to the next CTA in the middle of a tile: its sums, in words that say themselves when they are there. The next
// layer's overwrite them, when all CTAs are long through this instruction.
DEV uint32_t baton_tag(const StepArgs& a) { return (uint32_t)((a.first_step + step_now()) * a.instructions + dev::again(shared()->place.instruction) + 1); }
DEV dev::Word* baton(const StepArgs& a, int cta) { const int t = dev::tid_anew(); return a.batons + cta * BATON_WORDS + t / 32 * (BATON_WORDS / WARPS) + t % 32; }
DEV void give_baton(const StepArgs& a, const float (&acc)[2][4]) {
  if (PLANTED(NO_BATON)) return;
  const uint32_t tag = baton_tag(a); dev::Word* to = baton(a, dev::cta());
  dev::put(to, dev::bits(acc[0][0]), dev::bits(acc[0][1]), dev::bits(acc[0][2]), tag);
  dev::put(to + 32, dev::bits(acc[0][3]), dev::bits(acc[1][0]), dev::bits(acc[1][1]), tag);
  dev::put(to + 64, dev::bits(acc[1][2]), dev::bits(acc[1][3]), 0, tag);
}
DEV void take_baton(const StepArgs& a, float (&acc)[2][4]) {
  const uint32_t tag = baton_tag(a); const dev::Word* from = baton(a, dev::cta() - 1); uint32_t v[3][3];
  ROLLED for (;;) {  // as in all_reduce_collect
    int missing = -1;
    UNROLL for (int k = 2; k >= 0; k--) if (!dev::get(from + 32 * k, tag, v[k])) missing = k;
    if (missing < 0) break;
    uint32_t there[3]; dev::get_wait(from + 32 * missing, tag, there);
  }
  UNROLL for (int n = 0; n < 8; n++) acc[n / 4][n % 4] = dev::number(v[n / 3][n % 3]);
}
// QKV, o_proj, router, gate and up, lm_head, and the drafter's fc and context keys and values.
template <class I> DEV void linear_op(const StepArgs& a, const I& i, Walk& w) {
  Blocks b = blocks_of(i, w);
  const int op = i.op, parts = i.parts, pages = b.shape.pages;
  const Deal deal(op == DO_GATE_UP ? shared()->count * i.tiles : i.tiles * parts, pages, op == DO_GATE_UP);
  b.staged = i.stage != 0;
  Best best; best.value = -3.4e38f; best.token = 0x7fffffff;
  int since = MANY_PAGES;
  ROLLED for (int k = 0; k < deal.parts(); k++) {
    const Part p = deal.part(k);
    const int u = p.unit, t = op == DO_GATE_UP ? u % i.tiles : u / parts, part = op == DO_GATE_UP ? 0 : u % parts;
    float acc[2][4] = {};
    b.first = p.first; b.last = p.last;
    if (op != DO_GATE_UP) { b.first = pages * part / parts; b.last = pages * (part + 1) / parts; }
    if (p.takes) take_baton(a, acc);
    multiply(i, w, b, acc);
    b.staged = b.staged && b.last < pages; since += b.last - b.first;
    if (p.gives) { give_baton(a, acc); continue; }
    const Tile tile = reduce_tile(i, b.strips, since, acc);
    since = 0;
    if (op == DO_GATE_UP) swiglu_tile(i, tile, u / i.tiles, t);
    else if (op == DO_O_PROJ || op == DO_FUSE) push_tile(a, i, tile, t);
    else if (op == DO_LM_HEAD) logits_tile(i, tile, t, best);
    else store_tile(i, tile, t, part);
  }
  if (op == DO_LM_HEAD) store_best(i, best);
}
template <class I> DEV void down_op(const StepArgs& a, const I& i, Walk& w) {
  Blocks b = blocks_of(i, w);
  const bool routed = i.experts > 0;
  b.columns = i.pair_columns; b.staged = false;
  b.factors = (const float*)(b.x + (uint64_t)i.inner_padded * x_column_bytes(i.pair_columns));
  const int each = piece_bytes(), pieces = (i.stage_bytes + each - 1) / each;
  staged_first(w, pieces < STAGE_PIECES ? pieces : STAGE_PIECES);
  for (int t = dev::cta(); t < i.tiles; t += ctas()) {
    float acc[2][4] = {};
    if (i.format == STRIP_FP4 && b.columns == SLOTS_MAX + 1) down_blocks<StripFp4, INNER + SLOTS_MAX + 1>(b, w, routed, acc[0]);
    else if (i.format == STRIP_FP4) down_blocks<StripFp4, INNER>(b, w, routed, acc[0]);
    else if (i.format == STRIP_FP8) down_blocks<StripFp8, INNER>(b, w, routed, acc[0]);
    else if (i.format == STRIP_BF16) down_blocks<StripBf16<1>, INNER>(b, w, routed, acc[0]);
    else down_blocks<StripBf16<2>, INNER>(b, w, routed, acc[0]);
    push_tile(a, i, reduce_tile(i, b.strips, t < ctas() ? MANY_PAGES : 0, acc), t);
  }
}

template <class I> DEV void product_op(const StepArgs& a, const I& i) {
  Walk w = recall();
  if (i.op == DO_DOWN) down_op(a, i, w); else linear_op(a, i, w);
  if (i.stage) { staged_all(w); w.stagings++; }
  keep(w);
}

DEV void stamp(const StepArgs& a, int n, int which) { if (a.stamps && dev::tid() == 0) a.stamps[((uint64_t)dev::cta() * a.instructions + n) * 3 + which] = dev::cycles(); }

DEV void execute(const StepArgs& a, const Instr& i, int step) {
  const int op = i.op;
  if (op == DO_EMBED) embed_op(a, i, rows_now());
  else if (op == DO_ATTENTION) attention_op(a, i, rows_now());
  else if (op == DO_ALL_REDUCE) all_reduce_op(a, i, rows_now(), epoch_of(a, step, i.index));
  else if (op >= DO_CHOOSE) draft_op(a, i, step);
#define PRODUCT(TYPE, PASS, OP, ROUTED) else if (op == OP && (PASS < 0 || i.pass == PASS) && (i.experts > 0) == ROUTED) product_op(a, (const TYPE&)i);
  SHAPES_PRODUCTS(PRODUCT)
#if !defined(SHAPES_KNOWN)
  else product_op(a, i);
#endif
}
// What has to be there before the op itself: activations under way to shared memory, the norm's factors, the routing.
DEV void prepare(const StepArgs& a, const Instr& i) {
  if (i.op == DO_GATE_UP && i.experts > 0) { route_rows(a, i, rows_now()); return; }
  const bool waits = i.wait >= 0 && i.op != DO_ATTENTION && i.op != DO_DRAFT_ATTENTION, begins = i.op == DO_EMBED || i.op == DO_DRAFT_EMBED;
  if (waits) await_all(a, i.wait);
  if (begins && dev::tid() == 0) { shared()->rows = i.op == DO_EMBED ? a.state->rows : a.state->block; shared()->position = a.state->position; }
  if (waits || begins) consumers_sync();
  if (i.stage) stage(i);
  if (i.squares && i.op != DO_EMBED && i.op != DO_ALL_REDUCE && i.op != DO_DRAFT_EMBED && i.op != DO_CONTEXT) rms_rows(i);
  if (i.op == DO_GATE_UP) route_dense(rows_now());
}
// What bulk copies will read is written by these.
DEV bool feeds_copies(int op) { return op == DO_EMBED || op == DO_ATTENTION || op == DO_ALL_REDUCE || op == DO_GATE_UP || op == DO_DRAFT_EMBED || op == DO_DRAFT_ATTENTION || op == DO_CONTEXT || op == DO_APPEND; }
// Between two steps: all CTAs are through the last one, which `place` still names, and know whether there is another.
DEV bool ended(const StepArgs& a, int step) {
  if (step == 0) return false;
  wait_for(a, a.instructions - 1);
  if (a.state->running) return false;
  dev::copies_wait();
  if (dev::tid() == 0) dev::say_stop(&shared()->stopped);
  return true;
}
DEV void consumer_walk(const StepArgs& a) {
  ResidentShared* s = shared();
  fetch(a, 0, 0); dev::copies_wait(); consumers_sync();
  for (int step = 0; step < a.steps && !ended(a, step); step++) for (int n = 0; n < a.instructions; n++) {
    const uint32_t slot = (step * a.instructions + n) & 1;
    const Instr& i = s->instr[slot];
    fetch(a, n + 1 < a.instructions ? n + 1 : 0, slot + 1);
    if (dev::tid() == 0) { s->place.instruction = n; s->place.step = step; }
    stamp(a, n, 0);
    if (n >= a.begin && n < a.end) { prepare(a, i); stamp(a, n, 1); execute(a, i, step); } else stamp(a, n, 1);
    arrive(a, feeds_copies(dev::again(i.op)));
    stamp(a, n, 2);
  }
}
DEV void resident_init(const StepArgs& a) {
  ResidentShared* s = shared();
  dev::mbar_init(&s->listed, ALL_SAY ? CONSUMERS : 1); dev::mbar_init(&s->unlisted, RING_STAGES); s->stopped = 0; s->lists = 0;
  dev::mbar_init(&s->tile, 1); s->tiles = 0; s->rows = 0;
  for (int k = 0; k < WARPS; k++) { s->walk[k].at = Cursor(); s->walk[k].stagings = 0; }
  for (int p = 0; p < STAGE_PIECES; p++) dev::mbar_init(&s->staged[p], 1);
  if (ranks_of(a) != a.ranks) dev::refuse();
  for (int k = 0; k < RING_STAGES; k++) { dev::mbar_init(&s->full[k], 1); dev::mbar_init(&s->empty[k], WARPS * WARP_ARRIVALS); }
  dev::mbar_init_fence();
  dev::fault_record = a.fault;
}
DEV void resident_body(const StepArgs& a) {
  if (dev::tid() == 0) resident_init(a);
  dev::bar_sync(0, RESIDENT_THREADS);
  if (dev::tid() >= CONSUMERS) { dev::registers_less<56>(); const int loader = (dev::tid() - CONSUMERS) / 32; if (dev::tid() % 32 == 0 && loader < RING_STAGES) loader_walk(a, loader); } else { dev::registers_more<152>(); consumer_walk(a); }
}
