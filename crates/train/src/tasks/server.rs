//! One chat completion over HTTP/1.1: a socket a request, closed by the server.
//!
//! Refuses what it does not need: TLS, redirects, chunked bodies.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use crate::error::{Error, Result};

/// What the model answered.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Calls as `{"name": ..., "arguments": {...}}`.
    pub calls: Vec<Value>,
    /// Why it ended.
    pub finish: String,
    /// The block `metrics`, where it was asked for.
    pub metrics: Value,
}

/// Posts `body` to `/v1/chat/completions` of `server`, `HOST:PORT`.
pub fn ask(server: &str, body: &Value) -> Result<Answer> {
    let wrong = |what: String| Error::Invalid(format!("server {server}: {what}"));
    let body = body.to_string();
    let mut stream = TcpStream::connect(server).map_err(|e| wrong(e.to_string()))?;
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {server}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let mut bytes = Vec::new();
    stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(body.as_bytes()))
        .and_then(|()| stream.read_to_end(&mut bytes))
        .map_err(|e| wrong(e.to_string()))?;
    parse(&bytes).map_err(wrong)
}

/// Takes an answer out of a whole HTTP response.
pub(crate) fn parse(response: &[u8]) -> std::result::Result<Answer, String> {
    let text = String::from_utf8_lossy(response);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or("expected an HTTP response, found none")?;
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!(
            "expected status 200, found `{status}`: {}",
            body.trim()
        ));
    }
    let json: Value = serde_json::from_str(body).map_err(|e| format!("body: {e}"))?;
    let choice = &json["choices"][0];
    let calls = choice["message"]["tool_calls"].as_array();
    let calls = calls.into_iter().flatten().map(|call| {
        let arguments = call["function"]["arguments"].as_str().unwrap_or("{}");
        let arguments: Value = serde_json::from_str(arguments).unwrap_or(Value::Null);
        serde_json::json!({"name": call["function"]["name"], "arguments": arguments})
    });
    Ok(Answer {
        text: choice["message"]["content"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        calls: calls.collect(),
        finish: choice["finish_reason"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        metrics: json["metrics"].clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_text_and_calls_out_of_a_response() {
        let body = r#"{"choices":[{"finish_reason":"tool_calls","message":{"content":null,
            "tool_calls":[{"function":{"name":"f","arguments":"{\"a\":1}"}}]}}]}"#;
        let answer = parse(format!("HTTP/1.1 200 OK\r\nA: b\r\n\r\n{body}").as_bytes()).unwrap();
        assert_eq!(
            answer.calls,
            [serde_json::json!({"name": "f", "arguments": {"a": 1}})]
        );
        assert_eq!(
            (answer.text.as_str(), answer.finish.as_str()),
            ("", "tool_calls")
        );
    }

    #[test]
    fn another_status_is_an_error_with_its_text() {
        let error = parse(b"HTTP/1.1 503 Busy\r\n\r\nqueue full").unwrap_err();
        assert!(
            error.contains("503") && error.contains("queue full"),
            "{error}"
        );
    }
}
