//! The DFlash drafter on tensors: blocks of one anchor and masks, filled in parallel from the target's taps.
//!
//! A sequence is cut into chunks; each chunk has its own anchors, and its queries see the context of
//! the chunks that the window reaches and the blocks of their own chunk. So a mask is
//! `[chunk queries, reached keys]`, never `anchors x sequence`, and a sequence split over workers
//! needs no traffic but the window's border. Context rows of a block are those strictly before its
//! anchor; the block itself is not causal.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use crate::attention::{PAD, additive, rotate, rotation, sink_key, with_sink};
use crate::net::{compute_kind, rms_norm};
use crate::params::{Group, Params, Quant, Rule};
use crate::shape::Shape;

/// Positions a chunk.
pub const CHUNK: i64 = 128;

/// Sizes of a drafter.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Draft layers.
    pub layers: i64,
    /// Width of the SwiGLU.
    pub ffn: i64,
    /// Anchor and masks.
    pub block: i64,
    /// Keys nearer than this are visible.
    pub window: i64,
    /// Target layers whose output is the context.
    pub taps: Vec<usize>,
    /// Sink logits.
    pub sinks: bool,
    /// Base of the rotary embedding.
    pub theta: f64,
    /// Token whose embedding the mask replaces.
    pub mask_token: i64,
}

/// Index of each group in [`Params::groups`].
pub mod group {
    #![allow(missing_docs)]
    pub const FC: usize = 0;
    pub const HIDDEN_NORM: usize = 1;
    pub const NORM_IN: usize = 2;
    pub const Q: usize = 3;
    pub const KV: usize = 4;
    pub const OUT: usize = 5;
    pub const Q_NORM: usize = 6;
    pub const K_NORM: usize = 7;
    pub const SINK: usize = 8;
    pub const NORM_POST: usize = 9;
    pub const GATE_UP: usize = 10;
    pub const DOWN: usize = 11;
    pub const NORM: usize = 12;
    pub const MASK: usize = 13;
}
use group::{
    DOWN, FC, GATE_UP, HIDDEN_NORM, K_NORM, KV, MASK, NORM, NORM_IN, NORM_POST, OUT, Q, Q_NORM,
    SINK,
};

/// A drafter for a target of `target` sizes.
#[derive(Debug)]
pub struct Drafter {
    /// Its sizes.
    pub plan: Plan,
    /// The target's sizes; heads and widths are shared.
    pub target: Shape,
    /// Its tensors.
    pub params: Params,
    kind: Kind,
}

/// Blocks of a batch: `anchors` is `[rows, chunks, blocks]`, positions in the sequence.
#[derive(Debug)]
pub struct Blocks {
    /// Position of each anchor.
    pub anchors: Tensor,
}

impl Drafter {
    /// A drafter with random weights from `seed`; `muon` chooses the rule for matrices.
    #[must_use]
    pub fn new(plan: Plan, target: Shape, device: Device, muon: bool, seed: i64) -> Self {
        tch::manual_seed(seed);
        let (h, f, n) = (target.hidden, plan.ffn, plan.layers);
        let width = target.head_dim;
        let (q, kv) = (target.heads * width, 2 * target.kv_heads * width);
        let kind = compute_kind(device);
        let taps = plan.taps.len() as i64;
        let normal = |size: [i64; 3], scale: f64| {
            (Tensor::randn(size, (Kind::Float, Device::Cpu)) * (scale / (size[2] as f64).sqrt()))
                .to_device(device)
        };
        let ones = |size: [i64; 2]| Tensor::ones(size, (Kind::Float, device));
        let back = 1.0 / (2.0 * n as f64).sqrt();
        let rule = |matrices: i64| {
            if muon {
                Rule::Muon(matrices)
            } else {
                Rule::AdamW
            }
        };
        let adam = Rule::AdamW;
        let list = [
            ("fc", normal([1, h, taps * h], 1.0), rule(1)),
            ("hidden_norm", ones([1, h]), adam),
            ("norm_in", ones([n, h]), adam),
            ("q", normal([n, q, h], 1.0), rule(1)),
            ("kv", normal([n, kv, h], 1.0), rule(2)),
            ("out", normal([n, h, q], back), rule(1)),
            ("q_norm", ones([n, width]), adam),
            ("k_norm", ones([n, width]), adam),
            ("sink", ones([n, target.heads]) * 0.0, adam),
            ("norm_post", ones([n, h]), adam),
            ("gate_up", normal([n, 2 * f, h], 1.0), rule(2)),
            ("down", normal([n, h, f], back), rule(1)),
            ("norm", ones([1, h]), adam),
            ("mask", normal([1, 1, h], 1.0).squeeze_dim(0), adam),
        ];
        let groups =
            list.map(|(name, master, rule)| Group::new(name, master, kind, rule, Quant::None));
        Self {
            plan,
            target,
            params: Params {
                groups: groups.into(),
            },
            kind,
        }
    }

