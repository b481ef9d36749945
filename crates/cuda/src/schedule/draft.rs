//! The drafter's passes of a step: its block before the verify pass, its context after it.
//!
//! Owns their order. A rank has whole heads, a part of the inner width, and a part of the columns of
//! `fc`; the vocabulary is the target's. Refuses ranks that do not divide heads and inner width.

use model::draft::DraftConfig;

use super::{Buffer, Builder, Op, Pass, Shard, divides};
use crate::CudaError;

pub(super) fn check_shard(draft: &DraftConfig, shard: Shard) -> Result<(), CudaError> {
    let a = &draft.attention;
    divides("the drafter's key/value heads", a.kv_heads, shard.ranks)?;
    divides("the drafter's inner width", draft.intermediate, shard.ranks)
}

/// Bytes of BF16 pages: what released drafters store.
fn bf16_bytes(rows: usize, columns: usize) -> usize {
    rows.next_multiple_of(16) * columns.next_multiple_of(128) * 2
}

impl Builder<'_> {
    pub(super) fn draft_pass(&mut self, draft: &DraftConfig) {
        self.pass = Pass::Draft;
        self.push(Op::DraftEmbed, None, &[], Buffer::X, 0);
        for layer in 0..draft.layers.len() {
            self.draft_layer(draft, layer);
        }
        self.head(Op::DraftChoose);
    }

    fn draft_layer(&mut self, draft: &DraftConfig, l: usize) {
        let (a, hidden, ranks) = (&draft.attention, draft.hidden, self.ranks);
        let (layer, inner) = (Some(l), draft.intermediate / ranks);
        let rows = (a.heads * a.qk_dim + a.kv_heads * (a.qk_dim + a.v_dim)) / ranks;
        let sum = [Buffer::Partial, Buffer::X];
        let bytes = bf16_bytes(rows, hidden);
        self.push(Op::Qkv, layer, &[Buffer::X], Buffer::Qkv, bytes);
        self.push(Op::DraftAttention, layer, &[Buffer::Qkv], Buffer::Heads, 0);
        let bytes = bf16_bytes(hidden, a.heads * a.v_dim / ranks);
        self.push(Op::OProj, layer, &[Buffer::Heads], Buffer::Partial, bytes);
        self.push(Op::AllReduce, layer, &sum, Buffer::X, 0);
        let bytes = bf16_bytes(2 * inner, hidden);
        self.push(Op::GateUp, layer, &[Buffer::X], Buffer::Inner, bytes);
        let bytes = bf16_bytes(hidden, inner);
        self.push(Op::Down, layer, &[Buffer::Inner], Buffer::Partial, bytes);
        self.push(Op::AllReduce, layer, &sum, Buffer::X, 0);
    }

    pub(super) fn context_pass(&mut self, draft: &DraftConfig) {
        self.pass = Pass::Context;
        let (a, hidden, ranks) = (&draft.attention, draft.hidden, self.ranks);
        let taps: Vec<Buffer> = (0..draft.taps.len()).map(Buffer::Tap).collect();
        let bytes = bf16_bytes(hidden, taps.len() * hidden / ranks);
        self.push(Op::Fuse, None, &taps, Buffer::Partial, bytes);
        let sum = [Buffer::Partial];
        self.push(Op::Context, None, &sum, Buffer::Context, 0);
        let rows = draft.layers.len() * a.kv_heads * (a.qk_dim + a.v_dim) / ranks;
        let bytes = bf16_bytes(rows, hidden);
        let reads = [Buffer::Context];
        self.push(Op::ContextKv, None, &reads, Buffer::ContextKv, bytes);
        let reads = [Buffer::ContextKv, Buffer::Tokens];
        self.push(Op::Append, None, &reads, Buffer::DraftCache, 0);
    }
}
