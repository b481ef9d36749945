//! One streamed request to a server, with the times at which its tokens came.
//!
//! Refuses: TLS (measure behind the proxy that ends it). Invariant: the clock starts when the request
//! is sent on a connection that is open already, so that a figure is the server's and not the dial's.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::LoadError;

type Sender = http1::SendRequest<Full<Bytes>>;

/// Where requests go.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// `host:port`.
    authority: String,
    /// What stands before `/v1`.
    prefix: String,
    pub(super) api_key: Option<String>,
}

impl Target {
    /// Reads `http://host[:port][/prefix][/v1]`.
    pub(super) fn parse(url: &str, api_key: Option<String>) -> Result<Self, LoadError> {
        let refuse = |why: &str| LoadError::Url {
            url: url.to_owned(),
            why: why.to_owned(),
        };
        let rest = match url.split_once("://") {
            Some(("http", rest)) => rest,
            Some(("https", _)) => {
                return Err(refuse(
                    "TLS is not spoken; expected http:// and an address behind it",
                ));
            }
            Some(_) => return Err(refuse("expected http://")),
            None => url,
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.is_empty() || authority.contains(char::is_whitespace) {
            return Err(refuse("expected http://HOST:PORT"));
        }
        let port = authority.rsplit_once(':').map(|(_, port)| port);
        let authority = match port {
            Some(port) if port.parse::<u16>().is_ok() => authority.to_owned(),
            Some(port) if !port.ends_with(']') => return Err(refuse("the port is no number")),
            _ => format!("{authority}:80"),
        };
        let path = path.trim_end_matches('/');
        let path = path
            .strip_suffix("v1")
            .unwrap_or(path)
            .trim_end_matches('/');
        let prefix = if path.is_empty() {
            String::new()
        } else {
            format!("/{path}")
        };
        Ok(Self {
            authority,
            prefix,
            api_key,
        })
    }

    async fn connect(&self) -> Result<Sender, String> {
        let socket = TcpStream::connect(&self.authority)
            .await
            .map_err(|e| e.to_string())?;
        let _ = socket.set_nodelay(true);
        let opened = http1::handshake(TokioIo::new(socket)).await;
        let (sender, connection) = opened.map_err(|e| e.to_string())?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn send(
        &self,
        sender: &mut Sender,
        method: &str,
        path: &str,
        body: String,
    ) -> Result<Response<Incoming>, String> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.prefix))
            .header("host", &self.authority)
            .header("content-type", "application/json");
        if let Some(key) = &self.api_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| e.to_string())?;
        sender
            .send_request(request)
            .await
            .map_err(|e| e.to_string())
    }

    /// The first model that the server names.
    pub(super) async fn first_model(&self) -> Result<String, LoadError> {
        let fail = |why: String| LoadError::Server {
            url: self.authority.clone(),
            why,
        };
        let mut sender = self.connect().await.map_err(fail)?;
        let answer = self
            .send(&mut sender, "GET", "/v1/models", String::new())
            .await;
        let response = answer.map_err(fail)?;
        let status = response.status();
        let body = response
            .into_body()
            .collect()
            .await
            .map_err(|e| fail(e.to_string()))?;
        let value: Value = serde_json::from_slice(&body.to_bytes()).unwrap_or_default();
        match value["data"][0]["id"].as_str() {
            Some(name) => Ok(name.to_owned()),
            None => Err(fail(format!(
                "/v1/models answered {status} and names no model"
            ))),
        }
    }
}

/// What a request asks.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) model: String,
    pub(super) prompt: String,
    pub(super) max_tokens: u32,
    pub(super) temperature: f64,
    pub(super) ignore_eos: bool,
    /// Ask for running usage and the statistics block; not every server takes those fields.
    pub(super) extras: bool,
}

impl Ask {
    fn body(&self) -> String {
        let mut body = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if self.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        if self.extras {
            body["stream_options"]["continuous_usage_stats"] = true.into();
            body["include_metrics"] = true.into();
        }
        body.to_string()
    }
}

/// How a request went.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    /// From sending to the first text.
    pub(super) first: Duration,
    /// From sending to the end.
    pub(super) whole: Duration,
    /// When text came, from sending, and how many tokens had come by then as far as the server says.
    pub(super) chunks: Vec<(Duration, Option<u32>)>,
    pub(super) prompt_tokens: u32,
    pub(super) tokens: u32,
    /// Drafting steps and accepted drafts, from the statistics block.
    pub(super) drafting: Option<(u64, u64)>,
    /// The statistics block says that acceptance was simulated.
    pub(super) simulated: bool,
}

/// A request that did not go through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    /// 0 when there was no answer, or the stream broke.
    pub(super) status: u16,
    pub(super) why: String,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.status {
            0 => f.write_str(&self.why),
            status => write!(f, "{status}: {}", self.why),
        }
    }
}

