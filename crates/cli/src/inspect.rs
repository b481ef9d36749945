//! `kilotok inspect`: what a checkpoint holds and what a token costs; also for a config.json alone,
//! where the formats are those its quantization_config states.
//!
//! Invariant: the same accounting for both, so a plan made from a config holds for its checkpoint.

use std::path::Path;

use anyhow::Result;
use model::config::{AttentionConfig, FfnConfig};
use model::weights::{Encoding, FfnWeights, LayerWeights, Matrix, SwigluWeights};
use model::{Checkpoint, Config, Weights};
use serde_json::{Value, json};

use crate::args::InspectArgs;
use crate::report::bytes;
use crate::{model_dir, output};

mod planned;

/// Tensors of one kind and format.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Module {
    name: &'static str,
    format: &'static str,
    matrices: u64,
    parameters: u64,
    bytes: u64,
    /// Bytes a token reads when it is alone in its step.
    active_bytes: u64,
}

/// The account of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Account {
    modules: Vec<Module>,
}

impl Account {
    /// Counts a matrix of which a token reads `active` of `of` parts.
    fn add(&mut self, name: &'static str, matrix: &Size, active: u64, of: u64) {
        let format = format_name(matrix.encoding);
        let same = |module: &&mut Module| module.name == name && module.format == format;
        let module = match self.modules.iter_mut().find(same) {
            Some(module) => module,
            None => {
                self.modules.push(Module {
                    name,
                    format,
                    matrices: 0,
                    parameters: 0,
                    bytes: 0,
                    active_bytes: 0,
                });
                let last = self.modules.len() - 1;
                &mut self.modules[last]
            }
        };
        module.matrices += 1;
        module.parameters += matrix.parameters;
        module.bytes += matrix.bytes;
        module.active_bytes += matrix.bytes * active / of;
    }

    fn total(&self, of: impl Fn(&Module) -> u64) -> u64 {
        self.modules.iter().map(of).sum()
    }

    /// Bytes that a token alone in its step reads.
    pub(crate) fn active_bytes(&self) -> u64 {
        self.total(|module| module.active_bytes)
    }

    /// Of a loaded checkpoint.
    pub(crate) fn of_weights(config: &Config, weights: &Weights<'_>) -> Self {
        let mut account = Self::default();
        // A tied embedding is stored once and read whole as lm_head.
        if config.tie_word_embeddings {
            account.add("embedding", &size(&weights.embed), 1, 1);
        } else {
            account.add(
                "embedding",
                &size(&weights.embed),
                1,
                weights.embed.rows as u64,
            );
            account.add("lm_head", &size(&weights.lm_head), 1, 1);
        }
        account.add("norms", &vector(weights.norm.len()), 1, 1);
        for (layer, config) in weights.layers.iter().zip(&config.layers) {
            account.layer(layer, &config.ffn);
        }
        account
    }

    fn layer(&mut self, layer: &LayerWeights<'_>, ffn: &FfnConfig) {
        for matrix in [&layer.q, &layer.k, &layer.v] {
            self.add("attention q, k, v", &size(matrix), 1, 1);
        }
        self.add("attention output", &size(&layer.o), 1, 1);
        self.add(
            "norms",
            &vector(layer.input_norm.len() + layer.post_norm.len()),
            1,
            1,
        );
        if let Some(sinks) = &layer.sinks {
            self.add("sinks", &vector(sinks.len()), 1, 1);
        }
        match (&layer.ffn, ffn) {
            (
                FfnWeights::Moe {
                    router,
                    correction_bias,
                    experts,
                },
                FfnConfig::Moe(moe),
            ) => {
                self.add("router", &size(router), 1, 1);
                self.add("router", &vector(correction_bias.len()), 1, 1);
                for expert in experts {
                    self.swiglu("experts", expert, moe.active as u64, moe.experts as u64);
                }
            }
            (FfnWeights::Dense(swiglu), _) => self.swiglu("dense FFN", swiglu, 1, 1),
            (FfnWeights::Moe { experts, .. }, FfnConfig::Dense { .. }) => {
                experts
                    .iter()
                    .for_each(|expert| self.swiglu("experts", expert, 1, 1));
            }
        }
    }

    fn swiglu(&mut self, name: &'static str, swiglu: &SwigluWeights<'_>, active: u64, of: u64) {
        for matrix in [&swiglu.gate, &swiglu.up, &swiglu.down] {
            self.add(name, &size(matrix), active, of);
        }
    }
}

/// A matrix without its data.
struct Size {
    encoding: Encoding,
    parameters: u64,
    bytes: u64,
}

fn size(matrix: &Matrix<'_>) -> Size {
    Size {
        encoding: matrix.encoding(),
        parameters: (matrix.rows * matrix.cols) as u64,
        bytes: matrix.bytes() as u64,
    }
}

/// A small vector, which every backend keeps as f32.
fn vector(len: usize) -> Size {
    Size {
        encoding: Encoding::F32,
        parameters: len as u64,
        bytes: len as u64 * 4,
    }
}

