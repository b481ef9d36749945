//! One sample of a request while it is computed: what it holds, what it has said, its account.
//!
//! Owns stop rules and the account. Refuses to touch the decoder. Invariant: `tokens` is exactly
//! what the decoder's sequence holds, or would hold were it not preempted.

use crate::event::{Event, FinishReason, Finished, Piece, Stats, StepRecord};
use crate::request::{DraftWidth, Request, RequestId};
use crate::stream::Sender;
use crate::text::TextStream;
use crate::width::Acceptance;
use model::TokenId;
use model::decoder::{SequenceConfig, SequenceOutput, StepTiming};
use model::detokenizer::Detokenizer;
use model::random::sample_seed;
use model::{SequenceId, decoder::TokenLogprobs};
use std::sync::Arc;
use std::time::Instant;

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Without a sequence: preempted, waits for pages.
    Preempted,
    /// `tokens[..done]` are in the sequence.
    Prefill { done: usize },
    /// All but the last token are computed.
    Decode,
    /// Ended; its sequence is to be kept or closed.
    Ended,
}

pub(crate) struct Session {
    pub(crate) id: RequestId,
    pub(crate) sample: u32,
    pub(crate) request: Arc<Request>,
    pub(crate) sender: Arc<Sender>,
    pub(crate) sequence: SequenceId,
    pub(crate) phase: Phase,
    /// Prompt and answer.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) prompt_tokens: usize,
    /// Most tokens to generate.
    pub(crate) max_tokens: u32,
    /// Pages set aside for it.
    pub(crate) reserved_pages: u32,
    /// Parallel samples that begin when the prompt is computed.
    pub(crate) siblings_due: u32,
    /// Tokens in the sequence after the end; `None` when there is no sequence any more.
    pub(crate) held: Option<usize>,
    /// Index of the reason of the end in `Metrics::REASONS`.
    pub(crate) ended: usize,
    /// A prefix of this length is worth keeping: other prompts begin with it.
    pub(crate) keep_at: Option<usize>,
    pub(crate) acceptance: Acceptance,
    /// Was in a step that failed without saying whose fault it was: is stepped alone.
    pub(crate) suspect: bool,
    pub(crate) prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub(crate) stats: Stats,
    pub(crate) submitted: Instant,
    pub(crate) admitted: Instant,
    pub(crate) decoding_since: Instant,
    text: TextStream,
    /// Fraction of a pretended acceptance that is still owed.
    simulated_rest: f64,
}

impl Session {
    pub(crate) fn new(
        id: RequestId,
        request: Arc<Request>,
        sender: Arc<Sender>,
        submitted: Instant,
        tokens_max: u32,
    ) -> Self {
        let prompt_tokens = request.prompt.len();
        let room = tokens_max - prompt_tokens as u32;
        let stop = &request.stop;
        let admitted = Instant::now();
        Self {
            id,
            sample: 0,
            sequence: SequenceId(u32::MAX),
            phase: Phase::Preempted,
            tokens: request.prompt.clone(),
            prompt_tokens,
            max_tokens: stop.max_tokens.map_or(room, |max| max.min(room)),
            reserved_pages: 0,
            siblings_due: request.samples - 1,
            held: None,
            ended: 0,
            keep_at: None,
            acceptance: Acceptance::default(),
            suspect: false,
            prompt_logprobs: match request.prompt_logprobs {
                Some(_) => vec![None; prompt_tokens],
                None => Vec::new(),
            },
            stats: Stats {
                prompt_tokens: prompt_tokens as u32,
                queue_ms: (admitted - submitted).as_secs_f64() * 1e3,
                simulated: request.simulate_acceptance.is_some(),
                ..Stats::default()
            },
            submitted,
            admitted,
            decoding_since: admitted,
            text: TextStream::new(stop.stop_strings.clone(), stop.include_stop_string),
            simulated_rest: 0.0,
            request,
            sender,
        }
    }

