//! Targets of the service: request bodies through the whole router, and a model's text through what
//! reads it.
//!
//! The model behind is scripted and says hostile text: tags of tool calls cut and mixed, invalid
//! UTF-8, control characters. A 500, a stream that is no proper event stream, or text that depends on
//! how it was cut is a panic, and so a finding.

use std::sync::Arc;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use engine::scripted::{Drafter, Script, Scripted, ScriptedOptions};
use engine::{Engine, EngineHandle, EngineOptions};
use http_body_util::BodyExt;
use model::decoder::Limits;
use serde_json::{Value, json};
use server::parse::{Expect, Format, Parser, join};
use server::text::ModelText;
use server::{Served, Settings, router};
use tokio::runtime::Runtime;
use tower::ServiceExt;

use super::Target;
use super::mutator::Mutator;

/// What the model says, one after the other, cut anywhere.
const SAYINGS: &[u8] = b"<think>why \xff\xfe</think>\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": [1, \"\\u00e9}\"]}}\n\
</tool_call><tool_call><function=f><parameter=x>1 &amp; \xc3\xa9</parameter></function></tool_call>\r\n\r\ndata: [DONE]\n\n\
<|channel|>analysis<|message|>no<|end|><|start|>assistant<|channel|>commentary to=functions.f <|message|>{\"x\":1}<|call|>\
\x00\x01\xe2\x80\xa8 # *a* <b onclick=x>[l](javascript:1)</b>\n```rust\nfn\n```\n";

/// A server, or what of it is called without one.
pub(super) struct Service {
    target: Target,
    pub(super) seeds: Vec<Vec<u8>>,
    runtime: Runtime,
    router: Router,
}

impl Service {
    /// `None` for a target that is a file.
    pub(super) fn of(target: Target) -> Result<Option<Self>> {
        let seeds: Vec<Value> = match target {
            Target::Chat => chats(),
            Target::Completions => completions(),
            Target::Responses => responses(),
            Target::Messages => messages(),
            Target::Grammar => grammars(),
            Target::Parsers | Target::Markdown | Target::Labels => Vec::new(),
            _ => return Ok(None),
        };
        let mut seeds: Vec<Vec<u8>> = seeds.iter().map(|s| s.to_string().into()).collect();
        if seeds.is_empty() {
            seeds.push(SAYINGS.to_vec());
        }
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().context("threads")?;
        // Calls are bound in two forms: bodies of conversations meet the one, grammars the other.
        let format = match target {
            Target::Grammar => Format::Mimo,
            _ => Format::Hermes,
        };
        let router = open("fuzzed", format)?;
        Ok(Some(Self {
            target,
            seeds,
            runtime,
            router,
        }))
    }

    /// Whether the input was accepted.
    pub(super) fn try_input(&self, input: &[u8]) -> Result<bool> {
        let path = match self.target {
            Target::Parsers => return Ok(parses(input)),
            Target::Labels => return self.labels(input),
            Target::Markdown => return Ok(self.markdown(input)),
            Target::Chat | Target::Grammar => "/v1/chat/completions",
            Target::Completions => "/v1/completions",
            Target::Responses => "/v1/responses",
            _ => "/v1/messages",
        };
        let (status, text) = self.post(&self.router, path, input);
        assert!(status != 500 && status != 503, "{status}: {text}");
        if text.starts_with("event:") || text.starts_with("data:") {
            check_events(&text, path);
        } else {
            let _: Value = serde_json::from_str(&text).expect("an answer in JSON");
        }
        Ok(status == 200)
    }

    fn post(&self, router: &Router, path: &str, body: &[u8]) -> (u16, String) {
        let request = Request::post(path).header("content-type", "application/json");
        let request = request.body(Body::from(body.to_vec())).expect("a request");
        self.send(router, request)
    }

    fn send(&self, router: &Router, request: Request<Body>) -> (u16, String) {
        self.runtime.block_on(async {
            let response = router.clone().oneshot(request).await.expect("an answer");
            let status = response.status().as_u16();
            let body = response.into_body().collect().await.expect("a body");
            let text = String::from_utf8(body.to_bytes().to_vec());
            (status, text.expect("whole UTF-8"))
        })
    }

    /// No handler, script or foreign tag comes out, whatever goes in.
    fn markdown(&self, input: &[u8]) -> bool {
        let text = String::from_utf8_lossy(input);
        let (status, html) = self.post(&self.router, "/api/render", text.as_bytes());
        assert!(status != 500, "{html}");
        let html = html.to_lowercase();
        let tags = html
            .split('<')
            .skip(1)
            .map(|tag| tag.split('>').next().unwrap_or(""));
        for tag in tags {
            assert!(!tag.starts_with("script") && !tag.contains(" on"), "{tag}");
            assert!(!tag.contains("href=\"javascript:"), "{tag}");
        }
        status == 200
    }

    /// A page of metrics whose label is the input is still one sample a line.
    fn labels(&self, input: &[u8]) -> Result<bool> {
        let name = String::from_utf8_lossy(input);
        let router = open(&name, Format::Hermes)?;
        let request = Request::get("/metrics").body(Body::empty())?;
        let (status, page) = self.send(&router, request);
        assert_eq!(status, 200);
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            check_sample(line);
        }
        Ok(true)
    }
}

