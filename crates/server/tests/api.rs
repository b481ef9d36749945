//! The API over a scripted engine, through the router, without sockets.

mod harness;

use engine::scripted::{Script, ScriptedOptions};
use harness::{Reply, Server};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

#[tokio::test]
async fn a_chat_answers_whole_and_streamed_alike() {
    let server = Server::saying("Hello there.");
    let mut body = json!({"model": "test", "messages": user("hi"), "max_tokens": 12, "foo": 1});
    let whole = server.post("/v1/chat/completions", &body).await;
    assert_eq!(whole.status, 200, "{}", whole.text);
    assert_eq!(whole.headers["x-ignored-params"], "foo");
    let json = whole.json();
    let text = json["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(text, "Hello there.");
    assert_eq!(json["choices"][0]["finish_reason"], "length");
    assert_eq!(json["usage"]["completion_tokens"], 12);
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let events = server.post("/v1/chat/completions", &body).await.events();
    let joined: String = events
        .iter()
        .filter_map(|e| e["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(joined, text);
    let last = events.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 12);
}

#[tokio::test]
async fn an_answer_without_a_length_ends_at_the_usual_one() {
    let body = json!({"messages": user("x"), "draft_tokens": 7});
    let own = Server::build("abc", |settings| settings.answer_tokens = Some(9));
    // A quarter of the scripted model's 8,192.
    for (server, tokens) in [(own, 9), (Server::saying("abc"), 2048)] {
        let json = server.post("/v1/chat/completions", &body).await.json();
        assert_eq!(json["usage"]["completion_tokens"], tokens);
        assert_eq!(json["choices"][0]["finish_reason"], "length");
    }
}

#[tokio::test]
async fn steps_and_metrics_tell_how_drafting_went() {
    let server = Server::saying("abcdefghij");
    let body = json!({"messages": user("x"), "max_tokens": 32, "stream": true, "return_steps": true,
        "include_metrics": true, "return_token_ids": true, "draft_tokens": 7});
    let events = server.post("/v1/chat/completions", &body).await.events();
    let steps: Vec<&Value> = events.iter().filter(|e| !e["step"].is_null()).collect();
    let tokens: usize = steps
        .iter()
        .map(|e| e["choices"][0]["token_ids"].as_array().unwrap().len())
        .sum();
    assert_eq!(tokens, 32);
    assert!(
        steps
            .iter()
            .all(|e| e["step"]["accepted"].as_u64().unwrap() <= 7)
    );
    let block = &events.last().unwrap()["metrics"]["speculative_decoding"];
    assert_eq!(block["num_spec_steps"], steps.len());
    let histogram = block["acceptance_histogram"].as_array().unwrap();
    let sum: u64 = histogram.iter().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(sum, steps.len() as u64);
}

#[tokio::test]
async fn parallel_samples_and_logprobs() {
    let server = Server::saying("xyz");
    let body = json!({"messages": user("x"), "max_tokens": 3, "n": 2, "logprobs": true,
        "top_logprobs": 2});
    let json = server.post("/v1/chat/completions", &body).await.json();
    for index in 0..2 {
        let choice = &json["choices"][index];
        assert_eq!(choice["index"], index);
        let rows = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[0]["token"], "x");
        assert_eq!(rows[0]["bytes"], json!([120]));
        assert_eq!(rows[0]["top_logprobs"].as_array().unwrap().len(), 2);
    }
}

#[tokio::test]
async fn completions_take_texts_and_ids_and_score_prompts() {
    let server = Server::saying("abc");
    let body = json!({"prompt": ["\u{1}", [1, 2]], "max_tokens": 3});
    let json = server.post("/v1/completions", &body).await.json();
    assert_eq!(json["choices"].as_array().unwrap().len(), 2);
    assert_eq!(json["choices"][1]["text"], "abc");
    let body = json!({"prompt": [1, 97, 98], "max_tokens": 1, "echo": true, "logprobs": 1});
    let json = server.post("/v1/completions", &body).await.json();
    let choice = &json["choices"][0];
    assert_eq!(choice["text"], "\u{1}abc");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["token_logprobs"].as_array().unwrap().len(), 4);
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert!(logprobs["token_logprobs"][1].as_f64().unwrap() > -0.01);
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3]));
}

