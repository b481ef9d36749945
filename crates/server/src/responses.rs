//! `/v1/responses`, stateless: nothing is stored, `previous_response_id` and `background` are refused.

use crate::account::Counts;
use crate::admission::now_s;
use crate::auth::Principal;
use crate::chat::call_id;
use crate::decoding;
use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::generate::Finish;
use crate::launch::{self, random_id};
use crate::limits::Limits;
use crate::response_stream::ResponseWire;
use crate::router::{json_response, require_model, with_ignored};
use crate::state::Served;
use crate::talk::{Talk, flatten};
use crate::wire::{self, Answer};
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
    let mut form = Form::read(&mut fields, &served.settings.model_name)?;
    let mut ignored = Vec::new();
    let rewritten = rewrite(&mut fields, &mut form, limits, &mut ignored)?;
    ignored.extend(fields.unread());
    let mut fields = Fields::of_body(rewritten)?;
    let talk = Talk::read(&mut fields, limits)?;
    let decoding = decoding::read(&mut fields, &served.decoding_defaults(), limits)?;
    form.note(&decoding);
    let launched = launch::talk(&served, &principal, talk, decoding).await?;
    let response = if launched.stream {
        let (metrics, ping) = (&served.metrics, served.settings.ping);
        wire::stream(launched.generation, ResponseWire::new(form), metrics, ping)
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

/// What the answer repeats of the request.
pub(crate) struct Form {
    pub(crate) id: String,
    created: i64,
    model: String,
    echo: Map<String, Value>,
}

impl Form {
    fn read(fields: &mut Fields, model: &str) -> Result<Self, ApiError> {
        for (name, why) in [
            (
                "previous_response_id",
                "nothing is stored here; send the whole conversation",
            ),
            (
                "conversation",
                "nothing is stored here; send the whole conversation",
            ),
            ("prompt", "stored prompts are not served"),
        ] {
            if fields.has(name) {
                return Err(ApiError::invalid(name, format!("{name}: {why}")));
            }
        }
        if fields.flag("background")? {
            let message = "background: answers are not kept, so they cannot be fetched later";
            return Err(ApiError::invalid("background", message));
        }
        let mut echo = Map::new();
        for (name, default) in [
            ("metadata", json!({})),
            ("user", Value::Null),
            ("safety_identifier", Value::Null),
            ("prompt_cache_key", Value::Null),
            ("prompt_cache_retention", Value::Null),
            ("max_tool_calls", Value::Null),
        ] {
            echo.insert(name.to_owned(), fields.take(name).unwrap_or(default));
        }
        // Known, and without effect on an answer that is not stored.
        for name in ["store", "include", "service_tier", "truncation"] {
            fields.take(name);
        }
        Ok(Self {
            id: random_id("resp"),
            created: now_s(),
            model: model.to_owned(),
            echo,
        })
    }

    fn keep(&mut self, name: &str, value: Value) {
        self.echo.insert(name.to_owned(), value);
    }

    fn note(&mut self, decoding: &decoding::Decoding) {
        let sampling = &decoding.request.sampling;
        let short = |x: f32| (f64::from(x) * 1e6).round() / 1e6;
        self.keep("temperature", short(sampling.temperature).into());
        self.keep("top_p", short(sampling.top_p).into());
        self.keep("presence_penalty", short(sampling.presence_penalty).into());
        self.keep(
            "frequency_penalty",
            short(sampling.frequency_penalty).into(),
        );
    }

    /// The response object in any of its states.
    pub(crate) fn object(
        &self,
        status: &str,
        output: Vec<Value>,
        counts: Option<&Counts>,
    ) -> Value {
        let mut object = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": if counts.is_some() { Value::from(now_s()) } else { Value::Null },
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": if status == "incomplete" {
                json!({"reason": "max_output_tokens"})
            } else {
                Value::Null
            },
            "model": self.model,
            "output": output,
            "previous_response_id": null,
            "service_tier": "default",
            "store": false,
            "top_logprobs": 0,
            "truncation": "disabled",
            "usage": counts.map(usage),
        });
        for (name, value) in &self.echo {
            object[name] = value.clone();
        }
        object
    }

    fn whole(&self, answer: &Answer, prompt: u32) -> Value {
        let counts = Counts {
            prompt,
            cached: answer.stats.cached_tokens,
            generated: answer.stats.generated_tokens,
            reasoning: answer.reasoning_tokens,
        };
        let status = status(&answer.finish);
        let mut output = Vec::new();
        let reasoning = answer.reasoning();
        if !reasoning.is_empty() {
            output.push(self.reasoning_item(&reasoning));
        }
        let (text, calls) = (answer.content(), answer.calls());
        if !text.is_empty() || calls.is_empty() {
            output.push(self.message_item(&text, status));
        }
        for (i, (name, arguments)) in calls.iter().enumerate() {
            output.push(self.call_item(i as u32, name, arguments, "completed"));
        }
        self.object(status, output, Some(&counts))
    }

    pub(crate) fn item_id(&self, kind: &str, index: u32) -> String {
        let tail = self.id.rsplit('-').next().unwrap_or(&self.id);
        format!("{kind}_{tail}_{index}")
    }

    pub(crate) fn reasoning_item(&self, text: &str) -> Value {
        let content = match text {
            "" => json!([]),
            text => json!([{"type": "reasoning_text", "text": text}]),
        };
        json!({"id": self.item_id("rs", 0), "type": "reasoning", "summary": [],
            "content": content, "encrypted_content": null, "status": "completed"})
    }

    pub(crate) fn message_item(&self, text: &str, status: &str) -> Value {
        let content = match status {
            "in_progress" => json!([]),
            _ => json!([text_part(text)]),
        };
        json!({"id": self.item_id("msg", 0), "type": "message", "role": "assistant",
            "status": status, "content": content})
    }

    pub(crate) fn call_item(&self, index: u32, name: &str, arguments: &str, status: &str) -> Value {
        json!({"id": self.item_id("fc", index), "type": "function_call", "status": status,
            "call_id": call_id(&self.id, 0, index), "name": name, "arguments": arguments})
    }
}

