//! The typed table of a model's weights over an open [`Checkpoint`]: every tensor that the forward
//! pass needs, checked for shape and dtype, still in its stored format.
//!
//! Owns names, layouts and scale grids: a fused QKV tensor is read through a row map (shard r holds
//! `[Q_r | K_r | V_r]`), so nothing is copied. Invariant: every row of every [`Matrix`] has its
//! codes and its scales. Source: mimo-v2.md A.3 to A.5.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use formats::{fp8, mxfp4};
use safetensors::tensor::Dtype;

use crate::checkpoint::{Checkpoint, Tensor};
use crate::config::{AttentionConfig, Config, FfnConfig, LayerConfig, MoeConfig};
use crate::error::ModelError;
use crate::matrix::RowMap;
pub use crate::matrix::{Encoding, Matrix, Row};

/// All weights of a model.
#[derive(Clone, Debug)]
pub struct Weights<'a> {
    /// `[vocab_size, hidden]`.
    pub embed: Matrix<'a>,
    /// One entry a layer.
    pub layers: Vec<LayerWeights<'a>>,
    /// `[hidden]`, the norm before lm_head.
    pub norm: Vec<f32>,
    /// `[vocab_size, hidden]`; the embedding again when tied.
    pub lm_head: Matrix<'a>,
    checkpoint: &'a Checkpoint,
    taken: Arc<AtomicU64>,
}

/// Weights of one layer.
#[derive(Clone, Debug)]
pub struct LayerWeights<'a> {
    /// `[hidden]`.
    pub input_norm: Vec<f32>,
    /// `[heads * qk_dim, hidden]`.
    pub q: Matrix<'a>,
    /// `[kv_heads * qk_dim, hidden]`.
    pub k: Matrix<'a>,
    /// `[kv_heads * v_dim, hidden]`.
    pub v: Matrix<'a>,
    /// `[hidden, heads * v_dim]`.
    pub o: Matrix<'a>,
    /// `[heads]`.
    pub sinks: Option<Vec<f32>>,
    /// `[hidden]`.
    pub post_norm: Vec<f32>,
    /// Feed-forward half.
    pub ffn: FfnWeights<'a>,
}

/// Feed-forward weights of one layer.
#[derive(Clone, Debug)]
pub enum FfnWeights<'a> {
    /// One SwiGLU.
    Dense(SwigluWeights<'a>),
    /// Routed experts.
    Moe {
        /// `[experts, hidden]`, BF16 or F32.
        router: Matrix<'a>,
        /// `[experts]`.
        correction_bias: Vec<f32>,
        /// One SwiGLU an expert.
        experts: Vec<SwigluWeights<'a>>,
    },
}

/// `down(silu(gate x) * up x)`.
#[derive(Clone, Debug)]
pub struct SwigluWeights<'a> {
    /// `[intermediate, hidden]`.
    pub gate: Matrix<'a>,
    /// `[intermediate, hidden]`.
    pub up: Matrix<'a>,
    /// `[hidden, intermediate]`.
    pub down: Matrix<'a>,
}

impl<'a> Weights<'a> {
    /// Finds and checks every tensor of `config` in `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] naming the first tensor that is missing or has another shape or dtype.
    pub fn new(config: &Config, checkpoint: &'a Checkpoint) -> Result<Self, ModelError> {
        let table = Table { checkpoint };
        let embed = table.matrix("model.embed_tokens", config.vocab_size, config.hidden)?;
        let lm_head = match config.tie_word_embeddings {
            true => embed.clone(),
            false => table.matrix("lm_head", config.vocab_size, config.hidden)?,
        };
        let layers = (0..config.layers.len())
            .map(|layer| table.layer(config, layer))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            embed,
            layers,
            norm: table.vector("model.norm.weight", config.hidden)?,
            lm_head,
            checkpoint,
            taken: Arc::default(),
        })
    }

    /// Counts in `taken` what a backend has taken, for whoever shows how far loading is.
    #[must_use]
    pub fn counted_in(mut self, taken: Arc<AtomicU64>) -> Self {
        self.taken = taken;
        self
    }

    /// A backend has made its own of `bytes` more, a drafter's included: counts them, and lets go of the memory
    /// of what has been read so far ([`Checkpoint::release`]).
    pub fn took(&self, bytes: u64) {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        self.checkpoint.release();
    }
}

/// Looks tensors up by name.
pub(crate) struct Table<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
}

