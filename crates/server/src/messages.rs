//! `/v1/messages` and `/v1/messages/count_tokens`: Anthropic's form, read into the same conversation
//! as OpenAI's and written back as content blocks.

use crate::account::Counts;
use crate::auth::Principal;
use crate::chat::call_id;
use crate::decoding;
use crate::error::{ApiError, Dialect};
use crate::fields::{Fields, wrong};
use crate::generate::{Finish, Generation, Output, StopCause};
use crate::launch::{self, random_id};
use crate::limits::Limits;
use crate::parse::Part;
use crate::router::{check_model, json_response, require_model, with_ignored};
use crate::state::Served;
use crate::talk::{Talk, flatten};
use crate::wire::{self, Answer, Events, Wire, only_reasoning};
use axum::body::Body;
use axum::http::Response;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Serves one request.
pub(crate) async fn serve(
    served: Arc<Served>,
    principal: Principal,
    body: Value,
) -> Result<Response<Body>, ApiError> {
    let limits = &served.settings.limits;
    let mut fields = Fields::of_body(body)?;
    require_model(&mut fields, &served)?;
    if !fields.has("max_tokens") {
        return Err(fields.missing("max_tokens"));
    }
    if fields
        .take("max_tokens")
        .is_some_and(|n| n.as_u64().is_none_or(|n| n == 0))
    {
        let message = "max_tokens: expected a count of 1 or more";
        return Err(ApiError::invalid("max_tokens", message));
    }
    let (talk, decoding, ignored) = read(fields, &served, limits)?;
    let mut launched = launch::talk(&served, &principal, talk, decoding).await?;
    launched.id = random_id("msg");
    let form = Form {
        id: launched.id,
        model: served.settings.model_name.clone(),
    };
    let response = if launched.stream {
        let wire = MessageWire {
            form,
            counts: Counts::default(),
            open: None,
            blocks: 0,
            finish: None,
        };
        let (metrics, ping) = (&served.metrics, served.settings.ping);
        wire::stream(launched.generation, wire, metrics, ping)
    } else {
        let prompt = launched.generation.prompt_tokens();
        let collected = wire::collect(launched.generation).await?;
        match collected.answers.first() {
            Some(answer) => json_response(&form.whole(answer, prompt)),
            None => return Err(ApiError::internal("no answer came")),
        }
    };
    Ok(with_ignored(response, &ignored))
}

/// Tokens of the prompt that the messages become.
pub(crate) async fn count_tokens(
    served: &Arc<Served>,
    body: Value,
) -> Result<Response<Body>, ApiError> {
    let mut fields = Fields::of_body(body)?;
    check_model(&mut fields, served)?;
    let (talk, _, ignored) = read(fields, served, &served.settings.limits)?;
    let (tokens, _) = launch::render(served, &talk).await?;
    let response = json_response(&json!({"input_tokens": tokens.len()}));
    Ok(with_ignored(response, &ignored))
}

/// Reads the fields under their OpenAI names.
fn read(
    mut fields: Fields,
    served: &Served,
    limits: &Limits,
) -> Result<(Talk, decoding::Decoding, Vec<String>), ApiError> {
    let mut same = Map::new();
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        let text = flatten(system, "system")?;
        messages.push(json!({"role": "system", "content": text}));
    }
    let list = fields.list("messages")?;
    let list = list.ok_or_else(|| fields.missing("messages"))?;
    Limits::count("messages", list.len(), limits.messages)?;
    if list.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "messages: at least one is needed",
        ));
    }
    for (i, message) in list.into_iter().enumerate() {
        read_message(message, &format!("messages[{i}]"), &mut messages)?;
    }
    same.insert("messages".to_owned(), messages.into());
    let tools = fields.list("tools")?.unwrap_or_default();
    let tools: Result<Vec<Value>, ApiError> = tools.into_iter().enumerate().map(tool).collect();
    same.insert("tools".to_owned(), tools?.into());
    if let Some(choice) = fields.take("tool_choice") {
        same.insert("tool_choice".to_owned(), tool_choice(&choice)?);
        let single = choice["disable_parallel_tool_use"] == true;
        same.insert("parallel_tool_calls".to_owned(), (!single).into());
    }
    if let Some(stops) = fields.take("stop_sequences") {
        same.insert("stop".to_owned(), stops);
    }
    for name in SHARED {
        if let Some(value) = fields.take(name) {
            same.insert(name.to_owned(), value);
        }
    }
    let mut rewritten = Fields::of_body(same.into())?;
    let talk = Talk::read(&mut rewritten, limits)?;
    let decoding = decoding::read(&mut rewritten, &served.decoding_defaults(), limits)?;
    Ok((talk, decoding, fields.unread()))
}

/// Fields with the same name and meaning here and there.
const SHARED: [&str; 15] = [
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stream",
    "thinking",
    "seed",
    "cache_salt",
    "priority",
    "draft_tokens",
    "chat_template_kwargs",
    "response_format",
    "ignore_eos",
    "enable_thinking",
];

