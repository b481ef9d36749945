//! From a request to a stream of parts: submits to the engine, waits without blocking a thread,
//! parses what the model says, and keeps the account.
//!
//! Invariant: dropping a [`Generation`] cancels the request in the engine and settles its account,
//! whatever the reason.

use crate::error::ApiError;
use crate::meter::Meter;
use crate::metrics::Metrics;
use crate::parse::{Parser, Part};
use crate::traces::Traced;
use engine::{
    EngineHandle, Event, FinishReason, Finished, Piece, Received, Request, Stats, Stream,
};
use model::TokenId;
use model::decoder::TokenLogprobs;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A part of an answer.
pub(crate) enum Output {
    /// Log-probabilities of a prompt.
    Prompt {
        prompt: u32,
        rows: Vec<Option<TokenLogprobs>>,
    },
    /// What one step gave one sample; its number is in `piece`.
    Delta { parts: Vec<Part>, piece: Piece },
    /// A sample is complete.
    End {
        sample: u32,
        parts: Vec<Part>,
        finish: Finish,
        stats: Box<Stats>,
    },
}

/// Why an answer ended, in the wire's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// End token, stop token, or stop string (which one).
    Stop(Option<StopCause>),
    /// Too long.
    Length,
    /// It asks for tools, and their arguments are JSON: malformed ones end as `stop`.
    ToolCalls,
    /// It could not be completed.
    Failed(ApiError),
}

/// What of the request ended a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StopCause {
    String(String),
    Token(TokenId),
}

impl Finish {
    /// OpenAI's `finish_reason`.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Stop(_) => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::Failed(_) => "error",
        }
    }
}

struct Sample {
    parser: Parser,
    calls: bool,
    last: Option<Instant>,
    tokens: u32,
    per_step: Vec<(u32, u32)>,
}

/// One prompt or several in the engine; sample `s` of prompt `p` of requests with `n` samples each
/// has number `p * n + s`.
pub(crate) struct Generation {
    lanes: Vec<Stream>,
    /// Lane to look at first, so that none is starved.
    turn: usize,
    notify: Arc<Notify>,
    samples: Vec<Sample>,
    samples_each: u32,
    metrics: Arc<Metrics>,
    submitted: Instant,
    meter: Option<Meter>,
    trace: Option<Traced>,
    prompt_tokens: u32,
}

