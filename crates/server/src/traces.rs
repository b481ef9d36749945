//! OpenTelemetry: a span for every generation, with children for its queue, prompt and decoding, sent to a
//! collector over OTLP/HTTP (protobuf). Off unless an endpoint is given; then the only connections this
//! server opens go there.
//!
//! Invariants: spans carry counts, times and names, never prompts, answers or keys; a collector that is
//! slow or away costs spans, never requests (a bounded queue on a thread of its own).

use crate::error::ServerError;
use crate::generate::Finish;
use axum::http::{HeaderMap, Uri};
use bytes::Bytes;
use engine::Stats;
use opentelemetry::trace::{
    Span, SpanContext, SpanKind, Status, TraceContextExt, Tracer, TracerProvider,
};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use std::io::{Error, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What one export may take, and what the last one may at shutdown.
const EXPORT_LIMIT: Duration = Duration::from_secs(5);
/// Most of a collector's answer that is read.
const ANSWER_BYTES: u64 = 64 << 10;

/// Where spans go.
pub(crate) struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    model: String,
}

impl Traces {
    /// Sends to `endpoint`, such as `http://127.0.0.1:4318`; `/v1/traces` is added when it has no path.
    pub(crate) fn new(endpoint: &str, model: &str) -> Result<Arc<Self>, ServerError> {
        let wrong = |why: String| ServerError::Setting {
            name: "--otlp-endpoint",
            message: format!("{endpoint}: {why}"),
        };
        let url = traces_url(endpoint).map_err(wrong)?;
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Plain)
            .with_endpoint(url)
            .with_timeout(EXPORT_LIMIT)
            .build()
            .map_err(|error| wrong(error.to_string()))?;
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource())
            .build();
        Ok(Arc::new(Self {
            tracer: provider.tracer("kilotok"),
            provider,
            model: model.to_owned(),
        }))
    }

    /// Sends what is left. Blocks for up to [`EXPORT_LIMIT`].
    pub(crate) fn shutdown(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(EXPORT_LIMIT) {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// Where a collector takes traces.
fn traces_url(endpoint: &str) -> Result<String, String> {
    let uri: Uri = endpoint
        .parse()
        .map_err(|error| format!("not an address: {error}"))?;
    if uri.scheme_str() != Some("http") || uri.host().is_none() {
        let why = "expected http://HOST:PORT; a collector on this machine can pass on over TLS";
        return Err(why.to_owned());
    }
    Ok(match uri.path() {
        "" | "/" => format!("{}/v1/traces", endpoint.trim_end_matches('/')),
        _ => endpoint.to_owned(),
    })
}

/// Who sends: `OTEL_SERVICE_NAME`, or this program.
fn resource() -> Resource {
    let named = std::env::var_os("OTEL_SERVICE_NAME").is_some();
    let resource = Resource::builder();
    match named {
        true => resource.build(),
        false => resource.with_service_name("kilotok").build(),
    }
}

/// The trace that a client's `traceparent` header names.
pub(crate) fn parent(headers: &HeaderMap) -> Option<SpanContext> {
    use opentelemetry::propagation::TextMapPropagator;
    let headers = opentelemetry_http::HeaderExtractor(headers);
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
    let span = context.span().span_context().clone();
    span.is_valid().then_some(span)
}

/// The span of one request; sent when dropped.
pub(crate) struct Traced {
    traces: Arc<Traces>,
    parent: Option<SpanContext>,
    operation: &'static str,
    began: SystemTime,
    prompt_tokens: u32,
    output_tokens: u32,
    finishes: Vec<StringValue>,
    failed: bool,
    stats: Option<Stats>,
}

impl Traced {
    /// Begins now.
    pub(crate) fn new(
        traces: Arc<Traces>,
        parent: Option<SpanContext>,
        operation: &'static str,
        prompt_tokens: u32,
    ) -> Self {
        Self {
            traces,
            parent,
            operation,
            began: SystemTime::now(),
            prompt_tokens,
            output_tokens: 0,
            finishes: Vec::new(),
            failed: false,
            stats: None,
        }
    }

    /// Tokens were generated.
    pub(crate) fn generated(&mut self, tokens: u32) {
        self.output_tokens += tokens;
    }

    /// A sample ended.
    pub(crate) fn ended(&mut self, finish: &Finish, stats: &Stats) {
        self.finishes.push(finish.name().into());
        self.failed |= matches!(finish, Finish::Failed(_));
        self.stats.get_or_insert_with(|| stats.clone());
    }

    fn attributes(&self) -> Vec<KeyValue> {
        let model = &self.traces.model;
        let count = |tokens: u32| i64::from(tokens);
        let mut all = vec![
            KeyValue::new("gen_ai.operation.name", self.operation),
            KeyValue::new("gen_ai.provider.name", "kilotok"),
            KeyValue::new("gen_ai.request.model", model.clone()),
            KeyValue::new("gen_ai.response.model", model.clone()),
            KeyValue::new("gen_ai.usage.input_tokens", count(self.prompt_tokens)),
            KeyValue::new("gen_ai.usage.output_tokens", count(self.output_tokens)),
        ];
        let finishes = Value::Array(Array::String(self.finishes.clone()));
        all.push(KeyValue::new("gen_ai.response.finish_reasons", finishes));
        all.extend(self.stats.iter().flat_map(measured));
        all
    }

    fn error(&self) -> Option<&'static str> {
        match (self.failed, self.finishes.is_empty()) {
            (true, _) => Some("failed"),
            (false, true) => Some("cancelled"),
            (false, false) => None,
        }
    }

    /// Queue, prompt and decoding one after the other.
    fn phases(&self, request: &Context) {
        let Some(stats) = &self.stats else {
            return;
        };
        let mut at = self.began;
        for (name, ms) in [
            ("queue", stats.queue_ms),
            ("prefill", stats.prefill_ms),
            ("decode", stats.decode_ms),
        ] {
            let end = at + Duration::from_secs_f64(ms.max(0.0) / 1e3);
            let tracer = &self.traces.tracer;
            let phase = tracer.span_builder(name).with_start_time(at);
            phase
                .start_with_context(tracer, request)
                .end_with_timestamp(end);
            at = end;
        }
    }
}

/// What the engine measured.
fn measured(stats: &Stats) -> [KeyValue; 4] {
    let count = |tokens: u64| i64::try_from(tokens).unwrap_or(i64::MAX);
    let cached = count(stats.cached_tokens.into());
    [
        // The conventions name this time for metrics only; vLLM's spans carry it by this name.
        KeyValue::new("gen_ai.latency.time_to_first_token", stats.ttft_ms / 1e3),
        KeyValue::new("gen_ai.usage.cache_read.input_tokens", cached),
        KeyValue::new("kilotok.draft.tokens", count(stats.draft.drafted)),
        KeyValue::new("kilotok.draft.accepted", count(stats.draft.accepted)),
    ]
}

impl Drop for Traced {
    fn drop(&mut self) {
        let tracer = &self.traces.tracer;
        let name = format!("{} {}", self.operation, self.traces.model);
        let around = match self.parent.take() {
            Some(parent) => Context::new().with_remote_span_context(parent),
            None => Context::new(),
        };
        let builder = tracer
            .span_builder(name)
            .with_kind(SpanKind::Server)
            .with_start_time(self.began)
            .with_attributes(self.attributes());
        let mut span = builder.start_with_context(tracer, &around);
        if let Some(kind) = self.error() {
            span.set_attribute(KeyValue::new("error.type", kind));
            span.set_status(Status::error(kind));
        }
        self.phases(&Context::new().with_remote_span_context(span.span_context().clone()));
        span.end();
    }
}

/// HTTP/1.1 without TLS, a connection for each export, on the exporter's own thread.
#[derive(Debug)]
struct Plain;

#[async_trait::async_trait]
impl HttpClient for Plain {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        // Nothing else runs on that thread: waiting in place is what it is for.
        Ok(post(&request)?)
    }
}

