//! `<function=f><parameter=k>v</parameter></function></tool_call>`: MiMo's calls, to JSON arguments
//! as they come.
//!
//! Values are HTML-unescaped. Text values stream as they are written; values that the function's
//! schema gives another type are read whole and cast, and stay text when they do not fit.

use super::scan::{Found, until};
use super::{Part, arguments, content};
use serde_json::Value;

const END: &str = "</tool_call>";
const VALUE_END: &str = "</parameter>";
/// The longest entity, `&#x10FFFF;`.
const ENTITY_BYTES_MAX: usize = 10;

pub(super) struct XmlCall {
    index: u32,
    schemas: Vec<Value>,
    /// `properties` of the function that is called.
    properties: Value,
    state: State,
    parameters: u32,
}

enum State {
    /// Before `<function=`.
    Head,
    /// Between parameters.
    Between,
    /// A value that streams as text; false until something of it was given out.
    Text(bool),
    /// A value that is kept until its end.
    Kept(String),
    /// After `</function>`.
    Tail,
    /// No call at all.
    Broken,
}

impl XmlCall {
    pub(super) fn new(index: u32, schemas: &[Value]) -> Self {
        Self {
            index,
            schemas: schemas.to_vec(),
            properties: Value::Null,
            state: State::Head,
            parameters: 0,
        }
    }

    /// As [`super::json_call::JsonCall::push`].
    pub(super) fn push(&mut self, buffer: &mut String, out: &mut Vec<Part>) -> Option<bool> {
        loop {
            match &mut self.state {
                State::Head => self.head(buffer, out)?,
                State::Between => self.between(buffer, out)?,
                State::Text(_) => self.text(buffer, out)?,
                State::Kept(_) => self.kept(buffer, out)?,
                State::Tail => {
                    let at = buffer.find(END)?;
                    buffer.drain(..at + END.len());
                    return Some(true);
                }
                State::Broken => {
                    let at = buffer.find(END)? + END.len();
                    content(&format!("<tool_call>{}", &buffer[..at]), out);
                    buffer.drain(..at);
                    return Some(false);
                }
            }
        }
    }

    fn head(&mut self, buffer: &mut String, out: &mut Vec<Part>) -> Option<()> {
        const OPEN: &str = "<function=";
        let text = buffer.trim_start();
        let Some(named) = text.strip_prefix(OPEN) else {
            if OPEN.starts_with(text) {
                return None;
            }
            self.state = State::Broken;
            return Some(());
        };
        let end = named.find('>')?;
        let name = named[..end].trim().to_owned();
        let rest = named[end + 1..].to_owned();
        self.properties = properties(&self.schemas, &name);
        let index = self.index;
        out.push(Part::Call { index, name });
        *buffer = rest;
        self.state = State::Between;
        Some(())
    }

    fn between(&mut self, buffer: &mut String, out: &mut Vec<Part>) -> Option<()> {
        let at = buffer.find(['<'])?;
        let tag = &buffer[at..];
        if let Some(named) = tag.strip_prefix("<parameter=") {
            let end = named.find('>')?;
            let name = named[..end].trim().to_owned();
            *buffer = named[end + 1..].to_owned();
            self.open_value(&name, out);
            return Some(());
        }
        let closing = ["</function>", END];
        if let Some(found) = closing.iter().find(|end| tag.starts_with(**end)) {
            let skip = if *found == END { 0 } else { found.len() };
            let rest = tag[skip..].to_owned();
            let close = if self.parameters == 0 { "{}" } else { "}" };
            arguments(self.index, close, out);
            *buffer = rest;
            self.state = State::Tail;
            return Some(());
        }
        let known = ["<parameter=", "</function>", END];
        if known.iter().any(|tag_name| tag_name.starts_with(tag)) {
            return None;
        }
        // Stray text between parameters means nothing.
        buffer.drain(..=at);
        Some(())
    }

    fn open_value(&mut self, name: &str, out: &mut Vec<Part>) {
        let lead = if self.parameters == 0 { "{" } else { ", " };
        let key = Value::from(name);
        arguments(self.index, &format!("{lead}{key}: "), out);
        self.parameters += 1;
        self.state = match is_text(&self.properties[name]) {
            true => State::Text(false),
            false => State::Kept(name.to_owned()),
        };
    }

