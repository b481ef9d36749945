// The DFlash drafter in the resident kernel, besides the ops that it shares with the target. Definition: model/src/reference/draft_network.rs.
//
//   DRAFT    anchor and masks -> layers with the target's products and attend_any<true> -> lm_head -> drafts, rows of the verify pass
//   VERIFY   the target; the residual after chosen layers goes to `taps` too (emit_tap)
//   CONTEXT  FUSE: taps times this rank's columns of fc -> CONTEXT: summed over ranks, hidden_norm -> CONTEXT_KV: keys and values of all
//            draft layers in one product -> APPEND: head norm, rope, value scale, into the drafter's caches, committed rows only
// Invariant: caches hold the context; a block's own keys and values live in shared memory for one layer.
#pragma once
#include "resident_attention.cuh"
#include "resident_run.cuh"

// The sum over ranks alone: there is no residual to add to.
DEV void context_op(const StepArgs& a, const Instr& i, int rows, uint32_t epoch) {
  const Inboxes inbox = inboxes(a);
  const int lane = dev::tid() % 32, hidden = i.hidden, blocks = (hidden + 63) / 64;
  ROLLED for (int u = consumer_warp() * ctas() + dev::cta(); u < blocks * rows; u += ctas() * WARPS) {
    const int row = u / blocks, k = u % blocks * 64 + lane * 2;
    float x[2] = {0.0f, 0.0f}, weight[2];
    norm_weights(i, k, weight);
    if (k < hidden) { float sum[3]; all_reduce_collect(inbox, epoch, row * (i.hidden_padded / 2) + k / 2, sum); x[0] = sum[0]; x[1] = sum[1]; }
    dev::sync_warp();
    emit_residual(i, row, k, x, weight);
  }
}
// A warp takes a layer's head of a committed row.
DEV void append_op(const StepArgs& a, const AppendInstr& i) {
  const int rows = a.state->committed, position = a.state->committed_position, heads = i.kv_heads, qk_dim = i.qk_dim, v_dim = i.v_dim, lane = dev::tid() % 32;
  ROLLED for (int u = consumer_warp() * ctas() + dev::cta(); u < i.layers * rows * heads; u += ctas() * WARPS) {
    const int cache = u / rows, layer = cache / heads, head = cache % heads, row = u % rows, at = position + row;
    const float *from = (const float*)i.x + (uint64_t)row * i.qkv_rows + layer * i.rows, *value = from + i.v_first + head * v_dim;
    const uint64_t place = (uint64_t)cache * a.context + at;
    float k[8];
    load_turned<true>(from + head * qk_dim, qk_dim, i.rope_dims, turns_at(i, at), k, (const float*)i.k_norm + layer * qk_dim, i.eps);
    UNROLL for (int j = 0; j < 8; j++) {
      const int d = lane + 32 * j;
      if (d < qk_dim) ((uint16_t*)((uint8_t*)i.keys + place * i.key_stride))[d] = (uint16_t)dev::to_bf16x2(k[j], 0.0f);
      if (d < v_dim) ((uint16_t*)((uint8_t*)i.values + place * i.value_stride))[d] = (uint16_t)dev::to_bf16x2(value[d] * i.value_scale, 0.0f);
    }
  }
}
// One function for the choice and what only the drafter has: more of them cost registers where they are called, in the walk around
// the products.
DEV_CALL void draft_op(const StepArgs& a, const Instr& i, int step) {
  const StepState* s = a.state;
  if (i.op == DO_CHOOSE) choose_op(a, i, step);
#if defined(SHAPES_DRAFT)
  else if (i.op == DO_DRAFT_EMBED) embed_rows<true>(a, i, s->block);
  else if (i.op == DO_DRAFT_ATTENTION) attend_any<true>(a, (const DraftAttentionInstr&)i, s->block, s->position);
  else if (i.op == DO_DRAFT_CHOOSE) draft_choose_op(a, i, step);
  else if (i.op == DO_CONTEXT) context_op(a, i, s->committed, epoch_of(a, step, i.index));
  else append_op(a, (const AppendInstr&)i);
#endif
}
