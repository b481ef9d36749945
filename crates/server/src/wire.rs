//! What the endpoints have in common on the way out: server-sent events, and answers collected whole.
//!
//! Invariants: everything a step gave leaves in one write; a stream ends with the protocol's own end
//! or an error event, never in between; a silent stream sends a comment now and then, so that proxies
//! keep it open while a long prompt is computed.

use crate::error::{ApiError, Dialect};
use crate::generate::{Finish, Generation, Output, Waited};
use crate::metrics::Metrics;
use crate::parse::{Part, join};
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, header};
use bytes::Bytes;
use engine::Stats;
use model::TokenId;
use model::decoder::TokenLogprobs;
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Turns parts into the events of a protocol.
pub(crate) trait Wire: Send + 'static {
    /// Before the first part.
    fn open(&mut self, generation: &Generation, out: &mut Events);
    /// One part.
    fn output(&mut self, output: Output, generation: &Generation, out: &mut Events);
    /// After the last sample's end.
    fn close(&mut self, generation: &Generation, out: &mut Events);
}

/// Events not yet sent.
#[derive(Default)]
pub(crate) struct Events {
    text: String,
    /// Nothing more is to be sent.
    ended: bool,
}

impl Events {
    /// `data: …`
    pub(crate) fn data(&mut self, value: &Value) {
        self.text.push_str("data: ");
        self.text.push_str(&value.to_string());
        self.text.push_str("\n\n");
    }

    /// `event: …` and `data: …`
    pub(crate) fn named(&mut self, name: &str, value: &Value) {
        self.text.push_str("event: ");
        self.text.push_str(name);
        self.text.push('\n');
        self.data(value);
    }

    /// OpenAI's end of a stream that cannot be completed.
    pub(crate) fn failed(&mut self, error: &ApiError) {
        self.data(&error.body(Dialect::OpenAi));
        self.done();
    }

    /// OpenAI's last line.
    pub(crate) fn done(&mut self) {
        self.text.push_str("data: [DONE]\n\n");
        self.ended = true;
    }

    /// Ends the stream without a further line.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }
}

/// More than this is not gathered into one write.
const WRITE_BYTES: usize = 16 << 10;

struct Live<W> {
    generation: Generation,
    wire: W,
    metrics: Arc<Metrics>,
    ping: Duration,
    opened: bool,
    ended: bool,
}

impl<W: Wire> Live<W> {
    /// The next bytes; `None` when the stream is over.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let mut events = Events::default();
        if !self.opened {
            self.opened = true;
            self.wire.open(&self.generation, &mut events);
            if !events.text.is_empty() {
                return Some(events.text.into());
            }
        }
        loop {
            match self.generation.next_within(self.ping).await {
                Waited::Nothing => return Some(Bytes::from_static(b": ping\n\n")),
                Waited::End => {
                    self.generation.settle().await;
                    self.finish(&mut events);
                }
                Waited::Output(output) => self.gather(output, &mut events),
            }
            self.ended = events.ended;
            if !events.text.is_empty() || self.ended {
                return Some(events.text.into());
            }
        }
    }

    /// Writes one part, and whatever else is there already.
    fn gather(&mut self, output: Output, events: &mut Events) {
        let start = Instant::now();
        self.wire.output(output, &self.generation, events);
        while !events.ended && events.text.len() < WRITE_BYTES {
            match self.generation.try_next() {
                Waited::Output(output) => self.wire.output(output, &self.generation, events),
                // The account comes first, and takes a while.
                Waited::End if self.generation.is_metered() => break,
                Waited::End => self.finish(events),
                Waited::Nothing => break,
            }
        }
        self.metrics.flush.observe(start.elapsed());
    }

    fn finish(&mut self, events: &mut Events) {
        self.wire.close(&self.generation, events);
        events.ended = true;
    }
}

