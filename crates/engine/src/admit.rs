//! Who is computed: admission, prefixes, and what happens when KV pages run out.
//!
//! Owns the order in which room is made: kept prefixes go first, the least recently used before
//! others; then the newest session of the lowest priority is preempted; the last one standing ends
//! with `length`. Invariant: pages set aside for running sessions never exceed the pages there are,
//! unless a session runs alone.

use crate::Event;
use crate::engine::{Admission, Engine, tell};
use crate::event::{FinishReason, Finished, Stats};
use crate::prefix::{SHARED_TOKENS_MIN, Source, shared_tokens};
use crate::queue::Waiting;
use crate::session::{Phase, Session};
use model::SequenceId;
use model::decoder::{DecodeError, Decoder, Fork};
use std::sync::Arc;

/// A fork this much shorter than the prefix it was to share is worth a snapshot next time.
const SNAPSHOT_GAIN_MIN: usize = 32;
/// Prompts from this length on are kept at their end, for another answer to the same prompt.
const SNAPSHOT_PROMPT_MIN: usize = 64;
/// Sources tried for the longest fork.
const SOURCES_TRIED: usize = 3;

impl Engine {
    /// Runs `call` until it has room, giving up kept prefixes.
    pub(crate) fn with_room<T>(
        &mut self,
        mut call: impl FnMut(&mut dyn Decoder) -> Result<T, DecodeError>,
    ) -> Result<T, DecodeError> {
        loop {
            let result = call(&mut *self.decoder);
            let full = matches!(
                result,
                Err(DecodeError::KvFull { .. } | DecodeError::NoFreeSequence { .. })
            );
            match if full { self.prefixes.evict() } else { None } {
                Some(sequence) => self.decoder.close(sequence),
                None => return result,
            }
        }
    }

    /// Moves sessions that were preempted, then requests that wait, into computation.
    pub(crate) fn admit(&mut self) -> Result<(), DecodeError> {
        while let Some(i) = self.next_preempted() {
            if !self.fits(self.sessions[i].reserved_pages, 0) {
                return Ok(());
            }
            self.open(i)?;
            if self.sessions[i].phase == Phase::Preempted {
                return Ok(());
            }
        }
        while let Some(waiting) = self.next_waiting() {
            let Waiting {
                id,
                request,
                sender,
                submitted,
            } = waiting;
            let (request, sender) = (Arc::new(request), Arc::new(sender));
            let room = self.shared.tokens_max();
            let mut session = Session::new(id, request, sender, submitted, room);
            session.reserved_pages = self.pages_to_reserve(&session.request);
            self.metrics.prompt_tokens_total += session.prompt_tokens as u64;
            self.sessions.push(session);
            self.open(self.sessions.len() - 1)?;
        }
        Ok(())
    }

    fn next_preempted(&self) -> Option<usize> {
        let preempted = |i: &usize| self.sessions[*i].phase == Phase::Preempted;
        let order = |i: &usize| {
            let session = &self.sessions[*i];
            (std::cmp::Reverse(session.request.priority), session.id)
        };
        (0..self.sessions.len()).filter(preempted).min_by_key(order)
    }

    /// Takes the first request of the queue if there is room for it.
    fn next_waiting(&self) -> Option<Waiting> {
        if self.next_preempted().is_some() {
            return None;
        }
        let mut state = self.shared.lock();
        let first = state.waiting.first_entry()?;
        let request = &first.get().request;
        let pages = self.pages_to_reserve(request) * request.samples;
        if !self.fits(pages, request.samples) {
            return None;
        }
        let waiting = first.remove();
        state.waiting_tokens -= waiting.request.prompt.len();
        Some(waiting)
    }

    /// True when `samples` more samples and `pages` more pages can be had; always when nothing runs.
    fn fits(&self, pages: u32, samples: u32) -> bool {
        let mut running = self.sessions.iter().filter(|s| s.phase != Phase::Preempted);
        let taken: u32 = self.sessions.iter().map(|s| 1 + s.siblings_due).sum();
        let slots = self.options.slots(&self.limits);
        let room = self.claimed_pages().saturating_add(pages) <= self.limits.pages;
        running.next().is_none() || (taken + samples <= slots && room)
    }

