//! Where requests enter: validation, the bounded queue, the handle that other threads hold.
//!
//! Owns everything shared between the engine thread and the rest, under one short lock. Invariants:
//! `submit` never waits for the engine; a request that can never be served is refused with the
//! field that is wrong; a full queue says how long the wait would be.

use crate::engine::EngineOptions;
use crate::metrics::Metrics;
use crate::request::{Rejected, Request, RequestId};
use crate::stream::{self, Sender, Stream, Wake};
use model::decoder::Limits;
use model::heartbeat::Heartbeat;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A request that waits for its turn.
pub(crate) struct Waiting {
    pub(crate) id: RequestId,
    pub(crate) request: Request,
    pub(crate) sender: Sender,
    pub(crate) submitted: Instant,
}

#[derive(Default)]
pub(crate) struct State {
    /// In the order in which they will be served.
    pub(crate) waiting: BTreeMap<(Reverse<i32>, u64), Waiting>,
    pub(crate) waiting_tokens: usize,
    pub(crate) metrics: Metrics,
    /// No new requests.
    pub(crate) draining: bool,
    /// Requests still unfinished then are cancelled.
    pub(crate) stop_at: Option<Instant>,
    pub(crate) stopped: bool,
    pub(crate) failure: Option<String>,
    /// Something happened that the engine thread should look at.
    signal: bool,
    next_id: u64,
    /// Mean time from admission to the end, 0 before any ended.
    pub(crate) service_s: f64,
}

pub(crate) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    pub(crate) heartbeat: Arc<Heartbeat>,
    pub(crate) limits: Limits,
    pub(crate) options: EngineOptions,
}

impl Shared {
    pub(crate) fn new(limits: Limits, options: EngineOptions) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            heartbeat: Arc::default(),
            limits,
            options,
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // The state is valid between any two statements that hold the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the engine thread, and whoever waits for it to stop.
    pub(crate) fn signal(&self) {
        self.lock().signal = true;
        self.changed.notify_all();
    }

    /// The engine thread is alive.
    pub(crate) fn beat(&self) {
        self.heartbeat.beat();
    }

    /// Waits until something was signalled, at most `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) {
        let mut state = self.lock();
        if !state.signal {
            let waited = self.changed.wait_timeout(state, timeout);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.signal = false;
    }

    /// Longest sequence the decoder can hold: the context, or all its pages.
    pub(crate) fn tokens_max(&self) -> u32 {
        let pages = self.limits.pages.saturating_mul(self.limits.page_tokens);
        self.limits.context_tokens.min(pages)
    }
}

/// Gives requests to an engine. Cheap to clone; any thread may use it.
#[derive(Clone)]
pub struct EngineHandle {
    pub(crate) shared: Arc<Shared>,
}

impl EngineHandle {
    /// Queues a request.
    ///
    /// # Errors
    /// See [`Rejected`].
    pub fn submit(&self, request: Request) -> Result<Stream, Rejected> {
        validate(&request, &self.shared)?;
        let mut state = self.shared.lock();
        if let Some(failure) = &state.failure {
            return Err(Rejected::Failed(failure.clone()));
        }
        if state.draining {
            return Err(Rejected::Draining);
        }
        let options = &self.shared.options;
        let tokens = state.waiting_tokens + request.prompt.len();
        if state.waiting.len() >= options.queue_requests_max
            || (tokens > options.queue_tokens_max && !state.waiting.is_empty())
        {
            state.metrics.rejected_total += 1;
            return Err(Rejected::Full {
                waiting: state.waiting.len(),
                retry_after_s: expected_wait_s(&state, self.slots()),
            });
        }
        let id = RequestId(state.next_id);
        let wake: Wake = {
            let shared = Arc::clone(&self.shared);
            Arc::new(move || shared.signal())
        };
        let (sender, stream) = stream::pipe(id, request.samples, request.notify.clone(), wake);
        let key = (Reverse(request.priority), id.0);
        state.next_id += 1;
        state.waiting_tokens = tokens;
        let submitted = Instant::now();
        state.waiting.insert(
            key,
            Waiting {
                id,
                request,
                sender,
                submitted,
            },
        );
        drop(state);
        self.shared.signal();
        Ok(stream)
    }

    /// What the decoder can hold.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    /// Longest sequence that can be served: prompt and answer together, in tokens.
    #[must_use]
    pub fn tokens_max(&self) -> u32 {
        self.shared.tokens_max()
    }

