//! The drafter's instructions with reference ops: its block, and the context that it keeps.
//!
//! Owns the drafter's caches of every rank. The definition is `model::reference::DraftNetwork`; what
//! this adds is which rank has which heads, inner columns and columns of `fc`. Rows of a draft pass
//! are the anchor and as many masks as the step has tokens besides.

use formats::bf16;
use model::TokenId;
use model::draft::{DraftConfig, DraftWeights};
use model::reference::attention::{KeysValues, attention};
use model::reference::network::{Dense, add};
use model::reference::rms_norm::rms_norm;
use model::reference::rope::rope;

use super::{Cache, Replay, Rows, Unit, part, times_columns, times_rows};
use crate::program::{tap_columns, tap_stride};
use crate::schedule::{Buffer, Instruction, Op, Pass};

struct Linear {
    matrix: Dense,
    bias: Option<Vec<f32>>,
}

struct Layer {
    input_norm: Vec<f32>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    sinks: Option<Vec<f32>>,
    post_norm: Vec<f32>,
    unit: Unit,
}

/// A drafter between two instructions.
pub(super) struct Drafter {
    config: DraftConfig,
    fc: Dense,
    hidden_norm: Vec<f32>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    mask: Vec<f32>,
    /// `[ranks][layers]`.
    caches: Vec<Vec<Cache>>,
}

impl Linear {
    fn new(p: &model::draft::weights::Projection<'_>) -> Self {
        Self {
            matrix: Dense::new(&p.matrix),
            bias: p.bias.clone(),
        }
    }

    fn rows(&self, range: std::ops::Range<usize>, x: &[f32]) -> Vec<f32> {
        let mut out = times_rows(&self.matrix, range.clone(), x);
        if let Some(bias) = &self.bias {
            add(&mut out, &bias[range]);
        }
        out
    }
}

/// RMSNorm of every head. `heads`: `[count, dim]`; `weight`: `[dim]`.
fn head_norm(heads: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0.0; heads.len()];
    let pairs = heads.chunks_exact(weight.len());
    for (head, out) in pairs.zip(out.chunks_exact_mut(weight.len())) {
        rms_norm(head, weight, eps, out);
    }
    out
}

