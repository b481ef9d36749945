//! One thread that owns one Decoder: queue, sessions, prefix cache, draft widths, stop rules.
//!
//! Refuses: HTTP, async runtimes, devices. Any [`model::Decoder`] will do; tests use
//! [`scripted::Scripted`]. Invariants: only the engine thread touches the decoder; it never waits
//! for a reader; a request's text depends on the request alone, not on what else runs.
//!
//! ```
//! use engine::scripted::{Script, Scripted, ScriptedOptions};
//! use engine::{Engine, EngineOptions, Event, Request};
//! use model::detokenizer::ByteTokens;
//! use std::sync::Arc;
//!
//! let decoder = Scripted::new(ScriptedOptions::default(), Script::text("hello"));
//! let options = EngineOptions::default();
//! let handle = Engine::start(Box::new(decoder), Arc::new(ByteTokens), options).unwrap();
//! let mut request = Request::new(vec![1, 2, 3]);
//! request.stop.max_tokens = Some(5);
//! let mut text = String::new();
//! for event in handle.submit(request).unwrap() {
//!     match event {
//!         Event::Piece(piece) => text.push_str(&piece.text),
//!         Event::Finished(end) => text.push_str(&end.text),
//!         Event::Prompt(_) => {}
//!     }
//! }
//! assert_eq!(text, "hello");
//! ```
#![forbid(unsafe_code)]

mod admit;
mod engine;
mod event;
mod metrics;
mod prefix;
mod queue;
mod request;
pub mod scripted;
mod session;
mod step;
mod stream;
pub mod text;
pub mod width;

pub use engine::{Admission, Engine, EngineOptions, IDLE_WAIT};
pub use event::{DraftStats, Event, FinishReason, Finished, Piece, Stats, StepRecord};
pub use metrics::Metrics;
pub use queue::EngineHandle;
pub use request::{ConstraintFactory, DraftWidth, Notify, Rejected, Request, RequestId, StopRules};
pub use stream::{BACKLOG_BYTES_MAX, Canceller, Received, Stream};
