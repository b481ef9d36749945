//! Word problems: GSM8K's training set without its calculator marks, and generated ones (synthetic).

use std::path::Path;

use serde_json::Value;

use super::{Document, conversation};
use crate::data::mix;
use crate::error::{Result, io};

/// What every question asks for; evaluation asks the same.
pub(super) const TAIL: &str =
    "\nReason step by step, then give the answer on the last line as: #### number";
const GENERATED: u64 = 60_000;

/// Read and generated problems.
pub(super) fn documents(root: &Path) -> Result<Vec<Document>> {
    let path = root.join("gsm8k/train.jsonl");
    let text = std::fs::read_to_string(&path).map_err(io(&path))?;
    let mut out = Vec::new();
    for line in text.lines() {
        let Ok(item) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let (Some(question), Some(answer)) = (item["question"].as_str(), item["answer"].as_str())
        else {
            continue;
        };
        let answer = without_marks(answer);
        out.push(conversation(
            "math",
            None,
            &format!("{question}{TAIL}"),
            &answer,
        ));
    }
    out.extend((0..GENERATED).map(generated));
    Ok(out)
}

/// Drops `<<48/2=24>>`.
fn without_marks(answer: &str) -> String {
    let mut out = String::new();
    let mut rest = answer;
    while let Some(start) = rest.find("<<") {
        out.push_str(&rest[..start]);
        rest = match rest[start..].find(">>") {
            Some(end) => &rest[start + end + 2..],
            None => "",
        };
    }
    out + rest
}

struct Dice(u64);

impl Dice {
    fn number(&mut self, from: u64, to: u64) -> u64 {
        self.0 = mix(self.0);
        from + self.0 % (to - from + 1)
    }
    fn pick<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[self.number(0, list.len() as u64 - 1) as usize]
    }
}

const NAMES: [&str; 16] = [
    "Ava", "Ben", "Carla", "David", "Elena", "Frank", "Grace", "Hugo", "Iris", "Jack", "Kira",
    "Liam", "Maya", "Noah", "Olga", "Peter",
];
const THINGS: [&str; 12] = [
    "apples", "books", "pencils", "marbles", "stickers", "cookies", "coins", "flowers", "shells",
    "cards", "tickets", "oranges",
];
const PLACES: [&str; 6] = [
    "a shop",
    "the market",
    "a bakery",
    "the library",
    "a farm",
    "school",
];

/// One problem of eight patterns.
fn generated(index: u64) -> Document {
    let mut dice = Dice(mix(index ^ 0x6d61_7468));
    let (name, other) = (dice.pick(&NAMES), dice.pick(&NAMES));
    let (thing, place) = (dice.pick(&THINGS), dice.pick(&PLACES));
    let (a, b, c) = (dice.number(3, 60), dice.number(2, 40), dice.number(2, 12));
    let (question, steps, result) = match index % 8 {
        0 => (
            format!(
                "{name} has {a} {thing}. {other} gives {name} {b} more {thing}. Then {name} buys {c} {thing} at {place}. How many {thing} does {name} have now?"
            ),
            format!(
                "After the gift, {name} has {a} + {b} = {} {thing}.\nAfter buying {c} more, {name} has {} + {c} = {} {thing}.",
                a + b,
                a + b,
                a + b + c
            ),
            a + b + c,
        ),
        1 => (
            format!(
                "Each box at {place} holds {a} {thing}. {name} buys {c} boxes and gives {b} {thing} to {other}. How many {thing} are left?"
            ),
            format!(
                "{name} buys {c} x {a} = {} {thing}.\nAfter giving away {b}, there are {} - {b} = {} left.",
                a * c,
                a * c,
                (a * c).saturating_sub(b)
            ),
            (a * c).saturating_sub(b),
        ),
        2 => (
            format!(
                "{name} earns ${a} an hour and works {c} hours a day. How much does {name} earn in {b} days?"
            ),
            format!(
                "In one day, {name} earns {a} x {c} = ${}.\nIn {b} days, that is {} x {b} = ${}.",
                a * c,
                a * c,
                a * c * b
            ),
            a * c * b,
        ),
        3 => (
            format!(
                "{name} shares {} {thing} equally among {c} friends. How many {thing} does each friend get?",
                a * c
            ),
            format!("Each friend gets {} / {c} = {a} {thing}.", a * c),
            a,
        ),
        4 => (
            format!(
                "{other} has {a} {thing}. {name} has {c} times as many. How many {thing} do they have together?"
            ),
            format!(
                "{name} has {a} x {c} = {} {thing}.\nTogether they have {a} + {} = {} {thing}.",
                a * c,
                a * c,
                a + a * c
            ),
            a + a * c,
        ),
        5 => (
            format!(
                "A ticket to {place} costs ${a} for an adult and ${b} for a child. What do {c} adults and 2 children pay?"
            ),
            format!(
                "The adults pay {c} x {a} = ${}.\nThe children pay 2 x {b} = ${}.\nTogether they pay {} + {} = ${}.",
                a * c,
                2 * b,
                a * c,
                2 * b,
                a * c + 2 * b
            ),
            a * c + 2 * b,
        ),
        6 => (
            format!(
                "{name} reads {a} pages a day for {c} days. The book has {} pages. How many pages are left?",
                a * c + b
            ),
            format!(
                "{name} reads {a} x {c} = {} pages.\nThere are {} - {} = {b} pages left.",
                a * c,
                a * c + b,
                a * c
            ),
            b,
        ),
        _ => (
            format!(
                "{name} had {} {thing}. Half of them were sold at {place}, and then {b} more were given to {other}. How many {thing} remain?",
                2 * (a + b)
            ),
            format!(
                "Half of {} is {}.\nAfter giving away {b}, {} - {b} = {a} {thing} remain.",
                2 * (a + b),
                a + b,
                a + b
            ),
            a,
        ),
    };
    let answer = format!("{steps}\n#### {result}");
    conversation("math", None, &format!("{question}{TAIL}"), &answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calculator_marks_are_dropped() {
        assert_eq!(
            without_marks("2+3 = <<2+3=5>>5 and <<1+1=2>>2"),
            "2+3 = 5 and 2"
        );
    }
}
