//! `/v1/chat/completions`.

use crate::account::{self, Counts};
use crate::admission::now_s;
use crate::auth::Principal;
use crate::decoding::{self, Report};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::generate::{Finish, Generation, Output, StopCause};
use crate::launch::{self, Launched};
use crate::parse::Part;
use crate::state::Served;
use crate::talk::Talk;
use crate::text::Codec;
use crate::wire::{self, Answer, Events, Wire, only_reasoning};
use axum::body::Body;
use axum::http::Response;
use engine::Piece;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What computes, as far as it changes what comes out.
const FINGERPRINT: &str = concat!("kilotok-", env!("CARGO_PKG_VERSION"));

/// Serves one request.
pub(crate) async fn serve(
    served: Arc<Served>,
    principal: Principal,
    body: Value,
) -> Result<Response<Body>, ApiError> {
    let limits = &served.settings.limits;
    let mut fields = Fields::of_body(body)?;
    crate::router::require_model(&mut fields, &served)?;
    let talk = Talk::read(&mut fields, limits)?;
    let mut decoding = decoding::read(&mut fields, &served.decoding_defaults(), limits)?;
    let logprobs = fields.flag("logprobs")?;
    let top = fields.integer("top_logprobs", 0..=i64::from(limits.top_logprobs))?;
    if top.is_some() && !logprobs {
        let message = "top_logprobs: needs `logprobs: true`";
        return Err(ApiError::invalid("top_logprobs", message));
    }
    decoding.request.logprobs = logprobs.then(|| top.unwrap_or(0) as u32);
    decoding.report.logprobs = logprobs;
    let ignored = fields.unread();
    let launched = launch::talk(&served, &principal, talk, decoding).await?;
    let response = answer(&served, launched).await?;
    Ok(crate::router::with_ignored(response, &ignored))
}

async fn answer(served: &Arc<Served>, launched: Launched) -> Result<Response<Body>, ApiError> {
    let Launched {
        generation,
        report,
        stream,
        id,
    } = launched;
    let form = Form {
        id,
        created: now_s(),
        model: served.settings.model_name.clone(),
        reasoning_field: served.settings.reasoning_field.clone(),
        report,
        codec: Arc::clone(served.text.codec()),
    };
    if stream {
        let wire = ChatWire {
            form,
            counts: Counts::default(),
            metrics: BTreeMap::new(),
        };
        let (metrics, ping) = (&served.metrics, served.settings.ping);
        return Ok(wire::stream(generation, wire, metrics, ping));
    }
    let prompt = generation.prompt_tokens();
    let collected = wire::collect(generation).await?;
    Ok(crate::router::json_response(
        &form.whole(&collected.answers, prompt),
    ))
}

/// What all parts of an answer have in common.
struct Form {
    id: String,
    created: i64,
    model: String,
    reasoning_field: String,
    report: Report,
    codec: Arc<dyn Codec>,
}

impl Form {
    fn whole(&self, answers: &[Answer], prompt: u32) -> Value {
        let mut counts = Counts {
            prompt,
            ..Counts::default()
        };
        let mut choices = Vec::new();
        for (index, answer) in answers.iter().enumerate() {
            counts.generated += answer.stats.generated_tokens;
            counts.reasoning += answer.reasoning_tokens;
            counts.cached = counts.cached.max(answer.stats.cached_tokens);
            choices.push(self.choice(index, answer));
        }
        let mut value = json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": counts.openai(),
            "system_fingerprint": FINGERPRINT,
            "service_tier": "default",
        });
        if let Some(first) = answers.first().filter(|_| self.report.metrics) {
            value["metrics"] = account::metrics(&first.stats, &first.per_step, self.report);
        }
        value
    }

    fn choice(&self, index: usize, answer: &Answer) -> Value {
        let content = answer.content();
        let calls = answer.calls();
        let mut message = json!({
            "role": "assistant",
            "content": if content.is_empty() && !calls.is_empty() { Value::Null } else { content.into() },
            "refusal": null,
            "annotations": [],
        });
        let reasoning = answer.reasoning();
        if !reasoning.is_empty() {
            message[&self.reasoning_field] = reasoning.into();
        }
        if !calls.is_empty() {
            let call = |(i, (name, arguments)): (usize, (String, String))| {
                json!({"id": call_id(&self.id, index as u32, i as u32), "type": "function",
                    "function": {"name": name, "arguments": arguments}})
            };
            message["tool_calls"] = calls.into_iter().enumerate().map(call).collect();
        }
        let mut choice = json!({
            "index": index,
            "message": message,
            "logprobs": null,
            "finish_reason": answer.finish.name(),
            "stop_reason": stop_reason(&answer.finish),
        });
        if self.report.logprobs {
            let codec = self.codec.as_ref();
            choice["logprobs"] = account::chat_logprobs(codec, &answer.tokens, &answer.logprobs);
        }
        if self.report.token_ids {
            choice["token_ids"] = answer.tokens.clone().into();
        }
        choice
    }

    fn chunk(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        })
    }

    /// All parts of a step in one `delta`.
    fn delta(&self, sample: u32, parts: Vec<Part>) -> Value {
        let mut delta = json!({});
        let mut calls: Vec<Value> = Vec::new();
        for part in parts {
            match part {
                Part::Content(text) => append(&mut delta, "content", &text),
                Part::Reasoning(text) => append(&mut delta, &self.reasoning_field, &text),
                Part::Call { index, name } => calls.push(json!({
                    "index": index, "id": call_id(&self.id, sample, index), "type": "function",
                    "function": {"name": name, "arguments": ""}})),
                Part::Arguments { index, text } => match calls.last_mut() {
                    Some(call) if call["index"] == index => {
                        append(&mut call["function"], "arguments", &text);
                    }
                    _ => calls.push(json!({"index": index, "function": {"arguments": text}})),
                },
            }
        }
        if !calls.is_empty() {
            delta["tool_calls"] = calls.into();
        }
        delta
    }
}

