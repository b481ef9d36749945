//! Reads an object field by field: types and ranges checked, errors with the full path of the field,
//! and what nobody asked for remembered for `x-ignored-params`.
//!
//! Invariant: `null` is the same as absent, as OpenAI's clients expect.

use crate::error::ApiError;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// The fields of one JSON object that have not been read yet.
#[derive(Debug)]
pub(crate) struct Fields {
    map: Map<String, Value>,
    path: String,
}

/// Name of a JSON type, for error messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// 400 for a value of the wrong type.
pub(crate) fn wrong(path: &str, expected: &str, found: &Value) -> ApiError {
    let found = match found {
        Value::Number(number) => number.to_string(),
        other => kind(other).to_owned(),
    };
    ApiError::invalid(path, format!("{path}: expected {expected}, found {found}"))
}

impl Fields {
    /// Of the whole body.
    pub(crate) fn of_body(value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self {
                map,
                path: String::new(),
            }),
            other => Err(wrong("body", "an object", &other)),
        }
    }

    /// Of an object inside.
    pub(crate) fn of(value: Value, path: impl Into<String>) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Self { map, path }),
            other => Err(wrong(&path, "an object", &other)),
        }
    }

    /// Full path of a field.
    pub(crate) fn path(&self, name: &str) -> String {
        match self.path.as_str() {
            "" => name.to_owned(),
            path => format!("{path}.{name}"),
        }
    }

    /// Any value; `null` is absent.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// Whether a field is there and not null.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.path(name), "a string", &other)),
        }
    }

    pub(crate) fn required_string(&mut self, name: &str) -> Result<String, ApiError> {
        self.string(name)?.ok_or_else(|| self.missing(name))
    }

    /// 400 for a field that has to be there.
    pub(crate) fn missing(&self, name: &str) -> ApiError {
        let path = self.path(name);
        let message = format!("{path}: required, but missing");
        ApiError {
            code: Some("missing_required_parameter"),
            ..ApiError::invalid(path, message)
        }
    }

    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(&self.path(name), "a boolean", &other)),
        }
    }

    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        Ok(self.bool(name)?.unwrap_or(false))
    }

    pub(crate) fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<f32>,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(x) if range.contains(&(x as f32)) => Ok(Some(x as f32)),
            _ => {
                let expected = format!("a number from {} to {}", range.start(), range.end());
                Err(wrong(&self.path(name), &expected, &value))
            }
        }
    }

    pub(crate) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match value.as_i64() {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => {
                let expected = format!("an integer from {} to {}", range.start(), range.end());
                Err(wrong(&self.path(name), &expected, &value))
            }
        }
    }

    pub(crate) fn count(&mut self, name: &str, least: u32) -> Result<Option<u32>, ApiError> {
        let range = i64::from(least)..=i64::from(u32::MAX);
        Ok(self.integer(name, range)?.map(|n| n as u32))
    }

    pub(crate) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(wrong(&self.path(name), "a list", &other)),
        }
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        let path = self.path(name);
        self.take(name).map(|v| Fields::of(v, path)).transpose()
    }

    /// Names of the fields that nobody read.
    pub(crate) fn unread(self) -> Vec<String> {
        let path = |name: &String| self.path(name);
        self.map.keys().map(path).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn errors_carry_the_path() {
        let mut fields = Fields::of_body(json!({"stream_options": {"include_usage": 1}})).unwrap();
        let mut inner = fields.object("stream_options").unwrap().unwrap();
        let error = inner.bool("include_usage").unwrap_err();
        assert_eq!(error.param.unwrap(), "stream_options.include_usage");
    }

    #[test]
    fn null_is_absent_and_the_rest_is_remembered() {
        let mut fields = Fields::of_body(json!({"n": null, "foo": 1, "bar": {}})).unwrap();
        assert_eq!(fields.integer("n", 1..=4).unwrap(), None);
        assert_eq!(fields.unread(), ["foo", "bar"]);
    }

    #[test]
    fn ranges_are_checked() {
        let mut fields = Fields::of_body(json!({"t": 3.5, "n": 1.5})).unwrap();
        assert!(fields.number("t", 0.0..=2.0).is_err());
        assert!(fields.integer("n", 0..=9).is_err());
    }
}
