//! A schedule run with reference ops on the CPU: the same instructions and buffers as on the device,
//! every rank of the group, one instruction at a time.
//!
//! Stops where it is asked to, so that a named buffer of the device can be compared after any
//! instruction ([`Replay::buffer`], [`largest_difference`]). Owns no arithmetic: each instruction
//! calls the definition in `model::reference` on this rank's slice of the weights. What it adds is
//! which rank holds which heads, inner columns and vocabulary, and that the parts sum to the whole.

mod draft;
mod operand;

use std::cell::OnceCell;
use std::collections::BTreeMap;

use model::Config;
use model::TokenId;
use model::config::{AttentionConfig, FfnConfig, MoeConfig};
use model::reference::attention::{KeysValues, attention, visible};
use model::reference::network::{Dense, add};
use model::reference::rope::rope;
use model::reference::router::route;
use model::reference::swiglu::swiglu;
use model::weights::{FfnWeights, SwigluWeights, Weights};

use crate::images::Numbers;
use crate::load::layer_formats;
use crate::program::{HEAD_COLUMNS, LayerFormats};
use crate::schedule::{Buffer, Instruction, Op, Pass, Schedule};

/// Rows of a step: `[rows][width]`.
type Rows = Vec<Vec<f32>>;

/// An expert, decoded when a row chooses it first: of a large layer only those.
struct Expert<'a> {
    weights: SwigluWeights<'a>,
    unit: OnceCell<Unit>,
}

impl<'a> Expert<'a> {
    fn new(weights: &SwigluWeights<'a>) -> Self {
        Self {
            weights: weights.clone(),
            unit: OnceCell::new(),
        }
    }

    fn unit(&self) -> &Unit {
        self.unit.get_or_init(|| Unit::new(&self.weights))
    }
}

struct Unit {
    gate: Dense,
    up: Dense,
    down: Dense,
}

struct Layer<'a> {
    input_norm: Vec<f32>,
    q: Dense,
    k: Dense,
    v: Dense,
    o: Dense,
    sinks: Option<Vec<f32>>,
    post_norm: Vec<f32>,
    router: Option<(Dense, Vec<f32>)>,
    units: Vec<Expert<'a>>,
    formats: LayerFormats,
}

/// Keys and values of one rank and layer.
#[derive(Clone, Default)]
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// All ranks of a group, between two instructions.
pub struct Replay<'a> {
    config: &'a Config,
    schedule: &'a Schedule,
    embed: Dense,
    lm_head: Dense,
    norm: Vec<f32>,
    layers: Vec<Layer<'a>>,
    caches: Vec<Vec<Cache>>,
    buffers: Vec<BTreeMap<Buffer, Rows>>,
    /// How a device keeps numbers; none: f32.
    device: Option<Numbers>,
    drafter: Option<draft::Drafter>,
}

/// The part of rank `rank` of `0..size`.
fn part(size: usize, rank: usize, ranks: usize) -> std::ops::Range<usize> {
    size * rank / ranks..size * (rank + 1) / ranks
}

/// Rows `range` of `matrix` times `x`.
fn times_rows(matrix: &Dense, range: std::ops::Range<usize>, x: &[f32]) -> Vec<f32> {
    let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| w * x).sum();
    range.map(|r| dot(matrix.row(r))).collect()
}

/// All `rows` rows of `matrix`, columns `range`, times `x`.
fn times_columns(
    matrix: &Dense,
    rows: usize,
    range: &std::ops::Range<usize>,
    x: &[f32],
) -> Vec<f32> {
    let dot = |row: &[f32]| row[range.clone()].iter().zip(x).map(|(w, x)| w * x).sum();
    (0..rows).map(|r| dot(matrix.row(r))).collect()
}

impl Unit {
    fn new(weights: &SwigluWeights<'_>) -> Self {
        Self {
            gate: Dense::new(&weights.gate),
            up: Dense::new(&weights.up),
            down: Dense::new(&weights.down),
        }
    }

    /// This rank's inner columns of one row.
    fn inner(&self, range: std::ops::Range<usize>, h: &[f32]) -> Vec<f32> {
        let mut gate = times_rows(&self.gate, range.clone(), h);
        swiglu(&mut gate, &times_rows(&self.up, range, h));
        gate
    }
}