    /// Parallel sample `sample` of this session, which has computed the prompt and no more.
    pub(crate) fn sibling(&self, sample: u32, sequence: SequenceId, tokens_max: u32) -> Self {
        let request = Arc::clone(&self.request);
        let sender = Arc::clone(&self.sender);
        let mut other = Self::new(self.id, request, sender, self.submitted, tokens_max);
        other.sample = sample;
        other.siblings_due = 0;
        other.prompt_logprobs = Vec::new();
        other.sequence = sequence;
        other.phase = self.phase;
        other.reserved_pages = self.reserved_pages;
        other.stats = self.stats.clone();
        other.stats.cached_tokens = self.stats.prompt_tokens.saturating_sub(1);
        other.admitted = self.admitted;
        other
    }

    /// How the decoder is to choose this sample's tokens, from where it stands now.
    pub(crate) fn config(&self) -> SequenceConfig {
        let (request, stop) = (&self.request, &self.request.stop);
        let mut sampling = request.sampling.clone();
        sampling.seed = sample_seed(sampling.seed, self.sample);
        sampling.min_tokens = stop.min_tokens;
        sampling.forbidden_until_min = Vec::new();
        if stop.min_tokens > 0 {
            let eos = stop.eos_ids.iter().filter(|_| !stop.ignore_eos);
            sampling.forbidden_until_min = eos.chain(&stop.stop_ids).copied().collect();
        }
        let constraint = request.constraint.as_ref().map(|make| {
            let mut constraint = make();
            if self.generated() > 0 {
                constraint.commit(&self.tokens[self.prompt_tokens..]);
            }
            constraint
        });
        SequenceConfig {
            sampling,
            prompt_tokens: self.prompt_tokens as u32,
            logprobs: request.logprobs,
            constraint,
        }
    }

    pub(crate) fn generated(&self) -> u32 {
        (self.tokens.len() - self.prompt_tokens) as u32
    }

    /// Widest step that cannot overshoot what may be generated.
    pub(crate) fn width_max(&self, decoder_max: u32) -> u32 {
        // Drafters learn from anchors inside answers: what follows a prompt they guess (kilotok-mini's
        // first block was rejected whole in all of four traces).
        if self.generated() == 0 && self.request.draft == DraftWidth::Auto {
            return 1;
        }
        let left = self.max_tokens.saturating_sub(self.generated());
        decoder_max.min(left).max(1)
    }

    /// The width the request insists on.
    pub(crate) fn fixed_width(&self) -> Option<u32> {
        match self.request.draft {
            DraftWidth::Off => Some(1),
            DraftWidth::Fixed(width) => Some(width.max(1)),
            DraftWidth::Auto => None,
        }
    }

    /// Drafts to take as accepted in a step of `width` rows, in benchmarks.
    pub(crate) fn simulate_accepted(&mut self, width: u32) -> Option<u32> {
        let length = self.request.simulate_acceptance?;
        self.simulated_rest += length - 1.0;
        let accepted = (self.simulated_rest + 1e-9)
            .floor()
            .min(f64::from(width - 1));
        self.simulated_rest = (self.simulated_rest - accepted).min(f64::from(width));
        Some(accepted as u32)
    }

    /// The prompt is computed.
    pub(crate) fn prefilled(&mut self) {
        let now = Instant::now();
        self.phase = Phase::Decode;
        if self.generated() == 0 {
            self.stats.prefill_ms = (now - self.admitted).as_secs_f64() * 1e3;
            self.decoding_since = now;
        }
        if !self.prompt_logprobs.is_empty() {
            let rows = std::mem::take(&mut self.prompt_logprobs);
            self.sender.push(Event::Prompt(rows));
            // Alone it may be more than a reader may leave unread, and no step would follow.
            self.sender.notify();
        }
    }

