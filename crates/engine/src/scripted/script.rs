//! What a scripted decoder says, what its drafter proposes, and how long it takes: pure data.

use model::TokenId;
use model::decoder::Limits;
use std::sync::Arc;
use std::time::Duration;

/// Next token as a function of all tokens so far.
pub type NextToken = Arc<dyn Fn(&[TokenId]) -> TokenId + Send + Sync>;
/// Fills the logits `[vocab_size]` of the token after those so far.
pub type NextLogits = Arc<dyn Fn(&[TokenId], &mut [f32]) + Send + Sync>;

/// What the decoder says.
#[derive(Clone)]
pub enum Script {
    /// These tokens, over and over, from the end of the prompt on.
    Answer(Arc<[TokenId]>),
    /// One certain token.
    Token(NextToken),
    /// A distribution.
    Logits(NextLogits),
}

impl Script {
    /// The bytes of `text` as tokens, over and over, from the end of the prompt on.
    #[must_use]
    pub fn text(text: &str) -> Self {
        Self::Answer(text.bytes().map(TokenId::from).collect())
    }

    /// Pseudo-random logits that depend on the last two tokens only.
    #[must_use]
    pub fn random(seed: u64, spread: f32) -> Self {
        use model::random::{Purpose, uniform};
        Self::Logits(Arc::new(move |tokens, logits| {
            let last = |n: usize| tokens.iter().rev().nth(n).copied().unwrap_or_default();
            let key = seed ^ u64::from(last(0)) << 20 ^ u64::from(last(1)) << 42;
            for (i, logit) in (0..).zip(logits) {
                *logit = (uniform(key, i, Purpose::Sample) as f32 - 0.5) * spread;
            }
        }))
    }
}

/// What the drafter proposes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Drafter {
    /// The script's most probable tokens: always accepted by greedy requests.
    Right,
    /// Never what the script says.
    Wrong,
    /// Right with this probability at each slot, by a counter-based generator.
    Sometimes(f64),
    /// The script's own logits, disturbed: drafts are drawn from them when the request asks.
    Near,
}

/// Limits and times.
#[derive(Clone, Debug, PartialEq)]
pub struct ScriptedOptions {
    /// What [`model::Decoder::limits`] says.
    pub limits: Limits,
    /// The drafter; `limits.width_max` is 1 without one.
    pub drafter: Drafter,
    /// Positions a sliding layer keeps; `None` forks and rewinds anywhere.
    pub window: Option<u32>,
    /// A step takes this long,
    pub step_time: Duration,
    /// and so much longer for each row after the first.
    pub row_time: Duration,
    /// Share of a step with drafts that is reported as drafting.
    pub draft_share: f64,
    /// Prefill of a token takes this long.
    pub prefill_time: Duration,
    /// The step with this number, counted from 0, faults.
    pub fault_at: Option<u64>,
}

impl Default for ScriptedOptions {
    fn default() -> Self {
        Self {
            limits: Limits {
                vocab_size: 512,
                context_tokens: 8192,
                sequences_max: 64,
                width_max: 8,
                page_tokens: 16,
                pages: 16 * 1024,
            },
            drafter: Drafter::Right,
            window: None,
            step_time: Duration::ZERO,
            row_time: Duration::ZERO,
            draft_share: 0.2,
            prefill_time: Duration::ZERO,
            fault_at: None,
        }
    }
}
