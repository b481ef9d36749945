//! gpt-oss' channels: `analysis` is reasoning, `final` content, `commentary to=functions.f` a call.

use super::scan::{Found, until};
use super::{Part, arguments, content, reasoning};

const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
/// What ends a message; the last one also begins the next header.
const ENDS: [&str; 5] = ["<|end|>", "<|call|>", "<|return|>", "<|start|>", CHANNEL];

#[derive(Default)]
pub(super) struct Channels {
    buffer: String,
    state: State,
    header: String,
    calls: u32,
}

#[derive(Default)]
enum State {
    /// Before `<|channel|>`: the role, which is known.
    #[default]
    Between,
    Header,
    Reasoning,
    Content,
    Call,
}

impl Channels {
    pub(super) fn push(&mut self, text: &str, out: &mut Vec<Part>) {
        self.buffer.push_str(text);
        while self.advance(out) {}
    }

    fn advance(&mut self, out: &mut Vec<Part>) -> bool {
        match self.state {
            State::Between => match until(&mut self.buffer, &[CHANNEL]) {
                Found::Marker { .. } => self.enter(State::Header),
                Found::Text(_) => false,
            },
            State::Header => match until(&mut self.buffer, &[MESSAGE]) {
                Found::Marker { text, .. } => {
                    self.header.push_str(&text);
                    self.open(out)
                }
                Found::Text(text) => {
                    self.header.push_str(&text);
                    false
                }
            },
            State::Reasoning | State::Content | State::Call => self.body(out),
        }
    }

    fn enter(&mut self, state: State) -> bool {
        self.state = state;
        true
    }

    fn open(&mut self, out: &mut Vec<Part>) -> bool {
        let header = std::mem::take(&mut self.header);
        if let Some((_, rest)) = header.split_once("to=functions.") {
            let end = rest.find(|c: char| c.is_whitespace() || c == '<');
            let name = rest[..end.unwrap_or(rest.len())].to_owned();
            let index = self.calls;
            out.push(Part::Call { index, name });
            self.calls += 1;
            return self.enter(State::Call);
        }
        match header.trim_start().starts_with("analysis") {
            true => self.enter(State::Reasoning),
            false => self.enter(State::Content),
        }
    }

    fn body(&mut self, out: &mut Vec<Part>) -> bool {
        let (text, ended) = match until(&mut self.buffer, &ENDS) {
            Found::Text(text) => (text, None),
            Found::Marker { text, which } => (text, Some(which)),
        };
        self.emit(&text, out);
        match ended {
            None => false,
            Some(which) if ENDS[which] == CHANNEL => self.enter(State::Header),
            Some(_) => self.enter(State::Between),
        }
    }

    fn emit(&self, text: &str, out: &mut Vec<Part>) {
        match self.state {
            State::Reasoning => reasoning(text, out),
            State::Content => content(text, out),
            State::Call => arguments(self.calls.saturating_sub(1), text, out),
            State::Between | State::Header => {}
        }
    }

    pub(super) fn finish(&mut self, complete: bool, out: &mut Vec<Part>) {
        let rest = std::mem::take(&mut self.buffer);
        // What is held back is the beginning of a marker, which a call's arguments do without.
        if complete && matches!(self.state, State::Call) {
            return;
        }
        self.emit(&rest, out);
    }
}