    fn text(&mut self, buffer: &mut String, out: &mut Vec<Part>) -> Option<()> {
        let State::Text(begun) = self.state else {
            return None;
        };
        // `null` as a whole is no text; as long as it may still be that, wait.
        let end = buffer.find(VALUE_END);
        if !begun {
            if end.is_none() && format!("null{VALUE_END}").starts_with(buffer.as_str()) {
                return None;
            }
            if end.is_some() && buffer.starts_with("null</parameter>") {
                arguments(self.index, "null", out);
                buffer.drain(.."null</parameter>".len());
                self.state = State::Between;
                return Some(());
            }
            arguments(self.index, "\"", out);
            self.state = State::Text(true);
        }
        let found = until(buffer, &[VALUE_END]);
        let (mut text, ended) = match found {
            Found::Marker { text, .. } => (text, true),
            Found::Text(text) => (text, false),
        };
        if !ended {
            let keep = unfinished_entity(&text);
            let held = text.split_off(text.len() - keep);
            buffer.insert_str(0, &held);
        }
        let quoted = Value::from(unescape(&text)).to_string();
        arguments(self.index, &quoted[1..quoted.len() - 1], out);
        if !ended {
            return None;
        }
        arguments(self.index, "\"", out);
        self.state = State::Between;
        Some(())
    }

    fn kept(&mut self, buffer: &mut String, out: &mut Vec<Part>) -> Option<()> {
        let at = buffer.find(VALUE_END)?;
        let State::Kept(name) = &self.state else {
            return None;
        };
        let value = cast(&unescape(&buffer[..at]), &self.properties[name.as_str()]);
        arguments(self.index, &value.to_string(), out);
        buffer.drain(..at + VALUE_END.len());
        self.state = State::Between;
        Some(())
    }

    /// A value that the end of a complete answer cut is given out as far as it came.
    pub(super) fn finish(&mut self, rest: &str, complete: bool, out: &mut Vec<Part>) {
        match &self.state {
            State::Head | State::Broken => content(&format!("<tool_call>{rest}"), out),
            State::Text(begun) if complete => {
                let quoted = Value::from(unescape(rest)).to_string();
                arguments(
                    self.index,
                    &quoted[usize::from(*begun)..quoted.len() - 1],
                    out,
                );
            }
            State::Kept(name) if complete && !rest.trim().is_empty() => {
                let value = cast(&unescape(rest), &self.properties[name.as_str()]);
                arguments(self.index, &value.to_string(), out);
            }
            _ => {}
        }
    }
}

fn properties(schemas: &[Value], name: &str) -> Value {
    let function = schemas
        .iter()
        .map(|tool| tool.get("function").unwrap_or(tool))
        .find(|function| function["name"] == name);
    let found = function.and_then(|f| f.get("parameters")?.get("properties"));
    found.cloned().unwrap_or(Value::Null)
}

/// Text unless the schema says another type.
fn is_text(schema: &Value) -> bool {
    schema
        .get("type")
        .is_none_or(|kind| kind == "string" || kind.is_array())
        && schema.get("anyOf").is_none()
        || schema.get("enum").is_some() && schema.get("type").is_none()
}

/// Reads a value as its schema's type; text when it is none.
fn cast(text: &str, schema: &Value) -> Value {
    let trimmed = text.trim();
    if trimmed == "null" {
        return Value::Null;
    }
    let lower = trimmed.to_ascii_lowercase();
    match schema["type"].as_str() {
        Some("boolean") if lower == "true" || lower == "1" => return true.into(),
        Some("boolean") if lower == "false" || lower == "0" => return false.into(),
        _ => {}
    }
    serde_json::from_str(trimmed).unwrap_or_else(|_| Value::from(text))
}

/// Bytes at the end that may be the start of an entity.
fn unfinished_entity(text: &str) -> usize {
    let Some(at) = text.rfind('&') else {
        return 0;
    };
    let tail = &text[at..];
    match tail.contains(';') || tail.len() > ENTITY_BYTES_MAX {
        true => 0,
        false => tail.len(),
    }
}

/// The five entities of XML, and numbered characters; others stay as written.
pub(super) fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = rest.find(';').filter(|end| *end < ENTITY_BYTES_MAX);
        match end.and_then(|end| Some((entity(&rest[1..end])?, end))) {
            Some((c, end)) => {
                out.push(c);
                rest = &rest[end + 1..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

fn entity(name: &str) -> Option<char> {
    match name {
        "amp" => Some('&'),
        "lt" => Some('<'),
        "gt" => Some('>'),
        "quot" => Some('"'),
        "apos" => Some('\''),
        _ => {
            let number = name.strip_prefix('#')?;
            let code = match number.strip_prefix(['x', 'X']) {
                Some(hex) => u32::from_str_radix(hex, 16).ok()?,
                None => number.parse().ok()?,
            };
            char::from_u32(code)
        }
    }
}
