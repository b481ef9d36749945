//! More prompts for self-distillation than the corpus holds documents: the form of an evaluation
//! prompt, other content.
//!
//! Owns `prompts.json` of a drafter run. GSM8K's training questions with other numbers and names,
//! documented functions with made-up tests (synthetic), requests with one function offered
//! (`requests`), instructions as they are. Only prompts leave this file: answers are the target's.
//! Invariant: a prompt that shares 13 words in a row with an evaluation file, or whose first line
//! is one there, is dropped; a question dropped so has no variants either.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::maths::{self, Dice, TAIL};
use super::{Document, SYSTEM, Sources, chat, code, fingerprint, overlap, requests, tools};
use crate::data::mix;
use crate::error::{Error, Result, io};
use crate::files;

/// Variants of every GSM8K question, the unchanged one among them.
const VARIANTS: u64 = 6;
/// Exercises of the corpus's own templates that stay among the maths prompts.
const TEMPLATES: usize = 1500;
const INSTRUCTIONS: usize = 30_000;
const OLD_CALLS: usize = 4000;

/// Writes `prompts.json` and `manifest.json` into `out`.
pub fn build(sources: &Sources, out: &Path) -> Result<()> {
    let overlap = overlap::Overlap::read(&sources.exclude)?;
    let tokenizer = Tokenizer::from_file(&sources.tokenizer)
        .map_err(|e| Error::Invalid(format!("{}: {e}", sources.tokenizer.display())))?;
    let root = &sources.root;
    let instructions = take(chat::documents(root)?, INSTRUCTIONS);
    let mut all: Vec<(&str, String)> = Vec::new();
    all.extend(questions(root, &overlap)?.into_iter().map(|p| ("math", p)));
    let old = take(maths::documents(root)?, TEMPLATES);
    all.extend(old.into_iter().map(|p| ("math", p)));
    all.extend(functions(root)?.into_iter().map(|p| ("code", p)));
    let asked: Vec<String> = instructions.iter().map(|p| said(p)).collect();
    all.extend(
        requests::prompts(root, &asked)?
            .into_iter()
            .map(|p| ("tools", p)),
    );
    let calls = take(tools::documents(root)?, OLD_CALLS);
    all.extend(calls.into_iter().map(|p| ("tools", p)));
    all.extend(instructions.into_iter().map(|p| ("chat", p)));
    let mut seen = HashSet::new();
    let mut dropped: BTreeMap<&str, u64> = BTreeMap::new();
    all.retain(|(domain, prompt)| {
        let known = overlap.contains(&prompt.replace(TAIL, " ")) || overlap.repeats(&said(prompt));
        *dropped.entry(domain).or_default() += u64::from(known);
        !known && seen.insert(fingerprint(prompt))
    });
    write(&all, &tokenizer, &dropped, out)
}

/// Prompts of documents that have one, at most `limit`, in a fixed shuffle.
fn take(documents: Vec<Document>, limit: usize) -> Vec<String> {
    let mut list: Vec<String> = documents.into_iter().filter_map(|d| d.prompt).collect();
    list.sort_by_cached_key(|p| mix(fingerprint(p)));
    list.truncate(limit);
    list
}

/// What the user said in a prompt.
fn said(prompt: &str) -> String {
    let start = prompt.find("<|im_start|>user\n").map_or(0, |i| i + 17);
    let rest = &prompt[start..];
    rest.split("<|im_end|>").next().unwrap_or(rest).to_owned()
}

/// A prompt in chat form.
pub(super) fn ask(system: Option<&str>, user: &str) -> String {
    format!(
        "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        system.unwrap_or(SYSTEM)
    )
}

fn write(
    all: &[(&str, String)],
    tokenizer: &Tokenizer,
    dropped: &BTreeMap<&str, u64>,
    out: &Path,
) -> Result<()> {
    let mut list = Vec::new();
    let mut count: BTreeMap<&str, u64> = BTreeMap::new();
    for part in all.chunks(4000) {
        let texts: Vec<&str> = part.iter().map(|p| p.1.as_str()).collect();
        let encoded = tokenizer
            .encode_batch(texts, false)
            .map_err(|e| Error::Invalid(format!("tokenizer: {e}")))?;
        for ((domain, _), tokens) in part.iter().zip(encoded) {
            *count.entry(domain).or_default() += 1;
            list.push(json!({"domain": domain, "tokens": tokens.get_ids()}));
        }
    }
    let bytes = serde_json::to_vec(&list).map_err(|e| Error::Invalid(e.to_string()))?;
    files::write(&out.join("prompts.json"), &bytes)?;
    let about = json!({"prompts": count, "overlapping": dropped, "sha256": files::hash(&bytes)});
    eprintln!("{about}");
    files::write_json(&out.join("manifest.json"), &about)
}