    fn norm(&self, x: &Tensor, group: usize, layer: usize) -> Tensor {
        rms_norm(x, self.params.at(group, layer), self.target.eps)
    }

    /// Rounds matrices to FP8 as the exporter will, or not.
    pub fn quantize(&mut self, on: bool) {
        for (group, parts) in [(FC, 1), (Q, 1), (KV, 2), (OUT, 1), (GATE_UP, 2), (DOWN, 1)] {
            let rows = self.params.groups[group].master.size()[1];
            let quant = if on {
                Quant::Fp8(vec![rows / parts; parts as usize])
            } else {
                Quant::None
            };
            self.params.groups[group].set_quant(quant);
        }
    }

    /// Rows of all block positions after the last norm, `[rows * chunks, blocks, block, hidden]`.
    ///
    /// `taps` is `[rows, length, taps * hidden]`, `tokens` `[rows, length]`, `embedding` the target's.
    pub fn forward(
        &self,
        taps: &Tensor,
        tokens: &Tensor,
        embedding: &Tensor,
        blocks: &Blocks,
    ) -> Tensor {
        let (rows, length) = tokens.size2().expect("tokens are [rows, length]");
        let (_, chunks, each) = blocks
            .anchors
            .size3()
            .expect("anchors are [rows, chunks, blocks]");
        let (hidden, block) = (self.target.hidden, self.plan.block);
        let context = taps.linear(self.params.at(FC, 0), None::<&Tensor>);
        let context = self.norm(&context, HIDDEN_NORM, 0);
        let count = rows * chunks;
        let anchor = tokens.gather(1, &blocks.anchors.reshape([rows, -1]), false);
        let first = Tensor::embedding(embedding, &anchor, -1, false, false)
            .reshape([count, each, 1, hidden]);
        let mask = self.params.at(MASK, 0).reshape([1, 1, 1, hidden]);
        let masks = mask.expand([count, each, block - 1, hidden], false);
        let mut x = Tensor::cat(&[first, masks], 2).reshape([count, each * block, hidden]);
        let pass = Pass::new(self, blocks, rows, length);
        for layer in 0..self.plan.layers as usize {
            let h = self.norm(&x, NORM_IN, layer);
            x = x + self.attend(&h, &context, layer, &pass);
            let h = self.norm(&x, NORM_POST, layer);
            let gate_up = h.linear(self.params.at(GATE_UP, layer), None::<&Tensor>);
            let f = self.plan.ffn;
            let inner = gate_up.narrow(-1, 0, f).silu() * gate_up.narrow(-1, f, f);
            x = x + inner.linear(self.params.at(DOWN, layer), None::<&Tensor>);
        }
        self.norm(&x, NORM, 0).reshape([count, each, block, hidden])
    }

    fn attend(&self, h: &Tensor, context: &Tensor, layer: usize, pass: &Pass) -> Tensor {
        let (heads, kv, width) = (
            self.target.heads,
            self.target.kv_heads,
            self.target.head_dim,
        );
        let (count, queries, _) = h.size3().expect("block rows are [chunks, queries, hidden]");
        let q = h
            .linear(self.params.at(Q, layer), None::<&Tensor>)
            .reshape([count, queries, heads, width]);
        let q = rotate(
            &self.norm(&q, Q_NORM, layer),
            &pass.block_cos,
            &pass.block_sin,
        );
        let (k, v) = self.keys_values(h, layer, &pass.block_cos, &pass.block_sin);
        let (ck, cv) = self.keys_values(context, layer, &pass.context_cos, &pass.context_sin);
        let group = heads / kv;
        let q = q
            .reshape([count, queries, kv, group, width])
            .permute([0, 2, 3, 1, 4]);
        let sink = self.params.at(SINK, layer).reshape([1, kv, group, 1, 1]);
        let q = with_sink(&q, self.plan.sinks.then_some(&sink)).reshape([
            count,
            kv,
            group * queries,
            width + PAD,
        ]);
        let k = Tensor::cat(&[pass.reach(&ck), k], 1)
            .transpose(1, 2)
            .constant_pad_nd([0, PAD, 0, PAD]);
        let v = Tensor::cat(&[pass.reach(&cv), v], 1)
            .transpose(1, 2)
            .constant_pad_nd([0, 0, 0, PAD]);
        let k = &k + sink_key(k.size()[2], width, (self.kind, h.device()));
        let scale = 1.0 / (width as f64).sqrt();
        let out = Tensor::scaled_dot_product_attention(
            &q,
            &k,
            &v,
            Some(&pass.mask),
            0.0,
            false,
            scale,
            false,
        );
        out.reshape([count, kv, group, queries, width])
            .permute([0, 3, 1, 2, 4])
            .reshape([count, queries, heads * width])
            .linear(self.params.at(OUT, layer), None::<&Tensor>)
    }

