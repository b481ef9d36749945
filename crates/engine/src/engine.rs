//! The engine thread: its options, its start, its loop and its end.
//!
//! Owns the decoder and every open session. The loop is: look at cancellations, admit, compute one
//! piece of one prompt, step everyone who decodes. Readers are woken for a step while the next one is
//! under way. Invariants: no wait is longer than [`IDLE_WAIT`], so the heartbeat shows life; nobody is left
//! asleep over a piece of a prompt or a wait; a decoder that faults or panics ends every request with an
//! error and the thread, never silently.

use crate::event::FinishReason;
use crate::metrics::Metrics;
use crate::prefix::PrefixCache;
use crate::queue::{EngineHandle, Shared};
use crate::session::{Phase, Session};
use crate::stream::Sender;
use crate::width::Costs;
use model::Decoder;
use model::decoder::{DecodeError, Limits, StepOutput, StepPlan};
use model::detokenizer::Detokenizer;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest sleep of the engine thread.
pub const IDLE_WAIT: Duration = Duration::from_millis(100);

/// What happens when running requests may come to need more KV pages than there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// A request is admitted when the pages for its prompt and all of `max_tokens` are free, so it
    /// is never interrupted. Requests without `max_tokens` claim the whole context.
    WorstCase,
    /// A request is admitted when its prompt and this many tokens of answer fit. Should pages run
    /// out, the newest request of the lowest priority gives its pages up and is computed again
    /// later, with the same text.
    Preempt {
        /// Tokens of answer to set pages aside for.
        headroom_tokens: u32,
    },
}

/// Limits and policies of an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    /// Most samples computed at once; 0 is what the decoder can hold.
    pub sequences_max: u32,
    /// Most requests waiting; one more is refused with the expected wait.
    pub queue_requests_max: usize,
    /// Most prompt tokens waiting, all requests together.
    pub queue_tokens_max: usize,
    /// Most parallel samples of a request.
    pub samples_max: u32,
    /// Most prompt tokens computed between two steps.
    pub prefill_chunk_tokens: usize,
    /// Longest time that running streams wait for a piece of a prompt.
    pub prefill_stall: Duration,
    /// Share of the time, 0 to 1, that prompts may take from running streams while both have work.
    pub prefill_share: f64,
    /// Keep finished sequences for the prefixes they hold.
    pub prefix_cache: bool,
    /// Most sequences kept.
    pub prefixes_max: usize,
    /// What to do about KV pages.
    pub admission: Admission,
    /// A reader with a full backlog that reads nothing for this long loses its request.
    pub reader_timeout: Duration,
    /// Measure the cost of a step at each width before the first request.
    pub calibrate: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            sequences_max: 0,
            queue_requests_max: 256,
            queue_tokens_max: 4 << 20,
            samples_max: 4,
            prefill_chunk_tokens: 2048,
            prefill_stall: Duration::from_millis(40),
            prefill_share: 0.5,
            prefix_cache: true,
            prefixes_max: 64,
            admission: Admission::Preempt {
                headroom_tokens: 256,
            },
            reader_timeout: Duration::from_secs(30),
            calibrate: true,
        }
    }
}

impl EngineOptions {
    /// Samples computed at once.
    #[must_use]
    pub fn slots(&self, limits: &Limits) -> u32 {
        match self.sequences_max {
            0 => limits.sequences_max,
            max => max.min(limits.sequences_max),
        }
    }
}

/// Starts engines.
pub struct Engine {
    pub(crate) decoder: Box<dyn Decoder>,
    pub(crate) detokenizer: Arc<dyn Detokenizer>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) options: EngineOptions,
    pub(crate) limits: Limits,
    pub(crate) sessions: Vec<Session>,
    pub(crate) prefixes: PrefixCache,
    pub(crate) costs: Costs,
    pub(crate) metrics: Metrics,
    pub(crate) plan: StepPlan,
    pub(crate) out: StepOutput,
    /// Readers with events that they were not woken for.
    pub(crate) untold: Vec<Arc<Sender>>,
    /// Whose prompt is next.
    pub(crate) prefill_turn: usize,
    /// Prompt tokens a microsecond, 0 before any were computed.
    pub(crate) prefill_rate: f64,
    /// Time that running streams are owed before the next piece of a prompt.
    pub(crate) owed_us: f64,
    pub(crate) service_s: f64,
}

