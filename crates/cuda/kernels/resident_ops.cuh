// The ops of the resident kernel that are no products: embedding, sums over ranks, norm, routing, attention, choice.
#pragma once
#include "resident.cuh"

// Columns k and k + 1 of row `row` into an activation buffer of `columns`, 64 of them in a warp: all with one factor, which is
// written for each 32, as every buffer of activations has them.
DEV void emit_activations(uint8_t* x, int columns, int row, int k, float a, float b) {
  a = rounded_activation(a); b = rounded_activation(b);
  const float scale = activation_scale(dev::number(dev::max_warp(dev::bits(dev::max_(dev::abs_(a), dev::abs_(b))))));
  put_activations<uint32_t>(x, TOKENS, row, k, a * scale, b * scale);
  if (dev::tid() % 16 == 0) ((float*)(x + (uint64_t)columns * x_column_bytes(TOKENS)))[k / 32 * TOKENS + row] = 1.0f / scale;
}
// Norm weights of columns k and k + 1; zeros past the last.
template <class I> DEV void norm_weights(const I& i, int k, float (&weight)[2]) { UNROLL for (int j = 0; j < 2; j++) weight[j] = k + j < i.hidden ? ((const float*)i.weight)[k + j] : 0.0f; }
// The residual of a row's columns k and k + 1 is known, 64 of them in a warp: give the next product its part of the norm.
template <class I> DEV void emit_residual(const I& i, int row, int k, const float (&x)[2], const float (&weight)[2]) {
  float squares = x[0] * x[0] + x[1] * x[1];
  for (int m = 8; m; m >>= 1) squares += dev::shuffle_xor(squares, m);
  if (dev::tid() % 16 == 0) ((float*)i.squares)[k / 32 * TOKENS + row] = squares;
  emit_activations((uint8_t*)i.out, i.hidden_padded, row, k, x[0] * weight[0], x[1] * weight[1]);
}
// The step's tokens, or, of a drafter's BLOCK, the anchor and what stands for tokens not yet known.
template <bool BLOCK> DEV void embed_rows(const StepArgs& a, const Instr& i, int rows) {
  const int row = consumer_warp(), lane = dev::tid() % 32;
  if (row >= rows) return;
  const bool mask = BLOCK && row > 0;
  const float* masked = mask ? (const float*)i.mask : (const float*)0;
  const uint64_t token = mask ? i.first_token : a.state->tokens[row];
  ROLLED for (int b = dev::cta(); b < i.hidden_padded / 64; b += ctas()) {
    const int k = b * 64 + lane * 2; float x[2], weight[2];
    norm_weights(i, k, weight);
    UNROLL for (int j = 0; j < 2; j++) {
      const uint64_t at = token * i.hidden + k + j;
      x[j] = k + j >= i.hidden ? 0.0f : masked ? masked[k + j] : i.format == STRIP_BF16 ? from_bf16(((const uint16_t*)i.table)[at]) : ((const float*)i.table)[at];
      ((float*)i.residual)[row * i.hidden_padded + k + j] = x[j];
    }
    emit_residual(i, row, k, x, weight);
  }
}
DEV_CALL void embed_op(const StepArgs& a, const Instr& i, int rows) { embed_rows<false>(a, i, rows); }
DEV Inboxes inboxes(const StepArgs& a) {
  Inboxes b; b.ranks = ranks_of(a); b.rank = a.rank; b.words = a.words; b.of = a.inbox;
  return b;
}
// Tag of the sum `index` of this step: never 0, different from the one before in its half.
DEV uint32_t epoch_of(const StepArgs& a, int step, int index) { return (uint32_t)(a.first_step + step) * a.sums + index + 1; }

// What the drafter sees of a row: the residual itself, in the columns that this rank multiplies.
template <class I> DEV void emit_tap(const I& i, int row, int k, const float (&x)[2]) {
  const int first = i.tap_column + k - dev::tid() % 32 * 2;  // of the warp's 64
  if (i.taps && first >= 0 && first < i.tap_columns) emit_activations((uint8_t*)i.taps, i.tap_columns, row, i.tap_column + k, x[0], x[1]);
}
// A warp takes 64 columns of a row, two a lane: what does not depend on the sum is under way before the words are waited for. From the last
// warp on: the first one is held up by the arrival before, as long as its release takes.
DEV_CALL void all_reduce_op(const StepArgs& a, const Instr& instr, int rows, uint32_t epoch) {
  const AllReduceInstr& i = (const AllReduceInstr&)instr;
  const Inboxes inbox = inboxes(a);
  const int lane = dev::tid() % 32, hidden = i.hidden, padded = i.hidden_padded, blocks = (hidden + 63) / 64;
  ROLLED for (int u = (WARPS - 1 - consumer_warp()) * ctas() + dev::cta(); u < blocks * rows; u += ctas() * WARPS) {
    const int row = u / blocks, k = u % blocks * 64 + lane * 2;
    float* at = (float*)i.residual + row * padded + k;
    float x[2] = {0.0f, 0.0f}, weight[2];
    norm_weights(i, k, weight);
    if (k < hidden) {
      const float old[2] = {at[0], at[1]};
      float sum[3]; all_reduce_collect(inbox, epoch, row * (padded / 2) + k / 2, sum);
      UNROLL for (int j = 0; j < 2; j++) at[j] = x[j] = old[j] + sum[j];
    }
    dev::sync_warp();
    emit_residual(i, row, k, x, weight);
    emit_tap(i, row, k, x);
  }
}
// 1 / rms of every row from the parts of the owners, the same sum in every CTA.
template <class I> DEV void rms_rows(const I& i) {
  const int row = consumer_warp(), lane = dev::tid() % 32;
  float sum = 0.0f;
  if (row < TOKENS) ROLLED for (int b = lane; b < (i.hidden + 31) / 32; b += 32) sum += ((const float*)i.squares)[b * TOKENS + row];
  sum = sum_warp(sum);
  if (lane == 0 && row < TOKENS) shared()->rms[row] = 1.0f / dev::sqrt_(sum / i.hidden + i.eps);
  consumers_sync();
}

