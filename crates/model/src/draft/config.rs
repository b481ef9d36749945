//! `config.json` of a drafter, both families: z-lab's (Qwen3 style) and Xiaomi's, and the check
//! against the target.
//!
//! Owns where a setting stands (`dflash_config` first, then beside it, as in the package `dflash`
//! 0.1.0) and its default. Refuses drafters of another target, and what the forward pass does not
//! compute: DFlash2's convolutions and selector, scaled embeddings, scaled or capped logits.

use std::path::Path;

use serde_json::Value;

use crate::TokenId;
use crate::config::{AttentionConfig, Config};
use crate::error::ModelError;
use crate::fields::{self, DIMENSION_MAX, Fields, LAYERS_MAX};

/// Largest block: the rows of a verify step.
pub const BLOCK_MAX: u64 = 64;
/// Block of a drafter that does not say, as in the package.
const BLOCK_DEFAULT: usize = 16;
const WINDOW_MAX: u64 = 1 << 31;

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
        let settings = Settings::new(fields)?;
        settings.refuse_unsupported()?;
        fits(fields, target)?;
        let hidden = target.hidden;
        let attention = attention(&settings, hidden)?;
        let block = match settings.get("block_size") {
            Some(_) => settings.number("block_size", 2, BLOCK_MAX)?,
            None => BLOCK_DEFAULT,
        };
        Ok(Self {
            block_size: block as u32,
            hidden,
            intermediate: fields.number("intermediate_size", 1, DIMENSION_MAX)?,
            eps: fields.float_or("rms_norm_eps", 1e-6)?,
            taps: taps(&settings, target)?,
            mask_token: mask_token(&settings, target)?,
            biases: fields.flag("attention_bias", false)?,
            context_rope_theta: options.context_rope_theta.unwrap_or(attention.rope_theta),
            attention,
            layers: windows(&settings)?,
        })
    }
}

fn mask_token(settings: &Settings<'_>, target: &Config) -> Result<TokenId, ModelError> {
    let mask = settings.number("mask_token_id", 0, DIMENSION_MAX)?;
    if mask >= target.vocab_size {
        let expected = format!("below the target's vocabulary of {}", target.vocab_size);
        return Err(settings.wrong("mask_token_id", &expected, &mask.to_string()));
    }
    Ok(mask as TokenId)
}

/// The fields of the file, and those of its object `dflash_config`, which win.
struct Settings<'a> {
    top: &'a Fields<'a>,
    own: Option<Fields<'a>>,
}

impl<'a> Settings<'a> {
    fn new(top: &'a Fields<'a>) -> Result<Self, ModelError> {
        let own = top.get("dflash_config").is_some();
        let own = own.then(|| top.object("dflash_config")).transpose()?;
        Ok(Self { top, own })
    }

    /// The object that has `name`, or should have it.
    fn place(&self, name: &str) -> &Fields<'a> {
        match &self.own {
            Some(own) if own.get(name).is_some() || self.top.get(name).is_none() => own,
            _ => self.top,
        }
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.place(name).get(name)
    }

    fn number(&self, name: &str, min: u64, max: u64) -> Result<usize, ModelError> {
        self.place(name).number(name, min, max)
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool, ModelError> {
        self.place(name).flag(name, default)
    }

    fn float_or(&self, name: &str, default: f32) -> Result<f32, ModelError> {
        self.place(name).float_or(name, default)
    }

    fn wrong(&self, name: &str, expected: &str, found: &str) -> ModelError {
        self.place(name).wrong(name, expected, found)
    }

    /// Settings that would change the arithmetic in a way this crate does not compute.
    fn refuse_unsupported(&self) -> Result<(), ModelError> {
        self.top.one_of("hidden_act", &["silu"])?;
        for name in ["conv_kernel_size", "conv_group_size", "selector_rank"] {
            if let Some(value) = self.get(name) {
                let expected = "a DFlash drafter, without it (DFlash2 is not supported)";
                return Err(self.wrong(name, expected, &value.to_string()));
            }
        }
        let neutral = [
            ("input_embedding_scale", 1.0),
            ("output_multiplier", 1.0),
            ("final_logit_softcapping", 0.0),
        ];
        for (name, neutral) in neutral {
            let found = self.float_or(name, neutral)?;
            if found != neutral {
                let expected = format!("nothing or {neutral:?}");
                return Err(self.wrong(name, &expected, &found.to_string()));
            }
        }
        self.top.absent("rope_scaling")
    }
}

