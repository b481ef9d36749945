//! What a refusal looks like on the wire, in OpenAI's and in Anthropic's form, and why a server could
//! not start.
//!
//! Invariant: a message names the field, what was expected and what was found; it never contains a
//! key or text of a prompt.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use engine::Rejected;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Why a server, its settings or its database cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// A file that cannot be read or is not what it should be.
    #[error("{path}: {message}", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
    },
    /// A setting that contradicts another or is out of range.
    #[error("{name}: {message}")]
    Setting {
        /// Flag, as on the command line.
        name: &'static str,
        /// What was expected and what was found.
        message: String,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Host and port.
        address: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The operating system refused a thread, a signal handler or random numbers.
    #[error("{what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The admission database.
    #[error("admission database: {0}")]
    Database(#[from] rusqlite::Error),
    /// An order to the admission desk that cannot be carried out.
    #[error("{0}")]
    Admission(String),
    /// The engine stopped by itself.
    #[error("the engine has failed: {0}")]
    Engine(String),
    /// A load test that could not run.
    #[error("bench: {0}")]
    Bench(String),
}

/// Whose error body a route speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error": {message, type, param, code}}`
    OpenAi,
    /// `{"type": "error", "error": {type, message}}`
    Anthropic,
}

impl Dialect {
    /// The dialect of a path.
    #[must_use]
    pub fn of_path(path: &str) -> Self {
        match path.starts_with("/v1/messages") {
            true => Self::Anthropic,
            false => Self::OpenAi,
        }
    }
}

/// A request that is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// One sentence for a person.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
    /// Seconds to wait before another try.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    /// A refusal with a status and a sentence.
    #[must_use]
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: None,
            retry_after_s: None,
        }
    }

    /// 400: the field `param` is wrong.
    #[must_use]
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            code: Some("invalid_value"),
            ..Self::new(StatusCode::BAD_REQUEST, message)
        }
    }

    /// 404: the model is not served here.
    #[must_use]
    pub fn unknown_model(wanted: &str, served: &str) -> Self {
        Self {
            param: Some("model".to_owned()),
            code: Some("model_not_found"),
            ..Self::new(
                StatusCode::NOT_FOUND,
                format!("the model `{wanted}` does not exist here; `{served}` is served"),
            )
        }
    }

    /// 401.
    #[must_use]
    pub fn unauthorized() -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "a valid API key is needed: send `Authorization: Bearer KEY`, `x-api-key` or `api-key`",
            )
        }
    }

    /// 429 with the time to wait.
    #[must_use]
    pub fn too_many(message: impl Into<String>, code: &'static str, retry_after_s: u32) -> Self {
        Self {
            code: Some(code),
            retry_after_s: Some(retry_after_s.max(1)),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, message)
        }
    }

    /// 503: nothing new is taken.
    #[must_use]
    pub fn unavailable(message: impl Into<String>, code: &'static str) -> Self {
        Self {
            code: Some(code),
            retry_after_s: Some(1),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
        }
    }

    /// 500 or, in a stream that has begun, its last event.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self {
            code: Some("engine_error"),
            ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
        }
    }

    /// OpenAI's word for the status.
    fn openai_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            503 => "service_unavailable_error",
            501 => "not_implemented_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// Anthropic's word for the status.
    fn anthropic_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        }
    }

    /// The body.
    #[must_use]
    pub fn body(&self, dialect: Dialect) -> Value {
        match dialect {
            Dialect::OpenAi => json!({"error": {
                "message": self.message,
                "type": self.openai_type(),
                "param": self.param,
                "code": self.code,
            }}),
            Dialect::Anthropic => {
                let message = match &self.param {
                    Some(param) if !self.message.starts_with(param.as_str()) => {
                        format!("{param}: {}", self.message)
                    }
                    _ => self.message.clone(),
                };
                json!({"type": "error", "error": {"type": self.anthropic_type(), "message": message}})
            }
        }
    }

    /// The whole response.
    #[must_use]
    pub fn response(&self, dialect: Dialect) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body(dialect).to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<Rejected> for ApiError {
    fn from(rejected: Rejected) -> Self {
        let message = rejected.to_string();
        match rejected {
            Rejected::Invalid { field, message } => {
                let param = match field {
                    "samples" => "n",
                    "stop_strings" => "stop",
                    field => field,
                };
                Self::invalid(param, format!("{param} {message}"))
            }
            Rejected::Full { retry_after_s, .. } => {
                Self::too_many(message, "queue_full", retry_after_s)
            }
            Rejected::Draining => Self::unavailable(message, "draining"),
            _ => Self::unavailable(message, "engine_failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_dialects_name_the_field() {
        let error = ApiError::invalid("n", "is 9; 1 to 4 are allowed");
        let openai = error.body(Dialect::OpenAi);
        assert_eq!(openai["error"]["param"], "n");
        assert_eq!(openai["error"]["type"], "invalid_request_error");
        let anthropic = error.body(Dialect::Anthropic);
        assert_eq!(anthropic["type"], "error");
        assert!(
            anthropic["error"]["message"]
                .as_str()
                .unwrap()
                .starts_with("n:")
        );
    }

    #[test]
    fn a_full_queue_says_how_long_to_wait() {
        let error = ApiError::from(Rejected::Full {
            waiting: 9,
            retry_after_s: 7,
        });
        let response = error.response(Dialect::OpenAi);
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "7");
    }
}