impl Generation {
    /// Gives `request`, once for each of `prompts`, to the engine. `parser` makes the parser of each
    /// sample.
    pub(crate) fn submit(
        engine: &EngineHandle,
        metrics: &Arc<Metrics>,
        mut request: Request,
        prompts: Vec<Vec<TokenId>>,
        parser: impl Fn() -> Parser,
        meter: Option<Meter>,
    ) -> Result<Self, ApiError> {
        let notify = Arc::new(Notify::new());
        let wake = Arc::clone(&notify);
        request.notify = Some(Arc::new(move || wake.notify_one()));
        let sample = |_| Sample {
            parser: parser(),
            calls: false,
            last: None,
            tokens: 0,
            per_step: Vec::new(),
        };
        let samples_each = request.samples;
        let count = samples_each * prompts.len() as u32;
        let prompt_tokens = prompts.iter().map(|prompt| prompt.len() as u32).sum();
        let mut lanes = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let mut request = request.clone();
            request.prompt = prompt;
            lanes.push(engine.submit(request)?);
        }
        metrics.streams.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            lanes,
            turn: 0,
            notify,
            samples: (0..count).map(sample).collect(),
            samples_each,
            metrics: Arc::clone(metrics),
            submitted: Instant::now(),
            meter,
            trace: None,
            prompt_tokens,
        })
    }

    /// Its span ends with it.
    pub(crate) fn traced(mut self, trace: Option<Traced>) -> Self {
        self.trace = trace;
        self
    }

    /// Tokens of all prompts together.
    pub(crate) fn prompt_tokens(&self) -> u32 {
        self.prompt_tokens
    }

    /// Samples in all.
    pub(crate) fn samples(&self) -> u32 {
        self.samples.len() as u32
    }

    /// True while an account is open for it.
    pub(crate) fn is_metered(&self) -> bool {
        self.meter.is_some()
    }

    /// Settles the account, so that who hears of the end is charged for all of it whatever happens
    /// next.
    pub(crate) async fn settle(&mut self) {
        if let Some(meter) = self.meter.take() {
            meter.settle().await;
        }
    }

    /// `(drafted, accepted)` of each step of a sample, when traced.
    pub(crate) fn per_step(&self, sample: u32) -> &[(u32, u32)] {
        &self.samples[sample as usize].per_step
    }

    /// The next part; `None` after the last sample's end.
    pub(crate) async fn next(&mut self) -> Option<Output> {
        loop {
            match self.try_next() {
                Waited::Output(output) => return Some(output),
                Waited::End => return None,
                Waited::Nothing => self.notify.notified().await,
            }
        }
    }

    /// The next part if it comes in time.
    pub(crate) async fn next_within(&mut self, limit: Duration) -> Waited {
        match tokio::time::timeout(limit, self.next()).await {
            Ok(Some(output)) => Waited::Output(output),
            Ok(None) => Waited::End,
            Err(_) => Waited::Nothing,
        }
    }

    /// The next part if it is there.
    pub(crate) fn try_next(&mut self) -> Waited {
        let mut open = false;
        for i in 0..self.lanes.len() {
            let lane = (self.turn + i) % self.lanes.len();
            match self.lanes[lane].try_next() {
                Received::Event(event) => {
                    self.turn = lane + 1;
                    return Waited::Output(self.take(lane as u32, event));
                }
                Received::Nothing => open = true,
                Received::End => {}
            }
        }
        match open {
            true => Waited::Nothing,
            false => Waited::End,
        }
    }

    fn take(&mut self, lane: u32, event: Event) -> Output {
        let first = lane * self.samples_each;
        match event {
            Event::Prompt(rows) => Output::Prompt { prompt: lane, rows },
            Event::Piece(mut piece) => {
                piece.sample += first;
                self.piece(piece)
            }
            Event::Finished(mut end) => {
                end.sample += first;
                self.end(*end)
            }
        }
    }

    fn piece(&mut self, piece: Piece) -> Output {
        let now = Instant::now();
        let sample = &mut self.samples[piece.sample as usize];
        let count = piece.tokens.len() as u32;
        self.meter
            .iter_mut()
            .for_each(|meter| meter.generated(count));
        self.trace
            .iter_mut()
            .for_each(|trace| trace.generated(count));
        match sample.last {
            None => self.metrics.first_token.observe(now - self.submitted),
            Some(last) if count > 0 => {
                let each = (now - last) / count;
                for _ in 0..count {
                    self.metrics.inter_token.observe(each);
                }
            }
            Some(_) => {}
        }
        sample.last = Some(now);
        sample.tokens += count;
        if let Some(step) = &piece.step {
            sample
                .per_step
                .push((step.width.saturating_sub(1), step.accepted));
        }
        let mut parts = Vec::new();
        sample.parser.push(&piece.text, &mut parts);
        sample.calls |= parts.iter().any(|part| matches!(part, Part::Call { .. }));
        Output::Delta { parts, piece }
    }

    fn end(&mut self, end: Finished) -> Output {
        self.metrics.observe_end(&end, self.submitted.elapsed());
        if let Some(meter) = &mut self.meter {
            meter.cached(end.stats.cached_tokens);
        }
        let sample = &mut self.samples[end.sample as usize];
        let mut parts = Vec::new();
        sample.parser.push(&end.text, &mut parts);
        let complete = matches!(
            end.reason,
            FinishReason::Eos(_) | FinishReason::StopToken(_) | FinishReason::StopString(_)
        );
        let sound = sample.parser.finish(complete, &mut parts);
        sample.calls |= parts.iter().any(|part| matches!(part, Part::Call { .. }));
        let finish = finish(end.reason, sample.calls && sound);
        if let Some(trace) = &mut self.trace {
            trace.ended(&finish, &end.stats);
        }
        Output::End {
            sample: end.sample,
            parts,
            finish,
            stats: Box::new(end.stats),
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.metrics.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What [`Generation::next_within`] found.
pub(crate) enum Waited {
    Output(Output),
    Nothing,
    End,
}

fn finish(reason: FinishReason, calls: bool) -> Finish {
    match reason {
        FinishReason::Length => Finish::Length,
        FinishReason::Eos(_) | FinishReason::StopToken(_) | FinishReason::StopString(_)
            if calls =>
        {
            Finish::ToolCalls
        }
        FinishReason::Eos(_) => Finish::Stop(None),
        FinishReason::StopToken(token) => Finish::Stop(Some(StopCause::Token(token))),
        FinishReason::StopString(text) => Finish::Stop(Some(StopCause::String(text))),
        FinishReason::Deadline => Finish::Failed(ApiError {
            code: Some("deadline"),
            ..ApiError::new(
                axum::http::StatusCode::GATEWAY_TIMEOUT,
                "the time limit of the request passed before it was complete",
            )
        }),
        FinishReason::Error(message) => Finish::Failed(ApiError::internal(message)),
        _ => Finish::Failed(ApiError::unavailable(
            "the request was cancelled: the server is shutting down, or its reader stood still",
            "cancelled",
        )),
    }
}
