//! Synthetic checkpoints for benchmarks: the family's layout and formats, random weights.
//!
//! Their text means nothing and every report of them says `synthetic`. They are written to a
//! temporary directory, because a benchmark should load what a user loads.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::failure::bad_input;
use crate::progress::Progress;

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
    let dir = tempfile::Builder::new()
        .prefix("kilotok-synthetic-")
        .tempdir()
        .context("temporary directory")?;
    std::fs::write(dir.path().join("config.json"), shape.config().to_string())?;
    let path = dir.path().join("model.safetensors");
    write_tensors(&path, &shape.tensors())
        .with_context(|| format!("{}: cannot write", path.display()))?;
    Ok(dir)
}

/// How a tensor's random bytes have to look.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    /// MXFP4 codes: any byte.
    Codes,
    /// E8M0 scales: 2^-7, so that weights are near 0.02.
    Scales,
    /// E4M3 codes of magnitude 0.5 to 0.94, either sign.
    Fp8,
    /// f32, one value.
    Constant(f32),
    /// BF16, one value.
    Bf16One,
    /// BF16 of magnitude 0.016 to 0.031, either sign.
    Bf16,
}

struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    fill: Fill,
}

impl Tensor {
    fn bytes(&self) -> usize {
        let element = match self.dtype {
            "F32" => 4,
            "BF16" => 2,
            _ => 1,
        };
        self.shape.iter().product::<usize>() * element
    }
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

    fn tensors(&self) -> Vec<Tensor> {
        let mut list = Tensors(Vec::new());
        list.add(
            "model.embed_tokens.weight",
            "BF16",
            &[self.vocab, self.hidden],
            Fill::Bf16,
        );
        list.add(
            "lm_head.weight",
            "BF16",
            &[self.vocab, self.hidden],
            Fill::Bf16,
        );
        list.add("model.norm.weight", "BF16", &[self.hidden], Fill::Bf16One);
        for layer in 0..self.layers {
            self.layer(&mut list, layer);
        }
        list.0
    }

    fn layer(&self, list: &mut Tensors, layer: usize) {
        let prefix = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            let name = format!("{prefix}.{norm}.weight");
            list.add(&name, "BF16", &[self.hidden], Fill::Bf16One);
        }
        self.attention(list, &format!("{prefix}.self_attn"), layer);
        let mlp = format!("{prefix}.mlp");
        if layer == 0 {
            let inner = self.intermediate * self.active;
            list.fp8(&format!("{mlp}.gate_proj"), inner, self.hidden);
            list.fp8(&format!("{mlp}.up_proj"), inner, self.hidden);
            list.fp8(&format!("{mlp}.down_proj"), self.hidden, inner);
        } else {
            self.experts(list, &mlp);
        }
    }

    fn attention(&self, list: &mut Tensors, prefix: &str, layer: usize) {
        let kv_heads = if self.full(layer) { 1 } else { 2 };
        list.fp8(
            &format!("{prefix}.q_proj"),
            self.heads * QK_DIM,
            self.hidden,
        );
        list.fp8(&format!("{prefix}.k_proj"), kv_heads * QK_DIM, self.hidden);
        list.fp8(&format!("{prefix}.v_proj"), kv_heads * V_DIM, self.hidden);
        let output = [self.hidden, self.heads * V_DIM];
        list.add(
            &format!("{prefix}.o_proj.weight"),
            "BF16",
            &output,
            Fill::Bf16,
        );
        if !self.full(layer) {
            let name = format!("{prefix}.attention_sink_bias");
            list.add(&name, "BF16", &[self.heads], Fill::Bf16);
        }
    }

    fn experts(&self, list: &mut Tensors, mlp: &str) {
        let router = [self.experts, self.hidden];
        list.add(&format!("{mlp}.gate.weight"), "BF16", &router, Fill::Bf16);
        let bias = format!("{mlp}.gate.e_score_correction_bias");
        list.add(&bias, "F32", &[self.experts], Fill::Constant(0.0));
        for expert in 0..self.experts {
            let expert = format!("{mlp}.experts.{expert}");
            list.mxfp4(
                &format!("{expert}.down_proj"),
                self.hidden,
                self.intermediate,
            );
            list.mxfp4(
                &format!("{expert}.gate_proj"),
                self.intermediate,
                self.hidden,
            );
            list.mxfp4(&format!("{expert}.up_proj"), self.intermediate, self.hidden);
        }
    }
}

