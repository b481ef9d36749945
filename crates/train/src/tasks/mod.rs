//! Task scores where an answer can be checked (MBPP tests, GSM8K numbers, BFCL calls), and acceptance length.
//!
//! Owns the check of an answer; the answers come from a running `kilotok serve`, greedy. What a model
//! writes runs in a process with limits only (`code`). Every answer is kept beside its verdict.

pub mod acceptance;
pub mod call;
pub mod code;
pub mod number;
pub mod server;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::files;
use server::Answer;

/// What to ask, whom, and how much.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `HOST:PORT` of the server.
    pub server: String,
    /// Name under which it serves the model.
    pub model: String,
    /// Directory of `coding.jsonl`, `math.jsonl` and `agent.jsonl`.
    pub prompts: PathBuf,
    /// Prompts a domain.
    pub count: usize,
    /// Tokens an answer at most.
    pub tokens_max: usize,
    /// Python that runs the tests.
    pub python: String,
}

/// A domain and its check: `Ok` when the answer is right, else why not.
type Check = fn(&Settings, &Value, &Answer) -> Result<std::result::Result<(), String>>;

const DOMAINS: [(&str, Check); 3] = [
    ("coding", |settings, item, answer| {
        code::check(&settings.python, item, &answer.text)
    }),
    ("math", |_, item, answer| {
        Ok(number::check(item, &answer.text))
    }),
    ("agent", |_, item, answer| {
        Ok(call::check(item, &answer.calls))
    }),
];

/// Asks and checks; `tasks.jsonl` in `out` gets every answer, the result is the score of each domain.
pub fn run(settings: &Settings, out: &Path) -> Result<Value> {
    code::probe(&settings.python)?;
    let (mut log, mut scores) = (String::new(), json!({}));
    for (domain, check) in DOMAINS {
        let items = read(
            &settings.prompts.join(format!("{domain}.jsonl")),
            settings.count,
        )?;
        let (mut right, mut cut) = (0, 0);
        for item in &items {
            let answer = server::ask(&settings.server, &request(settings, item))?;
            let verdict = check(settings, item, &answer)?;
            right += usize::from(verdict.is_ok());
            cut += usize::from(answer.finish == "length");
            let line = json!({"id": item["id"], "domain": domain, "right": verdict.is_ok(),
                "why": verdict.err(), "text": answer.text, "calls": answer.calls, "finish": answer.finish});
            let _ = writeln!(log, "{line}");
        }
        println!("{domain}: {right} of {}", items.len());
        scores[domain] = json!({"right": right, "asked": items.len(), "cut": cut});
    }
    files::write(&out.join("tasks.jsonl"), log.as_bytes())?;
    files::write_json(&out.join("tasks.json"), &scores)?;
    Ok(scores)
}

/// The first `count` items of a JSON-lines file.
fn read(path: &Path, count: usize) -> Result<Vec<Value>> {
    let text = String::from_utf8_lossy(&files::read(path)?).into_owned();
    text.lines()
        .take(count)
        .enumerate()
        .map(|(at, line)| {
            serde_json::from_str(line).map_err(|e| Error::Config {
                path: path.to_owned(),
                what: format!("line {}: {e}", at + 1),
            })
        })
        .collect()
}

/// The body of a chat completion: greedy.
fn request(settings: &Settings, item: &Value) -> Value {
    let mut body = json!({"model": settings.model, "messages": item["messages"], "temperature": 0, "max_tokens": settings.tokens_max});
    if let Some(tools) = item["tools"].as_array() {
        body["tools"] = tools.iter().map(call::tool).collect();
    }
    body
}
