//! The target's forward pass over a batch of rows, walked by all threads of a team together.
//!
//! Owns the packed weights and the order of phases. Between two barriers every thread writes its own
//! rows, panels or pairs and reads what the phase before has finished. A batch may hold rows of many
//! sequences; a row's arithmetic does not depend on the others.

mod packer;
mod phases;

use model::config::{AttentionConfig, Config, FfnConfig, MoeConfig};
use model::weights::{FfnWeights, LayerWeights, Weights};

use crate::attention::AttentionScratch;
use crate::isa::Isa;
use crate::kv::{KvCache, KvSequence};
use crate::linear::{linear, linear_as};
use crate::panels::{NanWeight, PANEL, Panels};
use crate::pool::Team;
use crate::rms_norm::rms_norm;
use crate::rope::RopeTable;
use crate::router::route;
use crate::scratch::{Routing, Scratch};
pub(crate) use packer::Packer;
pub(crate) use phases::{add_ffn, add_product, attend_rows, pack_heads, project, run_experts};

/// A weight that stands for NaN, with the name of its tensor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tensor `{tensor}`: {source}")]
pub struct DamagedWeight {
    /// Name in the checkpoint.
    pub tensor: String,
    /// Which row.
    pub source: NanWeight,
}

/// One row of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchRow {
    /// Index of its sequence among those of the batch.
    pub sequence: usize,
    /// Position in the sequence.
    pub position: usize,
    /// The token.
    pub token: u32,
}

/// What a forward pass works on.
pub(crate) struct Batch<'a> {
    pub rows: &'a [BatchRow],
    pub sequences: &'a [&'a KvSequence],
    pub cache: &'a KvCache,
    pub scratch: &'a Scratch,
    /// Layers whose output is copied to `scratch.taps`.
    pub taps: &'a [usize],
}

/// A packed SwiGLU.
pub(crate) struct PackedSwiglu {
    pub gate: Panels,
    pub up: Panels,
    pub down: Panels,
}

impl PackedSwiglu {
    /// For products that only drafts come from.
    pub(crate) fn for_drafts(self) -> Self {
        Self {
            gate: self.gate.for_drafts(),
            up: self.up.for_drafts(),
            down: self.down.for_drafts(),
        }
    }
}

enum Router {
    /// One dense SwiGLU.
    None,
    Moe {
        config: MoeConfig,
        weight: Panels,
        correction_bias: Vec<f32>,
    },
}

struct Layer {
    attention: AttentionConfig,
    rope: usize,
    input_norm: Vec<f32>,
    qkv: [Panels; 3],
    o: Panels,
    sinks: Option<Vec<f32>>,
    post_norm: Vec<f32>,
    router: Router,
    experts: Vec<PackedSwiglu>,
}

/// The target, packed.
pub(crate) struct Network {
    pub config: Config,
    pub isa: Isa,
    embed: Panels,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    lm_head: Option<Panels>,
    pub ropes: Vec<RopeTable>,
}

impl Network {
    /// Packs all weights.
    pub(crate) fn new(
        config: &Config,
        weights: &Weights<'_>,
        packer: &Packer<'_>,
    ) -> Result<Self, DamagedWeight> {
        let mut ropes = Vec::new();
        // The largest first: source and packed bytes are both in memory while a matrix is packed.
        let embed = packer.matrix(|| "model.embed_tokens.weight".into(), &weights.embed)?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(packer.matrix(|| "lm_head.weight".into(), &weights.lm_head)?),
        };
        let layers = weights
            .layers
            .iter()
            .enumerate()
            .map(|(i, weights)| Layer::new(i, config, weights, packer, &mut ropes))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            config: config.clone(),
            isa: Isa::detect(),
            embed,
            layers,
            norm: weights.norm.clone(),
            lm_head,
            ropes,
        })
    }

    /// Writes the embedding of `token`, `[hidden]`.
    pub(crate) fn embed(&self, token: u32, out: &mut [f32]) {
        self.embed.decode_row(token as usize, out);
    }

    /// `[vocab_size, hidden]`.
    pub(crate) fn head(&self) -> &Panels {
        self.lm_head.as_ref().unwrap_or(&self.embed)
    }

    /// Runs all layers; the residual rows end in `scratch.x`. Returns the weight bytes read.
    pub(crate) fn forward(
        &self,
        team: Team<'_>,
        batch: &Batch<'_>,
        attention: &mut AttentionScratch,
    ) -> u64 {
        let hidden = self.config.hidden;
        for row in team.share(batch.rows.len()) {
            // SAFETY: each thread has its own rows in this phase.
            let x = unsafe { batch.scratch.x.write(row * hidden..(row + 1) * hidden) };
            self.embed(batch.rows[row].token, x);
        }
        team.barrier();
        let mut bytes = 0;
        for (i, layer) in self.layers.iter().enumerate() {
            team.alive();
            layer.attend(self, i, team, batch, attention);
            bytes += layer.feed_forward(self, team, batch) + layer.attention_bytes();
            if let Some(tap) = batch.taps.iter().position(|&t| t == i) {
                copy_tap(team, batch, hidden, tap);
            }
        }
        bytes
    }

    /// Logits `[rows.len(), vocab_size]` of the residual rows `rows`, into `scratch.logits`.
    pub(crate) fn logits(&self, team: Team<'_>, scratch: &Scratch, rows: &[u32]) {
        normalise(
            team,
            self.isa,
            scratch,
            rows,
            &self.norm,
            self.config.eps,
            self.config.hidden,
        );
        team.barrier();
        self.head_rows(team, scratch, rows, false);
        team.barrier();
    }

    /// lm_head over rows of `scratch.h`, into `scratch.logits` in the order of `rows`.
    pub(crate) fn head_rows(
        &self,
        team: Team<'_>,
        scratch: &Scratch,
        rows: &[u32],
        for_drafts: bool,
    ) {
        let head = self.head();
        let vocab = self.config.vocab_size;
        let panels = team.share(head.panels());
        // SAFETY: `h` was written before the barrier; each thread has its own panels of the output.
        unsafe {
            linear_as(
                self.isa,
                (head, for_drafts),
                panels,
                &scratch.h,
                rows,
                |i, panel, values| {
                    let columns = PANEL.min(vocab - panel * PANEL);
                    let at = i * vocab + panel * PANEL;
                    scratch
                        .logits
                        .write(at..at + columns)
                        .copy_from_slice(&values[..columns]);
                },
            );
        }
    }
}