/// That the sizes a drafter was made for are those of `target`.
fn fits(fields: &Fields<'_>, target: &Config) -> Result<(), ModelError> {
    let same = [
        ("hidden_size", target.hidden, "hidden size"),
        ("target_hidden_size", target.hidden, "hidden size"),
        ("num_target_layers", target.layers.len(), "layers"),
    ];
    for (name, wanted, what) in same {
        if name != "hidden_size" && fields.get(name).is_none() {
            continue;
        }
        let found = fields.number(name, 1, DIMENSION_MAX)?;
        if found != wanted {
            let expected = format!("{wanted}, the target's {what}");
            return Err(fields.wrong(name, &expected, &found.to_string()));
        }
    }
    // Releases give a vocabulary smaller than the target's: the padding is left out. A larger one
    // is another model's.
    match fields.get("vocab_size") {
        None => Ok(()),
        Some(_) => match fields.number("vocab_size", 1, DIMENSION_MAX)? {
            size if size <= target.vocab_size => Ok(()),
            size => {
                let expected = format!("at most {}, the target's vocabulary", target.vocab_size);
                Err(fields.wrong("vocab_size", &expected, &size.to_string()))
            }
        },
    }
}

fn attention(settings: &Settings<'_>, hidden: usize) -> Result<AttentionConfig, ModelError> {
    let fields = settings.top;
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
        sinks: settings.flag("attention_sink_bias", false)?,
        value_scale: settings.float_or("attention_value_scale", 1.0)?,
    })
}

fn taps(settings: &Settings<'_>, target: &Config) -> Result<Vec<usize>, ModelError> {
    let (name, layers) = ("target_layer_ids", target.layers.len());
    let taps = match settings.get(name) {
        Some(_) => settings.place(name).numbers(name)?,
        None => default_taps(layers, settings.number("num_hidden_layers", 1, LAYERS_MAX)?),
    };
    let ascending = taps.windows(2).all(|pair| pair[0] < pair[1]);
    match taps.last() {
        Some(&last) if ascending && last < layers => Ok(taps),
        _ => {
            let expected = format!("ascending layers below the target's {layers}");
            Err(settings.wrong(name, &expected, &format!("{taps:?}")))
        }
    }
}

/// `round(linspace(1, target - 3, draft))`, halves to even; the middle layer for one draft layer.
fn default_taps(target: usize, draft: usize) -> Vec<usize> {
    if draft == 1 {
        return vec![target / 2];
    }
    let span = target.saturating_sub(4) as f64;
    let tap = |i: usize| (1.0 + i as f64 * span / (draft - 1) as f64).round_ties_even() as usize;
    (0..draft).map(tap).collect()
}

fn windows(settings: &Settings<'_>) -> Result<Vec<DraftWindow>, ModelError> {
    let fields = settings.top;
    let layers = fields.number("num_hidden_layers", 1, LAYERS_MAX)?;
    if settings.flag("use_swa", false)? {
        let name = match settings.get("swa_window_size") {
            Some(_) => "swa_window_size",
            None => "sliding_window",
        };
        let window = settings.number(name, 1, WINDOW_MAX)?;
        return Ok(vec![DraftWindow::Symmetric(window); layers]);
    }
    let types = fields.texts("layer_types")?;
    let types = types.unwrap_or_else(|| vec!["full_attention".to_owned(); layers]);
    if types.len() != layers {
        let expected = format!("{layers} entries, one a layer");
        return Err(fields.wrong("layer_types", &expected, &types.len().to_string()));
    }
    types.iter().map(|kind| window(fields, kind)).collect()
}

/// What a layer of type `kind` sees. Without `is_causal`, sliding layers are causal and full ones
/// are not.
fn window(fields: &Fields<'_>, kind: &str) -> Result<DraftWindow, ModelError> {
    let explicit = fields.get("is_causal").is_some();
    let causal = fields.flag("is_causal", true)?;
    match kind {
        "full_attention" if explicit && causal => {
            Err(fields.wrong("is_causal", "false, or no full layers", "true"))
        }
        "full_attention" => Ok(DraftWindow::Full),
        "sliding_attention" if !fields.flag("use_sliding_window", false)? => {
            let expected = "true, as `layer_types` has sliding layers";
            Err(fields.wrong("use_sliding_window", expected, "nothing or false"))
        }
        "sliding_attention" => {
            let window = fields.number("sliding_window", 1, WINDOW_MAX)?;
            Ok(match causal {
                true => DraftWindow::Causal(window),
                false => DraftWindow::Symmetric(window),
            })
        }
        other => {
            let expected = "full_attention or sliding_attention";
            Err(fields.wrong("layer_types", expected, &format!("{other:?}")))
        }
    }
}