/// GSM8K's training questions and variants of them; a question of the evaluation has none.
fn questions(root: &Path, overlap: &overlap::Overlap) -> Result<Vec<String>> {
    let path = root.join("gsm8k/train.jsonl");
    let text = std::fs::read_to_string(&path).map_err(io(&path))?;
    let list: Vec<String> = text
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok())
        .filter_map(|v| v["question"].as_str().map(str::to_owned))
        .filter(|q| !overlap.contains(q))
        .collect();
    let names: BTreeSet<&str> = list.iter().flat_map(|q| names(q)).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let mut out = Vec::new();
    for (i, question) in list.iter().enumerate() {
        for variant in 0..VARIANTS {
            let mut dice = Dice(mix((i as u64) << 8 | variant));
            let question = match variant {
                0 => question.clone(),
                _ => renamed(&renumbered(question, &mut dice), &names, &mut dice),
            };
            out.push(ask(None, &format!("{question}{TAIL}")));
        }
    }
    Ok(out)
}

/// Capitalised words after a word in lower case.
fn names(question: &str) -> Vec<&str> {
    let words: Vec<&str> = question.split(' ').collect();
    let plain = |w: &str| w.len() > 2 && w.chars().skip(1).all(|c| c.is_ascii_lowercase());
    words
        .windows(2)
        .filter(|w| w[0].ends_with(|c: char| c.is_ascii_lowercase()))
        .filter(|w| w[1].starts_with(|c: char| c.is_ascii_uppercase()) && plain(w[1]))
        .map(|w| w[1])
        .collect()
}

/// Every whole number above 1 becomes one of like size.
fn renumbered(question: &str, dice: &mut Dice) -> String {
    let mut out = String::new();
    let mut digits = String::new();
    for c in question.chars().chain([' ']) {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        match digits.parse::<u64>() {
            Ok(n) if (2..100_000_000).contains(&n) => {
                out += &dice.number(2.max(n / 2), 2 * n + 1).to_string();
            }
            _ => out += &digits,
        }
        digits.clear();
        out.push(c);
    }
    out.pop();
    out
}

/// Every name becomes another.
fn renamed(question: &str, names_known: &[&str], dice: &mut Dice) -> String {
    let mut out = question.to_owned();
    let found: BTreeSet<String> = names(question).into_iter().map(str::to_owned).collect();
    for name in found {
        out = out.replace(&name, dice.pick(names_known));
    }
    out
}

/// Documented functions as the corpus asks for them, and again with made-up tests.
fn functions(root: &Path) -> Result<Vec<String>> {
    let plain = take(code::documents(root)?, usize::MAX);
    let mut out = Vec::new();
    for (i, prompt) in plain.iter().enumerate() {
        let user = said(prompt);
        if let Some((task, name)) = user.split_once(" Call it ") {
            for variant in 0..2u64 {
                let mut dice = Dice(mix((i as u64) << 4 | variant));
                let tests = tests(name.trim_end_matches('.'), &mut dice);
                out.push(ask(
                    None,
                    &format!("{task} It must pass these tests:\n{tests}"),
                ));
            }
        }
        out.push(prompt.clone());
    }
    out.extend((0..9000).map(exercise));
    Ok(out)
}

const VERBS: [&str; 30] = [
    "find",
    "count",
    "remove",
    "check whether",
    "sort",
    "convert",
    "sum",
    "print",
    "return",
    "reverse",
    "split",
    "replace",
    "extract",
    "merge",
    "calculate",
    "get",
    "filter",
    "multiply",
    "compare",
    "find the index of",
    "find the maximum of",
    "find the minimum of",
    "concatenate",
    "rearrange",
    "find the average of",
    "join",
    "rotate",
    "validate",
    "swap",
    "group",
];
const KINDS: [&str; 28] = [
    "the first",
    "the last",
    "all",
    "the even",
    "the odd",
    "the largest",
    "the smallest",
    "the nth",
    "duplicate",
    "the unique",
    "the repeated",
    "the positive",
    "the negative",
    "the common",
    "the most frequent",
    "the missing",
    "the longest",
    "the shortest",
    "the prime",
    "adjacent",
    "the second smallest",
    "the kth",
    "consecutive",
    "the digits of",
    "the uppercase",
    "the sum of",
    "the product of",
    "the number of",
];
const PARTS: [&str; 24] = [
    "elements",
    "characters",
    "numbers",
    "words",
    "tuples",
    "items",
    "digits",
    "vowels",
    "spaces",
    "substrings",
    "pairs",
    "keys",
    "values",
    "sublists",
    "integers",
    "strings",
    "rows",
    "columns",
    "factors",
    "divisors",
    "bits",
    "occurrences",
    "letters",
    "subsequences",
];
const HOLDERS: [&str; 26] = [
    "in a list",
    "of a string",
    "in a given array",
    "from a given string",
    "in a tuple",
    "of two lists",
    "from a dictionary",
    "in a matrix",
    "of a given number",
    "in the given range",
    "using lambda function",
    "using regex",
    "in a list of lists",
    "from a list of tuples",
    "in a sorted array",
    "of a nested list",
    "between two numbers",
    "in a binary string",
    "by using a heap queue",
    "from two given arrays",
    "in a text",
    "of a triangle",
    "of a circle",
    "in a set",
    "of an integer",
    "in a sentence",
];

