//! The server while its model loads: it listens, says how far it is, and takes no requests.
//!
//! Owns the count of what is loaded. Routes: `/health` 503 with the progress and `Retry-After`, `/health/live`
//! 200, `/metrics` where no key is needed, and 503 for everything else. Invariant: a connection opened now
//! is closed when the model is there, so that its next request meets the real routes.

use crate::error::{ApiError, Dialect};
use crate::router::json_response;
use crate::state::Settings;
use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, Response, StatusCode, header};
use serde_json::json;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How far loading is.
#[derive(Debug)]
pub struct Loading {
    total_bytes: u64,
    taken: Arc<AtomicU64>,
    began: Instant,
}

/// What loading came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loaded {
    /// Bytes of weights.
    pub bytes: u64,
    /// From the start to the first request that could be taken.
    pub time: Duration,
}

impl Loading {
    /// Loading of `total_bytes` begins now.
    #[must_use]
    pub fn new(total_bytes: u64) -> Self {
        Self {
            total_bytes,
            taken: Arc::default(),
            began: Instant::now(),
        }
    }

    /// Where whoever loads counts bytes.
    #[must_use]
    pub fn taken(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.taken)
    }

    /// Loading has ended.
    #[must_use]
    pub fn done(&self) -> Loaded {
        Loaded {
            bytes: self.total_bytes,
            time: self.began.elapsed(),
        }
    }

    pub(crate) fn now(&self) -> Progress {
        Progress {
            bytes: self.taken.load(Ordering::Relaxed).min(self.total_bytes),
            total_bytes: self.total_bytes,
            time: self.began.elapsed(),
        }
    }
}

/// A moment of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    bytes: u64,
    total_bytes: u64,
    time: Duration,
}

impl Progress {
    fn percent(&self) -> u64 {
        self.bytes * 100 / self.total_bytes.max(1)
    }

    /// Whole seconds left at the speed so far, 1 to an hour; 1 before anything was read.
    fn left_s(&self) -> u32 {
        let rest = (self.total_bytes - self.bytes) as f64 / self.bytes.max(1) as f64;
        let left = rest * self.time.as_secs_f64();
        if self.bytes == 0 {
            1
        } else {
            left.ceil().clamp(1.0, 3600.0) as u32
        }
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (percent, seconds) = (self.percent(), self.time.as_secs_f64());
        let (done, total) = (self.bytes as f64 / 1e9, self.total_bytes as f64 / 1e9);
        let rate = done / seconds.max(1e-9);
        write!(
            f,
            "loading: {percent} %, {done:.2} of {total:.2} GB after {seconds:.0} s, {rate:.2} GB/s"
        )?;
        if self.bytes > 0 {
            write!(f, ", about {} s left", self.left_s())?;
        }
        Ok(())
    }
}

/// The routes of this time.
pub(crate) fn router(loading: &Arc<Loading>, settings: &Settings) -> Router {
    let loading = Arc::clone(loading);
    let keyed = !settings.api_keys.is_empty()
        || settings.api_key_file.is_some()
        || settings.admission.is_some();
    Router::new().fallback(move |request: Request<Body>| {
        let now = loading.now();
        async move { answer(request.uri().path(), &now, keyed) }
    })
}

fn answer(path: &str, now: &Progress, keyed: bool) -> Response<Body> {
    match path {
        "/health/live" => json_response(&json!({"status": "live"})),
        "/health" => {
            let body =
                json!({"status": "loading", "reason": now.to_string(), "percent": now.percent()});
            let mut response = json_response(&body);
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, now.left_s().into());
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
            response
        }
        "/metrics" if !keyed => metrics(now),
        path => {
            let error = ApiError {
                retry_after_s: Some(now.left_s()),
                ..ApiError::unavailable(now.to_string(), "loading")
            };
            error.response(Dialect::of_path(path))
        }
    }
}

fn metrics(now: &Progress) -> Response<Body> {
    let mut page = String::new();
    for (name, help, value) in [
        (
            "kilotok_weights_loaded_bytes",
            "Bytes of weights loaded so far.",
            now.bytes as f64,
        ),
        (
            "kilotok_weights_bytes",
            "Bytes of weights to load.",
            now.total_bytes as f64,
        ),
        (
            "kilotok_weights_load_seconds",
            "Time of loading so far.",
            now.time.as_secs_f64(),
        ),
    ] {
        page += &format!("# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n");
    }
    let mut response = Response::new(Body::from(page));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
