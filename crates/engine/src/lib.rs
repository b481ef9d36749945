//! One thread that owns one Decoder: queue, sessions, prefix cache, draft widths, stop rules.
//!
//! Refuses: HTTP, async runtimes, devices. Any [`model::Decoder`] will do; tests use
//! [`scripted::Scripted`]. Invariants: only the engine thread touches the decoder; it never waits
//! for a reader; a request's text depends on the request alone, not on what else runs.
#![forbid(unsafe_code)]

mod event;
mod metrics;
mod request;
mod stream;

pub use event::{DraftStats, Event, FinishReason, Finished, Piece, Stats, StepRecord};
pub use metrics::Metrics;
pub use request::{ConstraintFactory, DraftWidth, Notify, Rejected, Request, RequestId, StopRules};
pub use stream::{BACKLOG_BYTES_MAX, Canceller, Received, Stream};
