//! The sampling state of one sequence: parameters, what was said so far, grammar, random key.
//!
//! Every host decoder holds one [`Sampler`] per open sequence and calls [`Sampler::propose`] for
//! each drafted slot and [`Sampler::accept`] once per verify block. Owns the order of operations on
//! a row (see [`SamplingParams`]). Invariants: rows are judged one after another, so penalties count
//! the accepted drafts of the block itself; a row that is not reached is not read; nothing
//! allocates in a step except reported log-probabilities.

use crate::TokenId;
use crate::decoder::{DecodeError, SequenceConfig, SequenceOutput};
use crate::random::{Purpose, uniform};
use crate::reference::accept::{self, Choice};
use crate::reference::sample::{self, Distribution, Truncation};
use crate::sampling::{DraftSampling, SamplingParams};

/// Buffers of the calls below, owned by the caller and shared by all sequences of a thread.
#[derive(Debug, Default)]
pub struct SamplerScratch {
    target: Distribution,
    masks: Vec<u32>,
    top: Vec<(TokenId, f32)>,
}

/// The chance that a draft and all before it in its block are kept, as far as the drafter knows: the
/// square root of the product of its confidences (largest probability of each row). The rows are
/// drafted side by side, so each confidence already holds doubt about the rows before it and the product itself is
/// too low: on kilotok-mini (32 prompts, 595 blocks) products of 0.1 to 0.2 are kept 40 % of the time, 0.2 to 0.3
/// 53 %, 0.4 to 0.6 78 %.
#[derive(Clone, Copy, Debug)]
pub struct Chance {
    product: f32,
}

impl Default for Chance {
    fn default() -> Self {
        Self { product: 1.0 }
    }
}

impl Chance {
    /// Takes in the next row's confidence; the chance of its draft.
    pub fn next(&mut self, confidence: f32) -> f32 {
        self.product *= confidence;
        self.product.sqrt()
    }
}

/// Drafted tokens of one block and, when they were drawn, the distributions they were drawn from.
/// Reused from step to step.
#[derive(Debug, Default)]
pub struct Proposals {
    tokens: Vec<TokenId>,
    distributions: Vec<Distribution>,
    sampled: bool,
}

impl Proposals {
    /// Forgets the last block.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.sampled = false;
    }

    /// Adds a token that was not drawn: the drafter's best, or a scripted one (one-hot q).
    ///
    /// # Panics
    /// When the block already has drawn tokens.
    pub fn push(&mut self, token: TokenId) {
        assert!(!self.sampled, "a block is drawn or it is not");
        self.tokens.push(token);
    }

    /// Drafted tokens, in order.
    #[must_use]
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    fn distribution(&self, slot: usize) -> Option<&Distribution> {
        (self.sampled && slot < self.tokens.len()).then(|| &self.distributions[slot])
    }

    /// The distribution buffer of the next slot.
    fn next(&mut self) -> &mut Distribution {
        let slot = self.tokens.len();
        if self.distributions.len() == slot {
            self.distributions.push(Distribution::default());
        }
        self.sampled = true;
        &mut self.distributions[slot]
    }
}

/// One verified block of one sequence.
pub struct Block<'a> {
    /// Index of the anchor in the sequence.
    pub position: u32,
    /// Target logits `[proposals + 1, vocab_size]` f32 row-major: row `i` predicts the token at
    /// `position + 1 + i`. Changed in place.
    pub logits: &'a mut [f32],
    /// What was drafted; empty in plain decoding.
    pub proposals: &'a Proposals,
    /// See [`crate::decoder::SequenceStep::simulate_accepted`].
    pub simulate_accepted: Option<u32>,
}

/// Which tokens occurred, for penalties. Dense, so that a step looks up without allocating.
struct History {
    /// `[vocab_size]`: times in the output, plus [`IN_PROMPT`].
    counts: Vec<u32>,
    /// Tokens whose count is not 0.
    seen: Vec<TokenId>,
}

const IN_PROMPT: u32 = 1 << 31;

impl History {
    fn new(vocab_size: usize) -> Self {
        Self {
            counts: vec![0; vocab_size],
            seen: Vec::with_capacity(vocab_size),
        }
    }

    fn clear(&mut self) {
        for token in self.seen.drain(..) {
            self.counts[token as usize] = 0;
        }
    }

    fn add(&mut self, token: TokenId, in_prompt: bool) {
        let count = &mut self.counts[token as usize];
        if *count == 0 {
            self.seen.push(token);
        }
        match in_prompt {
            true => *count |= IN_PROMPT,
            false => *count += 1,
        }
    }
}

/// Chooses the tokens of one sequence.
pub struct Sampler {
    config: SequenceConfig,
    vocab_size: usize,
    history: Option<History>,
}

impl Sampler {
    /// Greedy, without anything else: what an opened sequence has until it is configured.
    #[must_use]
    pub fn greedy(vocab_size: u32) -> Self {
        let config = SequenceConfig {
            sampling: SamplingParams::default(),
            prompt_tokens: 0,
            logprobs: None,
            constraint: None,
        };
        Self::new(config, vocab_size, &[])
    }