    /// Takes in what a step gave: emits a piece, and the end when it is one.
    pub(crate) fn advance(
        &mut self,
        out: &mut SequenceOutput,
        timing: &StepTiming,
        detokenizer: &dyn Detokenizer,
    ) -> Option<FinishReason> {
        let mut piece = Piece {
            sample: self.sample,
            step: self.request.trace.then(|| self.record(out, timing)),
            ..Piece::default()
        };
        self.tokens.extend_from_slice(&out.tokens);
        let reason = self.read(out, &mut piece, detokenizer);
        let kept = piece.tokens.len();
        piece
            .logprobs
            .extend(out.logprobs.drain(..kept.min(out.logprobs.len())));
        self.charge(out, timing, kept as u32);
        self.sender.push(Event::Piece(piece));
        reason
    }

    /// Enters a step that gave `tokens` tokens into the account.
    fn charge(&mut self, out: &SequenceOutput, timing: &StepTiming, tokens: u32) {
        let stats = &mut self.stats;
        if stats.generated_tokens == 0 {
            stats.ttft_ms = self.submitted.elapsed().as_secs_f64() * 1e3;
        }
        stats.generated_tokens += tokens;
        stats.draft.add(out.drafted.len() as u32, out.accepted);
        stats.draft_us += timing.draft_us;
        stats.verify_us += timing.verify_us;
        stats.sample_us += timing.sample_us;
        stats.decode_ms = self.decoding_since.elapsed().as_secs_f64() * 1e3;
    }

    /// Applies the stop rules token by token.
    fn read(
        &mut self,
        out: &SequenceOutput,
        piece: &mut Piece,
        detokenizer: &dyn Detokenizer,
    ) -> Option<FinishReason> {
        let request = Arc::clone(&self.request);
        let stop = &request.stop;
        let mut bytes = Vec::new();
        for &token in &out.tokens {
            piece.tokens.push(token);
            let count = self.stats.generated_tokens + piece.tokens.len() as u32;
            let may_stop = count > stop.min_tokens;
            if may_stop && !stop.ignore_eos && stop.eos_ids.contains(&token) {
                return Some(FinishReason::Eos(token));
            }
            if may_stop && stop.stop_ids.contains(&token) {
                return Some(FinishReason::StopToken(token));
            }
            bytes.clear();
            detokenizer.append(token, &mut bytes);
            if let Some(i) = self.text.push(&bytes, may_stop, &mut piece.text) {
                return Some(FinishReason::StopString(stop.stop_strings[i].clone()));
            }
            if count >= self.max_tokens {
                return Some(FinishReason::Length);
            }
        }
        None
    }

    fn record(&self, out: &SequenceOutput, timing: &StepTiming) -> StepRecord {
        StepRecord {
            step: self.stats.draft.steps as u32,
            request: self.id.0,
            position: out.position,
            width: out.width,
            drafted: out.drafted.clone(),
            accepted: out.accepted,
            bonus: out.tokens.last().copied().unwrap_or_default(),
            draft_us: timing.draft_us,
            verify_us: timing.verify_us,
        }
    }

    /// Emits the end, also of the parallel samples that never began.
    pub(crate) fn finish(&mut self, reason: FinishReason) {
        let mut text = String::new();
        // A stop string swallows what was held back; any other end releases it.
        self.text.finish(&mut text);
        let stats = &mut self.stats;
        let device_us = stats.draft_us + stats.verify_us + stats.sample_us;
        stats.host_us = (stats.decode_ms * 1e3 - device_us).max(0.0);
        self.held = match self.phase {
            Phase::Prefill { done } => Some(done),
            Phase::Decode => Some(self.tokens.len()),
            Phase::Preempted | Phase::Ended => None,
        };
        self.phase = Phase::Ended;
        self.ended = reason.index();
        for sibling in 0..=self.siblings_due {
            self.sender.push(Event::Finished(Box::new(Finished {
                request: self.id,
                sample: self.sample + sibling,
                reason: reason.clone(),
                text: std::mem::take(&mut text),
                stats: self.stats.clone(),
            })));
        }
        self.sender.notify();
    }
}
