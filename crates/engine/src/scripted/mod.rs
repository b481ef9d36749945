//! A decoder without a model, for tests of everything above the decoder.
//!
//! Owns a script instead of weights: the next token, or its logits, as a function of the tokens so
//! far. KV pages, reference counts, sliding windows and step times are kept as a real decoder
//! would, so that leaks and exhaustion show. Every text says where it comes from: the script.

mod pages;
mod script;

pub use script::{Drafter, NextLogits, NextToken, Script, ScriptedOptions};

use model::TokenId;
use model::decoder::{
    DecodeError, Decoder, Fork, KvUsage, Limits, SequenceConfig, SequenceId, SequenceOutput,
    StepOutput, StepPlan, Tap,
};
use model::sampler::{Block, Proposals, Sampler, SamplerScratch};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pages::Pages;

struct Sequence {
    tokens: Vec<TokenId>,
    /// Indices into the page table; those of full pages may be shared.
    pages: Vec<u32>,
    sampler: Sampler,
}

/// See the module.
pub struct Scripted {
    options: ScriptedOptions,
    script: Script,
    sequences: BTreeMap<SequenceId, Sequence>,
    next: u32,
    pages: Pages,
    steps: u64,
    rows: Vec<f32>,
    best: Vec<TokenId>,
    proposals: Proposals,
    scratch: SamplerScratch,
}

