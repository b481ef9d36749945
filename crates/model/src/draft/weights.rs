//! The typed table of a drafter's weights, still in their stored format.

use super::config::DraftConfig;
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::weights::{Matrix, SwigluWeights, Table};

/// All weights of a drafter. Embedding and lm_head are the target's.
#[derive(Clone, Debug)]
pub struct DraftWeights<'a> {
    /// `[hidden, taps * hidden]`.
    pub fc: Matrix<'a>,
    /// `[hidden]`, after `fc`.
    pub hidden_norm: Vec<f32>,
    /// One entry a layer.
    pub layers: Vec<DraftLayerWeights<'a>>,
    /// `[hidden]`, before lm_head.
    pub norm: Vec<f32>,
}

/// Weights of one draft layer.
#[derive(Clone, Debug)]
pub struct DraftLayerWeights<'a> {
    /// `[hidden]`.
    pub input_norm: Vec<f32>,
    /// `[heads * qk_dim, hidden]`.
    pub q: Projection<'a>,
    /// `[kv_heads * qk_dim, hidden]`, for block and context.
    pub k: Projection<'a>,
    /// `[kv_heads * v_dim, hidden]`, for block and context.
    pub v: Projection<'a>,
    /// `[hidden, heads * v_dim]`.
    pub o: Projection<'a>,
    /// `[qk_dim]`, of every query head.
    pub q_norm: Vec<f32>,
    /// `[qk_dim]`, of every key head.
    pub k_norm: Vec<f32>,
    /// `[heads]`.
    pub sinks: Option<Vec<f32>>,
    /// `[hidden]`.
    pub post_norm: Vec<f32>,
    /// Feed-forward half.
    pub ffn: SwigluWeights<'a>,
}

/// A matrix and its bias.
#[derive(Clone, Debug)]
pub struct Projection<'a> {
    /// `[rows, cols]`.
    pub matrix: Matrix<'a>,
    /// `[rows]`.
    pub bias: Option<Vec<f32>>,
}

impl<'a> DraftWeights<'a> {
    /// Finds and checks every tensor.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] naming the first tensor that is missing or has another shape.
    pub fn new(config: &DraftConfig, checkpoint: &'a Checkpoint) -> Result<Self, ModelError> {
        let table = Table { checkpoint };
        let hidden = config.hidden;
        let layers = (0..config.layers.len())
            .map(|layer| layer_weights(&table, config, layer))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            fc: table.matrix("fc", hidden, config.taps.len() * hidden)?,
            hidden_norm: table.vector("hidden_norm.weight", hidden)?,
            layers,
            norm: table.vector("norm.weight", hidden)?,
        })
    }
}

fn layer_weights<'a>(
    table: &Table<'a>,
    config: &DraftConfig,
    layer: usize,
) -> Result<DraftLayerWeights<'a>, ModelError> {
    let (prefix, a) = (format!("layers.{layer}"), &config.attention);
    let attn = format!("{prefix}.self_attn");
    let vector = |name: String, len| table.vector(&name, len);
    let projection = |name: &str, rows, cols| {
        let stem = format!("{attn}.{name}");
        Ok(Projection {
            matrix: table.matrix(&stem, rows, cols)?,
            bias: match config.biases {
                true => Some(vector(format!("{stem}.bias"), rows)?),
                false => None,
            },
        })
    };
    Ok(DraftLayerWeights {
        input_norm: vector(format!("{prefix}.input_layernorm.weight"), config.hidden)?,
        q: projection("q_proj", a.heads * a.qk_dim, config.hidden)?,
        k: projection("k_proj", a.kv_heads * a.qk_dim, config.hidden)?,
        v: projection("v_proj", a.kv_heads * a.v_dim, config.hidden)?,
        o: projection("o_proj", config.hidden, a.heads * a.v_dim)?,
        q_norm: vector(format!("{attn}.q_norm.weight"), a.qk_dim)?,
        k_norm: vector(format!("{attn}.k_norm.weight"), a.qk_dim)?,
        sinks: match a.sinks {
            true => Some(vector(format!("{attn}.attention_sink_bias"), a.heads)?),
            false => None,
        },
        post_norm: vector(
            format!("{prefix}.post_attention_layernorm.weight"),
            config.hidden,
        )?,
        ffn: table.swiglu(&format!("{prefix}.mlp"), config.hidden, config.intermediate)?,
    })
}
