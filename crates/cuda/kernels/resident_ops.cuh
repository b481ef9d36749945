// The ops of the resident kernel that are no products: embedding, sums over ranks, norm, routing, attention, choice.
#pragma once
#include "resident.cuh"

// A value of column k of row `row` into an activation buffer of `columns`, by the 32 lanes that hold columns 32 j .. + 31.
DEV void emit_activation(uint8_t* x, int columns, int row, int k, float v) {
  v = round_bf16(v);
  const float s = split_scale(dev::number(dev::max_warp(dev::bits(dev::abs_(v)))));
  uint32_t hi, lo; split_pair(v, 0.0f, s, hi, lo);
  uint8_t* at = x + split_offset(row, k);
  at[0] = (uint8_t)hi; at[128] = (uint8_t)lo;
  if (dev::tid() % 32 == 0) ((float*)(x + (uint64_t)columns * 16))[k / 32 * TOKENS + row] = 1.0f / s;
}
// The residual of 32 columns of one row is known: keep it, and give the next product its part of the norm.
DEV void emit_residual(const Instr& i, int row, int block, float x) {
  const int lane = dev::tid() % 32, k = block * 32 + lane;
  const float squares = sum_warp(x * x);
  if (lane == 0) ((float*)i.squares)[block * TOKENS + row] = squares;
  emit_activation((uint8_t*)i.out, i.hidden_padded, row, k, k < i.hidden ? x * ((const float*)i.weight)[k] : 0.0f);
}
DEV_CALL void embed_op(const StepArgs& a, const Instr& i, int rows) {
  const int row = consumer_warp(), lane = dev::tid() % 32;
  if (row >= rows) return;
  const uint64_t token = a.state->tokens[row];
  for (int b = dev::cta(); b < (i.hidden + 31) / 32; b += dev::ctas()) {
    const int k = b * 32 + lane; float x = 0.0f;
    if (k < i.hidden) x = i.format == STRIP_BF16 ? from_bf16(((const uint16_t*)i.table)[token * i.hidden + k]) : ((const float*)i.table)[token * i.hidden + k];
    ((float*)i.residual)[row * i.hidden_padded + k] = x;
    emit_residual(i, row, b, x);
  }
}
DEV Inboxes inboxes(const StepArgs& a) {
  Inboxes b; b.ranks = a.ranks; b.rank = a.rank; b.words = a.words; b.of = a.inbox;
  return b;
}
// Tag of the sum `index` of this step: never 0, different from the one before in its half.
DEV uint32_t epoch_of(const StepArgs& a, int step, int index) { return (uint32_t)(a.first_step + step) * a.sums + index + 1; }