/// `scratch.h[row] = rms_norm(scratch.x[row])` for this thread's share of `rows`.
pub(crate) fn normalise(
    team: Team<'_>,
    isa: Isa,
    scratch: &Scratch,
    rows: &[u32],
    weight: &[f32],
    eps: f32,
    hidden: usize,
) {
    for &row in &rows[team.share(rows.len())] {
        let row = row as usize;
        // SAFETY: `x` is complete since the last barrier; each thread has its own rows of `h` and,
        // through the row number, of `normed`.
        unsafe {
            let x = scratch.x.read(row * hidden..(row + 1) * hidden);
            let normed = scratch.normed.write(row * hidden..(row + 1) * hidden);
            rms_norm(isa, x, weight, eps, normed);
            scratch.h.set(isa, row, normed);
        }
    }
}

fn copy_tap(team: Team<'_>, batch: &Batch<'_>, hidden: usize, tap: usize) {
    for row in team.share(batch.rows.len()) {
        let at = (row * batch.taps.len() + tap) * hidden;
        // SAFETY: `x` is complete since the last barrier; each thread has its own rows.
        unsafe {
            let x = batch.scratch.x.read(row * hidden..(row + 1) * hidden);
            batch.scratch.taps.write(at..at + hidden).copy_from_slice(x);
        }
    }
}

/// Index of the rotary table of `dims` and `theta`, made when there is none.
pub(crate) fn rope_index(ropes: &mut Vec<RopeTable>, dims: usize, theta: f32) -> usize {
    if let Some(i) = ropes.iter().position(|table| table.is(dims, theta)) {
        return i;
    }
    ropes.push(RopeTable::new(dims, theta));
    ropes.len() - 1
}

impl Layer {
    fn new(
        index: usize,
        config: &Config,
        weights: &LayerWeights<'_>,
        packer: &Packer<'_>,
        ropes: &mut Vec<RopeTable>,
    ) -> Result<Self, DamagedWeight> {
        let attention = config.layers[index].attention.clone();
        let prefix = format!("model.layers.{index}");
        let name = |part: &str| format!("{prefix}.self_attn.{part}.weight");
        let (router, experts) = match (&config.layers[index].ffn, &weights.ffn) {
            (
                FfnConfig::Moe(config),
                FfnWeights::Moe {
                    router,
                    correction_bias,
                    experts,
                },
            ) => {
                let router = Router::Moe {
                    config: config.clone(),
                    weight: packer.matrix(|| format!("{prefix}.mlp.gate.weight"), router)?,
                    correction_bias: correction_bias.clone(),
                };
                let experts = experts.iter().enumerate().map(|(e, weights)| {
                    packer.swiglu(&format!("{prefix}.mlp.experts.{e}"), weights)
                });
                (router, experts.collect::<Result<_, _>>()?)
            }
            (_, FfnWeights::Dense(weights)) => {
                let dense = packer.swiglu(&format!("{prefix}.mlp"), weights)?;
                (Router::None, vec![dense])
            }
            _ => unreachable!("the weight table follows the configuration"),
        };
        Ok(Self {
            rope: rope_index(ropes, attention.rope_dims, attention.rope_theta),
            attention,
            input_norm: weights.input_norm.clone(),
            qkv: [
                packer.matrix(|| name("q_proj"), &weights.q)?,
                packer.matrix(|| name("k_proj"), &weights.k)?,
                packer.matrix(|| name("v_proj"), &weights.v)?,
            ],
            o: packer.matrix(|| name("o_proj"), &weights.o)?,
            sinks: weights.sinks.clone(),
            post_norm: weights.post_norm.clone(),
            router,
            experts,
        })
    }