pub(crate) fn text_part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

pub(crate) fn status(finish: &Finish) -> &'static str {
    match finish {
        Finish::Length => "incomplete",
        Finish::Failed(_) => "failed",
        Finish::Stop(_) | Finish::ToolCalls => "completed",
    }
}

fn usage(counts: &Counts) -> Value {
    json!({
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached},
        "output_tokens": counts.generated,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.generated,
    })
}

/// The request under the names of chat completions.
fn rewrite(
    fields: &mut Fields,
    form: &mut Form,
    limits: &Limits,
    ignored: &mut Vec<String>,
) -> Result<Value, ApiError> {
    let mut same = Map::new();
    let instructions = fields.string("instructions")?;
    form.keep("instructions", instructions.clone().into());
    let messages = input(fields, instructions, limits)?;
    same.insert("messages".to_owned(), messages.into());
    let tools = fields.list("tools")?.unwrap_or_default();
    Limits::count("tools", tools.len(), limits.tools)?;
    let mut functions = Vec::new();
    for (i, tool) in tools.iter().enumerate() {
        match tool["type"] == "function" {
            true => functions.push(function(tool)),
            // Tools that run at OpenAI: clients list them everywhere and do without.
            false => ignored.push(format!("tools[{i}]")),
        }
    }
    same.insert("tools".to_owned(), functions.into());
    form.keep("tools", tools.into_iter().map(full_tool).collect());
    let choice = fields.take("tool_choice").unwrap_or_else(|| "auto".into());
    same.insert("tool_choice".to_owned(), choice.clone());
    form.keep("tool_choice", choice);
    let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    same.insert("parallel_tool_calls".to_owned(), parallel.into());
    form.keep("parallel_tool_calls", parallel.into());
    let most = fields.count("max_output_tokens", 1)?;
    form.keep("max_output_tokens", most.into());
    same.insert("max_tokens".to_owned(), most.into());
    text_format(fields, form, &mut same)?;
    reasoning(fields, form, &mut same)?;
    for name in SHARED {
        if let Some(value) = fields.take(name) {
            same.insert(name.to_owned(), value);
        }
    }
    Ok(same.into())
}

