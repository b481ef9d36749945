//! `config.json` of the MiMo-V2 family, resolved to one description a layer.
//!
//! Owns every field of the releases (`mimo_v2_flash`, `mimo_v2`) and their documented fallbacks.
//! Refuses what the forward pass does not compute (another activation, biases, group-limited
//! routing) instead of ignoring it. After [`Config::load`] no dimension is 0 and heads divide.

use std::path::Path;

use serde_json::Value;

use crate::error::ModelError;
use crate::fields::{self, DIMENSION_MAX, Fields, LAYERS_MAX, integer, kind};

/// A model's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `mimo_v2_flash` or `mimo_v2`.
    pub model_type: String,
    /// Logit columns and embedding rows.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Epsilon of every RMSNorm.
    pub eps: f32,
    /// Longest sequence.
    pub context_tokens: usize,
    /// The embedding is also lm_head.
    pub tie_word_embeddings: bool,
    /// Q, K and V of a layer are one tensor.
    pub fused_qkv: bool,
    /// Shards of a fused QKV tensor, and of the FP8 scale grids of split ones: the KV heads of the
    /// full-attention layers.
    pub qkv_shards: usize,
    /// One entry a layer.
    pub layers: Vec<LayerConfig>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// Attention half.
    pub attention: AttentionConfig,
    /// Feed-forward half.
    pub ffn: FfnConfig,
}

/// Attention of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Columns of a query or key head.
    pub qk_dim: usize,
    /// Columns of a value head.
    pub v_dim: usize,
    /// Leading columns of a query or key head that are rotated.
    pub rope_dims: usize,
    /// Rotary base.
    pub rope_theta: f32,
    /// Previous tokens a sliding layer sees besides the query's own; `None` sees all.
    pub window: Option<usize>,
    /// Per-head sink logit in the softmax.
    pub sinks: bool,
    /// Multiplies V before the cache.
    pub value_scale: f32,
}

/// Feed-forward of one layer.
#[derive(Clone, Debug, PartialEq)]
pub enum FfnConfig {
    /// One SwiGLU.
    Dense {
        /// Inner width.
        intermediate: usize,
    },
    /// Routed SwiGLU experts.
    Moe(MoeConfig),
}

/// Routing and experts of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Routed experts.
    pub experts: usize,
    /// Experts a token uses.
    pub active: usize,
    /// Inner width of an expert.
    pub intermediate: usize,
    /// Weights are renormalised to sum 1.
    pub norm_topk: bool,
    /// Multiplies the weights.
    pub scaling: f32,
}

impl Config {
    /// Reads `config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// [`ModelError`] naming file and field.
    pub fn load(dir: &Path) -> Result<Self, ModelError> {
        fields::read(&dir.join("config.json"), |fields| fields.config())
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`ModelError::Field`]: which field, what was expected and found.
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        fields::parse(Path::new("config.json"), text, |fields| fields.config())
    }

    /// The same model with sliding layers that see `keys` keys, the query's own included (default:
    /// `sliding_window_size` + 1, as the serving engine of the releases; see mimo-v2.md A.6).
    ///
    /// # Panics
    /// When `keys` is 0.
    #[must_use]
    pub fn with_window_keys(mut self, keys: usize) -> Self {
        assert!(keys > 0, "a query sees at least itself");
        for layer in &mut self.layers {
            if let Some(window) = &mut layer.attention.window {
                *window = keys - 1;
            }
        }
        self
    }
}

impl Fields<'_> {
    fn config(&self) -> Result<Config, ModelError> {
        let model_type = self.text("model_type")?;
        if model_type != "mimo_v2" && model_type != "mimo_v2_flash" {
            return Err(self.wrong(
                "model_type",
                "mimo_v2 or mimo_v2_flash",
                &format!("{model_type:?}"),
            ));
        }
        self.refuse_unsupported()?;
        let layer_count = self.number("num_hidden_layers", 1, LAYERS_MAX)?;
        let sliding = self.pattern(layer_count)?;
        let routed = self.moe_pattern(layer_count)?;
        let full = self.attention("", None)?;
        let window = match sliding.contains(&true) {
            true => Some(self.window()?),
            false => None,
        };
        let swa = match window {
            Some(_) => self.attention("swa_", window)?,
            None => full.clone(),
        };
        let fused_qkv = self.layout()?;
        if fused_qkv && !swa.kv_heads.is_multiple_of(full.kv_heads) {
            // A fused tensor has a shard for each KV head of the full layers, on every layer.
            let expected = format!("a multiple of the {} shards of fused QKV", full.kv_heads);
            let found = swa.kv_heads.to_string();
            return Err(self.wrong("swa_num_key_value_heads", &expected, &found));
        }
        let dense = match routed.contains(&false) {
            true => self.number("intermediate_size", 1, DIMENSION_MAX)?,
            false => 0,
        };
        let moe = match routed.contains(&true) {
            true => Some(self.moe()?),
            false => None,
        };
        let layers = sliding
            .iter()
            .zip(&routed)
            .map(|(&sliding, &routed)| LayerConfig {
                attention: if sliding { swa.clone() } else { full.clone() },
                ffn: match (&moe, routed) {
                    (Some(moe), true) => FfnConfig::Moe(moe.clone()),
                    _ => FfnConfig::Dense {
                        intermediate: dense,
                    },
                },
            })
            .collect();
        Ok(Config {
            model_type,
            vocab_size: self.number("vocab_size", 1, DIMENSION_MAX)?,
            hidden: self.number("hidden_size", 1, DIMENSION_MAX)?,
            eps: self.float_or("layernorm_epsilon", 1e-5)?,
            context_tokens: self.number("max_position_embeddings", 1, 1 << 31)?,
            tie_word_embeddings: self.flag("tie_word_embeddings", false)?,
            fused_qkv,
            qkv_shards: full.kv_heads,
            layers,
        })
    }
}

