//! Browsers from elsewhere: refused unless their origin is listed. The page needs none of this.

use crate::state::Served;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};

fn listed<'a>(served: &Served, origin: Option<&'a HeaderValue>) -> Option<&'a HeaderValue> {
    let listed = |origin: &&HeaderValue| {
        let known = &served.settings.cors_origins;
        known
            .iter()
            .any(|known| known.as_bytes() == origin.as_bytes())
    };
    origin.filter(listed)
}

/// Lets a listed origin read the answer.
pub(crate) fn allow(served: &Served, origin: Option<&HeaderValue>, headers: &mut HeaderMap) {
    if let Some(origin) = listed(served, origin) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
    }
}

/// Answers a browser's question before the request itself.
pub(crate) fn preflight(served: &Served, request: &Request) -> Option<Response<Body>> {
    if request.method() != Method::OPTIONS {
        return None;
    }
    let origin = request.headers().get(header::ORIGIN);
    let mut response = Response::new(Body::empty());
    *response.status_mut() = match listed(served, origin) {
        Some(_) => StatusCode::NO_CONTENT,
        None => StatusCode::FORBIDDEN,
    };
    if response.status() == StatusCode::NO_CONTENT {
        let headers = response.headers_mut();
        allow(served, origin, headers);
        let rows = [
            (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, DELETE"),
            (
                header::ACCESS_CONTROL_ALLOW_HEADERS,
                "authorization, content-type, x-api-key, api-key, anthropic-version",
            ),
            (header::ACCESS_CONTROL_MAX_AGE, "600"),
        ];
        for (name, value) in rows {
            headers.insert(name, HeaderValue::from_static(value));
        }
    }
    Some(response)
}
