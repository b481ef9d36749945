//! Drafters of random weights, for ranks that no golden drafter divides into.

use std::path::Path;

use model::config::AttentionConfig;
use model::draft::{DraftConfig, DraftWindow};

use super::{Fill, Table, write_file};
use crate::CudaError;
use crate::program::LayerFormats;
use crate::strips::Format;

/// Writes `model.safetensors` of a drafter of random weights without biases into `dir`.
///
/// # Errors
/// A file that cannot be written.
pub fn write_drafter(
    dir: &Path,
    config: &DraftConfig,
    format: Format,
    seed: u64,
) -> Result<(), CudaError> {
    let (hidden, a) = (config.hidden, &config.attention);
    let formats = LayerFormats {
        qkv: format,
        o: format,
        router: format,
        gate_up: format,
        down: format,
    };
    let mut table = Table(Vec::new());
    table.matrix("fc", format, hidden, config.taps.len() * hidden);
    for norm in ["hidden_norm.weight", "norm.weight"] {
        table.vector(norm.into(), hidden, Fill::Norm);
    }
    for l in 0..config.layers.len() {
        let stem = format!("layers.{l}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            table.vector(format!("{stem}.{norm}.weight"), hidden, Fill::Norm);
        }
        let attention = format!("{stem}.self_attn");
        table.attention(&attention, hidden, a, &formats);
        for norm in ["q_norm", "k_norm"] {
            table.vector(format!("{attention}.{norm}.weight"), a.qk_dim, Fill::Norm);
        }
        table.unit(
            &format!("{stem}.mlp"),
            hidden,
            config.intermediate,
            &formats,
        );
    }
    let path = dir.join("model.safetensors");
    let done = write_file(&path, &table.0, seed);
    done.map_err(|source| CudaError::Io { path, source })
}

/// A drafter of [`super::eight_ranks`] that divides into 8 ranks too; its taps are three blocks of 128
/// columns, so that some ranks have none.
#[must_use]
pub fn eight_rank_drafter() -> DraftConfig {
    DraftConfig {
        block_size: 4,
        hidden: 128,
        intermediate: 256,
        eps: 1e-5,
        taps: vec![0, 1, 2],
        mask_token: 127,
        biases: false,
        attention: AttentionConfig {
            heads: 16,
            kv_heads: 8,
            qk_dim: 24,
            v_dim: 16,
            rope_dims: 8,
            rope_theta: 1e4,
            window: None,
            sinks: true,
            value_scale: 0.7,
        },
        context_rope_theta: 1e4,
        layers: vec![DraftWindow::Symmetric(4), DraftWindow::Full],
    }
}