impl Replay<'_> {
    /// With a drafter, whose passes the schedule has. `mask`: its embedding; else the target's row.
    #[must_use]
    pub fn with_draft(
        mut self,
        config: &DraftConfig,
        weights: &DraftWeights<'_>,
        mask: Option<&[f32]>,
    ) -> Self {
        let layer = |l: &model::draft::weights::DraftLayerWeights<'_>| Layer {
            input_norm: l.input_norm.clone(),
            q: Linear::new(&l.q),
            k: Linear::new(&l.k),
            v: Linear::new(&l.v),
            o: Linear::new(&l.o),
            q_norm: l.q_norm.clone(),
            k_norm: l.k_norm.clone(),
            sinks: l.sinks.clone(),
            post_norm: l.post_norm.clone(),
            unit: Unit::new(&l.ffn),
        };
        let own = self.embed.row(config.mask_token as usize);
        let caches = vec![Cache::default(); config.layers.len()];
        self.drafter = Some(Drafter {
            mask: mask.unwrap_or(own).to_vec(),
            fc: Dense::new(&weights.fc),
            hidden_norm: weights.hidden_norm.clone(),
            layers: weights.layers.iter().map(layer).collect(),
            norm: weights.norm.clone(),
            caches: vec![caches; self.schedule.shard.ranks],
            config: config.clone(),
        });
        self
    }

    /// One instruction of the draft or context pass on one rank.
    pub(super) fn draft_execute(
        &mut self,
        i: &Instruction,
        rank: usize,
        tokens: &[TokenId],
        position: usize,
    ) -> Rows {
        let Some(mut drafter) = self.drafter.take() else {
            return Rows::new();
        };
        let l = i.layer.unwrap_or(0);
        let rows = match i.op {
            Op::DraftEmbed => {
                let mut rows = vec![drafter.mask.clone(); tokens.len()];
                rows[0] = self.embed.row(tokens[0] as usize).to_vec();
                rows
            }
            Op::DraftAttention => self.draft_attend(&drafter, l, rank, position),
            Op::AllReduce => self.all_reduce(rank),
            Op::DraftChoose => self.choose(tokens.len()),
            Op::Context => self.context_sum(),
            Op::Append => self.append(&mut drafter, rank, position),
            op => (0..tokens.len())
                .map(|row| self.draft_row(&drafter, (op, i.pass), l, rank, row))
                .collect(),
        };
        self.drafter = Some(drafter);
        rows
    }

    fn draft_row(
        &self,
        d: &Drafter,
        (op, pass): (Op, Pass),
        l: usize,
        rank: usize,
        row: usize,
    ) -> Vec<f32> {
        let x = |buffer| self.buffer(rank, buffer)[row].as_slice();
        let (layer, a, eps) = (&d.layers[l], &d.config.attention, d.config.eps);
        let ranks = self.schedule.shard.ranks;
        let inner = part(d.config.intermediate, rank, ranks);
        match op {
            Op::Qkv => {
                let h = self.normed(&layer.input_norm, x(Buffer::X), eps);
                let mut out = layer.q.rows(part(a.heads * a.qk_dim, rank, ranks), &h);
                self.kv(d, l, rank, &h, &mut out);
                out
            }
            Op::OProj => {
                let columns = part(a.heads * a.v_dim, rank, ranks);
                let mut out =
                    times_columns(&layer.o.matrix, d.config.hidden, &columns, x(Buffer::Heads));
                if let (0, Some(bias)) = (rank, &layer.o.bias) {
                    add(&mut out, bias);
                }
                out
            }
            Op::GateUp => {
                let h = self.normed(&layer.post_norm, x(Buffer::X), eps);
                self.keep(layer.unit.inner(inner, &h))
            }
            Op::Down => times_columns(&layer.unit.down, d.config.hidden, &inner, x(Buffer::Inner)),
            Op::Fuse => self.fuse(d, rank, row),
            Op::ContextKv => {
                let h = self.normed(&d.hidden_norm, x(Buffer::Context), eps);
                let mut out = Vec::new();
                (0..d.layers.len()).for_each(|l| self.kv(d, l, rank, &h, &mut out));
                out
            }
            Op::LmHead => {
                let h = self.normed(&d.norm, x(Buffer::X), eps);
                times_rows(&self.lm_head, part(self.config.vocab_size, rank, ranks), &h)
            }
            Op::Argmax => self.argmax(rank, x(Buffer::Logits)),
            _ => unreachable!("{op:?} of {pass:?} takes all rows at once"),
        }
    }

    /// Keys and values of this rank's heads.
    fn kv(&self, d: &Drafter, l: usize, rank: usize, h: &[f32], out: &mut Vec<f32>) {
        let (layer, a, ranks) = (&d.layers[l], &d.config.attention, self.schedule.shard.ranks);
        out.extend(layer.k.rows(part(a.kv_heads * a.qk_dim, rank, ranks), h));
        out.extend(layer.v.rows(part(a.kv_heads * a.v_dim, rank, ranks), h));
    }

    /// This rank's columns of the taps times `fc`.
    fn fuse(&self, d: &Drafter, rank: usize, row: usize) -> Vec<f32> {
        let (hidden, stride) = (d.config.hidden, tap_stride(d.config.hidden));
        let own = tap_columns(&d.config, rank, self.schedule.shard.ranks);
        let mut taps = vec![0.0; d.config.taps.len() * hidden];
        for at in own {
            let (tap, column) = (at / stride, at % stride);
            if tap < d.config.taps.len() && column < hidden {
                taps[tap * hidden + column] = self.buffer(rank, Buffer::Tap(tap))[row][column];
            }
        }
        d.fc.times(&self.keep(taps))
    }

    fn context_sum(&self) -> Rows {
        let rows = self.buffer(0, Buffer::Partial).len();
        let sum = |row: usize| {
            let mut sum = vec![0.0; self.config.hidden];
            for from in 0..self.schedule.shard.ranks {
                add(&mut sum, &self.buffer(from, Buffer::Partial)[row]);
            }
            sum
        };
        (0..rows).map(sum).collect()
    }

    /// Adds a row's keys and values to a cache.
    fn put_kv(&self, d: &Drafter, l: usize, kv: &[f32], at: usize, theta: f32, cache: &mut Cache) {
        let (a, ranks) = (&d.config.attention, self.schedule.shard.ranks);
        let (k, v) = kv.split_at(a.kv_heads / ranks * a.qk_dim);
        let mut k = head_norm(k, &d.layers[l].k_norm, d.config.eps);
        rope(&mut k, a.qk_dim, a.rope_dims, theta, at as u32);
        let keep = |v: f32| {
            if self.device.is_some() {
                bf16::round(v)
            } else {
                v
            }
        };
        cache.keys.extend(k.into_iter().map(keep));
        let values = v.iter().map(|v| keep(v * a.value_scale));
        cache.values.extend(values);
    }

    /// All rows of the step: without a chain the host decides what is kept.
    fn append(&self, d: &mut Drafter, rank: usize, position: usize) -> Rows {
        let (a, theta) = (d.config.attention.clone(), d.config.context_rope_theta);
        let ranks = self.schedule.shard.ranks;
        let width = a.kv_heads / ranks * (a.qk_dim + a.v_dim);
        let mut caches = std::mem::take(&mut d.caches[rank]);
        for (l, cache) in caches.iter_mut().enumerate() {
            cache
                .keys
                .truncate(position * a.kv_heads / ranks * a.qk_dim);
            cache
                .values
                .truncate(position * a.kv_heads / ranks * a.v_dim);
            for (row, kv) in self.buffer(rank, Buffer::ContextKv).iter().enumerate() {
                let kv = &kv[l * width..(l + 1) * width];
                self.put_kv(d, l, kv, position + row, theta, cache);
            }
        }
        d.caches[rank] = caches;
        Rows::new()
    }

    fn draft_attend(&self, d: &Drafter, l: usize, rank: usize, position: usize) -> Rows {
        let ranks = self.schedule.shard.ranks;
        let (mut a, layer, window) = (d.config.attention.clone(), &d.layers[l], d.config.layers[l]);
        let sinks = layer.sinks.as_ref();
        let sinks = sinks.map(|s| s[part(a.heads, rank, ranks)].to_vec());
        a.heads /= ranks;
        a.kv_heads /= ranks;
        let rows = self.buffer(rank, Buffer::Qkv);
        let mut cache = d.caches[rank][l].clone();
        cache.keys.truncate(position * a.kv_heads * a.qk_dim);
        cache.values.truncate(position * a.kv_heads * a.v_dim);
        for (row, qkv) in rows.iter().enumerate() {
            let kv = &qkv[a.heads * a.qk_dim..];
            self.put_kv(d, l, kv, position + row, a.rope_theta, &mut cache);
        }
        let attend = |(row, qkv): (usize, &Vec<f32>)| {
            let at = position + row;
            let mut q = head_norm(&qkv[..a.heads * a.qk_dim], &layer.q_norm, d.config.eps);
            rope(&mut q, a.qk_dim, a.rope_dims, a.rope_theta, at as u32);
            let seen = (0..position + rows.len()).filter(|&key| window.sees(at, key));
            let view = KeysValues {
                keys: &cache.keys,
                values: &cache.values,
            };
            let mut heads = vec![0.0; a.heads * a.v_dim];
            attention(&a, &q, view, seen, sinks.as_deref(), &mut heads);
            self.keep(heads)
        };
        rows.iter().enumerate().map(attend).collect()
    }
}
