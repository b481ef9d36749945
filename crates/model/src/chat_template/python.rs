//! How Python prints: `str`, `repr` and `json.dumps`, over minijinja's values.
//!
//! Invariant: the order of keys is the order of insertion unless asked otherwise.

use std::fmt::Write as _;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::is_container;

/// Nesting beyond this is refused; Python's own limit is near 1,000.
const DEPTH_MAX: u32 = 200;

/// `str(value)`; undefined is empty, as Jinja prints it.
pub(super) fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => float(value),
        _ if is_container(value) => repr(value, 0),
        _ => value.to_string(),
    }
}

fn float(value: &Value) -> String {
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float_repr)
}

/// `repr` of a float: shortest digits that read back, an exponent below 1e-4 and from 1e16 on.
pub(super) fn float_repr(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "nan".to_owned()
        } else {
            if x > 0.0 { "inf" } else { "-inf" }.to_owned()
        };
    }
    let magnitude = x.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let scientific = format!("{x:e}");
        let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        let (sign, exponent) = exponent
            .strip_prefix('-')
            .map_or(('+', exponent), |e| ('-', e));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let plain = x.to_string();
    if plain.contains('.') {
        plain
    } else {
        plain + ".0"
    }
}

fn repr(value: &Value, depth: u32) -> String {
    if depth > DEPTH_MAX {
        return "...".to_owned();
    }
    match value.kind() {
        ValueKind::String => string_repr(value.as_str().unwrap_or_default()),
        ValueKind::Map => {
            let pair = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key, depth + 1), repr(&item, depth + 1))
            };
            let pairs: Vec<String> = value.try_iter().into_iter().flatten().map(pair).collect();
            format!("{{{}}}", pairs.join(", "))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter().into_iter().flatten();
            let items: Vec<String> = items.map(|item| repr(&item, depth + 1)).collect();
            format!("[{}]", items.join(", "))
        }
        _ => text(value),
    }
}

/// Single quotes, unless the text has some and no double ones.
fn string_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if (c as u32) < 0x20 || (0x7f..0xa0).contains(&(c as u32)) => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Arguments of `json.dumps`.
#[derive(Clone, Debug)]
pub(super) struct JsonLayout {
    pub ensure_ascii: bool,
    pub sort_keys: bool,
    pub item_separator: String,
    pub key_separator: String,
    indent: Option<String>,
}

impl Default for JsonLayout {
    fn default() -> Self {
        Self {
            ensure_ascii: false,
            sort_keys: false,
            item_separator: ", ".to_owned(),
            key_separator: ": ".to_owned(),
            indent: None,
        }
    }
}

impl JsonLayout {
    /// A number of spaces, or the text itself; items are then one to a line.
    pub(super) fn set_indent(&mut self, indent: &Value) -> Result<(), Error> {
        self.indent = Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " "
                .repeat(usize::try_from(i64::try_from(indent.clone())?.clamp(0, 64)).unwrap_or(0)),
        });
        self.item_separator = ",".to_owned();
        Ok(())
    }

    /// The JSON text of a value.
    pub(super) fn dumps(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.write(&mut out, value, 0)?;
        Ok(out)
    }

    fn write(&self, out: &mut String, value: &Value, depth: u32) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: nested too deeply",
            ));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.write_string(out, value.as_str().unwrap_or_default()),
            ValueKind::Map => self.write_map(out, value, depth)?,
            ValueKind::Seq | ValueKind::Iterable => self.write_list(out, value, depth)?,
            kind => {
                let message = format!("tojson: a value of type {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn write_map(&self, out: &mut String, value: &Value, depth: u32) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        out.push('{');
        let empty = keys.is_empty();
        for (index, key) in keys.into_iter().enumerate() {
            self.begin_item(out, index, depth + 1);
            match key.kind() {
                ValueKind::String => self.write_string(out, key.as_str().unwrap_or_default()),
                ValueKind::None => out.push_str("\"null\""),
                ValueKind::Bool => out.push_str(if key.is_true() {
                    "\"true\""
                } else {
                    "\"false\""
                }),
                _ => {
                    let _ = write!(out, "\"{}\"", text(&key));
                }
            }
            out.push_str(&self.key_separator);
            self.write(out, &value.get_item(&key)?, depth + 1)?;
        }
        self.end(out, empty, depth, '}');
        Ok(())
    }

    fn write_list(&self, out: &mut String, value: &Value, depth: u32) -> Result<(), Error> {
        out.push('[');
        let mut empty = true;
        for (index, item) in value.try_iter()?.enumerate() {
            empty = false;
            self.begin_item(out, index, depth + 1);
            self.write(out, &item, depth + 1)?;
        }
        self.end(out, empty, depth, ']');
        Ok(())
    }

    fn begin_item(&self, out: &mut String, index: usize, depth: u32) {
        if index > 0 {
            out.push_str(&self.item_separator);
        }
        self.new_line(out, depth);
    }

    fn end(&self, out: &mut String, empty: bool, depth: u32, bracket: char) {
        if !empty {
            self.new_line(out, depth);
        }
        out.push(bracket);
    }

    fn new_line(&self, out: &mut String, depth: u32) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }

    fn write_string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(x) if x.is_nan() => "NaN".to_owned(),
        Ok(x) if x.is_infinite() => if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
        Ok(x) => float_repr(x),
        Err(_) => value.to_string(),
    }
}
