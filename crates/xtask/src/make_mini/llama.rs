//! The dense Llama model as it lies in a GGUF file: its sizes and its weights, layer by layer.
//!
//! Invariant: what leaves this file is in Hugging Face's order. GGUF interleaves the two halves of
//! every query and key head for ggml's rotary embedding; MiMo-V2 rotates halves (neox), as Llama
//! did before conversion, so [`Dense::layer`] puts the rows back.

use anyhow::{Result, ensure};

use crate::gguf::{Gguf, Tensor};

/// Sizes of the dense model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Dense {
    pub layers: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub context: usize,
    pub rope_theta: f64,
    pub norm_eps: f64,
}

/// Weights of one layer, `[out, in]` row-major.
pub(crate) struct Layer {
    pub attn_norm: Tensor,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub o: Tensor,
    pub ffn_norm: Tensor,
    pub gate: Tensor,
    pub up: Tensor,
    pub down: Tensor,
}

impl Dense {
    /// Reads and checks the sizes.
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let architecture = gguf.text("general.architecture")?;
        ensure!(
            architecture == "llama",
            "GGUF architecture: expected `llama`, found `{architecture}`"
        );
        let dense = Self {
            layers: gguf.integer("llama.block_count")?,
            hidden: gguf.integer("llama.embedding_length")?,
            intermediate: gguf.integer("llama.feed_forward_length")?,
            heads: gguf.integer("llama.attention.head_count")?,
            kv_heads: gguf.integer("llama.attention.head_count_kv")?,
            head_dim: gguf.integer("llama.rope.dimension_count")?,
            vocab: gguf.integer("llama.vocab_size")?,
            context: gguf.integer("llama.context_length")?,
            rope_theta: gguf.float("llama.rope.freq_base")?,
            norm_eps: gguf.float("llama.attention.layer_norm_rms_epsilon")?,
        };
        dense.check()?;
        Ok(dense)
    }

    fn check(&self) -> Result<()> {
        let expert = self.intermediate / super::EXPERTS;
        ensure!(
            self.hidden.is_multiple_of(32) && expert > 0 && expert.is_multiple_of(32),
            "hidden {} and 1/{} of intermediate {} must be multiples of 32, the MXFP4 block",
            self.hidden,
            super::EXPERTS,
            self.intermediate
        );
        ensure!(
            self.heads * self.head_dim == self.hidden,
            "heads x head_dim is not hidden"
        );
        ensure!(
            self.kv_heads > 0
                && self.heads.is_multiple_of(self.kv_heads)
                && self.head_dim.is_multiple_of(2),
            "{} heads of {} cannot share {} KV heads",
            self.heads,
            self.head_dim,
            self.kv_heads
        );
        Ok(())
    }

    /// Reads one layer.
    pub(crate) fn layer(&self, gguf: &mut Gguf, index: usize) -> Result<Layer> {
        let (h, f) = (self.hidden, self.intermediate);
        let kv = self.kv_heads * self.head_dim;
        let mut get =
            |name: &str, shape: &[usize]| gguf.tensor(&format!("blk.{index}.{name}.weight"), shape);
        Ok(Layer {
            attn_norm: get("attn_norm", &[h])?,
            q: halves_from_pairs(get("attn_q", &[h, h])?, self.head_dim),
            k: halves_from_pairs(get("attn_k", &[kv, h])?, self.head_dim),
            v: get("attn_v", &[kv, h])?,
            o: get("attn_output", &[h, h])?,
            ffn_norm: get("ffn_norm", &[h])?,
            gate: get("ffn_gate", &[f, h])?,
            up: get("ffn_up", &[f, h])?,
            down: get("ffn_down", &[h, f])?,
        })
    }
}

/// Rows `2i, 2i+1` of each head go to `i, i + head_dim/2`.
fn halves_from_pairs(tensor: Tensor, head_dim: usize) -> Tensor {
    let columns = tensor.shape[1];
    let mut data = vec![0.0; tensor.data.len()];
    for (row, values) in tensor.data.chunks_exact(columns).enumerate() {
        let (head, within) = (row / head_dim, row % head_dim);
        let to = head * head_dim + (within % 2) * (head_dim / 2) + within / 2;
        data[to * columns..][..columns].copy_from_slice(values);
    }
    Tensor {
        shape: tensor.shape,
        data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_halves_within_each_head() {
        let tensor = Tensor {
            shape: vec![8, 1],
            data: vec![0., 2., 1., 3., 10., 12., 11., 13.],
        };
        assert_eq!(
            halves_from_pairs(tensor, 4).data,
            [0., 1., 2., 3., 10., 11., 12., 13.]
        );
    }
}
