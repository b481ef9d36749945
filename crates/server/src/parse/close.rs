//! Watches the arguments of calls: a call that the model left open is closed to valid JSON, and one that
//! cannot be is known as such.
//!
//! Invariant: what was given out is never taken back, only added to. An answer that ran into its limit is
//! not for here: its arguments stay as far as they came, as with OpenAI.

use super::{Part, arguments};
use serde_json::Value;

/// Arguments of the call that is open, and whether those before it were JSON.
#[derive(Default)]
pub(super) struct Calls {
    open: Option<(u32, String)>,
    broken: bool,
}

impl Calls {
    /// Takes note of what a parser gave out.
    pub(super) fn watch(&mut self, parts: &[Part]) {
        for part in parts {
            match part {
                Part::Call { index, .. } => {
                    self.end();
                    self.open = Some((*index, String::new()));
                }
                Part::Arguments { text, .. } => {
                    self.open.iter_mut().for_each(|(_, all)| all.push_str(text));
                }
                Part::Reasoning(_) | Part::Content(_) => {}
            }
        }
    }

    /// The answer is whole: gives out what closes its last call. False when arguments of a call are no JSON.
    pub(super) fn close(&mut self, out: &mut Vec<Part>) -> bool {
        if let Some((index, text)) = &mut self.open
            && let Some(end) = closing(text)
        {
            arguments(*index, &end, out);
            text.push_str(&end);
        }
        self.end();
        !self.broken
    }

    fn end(&mut self) {
        if let Some((_, text)) = self.open.take() {
            self.broken |= !is_json(&text);
        }
    }
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
        && serde_json::from_str::<Value>(text).is_ok()
}

/// Ends of a string that broke off: after text, a backslash, in `\uXXXX`, between two surrogates.
const STRING_ENDS: [&str; 15] = [
    "\"",
    "\\\"",
    "0\"",
    "00\"",
    "000\"",
    "0000\"",
    "u0000\"",
    "\\udc00\"",
    "udc00\"",
    "dc00\"",
    "c00\"",
    "800\\udc00\"",
    "00\\udc00\"",
    "0\\udc00\"",
    "000\\udc00\"",
];
/// Ends of anything else: a number or word that broke off, a key or value that is missing.
const OTHER_ENDS: [&str; 15] = [
    "",
    "null",
    ":null",
    "\"\":null",
    "0",
    "rue",
    "ue",
    "e",
    "alse",
    "lse",
    "se",
    "ull",
    "ll",
    "l",
    "{}",
];

/// What has to follow `text`, the beginning of a JSON value, to make it one; `None` when nothing does.
fn closing(text: &str) -> Option<String> {
    let mut brackets = Vec::new();
    let (mut in_string, mut escaped) = (false, false);
    for c in text.chars() {
        match (in_string, c) {
            (true, '"') if !escaped => in_string = false,
            (true, _) => escaped = c == '\\' && !escaped,
            (false, '"') => in_string = true,
            (false, '{') => brackets.push('}'),
            (false, '[') => brackets.push(']'),
            (false, '}' | ']') => drop(brackets.pop()),
            (false, _) => {}
        }
    }
    let close: String = brackets.iter().rev().collect();
    let complete = |end: String| is_json(&format!("{text}{end}")).then_some(end);
    if text.trim().is_empty() {
        return Some("{}".to_owned());
    }
    if !in_string {
        return OTHER_ENDS
            .iter()
            .find_map(|end| complete(format!("{end}{close}")));
    }
    let after = ["", ":null"];
    let ends = after
        .iter()
        .flat_map(|after| STRING_ENDS.map(|end| format!("{end}{after}{close}")));
    ends.into_iter().find_map(complete)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_beginning_of_an_object_is_closed() {
        let whole = r#"{"a": "x\\\"\u00e9\ud83d\ude00é\n", "ö": [1, -2.5e+3, true, false, null, {"z": {}}, [[]]], "e": ""}"#;
        assert!(is_json(whole));
        for (at, _) in whole.char_indices() {
            let text = &whole[..at];
            let end = closing(text).unwrap_or_else(|| panic!("nothing closes {text}"));
            assert!(is_json(&format!("{text}{end}")), "{text}{end}");
        }
        assert_eq!(closing(whole).as_deref(), Some(""));
    }

    #[test]
    fn what_is_no_json_stays_so() {
        assert_eq!(closing("{\"a\": 1 2"), None);
        assert_eq!(closing("{,"), None);
    }
}
