//! Drafts from anywhere: what tests and benchmarks put in a drafter's place.
//!
//! Verification has to be exact whatever is drafted, so its tests bring drafts that are always
//! right, always wrong or random, on every backend.

use crate::TokenId;

/// Stands in for a drafter.
pub trait DraftSource: Send {
    /// Appends up to `count` tokens to `drafts`, which are to follow `tokens`: all tokens of the
    /// sequence, the anchor last.
    fn propose(&mut self, tokens: &[TokenId], count: usize, drafts: &mut Vec<TokenId>);
}

/// Continues the sequence like the known text that goes on longest.
#[derive(Clone, Debug)]
pub struct Replay {
    /// Tokens of the prompt, and the whole text, prompt and answer.
    pub texts: Vec<(usize, Vec<TokenId>)>,
    /// Added to every token, modulo `vocab_size`: 0 is always right, 1 always wrong.
    pub shift: TokenId,
    /// Size of the vocabulary.
    pub vocab_size: u32,
}

impl DraftSource for Replay {
    fn propose(&mut self, tokens: &[TokenId], count: usize, drafts: &mut Vec<TokenId>) {
        let known = self
            .texts
            .iter()
            .filter(|(prompt, text)| *prompt <= tokens.len() && text.starts_with(tokens));
        let longest = known.max_by_key(|(_, text)| text.len());
        let rest = longest.map_or(&[][..], |(_, text)| &text[tokens.len()..]);
        let shifted = rest
            .iter()
            .map(|token| (token + self.shift) % self.vocab_size);
        drafts.extend(shifted.take(count));
    }
}
