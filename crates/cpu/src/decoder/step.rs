//! One step: draft, verify, accept and commit, for sequences whose rows fit one forward pass.

use std::time::Instant;

use model::decoder::{DecodeError, Limits, SequenceOutput, SequenceStep, StepPlan, StepTiming};
use model::draft::DraftConfig;
use model::sampler::{Block, Chance, Proposals};

use super::{CpuDecoder, ROWS_MAX, Sequence};
use crate::kv::KvSequence;
use crate::network::{Batch, BatchRow};
use crate::pool::Team;
use crate::sample::confidence;

impl CpuDecoder {
    /// Steps `plan[range]`, whose rows fit one forward pass.
    pub(super) fn step_group(
        &mut self,
        plan: &[SequenceStep],
        out: &mut [SequenceOutput],
        timing: &mut StepTiming,
    ) -> Result<u64, DecodeError> {
        let start = Instant::now();
        while self.work.proposals.len() < plan.len() {
            self.work.proposals.push(Proposals::default());
        }
        if self.work.group.iter().any(|&(_, width)| width > 1) {
            self.catch_up();
        }
        self.draft(plan)?;
        let drafted = Instant::now();
        self.work.rows.clear();
        for (i, &(index, _)) in self.work.group.iter().enumerate() {
            let sequence = &self.sequences[index];
            let anchor = sequence.tokens[sequence.computed];
            let drafts = self.work.proposals[i].tokens();
            for (offset, &token) in std::iter::once(&anchor).chain(drafts).enumerate() {
                self.work.rows.push(BatchRow {
                    sequence: i,
                    position: sequence.computed + offset,
                    token,
                });
            }
        }
        let bytes = self.forward(None, true);
        let verified = Instant::now();
        self.accept(plan, out)?;
        let accepted = Instant::now();
        self.keep_context();
        timing.draft_us += micros(start, drafted) + micros(accepted, Instant::now());
        timing.verify_us += micros(drafted, verified);
        timing.sample_us += micros(verified, accepted);
        Ok(bytes)
    }

    /// Fills the proposals of the group.
    fn draft(&mut self, plan: &[SequenceStep]) -> Result<(), DecodeError> {
        let work = &mut self.work;
        for proposals in &mut work.proposals {
            proposals.clear();
        }
        if let Some((source, _)) = &mut self.source {
            for (i, &(index, width)) in work.group.iter().enumerate() {
                work.drafts.clear();
                if width > 1 {
                    source.propose(&self.sequences[index].tokens, width - 1, &mut work.drafts);
                }
                for &draft in &work.drafts {
                    work.proposals[i].push(draft);
                }
            }
            return Ok(());
        }
        self.draft_rows(true);
        if self.work.wanted.is_empty() {
            return Ok(());
        }
        self.run_drafter();
        let vocab = self.network.config.vocab_size;
        let mut slot = 0;
        for (i, &(index, width)) in self.work.group.iter().enumerate() {
            let (sequence, mut chance) = (&self.sequences[index], Chance::default());
            for offset in 1..width {
                // SAFETY: the pool is idle; logits were written by the run above.
                let row = unsafe { self.scratch.logits.read(slot * vocab..(slot + 1) * vocab) };
                if plan[i].chance_min > 0.0 {
                    // SAFETY: the network's instruction set is the machine's.
                    let sure = unsafe { confidence(self.network.isa, row) };
                    if chance.next(sure) < plan[i].chance_min {
                        slot += width - offset;
                        break;
                    }
                }
                let position = (sequence.computed + offset) as u32;
                sequence
                    .sampler
                    .propose(position, row, &mut self.work.proposals[i])?;
                slot += 1;
            }
        }
        Ok(())
    }

    /// Lays out the draft blocks of the group, `whole` or only as long as what is verified.
    pub(super) fn draft_rows(&mut self, whole: bool) {
        let work = &mut self.work;
        work.rows.clear();
        work.blocks.clear();
        work.wanted.clear();
        for (i, &(index, width)) in work.group.iter().enumerate() {
            let sequence = &self.sequences[index];
            let Some(drafter) = self.drafter.as_ref().filter(|_| width > 1) else {
                continue;
            };
            let anchor = sequence.computed;
            let block = match whole {
                true => block_rows(&drafter.config, self.limits, sequence.tokens.len(), width),
                false => width,
            };
            for offset in 0..block {
                if (1..width).contains(&offset) {
                    work.wanted.push(work.rows.len() as u32);
                }
                work.rows.push(BatchRow {
                    sequence: i,
                    position: anchor + offset,
                    token: sequence.tokens[anchor],
                });
                work.blocks.push(anchor..anchor + block);
            }
        }
    }

