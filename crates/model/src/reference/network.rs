//! The forward pass of the target, one row at a time (mimo-v2.md A.2), over weights decoded to f32.

use super::attention::{KeysValues, attention, visible};
use super::linear::linear;
use super::rms_norm::rms_norm;
use super::rope::rope;
use super::router::route;
use super::swiglu::swiglu;
use crate::TokenId;
use crate::config::{AttentionConfig, Config, FfnConfig, MoeConfig};
use crate::weights::{FfnWeights, LayerWeights, Matrix, SwigluWeights, Weights};

/// A matrix decoded to f32, `[rows, cols]` row-major.
pub struct Dense {
    rows: usize,
    values: Vec<f32>,
}

impl Dense {
    /// Decodes every row.
    #[must_use]
    pub fn new(matrix: &Matrix<'_>) -> Self {
        let mut values = vec![0.0; matrix.rows * matrix.cols];
        for (r, row) in values.chunks_exact_mut(matrix.cols).enumerate() {
            matrix.row(r).decode(row);
        }
        Self {
            rows: matrix.rows,
            values,
        }
    }

    /// `self * x`, `[rows]`.
    #[must_use]
    pub fn times(&self, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.rows];
        linear(&self.values, x, &mut out);
        out
    }

    /// Row `row`.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        let cols = self.values.len() / self.rows;
        &self.values[row * cols..(row + 1) * cols]
    }
}

/// A SwiGLU with decoded weights.
pub struct Swiglu {
    gate: Dense,
    up: Dense,
    down: Dense,
}

impl Swiglu {
    /// Decodes the three matrices.
    #[must_use]
    pub fn new(weights: &SwigluWeights<'_>) -> Self {
        Self {
            gate: Dense::new(&weights.gate),
            up: Dense::new(&weights.up),
            down: Dense::new(&weights.down),
        }
    }

    /// `[hidden]` to `[hidden]`.
    #[must_use]
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let mut inner = self.gate.times(x);
        swiglu(&mut inner, &self.up.times(x));
        self.down.times(&inner)
    }
}

enum Ffn {
    Dense(Swiglu),
    Moe {
        config: MoeConfig,
        router: Dense,
        correction_bias: Vec<f32>,
        experts: Vec<Swiglu>,
    },
}

struct Layer {
    config: AttentionConfig,
    input_norm: Vec<f32>,
    q: Dense,
    k: Dense,
    v: Dense,
    o: Dense,
    sinks: Option<Vec<f32>>,
    post_norm: Vec<f32>,
    ffn: Ffn,
}

/// Keys and values of a sequence, one entry a layer, all positions kept.
#[derive(Clone, Default)]
pub struct Cache {
    /// Layer after layer.
    pub layers: Vec<LayerCache>,
}

/// Keys and values of one layer.
#[derive(Clone, Default)]
pub struct LayerCache {
    /// `[positions, kv_heads * qk_dim]`.
    pub keys: Vec<f32>,
    /// `[positions, kv_heads * v_dim]`.
    pub values: Vec<f32>,
}

impl LayerCache {
    /// As attention reads it.
    #[must_use]
    pub fn view(&self) -> KeysValues<'_> {
        KeysValues {
            keys: &self.keys,
            values: &self.values,
        }
    }

    /// Keeps the first `positions` rows.
    pub fn truncate(&mut self, config: &AttentionConfig, positions: usize) {
        self.keys
            .truncate(positions * config.kv_heads * config.qk_dim);
        self.values
            .truncate(positions * config.kv_heads * config.v_dim);
    }
}

/// The target with its weights decoded.
pub struct Network {
    config: Config,
    embed: Dense,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    lm_head: Option<Dense>,
}

impl Network {
    /// Decodes all weights to f32.
    #[must_use]
    pub fn new(config: &Config, weights: &Weights<'_>) -> Self {
        let layers = config.layers.iter().zip(&weights.layers);
        Self {
            config: config.clone(),
            embed: Dense::new(&weights.embed),
            layers: layers
                .map(|(config, weights)| Layer::new(config.attention.clone(), &config.ffn, weights))
                .collect(),
            norm: weights.norm.clone(),
            lm_head: (!config.tie_word_embeddings).then(|| Dense::new(&weights.lm_head)),
        }
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// A cache with no positions.
    #[must_use]
    pub fn empty_cache(&self) -> Cache {
        Cache {
            layers: vec![LayerCache::default(); self.layers.len()],
        }
    }

    /// Keeps the first `positions` rows of every layer.
    pub fn truncate(&self, cache: &mut Cache, positions: usize) {
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            cache.truncate(&layer.config, positions);
        }
    }