#[tokio::test]
async fn stop_strings_end_the_text_and_are_named() {
    let server = Server::saying("one two three four");
    let body = json!({"messages": user("x"), "max_tokens": 64, "stop": ["thr"]});
    let json = server.post("/v1/chat/completions", &body).await.json();
    let choice = &json["choices"][0];
    assert_eq!(choice["message"]["content"], "one two ");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["stop_reason"], "thr");
}

#[tokio::test]
async fn a_tool_call_comes_as_one_in_all_three_protocols() {
    let call = "Sure. <tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call>\u{100}";
    let server = Server::saying(call);
    let parameters = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let tools =
        json!([{"type": "function", "function": {"name": "add", "parameters": parameters}}]);
    let body = json!({"messages": user("x"), "tools": tools, "stream": true});
    let events = server.post("/v1/chat/completions", &body).await.events();
    let text = |event: &Value| {
        let call = &event["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"];
        call.as_str().map(str::to_owned)
    };
    let arguments: String = events.iter().filter_map(text).collect();
    assert_eq!(arguments, "{\"a\": 1}");
    let finish = events
        .iter()
        .find_map(|e| e["choices"][0]["finish_reason"].as_str());
    assert_eq!(finish, Some("tool_calls"));

    let tools = json!([{"name": "add", "input_schema": parameters}]);
    let body = json!({"messages": user("x"), "max_tokens": 200, "tools": tools});
    let json = server.post("/v1/messages", &body).await.json();
    assert_eq!(json["content"][0]["text"], "Sure.");
    assert_eq!(json["content"][1]["type"], "tool_use");
    assert_eq!(json["content"][1]["input"], json!({"a": 1}));
    assert_eq!(json["stop_reason"], "tool_use");

    let tools = json!([{"type": "function", "name": "add", "parameters": parameters}]);
    let body = json!({"model": "test", "input": "x", "tools": tools});
    let json = server.post("/v1/responses", &body).await.json();
    assert_eq!(json["status"], "completed");
    assert_eq!(json["output"][1]["type"], "function_call");
    assert_eq!(json["output"][1]["arguments"], "{\"a\": 1}");
}

#[tokio::test]
async fn anthropic_streams_are_blocks_in_order() {
    let server = Server::saying("Hi.\u{100}");
    let body = json!({"messages": user("x"), "max_tokens": 20, "stream": true});
    let reply = server.post("/v1/messages", &body).await;
    let names: Vec<&str> = reply
        .text
        .lines()
        .filter_map(|line| line.strip_prefix("event: "))
        .collect();
    let (first, last) = (names.first().unwrap(), names.last().unwrap());
    assert_eq!((*first, *last), ("message_start", "message_stop"));
    let position = |name| names.iter().position(|n| *n == name).unwrap();
    assert!(position("content_block_start") < position("content_block_delta"));
    assert!(position("content_block_stop") < position("message_delta"));
}

#[tokio::test]
async fn responses_streams_number_their_events_and_end_complete() {
    let server = Server::saying("Hi.\u{100}");
    let body = json!({"model": "test", "input": user("x"), "stream": true});
    let events = server.post("/v1/responses", &body).await.events();
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
    let last = events.last().unwrap();
    assert_eq!(last["type"], "response.completed");
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], "Hi.");
    let body = json!({"model": "test", "input": "x", "previous_response_id": "y"});
    assert_eq!(server.post("/v1/responses", &body).await.status, 400);
}