impl Scripted {
    /// A decoder that follows `script`.
    #[must_use]
    pub fn new(options: ScriptedOptions, script: Script) -> Self {
        let pages = options.limits.pages;
        Self {
            options,
            script,
            sequences: BTreeMap::new(),
            next: 0,
            pages: Pages::new(pages),
            steps: 0,
            rows: Vec::new(),
            best: Vec::new(),
            proposals: Proposals::default(),
            scratch: SamplerScratch::default(),
        }
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence, DecodeError> {
        self.sequences
            .get(&id)
            .ok_or(DecodeError::UnknownSequence(id))
    }

    fn insert(&mut self, sequence: Sequence) -> Result<SequenceId, DecodeError> {
        let (open, max) = (
            self.sequences.len() as u32,
            self.options.limits.sequences_max,
        );
        if open >= max {
            return Err(DecodeError::NoFreeSequence { open, max });
        }
        let id = SequenceId(self.next);
        self.next = self.next.wrapping_add(1);
        self.sequences.insert(id, sequence);
        Ok(id)
    }

    /// Pages that sequence `id` lacks for `tokens` tokens.
    fn lacks(&self, id: SequenceId, tokens: usize) -> Result<usize, DecodeError> {
        let limits = &self.options.limits;
        if tokens > limits.context_tokens as usize {
            let wanted = tokens as u64;
            return Err(DecodeError::ContextFull {
                wanted,
                limit: limits.context_tokens,
            });
        }
        let pages = tokens.div_ceil(limits.page_tokens as usize);
        Ok(pages.saturating_sub(self.sequence(id)?.pages.len()))
    }

    fn grow(&mut self, id: SequenceId, pages: usize) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.pages.take(pages, &mut sequence.pages);
        }
    }

    /// The certain next token, or the most probable one; fills `row` when there are logits.
    fn next_token(script: &Script, prompt: u32, tokens: &[TokenId], row: &mut [f32]) -> TokenId {
        let token = match script {
            Script::Answer(answer) => {
                let said = tokens.len().saturating_sub(prompt as usize);
                answer[said % answer.len()]
            }
            Script::Token(next) => next(tokens),
            Script::Logits(fill) => {
                fill(tokens, row);
                return model::reference::sample::first_largest(row).unwrap_or_default();
            }
        };
        row.fill(-20.0);
        if let Some(logit) = row.get_mut(token as usize) {
            *logit = 20.0;
        }
        token
    }

    /// Fills `proposals`, and `rows` or `best` with what the script says after each draft.
    fn draft(&mut self, id: SequenceId, width: u32) -> Result<bool, DecodeError> {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Err(DecodeError::UnknownSequence(id));
        };
        let vocab = self.options.limits.vocab_size as usize;
        let plain = sequence.sampler.is_plain_greedy() && !matches!(self.script, Script::Logits(_));
        let length = sequence.tokens.len();
        let prompt = sequence.sampler.config().prompt_tokens;
        let mut row = vec![0.0; if plain { 0 } else { vocab }];
        self.proposals.clear();
        self.rows.clear();
        self.best.clear();
        for slot in 1..=width {
            let best = Self::next_token(&self.script, prompt, &sequence.tokens, &mut row);
            self.best.push(best);
            self.rows.extend_from_slice(&row);
            if slot == width {
                break;
            }
            let index = length as u32 - 1 + slot;
            let wrong = (best + 1) % vocab as TokenId;
            match self.options.drafter {
                Drafter::Right => self.proposals.push(best),
                Drafter::Wrong => self.proposals.push(wrong),
                Drafter::Sometimes(rate) => {
                    let u = model::random::uniform(77, index, model::random::Purpose::Draft);
                    self.proposals.push(if u < rate { best } else { wrong });
                }
                Drafter::Near if plain => self.proposals.push(best),
                Drafter::Near => {
                    row[index as usize % vocab] += 1.5;
                    sequence.sampler.propose(index, &row, &mut self.proposals)?;
                }
            }
            let drafted = self.proposals.tokens().last().copied();
            sequence.tokens.push(drafted.unwrap_or(best));
        }
        sequence.tokens.truncate(length);
        Ok(plain)
    }

    fn step_one(
        &mut self,
        id: SequenceId,
        width: u32,
        simulate_accepted: Option<u32>,
        out: &mut SequenceOutput,
    ) -> Result<(), DecodeError> {
        let plain = self.draft(id, width)?;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Err(DecodeError::UnknownSequence(id));
        };
        let position = sequence.tokens.len() as u32 - 1;
        if plain {
            let (best, drafts) = (&self.best, &self.proposals);
            sequence
                .sampler
                .accept_best(position, best, drafts, simulate_accepted, out);
        } else {
            let block = Block {
                position,
                logits: &mut self.rows,
                proposals: &self.proposals,
                simulate_accepted,
            };
            sequence.sampler.accept(block, &mut self.scratch, out)?;
        }
        out.sequence = Some(id);
        sequence.tokens.extend_from_slice(&out.tokens);
        // Pages for rejected drafts go back.
        let keep = sequence
            .tokens
            .len()
            .div_ceil(self.options.limits.page_tokens as usize);
        let spare: Vec<u32> = sequence
            .pages
            .drain(keep.min(sequence.pages.len())..)
            .collect();
        self.pages.release(spare);
        Ok(())
    }

    /// The width of a step that a sequence can have.
    fn clip(&self, id: SequenceId, width: u32) -> Result<u32, DecodeError> {
        let sequence = self.sequence(id)?;
        if sequence.tokens.is_empty() {
            return Err(DecodeError::UnknownSequence(id));
        }
        let left = self
            .options
            .limits
            .context_tokens
            .saturating_sub(sequence.tokens.len() as u32);
        if left == 0 {
            let limit = self.options.limits.context_tokens;
            return Err(DecodeError::ContextFull {
                wanted: u64::from(limit) + 1,
                limit,
            });
        }
        Ok(width.min(self.options.limits.width_max).min(left).max(1))
    }

    fn reserve_step(&mut self, plan: &StepPlan) -> Result<Vec<u32>, DecodeError> {
        let (mut widths, mut lacks) = (Vec::new(), Vec::new());
        for entry in &plan.sequences {
            let width = self.clip(entry.sequence, entry.width)?;
            let tokens = self.sequence(entry.sequence)?.tokens.len() + width as usize;
            widths.push(width);
            lacks.push(self.lacks(entry.sequence, tokens)?);
        }
        self.pages.room(lacks.iter().sum())?;
        for (entry, pages) in plan.sequences.iter().zip(lacks) {
            self.grow(entry.sequence, pages);
        }
        Ok(widths)
    }
}

impl Decoder for Scripted {
    fn limits(&self) -> Limits {
        self.options.limits
    }

    fn kv_usage(&self) -> KvUsage {
        let pages_used = self.pages.used();
        let page_bytes = u64::from(self.options.limits.page_tokens) * 4;
        KvUsage {
            pages_used,
            kv_bytes: u64::from(pages_used) * page_bytes,
        }
    }

    fn open(&mut self) -> Result<SequenceId, DecodeError> {
        let sampler = Sampler::greedy(self.options.limits.vocab_size);
        self.insert(Sequence {
            tokens: Vec::new(),
            pages: Vec::new(),
            sampler,
        })
    }

    fn configure(&mut self, id: SequenceId, config: SequenceConfig) -> Result<(), DecodeError> {
        let vocab_size = self.options.limits.vocab_size;
        let sequence = self
            .sequences
            .get_mut(&id)
            .ok_or(DecodeError::UnknownSequence(id))?;
        sequence.sampler = Sampler::new(config, vocab_size, &sequence.tokens);
        Ok(())
    }