struct Tensors(Vec<Tensor>);

impl Tensors {
    fn add(&mut self, name: &str, dtype: &'static str, shape: &[usize], fill: Fill) {
        self.0.push(Tensor {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            fill,
        });
    }

    fn fp8(&mut self, stem: &str, rows: usize, columns: usize) {
        self.add(
            &format!("{stem}.weight"),
            "F8_E4M3",
            &[rows, columns],
            Fill::Fp8,
        );
        let grid = [rows.div_ceil(128), columns.div_ceil(128)];
        self.add(
            &format!("{stem}.weight_scale_inv"),
            "F32",
            &grid,
            Fill::Constant(0.03),
        );
    }

    fn mxfp4(&mut self, stem: &str, rows: usize, columns: usize) {
        self.add(
            &format!("{stem}.weight"),
            "U8",
            &[rows, columns / 2],
            Fill::Codes,
        );
        self.add(
            &format!("{stem}.weight_scale"),
            "U8",
            &[rows, columns / 32],
            Fill::Scales,
        );
    }
}

/// A safetensors file: length of the header, header, data in the order of the list.
fn write_tensors(path: &Path, tensors: &[Tensor]) -> Result<()> {
    let mut header = Map::new();
    let mut end = 0;
    for tensor in tensors {
        let begin = end;
        end += tensor.bytes();
        let entry =
            json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut progress = Progress::new("writing synthetic weights", end as u64);
    let (mut random, mut done, mut bytes) = (0x9e37_79b9_7f4a_7c15, 0, Vec::new());
    for tensor in tensors {
        fill(&mut bytes, tensor, &mut random);
        file.write_all(&bytes)?;
        done += bytes.len() as u64;
        progress.set(done);
    }
    file.flush()?;
    Ok(())
}

fn fill(bytes: &mut Vec<u8>, tensor: &Tensor, state: &mut u64) {
    bytes.clear();
    bytes.resize(tensor.bytes(), 0);
    // Each lane is one byte (codes) or two (BF16) of the eight.
    let (and, or) = match tensor.fill {
        Fill::Codes => (u64::MAX, 0),
        Fill::Scales => (0, 0x7878_7878_7878_7878),
        Fill::Fp8 => (0x8787_8787_8787_8787, 0x3030_3030_3030_3030),
        Fill::Bf16 => (0x807f_807f_807f_807f, 0x3c80_3c80_3c80_3c80),
        Fill::Bf16One => (0, 0x3f80_3f80_3f80_3f80),
        Fill::Constant(x) => (0, u64::from(x.to_bits()) * 0x1_0000_0001),
    };
    for chunk in bytes.chunks_mut(8) {
        let word = (next(state) & and) | or;
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
}

/// xorshift64*: fast, and random enough for weights that mean nothing.
fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{Checkpoint, Config, Weights};

    #[test]
    fn a_synthetic_checkpoint_opens() {
        let dir = write("moe-tiny").unwrap();
        let config = Config::load(dir.path()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let weights = Weights::new(&config, &checkpoint).unwrap();
        let mut row = vec![0.0; config.hidden];
        weights.layers[1].q.row(0).decode(&mut row);
        assert!(
            row.iter()
                .all(|x| x.is_finite() && (0.014..0.03).contains(&x.abs())),
            "{row:?}"
        );
        assert!(write("none").is_err());
    }
}
