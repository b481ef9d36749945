//! The one backend trait, at forward-pass size: a per-op trait would hide exactly what a resident
//! engine is for (no host in the loop between draft, verify, accept and KV commit).
//!
//! Implementors: `model::reference`, `cpu`, `cuda`, and `engine`'s scripted decoder for tests.
//!
//! Invariants every implementor keeps:
//! - A sequence is a list of tokens. All but the last have keys and values in the cache; the last
//!   one, the *anchor*, is computed by the next step. So prefill and decode are one mechanism.
//! - The arithmetic of a row depends on neither the other rows of its step nor other sequences:
//!   greedy output is bit-equal at any draft width and any batch.
//! - `step` allocates nothing once every buffer has seen its largest size.

use crate::heartbeat::Heartbeat;
use crate::sampling::SamplingParams;
use std::sync::Arc;

/// Index into the vocabulary.
pub type TokenId = u32;

/// Names an open sequence of one [`Decoder`]. Never reused while the sequence is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u32);

/// What a decoder can hold; constant over its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Logit columns.
    pub vocab_size: u32,
    /// Longest sequence, in tokens.
    pub context_tokens: u32,
    /// Sequences open at once.
    pub sequences_max: u32,
    /// Widest step: the anchor plus the drafted tokens. 1 without a drafter.
    pub width_max: u32,
    /// Tokens in one KV page of a full-attention layer.
    pub page_tokens: u32,
    /// KV pages in all.
    pub pages: u32,
}

/// KV pages in use now. Pages shared by several sequences count once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvUsage {
    /// Pages held by open sequences.
    pub pages_used: u32,
    /// Bytes of keys and values held, rings of sliding layers and drafter context included.
    pub kv_bytes: u64,
}

/// How the tokens of one sequence are chosen; given once, before the first step.
pub struct SequenceConfig {
    /// Distribution, penalties, seed.
    pub sampling: SamplingParams,
    /// Tokens `0..prompt_tokens` are the prompt: the presence and frequency penalties do not count
    /// them, the repetition penalty does; `min_tokens` counts from here.
    pub prompt_tokens: u32,
    /// Log-probabilities to report for each token: `Some(0)` the chosen token's only, `Some(n)`
    /// also the `n` most probable.
    pub logprobs: Option<u32>,
    /// Structured output: which tokens may come next.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// The tokens a grammar allows. Owned by the sequence; called on the thread that steps.
///
/// Masks apply to the target's distribution only, so the output is exactly that of constrained
/// plain decoding whatever the drafter proposes.
pub trait Constraint: Send {
    /// Fills one mask for each row of a verify block, for the text committed so far followed by
    /// `drafted[..i]`, and returns how many rows are usable: `1 + d`, where `d` is the length of the
    /// longest prefix of `drafted` that the grammar allows. `masks` has `drafted.len() + 1` rows of
    /// `vocab_size.div_ceil(32)` words, bit `t % 32` of word `t / 32` set when token `t` is allowed.
    fn masks(&mut self, drafted: &[TokenId], masks: &mut [u32]) -> usize;
    /// Moves past tokens that are now part of the text.
    fn commit(&mut self, tokens: &[TokenId]);
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SequenceStep {
    /// Which sequence.
    pub sequence: SequenceId,
    /// Rows to verify: 1 is plain decoding, `w` drafts `w - 1` tokens. Clipped to
    /// [`Limits::width_max`] and to the room left in the context.
    pub width: u32,
    /// Leaves out drafts whose [chance](crate::sampler::Chance) to be kept falls below this; 0 verifies the
    /// whole width. It depends on the drafter's logits alone, never on a drawn token, so the
    /// output's distribution stays that of plain decoding.
    pub chance_min: f32,
    /// Benchmarks only: take this many drafted tokens as accepted whatever the target says (draft
    /// and verify are still computed in full). Every report of such a run says `simulated`.
    pub simulate_accepted: Option<u32>,
}

/// What to do in one step: a list of distinct sequences.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// Order does not change any result.
    pub sequences: Vec<SequenceStep>,
}

/// Log-probabilities of one generated token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// Of the chosen token, natural logarithm, before temperature and truncation but after
    /// penalties, bias and masks.
    pub chosen: f32,
    /// The most probable tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// What one sequence got from a step.
#[derive(Clone, Debug, Default)]
pub struct SequenceOutput {
    /// Which sequence.
    pub sequence: Option<SequenceId>,
    /// Index of the anchor in the sequence.
    pub position: u32,
    /// Rows verified.
    pub width: u32,
    /// Tokens as proposed by the drafter, before verification: `width - 1` of them.
    pub drafted: Vec<TokenId>,
    /// Drafted tokens that were accepted.
    pub accepted: u32,
    /// `accepted` drafted tokens, then the bonus token: 1 to `width` tokens, now part of the
    /// sequence; the last one is the new anchor.
    pub tokens: Vec<TokenId>,
    /// One entry a token when asked for, else empty.
    pub logprobs: Vec<TokenLogprobs>,
}

/// Where the time of a step went, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTiming {
    /// The drafter, its pass over lm_head included.
    pub draft_us: f64,
    /// The target's forward pass.
    pub verify_us: f64,
    /// Penalties, masks, accept rule.
    pub sample_us: f64,
}

