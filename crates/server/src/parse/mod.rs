//! A model's text to reasoning, content and tool calls, piece by piece as it comes.
//!
//! Owns the markers of three formats: MiMo's XML functions, Qwen's and Hermes' JSON calls, gpt-oss'
//! channels. Invariant, tested by property: the parts, joined, do not depend on how the text was cut.
//! Malformed calls come out as content: nothing a model says is lost.

mod channels;
mod close;
mod json_call;
mod scan;
mod tagged;
mod xml_call;

use serde_json::Value;

/// Something a model said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Thinking.
    Reasoning(String),
    /// The answer.
    Content(String),
    /// A call begins: its index and the function's name.
    Call {
        /// Counts the calls of this answer from 0.
        index: u32,
        /// The function.
        name: String,
    },
    /// More of a call's arguments, as JSON text.
    Arguments {
        /// Which call.
        index: u32,
        /// To be appended.
        text: String,
    },
}

/// How a model writes tool calls and reasoning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `<tool_call><function=NAME><parameter=K>V</parameter></function></tool_call>` (MiMo-V2,
    /// Qwen3-Coder), `<think>`.
    Mimo,
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>` (Qwen3, Hermes), `<think>`.
    #[default]
    Hermes,
    /// `<|channel|>…<|message|>…` (gpt-oss).
    Harmony,
}

impl Format {
    /// The names `--tool-call-parser` knows.
    pub const NAMES: [&'static str; 3] = ["mimo", "hermes", "harmony"];

    /// Recognises the format from a chat template.
    #[must_use]
    pub fn of_template(source: &str) -> Self {
        if source.contains("<|channel|>") {
            Self::Harmony
        } else if source.contains("<function=") {
            Self::Mimo
        } else {
            Self::Hermes
        }
    }

    /// The format of a name; other engines' names for the same formats are known too.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        match name {
            "mimo" | "qwen3_xml" | "qwen3_coder" | "qwen_coder" => Some(Self::Mimo),
            "hermes" | "qwen" | "qwen25" | "qwen3" => Some(Self::Hermes),
            "harmony" | "gpt-oss" | "openai" => Some(Self::Harmony),
            _ => None,
        }
    }
}

/// What to expect of an answer.
#[derive(Clone, Debug, Default)]
pub struct Expect {
    /// The prompt already opened the thinking.
    pub thinking: bool,
    /// Look for tool calls.
    pub tools: bool,
    /// Look for thinking.
    pub reasoning: bool,
    /// Function definitions in OpenAI's form: their schemas type XML values.
    pub schemas: Vec<Value>,
}

/// See the module.
pub struct Parser {
    inner: Inner,
    calls: close::Calls,
}

enum Inner {
    Tagged(tagged::Tagged),
    Channels(channels::Channels),
    Plain,
}

impl Parser {
    /// A parser of one answer.
    #[must_use]
    pub fn new(format: Format, expect: Expect) -> Self {
        Self::of(match format {
            Format::Harmony => Inner::Channels(channels::Channels::default()),
            Format::Mimo | Format::Hermes => Inner::Tagged(tagged::Tagged::new(format, expect)),
        })
    }

    fn of(inner: Inner) -> Self {
        let calls = close::Calls::default();
        Self { inner, calls }
    }

    /// Everything is content.
    #[must_use]
    pub fn plain() -> Self {
        Self::of(Inner::Plain)
    }

    /// Takes in text and appends to `out` what became certain.
    pub fn push(&mut self, text: &str, out: &mut Vec<Part>) {
        let before = out.len();
        match &mut self.inner {
            Inner::Tagged(parser) => parser.push(text, out),
            Inner::Channels(parser) => parser.push(text, out),
            Inner::Plain => content(text, out),
        }
        self.calls.watch(&out[before..]);
    }

    /// The text ended: what was held back comes out.
    ///
    /// `complete` says that it ended by itself: a call that is open is closed to valid JSON then. An
    /// answer that ran into a limit keeps its arguments as far as they came. False when a call's
    /// arguments are no JSON though the answer is complete.
    pub fn finish(&mut self, complete: bool, out: &mut Vec<Part>) -> bool {
        let before = out.len();
        match &mut self.inner {
            Inner::Tagged(parser) => parser.finish(complete, out),
            Inner::Channels(parser) => parser.finish(complete, out),
            Inner::Plain => {}
        }
        self.calls.watch(&out[before..]);
        !complete || self.calls.close(out)
    }
}

fn content(text: &str, out: &mut Vec<Part>) {
    if !text.is_empty() {
        out.push(Part::Content(text.to_owned()));
    }
}

fn reasoning(text: &str, out: &mut Vec<Part>) {
    if !text.is_empty() {
        out.push(Part::Reasoning(text.to_owned()));
    }
}

fn arguments(index: u32, text: &str, out: &mut Vec<Part>) {
    if !text.is_empty() {
        let text = text.to_owned();
        out.push(Part::Arguments { index, text });
    }
}

/// Joins neighbours of one kind.
#[must_use]
pub fn join(parts: Vec<Part>) -> Vec<Part> {
    let mut joined: Vec<Part> = Vec::new();
    for part in parts {
        match (joined.last_mut(), &part) {
            (Some(Part::Content(last)), Part::Content(text))
            | (Some(Part::Reasoning(last)), Part::Reasoning(text)) => last.push_str(text),
            (
                Some(Part::Arguments {
                    index: i,
                    text: last,
                }),
                Part::Arguments { index: j, text },
            ) if i == j => last.push_str(text),
            _ => joined.push(part),
        }
    }
    joined
}

#[cfg(test)]
mod tests;