    /// As configured, for a sequence that holds `tokens` now.
    #[must_use]
    pub fn new(config: SequenceConfig, vocab_size: u32, tokens: &[TokenId]) -> Self {
        let params = &config.sampling;
        let penalised = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        let mut sampler = Self {
            vocab_size: vocab_size as usize,
            history: penalised.then(|| History::new(vocab_size as usize)),
            config,
        };
        sampler.append(0, tokens);
        sampler
    }

    /// What the sequence was configured with.
    #[must_use]
    pub fn config(&self) -> &SequenceConfig {
        &self.config
    }

    /// Tells of `tokens` that the caller appended at index `position`; not of those that
    /// [`Sampler::accept`] returned. Tokens inside the vocabulary only.
    pub fn append(&mut self, position: u32, tokens: &[TokenId]) {
        if let Some(history) = &mut self.history {
            for (&token, index) in tokens.iter().zip(position..) {
                history.add(token, index < self.config.prompt_tokens);
            }
        }
    }

    /// Tells that the sequence was cut to `tokens`. A grammar cannot go back: a constrained
    /// sequence has to be configured again.
    pub fn rewind(&mut self, tokens: &[TokenId]) {
        if let Some(history) = &mut self.history {
            history.clear();
        }
        self.append(0, tokens);
    }

    /// True when a token is the target's argmax whatever was said before: a decoder may then skip
    /// writing logits and call [`Sampler::accept_best`].
    #[must_use]
    pub fn is_plain_greedy(&self) -> bool {
        let config = &self.config;
        config.sampling.temperature <= 0.0
            && self.history.is_none()
            && config.constraint.is_none()
            && config.logprobs.is_none()
            && config.sampling.logit_bias.is_empty()
            && (config.sampling.min_tokens == 0 || config.sampling.forbidden_until_min.is_empty())
    }

    /// True when drafts are the drafter's best tokens, so that its argmax is enough (pass it to
    /// [`Proposals::push`]).
    #[must_use]
    pub fn drafts_are_greedy(&self) -> bool {
        self.config.sampling.temperature <= 0.0
            || self.config.sampling.draft_sampling == DraftSampling::Greedy
    }

    /// Adds the draft for the token at `index` of the sequence, from drafter logits `[vocab_size]`.
    ///
    /// # Errors
    /// [`DecodeError::NotFinite`].
    pub fn propose(
        &self,
        index: u32,
        logits: &[f32],
        proposals: &mut Proposals,
    ) -> Result<(), DecodeError> {
        let best = argmax(logits, "draft logits", index)?;
        if self.drafts_are_greedy() {
            proposals.push(best);
            return Ok(());
        }
        let distribution = proposals.next();
        distribution.fill(logits, &self.truncation());
        let u = uniform(self.config.sampling.seed, index, Purpose::Draft);
        let token = distribution.draw(u);
        proposals.tokens.push(token);
        Ok(())
    }

    /// Judges a block given only the argmax of each row, for [`Sampler::is_plain_greedy`]. Fills
    /// `out` like [`Sampler::accept`].
    pub fn accept_best(
        &self,
        position: u32,
        best: &[TokenId],
        proposals: &Proposals,
        simulate_accepted: Option<u32>,
        out: &mut SequenceOutput,
    ) {
        let drafted = proposals.tokens();
        begin(position, drafted, out);
        let accepted = match simulate_accepted {
            Some(count) => drafted.len().min(count as usize),
            None => accept::greedy(best, drafted),
        };
        out.tokens.extend_from_slice(&drafted[..accepted]);
        out.tokens.push(best[accepted]);
        out.accepted = accepted as u32;
    }

    /// Judges a block: fills `position`, `width`, `drafted`, `accepted`, `tokens` and `logprobs` of
    /// `out`, and takes the tokens into history and grammar.
    ///
    /// # Errors
    /// [`DecodeError::NotFinite`] for a row that decides a token; [`DecodeError::NothingAllowed`].
    pub fn accept(
        &mut self,
        block: Block<'_>,
        scratch: &mut SamplerScratch,
        out: &mut SequenceOutput,
    ) -> Result<(), DecodeError> {
        let drafted = block.proposals.tokens();
        assert_eq!(
            block.logits.len(),
            (drafted.len() + 1) * self.vocab_size,
            "a block has a row of logits for the anchor and for each draft"
        );
        begin(block.position, drafted, out);
        let usable = self.fill_masks(drafted, &mut scratch.masks);
        let simulated = block
            .simulate_accepted
            .map(|n| drafted.len().min(n as usize));
        let rows = block.logits.chunks_exact_mut(self.vocab_size);
        for (slot, row) in rows.enumerate().take(usable) {
            let index = block.position + 1 + slot as u32;
            self.prepare(index, slot, row, &scratch.masks)?;
            let draft = drafted.get(slot).copied();
            let mut choice = self.choose(
                index,
                row,
                draft,
                block.proposals.distribution(slot),
                scratch,
            )?;
            if let Some(accepted) = simulated {
                choice.accepted = slot < accepted;
                choice.token = draft.filter(|_| choice.accepted).unwrap_or(choice.token);
            }
            self.take(index, row, choice.token, scratch, out);
            if !choice.accepted {
                break;
            }
            out.accepted += 1;
        }
        debug_assert_eq!(out.tokens.len(), out.accepted as usize + 1);
        if let Some(constraint) = &mut self.config.constraint {
            constraint.commit(&out.tokens);
        }
        Ok(())
    }

