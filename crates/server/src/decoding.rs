//! The fields that every endpoint shares: how tokens are chosen, when to stop, what to report.
//!
//! Invariant: a field is honoured or refused, never silently bent; what is not given comes from the
//! model's own defaults.

use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::limits::Limits;
use engine::{DraftWidth, Request, StopRules};
use model::generation::GenerationDefaults;
use model::sampling::{DraftSampling, SamplingParams};
use serde_json::Value;

/// What to send besides the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// Times and acceptance at the end.
    pub(crate) metrics: bool,
    /// And the drafted and accepted tokens of each step.
    pub(crate) per_step: bool,
    /// Each chunk says how its step went.
    pub(crate) steps: bool,
    /// Token ids.
    pub(crate) token_ids: bool,
    /// A last chunk with the usage.
    pub(crate) usage: bool,
    /// Usage in every chunk.
    pub(crate) running_usage: bool,
    /// Log-probabilities.
    pub(crate) logprobs: bool,
}

/// The shared part of a request.
pub(crate) struct Decoding {
    /// Everything but the prompt.
    pub(crate) request: Request,
    pub(crate) report: Report,
    pub(crate) stream: bool,
    /// Chosen by the client, or none.
    pub(crate) request_id: Option<String>,
    /// Added to the isolation key.
    pub(crate) cache_salt: Option<String>,
}

/// What holds for a request that says nothing of it.
pub(crate) struct Defaults<'a> {
    /// The model's own.
    pub(crate) generation: &'a GenerationDefaults,
    /// The server's.
    pub(crate) draft: DraftWidth,
}

/// Reads the shared fields.
pub(crate) fn read(
    fields: &mut Fields,
    defaults: &Defaults,
    limits: &Limits,
) -> Result<Decoding, ApiError> {
    let mut request = Request::new(Vec::new());
    request.sampling = sampling(fields, &defaults.generation.sampling, limits)?;
    request.stop = stop(fields, defaults.generation, limits)?;
    let samples = fields.integer("n", 1..=i64::from(limits.samples))?;
    request.samples = samples.unwrap_or(1) as u32;
    let priority = fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?;
    // vLLM's order: a lower number goes first.
    request.priority = -(priority.unwrap_or(0).max(-i64::from(i32::MAX)) as i32);
    request.draft = draft(fields)?.unwrap_or(defaults.draft);
    let range = 1.0..=64.0;
    request.simulate_acceptance = fields.number("simulate_acceptance", range)?.map(f64::from);
    let (stream, report) = report(fields)?;
    request.trace = report.steps || report.per_step;
    Ok(Decoding {
        request,
        report,
        stream,
        request_id: fields.string("request_id")?,
        cache_salt: fields.string("cache_salt")?,
    })
}

fn sampling(
    fields: &mut Fields,
    defaults: &SamplingParams,
    limits: &Limits,
) -> Result<SamplingParams, ApiError> {
    let own = defaults.clone();
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?;
    // Without a seed each request gets another one.
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
    let draft_sampling = match fields.string("draft_sampling")?.as_deref() {
        None => own.draft_sampling,
        Some("greedy") => DraftSampling::Greedy,
        Some("sampled" | "probabilistic") => DraftSampling::Sampled,
        Some(_) => {
            let message = "draft_sampling: expected `greedy` or `sampled`";
            return Err(ApiError::invalid("draft_sampling", message));
        }
    };
    Ok(SamplingParams {
        temperature: fields
            .number("temperature", 0.0..=2.0)?
            .unwrap_or(own.temperature),
        top_k: top_k.map_or(own.top_k, |k| k.max(0) as u32),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(own.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(own.min_p),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01..=2.0)?
            .unwrap_or(own.repetition_penalty),
        presence_penalty: fields
            .number("presence_penalty", -2.0..=2.0)?
            .unwrap_or(own.presence_penalty),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(own.frequency_penalty),
        logit_bias: biases(fields, limits)?,
        seed: seed.map_or_else(random_seed, |seed| seed as u64),
        draft_sampling,
        ..own
    })
}

fn random_seed() -> u64 {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => 0,
    }
}

fn biases(fields: &mut Fields, limits: &Limits) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(value) = fields.take("logit_bias") else {
        return Ok(Vec::new());
    };
    let Value::Object(map) = value else {
        return Err(wrong("logit_bias", "an object of token ids", &value));
    };
    Limits::count("logit_bias", map.len(), limits.biases)?;
    let mut biases = Vec::with_capacity(map.len());
    for (token, bias) in map {
        let number = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b));
        match (token.parse(), number) {
            (Ok(token), Some(bias)) => biases.push((token, bias as f32)),
            _ => {
                let expected = "token ids with numbers from -100 to 100";
                return Err(wrong("logit_bias", expected, &bias));
            }
        }
    }
    biases.sort_unstable_by_key(|(token, _)| *token);
    Ok(biases)
}

fn stop(
    fields: &mut Fields,
    defaults: &GenerationDefaults,
    limits: &Limits,
) -> Result<StopRules, ApiError> {
    let long = fields.count("max_completion_tokens", 0)?;
    let max_tokens = long.or(fields.count("max_tokens", 0)?);
    let min_tokens = fields.count("min_tokens", 0)?.unwrap_or(0);
    if max_tokens.is_some_and(|max| min_tokens > max) {
        let message = format!("min_tokens is {min_tokens}, more than max_tokens");
        return Err(ApiError::invalid("min_tokens", message));
    }
    Ok(StopRules {
        eos_ids: defaults.eos_ids.clone(),
        stop_ids: token_ids(fields, "stop_token_ids")?,
        stop_strings: stop_strings(fields, "stop", limits)?,
        include_stop_string: fields.flag("include_stop_str_in_output")?,
        max_tokens,
        min_tokens,
        ignore_eos: fields.flag("ignore_eos")?,
    })
}