/// A response that streams.
pub(crate) fn stream<W: Wire>(
    generation: Generation,
    wire: W,
    metrics: &Arc<Metrics>,
    ping: Duration,
) -> Response<Body> {
    let live = Live {
        generation,
        wire,
        metrics: Arc::clone(metrics),
        ping,
        opened: false,
        ended: false,
    };
    let chunks = futures_util::stream::unfold(live, |mut live| async move {
        let bytes = live.next().await?;
        Some((Ok::<_, std::convert::Infallible>(bytes), live))
    });
    let mut response = Response::new(Body::from_stream(chunks));
    set_headers(response.headers_mut());
    response
}

fn set_headers(headers: &mut HeaderMap) {
    let rows = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    for (name, value) in rows {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

/// One complete sample.
pub(crate) struct Answer {
    pub(crate) parts: Vec<Part>,
    pub(crate) finish: Finish,
    pub(crate) stats: Stats,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// Tokens of steps that gave reasoning only.
    pub(crate) reasoning_tokens: u32,
    pub(crate) per_step: Vec<(u32, u32)>,
}

/// Everything a request came to.
pub(crate) struct Collected {
    /// By number of the sample.
    pub(crate) answers: Vec<Answer>,
    /// By number of the prompt, when asked for.
    pub(crate) prompts: Vec<Vec<Option<TokenLogprobs>>>,
}

/// Waits for all samples.
///
/// # Errors
/// The first sample that failed.
pub(crate) async fn collect(mut generation: Generation) -> Result<Collected, ApiError> {
    let mut open: Vec<Answer> = (0..generation.samples()).map(|_| Answer::empty()).collect();
    let mut prompts = Vec::new();
    while let Some(output) = generation.next().await {
        match output {
            Output::Prompt { prompt, rows } => {
                let prompt = prompt as usize;
                prompts.resize_with(prompts.len().max(prompt + 1), Vec::new);
                prompts[prompt] = rows;
            }
            Output::Delta { parts, piece } => {
                let answer = &mut open[piece.sample as usize];
                if only_reasoning(&parts) {
                    answer.reasoning_tokens += piece.tokens.len() as u32;
                }
                answer.parts.extend(parts);
                answer.tokens.extend(piece.tokens);
                answer.logprobs.extend(piece.logprobs);
            }
            Output::End {
                sample,
                parts,
                finish,
                stats,
            } => {
                if let Finish::Failed(error) = finish {
                    return Err(error);
                }
                let answer = &mut open[sample as usize];
                answer.parts.extend(parts);
                answer.parts = join(std::mem::take(&mut answer.parts));
                answer.finish = finish;
                answer.stats = *stats;
                answer.per_step = generation.per_step(sample).to_vec();
            }
        }
    }
    generation.settle().await;
    let answers = open;
    Ok(Collected { answers, prompts })
}

pub(crate) fn only_reasoning(parts: &[Part]) -> bool {
    !parts.is_empty() && parts.iter().all(|part| matches!(part, Part::Reasoning(_)))
}

impl Answer {
    fn empty() -> Self {
        Self {
            parts: Vec::new(),
            finish: Finish::Length,
            stats: Stats::default(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            reasoning_tokens: 0,
            per_step: Vec::new(),
        }
    }

    /// The answer's text.
    pub(crate) fn content(&self) -> String {
        let text = |part: &Part| match part {
            Part::Content(text) => Some(text.clone()),
            _ => None,
        };
        self.parts.iter().filter_map(text).collect()
    }

    /// The thinking.
    pub(crate) fn reasoning(&self) -> String {
        let text = |part: &Part| match part {
            Part::Reasoning(text) => Some(text.clone()),
            _ => None,
        };
        self.parts.iter().filter_map(text).collect()
    }

    /// `(name, arguments)` of each call.
    pub(crate) fn calls(&self) -> Vec<(String, String)> {
        let mut calls: Vec<(String, String)> = Vec::new();
        for part in &self.parts {
            match part {
                Part::Call { name, .. } => calls.push((name.clone(), String::new())),
                Part::Arguments { text, .. } => {
                    if let Some((_, arguments)) = calls.last_mut() {
                        arguments.push_str(text);
                    }
                }
                Part::Content(_) | Part::Reasoning(_) => {}
            }
        }
        calls
    }
}
