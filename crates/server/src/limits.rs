//! The limits on what a client may send (gate 16): one table, so that tests can walk it.
//!
//! Invariant: everything here is checked before anything is computed or kept, and a violation is a
//! 400 that names the field (413 for the body as a whole).

use crate::error::ApiError;
use axum::http::StatusCode;
use serde_json::Value;

/// What a client may send at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request body.
    pub body_bytes: usize,
    /// Bytes of a request's head, its first line and headers together, are fewer than this.
    pub header_bytes: usize,
    /// Messages of a conversation.
    pub messages: usize,
    /// Tools of a request.
    pub tools: usize,
    /// Bytes of a JSON schema, a grammar or a tool's parameters.
    pub schema_bytes: usize,
    /// Parallel samples.
    pub samples: u32,
    /// Stop strings.
    pub stops: usize,
    /// Bytes of a stop string.
    pub stop_bytes: usize,
    /// Entries of `logit_bias`.
    pub biases: usize,
    /// `top_logprobs`.
    pub top_logprobs: u32,
    /// Nesting of a JSON body.
    pub json_depth: usize,
    /// Prompts of one `/v1/completions` request.
    pub prompts: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 32 << 20,
            header_bytes: 32 << 10,
            messages: 10_000,
            tools: 128,
            schema_bytes: 256 << 10,
            samples: 4,
            stops: 4,
            stop_bytes: 256,
            biases: 1024,
            top_logprobs: 20,
            json_depth: 128,
            prompts: 128,
        }
    }
}

impl Limits {
    /// Parses a body, checking its nesting first: the parser itself recurses.
    ///
    /// # Errors
    /// 400: not JSON, or nested too deeply.
    pub fn parse(&self, body: &[u8]) -> Result<Value, ApiError> {
        let depth = json_depth(body);
        if depth > self.json_depth {
            let message = format!("nested {depth} deep; {} is the most", self.json_depth);
            return Err(ApiError::invalid("body", message));
        }
        let mut reader = serde_json::Deserializer::from_slice(body);
        reader.disable_recursion_limit();
        let parsed = serde::Deserialize::deserialize(&mut reader);
        let value: Value = parsed
            .and_then(|value| reader.end().map(|()| value))
            .map_err(|error| ApiError::invalid("body", format!("not valid JSON: {error}")))?;
        Ok(value)
    }

    /// 413.
    #[must_use]
    pub fn body_too_large(&self) -> ApiError {
        let message = format!("the body is larger than {} bytes", self.body_bytes);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }

    /// Refuses a head of too many bytes.
    ///
    /// # Errors
    /// 431.
    pub fn head(&self, bytes: usize) -> Result<(), ApiError> {
        match bytes >= self.header_bytes {
            true => Err(ApiError::new(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                format!(
                    "the headers are {bytes} bytes; fewer than {} are taken",
                    self.header_bytes
                ),
            )),
            false => Ok(()),
        }
    }

    /// Refuses a list with more than `most` entries.
    ///
    /// # Errors
    /// 400 naming `param`.
    pub fn count(param: &str, found: usize, most: usize) -> Result<(), ApiError> {
        match found > most {
            true => Err(ApiError::invalid(
                param,
                format!("{param} has {found} entries; {most} is the most"),
            )),
            false => Ok(()),
        }
    }

    /// Refuses a schema or grammar of too many bytes.
    ///
    /// # Errors
    /// 400 naming `param`.
    pub fn schema(&self, param: &str, bytes: usize) -> Result<(), ApiError> {
        match bytes > self.schema_bytes {
            true => Err(ApiError::invalid(
                param,
                format!(
                    "{param} is {bytes} bytes; {} is the most",
                    self.schema_bytes
                ),
            )),
            false => Ok(()),
        }
    }
}

/// Deepest nesting of brackets outside strings.
fn json_depth(body: &[u8]) -> usize {
    let (mut depth, mut deepest, mut inside, mut escaped) = (0_usize, 0, false, false);
    for byte in body {
        if inside {
            inside = escaped || *byte != b'"';
            escaped = !escaped && *byte == b'\\';
            continue;
        }
        match byte {
            b'"' => inside = true,
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(depth: usize) -> Vec<u8> {
        ["[".repeat(depth), "]".repeat(depth)].concat().into_bytes()
    }

    #[test]
    fn depth_at_the_limit_and_one_more() {
        let limits = Limits::default();
        assert!(limits.parse(&nested(128)).is_ok());
        let error = limits.parse(&nested(129)).unwrap_err();
        assert_eq!(
            (error.status.as_u16(), error.param.unwrap()),
            (400, "body".to_owned())
        );
    }

    #[test]
    fn brackets_in_strings_do_not_nest() {
        assert_eq!(json_depth(br#"{"a": "[[\"[{", "b": [1]}"#), 2);
        assert_eq!(json_depth(br#""\\" [[]]"#), 2);
    }

    #[test]
    fn text_after_the_value_is_an_error() {
        assert!(Limits::default().parse(b"{} x").is_err());
        assert!(Limits::default().parse(b"").is_err());
    }
}
