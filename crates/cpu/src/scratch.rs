//! The buffers of a forward pass and the routing of its rows, sized once for the widest layer and
//! grown only when a batch has more rows than any before it.

use std::sync::RwLock;

use model::config::{AttentionConfig, Config, FfnConfig};

use crate::activations::Activations;
use crate::buffer::Buffer;

/// Widest dimensions of a model, drafter included.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Widths {
    pub hidden: usize,
    /// Q, K and V of one row.
    pub projected: usize,
    /// Concatenated heads.
    pub heads: usize,
    pub experts: usize,
    /// Experts a row uses times their inner width.
    pub inner: usize,
    pub active: usize,
    /// Tapped columns of one row.
    pub taps: usize,
}

impl Widths {
    pub(crate) fn of(config: &Config) -> Self {
        let mut widths = Self {
            hidden: config.hidden,
            ..Self::default()
        };
        for layer in &config.layers {
            widths.attention(&layer.attention);
            match &layer.ffn {
                FfnConfig::Dense { intermediate } => widths.ffn(1, 1, *intermediate),
                FfnConfig::Moe(moe) => widths.ffn(moe.experts, moe.active, moe.intermediate),
            }
        }
        widths
    }

    pub(crate) fn attention(&mut self, a: &AttentionConfig) {
        let projected = a.heads * a.qk_dim + a.kv_heads * (a.qk_dim + a.v_dim);
        self.projected = self.projected.max(projected);
        self.heads = self.heads.max(a.heads * a.v_dim);
    }

    pub(crate) fn ffn(&mut self, experts: usize, active: usize, inner: usize) {
        self.experts = self.experts.max(experts);
        self.active = self.active.max(active);
        // Rows of activations are padded to whole blocks.
        self.inner = self.inner.max(active * inner.next_multiple_of(32));
    }
}

/// Buffers of a forward pass.
pub(crate) struct Scratch {
    widths: Widths,
    rows: usize,
    row_list: Vec<u32>,
    /// `[rows, hidden]`: residual stream.
    pub x: Buffer<f32>,
    /// `[rows, hidden]`: after a norm.
    pub normed: Buffer<f32>,
    /// The same, as activations.
    pub h: Activations,
    /// `[rows, q | k | v]`.
    pub projected: Buffer<f32>,
    /// `[rows, heads * v_dim]`.
    pub attended: Buffer<f32>,
    /// The same, as activations.
    pub heads: Activations,
    /// `[rows, experts]`.
    pub scores: Buffer<f32>,
    /// `[pairs, inner]` each.
    pub gate: Buffer<f32>,
    pub up: Buffer<f32>,
    pub inner_plain: Buffer<f32>,
    /// The same, as activations.
    pub inner: Activations,
    /// `[rows, hidden]`: sum over experts.
    pub ffn: Buffer<f32>,
    /// `[rows, taps, hidden]`.
    pub taps: Buffer<f32>,
    /// `[rows, vocab_size]`, grown on demand.
    pub logits: Buffer<f32>,
    pub routing: RwLock<Routing>,
}

impl Scratch {
    pub(crate) fn new(widths: Widths, rows: usize) -> Self {
        Self {
            widths,
            rows,
            row_list: (0..rows as u32).collect(),
            x: Buffer::new(rows * widths.hidden),
            normed: Buffer::new(rows * widths.hidden),
            h: Activations::new(rows, widths.hidden),
            projected: Buffer::new(rows * widths.projected),
            attended: Buffer::new(rows * widths.heads),
            heads: Activations::new(rows, widths.heads),
            scores: Buffer::new(rows * widths.experts),
            gate: Buffer::new(rows * widths.inner),
            up: Buffer::new(rows * widths.inner),
            inner_plain: Buffer::new(rows * widths.inner),
            inner: Activations::new(rows, widths.inner),
            ffn: Buffer::new(rows * widths.hidden),
            taps: Buffer::new(0),
            logits: Buffer::new(0),
            routing: RwLock::new(Routing::with_capacity(rows * widths.active, widths.experts)),
        }
    }

    /// Makes room for `rows` rows and `logits` floats of logits.
    pub(crate) fn reach(&mut self, rows: usize, logits: usize) {
        if rows > self.rows {
            let logits = std::mem::replace(&mut self.logits, Buffer::new(0));
            *self = Self::new(self.widths, rows);
            self.logits = logits;
        }
        self.logits.grow(logits);
    }

    /// Makes room for `rows` tapped rows.
    pub(crate) fn reach_taps(&mut self, rows: usize) {
        self.taps.grow(rows * self.widths.hidden);
    }

    /// `0..rows`.
    pub(crate) fn row_list(&self, rows: usize) -> &[u32] {
        &self.row_list[..rows]
    }