impl Fields<'_> {
    /// Settings that would change the arithmetic in a way this crate does not compute.
    fn refuse_unsupported(&self) -> Result<(), ModelError> {
        self.one_of("hidden_act", &["silu"])?;
        self.one_of("scoring_func", &["sigmoid"])?;
        self.one_of("topk_method", &["noaux_tc"])?;
        if self.flag("attention_bias", false)? {
            return Err(self.wrong("attention_bias", "false", "true"));
        }
        for name in ["n_group", "topk_group"] {
            if self.number_or(name, 1)? != 1 {
                return Err(self.wrong(name, "1", &self.number_or(name, 1)?.to_string()));
            }
        }
        self.absent("rope_scaling")?;
        self.absent("n_shared_experts")
    }

    /// Which layers slide. Absent: all full; `hybrid_block_size = b`: full at (i + 1) % b == 0.
    fn pattern(&self, layers: usize) -> Result<Vec<bool>, ModelError> {
        let name = "hybrid_layer_pattern";
        if self.get(name).is_some() {
            return self.flags(name, layers);
        }
        match self.get("hybrid_block_size") {
            None => Ok(vec![false; layers]),
            Some(_) => {
                let b = self.number("hybrid_block_size", 1, LAYERS_MAX)?;
                Ok((0..layers).map(|i| (i + 1) % b != 0).collect())
            }
        }
    }

    /// Which layers are routed. Absent: none; an integer `f`: i % f == 0.
    fn moe_pattern(&self, layers: usize) -> Result<Vec<bool>, ModelError> {
        let name = "moe_layer_freq";
        match self.get(name) {
            None => Ok(vec![false; layers]),
            Some(Value::Array(_)) => self.flags(name, layers),
            Some(_) => {
                let f = self.number(name, 1, LAYERS_MAX)?;
                Ok((0..layers).map(|i| i % f == 0).collect())
            }
        }
    }

    fn flags(&self, name: &str, layers: usize) -> Result<Vec<bool>, ModelError> {
        let expected = format!("a list of {layers} zeros and ones");
        let value = self.need(name, &expected)?;
        let list = value
            .as_array()
            .ok_or_else(|| self.wrong(name, &expected, kind(value)))?;
        if list.len() != layers {
            return Err(self.wrong(name, &expected, &format!("{} entries", list.len())));
        }
        list.iter()
            .map(|v| match integer(v) {
                Some(0) => Ok(false),
                Some(1) => Ok(true),
                _ => Err(self.wrong(name, &expected, &v.to_string())),
            })
            .collect()
    }

    fn window(&self) -> Result<usize, ModelError> {
        match self.get("sliding_window_size") {
            Some(_) => self.number("sliding_window_size", 1, 1 << 31),
            None => self.number("sliding_window", 1, 1 << 31),
        }
    }

    /// Attention of the full layers (prefix "") or, where they differ, of the sliding ones.
    fn attention(
        &self,
        prefix: &str,
        window: Option<usize>,
    ) -> Result<AttentionConfig, ModelError> {
        let hidden = self.number("hidden_size", 1, DIMENSION_MAX)?;
        let dimension = |name: &str, default: Option<usize>| {
            let own = format!("{prefix}{name}");
            let key = if self.get(&own).is_some() { &own } else { name };
            match (self.get(key), default) {
                (None, Some(default)) => Ok(default),
                _ => self.number(key, 1, DIMENSION_MAX),
            }
        };
        let heads = dimension("num_attention_heads", None)?;
        let kv_heads = dimension("num_key_value_heads", Some(heads))?;
        let qk_dim = dimension("head_dim", Some((hidden / heads).max(1)))?;
        let v_dim = dimension("v_head_dim", Some(qk_dim))?;
        if heads % kv_heads != 0 {
            let name = format!("{prefix}num_key_value_heads");
            let expected = format!("a divisor of the {heads} query heads");
            return Err(self.wrong(&name, &expected, &kv_heads.to_string()));
        }
        let theta = self.theta("rope_theta", 10_000.0)?;
        let sliding = window.is_some();
        let sinks = match sliding {
            true => "add_swa_attention_sink_bias",
            false => "add_full_attention_sink_bias",
        };
        Ok(AttentionConfig {
            heads,
            kv_heads,
            qk_dim,
            v_dim,
            rope_dims: self.rope_dims(qk_dim)?,
            rope_theta: match sliding {
                true => self.theta("swa_rope_theta", theta)?,
                false => theta,
            },
            window,
            sinks: self.flag(sinks, false)?,
            value_scale: self.float_or("attention_value_scale", 1.0)?,
        })
    }

    fn moe(&self) -> Result<MoeConfig, ModelError> {
        let experts = self.number("n_routed_experts", 1, 65_536)?;
        Ok(MoeConfig {
            experts,
            active: self.number("num_experts_per_tok", 1, experts as u64)?,
            intermediate: self.number("moe_intermediate_size", 1, DIMENSION_MAX)?,
            norm_topk: self.flag("norm_topk_prob", true)?,
            scaling: self.float_or("routed_scaling_factor", 1.0)?,
        })
    }

    fn layout(&self) -> Result<bool, ModelError> {
        match self.get("attention_projection_layout") {
            None => Ok(false),
            Some(Value::String(s)) if s == "split" => Ok(false),
            Some(Value::String(s)) if s == "fused_qkv" => Ok(true),
            Some(value) => Err(self.wrong(
                "attention_projection_layout",
                "\"split\" or \"fused_qkv\"",
                &value.to_string(),
            )),
        }
    }
}
