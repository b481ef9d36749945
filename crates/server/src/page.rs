//! The chat page: three hand-written files inside the binary, and Markdown rendered for it.
//!
//! Invariant: a strict content policy; no inline script or style, nothing from elsewhere.

use crate::error::ApiError;
use crate::launch::blocking;
use crate::markdown;
use crate::state::Served;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Response, StatusCode, header};

const INDEX: &str = include_str!("web/index.html");
/// Name, type, text.
const ASSETS: [(&str, &str, &str); 5] = [
    (
        "style.css",
        "text/css; charset=utf-8",
        include_str!("web/style.css"),
    ),
    (
        "page.js",
        "text/javascript; charset=utf-8",
        include_str!("web/page.js"),
    ),
    (
        "stream.js",
        "text/javascript; charset=utf-8",
        include_str!("web/stream.js"),
    ),
    (
        "views.js",
        "text/javascript; charset=utf-8",
        include_str!("web/views.js"),
    ),
    (
        "store.js",
        "text/javascript; charset=utf-8",
        include_str!("web/store.js"),
    ),
];
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// Largest text rendered at once: a message, not a library.
const RENDER_BYTES_MAX: usize = 1 << 20;

fn file(kind: &'static str, text: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(text.into());
    let headers = response.headers_mut();
    let rows = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    for (name, value) in rows {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn absent() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "there is no page here")
}

pub(crate) fn index(served: &Served) -> Result<Response<Body>, ApiError> {
    match served.settings.page {
        true => Ok(file("text/html; charset=utf-8", INDEX)),
        false => Err(absent()),
    }
}

pub(crate) fn asset(served: &Served, path: &str) -> Result<Response<Body>, ApiError> {
    let name = path.strip_prefix("/page/").unwrap_or_default();
    let found = ASSETS.iter().find(|(known, ..)| *known == name);
    match found.filter(|_| served.settings.page) {
        Some((_, kind, text)) => Ok(file(kind, *text)),
        None => Err(absent()),
    }
}

/// Markdown in, safe HTML out.
pub(crate) async fn render(body: &Bytes) -> Result<Response<Body>, ApiError> {
    if body.len() > RENDER_BYTES_MAX {
        let message = format!("{} bytes; {RENDER_BYTES_MAX} is the most", body.len());
        return Err(ApiError::invalid("body", message));
    }
    let text = String::from_utf8(body.to_vec());
    let text = text.map_err(|_| ApiError::invalid("body", "not UTF-8"))?;
    let html = blocking(move || markdown::render(&text)).await?;
    Ok(file("text/html; charset=utf-8", html))
}