/// `name{label="value",…} number`, with quotes and backslashes escaped.
fn check_sample(line: &str) {
    let mut quoted = false;
    let mut escaped = false;
    let mut end = 0;
    for (at, c) in line.char_indices() {
        match c {
            _ if escaped => {
                assert!("\\\"n".contains(c), "{line}");
                escaped = false;
            }
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '}' if !quoted => end = at + 1,
            _ => {}
        }
    }
    let value = line[end..].rsplit(' ').next().unwrap_or_default();
    assert!(!quoted && value.parse::<f64>().is_ok(), "{line}");
}

fn check_events(text: &str, path: &str) {
    assert!(text.ends_with("\n\n"), "cut off: {text}");
    for line in text.lines() {
        let known = ["data: ", "event: ", ":"]
            .iter()
            .any(|start| line.starts_with(start));
        assert!(line.is_empty() || known, "{line}");
        if let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") {
            let _: Value = serde_json::from_str(data).expect("an event in JSON");
        }
    }
    if path.contains("completions") {
        assert!(text.ends_with("data: [DONE]\n\n") && text.matches("[DONE]\n\n").count() >= 1);
    }
}

/// The same parts however the text is cut, and no text lost by the plain parser.
fn parses(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let schema = json!({"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "string"}}}}});
    let mut cuts = Mutator::new(input.len() as u64);
    let mut calls = false;
    for format in Format::NAMES
        .iter()
        .filter_map(|name| Format::of_name(name))
    {
        for thinking in [false, true] {
            let expect = || Expect {
                thinking,
                tools: true,
                reasoning: true,
                schemas: vec![schema.clone()],
            };
            let mut whole = Vec::new();
            let mut parser = Parser::new(format, expect());
            parser.push(&text, &mut whole);
            parser.finish(true, &mut whole);
            let mut pieces = Vec::new();
            let mut parser = Parser::new(format, expect());
            let mut piece = String::new();
            for c in text.chars() {
                piece.push(c);
                if cuts.next(4) == 0 {
                    parser.push(&std::mem::take(&mut piece), &mut pieces);
                }
            }
            parser.push(&piece, &mut pieces);
            parser.finish(true, &mut pieces);
            calls |= whole.len() > 1;
            assert_eq!(join(whole), join(pieces));
        }
    }
    calls
}

/// A server over a decoder that says [`SAYINGS`].
fn open(name: &str, format: Format) -> Result<Router> {
    let options = ScriptedOptions {
        limits: Limits {
            context_tokens: 2048,
            ..ScriptedOptions::default().limits
        },
        drafter: Drafter::Sometimes(0.7),
        ..ScriptedOptions::default()
    };
    let text = ModelText::bytes(options.limits.vocab_size)?;
    let say = |tokens: &[u32]| {
        let at = tokens.len() + tokens.first().map_or(0, |t| *t as usize * 13);
        u32::from(SAYINGS[at % SAYINGS.len()])
    };
    let decoder = Scripted::new(options, Script::Token(Arc::new(say)));
    let options = EngineOptions {
        calibrate: false,
        ..EngineOptions::default()
    };
    let engine: EngineHandle = Engine::start(Box::new(decoder), text.detokenizer(), options)?;
    let settings = Settings {
        model_name: name.to_owned(),
        format: Some(format),
        ..Settings::default()
    };
    Ok(router(&Served::new(settings, engine, text)?))
}

fn tool() -> Value {
    json!({"type": "function", "function": {"name": "f", "description": "d", "strict": true, "parameters": {
        "type": "object", "properties": {"x": {"type": "array", "items": {"type": "integer"}}}, "required": ["x"]}}})
}

fn chats() -> Vec<Value> {
    let call = json!([{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": [1]}"}}]);
    vec![
        json!({"model": "fuzzed", "max_tokens": 40, "messages": [{"role": "user", "content": "a"}]}),
        json!({"model": "fuzzed", "max_completion_tokens": 60, "stream": true, "n": 2, "seed": -5,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
            "include_metrics": true, "return_token_ids": true, "return_steps": true,
            "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "logprobs": true, "top_logprobs": 3,
            "stop": ["x", "\n\n"], "logit_bias": {"5": -100, "7": 3.5}, "presence_penalty": 1,
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "é"}]}]}),
        json!({"model": "fuzzed", "max_tokens": 80, "stream": true, "tools": [tool()], "tool_choice": "auto",
            "parallel_tool_calls": false, "reasoning_effort": "low", "thinking_token_budget": 5,
            "chat_template_kwargs": {"enable_thinking": true}, "thinking": {"type": "enabled", "budget_tokens": 5},
            "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": null, "tool_calls": call},
                {"role": "tool", "tool_call_id": "c1", "content": "7"}]}),
        json!({"model": "fuzzed", "max_tokens": 30, "tools": [tool()],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "messages": [{"role": "user", "content": "u"}]}),
    ]
}