fn append(object: &mut Value, field: &str, text: &str) {
    match object.get_mut(field) {
        Some(Value::String(have)) => have.push_str(text),
        _ => object[field] = text.into(),
    }
}

/// OpenAI's ids are opaque; ours name the answer, the sample and the call.
pub(crate) fn call_id(id: &str, sample: u32, index: u32) -> String {
    let tail = id.rsplit('-').next().unwrap_or(id);
    format!("call_{tail}_{sample}_{index}")
}

/// vLLM's: the stop string or token of the request that ended the text.
fn stop_reason(finish: &Finish) -> Value {
    match finish {
        Finish::Stop(Some(StopCause::String(text))) => text.clone().into(),
        Finish::Stop(Some(StopCause::Token(token))) => (*token).into(),
        _ => Value::Null,
    }
}

struct ChatWire {
    form: Form,
    counts: Counts,
    /// By sample.
    metrics: BTreeMap<u32, Value>,
}

impl ChatWire {
    fn piece(&mut self, parts: Vec<Part>, piece: &Piece, out: &mut Events) {
        let report = self.form.report;
        let count = piece.tokens.len() as u32;
        self.counts.generated += count;
        self.counts.reasoning += if only_reasoning(&parts) { count } else { 0 };
        let silent = parts.is_empty() && piece.logprobs.is_empty() && piece.step.is_none();
        if silent && !report.token_ids {
            return;
        }
        let delta = self.form.delta(piece.sample, parts);
        let mut choice = json!({"index": piece.sample, "delta": delta, "logprobs": null,
            "finish_reason": null});
        if report.logprobs {
            let codec = self.form.codec.as_ref();
            choice["logprobs"] = account::chat_logprobs(codec, &piece.tokens, &piece.logprobs);
        }
        if report.token_ids {
            choice["token_ids"] = piece.tokens.clone().into();
        }
        let mut chunk = self.form.chunk(json!([choice]));
        if let Some(step) = piece.step.as_ref().filter(|_| report.steps) {
            chunk["step"] = account::step(step);
        }
        if report.running_usage {
            chunk["usage"] = self.counts.openai();
        }
        out.data(&chunk);
    }
}

impl Wire for ChatWire {
    fn open(&mut self, generation: &Generation, out: &mut Events) {
        self.counts.prompt = generation.prompt_tokens();
        for index in 0..generation.samples() {
            let delta = json!({"role": "assistant", "content": ""});
            let choice = json!({"index": index, "delta": delta, "logprobs": null,
                "finish_reason": null});
            out.data(&self.form.chunk(json!([choice])));
        }
    }

    fn output(&mut self, output: Output, generation: &Generation, out: &mut Events) {
        match output {
            Output::Prompt { .. } => {}
            Output::Delta { parts, piece } => self.piece(parts, &piece, out),
            Output::End {
                sample,
                parts,
                finish,
                stats,
            } => {
                if let Finish::Failed(error) = finish {
                    return out.failed(&error);
                }
                self.counts.cached = self.counts.cached.max(stats.cached_tokens);
                let report = self.form.report;
                let block = account::metrics(&stats, generation.per_step(sample), report);
                let choice = json!({"index": sample, "delta": self.form.delta(sample, parts), "logprobs": null,
                    "finish_reason": finish.name(), "stop_reason": stop_reason(&finish)});
                let mut chunk = self.form.chunk(json!([choice]));
                if report.running_usage {
                    chunk["usage"] = self.counts.openai();
                }
                if report.metrics && !report.usage {
                    chunk["metrics"] = block.clone();
                }
                self.metrics.insert(sample, block);
                out.data(&chunk);
            }
        }
    }

    fn close(&mut self, _: &Generation, out: &mut Events) {
        if self.form.report.usage {
            let mut chunk = self.form.chunk(json!([]));
            chunk["usage"] = self.counts.openai();
            if let Some(first) = self.metrics.get(&0).filter(|_| self.form.report.metrics) {
                chunk["metrics"] = first.clone();
            }
            out.data(&chunk);
        }
        out.done();
    }
}