impl<'a> Table<'a> {
    fn layer(&self, config: &Config, layer: usize) -> Result<LayerWeights<'a>, ModelError> {
        let prefix = format!("model.layers.{layer}");
        let hidden = config.hidden;
        let LayerConfig { attention: a, ffn } = &config.layers[layer];
        let (q, k, v) = self.qkv(config, &prefix, a)?;
        let sinks = match a.sinks {
            true => {
                let name = format!("{prefix}.self_attn.attention_sink_bias");
                Some(self.vector(&name, a.heads)?)
            }
            false => None,
        };
        Ok(LayerWeights {
            input_norm: self.vector(&format!("{prefix}.input_layernorm.weight"), hidden)?,
            q,
            k,
            v,
            o: self.matrix(
                &format!("{prefix}.self_attn.o_proj"),
                hidden,
                a.heads * a.v_dim,
            )?,
            sinks,
            post_norm: self.vector(&format!("{prefix}.post_attention_layernorm.weight"), hidden)?,
            ffn: match ffn {
                FfnConfig::Dense { intermediate } => {
                    let mlp = format!("{prefix}.mlp");
                    FfnWeights::Dense(self.swiglu(&mlp, hidden, *intermediate)?)
                }
                FfnConfig::Moe(moe) => self.moe(&format!("{prefix}.mlp"), hidden, moe)?,
            },
        })
    }

    fn moe(
        &self,
        prefix: &str,
        hidden: usize,
        moe: &MoeConfig,
    ) -> Result<FfnWeights<'a>, ModelError> {
        let router = self.matrix(&format!("{prefix}.gate"), moe.experts, hidden)?;
        let bias = format!("{prefix}.gate.e_score_correction_bias");
        let experts = (0..moe.experts)
            .map(|e| self.swiglu(&format!("{prefix}.experts.{e}"), hidden, moe.intermediate))
            .collect::<Result<_, _>>()?;
        Ok(FfnWeights::Moe {
            router,
            correction_bias: self.vector(&bias, moe.experts)?,
            experts,
        })
    }

    pub(crate) fn swiglu(
        &self,
        prefix: &str,
        hidden: usize,
        intermediate: usize,
    ) -> Result<SwigluWeights<'a>, ModelError> {
        Ok(SwigluWeights {
            gate: self.matrix(&format!("{prefix}.gate_proj"), intermediate, hidden)?,
            up: self.matrix(&format!("{prefix}.up_proj"), intermediate, hidden)?,
            down: self.matrix(&format!("{prefix}.down_proj"), hidden, intermediate)?,
        })
    }

    fn qkv(
        &self,
        config: &Config,
        prefix: &str,
        a: &AttentionConfig,
    ) -> Result<(Matrix<'a>, Matrix<'a>, Matrix<'a>), ModelError> {
        let (q, k, v) = (
            a.heads * a.qk_dim,
            a.kv_heads * a.qk_dim,
            a.kv_heads * a.v_dim,
        );
        let shards = config.qkv_shards;
        if !config.fused_qkv {
            let part = |name: &str, rows| {
                let stem = format!("{prefix}.self_attn.{name}");
                self.sharded(&stem, rows, config.hidden, shards)
            };
            return Ok((part("q_proj", q)?, part("k_proj", k)?, part("v_proj", v)?));
        }
        let stem = format!("{prefix}.self_attn.qkv_proj");
        let fused = self.sharded(&stem, q + k + v, config.hidden, shards)?;
        assert!(a.kv_heads.is_multiple_of(shards), "Config checks it");
        let part = |rows: usize, first: usize| Matrix {
            rows,
            map: RowMap {
                taken: rows / shards,
                first: first / shards,
                shard_rows: (q + k + v) / shards,
                ..fused.map
            },
            ..fused.clone()
        };
        Ok((part(q, 0), part(k, q), part(v, q + k)))
    }

    /// A matrix whose scale grid covers the whole tensor.
    pub(crate) fn matrix(
        &self,
        stem: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Matrix<'a>, ModelError> {
        self.sharded(stem, rows, cols, 1)
    }

    /// A matrix whose FP8 scale grid restarts every `rows / shards` rows, or covers the whole
    /// tensor: the number of scale rows tells which. Where both give the same number, it restarts.
    fn sharded(
        &self,
        stem: &str,
        rows: usize,
        cols: usize,
        shards: usize,
    ) -> Result<Matrix<'a>, ModelError> {
        let name = format!("{stem}.weight");
        let weight = self.tensor(&name)?;
        let mut map = RowMap::plain(rows);
        let empty: &[u8] = &[];
        let (encoding, stored_cols, scales) = match weight.dtype {
            Dtype::F32 => (Encoding::F32, cols, empty),
            Dtype::BF16 => (Encoding::Bf16, cols, empty),
            Dtype::F8_E4M3 => {
                let scales = self.fp8_scales(stem, cols, &mut map, shards)?;
                (Encoding::Fp8, cols, scales)
            }
            Dtype::U8 if cols.is_multiple_of(mxfp4::BLOCK) => {
                let scales = self.mxfp4_scales(stem, rows, cols)?;
                (Encoding::Mxfp4, cols / 2, scales)
            }
            other => {
                let expected = "BF16, F32, F8_E4M3 or (columns a multiple of 32) MXFP4 as U8";
                return Err(self.wrong(&name, expected, &format!("{other:?}")));
            }
        };
        if weight.shape != [rows, stored_cols] {
            let expected = format!("shape [{rows}, {stored_cols}]");
            return Err(self.wrong(&name, &expected, &format!("{:?}", weight.shape)));
        }
        Ok(Matrix {
            rows,
            cols,
            encoding,
            codes: weight.bytes,
            scales,
            map,
        })
    }

    fn fp8_scales(
        &self,
        stem: &str,
        cols: usize,
        map: &mut RowMap,
        shards: usize,
    ) -> Result<&'a [u8], ModelError> {
        let name = format!("{stem}.weight_scale_inv");
        let scales = self.tensor(&name)?;
        let rows = map.taken;
        let plain = rows.div_ceil(fp8::BLOCK);
        let restarting = match rows % shards {
            0 => shards * (rows / shards).div_ceil(fp8::BLOCK),
            _ => plain,
        };
        let columns = cols.div_ceil(fp8::BLOCK);
        if scales.dtype != Dtype::F32 {
            return Err(self.wrong(&name, "F32", &format!("{:?}", scales.dtype)));
        }
        match scales.shape {
            [r, c] if *r == restarting && *c == columns => {
                if rows.is_multiple_of(shards) {
                    map.grid_rows = rows / shards;
                }
            }
            [r, c] if *r == plain && *c == columns => {}
            other => {
                let expected = match plain == restarting {
                    true => format!("shape [{plain}, {columns}]"),
                    false => {
                        format!(
                            "shape [{plain}, {columns}] or, a grid a shard, [{restarting}, {columns}]"
                        )
                    }
                };
                return Err(self.wrong(&name, &expected, &format!("{other:?}")));
            }
        }
        Ok(scales.bytes)
    }

    fn mxfp4_scales(&self, stem: &str, rows: usize, cols: usize) -> Result<&'a [u8], ModelError> {
        let name = format!("{stem}.weight_scale");
        let scales = self.tensor(&name)?;
        let shape = [rows, cols / mxfp4::BLOCK];
        if !matches!(scales.dtype, Dtype::U8 | Dtype::F8_E8M0) || scales.shape != shape {
            let expected = format!("U8 of shape {shape:?}");
            let found = format!("{:?} of shape {:?}", scales.dtype, scales.shape);
            return Err(self.wrong(&name, &expected, &found));
        }
        Ok(scales.bytes)
    }

    /// A small vector, BF16 or F32, decoded.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensor(name)?;
        if tensor.shape != [len] {
            let expected = format!("shape [{len}]");
            return Err(self.wrong(name, &expected, &format!("{:?}", tensor.shape)));
        }
        let mut out = vec![0.0; len];
        match tensor.dtype {
            Dtype::F32 => Row::F32(tensor.bytes).decode(&mut out),
            Dtype::BF16 => Row::Bf16(tensor.bytes).decode(&mut out),
            other => return Err(self.wrong(name, "BF16 or F32", &format!("{other:?}"))),
        }
        Ok(out)
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'a>, ModelError> {
        self.checkpoint
            .get(name)
            .ok_or_else(|| self.wrong(name, "the tensor", "no tensor of this name"))
    }

    fn wrong(&self, tensor: &str, expected: &str, found: &str) -> ModelError {
        let place = self.checkpoint.get(tensor).map(|t| t.file);
        ModelError::Tensor {
            file: place.unwrap_or(self.checkpoint.dir()).display().to_string(),
            tensor: tensor.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }
}