fn completions() -> Vec<Value> {
    vec![
        json!({"model": "fuzzed", "prompt": "abc", "max_tokens": 20, "echo": true, "logprobs": 2}),
        json!({"model": "fuzzed", "prompt": ["a", "b"], "max_tokens": 20, "stream": true, "n": 2,
            "prompt_logprobs": 1, "ignore_eos": true, "min_tokens": 3, "stop_token_ids": [10],
            "include_stop_str_in_output": true, "cache_salt": "s", "priority": 1, "request_id": "r"}),
        json!({"model": "fuzzed", "prompt": [[1, 2], [3]], "max_tokens": 5, "structured_outputs": {"choice": ["a", "b"]}}),
    ]
}

fn responses() -> Vec<Value> {
    vec![
        json!({"model": "fuzzed", "input": "a", "max_output_tokens": 40}),
        json!({"model": "fuzzed", "max_output_tokens": 60, "stream": true, "store": false, "instructions": "i",
            "reasoning": {"effort": "low", "summary": "auto"}, "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "k", "metadata": {"a": "b"}, "text": {"format": {"type": "json_schema",
                "name": "n", "strict": true, "schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}},
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": true}],
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "u"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "7"}]}),
    ]
}

fn messages() -> Vec<Value> {
    vec![
        json!({"model": "fuzzed", "max_tokens": 40, "messages": [{"role": "user", "content": "a"}]}),
        json!({"model": "fuzzed", "max_tokens": 60, "stream": true, "system": [{"type": "text", "text": "s",
                "cache_control": {"type": "ephemeral"}}], "stop_sequences": ["x"], "top_k": 3, "metadata": {"user_id": "u"},
            "thinking": {"type": "enabled", "budget_tokens": 1024}, "tool_choice": {"type": "any"},
            "tools": [{"name": "f", "description": "d", "strict": true, "input_schema": {"type": "object", "properties": {}}}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "7"}]}]}),
    ]
}

fn grammars() -> Vec<Value> {
    let ask = |field: &str, value: Value| {
        let mut body = json!({"model": "fuzzed", "max_tokens": 30, "messages": [{"role": "user", "content": "a"}]});
        body[field] = value;
        body
    };
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["a"], "properties": {
        "a": {"type": "string", "pattern": "^[a-c]{2,5}$", "maxLength": 5}, "b": {"enum": [1, null, "x"]},
        "c": {"type": "array", "items": {"$ref": "#/$defs/d"}, "minItems": 1, "maxItems": 3},
        "e": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 7}, "f": {"anyOf": [{"type": "null"}, {"format": "date"}]}},
        "$defs": {"d": {"type": "integer", "multipleOf": 3}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": &schema}});
    let lark = "start: A \"x\" b*\nb: \"(\" b \")\" | /[0-9]+/\nA: /a{2,7}/";
    let bound = |by: Value| ask("structured_outputs", by);
    let strict = json!([{"function": {"name": "f", "strict": true, "parameters": schema}}, tool(), {"function": {"name": "g"}}]);
    vec![
        ask("response_format", format),
        ask("response_format", json!({"type": "json_object"})),
        ask("tools", strict),
        bound(json!({"regex": "(a|b){1,4}[^c-f]?\\d+"})),
        bound(json!({"grammar": lark})),
        bound(json!({"choice": ["one", "two \" three"]})),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn every_request_is_accepted_before_it_is_changed() {
        for target in Target::value_variants() {
            let Some(service) = Service::of(*target).unwrap() else {
                continue;
            };
            for seed in service.seeds.iter().filter(|seed| seed[0] == b'{') {
                let text = String::from_utf8_lossy(seed);
                assert!(service.try_input(seed).unwrap(), "{target:?} {text}");
            }
        }
    }
}
