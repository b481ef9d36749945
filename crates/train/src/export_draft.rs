//! Writes a drafter in the released layout: config.json, model.safetensors, mask_embedding.pt.
//!
//! The last is a torch archive that holds one BF16 row: a zip with a fixed pickle and the raw bytes.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use formats::bf16;
use serde_json::{Value, json};
use zip::write::SimpleFileOptions;

use crate::drafter::{Drafter, group};
use crate::error::{Error, Result};
use crate::export::{Form, Writer};
use crate::files;
use crate::params::Quant;

/// Writes the drafter into `directory`.
pub fn write(drafter: &Drafter, directory: &Path, gamma: f64, anchors: usize) -> Result<()> {
    let fp8 = drafter.params.groups[group::DOWN].quant != Quant::None;
    let mut out = Writer {
        form: Form::Quantized,
        tensors: Vec::new(),
    };
    tensors(drafter, &mut out, fp8);
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    files::write_stored(
        &directory.join("model.safetensors"),
        &out.tensors,
        &metadata,
    )?;
    files::write_json(
        &directory.join("config.json"),
        &config(drafter, gamma, anchors, fp8),
    )?;
    let mask = files::tensor_values(&drafter.params.groups[group::MASK].master.get(0));
    let row: Vec<u8> = mask
        .iter()
        .flat_map(|&x| bf16::encode(x).to_le_bytes())
        .collect();
    let bytes = archive(&row, drafter.plan.mask_token)
        .map_err(|e| Error::Invalid(format!("mask_embedding.pt: {e}")))?;
    files::write(&directory.join("mask_embedding.pt"), &bytes)
}

fn tensors(drafter: &Drafter, out: &mut Writer, fp8: bool) {
    let at = |group: usize, i: i64| drafter.params.groups[group].master.get(i);
    let target = &drafter.target;
    let matrix = |out: &mut Writer, name: String, t: &tch::Tensor| {
        if fp8 {
            out.matrix(&name, t)
        } else {
            out.plain(&format!("{name}.weight"), t)
        }
    };
    matrix(out, "fc".into(), &at(group::FC, 0));
    out.plain("hidden_norm.weight", &at(group::HIDDEN_NORM, 0));
    out.plain("norm.weight", &at(group::NORM, 0));
    for layer in 0..drafter.plan.layers {
        let prefix = format!("layers.{layer}");
        let attn = format!("{prefix}.self_attn");
        out.plain(
            &format!("{prefix}.input_layernorm.weight"),
            &at(group::NORM_IN, layer),
        );
        out.plain(
            &format!("{prefix}.post_attention_layernorm.weight"),
            &at(group::NORM_POST, layer),
        );
        matrix(out, format!("{attn}.q_proj"), &at(group::Q, layer));
        let kv = target.kv_heads * target.head_dim;
        matrix(
            out,
            format!("{attn}.k_proj"),
            &at(group::KV, layer).narrow(0, 0, kv),
        );
        matrix(
            out,
            format!("{attn}.v_proj"),
            &at(group::KV, layer).narrow(0, kv, kv),
        );
        matrix(out, format!("{attn}.o_proj"), &at(group::OUT, layer));
        out.plain(&format!("{attn}.q_norm.weight"), &at(group::Q_NORM, layer));
        out.plain(&format!("{attn}.k_norm.weight"), &at(group::K_NORM, layer));
        if drafter.plan.sinks {
            out.plain(
                &format!("{attn}.attention_sink_bias"),
                &at(group::SINK, layer),
            );
        }
        let (gate_up, f) = (at(group::GATE_UP, layer), drafter.plan.ffn);
        matrix(
            out,
            format!("{prefix}.mlp.gate_proj"),
            &gate_up.narrow(0, 0, f),
        );
        matrix(
            out,
            format!("{prefix}.mlp.up_proj"),
            &gate_up.narrow(0, f, f),
        );
        matrix(
            out,
            format!("{prefix}.mlp.down_proj"),
            &at(group::DOWN, layer),
        );
    }
}

fn config(drafter: &Drafter, gamma: f64, anchors: usize, fp8: bool) -> Value {
    let (plan, target) = (&drafter.plan, &drafter.target);
    let mut config = json!({
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "hidden_size": target.hidden,
        "intermediate_size": plan.ffn,
        "num_hidden_layers": plan.layers,
        "num_attention_heads": target.heads,
        "num_key_value_heads": target.kv_heads,
        "head_dim": target.head_dim,
        "v_head_dim": target.head_dim,
        "partial_rotary_factor": 1.0,
        "block_size": plan.block,
        "num_target_layers": target.layers,
        "vocab_size": target.vocab,
        "max_position_embeddings": target.context,
        "rope_theta": plan.theta,
        "sliding_window": plan.window,
        "rms_norm_eps": target.eps,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": false,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": false,
        "use_cache": true,
        "dflash_config": {
            "target_layer_ids": plan.taps,
            "mask_token_id": plan.mask_token,
            "num_anchors": anchors,
            "block_size": plan.block,
            "loss_decay_gamma": gamma,
            "use_swa": true,
            "swa_window_size": plan.window,
            "attention_value_scale": 1.0,
            "attention_sink_bias": plan.sinks,
        },
    });
    if fp8 {
        config["quantization_config"] = json!({"quant_method": "fp8", "fmt": "e4m3",
            "activation_scheme": "dynamic", "weight_block_size": [128, 128], "ignored_layers": []});
    }
    config
}

/// A `torch.save` archive of `{"mask_token_id": id, "embedding": row}`.
fn archive(row: &[u8], id: i64) -> std::result::Result<Vec<u8>, Box<dyn std::error::Error>> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let plain = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [
        ("data.pkl", pickle(row.len() / 2, id)),
        ("byteorder", b"little".to_vec()),
        ("data/0", row.to_vec()),
        ("version", b"3\n".to_vec()),
    ] {
        zip.start_file(format!("mask_embedding/{name}"), plain)?;
        zip.write_all(&bytes)?;
    }
    Ok(zip.finish()?.into_inner())
}

/// Protocol 2, by hand: the dictionary with one `torch._utils._rebuild_tensor_v2`.
fn pickle(count: usize, id: i64) -> Vec<u8> {
    let mut out = vec![0x80, 2];
    let text = |out: &mut Vec<u8>, s: &str| {
        out.push(b'X');
        out.extend((s.len() as u32).to_le_bytes());
        out.extend(s.as_bytes());
    };
    let int = |out: &mut Vec<u8>, x: u32| {
        out.push(b'J');
        out.extend(x.to_le_bytes());
    };
    out.extend(b"}("); // empty dictionary, mark
    text(&mut out, "mask_token_id");
    int(&mut out, id as u32);
    text(&mut out, "embedding");
    out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text(&mut out, "storage");
    out.extend(b"ctorch\nBFloat16Storage\n");
    text(&mut out, "0");
    text(&mut out, "cpu");
    int(&mut out, count as u32);
    out.extend(b"tQ"); // the tuple names a stored object
    int(&mut out, 0);
    int(&mut out, count as u32);
    out.extend(b"\x85"); // shape
    int(&mut out, 1);
    out.extend(b"\x85\x89ccollections\nOrderedDict\n)R"); // strides, requires_grad, hooks
    out.extend(b"tRu."); // arguments, call, set items, stop
    out
}