/// A task put together from parts, with made-up tests.
fn exercise(index: u64) -> String {
    let mut dice = Dice(mix(index ^ 0x636f_6465));
    let (verb, kind) = (dice.pick(&VERBS), dice.pick(&KINDS));
    let (part, holder) = (dice.pick(&PARTS), dice.pick(&HOLDERS));
    let python = dice.pick(&["", "python "]);
    let words = format!("{} {}", verb.replace("whether", ""), part);
    let mut name: Vec<&str> = words.split_whitespace().filter(|w| *w != "the").collect();
    if dice.number(0, 2) == 0 {
        name.truncate(1);
        name.push(dice.pick(&["Num", "list", "str", "Element", "tup", "nums", "Sum"]));
    }
    let tests = tests(&name.join("_"), &mut dice);
    ask(
        None,
        &format!(
            "Write a {python}function to {verb} {kind} {part} {holder}.\nWrite the function in Python. It must pass these tests:\n{tests}"
        ),
    )
}

/// Three assertions of one shape.
fn tests(name: &str, dice: &mut Dice) -> String {
    let count = dice.number(1, 3);
    let shape: Vec<u64> = (0..=count).map(|_| dice.number(0, 7)).collect();
    let lines: Vec<String> = (0..3)
        .map(|_| {
            let arguments: Vec<String> =
                shape[1..].iter().map(|&kind| literal(kind, dice)).collect();
            let result = literal(shape[0], dice);
            format!("assert {name}({}) == {result}", arguments.join(","))
        })
        .collect();
    lines.join("\n")
}

/// A Python literal of one of eight kinds.
fn literal(kind: u64, dice: &mut Dice) -> String {
    const WORDS: [&str; 16] = [
        "python",
        "hello",
        "abcda",
        "language",
        "a(b)c",
        "Program",
        "red",
        "green",
        "0011",
        "xyz",
        "The quick fox",
        "ab",
        "exercises",
        "AaBb",
        "list",
        "w3resource",
    ];
    let several = |dice: &mut Dice, open: char, close: char| {
        let count = dice.number(2, 6);
        let list: Vec<String> = (0..count).map(|_| dice.number(0, 40).to_string()).collect();
        format!("{open}{}{close}", list.join(", "))
    };
    match kind {
        0 | 1 => dice.number(0, 120).to_string(),
        2 => format!("\"{}\"", dice.pick(&WORDS)),
        3 => several(dice, '[', ']'),
        4 => several(dice, '(', ')'),
        5 => dice.pick(&["True", "False"]).to_owned(),
        6 => {
            let count = dice.number(2, 3);
            let list: Vec<String> = (0..count).map(|_| several(dice, '[', ']')).collect();
            format!("[{}]", list.join(", "))
        }
        _ => {
            let count = dice.number(2, 4);
            let list: Vec<String> = (0..count)
                .map(|_| format!("'{}'", dice.pick(&WORDS)))
                .collect();
            format!("[{}]", list.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_change_numbers_and_names_and_nothing_else() {
        let question = "She sold 48 clips and gave Ben 1 of them.";
        let changed = renumbered(question, &mut Dice(3));
        assert!(!changed.contains("48") && changed.contains(" 1 of them."));
        let changed = renamed(question, &["Olga"], &mut Dice(3));
        assert_eq!(changed, "She sold 48 clips and gave Olga 1 of them.");
    }

    #[test]
    fn the_users_words_come_back_out_of_a_prompt() {
        assert_eq!(said(&ask(None, "add 2 and 3")), "add 2 and 3");
    }
}
