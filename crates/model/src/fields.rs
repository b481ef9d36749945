//! Typed access to the fields of a `config.json`, with errors that name file, field, what was
//! expected and what was found. A field that is null counts as absent.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{ModelError, parse_object, read_text};

/// Config files of the releases are under 10 KB.
const BYTES_MAX: u64 = 4 << 20;
/// Bound on any dimension: products of three fit 64 bits.
pub(crate) const DIMENSION_MAX: u64 = 1 << 20;
/// Bound on the number of layers.
pub(crate) const LAYERS_MAX: u64 = 4096;

/// Longest quotation of a value in an error, in characters.
const FOUND_MAX: usize = 80;

/// The fields of one JSON object.
pub(crate) struct Fields<'a> {
    file: &'a Path,
    map: &'a Map<String, Value>,
    /// Names of the objects around, each with a dot.
    prefix: String,
}

/// Reads the object in `path` and resolves it.
pub(crate) fn read<T>(
    path: &Path,
    resolve: impl FnOnce(&Fields<'_>) -> Result<T, ModelError>,
) -> Result<T, ModelError> {
    parse(path, &read_text(path, BYTES_MAX)?, resolve)
}

/// Resolves the object in `text`, which errors say is in `path`.
pub(crate) fn parse<T>(
    path: &Path,
    text: &str,
    resolve: impl FnOnce(&Fields<'_>) -> Result<T, ModelError>,
) -> Result<T, ModelError> {
    resolve(&Fields {
        file: path,
        map: &parse_object(path, text)?,
        prefix: String::new(),
    })
}

impl<'a> Fields<'a> {
    /// A field that is present and not null.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// The error for a field of this object.
    pub(crate) fn wrong(&self, name: &str, expected: &str, found: &str) -> ModelError {
        let mut quoted: String = found.chars().take(FOUND_MAX).collect();
        if quoted.len() < found.len() {
            quoted.push_str("...");
        }
        ModelError::Field {
            file: self.file.display().to_string(),
            field: format!("{}{name}", self.prefix),
            expected: expected.to_owned(),
            found: quoted,
        }
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
                file: self.file,
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

    /// Refuses a field that is there, unless it is 0.
    pub(crate) fn absent(&self, name: &str) -> Result<(), ModelError> {
        match self.get(name) {
            Some(value) if integer(value) != Some(0) => {
                Err(self.wrong(name, "nothing or null", &value.to_string()))
            }
            _ => Ok(()),
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

    /// Columns of a head that are rotated: `int(qk_dim * partial_rotary_factor)` in double precision,
    /// as the reference computes it.
    pub(crate) fn rope_dims(&self, qk_dim: usize) -> Result<usize, ModelError> {
        let name = "partial_rotary_factor";
        let value = self.get(name);
        let dims = match value.map(Value::as_f64) {
            None => qk_dim,
            Some(Some(factor)) if (0.0..=1.0).contains(&factor) => {
                (qk_dim as f64 * factor) as usize
            }
            Some(_) => usize::MAX,
        };
        if dims <= qk_dim && dims.is_multiple_of(2) {
            return Ok(dims);
        }
        let expected = format!(
            "a number from 0 to 1 that rotates an even number of the {qk_dim} columns of a head"
        );
        let found = value.map_or("nothing".to_owned(), Value::to_string);
        Err(self.wrong(name, &expected, &found))
    }

    /// The rotary base `name`, above 0.
    pub(crate) fn theta(&self, name: &str, default: f32) -> Result<f32, ModelError> {
        match self.float_or(name, default)? {
            theta if theta > 0.0 => Ok(theta),
            theta => Err(self.wrong(name, "a number above 0", &theta.to_string())),
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
