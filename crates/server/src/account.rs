//! The numbers of an answer as JSON: usage, times, acceptance, log-probabilities.
//!
//! Invariant: the drafting block is vLLM's, dense and consistent (sums of the histogram equal the
//! totals), because readers drop one that is not.

use crate::decoding::Report;
use crate::text::Codec;
use engine::{Stats, StepRecord};
use model::TokenId;
use model::decoder::TokenLogprobs;
use serde_json::{Value, json};

/// Counts of tokens over all samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) prompt: u32,
    pub(crate) cached: u32,
    pub(crate) generated: u32,
    pub(crate) reasoning: u32,
}

impl Counts {
    /// OpenAI's `usage`.
    pub(crate) fn openai(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        })
    }
}

/// The block `metrics`: times and acceptance of one sample.
pub(crate) fn metrics(stats: &Stats, per_step: &[(u32, u32)], report: Report) -> Value {
    let draft = &stats.draft;
    let rate = match draft.drafted {
        0 => 0.0,
        drafted => draft.accepted as f64 / drafted as f64,
    };
    let tokens = f64::from(stats.generated_tokens.max(1));
    let mut spec = json!({
        "mean_acceptance_length": round(draft.acceptance_length()),
        "draft_acceptance_rate": round(rate),
        "acceptance_histogram": draft.histogram,
        "num_spec_steps": draft.steps,
        "num_accepted_draft_tokens": draft.accepted,
        "num_draft_tokens": draft.drafted,
        "num_spec_tokens": draft.histogram.len().saturating_sub(1),
    });
    if report.per_step {
        spec["per_step_accepted"] = per_step.iter().map(|(_, accepted)| *accepted).collect();
        spec["per_step_drafted"] = per_step.iter().map(|(drafted, _)| *drafted).collect();
    }
    let mut block = json!({
        "time_to_first_token_ms": round(stats.ttft_ms),
        "generation_time_ms": round(stats.decode_ms),
        "queue_time_ms": round(stats.queue_ms),
        "prefill_time_ms": round(stats.prefill_ms),
        "mean_itl_ms": round(stats.decode_ms / tokens),
        "tokens_per_second": round(stats.tokens_per_second()),
        "draft_time_ms": round(stats.draft_us / 1e3),
        "verify_time_ms": round(stats.verify_us / 1e3),
        "sample_time_ms": round(stats.sample_us / 1e3),
        "host_time_ms": round(stats.host_us / 1e3),
        "cached_tokens": stats.cached_tokens,
        "preemptions": stats.preemptions,
        "speculative_decoding": spec,
    });
    if stats.simulated {
        block["simulated"] = true.into();
    }
    block
}

fn round(x: f64) -> f64 {
    (x * 1e4).round() / 1e4
}

/// The block `step` of a chunk.
pub(crate) fn step(step: &StepRecord) -> Value {
    json!({
        "index": step.step,
        "position": step.position,
        "width": step.width,
        "drafted": step.drafted,
        "accepted": step.accepted,
        "bonus": step.bonus,
        "draft_us": step.draft_us.round(),
        "verify_us": step.verify_us.round(),
    })
}

fn token_text(codec: &dyn Codec, token: TokenId) -> (String, Vec<u8>) {
    let bytes = codec.token_bytes(token);
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

fn entry(codec: &dyn Codec, token: TokenId, logprob: f32) -> Value {
    let (text, bytes) = token_text(codec, token);
    json!({"token": text, "logprob": finite(logprob), "bytes": bytes})
}

/// JSON has no infinity; OpenAI writes -9999 for what cannot happen.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        -9999.0
    }
}

/// Chat's `logprobs.content`.
pub(crate) fn chat_logprobs(
    codec: &dyn Codec,
    tokens: &[TokenId],
    rows: &[TokenLogprobs],
) -> Value {
    let one = |(token, row): (&TokenId, &TokenLogprobs)| {
        let mut value = entry(codec, *token, row.chosen);
        let top = row.top.iter().map(|(token, p)| entry(codec, *token, *p));
        value["top_logprobs"] = top.collect();
        value
    };
    let content: Value = tokens.iter().zip(rows).map(one).collect();
    json!({"content": content, "refusal": null})
}

/// The columns of completions' `logprobs`.
#[derive(Default)]
pub(crate) struct Columns {
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    tops: Vec<Value>,
    offsets: Vec<usize>,
    /// Characters of text so far.
    offset: usize,
}

impl Columns {
    /// Appends a token; the first one of a prompt has no log-probability.
    pub(crate) fn push(&mut self, codec: &dyn Codec, token: TokenId, row: Option<&TokenLogprobs>) {
        let (text, _) = token_text(codec, token);
        self.offsets.push(self.offset);
        if !codec.is_special(token) {
            self.offset += text.chars().count();
        }
        self.logprobs
            .push(row.map_or(Value::Null, |row| finite(row.chosen).into()));
        self.tops.push(row.map_or(Value::Null, |row| {
            let mut top = serde_json::Map::new();
            for (token, p) in &row.top {
                top.insert(token_text(codec, *token).0, finite(*p).into());
            }
            top.entry(text.clone())
                .or_insert_with(|| finite(row.chosen).into());
            Value::Object(top)
        }));
        self.tokens.push(text.into());
    }

    /// The columns so far; the offset goes on.
    pub(crate) fn take(&mut self) -> Value {
        json!({
            "tokens": std::mem::take(&mut self.tokens),
            "token_logprobs": std::mem::take(&mut self.logprobs),
            "top_logprobs": std::mem::take(&mut self.tops),
            "text_offset": std::mem::take(&mut self.offsets),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::DraftStats;

    #[test]
    fn the_drafting_block_is_consistent() {
        let mut stats = Stats::default();
        let mut draft = DraftStats::default();
        let steps = [(7, 3), (7, 0), (3, 3), (0, 0)];
        steps.iter().for_each(|(d, a)| draft.add(*d, *a));
        stats.draft = draft;
        let report = Report {
            per_step: true,
            ..Report::default()
        };
        let block = metrics(&stats, &steps, report);
        let spec = &block["speculative_decoding"];
        let histogram: Vec<u64> =
            serde_json::from_value(spec["acceptance_histogram"].clone()).unwrap();
        let (count, accepted) = histogram
            .iter()
            .zip(0..)
            .fold((0, 0), |(count, accepted), (n, j)| {
                (count + n, accepted + n * j)
            });
        assert_eq!(spec["num_spec_steps"], count);
        assert_eq!(spec["num_accepted_draft_tokens"], accepted);
        assert_eq!(spec["mean_acceptance_length"], 2.5);
        assert_eq!(spec["per_step_accepted"], json!([3, 0, 3, 0]));
    }
}
