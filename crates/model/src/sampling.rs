//! How the next token is chosen, as data. The arithmetic is in `reference::sample` (one row of
//! logits to a distribution) and `reference::accept` (a verify block to accepted tokens).

use crate::TokenId;

/// Which tokens the drafter proposes at temperature above 0. Both are exact: the output has the
/// target's distribution either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DraftSampling {
    /// The drafter's most probable tokens (one-hot q).
    #[default]
    Greedy,
    /// Tokens drawn from the drafter's distribution after the same temperature and truncation.
    Sampled,
}

/// Parameters of the distribution a token is drawn from. [`Default`] is greedy.
///
/// Order of application, as in vLLM: logit bias, repetition, presence and frequency penalties,
/// forbidden tokens and grammar mask, temperature, then top-k, top-p and min-p on the resulting
/// distribution, then renormalisation.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy: the largest logit, the lowest id among equals.
    pub temperature: f32,
    /// Keep the `k` most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most probable tokens that holds this much probability; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this share of the most probable one; 0 drops none.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from tokens already in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from tokens in the output, once for each time; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Tokens forbidden while fewer than `min_tokens` have been generated: the stop ids.
    pub forbidden_until_min: Vec<TokenId>,
    /// See `forbidden_until_min`.
    pub min_tokens: u32,
    /// Key of the counter-based generator: same seed and request, same tokens, whatever else runs.
    pub seed: u64,
    /// How drafts are proposed at temperature above 0.
    pub draft_sampling: DraftSampling,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            forbidden_until_min: Vec::new(),
            min_tokens: 0,
            seed: 0,
            draft_sampling: DraftSampling::Greedy,
        }
    }
}