    pub(super) fn run_drafter(&mut self) {
        let drafter = self.drafter.as_ref().expect("rows were laid out for it");
        let vocab = self.network.config.vocab_size;
        let rows = self.work.rows.len();
        self.scratch.reach(rows, self.work.wanted.len() * vocab);
        let last = self.work.rows.iter().map(|row| row.position + 1).max();
        for table in &mut self.network.ropes {
            table.reach(last.unwrap_or(0));
        }
        let sequences = gather(&self.sequences, &self.work.group);
        let batch = Batch {
            rows: &self.work.rows,
            sequences: &sequences,
            cache: &self.cache,
            scratch: &self.scratch,
            taps: &[],
        };
        let (blocks, wanted) = (&self.work.blocks, &self.work.wanted);
        self.pool.run(&|team: Team<'_>| {
            let mut attention = self.threads[team.thread].lock().expect("its own");
            drafter.block(&self.network, team, &batch, blocks, wanted, &mut attention);
        });
    }

    /// Judges the verified blocks, commits their tokens, and lists the rows that stay.
    fn accept(
        &mut self,
        plan: &[SequenceStep],
        out: &mut [SequenceOutput],
    ) -> Result<(), DecodeError> {
        let vocab = self.network.config.vocab_size;
        self.work.taken.clear();
        let mut row = 0;
        for (i, (step, out)) in plan.iter().zip(out).enumerate() {
            let index = self.work.group[i].0;
            let rows = self.work.proposals[i].tokens().len() + 1;
            let logits = &mut self.scratch.logits.as_mut_slice()[row * vocab..(row + rows) * vocab];
            let sequence = &mut self.sequences[index];
            let block = Block {
                position: sequence.computed as u32,
                logits,
                proposals: &self.work.proposals[i],
                simulate_accepted: step.simulate_accepted,
            };
            out.sequence = Some(step.sequence);
            sequence
                .sampler
                .accept(block, &mut self.work.sampler, out)?;
            sequence.tokens.extend_from_slice(&out.tokens);
            sequence.computed += out.tokens.len();
            let kept = row as u32..(row + out.tokens.len()) as u32;
            self.work.taken.extend(kept);
            row += rows;
            let written = sequence.computed - out.tokens.len() + rows;
            self.cache.advance(&mut sequence.kv, written, false);
        }
        Ok(())
    }

    /// Checks a plan before anything is computed.
    pub(super) fn check_plan(&mut self, plan: &StepPlan) -> Result<(), DecodeError> {
        for step in &plan.sequences {
            let index = self.find(step.sequence)?;
            let sequence = &mut self.sequences[index];
            let (tokens, limit) = (sequence.tokens.len(), self.limits.context_tokens);
            if tokens == 0 {
                return Err(DecodeError::UnknownSequence(step.sequence));
            }
            if tokens as u64 >= u64::from(limit) {
                return Err(DecodeError::ContextFull {
                    wanted: tokens as u64 + 1,
                    limit,
                });
            }
            let width = clip(step.width, self.limits, tokens);
            let rows = match &self.drafter {
                Some(drafter) => block_rows(&drafter.config, self.limits, tokens, width),
                None => width,
            };
            let end = sequence.computed + rows;
            self.cache
                .reserve(&mut sequence.kv, sequence.computed, end)?;
        }
        Ok(())
    }
}

/// Rows that a step may verify.
pub(super) fn clip(width: u32, limits: Limits, tokens: usize) -> usize {
    let room = limits.context_tokens as usize - tokens;
    (width.clamp(1, limits.width_max) as usize).min(room.max(1))
}

/// Rows that the drafter computes for a step of `width`: a whole block, as in its training, of
/// whatever part is verified; no further than the context goes.
fn block_rows(config: &DraftConfig, limits: Limits, tokens: usize, width: usize) -> usize {
    let room = limits.context_tokens as usize - tokens;
    match width {
        0 | 1 => width,
        _ => (config.block_size as usize).min(room).max(width),
    }
}

/// The caches of a group, which is never empty; on the stack, because a step does not allocate.
/// Entries beyond the group repeat its first.
pub(super) fn gather<'a>(
    sequences: &'a [Sequence],
    group: &[(usize, usize)],
) -> [&'a KvSequence; ROWS_MAX] {
    let mut list = [&sequences[group[0].0].kv; ROWS_MAX];
    for (entry, &(i, _)) in list.iter_mut().zip(group) {
        *entry = &sequences[i].kv;
    }
    list
}

fn micros(from: Instant, to: Instant) -> f64 {
    (to - from).as_secs_f64() * 1e6
}

/// That a sequence of `tokens` can be cut at `position`.
pub(super) fn check_position(position: u32, tokens: usize) -> Result<(), DecodeError> {
    match position as usize <= tokens {
        true => Ok(()),
        false => Err(DecodeError::Position {
            position,
            tokens: tokens as u32,
            why: "beyond the end",
        }),
    }
}
