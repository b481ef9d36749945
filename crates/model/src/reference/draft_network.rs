//! The drafter's forward pass (dflash.md C.1), one row at a time, over weights decoded to f32.
//!
//! Context rows enter through K and V only: `hidden_norm(fc(taps))`, the same row for every layer
//! and without its input norm. Block rows are computed together because they see each other.

use super::attention::{KeysValues, attention};
use super::network::{Cache, Dense, LayerCache, Network, Swiglu, add};
use super::rms_norm::rms_norm;
use super::rope::rope;
use crate::TokenId;
use crate::draft::config::{DraftConfig, DraftWindow};
use crate::draft::weights::{DraftLayerWeights, DraftWeights, Projection};

/// A drafter with its weights decoded.
pub struct DraftNetwork {
    config: DraftConfig,
    fc: Dense,
    hidden_norm: Vec<f32>,
    layers: Vec<DraftLayer>,
    norm: Vec<f32>,
    mask_embedding: Option<Vec<f32>>,
}

struct DraftLayer {
    window: DraftWindow,
    input_norm: Vec<f32>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    sinks: Option<Vec<f32>>,
    post_norm: Vec<f32>,
    ffn: Swiglu,
}

struct Linear {
    matrix: Dense,
    bias: Option<Vec<f32>>,
}

impl Linear {
    fn new(projection: &Projection<'_>) -> Self {
        Self {
            matrix: Dense::new(&projection.matrix),
            bias: projection.bias.clone(),
        }
    }

    fn times(&self, x: &[f32]) -> Vec<f32> {
        let mut out = self.matrix.times(x);
        if let Some(bias) = &self.bias {
            add(&mut out, bias);
        }
        out
    }
}

impl DraftNetwork {
    /// Decodes all weights to f32.
    #[must_use]
    pub fn new(
        config: &DraftConfig,
        weights: &DraftWeights<'_>,
        mask_embedding: Option<Vec<f32>>,
    ) -> Self {
        let layers = config.layers.iter().zip(&weights.layers);
        Self {
            config: config.clone(),
            fc: Dense::new(&weights.fc),
            hidden_norm: weights.hidden_norm.clone(),
            layers: layers
                .map(|(window, weights)| DraftLayer::new(*window, weights))
                .collect(),
            norm: weights.norm.clone(),
            mask_embedding,
        }
    }

    /// Rows of a block, the anchor included.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.config.block_size
    }

    /// Target layers whose output is wanted.
    #[must_use]
    pub fn taps(&self) -> &[usize] {
        &self.config.taps
    }

    /// A context with no positions.
    #[must_use]
    pub fn empty_cache(&self) -> Cache {
        Cache {
            layers: vec![LayerCache::default(); self.layers.len()],
        }
    }

    /// Keeps the first `positions` rows of every layer's context.
    pub fn truncate(&self, cache: &mut Cache, positions: usize) {
        for layer in &mut cache.layers {
            layer.truncate(&self.config.attention, positions);
        }
    }

    /// Adds the token at `position`, the next one of `cache`, to the context of every layer.
    /// `features`: `[taps, hidden]`, the target's residual rows of that token.
    pub fn append_context(&self, features: &[f32], position: u32, cache: &mut Cache) {
        let mut context = vec![0.0; self.config.hidden];
        let mixed = self.fc.times(features);
        rms_norm(&mixed, &self.hidden_norm, self.config.eps, &mut context);
        let theta = self.config.context_rope_theta;
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            layer.append(&self.config, &context, position, theta, cache);
        }
    }

    /// Drafts a block whose anchor stands at `position`, over the context before it: logits
    /// `[vocab_size]` of slots `1..width`, each for the token at `position + slot`.
    #[must_use]
    pub fn block(
        &self,
        target: &Network,
        anchor: TokenId,
        position: u32,
        width: u32,
        context: &Cache,
    ) -> Vec<Vec<f32>> {
        let mask = self
            .mask_embedding
            .as_deref()
            .unwrap_or_else(|| target.embed(self.config.mask_token));
        let mut rows = vec![target.embed(anchor).to_vec()];
        rows.resize(width as usize, mask.to_vec());
        for (layer, cache) in self.layers.iter().zip(&context.layers) {
            layer.forward(&self.config, &mut rows, position, cache.clone());
        }
        rows[1..]
            .iter()
            .map(|row| {
                let mut normed = vec![0.0; row.len()];
                rms_norm(row, &self.norm, self.config.eps, &mut normed);
                target.head(&normed)
            })
            .collect()
    }
}

impl DraftLayer {
    fn new(window: DraftWindow, weights: &DraftLayerWeights<'_>) -> Self {
        Self {
            window,
            input_norm: weights.input_norm.clone(),
            q: Linear::new(&weights.q),
            k: Linear::new(&weights.k),
            v: Linear::new(&weights.v),
            o: Linear::new(&weights.o),
            q_norm: weights.q_norm.clone(),
            k_norm: weights.k_norm.clone(),
            sinks: weights.sinks.clone(),
            post_norm: weights.post_norm.clone(),
            ffn: Swiglu::new(&weights.ffn),
        }
    }

    /// Appends the keys and values of one row.
    fn append(
        &self,
        config: &DraftConfig,
        row: &[f32],
        position: u32,
        theta: f32,
        cache: &mut LayerCache,
    ) {
        let a = &config.attention;
        let mut keys = head_norm(&self.k.times(row), &self.k_norm, config.eps);
        rope(&mut keys, a.qk_dim, a.rope_dims, theta, position);
        cache.keys.extend(keys);
        let values = self.v.times(row);
        cache
            .values
            .extend(values.iter().map(|v| v * a.value_scale));
    }

    /// One layer over the block. `cache` is a copy of the context, to which the block's own keys
    /// and values are added for this layer only.
    fn forward(
        &self,
        config: &DraftConfig,
        rows: &mut [Vec<f32>],
        start: u32,
        mut cache: LayerCache,
    ) {
        let a = &config.attention;
        let normed = |x: &[f32], weight: &[f32]| {
            let mut h = vec![0.0; x.len()];
            rms_norm(x, weight, config.eps, &mut h);
            h
        };
        let inputs: Vec<_> = rows.iter().map(|x| normed(x, &self.input_norm)).collect();
        for (position, h) in (start..).zip(&inputs) {
            self.append(config, h, position, a.rope_theta, &mut cache);
        }
        let keys = start as usize + rows.len();
        for ((position, h), x) in (start..).zip(&inputs).zip(rows) {
            let mut q = head_norm(&self.q.times(h), &self.q_norm, config.eps);
            rope(&mut q, a.qk_dim, a.rope_dims, a.rope_theta, position);
            let mut heads = vec![0.0; a.heads * a.v_dim];
            let seen = (0..keys).filter(|&key| self.window.sees(position as usize, key));
            let cache: KeysValues<'_> = cache.view();
            attention(a, &q, cache, seen, self.sinks.as_deref(), &mut heads);
            add(x, &self.o.times(&heads));
            let h = normed(x, &self.post_norm);
            add(x, &self.ffn.forward(&h));
        }
    }
}

/// RMSNorm of every head. `heads`: `[count, dim]`; `weight`: `[dim]`.
fn head_norm(heads: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0.0; heads.len()];
    for (head, out) in heads
        .chunks_exact(weight.len())
        .zip(out.chunks_exact_mut(weight.len()))
    {
        rms_norm(head, weight, eps, out);
    }
    out
}
