//! The pipe between the engine thread and one reader.
//!
//! Owns the events not yet read, the cancel flag and the wake-up. Invariants: the engine thread
//! never waits for a reader; what a reader leaves lying is bounded, because the engine stops
//! stepping a request whose backlog exceeds [`BACKLOG_BYTES_MAX`] and cancels it when nothing is
//! read for long; dropping the [`Stream`] cancels.

use crate::event::Event;
use crate::request::{Notify, RequestId};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A request is not stepped while more than this is unread.
pub const BACKLOG_BYTES_MAX: usize = 64 * 1024;

/// Wakes the engine thread.
pub(crate) type Wake = Arc<dyn Fn() + Send + Sync>;

struct Pipe {
    state: Mutex<State>,
    ready: Condvar,
    cancelled: AtomicBool,
    /// Set when the backlog stopped the request, so that reading wakes the engine.
    stalled: AtomicBool,
    notify: Option<Notify>,
    wake: Wake,
}

struct State {
    events: VecDeque<Event>,
    backlog_bytes: usize,
    last_read: Instant,
    unfinished: u32,
    writer_gone: bool,
    /// Readers asleep in this pipe. Waking nobody would still be a system call.
    sleepers: u32,
}

impl Pipe {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A reader that panicked leaves valid state behind: every change is a single push or pop.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reader's end. Dropping it cancels the request.
pub struct Stream {
    request: RequestId,
    pipe: Arc<Pipe>,
}

/// Cancels a request from elsewhere.
#[derive(Clone)]
pub struct Canceller(Arc<Pipe>);

/// The engine's end.
pub(crate) struct Sender(Arc<Pipe>);

/// What a reader finds.
#[derive(Debug)]
pub enum Received {
    /// The next event.
    Event(Event),
    /// Nothing yet.
    Nothing,
    /// All samples are finished and read.
    End,
}

pub(crate) fn pipe(
    request: RequestId,
    samples: u32,
    notify: Option<Notify>,
    wake: Wake,
) -> (Sender, Stream) {
    let pipe = Arc::new(Pipe {
        state: Mutex::new(State {
            events: VecDeque::with_capacity(16),
            backlog_bytes: 0,
            last_read: Instant::now(),
            unfinished: samples,
            writer_gone: false,
            sleepers: 0,
        }),
        ready: Condvar::new(),
        cancelled: AtomicBool::new(false),
        stalled: AtomicBool::new(false),
        notify,
        wake,
    });
    (Sender(Arc::clone(&pipe)), Stream { request, pipe })
}

impl Stream {
    /// Number of the request.
    #[must_use]
    pub fn request(&self) -> RequestId {
        self.request
    }

    /// The next event, without waiting.
    pub fn try_next(&self) -> Received {
        self.take(&mut self.pipe.lock())
    }

    /// The next event; `None` at the end.
    pub fn next_blocking(&self) -> Option<Event> {
        let mut state = self.pipe.lock();
        loop {
            match self.take(&mut state) {
                Received::Event(event) => return Some(event),
                Received::End => return None,
                Received::Nothing => {
                    state.sleepers += 1;
                    let waited = self.pipe.ready.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                    state.sleepers -= 1;
                }
            }
        }
    }

    /// The next event; [`Received::Nothing`] when `timeout` passes without one.
    pub fn next_timeout(&self, timeout: Duration) -> Received {
        let end = Instant::now() + timeout;
        let mut state = self.pipe.lock();
        loop {
            let received = self.take(&mut state);
            let left = end.saturating_duration_since(Instant::now());
            if !matches!(received, Received::Nothing) || left.is_zero() {
                return received;
            }
            state.sleepers += 1;
            let waited = self.pipe.ready.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.sleepers -= 1;
        }
    }

    /// Ends the request within a step; its last event is a `Finished`.
    pub fn cancel(&self) {
        self.canceller().cancel();
    }

    /// A handle that cancels this request.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        Canceller(Arc::clone(&self.pipe))
    }

    fn take(&self, state: &mut State) -> Received {
        let Some(event) = state.events.pop_front() else {
            return match state.unfinished == 0 || state.writer_gone {
                true => Received::End,
                false => Received::Nothing,
            };
        };
        state.backlog_bytes -= bytes(&event);
        state.last_read = Instant::now();
        if state.events.is_empty() && self.pipe.stalled.swap(false, Ordering::AcqRel) {
            (self.pipe.wake)();
        }
        Received::Event(event)
    }
}

impl Iterator for Stream {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.next_blocking()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Canceller {
    /// Ends the request within a step.
    pub fn cancel(&self) {
        if !self.0.cancelled.swap(true, Ordering::AcqRel) {
            (self.0.wake)();
        }
    }
}

impl Sender {
    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Queues an event without waking the reader: see [`Sender::notify`].
    pub(crate) fn push(&self, event: Event) {
        let mut state = self.0.lock();
        if state.events.is_empty() {
            // The reader has kept up: the clock of a stalled one starts now.
            state.last_read = Instant::now();
        }
        state.backlog_bytes += bytes(&event);
        state.unfinished -= u32::from(matches!(event, Event::Finished(_)));
        state.events.push_back(event);
    }

    /// Wakes the reader, once for all that was pushed.
    pub(crate) fn notify(&self) {
        if self.0.lock().sleepers > 0 {
            self.0.ready.notify_all();
        }
        if let Some(notify) = &self.0.notify {
            notify();
        }
    }

    /// How long a reader with too much unread has stood still; `None` for one that keeps up.
    pub(crate) fn stalled_for(&self) -> Option<Duration> {
        let state = self.0.lock();
        if state.backlog_bytes <= BACKLOG_BYTES_MAX {
            return None;
        }
        self.0.stalled.store(true, Ordering::Release);
        Some(state.last_read.elapsed())
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.lock().writer_gone = true;
        self.notify();
    }
}

/// What an event costs to keep, roughly.
fn bytes(event: &Event) -> usize {
    let inside = match event {
        Event::Prompt(rows) => rows.len() * 32,
        Event::Piece(piece) => {
            let tops: usize = piece.logprobs.iter().map(|l| 32 + l.top.len() * 8).sum();
            let drafted = piece.step.as_ref().map_or(0, |step| step.drafted.len());
            piece.text.len() + (piece.tokens.len() + drafted) * 4 + tops
        }
        Event::Finished(end) => end.text.len(),
    };
    inside + size_of::<Event>()
}
