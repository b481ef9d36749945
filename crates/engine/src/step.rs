//! What is computed: a piece of a prompt, then one step for everyone who decodes.
//!
//! Owns fairness. Prompts take turns piece by piece, so that a short one does not wait for a long
//! one; a piece is no longer than running streams may be kept waiting, and after it they have
//! their share of the time. Invariant: a step that
//! fails for one sequence ends that request only, unless the device itself broke.

use crate::engine::{Engine, tell};
use crate::event::FinishReason;
use crate::session::Phase;
use crate::width::Candidate;
use model::TokenId;
use model::decoder::{DecodeError, SequenceStep, StepOutput, StepPlan, Tap, TokenLogprobs};
use model::reference::sample;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest piece of a prompt when nobody decodes: cancellation and heartbeat come between pieces.
const PIECE_MAX: Duration = Duration::from_millis(300);
/// Shortest piece, in tokens: below this a pass costs the same.
const PIECE_TOKENS_MIN: usize = 16;
/// First piece, before the speed is known.
const PIECE_TOKENS_FIRST: usize = 64;
/// Timed steps at each width in calibration, after one that is not.
const CALIBRATION_STEPS: usize = 3;
/// Calibration ends early when it takes longer; what it did not measure is learned on the way.
const CALIBRATION_MAX: Duration = Duration::from_secs(1);

impl Engine {
    /// Computes one piece of the prompt whose turn it is; false when there is none.
    pub(crate) fn prefill_piece(&mut self) -> Result<bool, DecodeError> {
        if self.owed_us > 0.0 && self.sessions.iter().any(|s| s.phase == Phase::Decode) {
            return Ok(false);
        }
        let count = self.sessions.len();
        let wants = |i: &usize| matches!(self.sessions[*i].phase, Phase::Prefill { .. });
        let mut turns = (0..count).map(|n| (self.prefill_turn + n) % count);
        let Some(i) = turns.find(|i| wants(i)) else {
            return Ok(false);
        };
        self.prefill_turn = i + 1;
        let session = &self.sessions[i];
        let Phase::Prefill { done } = session.phase else {
            return Ok(false);
        };
        let total = session.tokens.len();
        let goal = session.keep_at.filter(|at| *at > done).unwrap_or(total);
        let end = goal.min(done + self.piece_tokens());
        tell(&mut self.untold);
        if end > done {
            let start = Instant::now();
            if let Err(error) = self.prefill_range(i, done, end) {
                return self.prefill_failed(i, error).map(|()| true);
            }
            self.timed_prefill(end - done, start.elapsed());
        }
        self.sessions[i].phase = Phase::Prefill { done: end };
        if Some(end) == self.sessions[i].keep_at {
            self.snapshot(i, end);
        }
        if end == total {
            self.prompt_done(i)?;
        }
        Ok(true)
    }

    fn piece_tokens(&self) -> usize {
        let decoding = self.sessions.iter().any(|s| s.phase == Phase::Decode);
        let time = if decoding {
            self.options.prefill_stall
        } else {
            PIECE_MAX
        };
        let tokens = match self.prefill_rate > 0.0 {
            true => (self.prefill_rate * time.as_secs_f64() * 1e6) as usize,
            false => PIECE_TOKENS_FIRST,
        };
        tokens.clamp(
            PIECE_TOKENS_MIN,
            self.options.prefill_chunk_tokens.max(PIECE_TOKENS_MIN),
        )
    }

    fn timed_prefill(&mut self, tokens: usize, time: Duration) {
        let us = time.as_secs_f64() * 1e6;
        self.metrics.prefill_us_total += us;
        let share = self.options.prefill_share.clamp(0.01, 1.0);
        self.owed_us = us * (1.0 / share - 1.0);
        if tokens >= PIECE_TOKENS_MIN {
            let rate = tokens as f64 / us.max(1.0);
            self.prefill_rate = match self.prefill_rate > 0.0 {
                true => 0.7 * self.prefill_rate + 0.3 * rate,
                false => rate,
            };
        }
    }

    fn prefill_range(&mut self, i: usize, done: usize, end: usize) -> Result<(), DecodeError> {
        let sequence = self.sessions[i].sequence;
        let tokens: Vec<TokenId> = self.sessions[i].tokens[done..end].to_vec();
        if self.sessions[i].prompt_logprobs.is_empty() {
            return self.with_room(|decoder| decoder.prefill(sequence, &tokens));
        }
        let session = &self.sessions[i];
        let (prompt, count) = (session.request.clone(), session.request.prompt_logprobs);
        let mut found: Vec<(usize, TokenLogprobs)> = Vec::new();
        let mut buffer = Vec::new();
        self.with_room(|decoder| {
            let mut sink = |position: u32, logits: &[f32]| {
                let next = position as usize + 1;
                if let Some(token) = prompt.prompt.get(next) {
                    let top = count.unwrap_or(0);
                    found.push((next, sample::logprobs(logits, *token, top, &mut buffer)));
                }
            };
            decoder.tap(sequence, &tokens, Tap::Logits(&mut sink))
        })?;
        for (index, report) in found {
            self.sessions[i].prompt_logprobs[index] = Some(report);
        }
        Ok(())
    }

