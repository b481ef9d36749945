//! Sizes of a model: read from, and written as, a MiMo-V2 config.json.
//!
//! Refuses what the trainer does not do (fused QKV, shared experts, a value scale, partial rotary),
//! naming the field. Invariant: a written config reads back equal.

use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Sizes of a MiMo-V2 model as the trainer holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Rows of the embedding.
    pub vocab: i64,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Number of layers.
    pub layers: i64,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads.
    pub kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Neurons of a layer's FFN, over all experts.
    pub ffn: i64,
    /// Experts a layer; 0 for a dense FFN.
    pub experts: i64,
    /// Experts a token uses.
    pub active: i64,
    /// Layers with a sliding window.
    pub sliding: Vec<bool>,
    /// Previous positions that a sliding layer sees, besides the query's own.
    pub window: i64,
    /// Sliding layers have a sink logit a head.
    pub sinks: bool,
    /// Base of the rotary embedding.
    pub theta: f64,
    /// Epsilon of every norm.
    pub eps: f64,
    /// Longest context claimed.
    pub context: i64,
}

impl Shape {
    /// Reads `config.json` of a checkpoint directory.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("config.json");
        let config = crate::files::read_json(&path)?;
        Self::from_config(&config).map_err(|what| Error::Config { path, what })
    }

    /// Parses a config; the error names the field.
    pub fn from_config(config: &Value) -> std::result::Result<Self, String> {
        let int = |key: &str| {
            config[key].as_i64().ok_or(format!(
                "`{key}`: expected an integer, found {}",
                config[key]
            ))
        };
        let float = |key: &str| {
            config[key]
                .as_f64()
                .ok_or(format!("`{key}`: expected a number, found {}", config[key]))
        };
        for (key, wanted) in [
            ("attention_value_scale", 1.0),
            ("partial_rotary_factor", 1.0),
        ] {
            let found = float(key)?;
            if found != wanted {
                return Err(format!(
                    "`{key}`: the trainer handles {wanted}, found {found}"
                ));
            }
        }
        let layers = int("num_hidden_layers")?;
        let flags = |key: &str| -> std::result::Result<Vec<bool>, String> {
            let list = config[key]
                .as_array()
                .ok_or(format!("`{key}`: expected a list"))?;
            if list.len() as i64 != layers {
                return Err(format!(
                    "`{key}`: expected {layers} entries, found {}",
                    list.len()
                ));
            }
            Ok(list.iter().map(|x| x.as_i64() == Some(1)).collect())
        };
        let moe = flags("moe_layer_freq")?;
        if moe.iter().any(|&x| x != moe[0]) {
            return Err("`moe_layer_freq`: the trainer handles all layers alike".into());
        }
        let experts = if moe[0] { int("n_routed_experts")? } else { 0 };
        let ffn = if moe[0] {
            experts * int("moe_intermediate_size")?
        } else {
            int("intermediate_size")?
        };
        Ok(Self {
            vocab: int("vocab_size")?,
            hidden: int("hidden_size")?,
            layers,
            heads: int("num_attention_heads")?,
            kv_heads: int("num_key_value_heads")?,
            head_dim: int("head_dim")?,
            ffn,
            experts,
            active: if moe[0] {
                int("num_experts_per_tok")?
            } else {
                0
            },
            sliding: flags("hybrid_layer_pattern")?,
            window: int("sliding_window")?,
            sinks: config["add_swa_attention_sink_bias"] == true,
            theta: float("rope_theta")?,
            eps: float("layernorm_epsilon")?,
            context: int("max_position_embeddings")?,
        })
    }

    /// The whole config.json; `quantized` adds `quantization_config`.
    #[must_use]
    pub fn config(&self, quantized: bool) -> Value {
        let moe = i64::from(self.experts > 0);
        let pattern: Vec<i64> = self.sliding.iter().map(|&x| i64::from(x)).collect();
        let mut config = json!({
            "architectures": ["MiMoV2ForCausalLM"],
            "model_type": "mimo_v2",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "layernorm_epsilon": self.eps,
            "hidden_act": "silu",
            "intermediate_size": self.ffn,
            "tie_word_embeddings": true,
            "max_position_embeddings": self.context,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "v_head_dim": self.head_dim,
            "swa_num_attention_heads": self.heads,
            "swa_num_key_value_heads": self.kv_heads,
            "swa_head_dim": self.head_dim,
            "swa_v_head_dim": self.head_dim,
            "hybrid_layer_pattern": pattern,
            "sliding_window": self.window,
            "sliding_window_size": self.window,
            "add_swa_attention_sink_bias": self.sinks,
            "add_full_attention_sink_bias": false,
            "partial_rotary_factor": 1.0,
            "rope_theta": self.theta,
            "swa_rope_theta": self.theta,
            "attention_value_scale": 1.0,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "attention_projection_layout": "split",
            "moe_layer_freq": vec![moe; self.layers as usize],
        });
        let mut add = |part: Value| {
            if let (Value::Object(config), Value::Object(part)) = (&mut config, part) {
                config.extend(part);
            }
        };
        if self.experts > 0 {
            add(self.routing_config());
        }
        if quantized {
            add(json!({"quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
                "ignored_layers": [],
                "store_dtype": "mxfp4",
                "mxfp4_block_size": 32,
            }}));
        }
        config
    }

    fn routing_config(&self) -> Value {
        json!({
            "moe_intermediate_size": self.ffn / self.experts,
            "n_routed_experts": self.experts,
            "num_experts_per_tok": self.active,
            "n_shared_experts": null,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": true,
            "routed_scaling_factor": null,
            "moe_router_dtype": "bfloat16",
        })
    }

    /// Rows of the fused projection: query, key, value.
    #[must_use]
    pub fn qkv_rows(&self) -> [i64; 3] {
        let kv = self.kv_heads * self.head_dim;
        [self.heads * self.head_dim, kv, kv]
    }
}
