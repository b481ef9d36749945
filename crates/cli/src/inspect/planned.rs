//! The account of a model from its config.json alone.

use std::path::Path;

use anyhow::{Context, Result};
use model::Config;
use model::config::{FfnConfig, LayerConfig, MoeConfig};
use model::weights::Encoding;
use serde_json::Value;

use super::{Account, Size, vector};
use crate::model_dir;

/// Formats that a quantization_config states.
struct Formats {
    /// Attention and dense FFN.
    linear: Encoding,
    output: Encoding,
    experts: Encoding,
    router: Encoding,
}

/// Reads a config.json and counts what its checkpoint would hold.
pub(super) fn read(path: &Path) -> Result<(Config, Account)> {
    let text = model_dir::read_config(path)?;
    let config = Config::from_json(&text).with_context(|| path.display().to_string())?;
    let raw: Value = serde_json::from_str(&text)?;
    let formats = formats(&raw);
    let mut account = Account::default();
    let head = matrix(Encoding::Bf16, config.vocab_size, config.hidden);
    if config.tie_word_embeddings {
        account.add("embedding", &head, 1, 1);
    } else {
        account.add("embedding", &head, 1, config.vocab_size as u64);
        account.add("lm_head", &head, 1, 1);
    }
    account.add("norms", &vector(config.hidden), 1, 1);
    for layer in &config.layers {
        add_layer(&mut account, &formats, layer, config.hidden);
    }
    Ok((config, account))
}

fn formats(raw: &Value) -> Formats {
    let quantization = &raw["quantization_config"];
    let either = |condition: bool, yes, no| if condition { yes } else { no };
    let fp8 = quantization["quant_method"] == "fp8";
    let linear = either(fp8, Encoding::Fp8, Encoding::Bf16);
    let ignored = quantization["ignored_layers"].as_array();
    let is_output = |name: &Value| name.as_str().is_some_and(|name| name.ends_with("o_proj"));
    let output_ignored = ignored.is_some_and(|names| names.iter().any(is_output));
    let mxfp4 = quantization["store_dtype"] == "mxfp4";
    let short_router = raw["moe_router_dtype"] == "bfloat16";
    Formats {
        linear,
        output: either(output_ignored, Encoding::Bf16, linear),
        experts: either(mxfp4, Encoding::Mxfp4, linear),
        router: either(short_router, Encoding::Bf16, Encoding::F32),
    }
}

fn add_layer(account: &mut Account, formats: &Formats, layer: &LayerConfig, hidden: usize) {
    let a = &layer.attention;
    for rows in [
        a.heads * a.qk_dim,
        a.kv_heads * a.qk_dim,
        a.kv_heads * a.v_dim,
    ] {
        account.add(
            "attention q, k, v",
            &matrix(formats.linear, rows, hidden),
            1,
            1,
        );
    }
    account.add(
        "attention output",
        &matrix(formats.output, hidden, a.heads * a.v_dim),
        1,
        1,
    );
    account.add("norms", &vector(2 * hidden), 1, 1);
    if a.sinks {
        account.add("sinks", &vector(a.heads), 1, 1);
    }
    match &layer.ffn {
        FfnConfig::Dense { intermediate } => {
            add_swiglu(
                account,
                "dense FFN",
                formats.linear,
                *intermediate,
                hidden,
                (1, 1),
            );
        }
        FfnConfig::Moe(moe) => add_moe(account, formats, moe, hidden),
    }
}

fn add_moe(account: &mut Account, formats: &Formats, moe: &MoeConfig, hidden: usize) {
    account.add("router", &matrix(formats.router, moe.experts, hidden), 1, 1);
    account.add("router", &vector(moe.experts), 1, 1);
    for _ in 0..moe.experts {
        let share = (moe.active as u64, moe.experts as u64);
        add_swiglu(
            account,
            "experts",
            formats.experts,
            moe.intermediate,
            hidden,
            share,
        );
    }
}

fn add_swiglu(
    account: &mut Account,
    name: &'static str,
    encoding: Encoding,
    intermediate: usize,
    hidden: usize,
    (active, of): (u64, u64),
) {
    for (rows, columns) in [
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    ] {
        account.add(name, &matrix(encoding, rows, columns), active, of);
    }
}

/// Codes and scales of a `[rows, columns]` matrix.
fn matrix(encoding: Encoding, rows: usize, columns: usize) -> Size {
    let elements = (rows * columns) as u64;
    let bytes = match encoding {
        Encoding::F32 => elements * 4,
        Encoding::Bf16 => elements * 2,
        Encoding::Fp8 => elements + (rows.div_ceil(128) * columns.div_ceil(128) * 4) as u64,
        Encoding::Mxfp4 => elements / 2 + elements / 32,
    };
    Size {
        encoding,
        parameters: elements,
        bytes,
    }
}
