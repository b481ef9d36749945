//! Python: source files of wheels, and their documented functions as questions with answers.

use std::path::Path;

use super::{Document, conversation, wheel_files};
use crate::error::Result;

/// Source files and functions.
pub(super) fn documents(root: &Path) -> Result<Vec<Document>> {
    let mut out = Vec::new();
    for (_, text) in wheel_files(root, &[".py"])? {
        if text.len() < 400 || text.len() > 120_000 || !plausible(&text) {
            continue;
        }
        out.extend(functions(&text));
        out.push(Document {
            domain: "code",
            text,
            prompt: None,
        });
    }
    Ok(out)
}

/// Not data in disguise: lines are short, and few characters are digits.
fn plausible(text: &str) -> bool {
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    digits * 8 < text.len() && text.lines().all(|l| l.len() < 600)
}

/// Top-level functions of at most 30 lines whose docstring begins with a sentence.
fn functions(text: &str) -> Vec<Document> {
    let lines: Vec<&str> = text.lines().collect();
    let mut out = Vec::new();
    for start in 0..lines.len() {
        if !lines[start].starts_with("def ") || lines[start].starts_with("def _") {
            continue;
        }
        let body = lines[start + 1..]
            .iter()
            .take_while(|l| l.is_empty() || l.starts_with([' ', ')']))
            .count();
        if !(4..=30).contains(&body) {
            continue;
        }
        let function = lines[start..=start + body].join("\n");
        if let Some((question, code)) = question(&function) {
            let answer = format!("```python\n{}\n```", code.trim_end());
            out.push(conversation("code", None, &question, &answer));
        }
    }
    out
}

/// What was asked for, and the function without its docstring.
fn question(function: &str) -> Option<(String, String)> {
    let open = function.find("\"\"\"")?;
    let close = open + 3 + function[open + 3..].find("\"\"\"")?;
    let doc = &function[open + 3..close];
    let sentence = doc
        .trim()
        .split("\n\n")
        .next()?
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    if !(20..200).contains(&sentence.len()) || !sentence.is_ascii() {
        return None;
    }
    let mut chars = sentence.trim_end_matches('.').chars();
    let first = chars.next()?.to_ascii_lowercase();
    let name = function[4..].split('(').next()?;
    let (head, body) = (function[..open].trim_end(), &function[close + 3..]);
    let code = format!("{head}{body}").replace("\n\n\n", "\n");
    let tests = doctests(doc, name);
    let rest = chars.as_str();
    let task = format!("Write a python function to {first}{rest}.\nWrite the function in Python.");
    let question = if tests.is_empty() {
        format!("{task} Call it {name}.")
    } else {
        format!("{task} It must pass these tests:\n{}", tests.join("\n"))
    };
    Some((question, code))
}

/// `>>> f(x)` with its one-line result, as assertions.
fn doctests(doc: &str, name: &str) -> Vec<String> {
    let lines: Vec<&str> = doc.lines().map(str::trim).collect();
    lines
        .windows(2)
        .filter_map(|pair| {
            let call = pair[0].strip_prefix(">>> ")?;
            let result = pair[1];
            let simple = call.starts_with(name) && !result.starts_with(">>>") && !result.is_empty();
            simple.then(|| format!("assert {call} == {result}"))
        })
        .take(3)
        .collect()
}