fn post(request: &Request<Bytes>) -> Result<Response<Bytes>, Error> {
    let uri = request.uri();
    let host = uri.host().unwrap_or_default();
    let port = uri.port_u16().unwrap_or(80);
    let addresses = (host.trim_matches(['[', ']']), port).to_socket_addrs()?;
    let mut socket = connect(addresses)?;
    socket.set_read_timeout(Some(EXPORT_LIMIT))?;
    socket.set_write_timeout(Some(EXPORT_LIMIT))?;
    socket.write_all(&head(request, host, port))?;
    socket.write_all(request.body())?;
    let mut answer = Vec::new();
    socket.take(ANSWER_BYTES).read_to_end(&mut answer)?;
    let status = status(&answer).ok_or_else(|| Error::other("no HTTP answer"))?;
    // What a collector says beside its status is not needed.
    let response = Response::builder().status(status).body(Bytes::new());
    response.map_err(Error::other)
}

fn head(request: &Request<Bytes>, host: &str, port: u16) -> Vec<u8> {
    let path = request.uri().path_and_query();
    let path = path.map_or("/", |path| path.as_str());
    let length = request.body().len();
    let mut head = format!(
        "POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: close\r\ncontent-length: {length}\r\n"
    )
    .into_bytes();
    for (name, value) in request.headers() {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head
}

fn status(answer: &[u8]) -> Option<u16> {
    let rest = answer
        .strip_prefix(b"HTTP/1.1 ")
        .or(answer.strip_prefix(b"HTTP/1.0 "))?;
    std::str::from_utf8(rest.get(..3)?).ok()?.parse().ok()
}

fn connect(addresses: impl Iterator<Item = std::net::SocketAddr>) -> Result<TcpStream, Error> {
    let mut last = Error::other("no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, EXPORT_LIMIT) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}