/// Result of a step, reused from step to step so that it allocates only while it grows.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// One entry for each sequence of the plan, in the plan's order.
    pub sequences: Vec<SequenceOutput>,
    /// Where the time went.
    pub timing: StepTiming,
    /// Bytes of target weights that the step read, each expert once however many rows chose it;
    /// 0 from a backend that does not count them. For benchmarks.
    pub weight_bytes: u64,
}

impl StepOutput {
    /// Empties the output for a plan of `sequences` entries, keeping every buffer.
    pub fn reset(&mut self, sequences: usize) {
        self.sequences
            .resize_with(sequences, SequenceOutput::default);
        for output in &mut self.sequences {
            output.sequence = None;
            output.drafted.clear();
            output.tokens.clear();
            output.logprobs.clear();
            output.accepted = 0;
        }
        self.timing = StepTiming::default();
        self.weight_bytes = 0;
    }
}

/// A sequence that shares the past of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fork {
    /// The new sequence.
    pub sequence: SequenceId,
    /// Its length. May be less than asked for: a sliding layer keeps only its window, so a backend
    /// goes back to the last position whose window it still holds. The caller prefills the rest.
    pub position: u32,
}

/// What to copy out of a forward pass, row by row: log-probabilities, trainers, parity tests.
pub enum Tap<'a> {
    /// `sink(position, logits)`: logits `[vocab_size]` f32 of the token after `position`.
    Logits(&'a mut dyn FnMut(u32, &[f32])),
    /// `sink(position, i, row)`: the residual stream `[hidden]` f32 after layer `layers[i]`, before
    /// any norm.
    Hidden {
        /// Layer indices, ascending.
        layers: &'a [u32],
        /// Receives the rows.
        sink: &'a mut dyn FnMut(u32, usize, &[f32]),
    },
    /// `sink(slot, logits)`: drafter logits `[vocab_size]` f32 of block slots `1..width`, drafted
    /// from the last of the given tokens as anchor.
    Draft {
        /// Block size, anchor included.
        width: u32,
        /// Receives the rows.
        sink: &'a mut dyn FnMut(u32, &[f32]),
    },
}

/// Why a decoder could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// All sequences are taken.
    #[error("no free sequence: {open} are open, the limit is {max}")]
    NoFreeSequence {
        /// Open now.
        open: u32,
        /// Limit.
        max: u32,
    },
    /// The KV cache has no room.
    #[error("KV cache is full: {needed} more pages needed, {free} of {total} free")]
    KvFull {
        /// Pages asked for.
        needed: u32,
        /// Pages free.
        free: u32,
        /// Pages in all.
        total: u32,
    },
    /// The sequence would outgrow the context.
    #[error("context is {limit} tokens, the sequence would have {wanted}")]
    ContextFull {
        /// Tokens wanted.
        wanted: u64,
        /// Limit.
        limit: u32,
    },
    /// A token that the vocabulary does not have.
    #[error("token {token} at index {index} is outside the vocabulary of {vocab_size}")]
    TokenRange {
        /// The token.
        token: TokenId,
        /// Its index in the call's list.
        index: usize,
        /// Size of the vocabulary.
        vocab_size: u32,
    },
    /// Not an open sequence, or one that has no token to step from.
    #[error("sequence {0:?} is not open or has no tokens")]
    UnknownSequence(SequenceId),
    /// A position the sequence does not hold.
    #[error("position {position} is not held by the sequence of {tokens} tokens: {why}")]
    Position {
        /// Asked for.
        position: u32,
        /// Length of the sequence.
        tokens: u32,
        /// Why it cannot be had.
        why: &'static str,
    },
    /// NaN or infinity where a number was expected: a broken checkpoint.
    #[error(
        "{what} at position {position} is not finite (NaN or infinity): the weights are damaged"
    )]
    NotFinite {
        /// Which buffer.
        what: &'static str,
        /// Position of the row.
        position: u32,
    },
    /// Bias, penalties and grammar together leave no token.
    #[error("no token is allowed at position {position}: the grammar and the biases exclude all")]
    NothingAllowed {
        /// Index of the token that could not be chosen.
        position: u32,
    },
    /// The device broke; the decoder cannot be used any more.
    #[error("device fault: {0}")]
    Fault(String),
}