fn tool((i, tool): (usize, Value)) -> Result<Value, ApiError> {
    let mut fields = Fields::of(tool, format!("tools[{i}]"))?;
    if let Some(kind) = fields.string("type")?.filter(|kind| kind != "custom") {
        let path = fields.path("type");
        let message = format!("{path}: `{kind}` is not served; only tools of your own are");
        return Err(ApiError::invalid(path, message));
    }
    let name = fields.required_string("name")?;
    let description = fields.string("description")?;
    let parameters = fields.take("input_schema");
    let parameters = parameters.ok_or_else(|| fields.missing("input_schema"))?;
    let mut function = json!({"name": name, "description": description, "parameters": parameters});
    if fields.bool("strict")? == Some(true) {
        function["strict"] = true.into();
    }
    Ok(json!({"type": "function", "function": function}))
}

fn tool_choice(choice: &Value) -> Result<Value, ApiError> {
    match choice["type"].as_str() {
        Some("auto") => Ok("auto".into()),
        Some("none") => Ok("none".into()),
        Some("any") => Ok("required".into()),
        Some("tool") => Ok(json!({"function": {"name": choice["name"]}})),
        _ => Err(wrong(
            "tool_choice",
            "a type of auto, any, tool or none",
            choice,
        )),
    }
}

/// One message may become several: results of tools are messages of their own in OpenAI's form.
fn read_message(message: Value, path: &str, out: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut fields = Fields::of(message, path)?;
    let role = fields.required_string("role")?;
    if !matches!(role.as_str(), "user" | "assistant" | "system") {
        let path = fields.path("role");
        let message = format!("{path}: expected user or assistant");
        return Err(ApiError::invalid(path, message));
    }
    let content = fields
        .take("content")
        .ok_or_else(|| fields.missing("content"))?;
    let blocks = match content {
        Value::Array(blocks) => blocks,
        text => vec![json!({"type": "text", "text": text})],
    };
    let (mut text, mut thought, mut calls) = (String::new(), String::new(), Vec::new());
    for (i, block) in blocks.into_iter().enumerate() {
        let path = format!("{path}.content[{i}]");
        let mut block = Fields::of(block, &path)?;
        match block.required_string("type")?.as_str() {
            "text" => text.push_str(&block.required_string("text")?),
            "thinking" => thought.push_str(&block.string("thinking")?.unwrap_or_default()),
            "redacted_thinking" => {}
            "tool_use" => calls.push(json!({
                "id": block.required_string("id")?, "type": "function",
                "function": {"name": block.required_string("name")?,
                    "arguments": block.take("input").unwrap_or_else(|| json!({}))}})),
            "tool_result" => {
                let id = block.required_string("tool_use_id")?;
                let content = block.take("content").unwrap_or_else(|| "".into());
                let content = flatten(content, &block.path("content"))?;
                out.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
            }
            other => {
                let message =
                    format!("{path}: `{other}` is not served; this server takes text only");
                return Err(ApiError::invalid(path, message));
            }
        }
    }
    let only_results =
        role == "user" && text.is_empty() && out.last().is_some_and(|m| m["role"] == "tool");
    if only_results {
        return Ok(());
    }
    let mut message = json!({"role": role, "content": text});
    if !thought.is_empty() {
        message["reasoning_content"] = thought.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    out.push(message);
    Ok(())
}

struct Form {
    id: String,
    model: String,
}

fn usage(counts: &Counts) -> Value {
    json!({
        "input_tokens": counts.prompt - counts.cached.min(counts.prompt),
        "output_tokens": counts.generated,
        "output_tokens_details": {"thinking_tokens": counts.reasoning},
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "server_tool_use": {"web_search_requests": 0, "web_fetch_requests": 0},
        "service_tier": "standard",
        "inference_geo": null,
    })
}

/// `(stop_reason, stop_sequence)`.
fn stop(finish: &Finish) -> (&'static str, Value) {
    match finish {
        Finish::Length => ("max_tokens", Value::Null),
        Finish::ToolCalls => ("tool_use", Value::Null),
        Finish::Stop(Some(StopCause::String(text))) => ("stop_sequence", text.clone().into()),
        Finish::Stop(_) | Finish::Failed(_) => ("end_turn", Value::Null),
    }
}

impl Form {
    fn message(&self, content: Vec<Value>, finish: Option<&Finish>, counts: &Counts) -> Value {
        let (reason, sequence) = match finish {
            Some(finish) => {
                let (reason, sequence) = stop(finish);
                (Value::from(reason), sequence)
            }
            None => (Value::Null, Value::Null),
        };
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model,
            "content": content, "stop_reason": reason, "stop_sequence": sequence,
            "stop_details": null, "container": null, "usage": usage(counts),
        })
    }

    fn whole(&self, answer: &Answer, prompt: u32) -> Value {
        let counts = Counts {
            prompt,
            cached: answer.stats.cached_tokens,
            generated: answer.stats.generated_tokens,
            reasoning: answer.reasoning_tokens,
        };
        let mut blocks = Vec::new();
        let reasoning = answer.reasoning();
        if !reasoning.is_empty() {
            blocks.push(json!({"type": "thinking", "thinking": reasoning, "signature": ""}));
        }
        let text = answer.content();
        let calls = answer.calls();
        if !text.is_empty() || calls.is_empty() {
            blocks.push(json!({"type": "text", "text": text, "citations": null}));
        }
        for (i, (name, arguments)) in calls.into_iter().enumerate() {
            let input: Value = serde_json::from_str(&arguments).unwrap_or_else(|_| json!({}));
            let id = call_id(&self.id, 0, i as u32);
            blocks.push(
                json!({"type": "tool_use", "id": id, "name": name, "input": input,
                "caller": {"type": "direct"}}),
            );
        }
        self.message(blocks, Some(&answer.finish), &counts)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    Call(u32),
}

