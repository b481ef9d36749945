//! OpenTelemetry: what a collector gets of a request, and that it gets nothing of its text.

#[allow(dead_code)] // Each test binary uses a part of it.
mod harness;

use harness::Server;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// A collector that takes one export: its address, and the path and body it will have got.
fn collector() -> (String, JoinHandle<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let export = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut got = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let read = socket.read(&mut buffer).unwrap();
            got.extend_from_slice(&buffer[..read]);
            let Some(end) = got.windows(4).position(|bytes| bytes == b"\r\n\r\n") else {
                continue;
            };
            let head = String::from_utf8(got[..end].to_vec()).unwrap();
            let length = head
                .lines()
                .find_map(|l| l.strip_prefix("content-length: "));
            if got.len() - end - 4 == length.unwrap().parse::<usize>().unwrap() {
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                socket.write_all(answer).unwrap();
                return (head, got[end + 4..].to_vec());
            }
        }
    });
    (address, export)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attribute(span: &Span, name: &str) -> Any {
    let found = span.attributes.iter().find(|one| one.key == name);
    let value = found.and_then(|one| one.value.clone()?.value);
    value.unwrap_or_else(|| panic!("no {name}"))
}

#[tokio::test]
async fn a_collector_gets_a_span_with_counts_and_no_text() {
    let (address, export) = collector();
    let server = Server::build("answered\u{100}", |settings| {
        settings.otlp_endpoint = Some(address);
        settings.api_keys = vec!["a-secret-key".to_owned()];
    });
    let body = json!({"model": "test", "messages": [{"role": "user", "content": "a private question"}], "max_tokens": 50});
    let caller = format!("00-{TRACE}-{CALLER}-01");
    let headers = [
        ("authorization", "Bearer a-secret-key"),
        ("traceparent", caller.as_str()),
    ];
    let reply = server
        .send("POST", "/v1/chat/completions", &headers, &body.to_string())
        .await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let usage = reply.json()["usage"].clone();
    let served = Arc::clone(&server.served);
    tokio::task::spawn_blocking(move || served.end_traces())
        .await
        .unwrap();
    let (head, bytes) = export.join().unwrap();
    assert!(head.starts_with("POST /v1/traces HTTP/1.1"), "{head}");
    assert!(head.contains("application/x-protobuf"), "{head}");
    for secret in ["private", "answered", "secret"] {
        let secret = secret.as_bytes();
        assert!(!bytes.windows(secret.len()).any(|part| part == secret));
    }
    let export = ExportTraceServiceRequest::decode(bytes.as_slice()).unwrap();
    let spans = &export.resource_spans[0].scope_spans[0].spans;
    let request = spans.iter().find(|s| s.name == "chat test").unwrap();
    assert_eq!(hex(&request.trace_id), TRACE);
    assert_eq!(hex(&request.parent_span_id), CALLER);
    let count = |name| match attribute(request, name) {
        Any::IntValue(count) => count,
        other => panic!("{name}: {other:?}"),
    };
    let tokens = |name| usage[name].as_i64().unwrap();
    assert_eq!(count("gen_ai.usage.input_tokens"), tokens("prompt_tokens"));
    assert_eq!(
        count("gen_ai.usage.output_tokens"),
        tokens("completion_tokens")
    );
    let model = Any::StringValue("test".to_owned());
    assert_eq!(attribute(request, "gen_ai.request.model"), model);
    let finish = format!("{:?}", attribute(request, "gen_ai.response.finish_reasons"));
    assert!(finish.contains("stop"), "{finish}");
    let first = attribute(request, "gen_ai.latency.time_to_first_token");
    assert!(matches!(first, Any::DoubleValue(seconds) if seconds > 0.0));
    for phase in ["queue", "prefill", "decode"] {
        let span = spans.iter().find(|span| span.name == phase).unwrap();
        assert_eq!(span.parent_span_id, request.span_id);
        assert!(span.end_time_unix_nano >= span.start_time_unix_nano);
    }
}