/// Sends one request and reads its stream to the end.
pub(super) async fn ask(target: &Target, ask: &Ask) -> Result<Sample, Failed> {
    let broken = |why: String| Failed { status: 0, why };
    let body = ask.body();
    let mut sender = target.connect().await.map_err(broken)?;
    let start = Instant::now();
    let answer = target
        .send(&mut sender, "POST", "/v1/chat/completions", body)
        .await;
    let response = answer.map_err(broken)?;
    let status = response.status().as_u16();
    let mut body = response.into_body();
    if status != 200 {
        let text = body
            .collect()
            .await
            .map(|all| all.to_bytes())
            .unwrap_or_default();
        let value: Value = serde_json::from_slice(&text).unwrap_or_default();
        let why = value["error"]["message"]
            .as_str()
            .unwrap_or("no message")
            .to_owned();
        return Err(Failed { status, why });
    }
    let (mut sample, mut lines) = (Sample::default(), Vec::new());
    while let Some(frame) = body.frame().await {
        let now = start.elapsed();
        let frame = frame.map_err(|e| broken(format!("the stream broke: {e}")))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        lines.extend_from_slice(&data);
        while let Some(end) = lines.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = lines.drain(..=end).collect();
            if let Some(data) = line.strip_prefix(b"data:") {
                sample.event(data, now).map_err(broken)?;
            }
        }
    }
    sample.whole = start.elapsed();
    if sample.chunks.is_empty() {
        return Err(broken("the stream held no text".to_owned()));
    }
    sample.tokens = sample.tokens.max(sample.chunks.len() as u32);
    Ok(sample)
}

impl Sample {
    fn event(&mut self, data: &[u8], now: Duration) -> Result<(), String> {
        // `[DONE]`, and whatever else is not JSON.
        let Ok(event) = serde_json::from_slice::<Value>(data) else {
            return Ok(());
        };
        if let Some(error) = event.get("error") {
            let message = error["message"].as_str().unwrap_or("no message");
            return Err(format!("the stream ended with an error: {message}"));
        }
        let count = |name: &str| event["usage"][name].as_u64().map(|n| n as u32);
        let so_far = count("completion_tokens");
        self.tokens = self.tokens.max(so_far.unwrap_or(0));
        self.prompt_tokens = self.prompt_tokens.max(count("prompt_tokens").unwrap_or(0));
        if holds_text(&event["choices"][0]["delta"]) {
            if self.chunks.is_empty() {
                self.first = now;
            }
            self.chunks.push((now, so_far));
        }
        let block = &event["metrics"]["speculative_decoding"];
        if let (Some(steps), Some(accepted)) = (
            block["num_spec_steps"].as_u64(),
            block["num_accepted_draft_tokens"].as_u64(),
        ) {
            self.drafting = Some((steps, accepted));
        }
        self.simulated |= event["metrics"]["simulated"].as_bool().unwrap_or(false);
        Ok(())
    }
}

fn holds_text(delta: &Value) -> bool {
    let fields = ["content", "reasoning_content", "reasoning"];
    let text = |name: &str| delta[name].as_str().is_some_and(|text| !text.is_empty());
    fields.iter().any(|name| text(name)) || delta["tool_calls"].is_array()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_or_refused() {
        let parse = |url: &str| Target::parse(url, None).map(|t| (t.authority, t.prefix));
        let target = |authority: &str, prefix: &str| (authority.to_owned(), prefix.to_owned());
        assert_eq!(parse("http://a:1/v1/").unwrap(), target("a:1", ""));
        assert_eq!(parse("a:1").unwrap(), target("a:1", ""));
        assert_eq!(parse("http://a/x/v1").unwrap(), target("a:80", "/x"));
        assert_eq!(parse("http://[::1]/").unwrap(), target("[::1]:80", ""));
        for bad in ["https://a", "ftp://a", "http://", "http://a:b"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn events_are_counted() {
        let mut sample = Sample::default();
        let at = Duration::from_millis;
        let chunk = |text: &str, tokens: u32| {
            json!({"choices": [{"delta": {"content": text}}], "usage": {"completion_tokens": tokens}})
                .to_string()
        };
        sample.event(chunk("", 0).as_bytes(), at(1)).unwrap();
        sample.event(chunk("a", 3).as_bytes(), at(2)).unwrap();
        sample.event(chunk("b", 5).as_bytes(), at(4)).unwrap();
        sample.event(b" [DONE]", at(5)).unwrap();
        assert_eq!(sample.first, at(2));
        assert_eq!(sample.chunks, [(at(2), Some(3)), (at(4), Some(5))]);
        assert_eq!(sample.tokens, 5);
        assert!(
            sample
                .event(br#"{"error": {"message": "x"}}"#, at(6))
                .is_err()
        );
    }
}