    fn fork(&mut self, of: SequenceId, position: u32) -> Result<Fork, DecodeError> {
        let source = self.sequence(of)?;
        let tokens = source.tokens.len() as u32;
        if position > tokens {
            let why = "it is beyond the end";
            return Err(DecodeError::Position {
                position,
                tokens,
                why,
            });
        }
        let out_of_reach = self.options.window.is_some_and(|w| tokens - position > w);
        let position = if out_of_reach { 0 } else { position };
        let page_tokens = self.options.limits.page_tokens;
        let whole = (position / page_tokens) as usize;
        let rest = usize::from(!position.is_multiple_of(page_tokens));
        let shared = source.pages[..whole].to_vec();
        let tokens = source.tokens[..position as usize].to_vec();
        self.pages.room(rest)?;
        let sampler = Sampler::greedy(self.options.limits.vocab_size);
        let sequence = self.insert(Sequence {
            tokens,
            pages: shared.clone(),
            sampler,
        })?;
        self.pages.share(&shared);
        self.grow(sequence, rest);
        Ok(Fork { sequence, position })
    }

    fn prefill(&mut self, id: SequenceId, tokens: &[TokenId]) -> Result<(), DecodeError> {
        let vocab_size = self.options.limits.vocab_size;
        if let Some(index) = tokens.iter().position(|token| *token >= vocab_size) {
            let token = tokens[index];
            return Err(DecodeError::TokenRange {
                token,
                index,
                vocab_size,
            });
        }
        let position = self.sequence(id)?.tokens.len();
        let lacks = self.lacks(id, position + tokens.len())?;
        self.pages.room(lacks)?;
        self.grow(id, lacks);
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.sampler.append(position as u32, tokens);
            sequence.tokens.extend_from_slice(tokens);
        }
        pause(self.options.prefill_time * tokens.len() as u32);
        Ok(())
    }

    fn step(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Result<(), DecodeError> {
        self.step_while(plan, out, &mut || {})
    }

    /// As a device does it: what the host has to do falls into the step's own time.
    fn step_while(
        &mut self,
        plan: &StepPlan,
        out: &mut StepOutput,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), DecodeError> {
        let start = Instant::now();
        self.steps += 1;
        if self.options.fault_at.is_some_and(|at| self.steps > at) {
            return Err(DecodeError::Fault("scripted".to_owned()));
        }
        let widths = self.reserve_step(plan)?;
        out.reset(plan.sequences.len());
        for ((entry, width), out) in plan.sequences.iter().zip(&widths).zip(&mut out.sequences) {
            self.step_one(entry.sequence, *width, entry.simulate_accepted, out)?;
        }
        meanwhile();
        let rows: u32 = widths.iter().sum();
        let time = self.options.step_time + self.options.row_time * rows.saturating_sub(1);
        pause(time.saturating_sub(start.elapsed()));
        let us = start.elapsed().as_secs_f64() * 1e6;
        let drafts = widths.iter().any(|width| *width > 1);
        out.timing.draft_us = if drafts {
            us * self.options.draft_share
        } else {
            0.0
        };
        out.timing.verify_us = us - out.timing.draft_us;
        Ok(())
    }

    fn rewind(&mut self, id: SequenceId, position: u32) -> Result<(), DecodeError> {
        let (window, page_tokens) = (self.options.window, self.options.limits.page_tokens);
        let sequence = self
            .sequences
            .get_mut(&id)
            .ok_or(DecodeError::UnknownSequence(id))?;
        let tokens = sequence.tokens.len() as u32;
        if position > tokens || window.is_some_and(|w| tokens - position > w) {
            let why = "it is out of reach";
            return Err(DecodeError::Position {
                position,
                tokens,
                why,
            });
        }
        sequence.tokens.truncate(position as usize);
        sequence.sampler.rewind(&sequence.tokens);
        let keep = position.div_ceil(page_tokens) as usize;
        let spare: Vec<u32> = sequence.pages.drain(keep..).collect();
        self.pages.release(spare);
        Ok(())
    }

    fn close(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.remove(&id) {
            self.pages.release(sequence.pages);
        }
    }

    fn tap(&mut self, id: SequenceId, tokens: &[TokenId], tap: Tap<'_>) -> Result<(), DecodeError> {
        let first = self.sequence(id)?.tokens.len().saturating_sub(1);
        self.prefill(id, tokens)?;
        let mut row = vec![0.0; self.options.limits.vocab_size as usize];
        if let Tap::Logits(sink) = tap {
            let sequence = self.sequence(id)?;
            let (held, prompt) = (&sequence.tokens, sequence.sampler.config().prompt_tokens);
            for position in first..held.len() {
                Self::next_token(&self.script, prompt, &held[..=position], &mut row);
                sink(position as u32, &row);
            }
        }
        Ok(())
    }
}

fn pause(time: Duration) {
    if !time.is_zero() {
        std::thread::sleep(time);
    }
}