    fn prefill_failed(&mut self, i: usize, error: DecodeError) -> Result<(), DecodeError> {
        match error {
            DecodeError::KvFull { .. } if self.preempt_one() => Ok(()),
            error => self.blame(i, error),
        }
    }

    /// The prompt is computed: parallel samples begin, and it may have been all that was wanted.
    fn prompt_done(&mut self, i: usize) -> Result<(), DecodeError> {
        self.sessions[i].prefilled();
        self.snapshot_prompt(i);
        if self.sessions[i].generated() >= self.sessions[i].max_tokens {
            self.sessions[i].finish(FinishReason::Length);
            return Ok(());
        }
        let siblings = std::mem::take(&mut self.sessions[i].siblings_due);
        let (sequence, end) = (
            self.sessions[i].sequence,
            self.sessions[i].prompt_tokens as u32,
        );
        for sample in 1..=siblings {
            let forked = self.with_room(|decoder| decoder.fork(sequence, end));
            let room = self.shared.tokens_max();
            let fork = match forked {
                Ok(fork) => fork,
                Err(error @ DecodeError::Fault(_)) => return Err(error),
                Err(_) => {
                    // No room: computed from the start when there is.
                    let mut sibling = self.sessions[i].sibling(sample, sequence, room);
                    sibling.phase = Phase::Preempted;
                    self.sessions.push(sibling);
                    continue;
                }
            };
            let mut sibling = self.sessions[i].sibling(sample, fork.sequence, room);
            if fork.position < end {
                sibling.phase = Phase::Prefill {
                    done: fork.position as usize,
                };
            }
            self.decoder.configure(fork.sequence, sibling.config())?;
            self.sessions.push(sibling);
        }
        Ok(())
    }

    /// One step for everyone who decodes; false when there is nobody.
    pub(crate) fn step(&mut self) -> Result<bool, DecodeError> {
        let who = loop {
            let who = self.plan_step();
            if who.is_empty() {
                self.owed_us = 0.0;
                return Ok(false);
            }
            match self.compute() {
                Ok(us) => {
                    self.account(&who, us);
                    break who;
                }
                Err(error) => self.step_failed(&who, error)?,
            }
        };
        let start = Instant::now();
        self.deliver(&who);
        self.metrics.host_us_total += start.elapsed().as_secs_f64() * 1e6;
        Ok(true)
    }

    /// Runs the planned step, and wakes the readers of the last one while it is under way; microseconds
    /// that it took.
    fn compute(&mut self) -> Result<f64, DecodeError> {
        let start = Instant::now();
        let mut plan = std::mem::take(&mut self.plan);
        let mut out = std::mem::take(&mut self.out);
        let mut untold = std::mem::take(&mut self.untold);
        let mut told_us = 0.0;
        let stepped = self.with_room(|decoder| {
            let mut meanwhile = || told_us += tell(&mut untold);
            decoder.step_while(&plan, &mut out, &mut meanwhile)
        });
        told_us += tell(&mut untold);
        std::mem::swap(&mut self.untold, &mut untold);
        std::mem::swap(&mut self.plan, &mut plan);
        std::mem::swap(&mut self.out, &mut out);
        stepped?;
        self.metrics.host_us_total += told_us;
        let timing = self.out.timing;
        let device_us = timing.draft_us + timing.verify_us + timing.sample_us;
        // Waking counts as part of the step only where it was not hidden behind it.
        Ok((start.elapsed().as_secs_f64() * 1e6 - told_us).max(device_us))
    }

    /// Sessions of the next step.
    fn who_decodes(&self) -> Vec<usize> {
        let decodes = |i: &usize| {
            let session = &self.sessions[*i];
            session.phase == Phase::Decode && session.sender.stalled_for().is_none()
        };
        let who: Vec<usize> = (0..self.sessions.len()).filter(decodes).collect();
        match who.iter().find(|i| self.sessions[**i].suspect) {
            Some(suspect) => vec![*suspect],
            None => who,
        }
    }

