//! `config.json` of a drafter, both families: z-lab's (Qwen3 style) and Xiaomi's, and the check
//! against the target. Its `vocab_size` is ignored: embedding and lm_head are the target's.

use std::path::Path;

use crate::TokenId;
use crate::config::{AttentionConfig, Config};
use crate::error::ModelError;
use crate::fields::{self, DIMENSION_MAX, Fields, LAYERS_MAX};

/// Largest block: the rows of a verify step.
pub const BLOCK_MAX: u64 = 64;

/// A drafter's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct DraftConfig {
    /// Rows of a block, the anchor included.
    pub block_size: u32,
    /// Width of the residual stream; the target's.
    pub hidden: usize,
    /// Inner width of the SwiGLU.
    pub intermediate: usize,
    /// Epsilon of every RMSNorm.
    pub eps: f32,
    /// Target layers whose output is the context, ascending.
    pub taps: Vec<usize>,
    /// Fills the block after the anchor.
    pub mask_token: TokenId,
    /// Biases on q, k, v and o.
    pub biases: bool,
    /// Heads, dimensions, rotary base, sinks and value scale, alike in all layers; `window` is not
    /// used here.
    pub attention: AttentionConfig,
    /// Rotary base of the context's keys; `attention.rope_theta` everywhere else.
    pub context_rope_theta: f32,
    /// What each layer sees.
    pub layers: Vec<DraftWindow>,
}

/// What a draft layer's block rows see, besides the limits of the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DraftWindow {
    /// All of the context and the block.
    Full,
    /// Keys before and at the query's position, nearer than this: z-lab's sliding layers without
    /// `is_causal`.
    Causal(usize),
    /// Keys nearer than this on both sides: DFlash2's and MiMo's.
    Symmetric(usize),
}

impl DraftWindow {
    /// True when the row at `query` sees the key at `key`.
    #[must_use]
    pub fn sees(self, query: usize, key: usize) -> bool {
        match self {
            Self::Full => true,
            Self::Causal(window) => key <= query && query - key < window,
            Self::Symmetric(window) => query.abs_diff(key) < window,
        }
    }
}

/// Open questions of the released drafters (dflash.md C.3 and F), with the defaults of the public
/// serving engines.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DraftOptions {
    /// Rotary base of the context's keys; default the drafter's `rope_theta` (one port uses
    /// `backbone_rotary_base`).
    pub context_rope_theta: Option<f32>,
}

impl DraftConfig {
    /// Reads `config.json` in `dir` and checks it against `target`.
    ///
    /// # Errors
    /// [`ModelError::Field`] with what was expected and found.
    pub fn load(dir: &Path, target: &Config, options: DraftOptions) -> Result<Self, ModelError> {
        fields::read(&dir.join("config.json"), |fields| {
            Self::resolve(fields, target, options)
        })
    }

    /// Parses the text of a drafter's `config.json`.
    ///
    /// # Errors
    /// As [`DraftConfig::load`].
    pub fn from_json(
        text: &str,
        target: &Config,
        options: DraftOptions,
    ) -> Result<Self, ModelError> {
        fields::parse(Path::new("config.json"), text, |fields| {
            Self::resolve(fields, target, options)
        })
    }

    fn resolve(
        fields: &Fields<'_>,
        target: &Config,
        options: DraftOptions,
    ) -> Result<Self, ModelError> {
        fields.one_of("hidden_act", &["silu"])?;
        fields.absent("rope_scaling")?;
        let dflash = fields.object("dflash_config")?;
        let hidden = fields.number("hidden_size", 1, DIMENSION_MAX)?;
        for name in ["hidden_size", "target_hidden_size"] {
            let found = fields.number_or(name, target.hidden)?;
            if found != target.hidden {
                let expected = format!("{}, the target's hidden size", target.hidden);
                return Err(fields.wrong(name, &expected, &found.to_string()));
            }
        }
        let attention = attention(fields, &dflash, hidden)?;
        let block = match fields.get("block_size") {
            Some(_) => fields.number("block_size", 2, BLOCK_MAX)?,
            None => dflash.number("block_size", 2, BLOCK_MAX)?,
        };
        let mask = dflash.number("mask_token_id", 0, DIMENSION_MAX)?;
        if mask >= target.vocab_size {
            let expected = format!("below the target's vocabulary of {}", target.vocab_size);
            return Err(dflash.wrong("mask_token_id", &expected, &mask.to_string()));
        }
        Ok(Self {
            block_size: block as u32,
            hidden,
            intermediate: fields.number("intermediate_size", 1, DIMENSION_MAX)?,
            eps: fields.float_or("rms_norm_eps", 1e-6)?,
            taps: taps(fields, &dflash, target)?,
            mask_token: mask as TokenId,
            biases: fields.flag("attention_bias", false)?,
            context_rope_theta: options.context_rope_theta.unwrap_or(attention.rope_theta),
            attention,
            layers: windows(fields, &dflash)?,
        })
    }
}