impl Engine {
    /// Starts the thread that owns `decoder`.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn start(
        decoder: Box<dyn Decoder>,
        detokenizer: Arc<dyn Detokenizer>,
        options: EngineOptions,
    ) -> std::io::Result<EngineHandle> {
        let limits = decoder.limits();
        let shared = Shared::new(limits, options.clone());
        let handle = EngineHandle {
            shared: Arc::clone(&shared),
        };
        let mut decoder = decoder;
        decoder.watch(&shared.heartbeat);
        let mut engine = Self {
            decoder,
            detokenizer,
            shared,
            options,
            limits,
            sessions: Vec::new(),
            prefixes: PrefixCache::default(),
            costs: Costs::default(),
            metrics: Metrics {
                kv_pages: limits.pages,
                page_tokens: limits.page_tokens,
                ..Metrics::default()
            },
            plan: StepPlan::default(),
            out: StepOutput::default(),
            untold: Vec::new(),
            prefill_turn: 0,
            prefill_rate: 0.0,
            owed_us: 0.0,
            service_s: 0.0,
        };
        let thread = std::thread::Builder::new().name("engine".to_owned());
        thread.spawn(move || engine.live())?;
        Ok(handle)
    }

    fn live(&mut self) {
        let ended = catch_unwind(AssertUnwindSafe(|| {
            if self.options.calibrate {
                self.calibrate()?;
            }
            self.run()
        }));
        let failure = match ended {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(format!(
                "the engine thread panicked: {}",
                panic_text(&*panic)
            )),
        };
        let reason = match &failure {
            Some(failure) => FinishReason::Error(failure.clone()),
            None => FinishReason::Cancelled,
        };
        for mut session in std::mem::take(&mut self.sessions) {
            if session.phase != Phase::Ended {
                session.finish(reason.clone());
                self.metrics.finished_total[session.ended] += 1;
            }
        }
        let mut state = self.shared.lock();
        state.draining = true;
        state.failure = failure;
        let waiting = std::mem::take(&mut state.waiting);
        state.waiting_tokens = 0;
        drop(state);
        for (_, waiting) in waiting {
            self.refuse(waiting, reason.clone());
        }
        self.publish();
        self.shared.lock().stopped = true;
        self.shared.signal();
    }

    fn run(&mut self) -> Result<(), DecodeError> {
        loop {
            self.shared.beat();
            self.reap();
            if self.over() {
                return Ok(());
            }
            self.admit()?;
            let prefilled = self.prefill_piece()?;
            let stepped = self.step()?;
            self.collect();
            self.publish();
            if !prefilled && !stepped {
                tell(&mut self.untold);
                self.shared.wait(IDLE_WAIT);
            }
        }
    }

    /// Nothing to do, and nothing will come.
    fn over(&mut self) -> bool {
        let abandoned = Arc::strong_count(&self.shared) == 1;
        let state = self.shared.lock();
        let idle = self.sessions.is_empty() && state.waiting.is_empty();
        let late = state.stop_at.is_some_and(|at| Instant::now() >= at);
        (idle && (state.draining || abandoned)) || late
    }

    /// Ends what was cancelled, is late, or has a reader that stands still.
    fn reap(&mut self) {
        let now = Instant::now();
        for session in &mut self.sessions {
            let reason = if session.sender.is_cancelled() {
                FinishReason::Cancelled
            } else if session
                .request
                .deadline
                .is_some_and(|d| now - session.submitted > d)
            {
                FinishReason::Deadline
            } else if session.sender.stalled_for() > Some(self.options.reader_timeout) {
                FinishReason::Cancelled
            } else {
                continue;
            };
            session.finish(reason);
        }
        self.collect();
        self.reap_waiting(now);
    }

    fn reap_waiting(&mut self, now: Instant) {
        let mut gone = Vec::new();
        let mut state = self.shared.lock();
        for (key, waiting) in &state.waiting {
            let late = waiting
                .request
                .deadline
                .is_some_and(|d| now - waiting.submitted > d);
            if waiting.sender.is_cancelled() {
                gone.push((*key, FinishReason::Cancelled));
            } else if late {
                gone.push((*key, FinishReason::Deadline));
            }
        }
        let take = |(key, reason)| state.waiting.remove(&key).map(|waiting| (waiting, reason));
        let gone: Vec<_> = gone.into_iter().filter_map(take).collect();
        for (waiting, _) in &gone {
            state.waiting_tokens -= waiting.request.prompt.len();
        }
        drop(state);
        for (waiting, reason) in gone {
            self.refuse(waiting, reason);
        }
    }

    /// Takes ended sessions out; their sequences are kept for their prefix or closed.
    pub(crate) fn collect(&mut self) {
        let mut i = 0;
        while i < self.sessions.len() {
            if self.sessions[i].phase != Phase::Ended {
                i += 1;
                continue;
            }
            let session = self.sessions.swap_remove(i);
            let service_s = session.admitted.elapsed().as_secs_f64();
            self.service_s = match self.service_s > 0.0 {
                true => 0.9 * self.service_s + 0.1 * service_s,
                false => service_s,
            };
            self.metrics.finished_total[session.ended] += 1 + u64::from(session.siblings_due);
            self.retire(session);
        }
    }

    pub(crate) fn publish(&mut self) {
        let running = self
            .sessions
            .iter()
            .filter(|s| s.phase != Phase::Preempted)
            .count();
        self.metrics.running = running as u32;
        self.metrics.waiting = self.sessions.len() as u32 - running as u32;
        self.metrics.kv = self.decoder.kv_usage();
        let share = f64::from(self.claimed_pages()) / f64::from(self.limits.pages.max(1));
        self.metrics.kv_reserved_share = share.min(1.0);
        self.metrics.prefixes_kept = self.prefixes.len() as u32;
        let mut state = self.shared.lock();
        self.metrics.rejected_total = state.metrics.rejected_total;
        state.metrics.clone_from(&self.metrics);
        state.service_s = self.service_s;
    }
}

/// Wakes the readers on the list and empties it; microseconds that took.
pub(crate) fn tell(untold: &mut Vec<Arc<Sender>>) -> f64 {
    let start = Instant::now();
    for sender in untold.drain(..) {
        sender.notify();
    }
    start.elapsed().as_secs_f64() * 1e6
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}
