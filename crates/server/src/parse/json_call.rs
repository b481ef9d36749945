//! `{"name": "f", "arguments": {…}}` up to `</tool_call>`, arguments streamed as they are written.
//!
//! When the object begins in that order, as models write it, the arguments are passed through
//! unchanged; anything else is kept until the end tag and read as a whole.

use super::{Part, arguments, content};
use serde_json::Value;

const END: &str = "</tool_call>";

pub(super) struct JsonCall {
    index: u32,
    state: State,
}

enum State {
    /// Nothing certain yet.
    Head,
    /// Inside the arguments' value.
    Arguments(Depth),
    /// After them; the closing brace and the end tag are still to come.
    Tail,
    /// Not in the usual order.
    Whole,
}

/// Where in a JSON value the text stands.
#[derive(Clone, Copy, Default)]
struct Depth {
    open: u32,
    in_string: bool,
    escaped: bool,
}

impl Depth {
    /// Takes in a character; true when it completed the value.
    fn push(&mut self, c: char) -> bool {
        if self.in_string {
            let ends = !self.escaped && c == '"';
            self.escaped = !self.escaped && c == '\\';
            self.in_string = !ends;
            return false;
        }
        match c {
            '"' => self.in_string = true,
            '{' | '[' => self.open += 1,
            '}' | ']' => {
                self.open -= 1;
                return self.open == 0;
            }
            _ => {}
        }
        false
    }
}

enum Head {
    /// Name, and where the arguments' value starts.
    Usual(String, usize),
    Unusual,
    Unfinished,
}

impl JsonCall {
    pub(super) fn new(index: u32) -> Self {
        Self {
            index,
            state: State::Head,
        }
    }

    /// `Some(true)` when a call ended, `Some(false)` when it was none, `None` when there is more to
    /// come.
    pub(super) fn push(&mut self, buffer: &mut String, out: &mut Vec<Part>) -> Option<bool> {
        loop {
            match &mut self.state {
                State::Head => match head(buffer) {
                    Head::Unfinished => return None,
                    Head::Unusual => self.state = State::Whole,
                    Head::Usual(name, at) => {
                        let index = self.index;
                        out.push(Part::Call { index, name });
                        buffer.drain(..at);
                        self.state = State::Arguments(Depth::default());
                    }
                },
                State::Arguments(depth) => {
                    let end = buffer.char_indices().find(|(_, c)| depth.push(*c));
                    let take = end.map_or(buffer.len(), |(at, c)| at + c.len_utf8());
                    arguments(self.index, &buffer[..take], out);
                    buffer.drain(..take);
                    end?;
                    self.state = State::Tail;
                }
                State::Tail => {
                    let at = buffer.find(END)?;
                    buffer.drain(..at + END.len());
                    return Some(true);
                }
                State::Whole => {
                    let at = buffer.find(END)?;
                    let made = self.whole(&buffer[..at], true, out);
                    buffer.drain(..at + END.len());
                    return Some(made);
                }
            }
        }
    }

    /// Reads a complete object; what is none is content again.
    fn whole(&self, text: &str, closed: bool, out: &mut Vec<Part>) -> bool {
        let parsed: Option<Value> = serde_json::from_str(text).ok();
        let name = parsed.as_ref().and_then(|v| v.get("name")?.as_str());
        let Some((name, value)) = name.zip(parsed.as_ref()) else {
            let end = if closed { END } else { "" };
            content(&format!("<tool_call>{text}{end}"), out);
            return false;
        };
        let index = self.index;
        let name = name.to_owned();
        out.push(Part::Call { index, name });
        let given = value.get("arguments").or_else(|| value.get("parameters"));
        let text = match given {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => "{}".to_owned(),
        };
        arguments(index, &text, out);
        true
    }

    pub(super) fn finish(&mut self, rest: &str, out: &mut Vec<Part>) {
        match self.state {
            State::Head | State::Whole => {
                self.whole(rest, false, out);
            }
            State::Arguments(_) | State::Tail => {}
        }
    }
}

/// Reads `{"name": "f", "arguments": {`. Decides on the first character that does not fit, so the
/// decision does not depend on how the text was cut.
fn head(text: &str) -> Head {
    let mut rest = text;
    if let Err(other) = eat_all(&mut rest, ["{", "\"name\"", ":"]) {
        return other;
    }
    rest = rest.trim_start();
    let Some(quoted) = rest.strip_prefix('"') else {
        return unfinished_if_empty(rest);
    };
    let Some(end) = quoted.find(['"', '\\']) else {
        return Head::Unfinished;
    };
    if quoted[end..].starts_with('\\') {
        return Head::Unusual;
    }
    let name = quoted[..end].to_owned();
    rest = &quoted[end + 1..];
    if let Err(other) = eat_all(&mut rest, [",", "\"arguments\"", ":"]) {
        return other;
    }
    rest = rest.trim_start();
    match rest.starts_with('{') {
        true => Head::Usual(name, text.len() - rest.len()),
        false => unfinished_if_empty(rest),
    }
}

fn unfinished_if_empty(rest: &str) -> Head {
    match rest.is_empty() {
        true => Head::Unfinished,
        false => Head::Unusual,
    }
}

/// Skips three marks with whitespace between.
fn eat_all(rest: &mut &str, marks: [&str; 3]) -> Result<(), Head> {
    for expected in marks {
        match eat(rest, expected) {
            Some(true) => {}
            Some(false) => return Err(Head::Unusual),
            None => return Err(Head::Unfinished),
        }
    }
    Ok(())
}

/// Skips whitespace and `expected`; `None` when the text ends inside it.
fn eat(rest: &mut &str, expected: &str) -> Option<bool> {
    let text = rest.trim_start();
    if let Some(after) = text.strip_prefix(expected) {
        *rest = after;
        return Some(true);
    }
    match expected.starts_with(text) {
        true => None,
        false => Some(false),
    }
}
