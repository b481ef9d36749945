//! 13 words in a row that occur in evaluation text: the usual test of contamination.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use serde_json::Value;

use crate::error::{Result, io};

const WORDS: usize = 13;
/// A run in this many evaluation items is an instruction that they share, not their content.
const BOILERPLATE: u32 = 20;

/// Hashes of all runs of 13 words of the evaluation files.
#[derive(Debug)]
pub(super) struct Overlap {
    runs: HashSet<u64>,
    /// Whole texts and their first lines, of four words at least.
    whole: HashSet<u64>,
}

impl Overlap {
    /// Reads JSON-lines files; every string in them counts.
    pub(super) fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut items: HashMap<u64, u32> = HashMap::new();
        let mut whole = HashSet::new();
        for path in paths {
            let text = std::fs::read_to_string(path).map_err(io(path))?;
            for line in text.lines() {
                let value: Value = serde_json::from_str(line).unwrap_or(Value::String(line.into()));
                let mut runs = HashSet::new();
                strings(&value, &mut |s| {
                    runs.extend(hashes(s));
                    whole.extend([s, first_line(s)].into_iter().filter_map(words));
                });
                for run in runs {
                    *items.entry(run).or_default() += 1;
                }
            }
        }
        let runs = items
            .into_iter()
            .filter(|x| x.1 < BOILERPLATE)
            .map(|x| x.0)
            .collect();
        Ok(Self { runs, whole })
    }

    /// True when `text` or its first line is a whole text of an evaluation file, however short.
    pub(super) fn repeats(&self, text: &str) -> bool {
        [text, first_line(text)]
            .into_iter()
            .filter_map(words)
            .any(|w| self.whole.contains(&w))
    }

    /// True when `text` shares a run with an evaluation file.
    pub(super) fn contains(&self, text: &str) -> bool {
        !self.runs.is_empty() && hashes(text).any(|h| self.runs.contains(&h))
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or("")
}

/// Hash of all words of a text that has four or more.
fn words(text: &str) -> Option<u64> {
    let all = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty());
    let text = all.collect::<Vec<_>>().join(" ").to_lowercase();
    (text.split(' ').count() >= 4).then(|| super::fingerprint(&text))
}

fn strings(value: &Value, each: &mut impl FnMut(&str)) {
    match value {
        Value::String(s) => each(s),
        Value::Array(list) => list.iter().for_each(|v| strings(v, each)),
        Value::Object(map) => map.values().for_each(|v| strings(v, each)),
        _ => {}
    }
}

/// Hash of every run of 13 words: lower case, letters and digits only.
fn hashes(text: &str) -> impl Iterator<Item = u64> {
    let words: Vec<u64> = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty())
        .map(|w| {
            w.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
                (h ^ u64::from(b.to_ascii_lowercase())).wrapping_mul(0x100_0000_01b3)
            })
        })
        .collect();
    (WORDS..=words.len()).map(move |end| {
        words[end - WORDS..end]
            .iter()
            .fold(7, |h, &w| crate::data::mix(h ^ w))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_thirteen_words_is_found_whatever_its_punctuation() {
        let words: Vec<String> = (0..20).map(|i| format!("word{i}")).collect();
        let overlap = Overlap {
            runs: hashes(&words.join(" ")).collect(),
            whole: HashSet::new(),
        };
        assert!(overlap.contains(&words[3..16].join(", ").to_uppercase()));
        assert!(!overlap.contains(&words[3..15].join(" ")));
    }
}