    /// Q, K and V of a row, to change.
    ///
    /// # Safety
    /// No other thread touches the row until the next barrier.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn projections(&self, row: usize, a: &AttentionConfig) -> [&mut [f32]; 3] {
        let (q, k, v) = (
            a.heads * a.qk_dim,
            a.kv_heads * a.qk_dim,
            a.kv_heads * a.v_dim,
        );
        let width = q + k + v;
        // SAFETY: by contract.
        let all = unsafe { self.projected.write(row * width..(row + 1) * width) };
        let (q, rest) = all.split_at_mut(q);
        let (k, v) = rest.split_at_mut(k);
        [q, k, v]
    }

    /// Q, K and V of a row, to read.
    ///
    /// # Safety
    /// No thread writes the row until the next barrier.
    pub(crate) unsafe fn projections_read(&self, row: usize, a: &AttentionConfig) -> [&[f32]; 3] {
        let (q, k, v) = (
            a.heads * a.qk_dim,
            a.kv_heads * a.qk_dim,
            a.kv_heads * a.v_dim,
        );
        let width = q + k + v;
        // SAFETY: by contract.
        let all = unsafe { self.projected.read(row * width..(row + 1) * width) };
        let (q, rest) = all.split_at(q);
        let (k, v) = rest.split_at(k);
        [q, k, v]
    }
}

/// Which rows go to which expert. A pair is a row at one of its experts; pairs are numbered expert
/// by expert.
pub(crate) struct Routing {
    active: usize,
    rows: usize,
    /// `[rows, active]`: expert and weight.
    chosen: Vec<(u32, f32)>,
    /// Experts in use, ascending, with their first pair.
    experts: Vec<(usize, usize)>,
    /// Row of each pair.
    pair_rows: Vec<u32>,
    /// Weight of each pair.
    weights: Vec<f32>,
    /// `0..pairs`.
    numbers: Vec<u32>,
    /// Pairs of each expert while they are counted.
    counts: Vec<usize>,
}

/// The pairs of one expert.
pub(crate) struct ExpertList<'a> {
    /// Number of the first pair.
    pub first: usize,
    /// Rows, ascending.
    pub rows: &'a [u32],
    /// Numbers of the pairs.
    pub pairs: &'a [u32],
    /// Weights.
    pub weights: &'a [f32],
}

impl Routing {
    fn with_capacity(pairs: usize, experts: usize) -> Self {
        Self {
            active: 1,
            rows: 0,
            chosen: Vec::with_capacity(pairs),
            experts: Vec::with_capacity(experts),
            pair_rows: vec![0; pairs],
            weights: vec![0.0; pairs],
            numbers: (0..pairs as u32).collect(),
            counts: vec![0; experts],
        }
    }

    /// One expert for all rows, with weight 1.
    pub(crate) fn dense(&mut self, rows: usize) {
        self.begin(1);
        for _ in 0..rows {
            self.next_row()[0] = (0, 1.0);
        }
        self.finish();
    }

    pub(crate) fn begin(&mut self, active: usize) {
        self.active = active;
        self.rows = 0;
        self.chosen.clear();
    }

    /// The next row's experts and weights, to be filled.
    pub(crate) fn next_row(&mut self) -> &mut [(u32, f32)] {
        self.rows += 1;
        let start = self.chosen.len();
        self.chosen.resize(start + self.active, (0, 0.0));
        &mut self.chosen[start..]
    }

    /// Sorts the pairs by expert (a counting sort, which keeps rows ascending).
    pub(crate) fn finish(&mut self) {
        self.counts.fill(0);
        for (expert, _) in &self.chosen {
            self.counts[*expert as usize] += 1;
        }
        self.experts.clear();
        let mut start = 0;
        for (expert, count) in self.counts.iter_mut().enumerate() {
            if *count > 0 {
                self.experts.push((expert, start));
                start += std::mem::replace(count, start);
            }
        }
        for (i, (expert, weight)) in self.chosen.iter().enumerate() {
            let at = &mut self.counts[*expert as usize];
            self.pair_rows[*at] = (i / self.active) as u32;
            self.weights[*at] = *weight;
            *at += 1;
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn pairs(&self) -> usize {
        self.chosen.len()
    }

    /// Experts in use, ascending, each with its first pair.
    pub(crate) fn experts(&self) -> impl Iterator<Item = (usize, usize)> + Clone {
        self.experts.iter().copied()
    }

    /// Pairs of the `i`-th expert in use.
    pub(crate) fn list(&self, i: usize) -> ExpertList<'_> {
        let first = self.experts[i].1;
        let end = self.experts.get(i + 1).map_or(self.pairs(), |next| next.1);
        ExpertList {
            first,
            rows: &self.pair_rows[first..end],
            pairs: &self.numbers[first..end],
            weights: &self.weights[first..end],
        }
    }
}