impl<'a> Replay<'a> {
    /// Decodes the weights; empty caches.
    #[must_use]
    pub fn new(config: &'a Config, weights: &Weights<'a>, schedule: &'a Schedule) -> Self {
        let ranks = schedule.shard.ranks;
        let layer = |l: &model::weights::LayerWeights<'a>| Layer {
            formats: layer_formats(l),
            input_norm: l.input_norm.clone(),
            q: Dense::new(&l.q),
            k: Dense::new(&l.k),
            v: Dense::new(&l.v),
            o: Dense::new(&l.o),
            sinks: l.sinks.clone(),
            post_norm: l.post_norm.clone(),
            router: match &l.ffn {
                FfnWeights::Dense(_) => None,
                FfnWeights::Moe {
                    router,
                    correction_bias,
                    ..
                } => Some((Dense::new(router), correction_bias.clone())),
            },
            units: match &l.ffn {
                FfnWeights::Dense(unit) => vec![Expert::new(unit)],
                FfnWeights::Moe { experts, .. } => experts.iter().map(Expert::new).collect(),
            },
        };
        Self {
            config,
            schedule,
            embed: Dense::new(&weights.embed),
            lm_head: Dense::new(&weights.lm_head),
            norm: weights.norm.clone(),
            layers: weights.layers.iter().map(layer).collect(),
            caches: vec![vec![Cache::default(); config.layers.len()]; ranks],
            buffers: vec![BTreeMap::new(); ranks],
            device: None,
            drafter: None,
        }
    }

    /// Runs the first `count` instructions on `tokens` at `position` and the following ones.
    pub fn run(&mut self, tokens: &[TokenId], position: usize, count: usize) {
        for n in 0..count.min(self.schedule.instructions.len()) {
            self.instruction(n, tokens, position);
        }
    }

    /// Runs instruction `n` alone, on what the buffers hold.
    pub fn instruction(&mut self, n: usize, tokens: &[TokenId], position: usize) {
        {
            let i = &self.schedule.instructions[n];
            let ranks = 0..self.schedule.shard.ranks;
            // All ranks read before any writes: an all-reduce sees its peers as they were.
            let made: Vec<Rows> = ranks
                .map(|rank| self.execute(i, rank, tokens, position))
                .collect();
            for (rank, rows) in made.into_iter().enumerate() {
                for (buffer, _) in &i.writes {
                    self.buffers[rank].insert(*buffer, rows.clone());
                }
            }
        }
    }

    /// Replaces a buffer, e.g. by what a device made of it.
    pub fn put(&mut self, rank: usize, buffer: Buffer, rows: Vec<Vec<f32>>) {
        self.buffers[rank].insert(buffer, rows);
    }

    /// `(expert, weight)` of a row by the router logits in the buffers, ascending; none in a dense layer.
    #[must_use]
    pub fn experts(&self, layer: usize, rank: usize, row: usize) -> Vec<(usize, f32)> {
        match &self.config.layers[layer].ffn {
            FfnConfig::Dense { .. } => Vec::new(),
            FfnConfig::Moe(moe) => self.routed(&self.layers[layer], moe, rank, row),
        }
    }

    /// Rows of a buffer as the last instruction that wrote it left them; empty before.
    #[must_use]
    pub fn buffer(&self, rank: usize, buffer: Buffer) -> &[Vec<f32>] {
        self.buffers[rank].get(&buffer).map_or(&[], Vec::as_slice)
    }

    fn execute(
        &mut self,
        i: &Instruction,
        rank: usize,
        tokens: &[TokenId],
        position: usize,
    ) -> Rows {
        if i.pass != Pass::Verify {
            return self.draft_execute(i, rank, tokens, position);
        }
        let layer = i.layer.unwrap_or(0);
        match i.op {
            Op::Embed => tokens
                .iter()
                .map(|&t| self.embed.row(t as usize).to_vec())
                .collect(),
            Op::Attention => self.attend(layer, rank, position),
            Op::AllReduce => self.all_reduce(rank),
            Op::Choose => self.choose(tokens.len()),
            op => (0..tokens.len())
                .map(|row| self.row(op, layer, rank, row))
                .collect(),
        }
    }

    /// The instructions that take one row to one row.
    fn row(&self, op: Op, layer: usize, rank: usize, row: usize) -> Vec<f32> {
        let x = |buffer| self.buffer(rank, buffer)[row].as_slice();
        let (l, c) = (&self.layers[layer], &self.config.layers[layer]);
        let ranks = self.schedule.shard.ranks;
        match op {
            Op::Qkv => self.qkv(l, &c.attention, rank, x(Buffer::X)),
            Op::OProj => {
                let columns = part(c.attention.heads * c.attention.v_dim, rank, ranks);
                let heads = x(Buffer::Heads).chunks(c.attention.v_dim);
                let operand = |head| self.operand(l.formats.o, head, HEAD_COLUMNS);
                let heads: Vec<f32> = heads.flat_map(operand).collect();
                times_columns(&l.o, self.config.hidden, &columns, &heads)
            }
            Op::Router => {
                let (router, bias) = l
                    .router
                    .as_ref()
                    .expect("a router instruction has a router");
                times_rows(
                    router,
                    0..bias.len(),
                    &self.normed(&l.post_norm, x(Buffer::X), self.config.eps),
                )
            }
            Op::GateUp => {
                let h = self.normed_for(l.formats.gate_up, &l.post_norm, x(Buffer::X));
                self.gate_up(l, &c.ffn, rank, row, &h)
            }
            Op::Down => self.down(l, &c.ffn, rank, row),
            Op::LmHead => {
                let h = self.normed(&self.norm, x(Buffer::X), self.config.eps);
                times_rows(&self.lm_head, part(self.config.vocab_size, rank, ranks), &h)
            }
            Op::Argmax => self.argmax(rank, x(Buffer::Logits)),
            _ => {
                unreachable!("these take all rows at once")
            }
        }
    }

    /// `[value, token]` of this rank's best.
    fn argmax(&self, rank: usize, logits: &[f32]) -> Vec<f32> {
        let best = model::reference::sample::first_largest(logits).unwrap_or(0);
        let ranks = self.schedule.shard.ranks;
        let first = part(self.config.vocab_size, rank, ranks).start;
        vec![logits[best as usize], (first + best as usize) as f32]
    }

    /// q, k and v of this rank's heads, one after the other.
    fn qkv(&self, l: &Layer<'_>, a: &AttentionConfig, rank: usize, x: &[f32]) -> Vec<f32> {
        let h = self.normed_for(l.formats.qkv, &l.input_norm, x);
        let ranks = self.schedule.shard.ranks;
        let mut out = times_rows(&l.q, part(a.heads * a.qk_dim, rank, ranks), &h);
        out.extend(times_rows(
            &l.k,
            part(a.kv_heads * a.qk_dim, rank, ranks),
            &h,
        ));
        out.extend(times_rows(
            &l.v,
            part(a.kv_heads * a.v_dim, rank, ranks),
            &h,
        ));
        out
    }

    /// Scales, rotates and appends this rank's keys and values, then attends row by row.
    fn attend(&mut self, layer: usize, rank: usize, position: usize) -> Rows {
        let ranks = self.schedule.shard.ranks;
        let mut a = self.config.layers[layer].attention.clone();
        let sinks = self.layers[layer]
            .sinks
            .as_ref()
            .map(|s| s[part(a.heads, rank, ranks)].to_vec());
        a.heads /= ranks;
        a.kv_heads /= ranks;
        let rows = self.buffer(rank, Buffer::Qkv).to_vec();
        let Cache {
            mut keys,
            mut values,
        } = std::mem::take(&mut self.caches[rank][layer]);
        keys.truncate(position * a.kv_heads * a.qk_dim);
        values.truncate(position * a.kv_heads * a.v_dim);
        let mut out = Vec::with_capacity(rows.len());
        for (row, qkv) in rows.into_iter().enumerate() {
            let at = position + row;
            let (q, kv) = qkv.split_at(a.heads * a.qk_dim);
            let (k, v) = kv.split_at(a.kv_heads * a.qk_dim);
            let (mut q, mut k) = (q.to_vec(), k.to_vec());
            rope(&mut q, a.qk_dim, a.rope_dims, a.rope_theta, at as u32);
            rope(&mut k, a.qk_dim, a.rope_dims, a.rope_theta, at as u32);
            keys.extend(k.into_iter().map(|k| self.cached(k)));
            values.extend(v.iter().map(|v| self.cached(v * a.value_scale)));
            let mut heads = vec![0.0; a.heads * a.v_dim];
            let view = KeysValues {
                keys: &keys,
                values: &values,
            };
            attention(
                &a,
                &q,
                view,
                visible(at, a.window),
                sinks.as_deref(),
                &mut heads,
            );
            out.push(heads);
        }
        self.caches[rank][layer] = Cache { keys, values };
        out.into_iter().map(|heads| self.keep(heads)).collect()
    }

    /// The residual plus every rank's part, in rank order.
    fn all_reduce(&self, rank: usize) -> Rows {
        let mut x = self.buffer(rank, Buffer::X).to_vec();
        for (row, x) in x.iter_mut().enumerate() {
            let mut sum = vec![0.0; x.len()];
            for from in 0..self.schedule.shard.ranks {
                add(&mut sum, &self.buffer(from, Buffer::Partial)[row]);
            }
            add(x, &sum);
        }
        x
    }

    /// `(expert, weight)` of a row, ascending.
    fn routed(&self, l: &Layer<'_>, moe: &MoeConfig, rank: usize, row: usize) -> Vec<(usize, f32)> {
        let bias = l.router.as_ref().map_or(&[][..], |(_, bias)| bias);
        route(moe, &self.buffer(rank, Buffer::RouterLogits)[row], bias)
    }

    /// Inner columns of the chosen experts one after the other, or of the dense unit.
    fn gate_up(
        &self,
        l: &Layer<'_>,
        ffn: &FfnConfig,
        rank: usize,
        row: usize,
        h: &[f32],
    ) -> Vec<f32> {
        let ranks = self.schedule.shard.ranks;
        let inner = match ffn {
            FfnConfig::Dense { intermediate } => {
                l.units[0].unit().inner(part(*intermediate, rank, ranks), h)
            }
            FfnConfig::Moe(moe) => {
                let chosen = self.routed(l, moe, rank, row).into_iter();
                let range = part(moe.intermediate, rank, ranks);
                chosen
                    .flat_map(|(e, _)| l.units[e].unit().inner(range.clone(), h))
                    .collect()
            }
        };
        self.keep(inner)
    }

    fn down(&self, l: &Layer<'_>, ffn: &FfnConfig, rank: usize, row: usize) -> Vec<f32> {
        let (ranks, hidden) = (self.schedule.shard.ranks, self.config.hidden);
        let width = match ffn {
            FfnConfig::Dense { intermediate } => part(*intermediate, rank, ranks).len(),
            FfnConfig::Moe(moe) => part(moe.intermediate, rank, ranks).len(),
        };
        let inner = self.buffer(rank, Buffer::Inner)[row].chunks(width);
        let operand = |of_expert| self.operand(l.formats.down, of_expert, 32);
        let inner = &inner.flat_map(operand).collect::<Vec<f32>>();
        match ffn {
            FfnConfig::Dense { intermediate } => times_columns(
                &l.units[0].unit().down,
                hidden,
                &part(*intermediate, rank, ranks),
                inner,
            ),
            FfnConfig::Moe(moe) => {
                let range = part(moe.intermediate, rank, ranks);
                let mut out = vec![0.0; hidden];
                let chosen = self.routed(l, moe, rank, row);
                for ((expert, weight), inner) in chosen.into_iter().zip(inner.chunks(range.len())) {
                    let part = times_columns(&l.units[expert].unit().down, hidden, &range, inner);
                    for (out, part) in out.iter_mut().zip(part) {
                        *out += weight * part;
                    }
                }
                out
            }
        }
    }

    /// The best of the ranks' bests; the lower token among equals.
    fn choose(&self, rows: usize) -> Rows {
        let best = |row: usize| {
            let of = |rank: usize| &self.buffer(rank, Buffer::Best)[row];
            (1..self.schedule.shard.ranks).fold(of(0), |a, rank| {
                let b = of(rank);
                if b[0] > a[0] { b } else { a }
            })
        };
        (0..rows).map(|row| vec![best(row)[1]]).collect()
    }
}

/// Largest |a - b| over rows, relative to the largest |b|; infinite when shapes differ.
#[must_use]
pub fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    if a.len() != b.len() || a.iter().zip(b).any(|(a, b)| a.len() != b.len()) {
        return f32::INFINITY;
    }
    let pairs = || a.iter().flatten().zip(b.iter().flatten());
    let scale = pairs().fold(f32::MIN_POSITIVE, |m, (_, b)| m.max(b.abs()));
    pairs().fold(0.0, |m: f32, (a, b)| {
        let d = (a - b).abs() / scale;
        if d.is_nan() { f32::INFINITY } else { m.max(d) }
    })
}