    fn candidate(&self, i: usize) -> Candidate<'_> {
        let session = &self.sessions[i];
        Candidate {
            acceptance: &session.acceptance,
            width_max: session.width_max(self.limits.width_max),
            fixed: session.fixed_width(),
            width: 1,
            chance_min: 0.0,
        }
    }

    /// Fills the plan; returns the sessions in its order.
    fn plan_step(&mut self) -> Vec<usize> {
        let who = self.who_decodes();
        let mut candidates: Vec<_> = who.iter().map(|i| self.candidate(*i)).collect();
        self.costs.plan(&mut candidates);
        let widths: Vec<(u32, f32)> = candidates.iter().map(|c| (c.width, c.chance_min)).collect();
        self.plan.sequences.clear();
        for (i, (width, chance_min)) in who.iter().zip(widths) {
            let session = &mut self.sessions[*i];
            let simulate_accepted = session.simulate_accepted(width);
            self.plan.sequences.push(SequenceStep {
                sequence: session.sequence,
                width,
                // A count that is pretended needs the whole width.
                chance_min: if simulate_accepted.is_some() {
                    0.0
                } else {
                    chance_min
                },
                simulate_accepted,
            });
        }
        who
    }

    /// Counts a step of `us` microseconds and learns from it.
    fn account(&mut self, who: &[usize], us: f64) {
        let timing = self.out.timing;
        let metrics = &mut self.metrics;
        metrics.steps_total += 1;
        self.owed_us -= us;
        metrics.step_us_total += us;
        metrics.draft_us_total += timing.draft_us;
        metrics.verify_us_total += timing.verify_us;
        metrics.sample_us_total += timing.sample_us;
        let rows = self.out.sequences.iter().map(|out| out.drafted.len() + 1);
        let rows = rows.sum();
        let planned = self.plan.sequences.iter().map(|step| step.width as usize);
        let draft_rows = planned.filter(|width| *width > 1).sum();
        self.costs.measure(rows, us, draft_rows, timing.draft_us);
        let steps = self.plan.sequences.iter().zip(&self.out.sequences);
        for (i, (step, out)) in who.iter().zip(steps) {
            let drafted = out.drafted.len() as u32;
            self.metrics.draft.add(drafted, out.accepted);
            let acceptance = &mut self.sessions[*i].acceptance;
            self.costs.learn(
                acceptance,
                [step.width - 1, drafted, out.accepted],
                us,
                who.len(),
            );
        }
    }

    /// Gives every session what it got.
    fn deliver(&mut self, who: &[usize]) {
        let timing = self.out.timing;
        for (i, out) in who.iter().zip(&mut self.out.sequences) {
            let session = &mut self.sessions[*i];
            session.suspect = false;
            let before = session.stats.generated_tokens;
            let reason = session.advance(out, &timing, &*self.detokenizer);
            let new = session.stats.generated_tokens - before;
            self.metrics.generated_tokens_total += u64::from(new);
            if let Some(reason) = reason {
                session.finish(reason);
            }
        }
        // Not yet woken: that takes longer than the rest of this, and the next step can begin before. Those
        // that ended were.
        let sessions = who.iter().map(|i| &self.sessions[*i]);
        let running = sessions.filter(|session| session.phase != Phase::Ended);
        self.untold
            .extend(running.map(|session| Arc::clone(&session.sender)));
    }

    /// Makes room, or finds out whose fault it was; an error is everyone's.
    fn step_failed(&mut self, who: &[usize], error: DecodeError) -> Result<(), DecodeError> {
        match (error, who) {
            (error @ DecodeError::Fault(_), _) => Err(error),
            (DecodeError::KvFull { .. }, _) if self.preempt_one() => Ok(()),
            (error, [only]) => self.blame(*only, error),
            (_, _) => {
                // The sequences are unusable. All are computed again (same seeds, same text), each
                // alone until one step went well, so that the culprit meets the error by itself.
                for i in who {
                    let session = &mut self.sessions[*i];
                    session.suspect = true;
                    session.phase = Phase::Preempted;
                    session.stats.preemptions += 1;
                    self.decoder.close(session.sequence);
                }
                self.admit()
            }
        }
    }

    /// Measures a step at each width on a sequence of its own.
    pub(crate) fn calibrate(&mut self) -> Result<(), DecodeError> {
        let widest = self.limits.width_max;
        if widest < 2 || self.limits.context_tokens < 16 + widest * 4 {
            return Ok(());
        }
        let prompt: Vec<TokenId> = (0..8).map(|i| i % self.limits.vocab_size).collect();
        let (mut plan, mut out) = (StepPlan::default(), StepOutput::default());
        let (mut width, begin) = (1, Instant::now());
        loop {
            let sequence = self.decoder.open()?;
            self.decoder.prefill(sequence, &prompt)?;
            // The fastest: another process can only make a step slower.
            let mut best: Option<(f64, f64, usize)> = None;
            for timed in 0..=CALIBRATION_STEPS {
                plan.sequences.clear();
                plan.sequences.push(SequenceStep {
                    sequence,
                    width,
                    chance_min: 0.0,
                    simulate_accepted: Some(0),
                });
                let start = Instant::now();
                self.decoder.step(&plan, &mut out)?;
                let us = start.elapsed().as_secs_f64() * 1e6;
                let drafted = out.sequences[0].drafted.len() + 1;
                if timed > 0 && best.is_none_or(|(fastest, ..)| us < fastest) {
                    best = Some((us, out.timing.draft_us, drafted));
                }
            }
            if let Some((us, draft_us, drafted)) = best {
                let draft_rows = if drafted > 1 { drafted } else { 0 };
                self.costs.measure(drafted, us, draft_rows, draft_us);
            }
            self.decoder.close(sequence);
            self.shared.beat();
            if width == widest || begin.elapsed() > CALIBRATION_MAX {
                return Ok(());
            }
            width = (width * 2).min(widest);
        }
    }
}
