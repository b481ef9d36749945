//! Synthetic checkpoints for benchmarks: shapes of the family, random weights in the release's formats (`cuda::synthetic`).
//!
//! Their text means nothing and every report of them says `synthetic`. They are written to a
//! temporary directory, because a benchmark should load what a user loads.

use anyhow::{Context, Result};
use cuda::program::Formats;
use cuda::strips::Format;
use model::Config;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::failure::bad_input;

/// Of the random weights: the same checkpoint each time.
const SEED: u64 = 1;

/// Columns of a query or key head, of a value head, and rotated ones, as in every release.
const QK_DIM: usize = 192;
const V_DIM: usize = 128;

/// A shape of the family.
#[derive(Clone, Copy, Debug)]
struct Shape {
    name: &'static str,
    what: &'static str,
    layers: usize,
    hidden: usize,
    heads: usize,
    experts: usize,
    active: usize,
    intermediate: usize,
    vocab: usize,
}

const SHAPES: [Shape; 2] = [
    Shape {
        name: "moe",
        what: "2.4 GB, larger than most caches",
        layers: 10,
        hidden: 2048,
        heads: 16,
        experts: 64,
        active: 8,
        intermediate: 1024,
        vocab: 16_384,
    },
    Shape {
        name: "moe-tiny",
        what: "3 MB, for trying the command",
        layers: 2,
        hidden: 256,
        heads: 2,
        experts: 16,
        active: 4,
        intermediate: 128,
        vocab: 512,
    },
];

/// Writes the checkpoint called `name`; it lives as long as the directory.
pub(crate) fn write(name: &str) -> Result<TempDir> {
    let Some(shape) = SHAPES.iter().find(|shape| shape.name == name) else {
        let names: Vec<String> = SHAPES
            .iter()
            .map(|shape| format!("{} ({})", shape.name, shape.what))
            .collect();
        return bad_input(format!(
            "synthetic:{name}: expected one of {}",
            names.join(", ")
        ));
    };
    eprintln!("writing synthetic:{name}, random weights: {}", shape.what);
    let dir = tempfile::Builder::new()
        .prefix("kilotok-synthetic-")
        .tempdir()
        .context("temporary directory")?;
    std::fs::write(dir.path().join("config.json"), shape.config().to_string())?;
    let config = Config::load(dir.path())?;
    let formats = Formats::release(&config, Format::Bf16);
    cuda::synthetic::write(dir.path(), &config, &formats, SEED)?;
    Ok(dir)
}

impl Shape {
    /// Every fourth layer full attention, the first layer dense, as the releases have it.
    fn full(&self, layer: usize) -> bool {
        layer.is_multiple_of(4)
    }

    fn config(&self) -> Value {
        let pattern: Vec<u8> = (0..self.layers).map(|i| u8::from(!self.full(i))).collect();
        let routed: Vec<u8> = (0..self.layers).map(|i| u8::from(i > 0)).collect();
        let mut config = json!({
            "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash",
            "vocab_size": self.vocab, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": 1,
            "swa_num_attention_heads": self.heads, "swa_num_key_value_heads": 2,
            "head_dim": QK_DIM, "v_head_dim": V_DIM, "swa_head_dim": QK_DIM, "swa_v_head_dim": V_DIM,
            "hybrid_layer_pattern": pattern, "sliding_window": 128, "sliding_window_size": 128,
            "add_swa_attention_sink_bias": true, "add_full_attention_sink_bias": false,
            "partial_rotary_factor": 0.334, "rope_theta": 1e7, "swa_rope_theta": 1e4,
            "attention_value_scale": 0.707, "layernorm_epsilon": 1e-5, "hidden_act": "silu",
        });
        let routing = json!({
            "intermediate_size": self.intermediate * self.active, "moe_intermediate_size": self.intermediate,
            "moe_layer_freq": routed, "n_routed_experts": self.experts,
            "num_experts_per_tok": self.active, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "norm_topk_prob": true, "tie_word_embeddings": false, "max_position_embeddings": 32_768,
        });
        if let (Value::Object(config), Value::Object(routing)) = (&mut config, routing) {
            config.extend(routing);
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{Checkpoint, Weights};

    #[test]
    fn a_synthetic_checkpoint_opens() {
        let dir = write("moe-tiny").unwrap();
        let config = Config::load(dir.path()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let weights = Weights::new(&config, &checkpoint).unwrap();
        let mut row = vec![0.0; config.hidden];
        weights.layers[1].q.row(0).decode(&mut row);
        // Magnitudes of the codes times scales, as `cuda::synthetic` says them.
        let size = 1.0 / (config.hidden as f32).sqrt();
        let magnitudes = 0.25 * 0.4 * size..=3.75 * 0.8 * size;
        assert!(row.iter().all(|x| magnitudes.contains(&x.abs())), "{row:?}");
        assert!(write("none").is_err());
    }
}