    /// Pages that running sessions hold or may claim.
    pub(crate) fn claimed_pages(&self) -> u32 {
        let claims = self
            .sessions
            .iter()
            .filter(|s| s.phase != Phase::Preempted)
            .map(|session| {
                let now = session.tokens.len() as u32 + self.limits.width_max;
                session.reserved_pages.max(self.pages(now)) * (1 + session.siblings_due)
            });
        claims.sum()
    }

    fn pages(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.limits.page_tokens.max(1))
    }

    fn pages_to_reserve(&self, request: &crate::Request) -> u32 {
        let room = self.shared.tokens_max() - request.prompt.len() as u32;
        let answer = request.stop.max_tokens.map_or(room, |max| max.min(room));
        let answer = match self.options.admission {
            Admission::WorstCase => answer,
            Admission::Preempt { headroom_tokens } => answer.min(headroom_tokens),
        };
        let tokens = request.prompt.len() as u32 + answer + self.limits.width_max;
        self.pages(tokens.min(self.shared.tokens_max()))
    }

    /// Gives session `i` a sequence: a fork of the longest prefix at hand, or an empty one.
    fn open(&mut self, i: usize) -> Result<(), DecodeError> {
        tell(&mut self.untold);
        let fork = match self.options.prefix_cache && self.sessions[i].prompt_logprobs.is_empty() {
            true => self.fork_prefix(i)?,
            false => None,
        };
        let opened = match fork {
            Some(fork) => Ok(fork),
            None => self.with_room(|decoder| {
                decoder.open().map(|sequence| Fork {
                    sequence,
                    position: 0,
                })
            }),
        };
        let fork = match opened {
            Ok(fork) => fork,
            Err(DecodeError::NoFreeSequence { .. }) if self.sessions.len() > 1 => {
                self.sessions[i].phase = Phase::Preempted; // waits for a sequence to end
                return Ok(());
            }
            Err(error) => return self.blame(i, error),
        };
        let session = &mut self.sessions[i];
        session.sequence = fork.sequence;
        session.phase = Phase::Prefill {
            done: fork.position as usize,
        };
        if session.stats.preemptions == 0 {
            let cached = fork.position.saturating_sub(1);
            session.stats.cached_tokens = cached;
            self.metrics.prefix_hits_total += u64::from(cached);
            self.metrics.prefix_queries_total += session.prompt_tokens as u64;
        }
        let config = session.config();
        self.decoder.configure(fork.sequence, config)
    }

    /// Forks what has most in common with session `i`. A sliding layer may not reach back to
    /// where the texts part; then a few other sources are tried, and the place is remembered so
    /// that this session leaves a snapshot there.
    fn fork_prefix(&mut self, i: usize) -> Result<Option<Fork>, DecodeError> {
        let mut sources = self.sources(i);
        sources.sort_by_key(|source| std::cmp::Reverse(source.shared));
        let wanted = sources.first().map_or(0, |source| source.shared);
        let mut best: Option<Fork> = None;
        for source in sources.into_iter().take(SOURCES_TRIED) {
            let reached = best.map_or(0, |fork| fork.position as usize);
            if reached >= source.shared {
                break;
            }
            // The source is now the last to be given up for want of room.
            self.prefixes.touch(source.sequence);
            let (of, shared) = (source.sequence, source.shared as u32);
            let fork = match self.with_room(|decoder| decoder.fork(of, shared)) {
                Ok(fork) => fork,
                Err(error @ DecodeError::Fault(_)) => return Err(error),
                Err(_) => continue, // no room or out of reach: compute instead
            };
            let better = fork.position as usize > reached.max(SHARED_TOKENS_MIN - 1);
            let worse = if better {
                best.replace(fork)
            } else {
                Some(fork)
            };
            if let Some(fork) = worse {
                self.decoder.close(fork.sequence);
            }
        }
        let reached = best.map_or(0, |fork| fork.position as usize);
        if wanted >= reached + SNAPSHOT_GAIN_MIN && wanted < self.sessions[i].tokens.len() {
            self.sessions[i].keep_at = Some(wanted);
        }
        Ok(best)
    }

    /// Kept and running sequences that begin like session `i`.
    fn sources(&self, i: usize) -> Vec<Source> {
        let session = &self.sessions[i];
        let key = &session.request.isolation_key;
        let mut sources: Vec<Source> = self.prefixes.find(key, &session.tokens).collect();
        for other in self
            .sessions
            .iter()
            .filter(|s| s.request.isolation_key == *key)
        {
            let held = match other.phase {
                Phase::Prefill { done } => done,
                Phase::Decode => other.tokens.len(),
                Phase::Preempted | Phase::Ended => continue,
            };
            let shared = shared_tokens(&other.tokens[..held], &session.tokens);
            if shared >= SHARED_TOKENS_MIN {
                sources.push(Source {
                    sequence: other.sequence,
                    shared,
                });
            }
        }
        sources
    }

    /// Keeps a snapshot of session `i`, which has computed exactly `tokens` tokens.
    pub(crate) fn snapshot(&mut self, i: usize, tokens: usize) {
        let free = self.limits.sequences_max as usize > self.sessions.len() + self.prefixes.len();
        if !self.options.prefix_cache || !free {
            return;
        }
        let session = &self.sessions[i];
        let Ok(fork) = self.decoder.fork(session.sequence, tokens as u32) else {
            return; // a snapshot is a convenience
        };
        let key = session.request.isolation_key.clone();
        let kept = session.tokens[..fork.position as usize].to_vec();
        self.keep(fork.sequence, &key, kept);
    }

    pub(crate) fn snapshot_prompt(&mut self, i: usize) {
        let tokens = self.sessions[i].tokens.len();
        if tokens >= SNAPSHOT_PROMPT_MIN {
            self.snapshot(i, tokens);
        }
    }

    fn keep(&mut self, sequence: SequenceId, key: &str, tokens: Vec<model::TokenId>) {
        if let Some(double) = self.prefixes.keep(sequence, key, tokens) {
            self.decoder.close(double);
        }
        while self.prefixes.len() > self.options.prefixes_max {
            if let Some(sequence) = self.prefixes.evict() {
                self.decoder.close(sequence);
            }
        }
    }

    /// An ended session's sequence is kept for its prefix, or closed.
    pub(crate) fn retire(&mut self, session: Session) {
        let Some(held) = session.held else {
            return;
        };
        if self.options.prefix_cache && held >= SHARED_TOKENS_MIN {
            let mut tokens = session.tokens;
            tokens.truncate(held);
            self.keep(session.sequence, &session.request.isolation_key, tokens);
        } else {
            self.decoder.close(session.sequence);
        }
    }

    /// Makes room by preempting one session; false when there is none to spare. The last one
    /// standing ends.
    pub(crate) fn preempt_one(&mut self) -> bool {
        let holds = |s: &&mut Session| matches!(s.phase, Phase::Prefill { .. } | Phase::Decode);
        let mut running: Vec<&mut Session> = self.sessions.iter_mut().filter(holds).collect();
        running.sort_by_key(|s| (std::cmp::Reverse(s.request.priority), s.id, s.sample));
        let alone = running.len() == 1;
        let Some(session) = running.pop() else {
            return false;
        };
        if alone {
            session.finish(FinishReason::Length);
            session.held = None;
        } else {
            session.phase = Phase::Preempted;
            session.stats.preemptions += 1;
            self.metrics.preemptions_total += 1;
        }
        let sequence = session.sequence;
        self.decoder.close(sequence);
        true
    }

    /// Ends session `i` with what the decoder said; hands on what concerns everyone.
    pub(crate) fn blame(&mut self, i: usize, error: DecodeError) -> Result<(), DecodeError> {
        if matches!(error, DecodeError::Fault(_)) {
            return Err(error);
        }
        let session = &mut self.sessions[i];
        let opened = session.phase != Phase::Preempted;
        session.finish(FinishReason::Error(error.to_string()));
        session.held = None;
        if opened {
            self.decoder.close(session.sequence);
        }
        Ok(())
    }

    /// Ends a request that was never admitted.
    pub(crate) fn refuse(&mut self, waiting: Waiting, reason: FinishReason) {
        self.metrics.finished_total[reason.index()] += u64::from(waiting.request.samples);
        for sample in 0..waiting.request.samples {
            let stats = Stats {
                prompt_tokens: waiting.request.prompt.len() as u32,
                queue_ms: waiting.submitted.elapsed().as_secs_f64() * 1e3,
                ..Stats::default()
            };
            waiting.sender.push(Event::Finished(Box::new(Finished {
                request: waiting.id,
                sample,
                reason: reason.clone(),
                text: String::new(),
                stats,
            })));
        }
        waiting.sender.notify();
    }
}
