//! The [`Decoder`] of one GPU: one sequence, steps of 1 to 8 rows, one launch a step.
//!
//! Owns the sequence and its sampler; keys and values of accepted rows stay where the step put them,
//! those of refused drafts are overwritten by the next step. Greedy choice is the device's, its drafts
//! too (`decoder/drafting.rs`); anything else takes logits to the host's sampler. Refuses a second
//! sequence and hidden-state taps.

mod drafting;

pub use drafting::{RunDone, RunPlan};

use model::config::Config;
use model::decoder::{
    DecodeError, Decoder, Fork, KvUsage, Limits, SequenceConfig, SequenceId, SequenceOutput,
    SequenceStep, StepOutput, StepPlan, Tap, TokenId,
};
use model::draft::{Draft, DraftSource};
use model::sampler::{Block, Proposals, Sampler, SamplerScratch};
use model::weights::Weights;

use crate::CudaError;
use crate::images::Numbers;
use crate::layout::{StepState, TOKENS};
use crate::program::Settings;
use crate::resident::{Resident, Walk};

/// Positions of the caches when nobody asks for another number.
const CONTEXT_TOKENS: usize = 32_768;

/// Who is handed position and logits of every row.
type Seer<'a> = Option<&'a mut dyn FnMut(u32, &[f32])>;

struct Sequence {
    id: SequenceId,
    /// All but the last are in the caches.
    tokens: Vec<TokenId>,
    computed: usize,
    sampler: Sampler,
}

/// A model on a GPU.
pub struct CudaDecoder {
    resident: Resident,
    vocab_size: usize,
    context: usize,
    sequence: Option<Sequence>,
    next_id: u32,
    source: Option<(Box<dyn DraftSource>, u32)>,
    /// Rows of the drafter's block; 0 without one.
    block: usize,
    scratch: SamplerScratch,
    logits: Vec<f32>,
}

fn fault(e: CudaError) -> DecodeError {
    DecodeError::Fault(e.to_string())
}

impl CudaDecoder {
    /// Packs the weights, and those of the drafter if there is one, and copies them to device 0.
    /// `context`: positions of the caches at most; `numbers`: how activations, keys and values are kept.
    ///
    /// # Errors
    /// No GPU, no compiler and no compiled kernel, or a model that the kernel does not take.
    pub fn new(
        config: &Config,
        weights: &Weights<'_>,
        draft: Option<&Draft>,
        context: Option<usize>,
        numbers: Numbers,
    ) -> Result<Self, CudaError> {
        let context = context.unwrap_or(CONTEXT_TOKENS).min(config.context_tokens);
        // A step may be up to 8 rows wide at the very end.
        let settings = Settings {
            context: context + TOKENS,
            numbers,
        };
        let resident = Resident::whole(config, weights, draft, settings)?;
        Ok(Self {
            resident,
            vocab_size: config.vocab_size,
            context,
            sequence: None,
            next_id: 0,
            source: None,
            block: draft.map_or(0, |d| (d.config.block_size as usize).min(TOKENS)),
            scratch: SamplerScratch::default(),
            logits: Vec::new(),
        })
    }

    /// Takes drafts from `source`, in steps of up to `width_max` rows (at most 8).
    #[must_use]
    pub fn with_drafts(mut self, source: Box<dyn DraftSource>, width_max: u32) -> Self {
        self.source = Some((source, width_max.min(TOKENS as u32)));
        self
    }

    fn sequence(&mut self, id: SequenceId) -> Result<&mut Sequence, DecodeError> {
        let held = self.sequence.as_mut().filter(|s| s.id == id);
        held.ok_or(DecodeError::UnknownSequence(id))
    }