#[tokio::test]
async fn structured_output_holds_with_drafting() {
    let server = Server::saying("not json at all");
    let schema = json!({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
        "additionalProperties": false});
    for draft_tokens in [0, 7] {
        let body = json!({"messages": user("x"), "max_tokens": 40, "draft_tokens": draft_tokens,
            "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}});
        let json = server.post("/v1/chat/completions", &body).await.json();
        let text = json["choices"][0]["message"]["content"].as_str().unwrap();
        let value: Value = serde_json::from_str(text).unwrap_or_else(|_| panic!("{text}"));
        assert!(value["a"] == 1 || value["a"] == 2, "{text}");
    }
    let bad = json!({"messages": user("x"), "response_format": {"type": "regex", "pattern": "("}});
    let reply = server.post("/v1/chat/completions", &bad).await;
    assert_eq!(
        (reply.status, reply.param()),
        (400, "response_format".to_owned())
    );
}

#[tokio::test]
async fn a_required_tool_is_called() {
    let server = Server::saying("I would rather talk.");
    let tools = json!([{"type": "function", "function": {"name": "add", "parameters":
        {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}}}]);
    let body = json!({"messages": user("x"), "tools": tools, "tool_choice": "required",
        "parallel_tool_calls": false, "max_tokens": 200});
    let json = server.post("/v1/chat/completions", &body).await.json();
    let call = &json["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(call["name"], "add", "{json}");
}

#[tokio::test]
async fn strict_tools_bind_their_calls_in_all_three_protocols() {
    let call =
        "Sure. <tool_call>{\"name\": \"add\", \"arguments\": {\"b\": \"x\"}}</tool_call>\u{100}";
    let server = Server::saying(call);
    let parameters = json!({"type": "object", "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"], "additionalProperties": false});
    let mut function = json!({"name": "add", "parameters": parameters, "strict": true});
    let mut body = json!({"messages": user("x"), "max_tokens": 200, "parallel_tool_calls": false,
        "tools": [{"type": "function", "function": function}]});
    let json = server.post("/v1/chat/completions", &body).await.json();
    let message = &json["choices"][0]["message"];
    assert_eq!(message["content"], "Sure.", "{json}");
    let arguments = &message["tool_calls"][0]["function"]["arguments"];
    assert_eq!(*arguments, "{\"a\": 1}", "{json}");

    function["type"] = "function".into();
    let responses = json!({"model": "test", "input": "x", "max_output_tokens": 200,
        "parallel_tool_calls": false, "tools": [function]});
    let json = server.post("/v1/responses", &responses).await.json();
    assert_eq!(json["output"][1]["arguments"], "{\"a\": 1}", "{json}");

    let tools = json!([{"name": "add", "input_schema": parameters, "strict": true}]);
    let messages = json!({"messages": user("x"), "max_tokens": 200, "tools": tools,
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": true}});
    let json = server.post("/v1/messages", &messages).await.json();
    assert_eq!(json["content"][1]["input"], json!({"a": 1}), "{json}");

    body["tools"][0]["function"]["parameters"]["properties"]["a"] = json!({"not": {}});
    let reply = server.post("/v1/chat/completions", &body).await;
    assert_eq!((reply.status, reply.param()), (400, "tools".to_owned()));
}

#[tokio::test]
async fn bad_requests_name_their_field_in_the_routes_dialect() {
    let server = Server::saying("x");
    for (path, body, param) in [
        ("/v1/chat/completions", json!({}), "messages"),
        (
            "/v1/chat/completions",
            json!({"messages": user("x"), "n": 5}),
            "n",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user("x"), "top_logprobs": 1}),
            "top_logprobs",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user("x"), "logprobs": true, "top_logprobs": 21}),
            "top_logprobs",
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "suffix": "y"}),
            "suffix",
        ),
        ("/v1/completions", json!({"prompt": []}), "prompt"),
        ("/v1/completions", json!({"prompt": [99_999]}), "prompt"),
        ("/v1/responses", json!({}), "input"),
    ] {
        let reply = server.post(path, &body).await;
        assert_eq!(
            (reply.status, reply.param()),
            (400, param.to_owned()),
            "{path} {body}"
        );
    }
    let reply = server
        .post("/v1/messages", &json!({"messages": user("x")}))
        .await;
    assert_eq!(reply.status, 400);
    assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
    let unnamed = json!({"messages": user("x")}).to_string();
    let reply = server
        .send("POST", "/v1/chat/completions", &[], &unnamed)
        .await;
    assert_eq!((reply.status, reply.param()), (400, "model".to_owned()));
    let reply = server
        .post("/v1/chat/completions", &json!({"model": "other"}))
        .await;
    assert_eq!(reply.status, 404);
}