    /// Embedding row of a token, `[hidden]`.
    #[must_use]
    pub fn embed(&self, token: TokenId) -> &[f32] {
        self.embed.row(token as usize)
    }

    /// Computes the row of `token` at `position`, the next one of `cache`. Calls `after(layer, x)`
    /// with the residual stream `[hidden]` after every layer; returns the last one.
    pub fn forward(
        &self,
        token: TokenId,
        position: u32,
        cache: &mut Cache,
        mut after: impl FnMut(usize, &[f32]),
    ) -> Vec<f32> {
        let mut x = self.embed(token).to_vec();
        for (i, (layer, cache)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            layer.forward(&mut x, self.config.eps, position, cache);
            after(i, &x);
        }
        x
    }

    /// Logits `[vocab_size]` of a residual row: final norm, then lm_head.
    #[must_use]
    pub fn logits(&self, x: &[f32]) -> Vec<f32> {
        let mut normed = vec![0.0; x.len()];
        rms_norm(x, &self.norm, self.config.eps, &mut normed);
        self.head(&normed)
    }

    /// lm_head alone, for rows that carry a norm of their own (the drafter's).
    #[must_use]
    pub fn head(&self, normed: &[f32]) -> Vec<f32> {
        self.lm_head.as_ref().unwrap_or(&self.embed).times(normed)
    }
}

impl Layer {
    fn new(config: AttentionConfig, ffn: &FfnConfig, weights: &LayerWeights<'_>) -> Self {
        let ffn = match (ffn, &weights.ffn) {
            (
                FfnConfig::Moe(config),
                FfnWeights::Moe {
                    router,
                    correction_bias,
                    experts,
                },
            ) => Ffn::Moe {
                config: config.clone(),
                router: Dense::new(router),
                correction_bias: correction_bias.clone(),
                experts: experts.iter().map(Swiglu::new).collect(),
            },
            (_, FfnWeights::Dense(weights)) => Ffn::Dense(Swiglu::new(weights)),
            _ => unreachable!("the weight table follows the configuration"),
        };
        Self {
            config,
            input_norm: weights.input_norm.clone(),
            q: Dense::new(&weights.q),
            k: Dense::new(&weights.k),
            v: Dense::new(&weights.v),
            o: Dense::new(&weights.o),
            sinks: weights.sinks.clone(),
            post_norm: weights.post_norm.clone(),
            ffn,
        }
    }

    fn forward(&self, x: &mut [f32], eps: f32, position: u32, cache: &mut LayerCache) {
        let mut h = vec![0.0; x.len()];
        rms_norm(x, &self.input_norm, eps, &mut h);
        add(x, &self.attend(&h, position, cache));
        rms_norm(x, &self.post_norm, eps, &mut h);
        add(x, &self.ffn.forward(&h));
    }

    fn attend(&self, h: &[f32], position: u32, cache: &mut LayerCache) -> Vec<f32> {
        let c = &self.config;
        let (mut q, mut k, mut v) = (self.q.times(h), self.k.times(h), self.v.times(h));
        for v in &mut v {
            *v *= c.value_scale;
        }
        rope(&mut q, c.qk_dim, c.rope_dims, c.rope_theta, position);
        rope(&mut k, c.qk_dim, c.rope_dims, c.rope_theta, position);
        cache.keys.extend(k);
        cache.values.extend(v);
        let mut heads = vec![0.0; c.heads * c.v_dim];
        let seen = visible(position as usize, c.window);
        attention(c, &q, cache.view(), seen, self.sinks.as_deref(), &mut heads);
        self.o.times(&heads)
    }
}

impl Ffn {
    fn forward(&self, h: &[f32]) -> Vec<f32> {
        match self {
            Self::Dense(swiglu) => swiglu.forward(h),
            Self::Moe {
                config,
                router,
                correction_bias,
                experts,
            } => {
                let mut out = vec![0.0; h.len()];
                for (expert, weight) in route(config, &router.times(h), correction_bias) {
                    let part = experts[expert].forward(h);
                    for (out, part) in out.iter_mut().zip(part) {
                        *out += weight * part;
                    }
                }
                out
            }
        }
    }
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
