//! What a stream reports: pieces of text as they come, and the account at the end.

use crate::metrics::Metrics;
use crate::request::RequestId;
use model::TokenId;
use model::decoder::TokenLogprobs;

/// One thing that happened to a request.
#[derive(Clone, Debug)]
pub enum Event {
    /// Log-probabilities of the prompt's tokens, when asked for: entry `i` is of token `i` given
    /// those before it, so the first is `None`.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// Tokens of one step.
    Piece(Piece),
    /// A sample is complete. The stream ends after as many of these as there are samples.
    Finished(Box<Finished>),
}

/// What a sample got from one step.
#[derive(Clone, Debug, Default)]
pub struct Piece {
    /// Index of the parallel sample.
    pub sample: u32,
    /// Tokens that became part of the answer, a stop token included.
    pub tokens: Vec<TokenId>,
    /// Text that became certain: whole characters, and nothing that may yet turn out to be part of
    /// a stop string. May be empty.
    pub text: String,
    /// One entry a token when asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// How the step went, when [`crate::Request::trace`] is set.
    pub step: Option<StepRecord>,
}

/// One step of one sequence: the JSON line of `--trace`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepRecord {
    /// Counts the steps of this sample from 0.
    pub step: u32,
    /// The request.
    pub request: u64,
    /// Index of the anchor in the sequence.
    pub position: u32,
    /// Rows verified.
    pub width: u32,
    /// As proposed, before verification.
    pub drafted: Vec<TokenId>,
    /// Drafted tokens that were accepted.
    pub accepted: u32,
    /// The token after them.
    pub bonus: TokenId,
    /// Drafting time of the whole step, all its sequences together.
    pub draft_us: f64,
    /// Verification time of the whole step.
    pub verify_us: f64,
}

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model's own end token.
    Eos(TokenId),
    /// One of the request's stop tokens.
    StopToken(TokenId),
    /// One of the request's stop strings.
    StopString(String),
    /// `max_tokens`, the context, or the KV cache is used up.
    Length,
    /// The stream was dropped, its reader stood still, or the engine shut down.
    Cancelled,
    /// The request's deadline passed.
    Deadline,
    /// Computation failed.
    Error(String),
}

impl FinishReason {
    /// `stop`, `length`, `cancelled`, `deadline` or `error`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        Metrics::REASONS[self.index()]
    }

    /// Index in [`Metrics::REASONS`].
    pub(crate) fn index(&self) -> usize {
        match self {
            Self::Eos(_) | Self::StopToken(_) | Self::StopString(_) => 0,
            Self::Length => 1,
            Self::Cancelled => 2,
            Self::Deadline => 3,
            Self::Error(_) => 4,
        }
    }
}

/// The end of a sample.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The request.
    pub request: RequestId,
    /// Index of the parallel sample.
    pub sample: u32,
    /// Why.
    pub reason: FinishReason,
    /// Text held back until now, when the end made it certain.
    pub text: String,
    /// The account.
    pub stats: Stats,
}

/// Account of one sample. Times are wall time; those of a step count in full for every sequence in
/// it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, taken from the prefix cache instead of computed.
    pub cached_tokens: u32,
    /// Tokens of the answer, a stop token included.
    pub generated_tokens: u32,
    /// From submission to admission.
    pub queue_ms: f64,
    /// From admission to the end of the prompt's computation.
    pub prefill_ms: f64,
    /// From submission to the first token.
    pub ttft_ms: f64,
    /// From the end of the prompt's computation to the last token.
    pub decode_ms: f64,
    /// Drafting.
    pub draft: DraftStats,
    /// Microseconds in the drafter.
    pub draft_us: f64,
    /// Microseconds in the target's forward pass.
    pub verify_us: f64,
    /// Microseconds in penalties, masks and accept rule.
    pub sample_us: f64,
    /// `decode_ms` outside the three above, in microseconds.
    pub host_us: f64,
    /// Times the request was preempted and computed again.
    pub preemptions: u32,
    /// Acceptance was pretended, not measured.
    pub simulated: bool,
}

impl Stats {
    /// Generated tokens over `decode_ms`; 0 before the first token.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        match self.decode_ms > 0.0 {
            true => f64::from(self.generated_tokens) * 1e3 / self.decode_ms,
            false => 0.0,
        }
    }
}

/// Counts of drafting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DraftStats {
    /// Steps, those without drafts included.
    pub steps: u64,
    /// Steps with at least one draft.
    pub drafting_steps: u64,
    /// Tokens drafted.
    pub drafted: u64,
    /// Of these, accepted.
    pub accepted: u64,
    /// Entry `i` counts the steps that accepted exactly `i` drafts; it sums to `steps`.
    pub histogram: Vec<u64>,
    /// Entry `i` counts the steps that drafted a token at slot `i + 1`.
    pub drafted_per_position: Vec<u64>,
    /// Entry `i` counts the steps that accepted it.
    pub accepted_per_position: Vec<u64>,
}

impl DraftStats {
    /// Takes in one step.
    pub fn add(&mut self, drafted: u32, accepted: u32) {
        let (d, a) = (drafted as usize, accepted as usize);
        self.steps += 1;
        self.drafting_steps += u64::from(drafted > 0);
        self.drafted += u64::from(drafted);
        self.accepted += u64::from(accepted);
        if self.histogram.len() <= d {
            self.histogram.resize(d + 1, 0);
            self.drafted_per_position.resize(d, 0);
            self.accepted_per_position.resize(d, 0);
        }
        self.histogram[a] += 1;
        self.drafted_per_position[..d]
            .iter_mut()
            .for_each(|n| *n += 1);
        self.accepted_per_position[..a]
            .iter_mut()
            .for_each(|n| *n += 1);
    }

    /// Mean tokens a step, the bonus token included; 0 without steps.
    #[must_use]
    pub fn acceptance_length(&self) -> f64 {
        match self.steps {
            0 => 0.0,
            steps => 1.0 + self.accepted as f64 / steps as f64,
        }
    }

    /// For each slot, the share of its drafts that were accepted.
    #[must_use]
    pub fn rate_per_position(&self) -> Vec<f64> {
        let pairs = self
            .accepted_per_position
            .iter()
            .zip(&self.drafted_per_position);
        pairs.map(|(a, d)| *a as f64 / (*d).max(1) as f64).collect()
    }
}
