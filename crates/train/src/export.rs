//! Writes a model as a checkpoint that the engine loads: MXFP4 experts, FP8 attention and embedding,
//! BF16 norms, router and sinks; or everything in f32 (between phases).
//!
//! Refuses to write an expert whose stored bytes do not decode to exactly what training saw.
//! Shards hold at most 40 MB; a tensor is never split.

use std::collections::BTreeMap;
use std::path::Path;

use formats::mxfp4::ScaleRule;
use formats::{bf16, fp8, mxfp4};
use safetensors::tensor::Dtype;
use serde_json::json;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::files;
use crate::net::{Net, group};
use crate::params::Quant;

/// A tensor on its way to disk.
pub type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

const SHARD_BYTES_MAX: usize = 40_000_000;

/// Number formats of what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Every weight in f32.
    Master,
    /// What ships.
    Quantized,
}

/// Writes config.json and the weights of `net` into `directory`; `extra` files are copied from `texts`.
pub fn write(net: &Net, directory: &Path, form: Form, texts: &Path) -> Result<()> {
    let mut out = Writer {
        form,
        tensors: Vec::new(),
    };
    out.model(net)?;
    shards(directory, out.tensors, form)?;
    files::write_json(
        &directory.join("config.json"),
        &net.shape.config(form == Form::Quantized),
    )?;
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        if let Ok(bytes) = std::fs::read(texts.join(name)) {
            files::write(&directory.join(name), &bytes)?;
        }
    }
    Ok(())
}

/// Splits into shards, writes them and the index.
pub fn shards(directory: &Path, tensors: Vec<Stored>, form: Form) -> Result<()> {
    let total: usize = tensors.iter().map(|t| t.3.len()).sum();
    let mut parts: Vec<Vec<Stored>> = vec![Vec::new()];
    let mut size = 0;
    for tensor in tensors {
        if size > 0 && size + tensor.3.len() > SHARD_BYTES_MAX {
            parts.push(Vec::new());
            size = 0;
        }
        size += tensor.3.len();
        parts.last_mut().expect("never empty").push(tensor);
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut map = BTreeMap::new();
    for (i, part) in parts.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, parts.len());
        files::write_stored(&directory.join(&name), part, &metadata)?;
        map.extend(part.iter().map(|t| (t.0.clone(), name.clone())));
    }
    let mut about = json!({"total_size": total});
    if form == Form::Quantized {
        about["save_format"] = "mxfp4".into();
    }
    let index = json!({"metadata": about, "weight_map": map});
    files::write_json(&directory.join("model.safetensors.index.json"), &index)
}

/// Collects tensors in one form.
#[derive(Debug)]
pub struct Writer {
    /// Which form.
    pub form: Form,
    /// What was collected.
    pub tensors: Vec<Stored>,
}

impl Writer {
    fn model(&mut self, net: &Net) -> Result<()> {
        let master = |group: usize, index: i64| net.params.groups[group].master.get(index);
        self.matrix("model.embed_tokens", &master(group::EMBED, 0));
        self.plain("model.norm.weight", &master(group::NORM, 0));
        for layer in 0..net.shape.layers {
            let prefix = format!("model.layers.{layer}");
            let at = |group: usize| master(group, layer);
            self.plain(
                &format!("{prefix}.input_layernorm.weight"),
                &at(group::NORM_IN),
            );
            self.plain(
                &format!("{prefix}.post_attention_layernorm.weight"),
                &at(group::NORM_POST),
            );
            let mut start = 0;
            for (name, rows) in ["q", "k", "v"].iter().zip(net.shape.qkv_rows()) {
                let part = at(group::QKV).narrow(0, start, rows);
                self.matrix(&format!("{prefix}.self_attn.{name}_proj"), &part);
                start += rows;
            }
            self.matrix(&format!("{prefix}.self_attn.o_proj"), &at(group::OUT));
            if net.shape.sinks && net.shape.sliding[layer as usize] {
                let name = format!("{prefix}.self_attn.attention_sink_bias");
                self.plain(&name, &at(group::SINK));
            }
            self.feed_forward(net, layer)?;
        }
        Ok(())
    }