/// A model resident on one device set; owns the KV cache of every open sequence.
pub trait Decoder: Send {
    /// What this decoder can hold.
    fn limits(&self) -> Limits;
    /// From now on, calls that may take longer than some 100 ms beat this on their way. A backend without such
    /// calls need not.
    fn watch(&mut self, _heartbeat: &Arc<Heartbeat>) {}
    /// KV in use now.
    fn kv_usage(&self) -> KvUsage;
    /// Opens an empty sequence, greedy until configured.
    ///
    /// # Errors
    /// [`DecodeError::NoFreeSequence`].
    fn open(&mut self) -> Result<SequenceId, DecodeError>;
    /// Sets how tokens are chosen from now on.
    ///
    /// # Errors
    /// [`DecodeError::UnknownSequence`].
    fn configure(
        &mut self,
        sequence: SequenceId,
        config: SequenceConfig,
    ) -> Result<(), DecodeError>;
    /// Opens a sequence that shares the tokens `..position` of `of` and their pages, greedy until
    /// configured: prefix cache, best-of-N, tree search.
    ///
    /// # Errors
    /// [`DecodeError::NoFreeSequence`], [`DecodeError::UnknownSequence`], [`DecodeError::Position`]
    /// when `position` is beyond the end of `of`.
    fn fork(&mut self, of: SequenceId, position: u32) -> Result<Fork, DecodeError>;
    /// Appends tokens and computes all but the last.
    ///
    /// # Errors
    /// [`DecodeError::ContextFull`], [`DecodeError::KvFull`], [`DecodeError::TokenRange`],
    /// [`DecodeError::UnknownSequence`]; the sequence is unchanged.
    fn prefill(&mut self, sequence: SequenceId, tokens: &[TokenId]) -> Result<(), DecodeError>;
    /// Drafts, verifies and accepts, for every sequence in the plan; each gets 1 to `width` tokens.
    ///
    /// # Errors
    /// [`DecodeError::KvFull`] and [`DecodeError::ContextFull`] before anything is computed;
    /// [`DecodeError::NotFinite`] and [`DecodeError::Fault`] leave the sequences unusable.
    fn step(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Result<(), DecodeError>;
    /// [`Decoder::step`] that calls `meanwhile`, which may take tens of microseconds, once or more: where the host
    /// would wait for a device, after the step's work was handed over. A backend that computes on the host
    /// has no such place and calls it first, as here. It may be left out only by a step that fails.
    ///
    /// # Errors
    /// As [`Decoder::step`].
    fn step_while(
        &mut self,
        plan: &StepPlan,
        out: &mut StepOutput,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), DecodeError> {
        meanwhile();
        self.step(plan, out)
    }
    /// Cuts the sequence to its first `position` tokens. A sliding layer can go back only as far
    /// as its ring holds; [`Decoder::fork`] goes back further.
    ///
    /// # Errors
    /// [`DecodeError::Position`], [`DecodeError::UnknownSequence`].
    fn rewind(&mut self, sequence: SequenceId, position: u32) -> Result<(), DecodeError>;
    /// Frees the sequence. Closing one that is not open does nothing.
    fn close(&mut self, sequence: SequenceId);
    /// Appends `tokens` like [`Decoder::prefill`] and reports a row for every position not computed
    /// before, the last one included (the next step computes that one again).
    ///
    /// # Errors
    /// As [`Decoder::prefill`]; [`DecodeError::NotFinite`].
    fn tap(
        &mut self,
        sequence: SequenceId,
        tokens: &[TokenId],
        tap: Tap<'_>,
    ) -> Result<(), DecodeError>;
}
