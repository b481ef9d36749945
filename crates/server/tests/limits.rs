//! Gate 16: each input at its limit is taken, one more is 400 with the field in `param`.

#[allow(dead_code)] // Each test binary uses a part of it.
mod harness;

use harness::Server;
use serde_json::{Map, Value, json};

const CHAT: &str = "/v1/chat/completions";

fn chat(more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn schema(bytes: usize) -> Value {
    let empty = json!({"type": "string", "description": ""})
        .to_string()
        .len();
    let schema = json!({"type": "string", "description": "d".repeat(bytes - empty)});
    json!({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}})
}

fn tools(count: usize) -> Value {
    let tool = |i: usize| json!({"type": "function", "function": {"name": format!("f{i}")}});
    json!({"tool_choice": "none", "tools": (0..count).map(tool).collect::<Vec<_>>()})
}

fn biases(count: usize) -> Value {
    let biases: Map<String, Value> = (0..count).map(|i| (i.to_string(), json!(1))).collect();
    json!({"logit_bias": biases})
}

fn messages(count: usize) -> Value {
    json!({"messages": vec![json!({"role": "user", "content": ""}); count]})
}

#[tokio::test]
async fn at_the_limit_and_one_more() {
    let server = Server::saying("x");
    let limits = server::limits::Limits::default();
    let case = |param, make: &dyn Fn(usize) -> Value, most: usize| {
        (param, CHAT, chat(make(most)), chat(make(most + 1)))
    };
    let stops = |count: usize| json!({"stop": vec!["stop"; count]});
    let stop = |bytes: usize| json!({"stop": "s".repeat(bytes)});
    let samples = |n: usize| json!({"n": n, "temperature": 1});
    let top = |n: usize| json!({"logprobs": true, "top_logprobs": n});
    let prompts = |count: usize| json!({"prompt": vec!["x"; count], "max_tokens": 1});
    for (param, path, right, wrong) in [
        case("n", &samples, limits.samples as usize),
        case("stop", &stops, limits.stops),
        case("stop", &stop, limits.stop_bytes),
        case("top_logprobs", &top, limits.top_logprobs as usize),
        case("tools", &tools, limits.tools),
        case("response_format", &schema, limits.schema_bytes),
        (
            "prompt",
            "/v1/completions",
            prompts(limits.prompts),
            prompts(limits.prompts + 1),
        ),
    ] {
        let reply = server.post(path, &right).await;
        assert_eq!(reply.status, 200, "{param} at its limit: {}", reply.text);
        let reply = server.post(path, &wrong).await;
        assert_eq!(reply.status, 400, "{param}: {}", reply.text);
        assert!(reply.param().starts_with(param), "{param}: {}", reply.text);
    }
    // The scripted model has 512 tokens: more biases than it has tokens are too many first.
    let reply = server.post(CHAT, &chat(biases(limits.biases + 1))).await;
    assert_eq!((reply.status, reply.param().as_str()), (400, "logit_bias"));
    // Ten thousand empty messages are longer than the scripted model's context, which is another refusal.
    let reply = server.post(CHAT, &chat(messages(limits.messages))).await;
    assert_eq!(reply.status, 400);
    assert_ne!(reply.param(), "messages", "{}", reply.text);
    let reply = server
        .post(CHAT, &chat(messages(limits.messages + 1)))
        .await;
    assert_eq!((reply.status, reply.param().as_str()), (400, "messages"));
}