    /// Keys (normed, rotated) and values of rows `[a, b, hidden]`: `[a, b, kv, width]` each.
    fn keys_values(
        &self,
        rows: &Tensor,
        layer: usize,
        cos: &Tensor,
        sin: &Tensor,
    ) -> (Tensor, Tensor) {
        let (kv, width) = (self.target.kv_heads, self.target.head_dim);
        let (a, b, _) = rows.size3().expect("rows are [a, b, hidden]");
        let both = rows
            .linear(self.params.at(KV, layer), None::<&Tensor>)
            .reshape([a, b, 2 * kv, width]);
        let k = self.norm(&both.narrow(2, 0, kv), K_NORM, layer);
        (rotate(&k, cos, sin), both.narrow(2, kv, kv))
    }
}

/// What all layers share in one pass.
struct Pass {
    block_cos: Tensor,
    block_sin: Tensor,
    context_cos: Tensor,
    context_sin: Tensor,
    mask: Tensor,
    rows: i64,
    chunks: i64,
    back: i64,
}

impl Pass {
    fn new(drafter: &Drafter, blocks: &Blocks, rows: i64, length: i64) -> Self {
        no_grad(|| {
            let device = blocks.anchors.device();
            let (_, chunks, each) = blocks
                .anchors
                .size3()
                .expect("anchors are [rows, chunks, blocks]");
            let plan = &drafter.plan;
            let (count, queries) = (rows * chunks, each * plan.block);
            let back = (plan.window + CHUNK - 1) / CHUNK;
            let int = (Kind::Int64, device);
            let offset = Tensor::arange(plan.block, int);
            let anchors = blocks.anchors.reshape([count, each, 1]);
            let positions = (&anchors + offset).reshape([count, queries]);
            let width = drafter.target.head_dim;
            let (bc, bs) = rotation(&positions, width, plan.theta);
            let (cc, cs) = rotation(&Tensor::arange(length, int), width, plan.theta);
            let four = |t: Tensor| {
                let size = t.size();
                let (a, b) = if t.dim() == 3 {
                    (size[0], size[1])
                } else {
                    (1, size[0])
                };
                t.to_kind(drafter.kind).reshape([a, b, 1, width / 2])
            };
            let anchor = anchors
                .expand([count, each, plan.block], false)
                .reshape([count, queries, 1]);
            let visible = visible(
                drafter,
                &anchor,
                &positions.unsqueeze(-1),
                rows,
                chunks,
                back,
            );
            let keys = visible.size()[2];
            let (kv, group) = (
                drafter.target.kv_heads,
                drafter.target.heads / drafter.target.kv_heads,
            );
            let mask = additive(&visible, drafter.kind)
                .reshape([count, 1, 1, queries, keys])
                .expand([count, 1, group, queries, keys], false)
                .reshape([count, 1, group * queries, keys])
                .expand([count, kv, group * queries, keys], false);
            Self {
                block_cos: four(bc),
                block_sin: four(bs),
                context_cos: four(cc),
                context_sin: four(cs),
                mask,
                rows,
                chunks,
                back,
            }
        })
    }

    /// `[rows, length, kv, width]` to `[rows * chunks, reached, kv, width]`.
    fn reach(&self, x: &Tensor) -> Tensor {
        let (_, _, kv, width) = x.size4().expect("keys are [rows, length, kv, width]");
        let padded = x
            .constant_pad_nd([0, 0, 0, 0, self.back * CHUNK, 0])
            .reshape([self.rows, self.chunks + self.back, CHUNK, kv, width]);
        let parts: Vec<Tensor> = (0..=self.back)
            .map(|i| padded.narrow(1, i, self.chunks))
            .collect();
        Tensor::cat(&parts, 2).reshape([
            self.rows * self.chunks,
            (self.back + 1) * CHUNK,
            kv,
            width,
        ])
    }
}

/// Which keys each query sees: `[rows * chunks, queries, reached + queries + PAD]`.
fn visible(
    drafter: &Drafter,
    anchor: &Tensor,
    position: &Tensor,
    rows: i64,
    chunks: i64,
    back: i64,
) -> Tensor {
    let int = (Kind::Int64, anchor.device());
    let (count, queries) = (rows * chunks, anchor.size()[1]);
    let reached = (back + 1) * CHUNK;
    let start = (Tensor::arange(chunks, int) - back) * CHUNK;
    let key = (start.unsqueeze(1) + Tensor::arange(reached, int))
        .repeat([rows, 1])
        .reshape([count, 1, reached]);
    let context = key
        .ge(0)
        .logical_and(&key.lt_tensor(anchor))
        .logical_and(&(position - &key).lt(drafter.plan.window));
    let block = Tensor::arange(queries, int).floor_divide_scalar(drafter.plan.block);
    let own = block
        .unsqueeze(1)
        .eq_tensor(&block)
        .expand([count, queries, queries], false);
    let sink = Tensor::arange(PAD, int)
        .eq(i64::from(!drafter.plan.sinks) * PAD)
        .expand([count, queries, PAD], false);
    Tensor::cat(&[context, own, sink], 2)
}