    /// Counters and gauges.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let state = self.shared.lock();
        let mut metrics = state.metrics.clone();
        metrics.waiting += state.waiting.len() as u32;
        metrics
    }

    /// Whole seconds, 1 or more, that a request submitted now may have to wait.
    #[must_use]
    pub fn expected_wait_s(&self) -> u32 {
        expected_wait_s(&self.shared.lock(), self.slots())
    }

    /// Time since the engine thread last showed that it lives. It does so between steps, from within the
    /// decoder's long calls ([`model::Decoder::watch`]), and at least ten times a second when idle.
    #[must_use]
    pub fn heartbeat_age(&self) -> Duration {
        self.shared.heartbeat.age()
    }

    /// Why the engine cannot be used any more.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.shared.lock().failure.clone()
    }

    /// True from [`EngineHandle::drain`] on.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.shared.lock().draining
    }

    /// Takes no new requests; what is unfinished after `timeout` is cancelled, then the thread
    /// ends. A second call may only shorten the time. Does not wait.
    pub fn drain(&self, timeout: Duration) {
        let mut state = self.shared.lock();
        state.draining = true;
        let stop_at = Instant::now() + timeout;
        state.stop_at = Some(state.stop_at.map_or(stop_at, |at| at.min(stop_at)));
        drop(state);
        self.shared.signal();
    }

    /// Waits until the engine thread has ended, at most `timeout`; false when it has not.
    #[must_use]
    pub fn wait_stopped(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let mut state = self.shared.lock();
        while !state.stopped {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn slots(&self) -> u32 {
        self.shared.options.slots(&self.shared.limits)
    }
}

/// Everyone ahead has to be served by `slots` slots that each take the mean service time.
fn expected_wait_s(state: &State, slots: u32) -> u32 {
    let ahead = state.waiting.len() as f64 + 1.0;
    let service_s = if state.service_s > 0.0 {
        state.service_s
    } else {
        1.0
    };
    (ahead * service_s / f64::from(slots.max(1)))
        .ceil()
        .clamp(1.0, 3600.0) as u32
}

fn invalid<T>(field: &'static str, message: String) -> Result<T, Rejected> {
    Err(Rejected::Invalid { field, message })
}

fn validate(request: &Request, shared: &Shared) -> Result<(), Rejected> {
    validate_prompt(request, shared)?;
    let most = shared.options.samples_max.min(shared_slots(shared));
    if request.samples == 0 || request.samples > most {
        let message = format!("is {}; 1 to {most} are allowed", request.samples);
        return invalid("samples", message);
    }
    if request.stop.stop_strings.iter().any(String::is_empty) {
        return invalid("stop_strings", "contains an empty string".to_owned());
    }
    validate_sampling(request)
}

fn validate_prompt(request: &Request, shared: &Shared) -> Result<(), Rejected> {
    let (prompt, room) = (request.prompt.len(), shared.tokens_max());
    if prompt == 0 {
        return invalid(
            "prompt",
            "is empty; at least one token is needed".to_owned(),
        );
    }
    let answer = u32::from(request.stop.max_tokens != Some(0));
    if prompt as u64 + u64::from(answer) > u64::from(room) {
        let message = format!("has {prompt} tokens; {room} fit, the answer included");
        return invalid("prompt", message);
    }
    let vocab = shared.limits.vocab_size;
    if let Some(i) = request.prompt.iter().position(|token| *token >= vocab) {
        let token = request.prompt[i];
        let message = format!("token {token} at index {i} is outside the vocabulary of {vocab}");
        return invalid("prompt", message);
    }
    Ok(())
}

fn shared_slots(shared: &Shared) -> u32 {
    shared.options.slots(&shared.limits)
}

fn validate_sampling(request: &Request) -> Result<(), Rejected> {
    let params = &request.sampling;
    let ranges = [
        ("temperature", params.temperature, 0.0, 100.0),
        ("top_p", params.top_p, 0.0, 1.0),
        ("min_p", params.min_p, 0.0, 1.0),
        ("repetition_penalty", params.repetition_penalty, 0.01, 100.0),
        ("presence_penalty", params.presence_penalty, -100.0, 100.0),
        ("frequency_penalty", params.frequency_penalty, -100.0, 100.0),
    ];
    for (field, value, low, high) in ranges {
        if !(low..=high).contains(&value) {
            let message = format!("is {value}; {low} to {high} are allowed");
            return Err(Rejected::Invalid { field, message });
        }
    }
    for (token, bias) in &params.logit_bias {
        if !bias.is_finite() {
            let message = format!("of token {token} is {bias}; a finite number is needed");
            return Err(Rejected::Invalid {
                field: "logit_bias",
                message,
            });
        }
    }
    match request.simulate_acceptance {
        Some(length) if length.is_nan() || length < 1.0 => Err(Rejected::Invalid {
            field: "simulate_acceptance",
            message: format!("is {length}; 1 is the least, the bonus token"),
        }),
        _ => Ok(()),
    }
}