#[tokio::test]
async fn known_but_absent_routes_say_so() {
    let server = Server::saying("x");
    assert_eq!(server.post("/v1/embeddings", &json!({})).await.status, 501);
    assert_eq!(server.post("/v1/nothing", &json!({})).await.status, 404);
    assert_eq!(server.get("/v1/chat/completions").await.status, 405);
}

#[tokio::test]
async fn every_route_needs_a_key_but_probes_and_page() {
    let server = Server::build("x", |settings| {
        settings.api_keys = vec!["secret".to_owned()]
    });
    let document = {
        let reply = server
            .send("GET", "/openapi.json", &[("x-api-key", "secret")], "")
            .await;
        reply.json()
    };
    let open = ["/health", "/health/live", "/", "/page/{file}", "/api/apply"];
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, _) in methods.as_object().unwrap() {
            let reply = server.send(&method.to_uppercase(), path, &[], "{}").await;
            let expected = !open.contains(&path.as_str());
            assert_eq!(
                reply.status == 401,
                expected,
                "{method} {path}: {}",
                reply.status
            );
        }
    }
}

#[tokio::test]
async fn cached_prefixes_are_not_shared_between_keys() {
    let keys = vec!["a".to_owned(), "b".to_owned()];
    let server = Server::build("x", |settings| settings.api_keys = keys);
    let prompt = user(&"long prompt ".repeat(40));
    let body = json!({"model": "test", "messages": prompt, "max_tokens": 2}).to_string();
    let cached = |reply: Reply| {
        reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    let ask = |key: &'static str| {
        let (server, body) = (&server, &body);
        async move {
            server
                .send("POST", "/v1/chat/completions", &[("api-key", key)], body)
                .await
        }
    };
    assert_eq!(cached(ask("a").await), 0);
    assert!(cached(ask("a").await) > 100);
    assert_eq!(cached(ask("b").await), 0);
}

#[tokio::test]
async fn health_models_tokens_and_metrics() {
    let server = Server::saying("x");
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(
        server.get("/v1/models").await.json()["data"][0]["id"],
        "test"
    );
    let tokens = server
        .post("/tokenize", &json!({"prompt": "ab"}))
        .await
        .json();
    assert_eq!(
        (&tokens["count"], &tokens["tokens"]),
        (&json!(2), &json!([97, 98]))
    );
    let text = server
        .post("/detokenize", &json!({"tokens": [97, 98]}))
        .await
        .json();
    assert_eq!(text["prompt"], "ab");
    let count = json!({"messages": user("abc")});
    let count = server
        .post("/v1/messages/count_tokens", &count)
        .await
        .json();
    assert!(count["input_tokens"].as_u64().unwrap() > 3);
    let body = json!({"messages": user("x"), "max_tokens": 5});
    server.post("/v1/chat/completions", &body).await;
    let page = server.get("/metrics").await.text;
    for name in [
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:spec_decode_num_drafts_total",
        "vllm:request_success_total",
        "kilotok_engine_heartbeat_age_seconds",
        "kilotok_sse_flush_seconds_count",
    ] {
        assert!(page.contains(name), "{name}");
    }
}

#[tokio::test]
async fn a_draining_server_refuses_and_closes() {
    let server = Server::saying("x");
    server.served.drain();
    assert_eq!(server.get("/health").await.status, 503);
    assert_eq!(server.get("/health/live").await.status, 200);
    let body = json!({"messages": user("x")});
    let reply = server.post("/v1/chat/completions", &body).await;
    assert_eq!(reply.status, 503);
    assert_eq!(reply.headers["connection"], "close");
    assert_eq!(reply.headers["retry-after"], "1");
}

#[tokio::test]
async fn a_failed_engine_ends_streams_with_an_error_and_is_not_ready() {
    let server = Server::failing_at(3);
    let body = json!({"messages": user("x"), "max_tokens": 500, "stream": true, "draft_tokens": 0});
    let reply = server.post("/v1/chat/completions", &body).await;
    assert!(reply.text.contains("\"error\""), "{}", reply.text);
    assert!(reply.text.trim_end().ends_with("data: [DONE]"));
    assert_eq!(server.get("/health").await.status, 503);
}

