// The ops of the resident kernel that are no products: embedding, sums over ranks, norm, routing, attention, choice.
#pragma once
#include "resident.cuh"

// Columns k and k + 1 of row `row` into an activation buffer of `columns`, 64 of them in a warp: all with one factor, which is
// written for each 32, as every buffer of activations has them.
DEV void emit_activations(uint8_t* x, int columns, int row, int k, float a, float b) {
  a = round_bf16(a); b = round_bf16(b);
  const float scale = activation_scale(dev::number(dev::max_warp(dev::bits(dev::max_(dev::abs_(a), dev::abs_(b))))));
  *(uint32_t*)(x + x_offset(TOKENS, row, k)) = dev::to_f16x2(a * scale, b * scale);
  if (dev::tid() % 16 == 0) ((float*)(x + (uint64_t)columns * 16))[k / 32 * TOKENS + row] = 1.0f / scale;
}
// Norm weights of columns k and k + 1; zeros past the last.
DEV void norm_weights(const Instr& i, int k, float (&weight)[2]) { UNROLL for (int j = 0; j < 2; j++) weight[j] = k + j < i.hidden ? ((const float*)i.weight)[k + j] : 0.0f; }
// The residual of a row's columns k and k + 1 is known, 64 of them in a warp: give the next product its part of the norm.
DEV void emit_residual(const Instr& i, int row, int k, const float (&x)[2], const float (&weight)[2]) {
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
  ROLLED for (int b = dev::cta(); b < i.hidden_padded / 64; b += dev::ctas()) {
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
  Inboxes b; b.ranks = ranks_of(a) <= 4 ? ranks_of(a) : a.ranks;  // eight ranks' words as straight code spill (CUDA 13.0)
  b.rank = a.rank; b.words = a.words; b.of = a.inbox;
  return b;
}
// Tag of the sum `index` of this step: never 0, different from the one before in its half.
DEV uint32_t epoch_of(const StepArgs& a, int step, int index) { return (uint32_t)(a.first_step + step) * a.sums + index + 1; }

// What the drafter sees of a row: the residual itself, in the columns that this rank multiplies.
DEV void emit_tap(const Instr& i, int row, int k, const float (&x)[2]) {
  const int first = i.tap_column + k - dev::tid() % 32 * 2;  // of the warp's 64
  if (i.taps && first >= 0 && first < i.tap_columns) emit_activations((uint8_t*)i.taps, i.tap_columns, row, i.tap_column + k, x[0], x[1]);
}
// A warp takes 64 columns of a row, two a lane: what does not depend on the sum is under way before the words are waited for.
DEV_CALL void all_reduce_op(const StepArgs& a, const Instr& i, int rows, uint32_t epoch) {
  const Inboxes inbox = inboxes(a);
  const int lane = dev::tid() % 32, hidden = i.hidden, padded = i.hidden_padded, blocks = (hidden + 63) / 64;
  ROLLED for (int u = consumer_warp() * dev::ctas() + dev::cta(); u < blocks * rows; u += dev::ctas() * WARPS) {
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
DEV void rms_rows(const Instr& i) {
  const int row = consumer_warp(), lane = dev::tid() % 32;
  float sum = 0.0f;
  if (row < TOKENS) ROLLED for (int b = lane; b < (i.hidden + 31) / 32; b += 32) sum += ((const float*)i.squares)[b * TOKENS + row];
  sum = sum_warp(sum);
  if (lane == 0 && row < TOKENS) shared()->rms[row] = 1.0f / dev::sqrt_(sum / i.hidden + i.eps);
  consumers_sync();
}

// ---- Routing: every CTA works it out from the same logits
// This lane's correction biases, under way while the logits are waited for.
struct RouterBias {
  float v[ROUTER_PER_LANE];
  DEV void load(const Instr& i) { UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) { const int e = dev::tid() % 32 + 32 * k; v[k] = e < i.experts ? ((const float*)i.bias)[e] : 0.0f; } }
};
// A row's logits: parts added in order, all loads of three parts in flight at once.
static const int LOGIT_PARTS = 3;
DEV void logit_sums(const Instr& i, int row, float (&v)[ROUTER_PER_LANE]) {
  const int lane = dev::tid() % 32, experts = i.experts, parts = i.logit_parts;
  const float* p = (const float*)i.logits + (uint64_t)row * i.logit_rows;
  const uint64_t stride = (uint64_t)i.logit_rows * TOKENS;
  UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) v[k] = 0.0f;
  ROLLED for (int first = 0; first < parts; first += LOGIT_PARTS) {
    float part[LOGIT_PARTS][ROUTER_PER_LANE];
    UNROLL for (int j = 0; j < LOGIT_PARTS; j++) UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) part[j][k] = first + j < parts && lane + 32 * k < experts ? p[(first + j) * stride + lane + 32 * k] : 0.0f;
    UNROLL for (int j = 0; j < LOGIT_PARTS; j++) UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) v[k] += part[j][k];
  }
}
// router.cuh's choice for one row by one warp, with logits in registers.
DEV void route_row(const Instr& i, int row, const RouterBias& bias) {
  ResidentShared* s = shared();
  const int lane = dev::tid() % 32, experts = i.experts, active = i.active;
  float v[ROUTER_PER_LANE]; uint32_t key[ROUTER_PER_LANE], taken = 0;
  logit_sums(i, row, v);
  UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) {
    v[k] = sigmoid(v[k] * s->rms[row]);
    key[k] = lane + 32 * k < experts ? sortable(v[k] + bias.v[k]) : 0u;
  }
  ROLLED for (int round = 0; round < active; round++) {
    uint32_t best = 0, at = 0xffffffffu;
    UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) if (!(taken >> k & 1u) && key[k] > best) { best = key[k]; at = lane + 32 * k; }
    const uint32_t top = dev::max_warp(best), first = dev::min_warp(best == top ? at : 0xffffffffu);
    if (first % 32 == (uint32_t)lane) taken |= 1u << (first / 32);
  }
  int before = 0;
  UNROLL for (int k = 0; k < ROUTER_PER_LANE; k++) {
    if (32 * k >= experts) continue;
    const uint32_t word = dev::or_warp(taken >> k & 1u ? 1u << lane : 0u);
    if (lane == 0) { s->chosen[row][k] = word; s->before[row][k] = (uint8_t)before; }
    if (taken >> k & 1u) { const int n = before + dev::count_bits(word & ((1u << lane) - 1u)); s->expert[row][n] = lane + 32 * k; s->expert_weight[row][n] = v[k]; }
    before += dev::count_bits(word);
  }
  dev::sync_warp();
  float sum = 1.0f;
  if (i.normalise) { sum = 0.0f; ROLLED for (int n = 0; n < active; n++) sum += s->expert_weight[row][n]; sum += 1e-20f; }
  dev::sync_warp();
  if (lane < active) s->expert_weight[row][lane] = s->expert_weight[row][lane] / sum * i.scaling;
  dev::sync_warp();
}
// Lane l: experts 32 l .. + 31 that any row has, and how many there are in the words before.
DEV void distinct_words(int rows, int words, uint32_t& any, int& base) {
  const int lane = dev::tid() % 32;
  any = 0;
  if (lane < words) ROLLED for (int t = 0; t < rows; t++) any |= shared()->chosen[t][lane];
  const int own = dev::count_bits(any); uint32_t sum = own;
  ROLLED for (int d = 1; d < 32; d *= 2) { const uint32_t v = dev::shuffle(sum, lane - d); if (lane >= d) sum += v; }
  base = (int)sum - own;
}
// A distinct expert's rows, whose columns of Inner begin at `first`; `none`: the column of other rows.
DEV void put_slot(int slot, uint32_t mask, int first, int none) {
  ResidentShared* s = shared();
  s->mask[slot] = (uint8_t)mask; s->first[slot] = (uint8_t)first;
  ROLLED for (int t = 0, at = first; t < TOKENS; t++) { const bool has = mask >> t & 1u; s->column[slot][t] = (uint16_t)((has ? at : none) * 8); at += has; }
}
DEV_CALL void route_rows(const StepArgs& a, const Instr& i, int rows) {
  ResidentShared* s = shared();
  rms_rows(i);  // its parts came with what the router staged
  RouterBias bias; bias.load(i);
  wait_for(a, i.wait);
  const int row = consumer_warp(), lane = dev::tid() % 32, words = (i.experts + 31) / 32;
  if (row < rows) route_row(i, row, bias);
  consumers_sync();
  uint32_t any; int base;
  distinct_words(rows, words, any, base);
  if (row == 0) {
    await_unlisted();
    int at = base;
    ROLLED for (uint32_t m = any; m; m &= m - 1) s->list[at++] = 32 * lane + dev::count_bits((m & (0u - m)) - 1u);
    if (lane == words - 1) s->count = at;
  }
  const bool own = row < rows && lane < i.active;
  const int e = own ? s->expert[row][lane] : 0, word = e / 32; const uint32_t below = (1u << (e & 31)) - 1u;
  const int slot = (int)dev::shuffle((uint32_t)base, word) + dev::count_bits(dev::shuffle(any, word) & below);
  if (own) {
    uint32_t mask = 0; int column = 0;
    ROLLED for (int t = 0; t < rows; t++) { mask |= (s->chosen[t][word] >> (e & 31) & 1u) << t; column += s->before[t][word] + dev::count_bits(s->chosen[t][word] & below); }
    s->weight[slot][row] = s->expert_weight[row][lane];
    if ((mask & ((1u << row) - 1u)) == 0) put_slot(slot, mask, column, i.pair_columns - 1);
  }
  consumers_sync();
  if (dev::tid() == 0) { s->lists++; dev::mbar_arrive(&s->listed); }
  if (dev::tid() == 0 && dev::cta() == 0) { a.state->distinct += s->count; a.state->routed += 1; }
}
// A dense unit is one expert that every row has with weight 1.
DEV void route_dense(int rows) {
  ResidentShared* s = shared();
  const int t = dev::tid();
  if (t == 0) { await_unlisted(); s->count = 1; s->list[0] = 0; put_slot(0, (1u << rows) - 1u, 0, 0); }
  if (t < TOKENS) s->weight[0][t] = 1.0f;
  consumers_sync();
}

