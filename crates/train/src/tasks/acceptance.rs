//! Acceptance length by domain, per position, through the real engine: what a running `kilotok serve` says of each step.
//!
//! A step that drafted nothing (the first after a prompt, or one that `auto` left out) does not count. Greedy,
//! or sampled with a seed of its own a prompt.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{call, read, server};
use crate::error::{Error, Result};
use crate::files;

/// What to ask, whom, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `HOST:PORT` of the server.
    pub server: String,
    /// Name under which it serves the model.
    pub model: String,
    /// JSON-lines files of prompts; a file's name is its domain's.
    pub prompts: Vec<PathBuf>,
    /// Prompts a file.
    pub count: usize,
    /// Every n-th prompt of a file.
    pub every: usize,
    /// Tokens an answer at most.
    pub tokens_max: usize,
    /// 0: greedy.
    pub temperature: f64,
    /// Probability mass that sampling draws from.
    pub top_p: f64,
}

/// What the steps of one domain kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kept {
    /// Steps that verified drafts.
    pub steps: u64,
    /// Drafts accepted in all of them.
    pub accepted: u64,
    /// Steps that kept at least position 1, 2, ...
    pub positions: Vec<u64>,
}

impl Kept {
    /// Counts a step of `drafted` tokens of which `accepted` were kept.
    pub fn step(&mut self, drafted: u64, accepted: u64) {
        if drafted == 0 {
            return;
        }
        self.steps += 1;
        self.accepted += accepted;
        let accepted = accepted as usize;
        self.positions.resize(self.positions.len().max(accepted), 0);
        self.positions[..accepted].iter_mut().for_each(|p| *p += 1);
    }

    /// Tokens a step, the target's own included; 0 without steps.
    #[must_use]
    pub fn length(&self) -> f64 {
        match self.steps {
            0 => 0.0,
            steps => 1.0 + self.accepted as f64 / steps as f64,
        }
    }

    fn report(&self, prompts: usize) -> Value {
        let share = |p: &u64| (*p as f64 / self.steps.max(1) as f64 * 1e3).round() / 1e3;
        json!({"prompts": prompts, "steps": self.steps, "length": (self.length() * 1e3).round() / 1e3,
            "positions": self.positions.iter().map(share).collect::<Vec<_>>()})
    }
}

/// Asks every prompt; `acceptance.jsonl` in `out` gets each answer's steps, the result is each domain's mean.
pub fn run(settings: &Settings, out: &Path) -> Result<Value> {
    let (mut log, mut domains) = (String::new(), json!({}));
    for path in &settings.prompts {
        let domain = path.file_stem().unwrap_or_default().to_string_lossy();
        let items = read(path, settings.count.saturating_mul(settings.every.max(1)))?;
        let (mut kept, mut asked) = (Kept::default(), 0);
        for item in items
            .iter()
            .step_by(settings.every.max(1))
            .take(settings.count)
        {
            let metrics = server::ask(&settings.server, &request(settings, item, asked))?.metrics;
            let (drafted, accepted) = steps(&metrics)?;
            drafted
                .iter()
                .zip(&accepted)
                .for_each(|(d, a)| kept.step(*d, *a));
            asked += 1;
            let line = json!({"id": item["id"], "domain": domain, "drafted": drafted, "accepted": accepted});
            let _ = writeln!(log, "{line}");
        }
        domains[&*domain] = kept.report(asked);
        println!("{domain}: {}", domains[&*domain]);
    }
    files::write(&out.join("acceptance.jsonl"), log.as_bytes())?;
    files::write_json(&out.join("acceptance.json"), &domains)?;
    Ok(domains)
}

fn request(settings: &Settings, item: &Value, seed: usize) -> Value {
    let mut body = json!({"model": settings.model, "messages": item["messages"], "max_tokens": settings.tokens_max,
        "temperature": settings.temperature, "top_p": settings.top_p, "seed": seed,
        "per_request_spec_decode_metrics": "detailed"});
    if let Some(tools) = item["tools"].as_array() {
        body["tools"] = tools.iter().map(call::tool).collect();
    }
    body
}

/// Drafted and accepted tokens of each step of an answer.
fn steps(metrics: &Value) -> Result<(Vec<u64>, Vec<u64>)> {
    let list = |key: &str| {
        let spec = &metrics["speculative_decoding"][key];
        let numbers = spec
            .as_array()
            .map(|list| list.iter().filter_map(Value::as_u64).collect());
        numbers.ok_or_else(|| {
            Error::Invalid(format!(
                "server: expected {key} in the metrics of an answer, found none: it has to be `kilotok serve` with a drafter"
            ))
        })
    };
    Ok((list("per_step_drafted")?, list("per_step_accepted")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_drafting_steps_only() {
        let metrics = json!({"speculative_decoding": {"per_step_drafted": [0, 7, 7, 3], "per_step_accepted": [0, 7, 0, 2]}});
        let (drafted, accepted) = steps(&metrics).unwrap();
        let mut kept = Kept::default();
        drafted
            .iter()
            .zip(&accepted)
            .for_each(|(d, a)| kept.step(*d, *a));
        assert_eq!((kept.steps, kept.length()), (3, 4.0));
        assert_eq!(kept.positions, [2, 2, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn an_answer_without_metrics_is_an_error_that_names_them() {
        let error = steps(&json!({})).unwrap_err().to_string();
        assert!(error.contains("per_step_drafted"), "{error}");
    }
}