    /// Computes `tokens` at `position`, and runs `meanwhile` beside that; gives the device's choice after each.
    fn rows(
        &mut self,
        tokens: &[TokenId],
        position: usize,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<StepState, DecodeError> {
        let mut state = StepState {
            rows: tokens.len() as i32,
            position: position as i32,
            ..StepState::default()
        };
        for (to, token) in state.tokens.iter_mut().zip(tokens) {
            *to = *token as i32;
        }
        self.walk(&state, Walk::Verify, meanwhile)
    }

    fn walk(
        &mut self,
        state: &StepState,
        walk: Walk,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<StepState, DecodeError> {
        self.resident.set_state(state).map_err(fault)?;
        self.resident.walk_while(walk, meanwhile).map_err(fault)?;
        self.resident.state().map_err(fault)
    }

    /// Logits after the first `rows` rows of the last step, in `self.logits`.
    fn take_logits(&mut self, rows: usize) -> Result<(), DecodeError> {
        self.logits.resize(rows * self.vocab_size, 0.0);
        for (row, out) in self.logits.chunks_exact_mut(self.vocab_size).enumerate() {
            self.resident.logits(row, out).map_err(fault)?;
        }
        Ok(())
    }

    /// Checks that `tokens` can follow, before anything changes.
    fn check(&mut self, id: SequenceId, tokens: &[TokenId]) -> Result<(), DecodeError> {
        let (limit, vocab_size) = (self.context as u32, self.vocab_size as u32);
        let wanted = (self.sequence(id)?.tokens.len() + tokens.len()) as u64;
        if wanted > u64::from(limit) {
            return Err(DecodeError::ContextFull { wanted, limit });
        }
        match tokens.iter().position(|&t| t >= vocab_size) {
            Some(index) => Err(DecodeError::TokenRange {
                token: tokens[index],
                index,
                vocab_size,
            }),
            None => Ok(()),
        }
    }

    /// Appends tokens and computes all but the last `behind`, handing logits to `see` if asked.
    fn append(
        &mut self,
        id: SequenceId,
        tokens: &[TokenId],
        behind: usize,
        mut see: Seer<'_>,
    ) -> Result<(), DecodeError> {
        self.check(id, tokens)?;
        let sequence = self.sequence(id)?;
        let position = sequence.tokens.len() as u32;
        sequence.sampler.append(position, tokens);
        sequence.tokens.extend_from_slice(tokens);
        loop {
            let sequence = self.sequence(id)?;
            let computed = sequence.computed;
            let end = sequence.tokens.len().saturating_sub(behind);
            let rows: Vec<TokenId> = sequence.tokens[computed..end.max(computed)]
                .iter()
                .copied()
                .take(TOKENS)
                .collect();
            if rows.is_empty() {
                return Ok(());
            }
            self.rows(&rows, computed, &mut || {})?;
            if let Some(see) = &mut see {
                self.take_logits(rows.len())?;
                for (row, logits) in self.logits.chunks_exact(self.vocab_size).enumerate() {
                    let position = (computed + row) as u32;
                    finite(logits, position)?;
                    see(position, logits);
                }
            }
            self.sequence(id)?.computed += rows.len();
        }
    }

    fn drafts(&mut self, width: usize) -> Proposals {
        let mut proposals = Proposals::default();
        if let (Some((source, _)), Some(sequence), true) =
            (&mut self.source, &self.sequence, width > 1)
        {
            let mut drafts = Vec::new();
            source.propose(&sequence.tokens, width - 1, &mut drafts);
            drafts.into_iter().for_each(|draft| proposals.push(draft));
        }
        proposals
    }

    fn step_sequence(
        &mut self,
        step: &SequenceStep,
        out: &mut SequenceOutput,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), DecodeError> {
        let width_max = self.limits().width_max;
        let context = self.context;
        let sequence = self.sequence(step.sequence)?;
        let Some(&anchor) = sequence.tokens.last() else {
            return Err(DecodeError::UnknownSequence(step.sequence));
        };
        let (computed, room) = (sequence.computed, context - sequence.tokens.len());
        if room == 0 {
            return Err(DecodeError::ContextFull {
                wanted: context as u64 + 1,
                limit: context as u32,
            });
        }
        let width = (step.width.clamp(1, width_max) as usize).min(room);
        let greedy = sequence.sampler.is_plain_greedy();
        let drafter = width > 1 && self.block > 0 && self.source.is_none();
        let (proposals, state) = match drafter {
            true if greedy && step.chance_min <= 0.0 => {
                self.drafted_step(anchor, computed, width, meanwhile)?
            }
            _ => {
                let proposals = match drafter {
                    true => self.propose(step, anchor, computed, width)?,
                    false => self.drafts(width),
                };
                let mut rows = vec![anchor];
                rows.extend_from_slice(proposals.tokens());
                let state = self.rows(&rows, computed, meanwhile)?;
                (proposals, state)
            }
        };
        let rows = 1 + proposals.tokens().len();
        out.sequence = Some(step.sequence);
        if !greedy {
            self.take_logits(rows)?;
        }
        let Some(sequence) = self.sequence.as_mut() else {
            return Err(DecodeError::UnknownSequence(step.sequence));
        };
        let position = computed as u32;
        if greedy {
            let best: Vec<TokenId> = state.best.iter().map(|&t| t as TokenId).collect();
            if let Some(row) = (0..rows).find(|&r| best[r] as usize >= self.vocab_size) {
                // No logit was larger than any: NaN.
                return Err(not_finite(position + row as u32));
            }
            let simulate = step.simulate_accepted;
            sequence
                .sampler
                .accept_best(position, &best[..rows], &proposals, simulate, out);
        } else {
            let block = Block {
                position,
                logits: &mut self.logits,
                proposals: &proposals,
                simulate_accepted: step.simulate_accepted,
            };
            sequence.sampler.accept(block, &mut self.scratch, out)?;
        }
        sequence.tokens.extend_from_slice(&out.tokens);
        sequence.computed = computed + out.tokens.len();
        Ok(())
    }
}

fn not_finite(position: u32) -> DecodeError {
    let what = "logits";
    DecodeError::NotFinite { what, position }
}

fn finite(row: &[f32], position: u32) -> Result<(), DecodeError> {
    match row.iter().all(|x| x.is_finite()) {
        true => Ok(()),
        false => Err(not_finite(position)),
    }
}

impl Decoder for CudaDecoder {
    fn limits(&self) -> Limits {
        Limits {
            vocab_size: self.vocab_size as u32,
            context_tokens: self.context as u32,
            sequences_max: 1,
            width_max: match &self.source {
                Some((_, width)) => *width,
                None => (self.block as u32).max(1),
            },
            page_tokens: 1,
            pages: self.context as u32,
        }
    }

    fn kv_usage(&self) -> KvUsage {
        let program = self.resident.program();
        let used = self.sequence.as_ref().map_or(0, |s| s.computed);
        KvUsage {
            pages_used: used as u32,
            kv_bytes: ((program.kv_bytes + program.draft_kv_bytes) / program.context * used) as u64,
        }
    }

    fn open(&mut self) -> Result<SequenceId, DecodeError> {
        if self.sequence.is_some() {
            return Err(DecodeError::NoFreeSequence { open: 1, max: 1 });
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequence = Some(Sequence {
            id,
            tokens: Vec::new(),
            computed: 0,
            sampler: Sampler::greedy(self.vocab_size as u32),
        });
        Ok(id)
    }

    fn configure(&mut self, id: SequenceId, config: SequenceConfig) -> Result<(), DecodeError> {
        let vocab_size = self.vocab_size as u32;
        let sequence = self.sequence(id)?;
        sequence.sampler = Sampler::new(config, vocab_size, &sequence.tokens);
        Ok(())
    }

    fn fork(&mut self, of: SequenceId, _position: u32) -> Result<Fork, DecodeError> {
        self.sequence(of)?;
        Err(DecodeError::NoFreeSequence { open: 1, max: 1 })
    }

    fn prefill(&mut self, id: SequenceId, tokens: &[TokenId]) -> Result<(), DecodeError> {
        self.append(id, tokens, 1, None)
    }

    fn step(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Result<(), DecodeError> {
        self.step_while(plan, out, &mut || {})
    }

    fn step_while(
        &mut self,
        plan: &StepPlan,
        out: &mut StepOutput,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), DecodeError> {
        out.reset(plan.sequences.len());
        let began = std::time::Instant::now();
        for (step, out) in plan.sequences.iter().zip(&mut out.sequences) {
            self.step_sequence(step, out, meanwhile)?;
        }
        out.timing.verify_us = began.elapsed().as_secs_f64() * 1e6;
        Ok(())
    }

    fn rewind(&mut self, id: SequenceId, position: u32) -> Result<(), DecodeError> {
        let sequence = self.sequence(id)?;
        if position as usize > sequence.tokens.len() {
            return Err(DecodeError::Position {
                position,
                tokens: sequence.tokens.len() as u32,
                why: "beyond the end",
            });
        }
        sequence.tokens.truncate(position as usize);
        sequence.computed = sequence.computed.min((position as usize).saturating_sub(1));
        sequence.sampler.rewind(&sequence.tokens);
        Ok(())
    }

    fn close(&mut self, id: SequenceId) {
        self.sequence = self.sequence.take().filter(|s| s.id != id);
    }

    fn tap(&mut self, id: SequenceId, tokens: &[TokenId], tap: Tap<'_>) -> Result<(), DecodeError> {
        match tap {
            Tap::Logits(sink) => self.append(id, tokens, 0, Some(sink))?,
            Tap::Hidden { .. } => {
                return Err(DecodeError::Fault(
                    "--device cuda does not hand out hidden states: use --device cpu".into(),
                ));
            }
            Tap::Draft { width, sink } => {
                self.prefill(id, tokens)?;
                self.tap_drafts(id, width as usize, sink)?;
            }
        }
        let sequence = self.sequence(id)?;
        let anchor = sequence.tokens.len().saturating_sub(1);
        sequence.computed = sequence.computed.min(anchor);
        Ok(())
    }
}