    /// Makes `token` part of the text, and reports it.
    fn take(
        &mut self,
        index: u32,
        row: &[f32],
        token: TokenId,
        scratch: &mut SamplerScratch,
        out: &mut SequenceOutput,
    ) {
        if let Some(count) = self.config.logprobs {
            let report = sample::logprobs(row, token, count, &mut scratch.top);
            out.logprobs.push(report);
        }
        self.append(index, &[token]);
        out.tokens.push(token);
    }

    fn truncation(&self) -> Truncation {
        let params = &self.config.sampling;
        Truncation {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
        }
    }

    /// Asks the grammar; returns how many rows may decide a token.
    fn fill_masks(&mut self, drafted: &[TokenId], masks: &mut Vec<u32>) -> usize {
        let rows = drafted.len() + 1;
        let Some(constraint) = &mut self.config.constraint else {
            return rows;
        };
        masks.resize(rows * self.vocab_size.div_ceil(32), 0);
        constraint.masks(drafted, masks).clamp(1, rows)
    }

    /// Bias, penalties, forbidden tokens and mask, in place. `slot` finds the row of `masks`.
    fn prepare(
        &self,
        index: u32,
        slot: usize,
        row: &mut [f32],
        masks: &[u32],
    ) -> Result<(), DecodeError> {
        let params = &self.config.sampling;
        if self.is_plain_greedy() {
            return Ok(()); // `choose` looks at every logit anyway
        }
        argmax(row, "logits", index - 1)?;
        for &(token, bias) in &params.logit_bias {
            if let Some(logit) = row.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if let Some(history) = &self.history {
            penalise(params, history, row);
        }
        self.forbid(index, row);
        if self.config.constraint.is_some() {
            let words = self.vocab_size.div_ceil(32);
            mask(&masks[slot * words..(slot + 1) * words], row);
        }
        Ok(())
    }

    /// The end tokens, while too few tokens were generated.
    fn forbid(&self, index: u32, row: &mut [f32]) {
        let params = &self.config.sampling;
        if index < self.config.prompt_tokens.saturating_add(params.min_tokens) {
            for &token in &params.forbidden_until_min {
                if let Some(logit) = row.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    fn choose(
        &self,
        index: u32,
        row: &[f32],
        draft: Option<TokenId>,
        q: Option<&Distribution>,
        scratch: &mut SamplerScratch,
    ) -> Result<Choice, DecodeError> {
        let params = &self.config.sampling;
        let nothing = DecodeError::NothingAllowed { position: index };
        if params.temperature <= 0.0 {
            let token = if self.is_plain_greedy() {
                argmax(row, "logits", index - 1)?
            } else {
                sample::first_largest(row).ok_or(nothing)?
            };
            let accepted = draft == Some(token);
            return Ok(Choice { token, accepted });
        }
        if !scratch.target.fill(row, &self.truncation()) {
            return Err(nothing);
        }
        let number = |purpose| uniform(params.seed, index, purpose);
        Ok(accept::row(&scratch.target, draft, q, number))
    }
}

fn argmax(row: &[f32], what: &'static str, position: u32) -> Result<TokenId, DecodeError> {
    match sample::argmax(row) {
        Some((token, _)) => Ok(token),
        None => Err(DecodeError::NotFinite { what, position }),
    }
}

fn begin(position: u32, drafted: &[TokenId], out: &mut SequenceOutput) {
    out.position = position;
    out.width = drafted.len() as u32 + 1;
    out.accepted = 0;
    out.drafted.clear();
    out.drafted.extend_from_slice(drafted);
    out.tokens.clear();
    out.logprobs.clear();
}

fn penalise(params: &SamplingParams, history: &History, row: &mut [f32]) {
    for &token in &history.seen {
        let logit = &mut row[token as usize];
        let count = history.counts[token as usize] & !IN_PROMPT;
        if *logit > 0.0 {
            *logit /= params.repetition_penalty;
        } else {
            *logit *= params.repetition_penalty;
        }
        if count > 0 {
            *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
        }
    }
}

fn mask(words: &[u32], row: &mut [f32]) {
    for (word, chunk) in words.iter().zip(row.chunks_mut(32)) {
        if *word == u32::MAX {
            continue;
        }
        for (bit, logit) in chunk.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}
