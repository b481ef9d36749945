//! Checkpoints of random weights for parity tests and benchmarks: any config and formats, so that ranks and shapes
//! that no golden has can be compared with the reference.
//!
//! Owns names, sizes and the distribution of values: products keep about the size of what comes in, scales
//! differ from block to block. Refuses fused QKV and f32 experts. What they compute means nothing:
//! every report says `synthetic`.

mod draft;

pub use draft::{eight_rank_drafter, write_drafter};

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use model::Config;
use model::config::{AttentionConfig, FfnConfig, LayerConfig, MoeConfig};

use crate::CudaError;
use crate::program::{Formats, LayerFormats};
use crate::strips::Format;

/// A tensor of the file: what its bytes look like.
#[derive(Clone, Copy)]
enum Fill {
    /// Any byte.
    Codes,
    /// E8M0 around this exponent.
    Exponents(u8),
    /// E4M3 of magnitude 0.25 to 3.75.
    E4m3,
    /// f32 of a magnitude between this and twice as much, positive.
    Scales(f32),
    /// f32, both signs, up to this.
    F32(f32),
    /// BF16, both signs, up to this.
    Bf16(f32),
    /// f32 of 0.75 to 1.25.
    Norm,
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

/// xorshift64*: fast, and random enough for weights that mean nothing.
fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D)
}