struct MessageWire {
    form: Form,
    counts: Counts,
    /// The block that is being written.
    open: Option<Kind>,
    /// Blocks begun so far.
    blocks: u32,
    finish: Option<Finish>,
}

impl MessageWire {
    fn shut(&mut self, out: &mut Events) {
        let Some(kind) = self.open.take() else {
            return;
        };
        let index = self.blocks - 1;
        if kind == Kind::Thinking {
            let delta = json!({"type": "signature_delta", "signature": ""});
            let event = json!({"type": "content_block_delta", "index": index, "delta": delta});
            out.named("content_block_delta", &event);
        }
        let event = json!({"type": "content_block_stop", "index": index});
        out.named("content_block_stop", &event);
    }

    fn begin(&mut self, kind: Kind, block: &Value, out: &mut Events) {
        if self.open == Some(kind) {
            return;
        }
        self.shut(out);
        let event = json!({"type": "content_block_start", "index": self.blocks,
            "content_block": block});
        out.named("content_block_start", &event);
        self.blocks += 1;
        self.open = Some(kind);
    }

    fn delta(&self, delta: &Value, out: &mut Events) {
        let index = self.blocks.saturating_sub(1);
        let event = json!({"type": "content_block_delta", "index": index, "delta": delta});
        out.named("content_block_delta", &event);
    }

    fn part(&mut self, part: Part, out: &mut Events) {
        match part {
            Part::Reasoning(text) => {
                let block = json!({"type": "thinking", "thinking": "", "signature": ""});
                self.begin(Kind::Thinking, &block, out);
                self.delta(&json!({"type": "thinking_delta", "thinking": text}), out);
            }
            Part::Content(text) => {
                let block = json!({"type": "text", "text": "", "citations": null});
                self.begin(Kind::Text, &block, out);
                self.delta(&json!({"type": "text_delta", "text": text}), out);
            }
            Part::Call { index, name } => {
                let id = call_id(&self.form.id, 0, index);
                let block = json!({"type": "tool_use", "id": id, "name": name, "input": {},
                    "caller": {"type": "direct"}});
                self.begin(Kind::Call(index), &block, out);
            }
            Part::Arguments { text, .. } => {
                self.delta(
                    &json!({"type": "input_json_delta", "partial_json": text}),
                    out,
                );
            }
        }
    }
}

impl Wire for MessageWire {
    fn open(&mut self, generation: &Generation, out: &mut Events) {
        self.counts.prompt = generation.prompt_tokens();
        let message = self.form.message(Vec::new(), None, &self.counts);
        out.named(
            "message_start",
            &json!({"type": "message_start", "message": message}),
        );
        out.named("ping", &json!({"type": "ping"}));
    }

    fn output(&mut self, output: Output, _: &Generation, out: &mut Events) {
        match output {
            Output::Prompt { .. } => {}
            Output::Delta { parts, piece } => {
                let count = piece.tokens.len() as u32;
                self.counts.generated += count;
                self.counts.reasoning += if only_reasoning(&parts) { count } else { 0 };
                parts.into_iter().for_each(|part| self.part(part, out));
            }
            Output::End {
                parts,
                finish,
                stats,
                ..
            } => {
                if let Finish::Failed(error) = finish {
                    out.named("error", &error.body(Dialect::Anthropic));
                    out.end();
                    return;
                }
                parts.into_iter().for_each(|part| self.part(part, out));
                self.counts.cached = stats.cached_tokens;
                self.finish = Some(finish);
            }
        }
    }

    fn close(&mut self, _: &Generation, out: &mut Events) {
        self.shut(out);
        let (reason, sequence) = self.finish.as_ref().map_or(("end_turn", Value::Null), stop);
        let event = json!({"type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence,
                "stop_details": null, "container": null},
            "usage": usage(&self.counts)});
        out.named("message_delta", &event);
        out.named("message_stop", &json!({"type": "message_stop"}));
        out.end();
    }
}