fn attention(
    fields: &Fields<'_>,
    dflash: &Fields<'_>,
    hidden: usize,
) -> Result<AttentionConfig, ModelError> {
    let heads = fields.number("num_attention_heads", 1, DIMENSION_MAX)?;
    let kv_heads = fields.number_or("num_key_value_heads", heads)?;
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of the {heads} query heads");
        return Err(fields.wrong("num_key_value_heads", &expected, &kv_heads.to_string()));
    }
    let qk_dim = fields.number_or("head_dim", (hidden / heads).max(1))?;
    Ok(AttentionConfig {
        heads,
        kv_heads,
        qk_dim,
        v_dim: fields.number_or("v_head_dim", qk_dim)?,
        rope_dims: fields.rope_dims(qk_dim)?,
        rope_theta: fields.theta("rope_theta", 10_000.0)?,
        window: None,
        sinks: dflash.flag("attention_sink_bias", false)?,
        value_scale: dflash.float_or("attention_value_scale", 1.0)?,
    })
}

fn taps(
    fields: &Fields<'_>,
    dflash: &Fields<'_>,
    target: &Config,
) -> Result<Vec<usize>, ModelError> {
    let layers = target.layers.len();
    if fields.get("num_target_layers").is_some() {
        let count = fields.number("num_target_layers", 1, LAYERS_MAX)?;
        if count != layers {
            let expected = format!("{layers}, the target's layers");
            return Err(fields.wrong("num_target_layers", &expected, &count.to_string()));
        }
    }
    let taps = dflash.numbers("target_layer_ids")?;
    let ascending = taps.windows(2).all(|pair| pair[0] < pair[1]);
    match taps.last() {
        Some(&last) if ascending && last < layers => Ok(taps),
        _ => {
            let expected = format!("ascending layers below the target's {layers}");
            Err(dflash.wrong("target_layer_ids", &expected, &format!("{taps:?}")))
        }
    }
}

fn windows(fields: &Fields<'_>, dflash: &Fields<'_>) -> Result<Vec<DraftWindow>, ModelError> {
    let layers = fields.number("num_hidden_layers", 1, LAYERS_MAX)?;
    if dflash.flag("use_swa", false)? {
        let window = match dflash.get("swa_window_size") {
            Some(_) => dflash.number("swa_window_size", 1, 1 << 31)?,
            None => fields.number("sliding_window", 1, 1 << 31)?,
        };
        return Ok(vec![DraftWindow::Symmetric(window); layers]);
    }
    let Some(types) = fields.texts("layer_types")? else {
        return Ok(vec![DraftWindow::Full; layers]);
    };
    if types.len() != layers {
        let expected = format!("{layers} entries, one a layer");
        return Err(fields.wrong("layer_types", &expected, &types.len().to_string()));
    }
    let causal = fields.flag("is_causal", true)?;
    types
        .iter()
        .map(|kind| match (kind.as_str(), causal) {
            ("full_attention", _) => Ok(DraftWindow::Full),
            ("sliding_attention", true) => Ok(DraftWindow::Causal(fields.number(
                "sliding_window",
                1,
                1 << 31,
            )?)),
            ("sliding_attention", false) => Ok(DraftWindow::Symmetric(fields.number(
                "sliding_window",
                1,
                1 << 31,
            )?)),
            (other, _) => {
                let expected = "full_attention or sliding_attention";
                Err(fields.wrong("layer_types", expected, other))
            }
        })
        .collect()
}