/// One stop string or a list of them.
pub(crate) fn stop_strings(
    fields: &mut Fields,
    name: &str,
    limits: &Limits,
) -> Result<Vec<String>, ApiError> {
    let list = match fields.take(name) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    Limits::count(name, list.len(), limits.stops)?;
    let mut stops = Vec::with_capacity(list.len());
    for value in list {
        let Value::String(text) = value else {
            return Err(wrong(name, "a string or a list of strings", &value));
        };
        if text.len() > limits.stop_bytes {
            let message = format!(
                "{name}: {} bytes; {} is the most",
                text.len(),
                limits.stop_bytes
            );
            return Err(ApiError::invalid(name, message));
        }
        if !text.is_empty() {
            stops.push(text);
        }
    }
    Ok(stops)
}

fn token_ids(fields: &mut Fields, name: &str) -> Result<Vec<u32>, ApiError> {
    let list = fields.list(name)?.unwrap_or_default();
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong(name, "token ids", value))
    };
    list.iter().map(id).collect()
}

/// `draft_tokens`: 0 is off, absent is the server's `--draft-width`.
fn draft(fields: &mut Fields) -> Result<Option<DraftWidth>, ApiError> {
    let tokens = fields.integer("draft_tokens", 0..=64)?;
    Ok(tokens.map(|tokens| match tokens {
        0 => DraftWidth::Off,
        n => DraftWidth::Fixed(n as u32 + 1),
    }))
}

fn report(fields: &mut Fields) -> Result<(bool, Report), ApiError> {
    let stream = fields.flag("stream")?;
    let detail = fields.string("per_request_spec_decode_metrics")?;
    let per_step = match detail.as_deref() {
        None | Some("summary" | "off") => false,
        Some("detailed") => true,
        Some(_) => {
            let param = "per_request_spec_decode_metrics";
            let message = "expected `off`, `summary` or `detailed`";
            return Err(ApiError::invalid(param, message));
        }
    };
    let mut report = Report {
        metrics: fields.flag("include_metrics")? || detail.is_some_and(|d| d != "off"),
        per_step,
        steps: fields.flag("return_steps")?,
        token_ids: fields.flag("return_token_ids")?,
        ..Report::default()
    };
    if let Some(mut options) = fields.object("stream_options")? {
        if !stream {
            let message = "stream_options: only allowed with `stream: true`";
            return Err(ApiError::invalid("stream_options", message));
        }
        report.usage = options.flag("include_usage")?;
        report.running_usage = options.flag("continuous_usage_stats")?;
    }
    Ok((stream, report))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(body: Value) -> Result<Decoding, ApiError> {
        let mut fields = Fields::of_body(body).unwrap();
        let defaults = Defaults {
            generation: &GenerationDefaults::default(),
            draft: DraftWidth::Fixed(5),
        };
        read(&mut fields, &defaults, &Limits::default())
    }

    fn refused(body: Value) -> String {
        let error = parse(body).map(|_| ()).unwrap_err();
        assert_eq!(error.status.as_u16(), 400);
        error.param.unwrap()
    }

    #[test]
    fn limits_at_the_edge_and_one_over() {
        let many = |n: usize| {
            (0..n)
                .map(|i| (i.to_string(), json!(1)))
                .collect::<serde_json::Map<_, _>>()
        };
        assert!(
            parse(json!({"n": 4, "stop": ["a", "b", "c", "d"], "logit_bias": many(1024)})).is_ok()
        );
        assert!(parse(json!({"stop": "x".repeat(256)})).is_ok());
        assert_eq!(refused(json!({"n": 5})), "n");
        assert_eq!(refused(json!({"stop": ["a", "b", "c", "d", "e"]})), "stop");
        assert_eq!(refused(json!({"stop": "x".repeat(257)})), "stop");
        assert_eq!(refused(json!({"logit_bias": many(1025)})), "logit_bias");
    }

    #[test]
    fn contradictions_are_refused() {
        assert_eq!(
            refused(json!({"min_tokens": 5, "max_tokens": 4})),
            "min_tokens"
        );
        assert_eq!(refused(json!({"stream_options": {}})), "stream_options");
        assert_eq!(refused(json!({"temperature": 2.5})), "temperature");
    }

    #[test]
    fn drafts_are_as_the_server_says_unless_the_request_does() {
        let width = |body| parse(body).unwrap().request.draft;
        assert_eq!(width(json!({})), DraftWidth::Fixed(5));
        assert_eq!(width(json!({"draft_tokens": 7})), DraftWidth::Fixed(8));
    }

    #[test]
    fn the_new_name_of_max_tokens_wins() {
        let body =
            json!({"max_tokens": 5, "max_completion_tokens": 7, "draft_tokens": 0, "top_k": -1});
        let decoding = parse(body).unwrap();
        assert_eq!(decoding.request.stop.max_tokens, Some(7));
        assert_eq!(decoding.request.draft, DraftWidth::Off);
        assert_eq!(decoding.request.sampling.top_k, 0);
    }

    #[test]
    fn a_seed_is_kept_and_absent_ones_differ() {
        assert_eq!(parse(json!({"seed": 7})).unwrap().request.sampling.seed, 7);
        let seed = || parse(json!({})).unwrap().request.sampling.seed;
        assert_ne!(seed(), seed());
    }
}
