//! Sequences kept after their request for the prefix they hold.
//!
//! Owns which sequences are kept, under which isolation key, and which goes first when room is
//! needed (the one not used for longest). Refuses to touch the decoder: it names sequences, the
//! scheduler forks and closes them. Invariant: a prefix is only ever found under its own key.

use model::{SequenceId, TokenId};

/// Shorter prefixes are not worth a fork.
pub(crate) const SHARED_TOKENS_MIN: usize = 8;

struct Kept {
    sequence: SequenceId,
    key: String,
    tokens: Vec<TokenId>,
    used: u64,
}

/// The kept sequences of one decoder.
#[derive(Default)]
pub(crate) struct PrefixCache {
    kept: Vec<Kept>,
    clock: u64,
}

/// A sequence that begins like a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) sequence: SequenceId,
    /// Tokens it has in common with the prompt.
    pub(crate) shared: usize,
}

/// Length of the common start of two lists.
pub(crate) fn shared_tokens(a: &[TokenId], b: &[TokenId]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl PrefixCache {
    pub(crate) fn len(&self) -> usize {
        self.kept.len()
    }

    /// Sequences that share at least [`SHARED_TOKENS_MIN`] tokens with `prompt` under `key`.
    pub(crate) fn find(&self, key: &str, prompt: &[TokenId]) -> impl Iterator<Item = Source> {
        let same_key = self.kept.iter().filter(move |kept| kept.key == key);
        let sources = same_key.map(|kept| Source {
            sequence: kept.sequence,
            shared: shared_tokens(&kept.tokens, prompt),
        });
        sources.filter(|source| source.shared >= SHARED_TOKENS_MIN)
    }

    /// Tells that a kept sequence was of use.
    pub(crate) fn touch(&mut self, sequence: SequenceId) {
        self.clock += 1;
        let clock = self.clock;
        if let Some(kept) = self.kept.iter_mut().find(|kept| kept.sequence == sequence) {
            kept.used = clock;
        }
    }

    /// Keeps an open sequence that holds `tokens`. Returns one that holds the same, to be closed.
    pub(crate) fn keep(
        &mut self,
        sequence: SequenceId,
        key: &str,
        tokens: Vec<TokenId>,
    ) -> Option<SequenceId> {
        self.clock += 1;
        let same = |kept: &Kept| kept.key == key && kept.tokens == tokens;
        let double = self.kept.iter().position(same);
        let double = double.map(|i| self.kept.swap_remove(i).sequence);
        self.kept.push(Kept {
            sequence,
            key: key.to_owned(),
            tokens,
            used: self.clock,
        });
        double
    }

    /// Gives up the sequence not used for longest, to be closed.
    pub(crate) fn evict(&mut self) -> Option<SequenceId> {
        let oldest = (0..self.kept.len()).min_by_key(|i| self.kept[*i].used)?;
        Some(self.kept.swap_remove(oldest).sequence)
    }
}