/// Gate 4: how long a silent engine stays ready is printed; `--nocapture` shows it.
#[tokio::test]
async fn a_silent_engine_is_not_ready_until_it_speaks_again() {
    let stuck = Arc::new(Mutex::new(()));
    let script = {
        let stuck = Arc::clone(&stuck);
        Script::Token(Arc::new(move |_| {
            drop(stuck.lock().unwrap());
            u32::from(b'a')
        }))
    };
    let server = Server::scripted(script, ScriptedOptions::default(), |_| {});
    assert_eq!(server.get("/health").await.status, 200);
    let held = stuck.lock().unwrap();
    let asked = Instant::now();
    let body = json!({"prompt": "x", "max_tokens": 3, "stream": true});
    let request = server.post("/v1/completions", &body);
    let watch = async {
        let mut last = server.get("/health").await;
        while last.status == 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            last = server.get("/health").await;
        }
        println!(
            "not ready {:.0} ms after the request",
            asked.elapsed().as_secs_f64() * 1e3
        );
        assert_eq!(last.status, 503);
        assert!(last.text.contains("silent"), "{}", last.text);
        assert_eq!(server.get("/health/live").await.status, 200);
        drop(held);
        while server.get("/health").await.status != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let (reply, ()) = tokio::join!(request, watch);
    assert!(reply.text.trim_end().ends_with("data: [DONE]"));
}

#[tokio::test]
async fn markdown_is_rendered_and_the_page_has_its_policy() {
    let server = Server::saying("x");
    let reply = server
        .send("POST", "/api/render", &[], "**b** <script>x</script>")
        .await;
    assert!(reply.text.contains("<strong>b</strong>") && !reply.text.contains("<script"));
    let page = server.get("/").await;
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"));
    assert!(!page.text.contains("onclick=") && !page.text.contains("<style"));
}

#[tokio::test]
async fn bodies_over_the_limit_are_413_and_deep_ones_400() {
    let server = Server::build("x", |settings| settings.limits.body_bytes = 1000);
    let body = json!({"messages": user(&"x".repeat(1000))});
    assert_eq!(server.post("/v1/chat/completions", &body).await.status, 413);
    let deep = "[".repeat(200) + &"]".repeat(200);
    assert_eq!(
        server
            .send("POST", "/v1/chat/completions", &[], &deep)
            .await
            .status,
        400
    );
}

#[tokio::test]
async fn a_long_prompt_is_scored_at_once() {
    let server = Server::saying("x");
    // Its log-probabilities are more than a reader may leave unread.
    let body = json!({"prompt": "scored ".repeat(1000), "max_tokens": 2, "echo": true,
        "logprobs": 5});
    let reply = server.post("/v1/completions", &body).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let scores = reply.json()["choices"][0]["logprobs"]["token_logprobs"].clone();
    assert_eq!(scores.as_array().unwrap().len(), 7002);
}

#[tokio::test]
async fn pages_from_elsewhere_are_refused_unless_listed() {
    let origin = "https://chat.example.org";
    let known = Server::build("x", |s| s.cors_origins = vec![origin.to_owned()]);
    for (server, origin, listed) in [
        (&Server::saying("x"), origin, false),
        (&known, origin, true),
        (&known, "https://chat.example.org.evil", false),
    ] {
        let headers = [("origin", origin)];
        let reply = server.send("GET", "/v1/models", &headers, "").await;
        let allowed = reply.headers.get("access-control-allow-origin");
        assert_eq!(allowed.is_some(), listed, "{origin}");
        let asked = server.send("OPTIONS", "/v1/models", &headers, "").await;
        assert_eq!(asked.status, if listed { 204 } else { 403 }, "{origin}");
    }
}

#[tokio::test]
async fn cached_prefixes_are_not_shared_between_salts() {
    let server = Server::saying("x");
    let mut cached = Vec::new();
    for salt in ["a", "a", "b"] {
        let body = json!({"messages": user(&"long prompt ".repeat(40)), "max_tokens": 2,
            "cache_salt": salt});
        let json = server.post("/v1/chat/completions", &body).await.json();
        let found = &json["usage"]["prompt_tokens_details"]["cached_tokens"];
        cached.push(found.as_u64().unwrap());
    }
    assert!(
        cached[0] == 0 && cached[1] > 100 && cached[2] == 0,
        "{cached:?}"
    );
}