/// Uniform in -1..1.
fn signed(state: &mut u64) -> f32 {
    (next(state) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

fn fill(tensor: &Tensor, state: &mut u64) -> Vec<u8> {
    let mut out = vec![0u8; tensor.bytes()];
    let mut values = |each: &mut dyn FnMut(&mut u64) -> f32| {
        for chunk in out.chunks_exact_mut(4) {
            chunk.copy_from_slice(&each(state).to_le_bytes());
        }
    };
    match tensor.fill {
        Fill::Scales(at) => values(&mut |s| at * (1.5 + 0.5 * signed(s))),
        Fill::F32(most) => values(&mut |s| most * signed(s)),
        Fill::Norm => values(&mut |s| 1.0 + 0.25 * signed(s)),
        Fill::Bf16(most) => {
            for chunk in out.chunks_exact_mut(2) {
                let code = formats::bf16::encode(most * signed(state));
                chunk.copy_from_slice(&code.to_le_bytes());
            }
        }
        Fill::Codes | Fill::E4m3 | Fill::Exponents(_) => {
            let lanes = |byte: u8| u64::from_le_bytes([byte; 8]);
            // Of an E4M3 code sign, two bits of the exponent and the mantissa are random.
            let (and, add) = match tensor.fill {
                Fill::E4m3 => (lanes(0x9F), lanes(0x28)),
                Fill::Exponents(at) => (lanes(1), lanes(at)),
                _ => (u64::MAX, 0),
            };
            for chunk in out.chunks_mut(8) {
                let word = (next(state) & and).wrapping_add(add);
                chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
            }
        }
    }
    out
}

/// The tensors of a model.
struct Table(Vec<Tensor>);

impl Table {
    fn add(&mut self, name: String, dtype: &'static str, shape: &[usize], fill: Fill) {
        self.0.push(Tensor {
            name,
            dtype,
            shape: shape.to_vec(),
            fill,
        });
    }

    /// A matrix whose products with values around 1 are around 1.
    fn matrix(&mut self, stem: &str, format: Format, rows: usize, columns: usize) {
        let size = 1.0 / (columns as f32).sqrt();
        let name = format!("{stem}.weight");
        match format {
            Format::Bf16 => {
                self.add(name, "BF16", &[rows, columns], Fill::Bf16(1.7 * size));
            }
            Format::F32 => self.add(name, "F32", &[rows, columns], Fill::F32(1.7 * size)),
            Format::Fp8 => {
                self.add(name, "F8_E4M3", &[rows, columns], Fill::E4m3);
                let grid = [rows.div_ceil(128), columns.div_ceil(128)];
                let scales = Fill::Scales(0.4 * size);
                self.add(format!("{stem}.weight_scale_inv"), "F32", &grid, scales);
            }
            Format::Fp4 => {
                // Random codes are 2.9 in the mean of squares.
                let exponent = (size / 4.0).log2().round() as i32 + 127;
                self.add(name, "U8", &[rows, columns / 2], Fill::Codes);
                let scales = Fill::Exponents(exponent.clamp(1, 254) as u8);
                let grid = [rows, columns / 32];
                self.add(format!("{stem}.weight_scale"), "U8", &grid, scales);
            }
        }
    }

    fn vector(&mut self, name: String, size: usize, fill: Fill) {
        self.add(name, "F32", &[size], fill);
    }

    fn attention(&mut self, stem: &str, hidden: usize, a: &AttentionConfig, f: &LayerFormats) {
        let (q, k, v) = (
            a.heads * a.qk_dim,
            a.kv_heads * a.qk_dim,
            a.kv_heads * a.v_dim,
        );
        self.matrix(&format!("{stem}.q_proj"), f.qkv, q, hidden);
        self.matrix(&format!("{stem}.k_proj"), f.qkv, k, hidden);
        self.matrix(&format!("{stem}.v_proj"), f.qkv, v, hidden);
        self.matrix(&format!("{stem}.o_proj"), f.o, hidden, a.heads * a.v_dim);
        if a.sinks {
            let name = format!("{stem}.attention_sink_bias");
            self.vector(name, a.heads, Fill::F32(1.0));
        }
    }

    fn unit(&mut self, stem: &str, hidden: usize, inner: usize, f: &LayerFormats) {
        self.matrix(&format!("{stem}.gate_proj"), f.gate_up, inner, hidden);
        self.matrix(&format!("{stem}.up_proj"), f.gate_up, inner, hidden);
        self.matrix(&format!("{stem}.down_proj"), f.down, hidden, inner);
    }

    fn layer(&mut self, l: usize, hidden: usize, layer: &LayerConfig, f: &LayerFormats) {
        let stem = format!("model.layers.{l}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            self.vector(format!("{stem}.{norm}.weight"), hidden, Fill::Norm);
        }
        let name = format!("{stem}.self_attn");
        self.attention(&name, hidden, &layer.attention, f);
        let mlp = format!("{stem}.mlp");
        match &layer.ffn {
            FfnConfig::Dense { intermediate } => self.unit(&mlp, hidden, *intermediate, f),
            FfnConfig::Moe(moe) => {
                self.matrix(&format!("{mlp}.gate"), f.router, moe.experts, hidden);
                let bias = format!("{mlp}.gate.e_score_correction_bias");
                self.vector(bias, moe.experts, Fill::F32(0.1));
                for e in 0..moe.experts {
                    let expert = format!("{mlp}.experts.{e}");
                    self.unit(&expert, hidden, moe.intermediate, f);
                }
            }
        }
    }
}

fn table(config: &Config, formats: &Formats) -> Table {
    let mut table = Table(Vec::new());
    let embed = match formats.embed_bf16 {
        true => Format::Bf16,
        false => Format::F32,
    };
    let (vocab, hidden) = (config.vocab_size, config.hidden);
    // Rows of the embedding are as large as what products give.
    table.matrix("model.embed_tokens", embed, vocab, hidden);
    for tensor in &mut table.0 {
        tensor.fill = match tensor.fill {
            Fill::Bf16(_) => Fill::Bf16(1.7),
            _ => Fill::F32(1.7),
        };
    }
    table.matrix("lm_head", formats.lm_head, vocab, hidden);
    table.vector("model.norm.weight".into(), hidden, Fill::Norm);
    for (l, (layer, f)) in config.layers.iter().zip(&formats.layers).enumerate() {
        table.layer(l, hidden, layer, f);
    }
    table
}

/// Writes `model.safetensors` of random weights into `dir`; the same bytes for the same seed.
///
/// # Errors
/// Fused QKV, which no config made here has; a file that cannot be written.
pub fn write(dir: &Path, config: &Config, formats: &Formats, seed: u64) -> Result<(), CudaError> {
    if config.fused_qkv || config.tie_word_embeddings {
        return Err(CudaError::Shape {
            what: "synthetic checkpoint",
            expected: "q, k, v and lm_head as tensors of their own".into(),
            found: "fused or tied ones".into(),
        });
    }
    let path = dir.join("model.safetensors");
    let done = write_file(&path, &table(config, formats).0, seed);
    done.map_err(|source| CudaError::Io { path, source })
}

fn write_file(path: &Path, tensors: &[Tensor], seed: u64) -> std::io::Result<()> {
    let mut end = 0;
    let entry = |t: &Tensor| {
        let begin = end;
        end += t.bytes();
        let (name, dtype, shape) = (&t.name, t.dtype, &t.shape);
        format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#
        )
    };
    let entries: Vec<String> = tensors.iter().map(entry).collect();
    let mut header = format!("{{{}}}", entries.join(","));
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for tensor in tensors {
        file.write_all(&fill(tensor, &mut state))?;
    }
    file.flush()
}

/// A small model of every kind of layer that divides into 8 ranks: heads, key/value heads, inner
/// columns (32 a rank, one MXFP4 block) and vocabulary.
#[must_use]
pub fn eight_ranks() -> Config {
    let attention = |window: Option<usize>| AttentionConfig {
        heads: 16,
        kv_heads: 8,
        qk_dim: 24,
        v_dim: 16,
        rope_dims: 8,
        rope_theta: 1e4,
        window,
        sinks: window.is_some(),
        value_scale: 0.7,
    };
    let moe = FfnConfig::Moe(MoeConfig {
        experts: 16,
        active: 3,
        intermediate: 256,
        norm_topk: true,
        scaling: 1.0,
    });
    let layer = |window, ffn| LayerConfig {
        attention: attention(window),
        ffn,
    };
    Config {
        model_type: "mimo_v2".into(),
        vocab_size: 128,
        hidden: 128,
        eps: 1e-5,
        context_tokens: 4096,
        tie_word_embeddings: false,
        fused_qkv: false,
        qkv_shards: 1,
        layers: vec![
            layer(None, FfnConfig::Dense { intermediate: 256 }),
            layer(Some(8), moe.clone()),
            layer(None, moe),
        ],
    }
}

/// Layer `layer` of `config` as one of `ranks` holds it, as a model of its own: that rank's heads and
/// inner columns, all experts, `vocab_size` tokens.
///
/// # Errors
/// When the layer does not divide.
pub fn one_layer(
    config: &Config,
    layer: usize,
    ranks: usize,
    vocab_size: usize,
) -> Result<Config, CudaError> {
    let wrong = |what, found: usize| CudaError::Shape {
        what,
        expected: format!("a multiple of {ranks} ranks"),
        found: found.to_string(),
    };
    let Some(held) = config.layers.get(layer) else {
        return Err(CudaError::Shape {
            what: "layer",
            expected: format!("below {}", config.layers.len()),
            found: layer.to_string(),
        });
    };
    let mut held = held.clone();
    let each = |what, size: &mut usize| {
        if ranks == 0 || !size.is_multiple_of(ranks) {
            return Err(wrong(what, *size));
        }
        *size /= ranks;
        Ok(())
    };
    each("query heads", &mut held.attention.heads)?;
    each("key/value heads", &mut held.attention.kv_heads)?;
    match &mut held.ffn {
        FfnConfig::Dense { intermediate } => each("inner width", intermediate)?,
        FfnConfig::Moe(moe) => each("inner width", &mut moe.intermediate)?,
    }
    Ok(Config {
        vocab_size,
        fused_qkv: false,
        qkv_shards: 1,
        tie_word_embeddings: false,
        layers: vec![held],
        ..config.clone()
    })
}