    fn feed_forward(&mut self, net: &Net, layer: i64) -> Result<()> {
        let shape = &net.shape;
        let prefix = format!("model.layers.{layer}.mlp");
        let gate_up = net.params.groups[group::GATE_UP].master.get(layer);
        let down = net.params.groups[group::DOWN].master.get(layer);
        if shape.experts == 0 {
            self.matrix(
                &format!("{prefix}.gate_proj"),
                &gate_up.narrow(0, 0, shape.ffn),
            );
            self.matrix(
                &format!("{prefix}.up_proj"),
                &gate_up.narrow(0, shape.ffn, shape.ffn),
            );
            self.matrix(&format!("{prefix}.down_proj"), &down);
            return Ok(());
        }
        let router = net.params.groups[group::ROUTER].master.get(layer);
        self.plain(&format!("{prefix}.gate.weight"), &router);
        let bias = net.bias.get(layer);
        self.push(
            &format!("{prefix}.gate.e_score_correction_bias"),
            Dtype::F32,
            &bias,
            f32_bytes(&bias),
        );
        let width = shape.ffn / shape.experts;
        for expert in 0..shape.experts {
            let prefix = format!("{prefix}.experts.{expert}");
            let start = expert * width;
            let down = down.narrow(1, start, width) * shape.active as f64;
            self.expert(&format!("{prefix}.down_proj"), &down)?;
            self.expert(
                &format!("{prefix}.gate_proj"),
                &gate_up.narrow(0, start, width),
            )?;
            self.expert(
                &format!("{prefix}.up_proj"),
                &gate_up.narrow(0, shape.ffn + start, width),
            )?;
        }
        Ok(())
    }

    fn push(&mut self, name: &str, dtype: Dtype, like: &Tensor, bytes: Vec<u8>) {
        let shape = like.size().iter().map(|&x| x as usize).collect();
        self.tensors.push((name.to_owned(), dtype, shape, bytes));
    }

    /// An unquantised tensor: BF16 in what ships.
    pub fn plain(&mut self, name: &str, tensor: &Tensor) {
        if self.form == Form::Master {
            return self.push(name, Dtype::F32, tensor, f32_bytes(tensor));
        }
        let values = files::tensor_values(tensor);
        let bytes = values
            .iter()
            .flat_map(|&x| bf16::encode(x).to_le_bytes())
            .collect();
        self.push(name, Dtype::BF16, tensor, bytes);
    }

    /// A matrix outside the experts: FP8 with block scales in what ships.
    pub fn matrix(&mut self, prefix: &str, tensor: &Tensor) {
        let name = format!("{prefix}.weight");
        if self.form == Form::Master {
            return self.push(&name, Dtype::F32, tensor, f32_bytes(tensor));
        }
        let (rows, columns) = tensor.size2().expect("a matrix has two dimensions");
        let (rows, columns) = (rows as usize, columns as usize);
        let (codes, scales) = fp8::encode_weight(&files::tensor_values(tensor), rows, columns);
        self.push(&name, Dtype::F8_E4M3, tensor, codes);
        self.tensors.push((
            format!("{prefix}.weight_scale_inv"),
            Dtype::F32,
            vec![rows.div_ceil(fp8::BLOCK), columns.div_ceil(fp8::BLOCK)],
            scales.iter().flat_map(|x| x.to_le_bytes()).collect(),
        ));
    }

    /// A matrix of an expert: MXFP4 in what ships.
    fn expert(&mut self, prefix: &str, tensor: &Tensor) -> Result<()> {
        let name = format!("{prefix}.weight");
        if self.form == Form::Master {
            self.push(&name, Dtype::F32, tensor, f32_bytes(tensor));
            return Ok(());
        }
        let size = tensor.size2().expect("a matrix has two dimensions");
        let (rows, columns) = (size.0 as usize, size.1 as usize);
        let seen = files::tensor_values(&crate::quant::mxfp4(tensor));
        let (mut codes, mut scales, mut decoded) = (Vec::new(), Vec::new(), Vec::new());
        for values in files::tensor_values(tensor).chunks_exact(mxfp4::BLOCK) {
            let block: &[f32; mxfp4::BLOCK] = values.try_into().expect("chunks are blocks");
            let (bytes, scale) = mxfp4::encode_block(block, ScaleRule::Ocp);
            let mut back = [0.0; mxfp4::BLOCK];
            mxfp4::decode_block(&bytes, scale, &mut back);
            decoded.extend(back);
            codes.extend(bytes);
            scales.push(scale);
        }
        if seen != decoded {
            let what = format!("`{name}`: encoded bytes decode to other values than training saw");
            return Err(Error::Invalid(what));
        }
        self.tensors
            .push((name, Dtype::U8, vec![rows, columns / 2], codes));
        let name = format!("{prefix}.weight_scale");
        self.tensors
            .push((name, Dtype::U8, vec![rows, columns / mxfp4::BLOCK], scales));
        Ok(())
    }
}

fn f32_bytes(tensor: &Tensor) -> Vec<u8> {
    files::tensor_bytes(&tensor.to_kind(tch::Kind::Float))
}

/// True when `net` computes with experts in MXFP4.
#[must_use]
pub fn experts_quantized(net: &Net) -> bool {
    net.params.groups[group::DOWN].quant == Quant::Mxfp4
}