fn format_name(encoding: Encoding) -> &'static str {
    match encoding {
        Encoding::F32 => "F32",
        Encoding::Bf16 => "BF16",
        Encoding::Fp8 => "FP8 E4M3",
        Encoding::Mxfp4 => "MXFP4",
    }
}

/// Runs the command.
pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let (account, config, stored) = match &args.model {
        Some(path) if path.is_file() => {
            let (config, account) = planned::read(path)?;
            (account, config, None)
        }
        given => open(&model_dir::resolve(given.as_deref())?)?,
    };
    if args.json {
        output::json(&to_json(&account, &config, stored))
    } else {
        print(&account, &config, stored)
    }
}

fn open(dir: &Path) -> Result<(Account, Config, Option<u64>)> {
    let config = Config::load(dir)?;
    if !dir.join("model.safetensors.index.json").exists() && !dir.join("model.safetensors").exists()
    {
        let (config, account) = planned::read(&dir.join("config.json"))?;
        return Ok((account, config, None));
    }
    let checkpoint = Checkpoint::open(dir)?;
    let weights = Weights::new(&config, &checkpoint)?;
    Ok((
        Account::of_weights(&config, &weights),
        config,
        Some(checkpoint.bytes()),
    ))
}

/// Keys and values in BF16: bytes for each token of the context, and bytes a sequence has besides.
pub(crate) fn kv_bytes(config: &Config) -> (u64, u64) {
    let row = |a: &AttentionConfig| (a.kv_heads * (a.qk_dim + a.v_dim) * 2) as u64;
    let (mut token, mut sequence) = (0, 0);
    for layer in &config.layers {
        match layer.attention.window {
            None => token += row(&layer.attention),
            Some(window) => sequence += row(&layer.attention) * (window as u64 + 1),
        }
    }
    (token, sequence)
}

fn summary(config: &Config) -> String {
    let sliding = config
        .layers
        .iter()
        .filter(|layer| layer.attention.window.is_some())
        .count();
    let routed = config.layers.iter().find_map(|layer| match &layer.ffn {
        FfnConfig::Moe(moe) => Some(format!("{} experts, {} active", moe.experts, moe.active)),
        FfnConfig::Dense { .. } => None,
    });
    format!(
        "{}: {} layers ({} full, {sliding} sliding attention), hidden {}, {}, vocabulary {}, context {}",
        config.model_type,
        config.layers.len(),
        config.layers.len() - sliding,
        config.hidden,
        routed.unwrap_or_else(|| "dense".to_owned()),
        config.vocab_size,
        config.context_tokens
    )
}

fn print(account: &Account, config: &Config, stored: Option<u64>) -> Result<()> {
    let mut text = summary(config) + "\n\n";
    text += &format!(
        "{:<18} {:<9} {:>8} {:>15} {:>10} {:>13}\n",
        "module", "format", "tensors", "parameters", "bytes", "active/token"
    );
    let mut row =
        |name: &str, format: &str, matrices: u64, parameters: u64, size: u64, active: u64| {
            text += &format!(
                "{name:<18} {format:<9} {matrices:>8} {parameters:>15} {:>10} {:>13}\n",
                bytes(size),
                bytes(active)
            );
        };
    for m in &account.modules {
        row(
            m.name,
            m.format,
            m.matrices,
            m.parameters,
            m.bytes,
            m.active_bytes,
        );
    }
    let total = account.total(|m| m.bytes);
    row(
        "total",
        "",
        account.total(|m| m.matrices),
        account.total(|m| m.parameters),
        total,
        account.active_bytes(),
    );
    let (token, sequence) = kv_bytes(config);
    text += &format!(
        "\nKV cache in BF16: {} a token, and {} a sequence for sliding layers\n",
        bytes(token),
        bytes(sequence)
    );
    match stored {
        Some(stored) => text += &format!("checkpoint: {} of tensors\n", bytes(stored)),
        None => text += "from the config alone: formats as its quantization_config states them\n",
    }
    output::write(text.as_bytes())
}

fn to_json(account: &Account, config: &Config, stored: Option<u64>) -> Value {
    let modules: Vec<Value> = account
        .modules
        .iter()
        .map(|m| {
            json!({"module": m.name, "format": m.format, "tensors": m.matrices, "parameters": m.parameters,
                   "bytes": m.bytes, "active_bytes": m.active_bytes})
        })
        .collect();
    let (token, sequence) = kv_bytes(config);
    json!({
        "model_type": config.model_type,
        "layers": config.layers.len(),
        "hidden_size": config.hidden,
        "vocab_size": config.vocab_size,
        "context_tokens": config.context_tokens,
        "modules": modules,
        "parameters": account.total(|m| m.parameters),
        "bytes": account.total(|m| m.bytes),
        "active_bytes_per_token": account.active_bytes(),
        "kv_bytes_per_token": token,
        "kv_bytes_per_sequence": sequence,
        "checkpoint_bytes": stored,
    })
}