// ---- Routing: every CTA works it out from the same logits
// A lane has experts in fours: 128 g + 4 lane + {0..3}.
static const int ROUTER_FOURS = ROUTER_PER_LANE / 4;
DEV int expert_of(int k) { return k / 4 * 128 + dev::tid() % 32 * 4 + k % 4; }
// Four values from column `at` of a row; zeros past its `columns`, a multiple of 4.
DEV void load_four(const float* row, int at, int columns, float* v) {
  uint32_t of[4] = {};
  if (at < columns) dev::load16(row + at, of);
  UNROLL for (int k = 0; k < 4; k++) v[k] = dev::number(of[k]);
}
// This lane's correction biases, under way while the logits are waited for.
struct RouterBias {
  float v[ROUTER_PER_LANE];
  DEV void load(const RoutedGateUpInstr& i) { UNROLL for (int g = 0; g < ROUTER_FOURS; g++) load_four((const float*)i.bias, expert_of(4 * g), (i.experts + 3) / 4 * 4, v + 4 * g); }
};
// A row's logits: parts added in order, the loads of so many in flight at once.
static const int LOGIT_PARTS = 5;
DEV void logit_sums(const RoutedGateUpInstr& i, int row, float (&v)[ROUTER_PER_LANE]) {
  const int rows = i.logit_rows, parts = i.logit_parts;
  const float* p = (const float*)i.logits + (uint64_t)row * rows;
  const uint64_t stride = (uint64_t)rows * TOKENS;
  UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) v[k] = 0.0f;
  ROLLED for (int first = 0; first < parts; first += LOGIT_PARTS) {
    float part[LOGIT_PARTS][ROUTER_PER_LANE];
    UNROLL for (int j = 0; j < LOGIT_PARTS; j++) UNROLL for (int g = 0; g < ROUTER_FOURS; g++) load_four(p + (first + j) * stride, expert_of(4 * g), first + j < parts ? rows : 0, part[j] + 4 * g);
    UNROLL for (int j = 0; j < LOGIT_PARTS; j++) UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) v[k] += part[j][k];
  }
}
// Sum of the values of this lane and those below it, over the first `lanes`; of the others anything.
DEV uint32_t up_to_lane(uint32_t v, int lanes) { ROLLED for (int d = 1; d < lanes; d *= 2) { const int lane = dev::tid() % 32; const uint32_t before = dev::shuffle(v, lane - d); if (lane >= d) v += before; } return v; }
// A choice of this lane: its expert and its weight. Lanes past the number of active experts have none.
struct Choice { int expert; float weight; };
// router.cuh's choice for one row by one warp, with logits in registers. The number of active experts that lanes have as their largest
// are taken off one by one, which is cheap: no expert below the last of these is among the chosen. What is left too much from there on, less
// than two on average of 384, is dropped from below, of equals the last.
DEV Choice route_row(const RoutedGateUpInstr& i, int row, const RouterBias& bias) {
  ResidentShared* s = shared();
  const int lane = dev::tid() % 32, experts = i.experts, active = i.active, words = (experts + 31) / 32;
  float v[ROUTER_PER_LANE], *values = s->scores[row]; uint32_t key[ROUTER_PER_LANE], most = 0, least = 0, taken;
  if (lane < words) s->chosen[row][lane] = 0;
  logit_sums(i, row, v);
  const float rms = s->rms[row];
  UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) {
    v[k] = sigmoid(v[k] * rms);
    key[k] = expert_of(k) < experts ? sortable(v[k] + bias.v[k]) : 0u;
    most = key[k] > most ? key[k] : most;
  }
  UNROLL for (int g = 0; g < ROUTER_FOURS; g++) if (expert_of(4 * g) < experts) dev::store16(values + expert_of(4 * g), (const uint32_t*)v + 4 * g);
  ROLLED for (int round = 0; round < active; round++) { least = dev::max_warp(most); if (most == least) most = 0; }
  if (least == 0) least = 1;  // fewer lanes have experts than experts are chosen
  ROLLED for (;;) {
    taken = 0;  // bit k: expert_of(k)
    UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) taken |= key[k] >= least ? 1u << k : 0u;
    if ((int)dev::add_warp(dev::count_bits(taken)) <= active) break;
    uint32_t low = 0xffffffffu; int at = -1;
    UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) low = key[k] >= least && key[k] < low ? key[k] : low;
    low = dev::min_warp(low);
    UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) at = key[k] == low ? k : at;
    const uint32_t place = at < 0 ? 0u : expert_of(at) + 1, last = dev::max_warp(place);
    UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) if (place == last && at == k) key[k] = 0;
  }
  // Chosen experts in the lanes' order: which, and bits of words.
  int n = (int)up_to_lane(dev::count_bits(taken), 32) - dev::count_bits(taken);
  ROLLED for (; taken; taken &= taken - 1) { const int e = expert_of(dev::count_bits((taken & (0u - taken)) - 1u)); s->expert[row][n++] = e; dev::or_shared(&s->chosen[row][e / 32], 1u << e % 32); }
  dev::sync_warp();
  const uint32_t own = lane < words ? dev::count_bits(s->chosen[row][lane]) : 0u, end = up_to_lane(own, words);
  if (lane < words) s->before[row][lane] = (uint8_t)(end - own);
  const bool has = lane < active;
  Choice c; c.expert = has ? s->expert[row][lane] : 0; c.weight = has ? values[c.expert] : 0.0f;
  c.weight = c.weight / (i.normalise ? sum_warp(c.weight) + 1e-20f : 1.0f) * i.scaling;
  return c;
}
// Lane l: experts 32 l .. + 31 that any row has, and how many there are in the words before.
DEV void distinct_words(int words, uint32_t& any, int& base) {
  const int lane = dev::tid() % 32;
  any = 0;
  if (lane < words) UNROLL for (int t = 0; t < TOKENS; t++) any |= shared()->chosen[t][lane];
  base = (int)up_to_lane(dev::count_bits(any), words) - dev::count_bits(any);
}
// A distinct expert's rows, whose columns of Inner begin at `first`; `none`: the column of other rows.
DEV void put_slot(int slot, int expert, uint32_t mask, int first, int none) {
  ResidentShared* s = shared();
  s->list[slot] = expert; s->mask[slot] = (uint8_t)mask; s->first[slot] = (uint8_t)first;
  uint32_t both[TOKENS / 2]; int at = first;
  UNROLL for (int t = 0; t < TOKENS; t++) { const bool has = mask >> t & 1u; const uint32_t column = (uint32_t)(has ? at : none) * 8; both[t / 2] = t % 2 ? both[t / 2] | column << 16 : column; at += has; }
  dev::store16(s->column[slot], both);
}
DEV_CALL void route_rows(const StepArgs& a, const Instr& instr, int rows) {
  const RoutedGateUpInstr& i = (const RoutedGateUpInstr&)instr;
  ResidentShared* s = shared();
  rms_rows(i);  // its parts came with what the router staged
  RouterBias bias; bias.load(i);
  if (ALL_SAY || dev::tid() == 0) await_unlisted();
  wait_for(a, i.wait);
  const int row = consumer_warp(), lane = dev::tid() % 32, words = (i.experts + 31) / 32;
  Choice c = {};
  if (row < rows) c = route_row(i, row, bias);
  else if (row < TOKENS && lane < words) s->chosen[row][lane] = s->before[row][lane] = 0;
  consumers_sync();
  // A lane that has an expert finds its place among the distinct ones, and the first row that has it writes about it.
  if (row < rows) {
    uint32_t any; int base;
    distinct_words(words, any, base);
    const int word = c.expert / 32; const uint32_t below = (1u << (c.expert & 31)) - 1u;
    const int slot = (int)dev::shuffle((uint32_t)base, word) + dev::count_bits(dev::shuffle(any, word) & below);
    if (lane < i.active) {
      uint32_t mask = 0; int column = 0;
      UNROLL for (int t = 0; t < TOKENS; t++) {
        const uint32_t own = s->chosen[t][word];
        mask |= (own >> (c.expert & 31) & 1u) << t; column += s->before[t][word] + dev::count_bits(own & below);
      }
      s->weight[slot][row] = c.weight;
      if ((mask & ((1u << row) - 1u)) == 0) put_slot(slot, c.expert, mask, column, i.pair_columns - 1);
    }
    if (row == 0 && lane == words - 1) s->count = base + dev::count_bits(any);
  }
  consumers_sync();
  if (dev::tid() == 0) s->lists++;
  if (ALL_SAY || dev::tid() == 0) dev::mbar_arrive(&s->listed);
  if (dev::tid() == 0 && dev::cta() == 0) { a.state->distinct += s->count; a.state->routed += 1; }
}
// A dense unit is one expert that every row has with weight 1.
DEV void route_dense(int rows) {
  ResidentShared* s = shared();
  const int t = dev::tid();
  if (t == 0) { await_unlisted(); s->count = 1; put_slot(0, 0, (1u << rows) - 1u, 0, 0); }
  if (t < TOKENS) s->weight[0][t] = 1.0f;
  consumers_sync();
}

