//! Typed access to the fields of a `config.json`, with errors that name file, field, what was
//! expected and what was found. A field that is null counts as absent.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{ModelError, read_text};

/// Config files of the releases are under 10 KB.
const BYTES_MAX: u64 = 4 << 20;
/// Bound on any dimension: products of three fit 64 bits.
pub(crate) const DIMENSION_MAX: u64 = 1 << 20;
/// Bound on the number of layers.
pub(crate) const LAYERS_MAX: u64 = 4096;

/// The fields of one JSON object.
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Names of the objects around, each with a dot.
    prefix: String,
}

/// Reads the object in `path` and resolves it.
pub(crate) fn read<T>(
    path: &Path,
    resolve: impl FnOnce(&Fields<'_>) -> Result<T, ModelError>,
) -> Result<T, ModelError> {
    let text = read_text(path, BYTES_MAX)?;
    parse(&text, resolve).map_err(|e| e.in_file(path))
}

/// Resolves the object in `text`.
pub(crate) fn parse<T>(
    text: &str,
    resolve: impl FnOnce(&Fields<'_>) -> Result<T, ModelError>,
) -> Result<T, ModelError> {
    let whole = |found: &str| field("(whole file)", "a JSON object", found);
    let value: Value = serde_json::from_str(text).map_err(|e| whole(&e.to_string()))?;
    match &value {
        Value::Object(map) => resolve(&Fields {
            map,
            prefix: String::new(),
        }),
        other => Err(whole(kind(other))),
    }
}

impl<'a> Fields<'a> {
    /// A field that is present and not null.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// The error for a field of this object.
    pub(crate) fn wrong(&self, name: &str, expected: &str, found: &str) -> ModelError {
        field(&format!("{}{name}", self.prefix), expected, found)
    }

    /// A field that has to be there.
    pub(crate) fn need(&self, name: &str, expected: &str) -> Result<&'a Value, ModelError> {
        self.get(name)
            .ok_or_else(|| self.wrong(name, expected, "nothing (the field is missing)"))
    }

    /// An object inside this one.
    pub(crate) fn object(&self, name: &str) -> Result<Fields<'a>, ModelError> {
        match self.need(name, "an object")? {
            Value::Object(map) => Ok(Fields {
                map,
                prefix: format!("{}{name}.", self.prefix),
            }),
            other => Err(self.wrong(name, "an object", kind(other))),
        }
    }

    pub(crate) fn text(&self, name: &str) -> Result<String, ModelError> {
        let value = self.need(name, "text")?;
        value
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| self.wrong(name, "text", kind(value)))
    }

    /// Refuses a field that is there and none of `allowed`.
    pub(crate) fn one_of(&self, name: &str, allowed: &[&str]) -> Result<(), ModelError> {
        match self.get(name) {
            None => Ok(()),
            Some(Value::String(s)) if allowed.contains(&s.as_str()) => Ok(()),
            Some(value) => Err(self.wrong(name, &allowed.join(" or "), &value.to_string())),
        }
    }

    pub(crate) fn number(&self, name: &str, min: u64, max: u64) -> Result<usize, ModelError> {
        let expected = format!("a whole number from {min} to {max}");
        let value = self.need(name, &expected)?;
        integer(value)
            .filter(|n| (min..=max).contains(n))
            .map(|n| n as usize)
            .ok_or_else(|| self.wrong(name, &expected, &value.to_string()))
    }

    pub(crate) fn number_or(&self, name: &str, default: usize) -> Result<usize, ModelError> {
        match self.get(name) {
            Some(_) => self.number(name, 1, DIMENSION_MAX),
            None => Ok(default),
        }
    }

    pub(crate) fn numbers(&self, name: &str) -> Result<Vec<usize>, ModelError> {
        let expected = "a list of whole numbers";
        let value = self.need(name, expected)?;
        let numbers = value
            .as_array()
            .and_then(|list| list.iter().map(integer).collect::<Option<Vec<_>>>())
            .filter(|list| list.iter().all(|n| *n <= DIMENSION_MAX));
        numbers
            .map(|list| list.into_iter().map(|n| n as usize).collect())
            .ok_or_else(|| self.wrong(name, expected, &value.to_string()))
    }

    /// A list of texts; `None` when absent.
    pub(crate) fn texts(&self, name: &str) -> Result<Option<Vec<String>>, ModelError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let texts = value.as_array().and_then(|list| {
            let texts = list.iter().map(|v| v.as_str().map(str::to_owned));
            texts.collect::<Option<Vec<_>>>()
        });
        texts
            .map(Some)
            .ok_or_else(|| self.wrong(name, "a list of texts", &value.to_string()))
    }

    pub(crate) fn float_or(&self, name: &str, default: f32) -> Result<f32, ModelError> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .map(|x| x as f32)
                .filter(|x| x.is_finite() && *x >= 0.0)
                .ok_or_else(|| self.wrong(name, "a number of at least 0", &value.to_string())),
        }
    }

    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.wrong(name, "true or false", &value.to_string())),
        }
    }
}

/// A whole number, also when written as 128.0.
pub(crate) fn integer(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        value
            .as_f64()
            .filter(|x| x.fract() == 0.0 && (0.0..1e15).contains(x))
            .map(|x| x as u64)
    })
}

pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn field(name: &str, expected: &str, found: &str) -> ModelError {
    ModelError::Field {
        file: "config.json".to_owned(),
        field: name.to_owned(),
        expected: expected.to_owned(),
        found: found.to_owned(),
    }
}
