//! `<think>` and `<tool_call>` in text: MiMo's, Qwen's and Hermes' formats around the call itself.
//!
//! Whitespace next to a marker is dropped: models put line breaks there that nobody wants to see.

use super::json_call::JsonCall;
use super::scan::{Found, until};
use super::xml_call::XmlCall;
use super::{Expect, Format, Part, content, reasoning};

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
const CALL: &str = "<tool_call>";

pub(super) struct Tagged {
    format: Format,
    expect: Expect,
    buffer: String,
    state: State,
    /// Content whitespace that is shown only when something follows it.
    blank: String,
    calls: u32,
    /// The next content begins after a marker.
    fresh: bool,
}

enum State {
    /// Only whitespace so far: `<think>` may still come.
    Start,
    Thinking,
    Content,
    Json(JsonCall),
    Xml(XmlCall),
}

impl Tagged {
    pub(super) fn new(format: Format, expect: Expect) -> Self {
        let state = match (expect.thinking, expect.reasoning) {
            (true, _) => State::Thinking,
            (false, true) => State::Start,
            (false, false) => State::Content,
        };
        Self {
            format,
            fresh: expect.thinking,
            expect,
            buffer: String::new(),
            state,
            blank: String::new(),
            calls: 0,
        }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Vec<Part>) {
        self.buffer.push_str(text);
        while self.advance(out) {}
    }

    /// True when the state changed and there may be more to take.
    fn advance(&mut self, out: &mut Vec<Part>) -> bool {
        match &mut self.state {
            State::Start => self.start(),
            State::Thinking => self.think(out),
            State::Content => self.content(out),
            State::Json(call) => {
                let done = call.push(&mut self.buffer, out);
                self.end_call(done)
            }
            State::Xml(call) => {
                let done = call.push(&mut self.buffer, out);
                self.end_call(done)
            }
        }
    }

    fn start(&mut self) -> bool {
        let text = self.buffer.trim_start();
        if let Some(rest) = text.strip_prefix(THINK) {
            self.buffer = rest.to_owned();
            self.state = State::Thinking;
            self.fresh = true;
            return true;
        }
        if THINK.starts_with(text) {
            return false;
        }
        self.state = State::Content;
        true
    }

    fn think(&mut self, out: &mut Vec<Part>) -> bool {
        match until(&mut self.buffer, &[THINK_END]) {
            Found::Text(text) => {
                self.emit(&text, true, out);
                false
            }
            Found::Marker { text, .. } => {
                self.emit(&text, true, out);
                self.blank.clear();
                self.state = State::Content;
                self.fresh = true;
                true
            }
        }
    }

    fn content(&mut self, out: &mut Vec<Part>) -> bool {
        let markers: &[&str] = if self.expect.tools { &[CALL] } else { &[] };
        match until(&mut self.buffer, markers) {
            Found::Text(text) => {
                self.emit(&text, false, out);
                false
            }
            Found::Marker { text, .. } => {
                self.emit(&text, false, out);
                self.blank.clear();
                self.state = match self.format {
                    Format::Mimo => State::Xml(XmlCall::new(self.calls, &self.expect.schemas)),
                    _ => State::Json(JsonCall::new(self.calls)),
                };
                true
            }
        }
    }

    fn end_call(&mut self, made: Option<bool>) -> bool {
        let Some(made) = made else {
            return false;
        };
        self.calls += u32::from(made);
        self.state = State::Content;
        self.fresh = made;
        true
    }

    /// Gives out text, holding back whitespace at its end and dropping it after a marker.
    fn emit(&mut self, text: &str, thinking: bool, out: &mut Vec<Part>) {
        let text = match self.fresh {
            true => text.trim_start(),
            false => text,
        };
        let solid = text.trim_end();
        if solid.is_empty() {
            self.blank.push_str(text);
            return;
        }
        self.fresh = false;
        let mut whole = std::mem::take(&mut self.blank);
        whole.push_str(solid);
        self.blank.push_str(&text[solid.len()..]);
        match thinking {
            true => reasoning(&whole, out),
            false => content(&whole, out),
        }
    }

    pub(super) fn finish(&mut self, complete: bool, out: &mut Vec<Part>) {
        let rest = std::mem::take(&mut self.buffer);
        match &mut self.state {
            State::Start => content(&rest, out),
            State::Thinking => {
                self.emit(&rest, true, out);
            }
            State::Content => {
                self.emit(&rest, false, out);
                if self.calls == 0 && !self.fresh {
                    content(&std::mem::take(&mut self.blank), out);
                }
            }
            State::Json(call) => call.finish(&rest, out),
            State::Xml(call) => call.finish(&rest, complete, out),
        }
    }
}