    fn attention_bytes(&self) -> u64 {
        let qkv: usize = self.qkv.iter().map(Panels::bytes).sum();
        (qkv + self.o.bytes()) as u64
    }

    fn attend(
        &self,
        network: &Network,
        index: usize,
        team: Team<'_>,
        batch: &Batch<'_>,
        attention: &mut AttentionScratch,
    ) {
        let (config, scratch) = (&network.config, batch.scratch);
        let rows = scratch.row_list(batch.rows.len());
        let (isa, weight) = (network.isa, &self.input_norm);
        normalise(team, isa, scratch, rows, weight, config.eps, config.hidden);
        team.barrier();
        project(
            team,
            network.isa,
            scratch,
            self.qkv.iter().map(|m| (m, None)),
            rows,
        );
        team.barrier();
        self.rotate_and_store(network, index, team, batch);
        team.barrier();
        attend_rows(
            team,
            network.isa,
            &self.attention,
            self.sinks.as_deref(),
            batch,
            index,
            |r| batch.cache.visible(index, batch.rows[r].position),
            attention,
        );
        team.barrier();
        pack_heads(
            team,
            network.isa,
            scratch,
            rows,
            self.attention.heads * self.attention.v_dim,
        );
        team.barrier();
        add_product(team, network.isa, scratch, &self.o, None, rows);
        team.barrier();
    }

    fn rotate_and_store(&self, network: &Network, index: usize, team: Team<'_>, batch: &Batch<'_>) {
        let a = &self.attention;
        let rope = &network.ropes[self.rope];
        for r in team.share(batch.rows.len()) {
            let row = batch.rows[r];
            // SAFETY: each thread has its own rows of the projections and its own positions.
            unsafe {
                let [q, k, v] = batch.scratch.projections(r, a);
                rope.rotate(network.isa, q, a.qk_dim, row.position as u32);
                rope.rotate(network.isa, k, a.qk_dim, row.position as u32);
                for v in v.iter_mut() {
                    *v *= a.value_scale;
                }
                let sequence = batch.sequences[row.sequence];
                batch.cache.write(sequence, index, row.position, k, v);
            }
        }
    }

    /// Adds the feed-forward half to `x`; returns the weight bytes read.
    fn feed_forward(&self, network: &Network, team: Team<'_>, batch: &Batch<'_>) -> u64 {
        let (config, scratch) = (&network.config, batch.scratch);
        let rows = scratch.row_list(batch.rows.len());
        normalise(
            team,
            network.isa,
            scratch,
            rows,
            &self.post_norm,
            config.eps,
            config.hidden,
        );
        team.barrier();
        let mut bytes = self.choose_experts(network.isa, team, batch);
        let routing = scratch.routing.read().expect("no thread panics");
        bytes += run_experts(team, network.isa, scratch, &self.experts, &routing);
        drop(routing);
        add_ffn(team, scratch, rows, config.hidden);
        team.barrier();
        bytes
    }

    /// Fills the routing; ends with a barrier.
    fn choose_experts(&self, isa: Isa, team: Team<'_>, batch: &Batch<'_>) -> u64 {
        let scratch = batch.scratch;
        let rows = scratch.row_list(batch.rows.len());
        match &self.router {
            Router::None => {
                if team.thread == 0 {
                    let mut routing = scratch.routing.write().expect("no thread panics");
                    routing.dense(rows.len());
                }
                team.barrier();
                0
            }
            Router::Moe {
                config,
                weight,
                correction_bias,
            } => {
                // SAFETY: `h` is complete; each thread has its own panels of the scores.
                unsafe {
                    let panels = team.share(weight.panels());
                    linear(isa, weight, panels, &scratch.h, rows, |i, panel, values| {
                        let columns = PANEL.min(config.experts - panel * PANEL);
                        let at = i * config.experts + panel * PANEL;
                        let scores = scratch.scores.write(at..at + columns);
                        scores.copy_from_slice(&values[..columns]);
                    });
                }
                team.barrier();
                if team.thread == 0 {
                    let mut routing = scratch.routing.write().expect("no thread panics");
                    // SAFETY: only this thread touches the scores until the barrier.
                    let scores = unsafe { scratch.scores.write(0..rows.len() * config.experts) };
                    choose(config, scores, correction_bias, &mut routing);
                }
                team.barrier();
                weight.bytes() as u64
            }
        }
    }
}

fn choose(config: &MoeConfig, scores: &mut [f32], correction_bias: &[f32], routing: &mut Routing) {
    routing.begin(config.active);
    for row in scores.chunks_exact_mut(config.experts) {
        route(config, row, correction_bias, routing.next_row());
    }
    routing.finish();
}
