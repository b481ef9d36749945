//! Steps of [`CudaDecoder`] with the drafter on the device, and runs of many steps without the host.
//!
//! Greedy drafts never leave the device; at a temperature, or with a least chance, drafter and target
//! are two launches with the host's sampler between and after them. Invariant: the block is as wide as
//! the sequence has room for, whatever the width of the step (as `model::reference`).

use model::decoder::{DecodeError, SequenceId, SequenceStep, TokenId};
use model::reference::sample::confidence;
use model::sampler::{Chance, Proposals};

use super::{CudaDecoder, fault, finite};
use crate::layout::{STOPS_MAX, StepState};
use crate::resident::Walk;
use crate::ring::Given;

/// What a run of many steps is asked for.
#[derive(Clone, Copy, Debug)]
pub struct RunPlan<'a> {
    /// Rows of a step; 1 leaves the drafter out.
    pub width: usize,
    /// Tokens at most.
    pub count: usize,
    /// Tokens that end it, at most 8.
    pub stops: &'a [TokenId],
    /// Benchmarks only: take so many drafts as right.
    pub simulate_accepted: Option<u32>,
}

/// What a run has done.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunDone {
    /// Steps.
    pub steps: u32,
    /// Drafted tokens.
    pub drafted: u32,
    /// Of which right.
    pub kept: u32,
    /// Index into [`crate::layout::REASONS`].
    pub reason: u32,
}

impl CudaDecoder {
    /// Rows of the drafter's block where `computed` positions are in the caches.
    fn block_at(&self, computed: usize, width: usize) -> usize {
        self.block.min(self.context - computed - 1).max(width)
    }

    fn anchor_state(&self, anchor: TokenId, computed: usize, width: usize) -> StepState {
        let mut state = StepState {
            rows: width as i32,
            position: computed as i32,
            block: self.block_at(computed, width) as i32,
            block_max: self.block as i32,
            width: width as i32,
            ..StepState::default()
        };
        state.tokens[0] = anchor as i32;
        state
    }

    /// Draft and verify in one launch; the device's choices after every row.
    pub(super) fn drafted_step(
        &mut self,
        anchor: TokenId,
        computed: usize,
        width: usize,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(Proposals, StepState), DecodeError> {
        let state = self.anchor_state(anchor, computed, width);
        let state = self.walk(&state, Walk::Whole, meanwhile)?;
        let mut proposals = Proposals::default();
        for &draft in &state.tokens[1..width] {
            proposals.push(draft as TokenId);
        }
        Ok((proposals, state))
    }

    /// Drafts by the host's sampler from the device's logits.
    pub(super) fn propose(
        &mut self,
        step: &SequenceStep,
        anchor: TokenId,
        computed: usize,
        width: usize,
    ) -> Result<Proposals, DecodeError> {
        let state = self.anchor_state(anchor, computed, width);
        self.walk(&state, Walk::Draft, &mut || {})?;
        self.take_logits(width)?;
        let (mut proposals, mut chance) = (Proposals::default(), Chance::default());
        let Some(sequence) = self.sequence.as_mut() else {
            return Err(DecodeError::UnknownSequence(step.sequence));
        };
        let rows = self.logits.chunks_exact(self.vocab_size).skip(1);
        for (slot, logits) in (1..width as u32).zip(rows) {
            let largest = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
            if chance.next(confidence(logits, largest)) < step.chance_min {
                break;
            }
            let index = computed as u32 + slot;
            sequence.sampler.propose(index, logits, &mut proposals)?;
        }
        Ok(proposals)
    }

    /// Logits of a block of `width` rows from the last token as anchor.
    pub(super) fn tap_drafts(
        &mut self,
        id: SequenceId,
        width: usize,
        sink: &mut dyn FnMut(u32, &[f32]),
    ) -> Result<(), DecodeError> {
        let width = width.min(self.block);
        let sequence = self.sequence(id)?;
        let (Some(&anchor), computed) = (sequence.tokens.last(), sequence.computed) else {
            return Ok(());
        };
        if width < 2 {
            return Ok(());
        }
        let mut state = self.anchor_state(anchor, computed, width);
        state.block = width as i32;
        self.walk(&state, Walk::Draft, &mut || {})?;
        self.take_logits(width)?;
        let rows = self.logits.chunks_exact(self.vocab_size).skip(1);
        for (slot, logits) in (1..).zip(rows) {
            finite(logits, computed as u32 + slot)?;
            sink(slot, logits);
        }
        Ok(())
    }

    /// Greedy tokens of a sequence that has at least one, in one launch: the device drafts, verifies, accepts and
    /// stops; `each` gets tokens as they come and may end the run by saying false.
    ///
    /// # Errors
    /// As a step's; more stop ids than the device knows.
    pub fn generate(
        &mut self,
        id: SequenceId,
        plan: &RunPlan<'_>,
        mut each: impl FnMut(Given) -> bool,
    ) -> Result<RunDone, DecodeError> {
        let context = self.context;
        let sequence = self.sequence(id)?;
        let (computed, length) = (sequence.computed, sequence.tokens.len());
        let Some(&anchor) = sequence.tokens.last() else {
            return Err(DecodeError::UnknownSequence(id));
        };
        if length >= context || plan.stops.len() > STOPS_MAX {
            let (wanted, limit) = (length as u64 + 1, context as u32);
            return Err(match length >= context {
                true => DecodeError::ContextFull { wanted, limit },
                false => DecodeError::Fault(format!("at most {STOPS_MAX} stop ids")),
            });
        }
        let width = plan.width.clamp(1, self.block.max(1)).min(context - length);
        let mut state = self.anchor_state(anchor, computed, width);
        (state.chain, state.limit) = (2, context as i32);
        state.left = plan.count.max(1) as i32;
        state.width = plan.width.clamp(1, self.block.max(1)) as i32;
        state.simulate = plan.simulate_accepted.map_or(0, |n| n as i32 + 1);
        state.stop_count = plan.stops.len() as i32;
        for (to, stop) in state.stops.iter_mut().zip(plan.stops) {
            *to = *stop as i32;
        }
        let walk = if plan.width > 1 {
            Walk::Whole
        } else {
            Walk::Verify
        };
        let mut tokens = Vec::new();
        let steps = plan.count.max(1) as u32;
        let end = self.resident.generate(&state, walk, steps, |given| {
            tokens.push(given.token as TokenId);
            each(given)
        });
        let end = end.map_err(fault)?;
        let sequence = self.sequence(id)?;
        sequence.sampler.append(length as u32, &tokens);
        sequence.tokens.extend_from_slice(&tokens);
        sequence.computed = sequence.tokens.len() - 1;
        Ok(RunDone {
            steps: end.steps as u32,
            drafted: end.drafted,
            kept: end.kept,
            reason: end.reason as u32,
        })
    }
}