// A warp takes 64 columns of a row, two a lane: what does not depend on the sum is under way before the words are waited for.
DEV_CALL void all_reduce_op(const StepArgs& a, const Instr& i, int rows, uint32_t epoch) {
  const Inboxes inbox = inboxes(a);
  const int lane = dev::tid() % 32, hidden = i.hidden, padded = i.hidden_padded, blocks = (hidden + 63) / 64;
  for (int u = consumer_warp() * dev::ctas() + dev::cta(); u < blocks * rows; u += dev::ctas() * 8) {
    const int row = u / blocks, k = u % blocks * 64 + lane * 2;
    float* at = (float*)i.residual + row * padded + k;
    float x[2] = {0.0f, 0.0f}, y[2] = {0.0f, 0.0f};
    if (k < hidden) {
      const float old[2] = {at[0], at[1]}, weight[2] = {((const float*)i.weight)[k], ((const float*)i.weight)[k + 1]};
      float sum[3]; all_reduce_collect(inbox, epoch, row * (padded / 2) + k / 2, sum);
      UNROLL for (int j = 0; j < 2; j++) { x[j] = old[j] + sum[j]; y[j] = round_bf16(x[j] * weight[j]); at[j] = x[j]; }
    }
    dev::sync_warp();
    float squares = x[0] * x[0] + x[1] * x[1], largest = dev::max_(dev::abs_(y[0]), dev::abs_(y[1]));
    for (int m = 8; m; m >>= 1) { squares += dev::shuffle_xor(squares, m); largest = dev::max_(largest, dev::shuffle_xor(largest, m)); }
    const float scale = split_scale(largest);
    uint32_t hi, lo; split_pair(y[0], y[1], scale, hi, lo);
    uint8_t* to = (uint8_t*)i.out + split_offset(row, k);
    *(uint16_t*)to = (uint16_t)hi; *(uint16_t*)(to + 128) = (uint16_t)lo;
    if (lane % 16 == 0) { ((float*)i.squares)[k / 32 * TOKENS + row] = squares; ((float*)((uint8_t*)i.out + (uint64_t)padded * 16))[k / 32 * TOKENS + row] = 1.0f / scale; }
  }
}
// 1 / rms of every row from the parts of the owners, the same sum in every CTA.
DEV void rms_rows(const Instr& i) {
  const int row = consumer_warp(), lane = dev::tid() % 32;
  float sum = 0.0f;
  for (int b = lane; b < (i.hidden + 31) / 32; b += 32) sum += ((const float*)i.squares)[b * TOKENS + row];
  sum = sum_warp(sum);
  if (lane == 0) shared()->rms[row] = 1.0f / dev::sqrt_(sum / i.hidden + i.eps);
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
  for (int first = 0; first < parts; first += LOGIT_PARTS) {
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
  for (int round = 0; round < active; round++) {
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
  if (i.normalise) { sum = 0.0f; for (int n = 0; n < active; n++) sum += s->expert_weight[row][n]; sum += 1e-20f; }
  dev::sync_warp();
  if (lane < active) s->expert_weight[row][lane] = s->expert_weight[row][lane] / sum * i.scaling;
  dev::sync_warp();
}
// Lane l: experts 32 l .. + 31 that any row has, and how many there are in the words before.
DEV void distinct_words(int rows, int words, uint32_t& any, int& base) {
  const int lane = dev::tid() % 32;
  any = 0;
  if (lane < words) for (int t = 0; t < rows; t++) any |= shared()->chosen[t][lane];
  const int own = dev::count_bits(any); uint32_t sum = own;
  for (int d = 1; d < 32; d *= 2) { const uint32_t v = dev::shuffle(sum, lane - d); if (lane >= d) sum += v; }
  base = (int)sum - own;
}
DEV_CALL void route_rows(const StepArgs& a, const Instr& i, int rows, int step) {
  ResidentShared* s = shared();
  rms_rows(i);  // its parts came with what the router staged
  RouterBias bias; bias.load(i);
  wait_for(a, i.wait, step, false);
  const int row = consumer_warp(), lane = dev::tid() % 32, words = (i.experts + 31) / 32;
  if (row < rows) route_row(i, row, bias);
  consumers_sync();
  uint32_t any; int base;
  distinct_words(rows, words, any, base);
  if (row == 0) {
    int at = base;
    for (uint32_t m = any; m; m &= m - 1) s->list[at++] = 32 * lane + dev::count_bits((m & (0u - m)) - 1u);
    if (lane == words - 1) s->count = at;
  }
  const bool own = row < rows && lane < i.active;
  const int e = own ? s->expert[row][lane] : 0, word = e / 32; const uint32_t below = (1u << (e & 31)) - 1u;
  const int slot = (int)dev::shuffle((uint32_t)base, word) + dev::count_bits(dev::shuffle(any, word) & below);
  if (own) {
    uint32_t mask = 0; int column = 0;
    for (int t = 0; t < rows; t++) { mask |= (s->chosen[t][word] >> (e & 31) & 1u) << t; column += s->before[t][word] + dev::count_bits(s->chosen[t][word] & below); }
    s->weight[slot][row] = s->expert_weight[row][lane];
    if ((mask & ((1u << row) - 1u)) == 0) { s->mask[slot] = (uint8_t)mask; s->first[slot] = (uint8_t)column; }
  }
  consumers_sync();
  if (dev::tid() == 0) dev::mbar_arrive(&s->listed);
  if (dev::tid() == 0 && dev::cta() == 0) { a.state->distinct += s->count; a.state->routed += 1; }
}
// A dense unit is one expert that every row has with weight 1.
DEV void route_dense(int rows) {
  ResidentShared* s = shared();
  const int t = dev::tid();
  if (t == 0) { s->count = 1; s->list[0] = 0; s->mask[0] = (uint8_t)((1u << rows) - 1u); s->first[0] = 0; }
  if (t < TOKENS) s->weight[0][t] = 1.0f;
  consumers_sync();
}

// ---- Attention: a (row, head) at a time, its keys in chunks of 32 absolute positions, chunk c by warp c % 8, so that a row's
// sums depend on its position alone. Keys of this step come from Qkv; the first head of a group keeps its own row's.
struct AttentionScratch {
  float q[256], turned[TOKENS][256], scores[8][32], m[8], l[8], o[8][256];
  alignas(16) uint16_t keys[TOKENS][256], values[TOKENS][256];
};
struct KeyView { const uint16_t* cached; const uint16_t* fresh; int position, dim, fresh_dim; DEV const uint16_t* at(int p) const { return p < position ? cached + (uint64_t)p * dim : fresh + (p - position) * fresh_dim; } };

DEV float score_row(const float* q, const uint16_t* key, int dim) {
  float sum = 0.0f;
  if (dim % 32) return attention_score(q, key, dim);
  for (int d = 0; d < dim; d += 32) {  // four loads in flight
    uint32_t v[4][4];
    UNROLL for (int k = 0; k < 4; k++) dev::load16(key + d + 8 * k, v[k]);
    UNROLL for (int k = 0; k < 4; k++) UNROLL for (int j = 0; j < 4; j++) {
      sum = dev::fma_(q[d + 8 * k + 2 * j], dev::number(v[k][j] << 16), sum);
      sum = dev::fma_(q[d + 8 * k + 2 * j + 1], dev::number(v[k][j] & 0xffff0000u), sum);
    }
  }
  return sum;
}
// Columns 4 lane .. + 3 and 128 further of a value row, two bf16 a word; zeros past its end.
DEV void value_columns(const uint16_t* row, int dim, uint32_t (&w)[4]) {
  const int d = dev::tid() % 32 * 4;
  UNROLL for (int k = 0; k < 2; k++) {
    const int at = d + 128 * k;
    w[2 * k] = w[2 * k + 1] = 0;
    if (at >= dim) continue;
    if (dim % 4 == 0) dev::load8(row + at, w + 2 * k);
    else UNROLL for (int j = 0; j < 4; j++) if (at + j < dim) w[2 * k + j / 2] |= (uint32_t)row[at + j] << (16 * (j & 1));
  }
}
// o += scores[from .. to] times the values from position `base` on: eight rows in flight.
DEV void add_values(const Instr& i, const float* scores, const KeyView& values, int base, int from, int to, float (&o)[8]) {
  for (int p = from; p < to; p += 8) {
    uint32_t w[8][4];
    UNROLL for (int j = 0; j < 8; j++) value_columns(values.at(base + (p + j < to ? p + j : p)), i.v_dim, w[j]);
    UNROLL for (int j = 0; j < 8; j++) {
      const float e = p + j < to ? scores[p + j] : 0.0f;
      UNROLL for (int k = 0; k < 4; k++) { o[2 * k] = dev::fma_(e, dev::number(w[j][k] << 16), o[2 * k]); o[2 * k + 1] = dev::fma_(e, dev::number(w[j][k] & 0xffff0000u), o[2 * k + 1]); }
    }
  }
}
DEV void attend_chunks(const Instr& i, AttentionScratch* s, const KeyView& keys, const KeyView& values, int first, int end) {
  const int warp = consumer_warp(), lane = dev::tid() % 32;
  float m = ATTENTION_EMPTY, l = 0.0f, o[8];
  UNROLL for (int k = 0; k < 8; k++) o[k] = 0.0f;
  for (int base = (first / 32 + ((warp - first / 32) & 7)) * 32; base < end; base += 256) {
    const int at = base + lane; const bool seen = at >= first && at < end;
    const float score = seen ? i.scaling * score_row(s->q, keys.at(at), i.qk_dim) : ATTENTION_EMPTY;
    float top = score;
    for (int k = 16; k; k >>= 1) top = dev::max_(top, dev::shuffle_xor(top, k));
    top = dev::max_(top, m);
    const float e = seen ? dev::exp_(score - top) : 0.0f, keep = dev::exp_(m - top);
    l = l * keep + sum_warp(e); m = top;
    s->scores[warp][lane] = e; dev::sync_warp();
    const int from = first > base ? first - base : 0, to = end - base < 32 ? end - base : 32;
    UNROLL for (int k = 0; k < 8; k++) o[k] *= keep;
    add_values(i, s->scores[warp], values, base, from, to, o);
    dev::sync_warp();
  }
  if (lane == 0) { s->m[warp] = m; s->l[warp] = l; }
  UNROLL for (int k = 0; k < 8; k++) s->o[warp][lane * 4 + k / 4 * 128 + k % 4] = o[k];
}
// Row `warp` of this step: its key of the group turned and rounded, its value scaled and rounded; kept when it is `own`.
DEV void fresh_row(const StepArgs& a, const Instr& i, int position0, AttentionScratch* s, int group, const float* turns, bool keep) {
  const int row = consumer_warp(), lane = dev::tid() % 32, position = position0 + row;
  const float* qkv = (const float*)i.x + (uint64_t)row * i.qkv_rows;
  for (int d = lane; d < i.qk_dim; d += 32) s->turned[row][d] = qkv[i.k_first + group * i.qk_dim + d];
  dev::sync_warp();
  rope_head(s->turned[row], i.rope_dims, turns + (uint64_t)position * i.rope_dims);
  dev::sync_warp();
  uint16_t* keys = (uint16_t*)i.keys + ((uint64_t)group * a.context + position) * i.qk_dim;
  uint16_t* values = (uint16_t*)i.values + ((uint64_t)group * a.context + position) * i.v_dim;
  for (int d = lane; d < i.qk_dim; d += 32) { const uint16_t v = (uint16_t)dev::to_bf16x2(s->turned[row][d], 0.0f); s->keys[row][d] = v; if (keep) keys[d] = v; }
  for (int d = lane; d < i.v_dim; d += 32) { const uint16_t v = (uint16_t)dev::to_bf16x2(qkv[i.v_first + group * i.v_dim + d] * i.value_scale, 0.0f); s->values[row][d] = v; if (keep) values[d] = v; }
}
// Warp w merges columns 32 w .. of the eight warps' parts, in their order, and the sink.
DEV void finish_head(const Instr& i, AttentionScratch* s, int row, int head, int v_padded) {
  const int lane = dev::tid() % 32, k = consumer_warp() * 32 + lane;
  if (consumer_warp() * 32 >= v_padded) return;
  const float* sinks = (const float*)i.sinks;
  float m = sinks ? sinks[head] : ATTENTION_EMPTY;
  for (int w = 0; w < 8; w++) m = dev::max_(m, s->m[w]);
  float l = sinks ? dev::exp_(sinks[head] - m) : 0.0f, o = 0.0f;
  for (int w = 0; w < 8; w++) { const float scale = dev::exp_(s->m[w] - m); l += s->l[w] * scale; o += s->o[w][k] * scale; }
  emit_activation((uint8_t*)i.out, i.columns_padded, row, head * v_padded + k, k < i.v_dim ? o / l : 0.0f);
}
DEV_CALL void attention_op(const StepArgs& a, const Instr& i, int rows, int position) {
  AttentionScratch* s = (AttentionScratch*)shared()->x;
  const int warp = consumer_warp();
  const float* turns = (const float*)i.turns;
  for (int u = dev::cta(); u < rows * i.heads; u += dev::ctas()) {
    const int row = u / i.heads, head = u % i.heads, of_group = i.heads / i.kv_heads, group = head / of_group;
    if (warp <= row) fresh_row(a, i, position, s, group, turns, warp == row && head % of_group == 0);
    const float* q = (const float*)i.x + (uint64_t)row * i.qkv_rows + head * i.qk_dim;
    for (int d = dev::tid(); d < i.qk_dim; d += CONSUMERS) s->q[d] = q[d];
    consumers_sync();
    if (warp == 0) rope_head(s->q, i.rope_dims, turns + (uint64_t)(position + row) * i.rope_dims);
    consumers_sync();
    const int end = position + row + 1, first = i.window >= 0 && end - 1 > i.window ? end - 1 - i.window : 0;
    const KeyView keys = {(const uint16_t*)i.keys + (uint64_t)group * a.context * i.qk_dim, s->keys[0], position, i.qk_dim, 256};
    const KeyView values = {(const uint16_t*)i.values + (uint64_t)group * a.context * i.v_dim, s->values[0], position, i.v_dim, 256};
    attend_chunks(i, s, keys, values, first, end);
    consumers_sync();
    finish_head(i, s, row, head, (i.v_dim + 31) / 32 * 32);
    consumers_sync();
  }
}

// ---- Choice: the best of the CTAs' bests, then of the ranks', then what the step's state becomes
DEV Best best_of_ranks(const StepArgs& a, const Instr& i, int step, int row) {
  const int lane = dev::tid() % 32;
  Best best; best.value = -3.4e38f; best.token = 0x7fffffff;
  for (int c = lane; c < dev::ctas(); c += 32) best = better(best, ((const Best*)i.bests)[c * TOKENS + row]);
  for (int m = 16; m; m >>= 1) { Best b; b.value = dev::shuffle_xor(best.value, m); b.token = (int)dev::shuffle_xor((uint32_t)best.token, m); best = better(best, b); }
  const uint32_t tag = epoch_of(a, step, i.index);
  const int half = tag & 1;
  if (lane == 0) for (int to = 0; to < a.ranks; to++) dev::put(a.choice[to] + ((half * a.ranks + a.rank) * TOKENS + row), dev::bits(best.value), (uint32_t)best.token, 0, tag);
  for (int from = 0; from < a.ranks; from++) {
    uint32_t v[3]; dev::get_wait(a.choice[a.rank] + ((half * a.ranks + from) * TOKENS + row), tag, v);
    Best b; b.value = dev::number(v[0]); b.token = (int)v[1];
    best = from == 0 ? b : better(best, b);
  }
  return best;
}
DEV_CALL void choose_op(const StepArgs& a, const Instr& i, int step) {
  StepState* state = a.state;
  if (dev::cta() != 0) return;
  const int row = consumer_warp();
  if (row < state->rows) { const Best b = best_of_ranks(a, i, step, row); if (dev::tid() % 32 == 0) state->best[row] = b.token; }
  consumers_sync();
  if (dev::tid() != 0) return;
  const int accepted = accept_greedy(state->best, state->tokens + 1, state->rows - 1);
  state->accepted = accepted;
  if (!state->chain) return;
  // Chained steps without the host: the next anchor is the token after the accepted ones; drafts are the tokens just chosen.
  const int anchor = state->best[accepted];
  for (int r = 1; r < state->rows; r++) state->tokens[r] = state->best[r];
  state->tokens[0] = anchor;
  if (state->chain > 1) state->position += accepted + 1;
}
