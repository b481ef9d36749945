//! The dense model's weights under MiMo-V2's names and formats.
//!
//! Formats of [`Form::Mini`]: experts MXFP4 (`weight` U8 `[n, k/2]`, `weight_scale` U8 `[n, k/32]`),
//! attention and the tied embedding FP8 E4M3 with one f32 scale for each 128 x 128 block (ragged at
//! the edges: 576 = 4.5 x 128), norms and router BF16, the router's bias f32.

use anyhow::Result;
use formats::{fp8, mxfp4};
use half::bf16;
use safetensors::Dtype;

use super::files::Shards;
use super::llama::{Dense, Layer};
use super::{EXPERTS, Form};
use crate::gguf::{Gguf, Tensor};

/// Writes every tensor, layer by layer.
pub(crate) fn write_weights(
    gguf: &mut Gguf,
    dense: &Dense,
    form: Form,
    shards: &mut Shards,
) -> Result<()> {
    let mut writer = Writer { form, shards };
    let embedding = gguf.tensor("token_embd.weight", &[dense.vocab, dense.hidden])?;
    writer.matrix("model.embed_tokens", &embedding)?;
    for index in 0..dense.layers {
        let layer = dense.layer(gguf, index)?;
        writer.layer(&format!("model.layers.{index}"), &layer)?;
        eprintln!("layer {} of {}", index + 1, dense.layers);
    }
    let norm = gguf.tensor("output_norm.weight", &[dense.hidden])?;
    writer.plain("model.norm.weight", &norm)
}

struct Writer<'a> {
    form: Form,
    shards: &'a mut Shards,
}

impl Writer<'_> {
    fn layer(&mut self, prefix: &str, layer: &Layer) -> Result<()> {
        self.plain(
            &format!("{prefix}.input_layernorm.weight"),
            &layer.attn_norm,
        )?;
        for (name, tensor) in [
            ("q", &layer.q),
            ("k", &layer.k),
            ("v", &layer.v),
            ("o", &layer.o),
        ] {
            self.matrix(&format!("{prefix}.self_attn.{name}_proj"), tensor)?;
        }
        self.plain(
            &format!("{prefix}.post_attention_layernorm.weight"),
            &layer.ffn_norm,
        )?;
        if self.form == Form::Dense {
            self.matrix(&format!("{prefix}.mlp.gate_proj"), &layer.gate)?;
            self.matrix(&format!("{prefix}.mlp.up_proj"), &layer.up)?;
            return self.matrix(&format!("{prefix}.mlp.down_proj"), &layer.down);
        }
        self.router(&format!("{prefix}.mlp.gate"), layer.gate.shape[1])?;
        for expert in 0..EXPERTS {
            let prefix = format!("{prefix}.mlp.experts.{expert}");
            self.expert(
                &format!("{prefix}.gate_proj"),
                &slice_rows(&layer.gate, expert),
            )?;
            self.expert(&format!("{prefix}.up_proj"), &slice_rows(&layer.up, expert))?;
            self.expert(
                &format!("{prefix}.down_proj"),
                &slice_columns(&layer.down, expert),
            )?;
        }
        Ok(())
    }

    /// Zero logits: every sigmoid is 1/2, every renormalised weight 1/8.
    fn router(&mut self, prefix: &str, hidden: usize) -> Result<()> {
        let weight = Tensor {
            shape: vec![EXPERTS, hidden],
            data: vec![0.0; EXPERTS * hidden],
        };
        self.plain(&format!("{prefix}.weight"), &weight)?;
        let bias = vec![0; EXPERTS * size_of::<f32>()];
        self.shards.add(
            format!("{prefix}.e_score_correction_bias"),
            Dtype::F32,
            &[EXPERTS],
            bias,
        )
    }

    /// An unquantised tensor: BF16 in what ships, else f32.
    fn plain(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let (dtype, bytes) = if self.form == Form::Mini {
            let bytes = tensor
                .data
                .iter()
                .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
                .collect();
            (Dtype::BF16, bytes)
        } else {
            (Dtype::F32, f32_bytes(&tensor.data))
        };
        self.shards
            .add(name.to_owned(), dtype, &tensor.shape, bytes)
    }

    /// A matrix outside the experts: FP8 with block scales in what ships.
    fn matrix(&mut self, prefix: &str, tensor: &Tensor) -> Result<()> {
        let name = format!("{prefix}.weight");
        if self.form != Form::Mini {
            return self.plain(&name, tensor);
        }
        let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
        let (codes, scales) = fp8::encode_weight(&tensor.data, rows, columns);
        self.shards
            .add(name, Dtype::F8_E4M3, &tensor.shape, codes)?;
        let grid = [rows.div_ceil(fp8::BLOCK), columns.div_ceil(fp8::BLOCK)];
        self.shards.add(
            format!("{prefix}.weight_scale_inv"),
            Dtype::F32,
            &grid,
            f32_bytes(&scales),
        )
    }

    /// A matrix of an expert: MXFP4 in what ships.
    fn expert(&mut self, prefix: &str, tensor: &Tensor) -> Result<()> {
        let name = format!("{prefix}.weight");
        if self.form != Form::Mini {
            return self.plain(&name, tensor);
        }
        let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
        let (blocks, rest) = tensor.data.as_chunks::<{ mxfp4::BLOCK }>();
        assert!(
            rest.is_empty(),
            "the sizes were checked when the file was opened"
        );
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for block in blocks {
            let (block, scale) = mxfp4::encode_block(block, mxfp4::ScaleRule::LeastSquares);
            codes.extend_from_slice(&block);
            scales.push(scale);
        }
        self.shards
            .add(name, Dtype::U8, &[rows, columns / 2], codes)?;
        self.shards.add(
            format!("{prefix}.weight_scale"),
            Dtype::U8,
            &[rows, columns / mxfp4::BLOCK],
            scales,
        )
    }
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Rows of one expert of `[intermediate, hidden]`.
fn slice_rows(tensor: &Tensor, expert: usize) -> Tensor {
    let (rows, columns) = (tensor.shape[0] / EXPERTS, tensor.shape[1]);
    let data = tensor.data[expert * rows * columns..][..rows * columns].to_vec();
    Tensor {
        shape: vec![rows, columns],
        data,
    }
}

/// Columns of one expert of `[hidden, intermediate]`, times the number of experts: the router gives
/// each expert's output a weight of one over that.
fn slice_columns(tensor: &Tensor, expert: usize) -> Tensor {
    let columns = tensor.shape[1] / EXPERTS;
    let scale = EXPERTS as f32;
    let rows = tensor.data.chunks_exact(tensor.shape[1]);
    let data = rows
        .flat_map(|row| &row[expert * columns..][..columns])
        .map(|x| x * scale)
        .collect();
    Tensor {
        shape: vec![tensor.shape[0], columns],
        data,
    }
}