/// Fields with the same name and meaning here and there.
const SHARED: [&str; 13] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stream",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "cache_salt",
    "priority",
    "draft_tokens",
    "chat_template_kwargs",
    "ignore_eos",
];

fn text_format(
    fields: &mut Fields,
    form: &mut Form,
    same: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let text = fields.object("text")?;
    let format = text.and_then(|mut text| text.take("format"));
    let format = format.unwrap_or_else(|| json!({"type": "text"}));
    same.insert("response_format".to_owned(), format.clone());
    form.keep("text", json!({"format": format}));
    Ok(())
}

fn reasoning(
    fields: &mut Fields,
    form: &mut Form,
    same: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let (mut effort, mut summary) = (None, Value::Null);
    if let Some(mut reasoning) = fields.object("reasoning")? {
        effort = reasoning.string("effort")?;
        summary = reasoning.take("summary").unwrap_or(Value::Null);
    }
    if let Some(effort) = &effort {
        same.insert("reasoning_effort".to_owned(), effort.clone().into());
    }
    form.keep("reasoning", json!({"effort": effort, "summary": summary}));
    Ok(())
}

/// A function with all its fields, as the answer repeats it.
fn full_tool(mut tool: Value) -> Value {
    if tool["type"] == "function" {
        for name in ["description", "parameters", "strict"] {
            if tool.get(name).is_none() {
                tool[name] = Value::Null;
            }
        }
    }
    tool
}

fn function(tool: &Value) -> Value {
    let mut function = json!({"name": tool["name"]});
    for name in ["description", "parameters", "strict"] {
        if !tool[name].is_null() {
            function[name] = tool[name].clone();
        }
    }
    json!({"type": "function", "function": function})
}

/// `input` as messages.
fn input(
    fields: &mut Fields,
    instructions: Option<String>,
    limits: &Limits,
) -> Result<Vec<Value>, ApiError> {
    let mut messages = Vec::new();
    if let Some(text) = instructions {
        messages.push(json!({"role": "system", "content": text}));
    }
    let items = match fields
        .take("input")
        .ok_or_else(|| fields.missing("input"))?
    {
        Value::String(text) => vec![json!({"role": "user", "content": text})],
        Value::Array(items) => items,
        other => return Err(wrong("input", "a string or a list of items", &other)),
    };
    if items.is_empty() {
        return Err(ApiError::invalid(
            "input",
            "input: at least one item is needed",
        ));
    }
    Limits::count("input", items.len(), limits.messages)?;
    for (i, item) in items.into_iter().enumerate() {
        read_item(item, &format!("input[{i}]"), &mut messages)?;
    }
    Ok(messages)
}

fn read_item(item: Value, path: &str, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut fields = Fields::of(item, path)?;
    let kind = fields.string("type")?;
    match kind.as_deref() {
        None | Some("message") => {
            let role = fields.required_string("role")?;
            let content = fields
                .take("content")
                .ok_or_else(|| fields.missing("content"))?;
            let text = flatten(content, &fields.path("content"))?;
            messages.push(json!({"role": role, "content": text}));
        }
        Some("function_call") => {
            let call = json!({"id": fields.required_string("call_id")?, "type": "function",
                "function": {"name": fields.required_string("name")?,
                    "arguments": fields.required_string("arguments")?}});
            match messages.last_mut() {
                Some(last) if last["role"] == "assistant" => {
                    match last["tool_calls"].as_array_mut() {
                        Some(calls) => calls.push(call),
                        None => last["tool_calls"] = json!([call]),
                    }
                }
                _ => messages
                    .push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
            }
        }
        Some("function_call_output") => {
            let id = fields.required_string("call_id")?;
            let output = fields
                .take("output")
                .ok_or_else(|| fields.missing("output"))?;
            let text = flatten(output, &fields.path("output"))?;
            messages.push(json!({"role": "tool", "tool_call_id": id, "content": text}));
        }
        Some("reasoning") => {}
        Some(other) => {
            let message = format!("{path}: items of type `{other}` are not served");
            return Err(ApiError::invalid(path, message));
        }
    }
    Ok(())
}
