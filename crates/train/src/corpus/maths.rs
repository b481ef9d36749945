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

/// Draws by hash: the same seed, the same problem.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn number(&mut self, from: u64, to: u64) -> u64 {
        self.0 = mix(self.0);
        from + self.0 % (to - from + 1)
    }
    pub(super) fn pick<'a>(&mut self, list: &[&'a str]) -> &'a str {
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

/// Who, what, where, and the numbers of a problem.
struct Story {
    name: &'static str,
    other: &'static str,
    thing: &'static str,
    place: &'static str,
    a: u64,
    b: u64,
    c: u64,
}

/// Question, steps of the solution, result.
type Problem = (String, String, u64);

/// One problem of eight patterns.
fn generated(index: u64) -> Document {
    let mut dice = Dice(mix(index ^ 0x6d61_7468));
    let (name, other) = (dice.pick(&NAMES), dice.pick(&NAMES));
    let (thing, place) = (dice.pick(&THINGS), dice.pick(&PLACES));
    let story = Story {
        name,
        other,
        thing,
        place,
        a: dice.number(3, 60),
        b: dice.number(2, 40),
        c: dice.number(2, 12),
    };
    let first = index.is_multiple_of(2);
    let (question, steps, result) = match index % 8 / 2 {
        0 => sharing(&story, first),
        1 => earning(&story, first),
        2 => comparing(&story, first),
        _ => remaining(&story, first),
    };
    let answer = format!("{steps}\n#### {result}");
    conversation("math", None, &format!("{question}{TAIL}"), &answer)
}

/// Gifts and boxes.
fn sharing(story: &Story, first: bool) -> Problem {
    let &Story {
        name,
        other,
        thing,
        place,
        a,
        b,
        c,
    } = story;
    match first {
        true => (
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
        false => (
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
    }
}

/// Wages and equal shares.
fn earning(story: &Story, first: bool) -> Problem {
    let &Story {
        name,
        thing,
        a,
        b,
        c,
        ..
    } = story;
    let (day, all) = (a * c, a * c * b);
    match first {
        true => (
            format!(
                "{name} earns ${a} an hour and works {c} hours a day. How much does {name} earn in {b} days?"
            ),
            format!(
                "In one day, {name} earns {a} x {c} = ${day}.\nIn {b} days, that is {day} x {b} = ${all}."
            ),
            all,
        ),
        false => (
            format!(
                "{name} shares {} {thing} equally among {c} friends. How many {thing} does each friend get?",
                a * c
            ),
            format!("Each friend gets {} / {c} = {a} {thing}.", a * c),
            a,
        ),
    }
}

/// Multiples and tickets.
fn comparing(story: &Story, first: bool) -> Problem {
    let Story { name, other, .. } = story;
    let &Story { thing, place, .. } = story;
    let &Story { a, b, c, .. } = story;
    let (times, twice) = (a * c, 2 * b);
    if first {
        let all = a + times;
        return (
            format!(
                "{other} has {a} {thing}. {name} has {c} times as many. How many {thing} do they have together?"
            ),
            format!(
                "{name} has {a} x {c} = {times} {thing}.\nTogether they have {a} + {times} = {all} {thing}."
            ),
            all,
        );
    }
    let all = times + twice;
    (
        format!(
            "A ticket to {place} costs ${a} for an adult and ${b} for a child. What do {c} adults and 2 children pay?"
        ),
        format!(
            "The adults pay {c} x {a} = ${times}.\nThe children pay 2 x {b} = ${twice}.\nTogether they pay {times} + {twice} = ${all}."
        ),
        all,
    )
}

/// Pages and sales.
fn remaining(story: &Story, first: bool) -> Problem {
    let Story { name, other, .. } = story;
    let &Story { thing, place, .. } = story;
    let &Story { a, b, c, .. } = story;
    if first {
        let (read, pages) = (a * c, a * c + b);
        return (
            format!(
                "{name} reads {a} pages a day for {c} days. The book has {pages} pages. How many pages are left?"
            ),
            format!(
                "{name} reads {a} x {c} = {read} pages.\nThere are {pages} - {read} = {b} pages left."
            ),
            b,
        );
    }
    let (half, all) = (a + b, 2 * (a + b));
    (
        format!(
            "{name} had {all} {thing}. Half of them were sold at {place}, and then {b} more were given to {other}. How many {thing} remain?"
        ),
        format!(
            "Half of {all} is {half}.\nAfter giving away {b}, {half} - {b} = {a} {thing} remain."
        ),
        a,
    )
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
