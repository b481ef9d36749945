//! What a caller asks for, as data. Validation is in `queue`, where a request enters.

use model::TokenId;
use model::decoder::Constraint;
use model::sampling::SamplingParams;
use std::sync::Arc;
use std::time::Duration;

/// Number of a request; unique over the life of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Makes a grammar in its initial state. Called on the engine thread, once for each parallel sample
/// and again when a preempted request resumes, so it has to be cheap: compile beforehand.
pub type ConstraintFactory = Arc<dyn Fn() -> Box<dyn Constraint> + Send + Sync>;

/// Called on the engine thread when a stream has something to read; must not block.
pub type Notify = Arc<dyn Fn() + Send + Sync>;

/// How many tokens are drafted for each step of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DraftWidth {
    /// Plain decoding.
    Off,
    /// Verifies this many rows, the anchor included; clipped to what the decoder can do.
    Fixed(u32),
    /// The width that gives most tokens a second, 1 where drafting does not pay.
    #[default]
    Auto,
}

/// When a text ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopRules {
    /// The model's own end tokens; without effect under `ignore_eos`.
    pub eos_ids: Vec<TokenId>,
    /// Other tokens that end the text.
    pub stop_ids: Vec<TokenId>,
    /// Strings that end the text; neither they nor anything after them is emitted.
    pub stop_strings: Vec<String>,
    /// Emit the stop string itself.
    pub include_stop_string: bool,
    /// Most tokens to generate; `None` is as many as fit. 0 computes the prompt only.
    pub max_tokens: Option<u32>,
    /// No stop rule applies before so many tokens.
    pub min_tokens: u32,
    /// Go on after the model's own end tokens.
    pub ignore_eos: bool,
}

/// One request. `Request::new(prompt)` is greedy, with automatic drafting.
#[derive(Clone)]
pub struct Request {
    /// Prompt, at least one token.
    pub prompt: Vec<TokenId>,
    /// Distribution of the tokens. The engine fills `forbidden_until_min` and `min_tokens` from
    /// `stop`.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopRules,
    /// Parallel samples of one prompt, 1 or more. Sample 0 has the text the request has alone.
    pub samples: u32,
    /// Log-probabilities of generated tokens: see [`model::decoder::SequenceConfig::logprobs`].
    pub logprobs: Option<u32>,
    /// Log-probabilities of the prompt's tokens, each given those before it. Disables reuse of
    /// cached prefixes for this request.
    pub prompt_logprobs: Option<u32>,
    /// Structured output.
    pub constraint: Option<ConstraintFactory>,
    /// Drafting.
    pub draft: DraftWidth,
    /// Benchmarks only: mean acceptance length to pretend, bonus token included, from 1 to the
    /// width. The statistics say `simulated`.
    pub simulate_acceptance: Option<f64>,
    /// Prefixes are shared only between requests with equal keys.
    pub isolation_key: String,
    /// Larger goes first; first come, first served among equals.
    pub priority: i32,
    /// Give up when the answer is not complete this long after submission.
    pub deadline: Option<Duration>,
    /// Report every step in [`crate::Piece::step`].
    pub trace: bool,
    /// Wakes the reader.
    pub notify: Option<Notify>,
}

impl Request {
    /// Greedy, until the model stops or the context is full.
    #[must_use]
    pub fn new(prompt: Vec<TokenId>) -> Self {
        Self {
            prompt,
            sampling: SamplingParams::default(),
            stop: StopRules::default(),
            samples: 1,
            logprobs: None,
            prompt_logprobs: None,
            constraint: None,
            draft: DraftWidth::Auto,
            simulate_acceptance: None,
            isolation_key: String::new(),
            priority: 0,
            deadline: None,
            trace: false,
            notify: None,
        }
    }
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected {
    /// A field that cannot be served; the request will never be.
    #[error("{field}: {message}")]
    Invalid {
        /// Field of [`Request`], as in its documentation.
        field: &'static str,
        /// What was expected and found.
        message: String,
    },
    /// The queue is full.
    #[error("the queue is full: {waiting} requests wait; try again in {retry_after_s} s")]
    Full {
        /// Requests waiting.
        waiting: usize,
        /// Expected wait in whole seconds, 1 or more.
        retry_after_s: u32,
    },
    /// The engine finishes what it has and takes nothing new.
    #[error("the engine is shutting down")]
    Draining,
    /// The device broke.
    #[error("the engine has failed: {0}")]
    Failed(String),
}
