//! Requests with one function offered, in the form function-calling evaluations use: parameters of
//! type `dict`, `required` before `properties`, defaults and enumerations.
//!
//! Functions come from three sources: services of the schema-guided dialogues with the values seen in
//! their calls, Python functions with documented parameters, and nothing made up but values
//! (synthetic). Only prompts; the answer is the target's own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::maths::Dice;
use super::prompts::ask;
use super::{tools, wheel_files};
use crate::data::mix;
use crate::error::Result;

const DOCUMENTED_MAX: usize = 12_000;

/// One function on offer, and what its parameters may be.
struct Offer {
    name: String,
    about: String,
    properties: Map<String, Value>,
    required: Vec<String>,
}

/// All prompts; `instructions` are other requests, which the function on offer may not fit.
pub(super) fn prompts(root: &Path, instructions: &[String]) -> Result<Vec<String>> {
    let dialogues = tools::dialogues(root)?;
    let mut out = from_dialogues(&dialogues);
    let offers = documented(root)?;
    for (i, offer) in offers.iter().enumerate() {
        let mut dice = Dice(mix(i as u64 ^ 0x7265_7175));
        let user = match dice.number(0, 9) {
            0..=6 => wish(offer, &mut dice),
            7 if !instructions.is_empty() => {
                let place = dice.number(0, instructions.len() as u64 - 1);
                instructions[place as usize].chars().take(240).collect()
            }
            _ => question(&mut dice),
        };
        out.push(prompt(offer, &user));
    }
    Ok(out)
}

/// The prompt that offers one function.
fn prompt(offer: &Offer, user: &str) -> String {
    let tool = json!({"type": "function", "function": {"name": offer.name,
        "description": offer.about, "parameters": {"type": "dict",
        "required": offer.required, "properties": offer.properties}}});
    ask(Some(&tools::system(&[tool])), user)
}

/// What a user says who wants the function.
fn wish(offer: &Offer, dice: &mut Dice) -> String {
    let sentence = offer.about.trim_end_matches('.');
    let mut chars = sentence.chars();
    let first: String = chars
        .next()
        .map_or(String::new(), |c| c.to_lowercase().collect());
    let task = format!("{first}{}", chars.as_str());
    let mut said = Vec::new();
    for (name, property) in &offer.properties {
        if offer.required.contains(name) || dice.number(0, 3) == 0 {
            said.push(format!(
                "{} {}",
                name.replace('_', " "),
                value(property, dice)
            ));
        }
    }
    let with = match said.is_empty() {
        true => String::new(),
        false => format!(" with {}", said.join(" and ")),
    };
    match dice.number(0, 7) {
        0 => format!("Can you {task}{with}?"),
        1 => format!("I want to {task}{with}."),
        2 => format!("{sentence}{with}"),
        3 => format!("Could you please {task}{with}?"),
        4 => format!("Help me {task}{with}"),
        5 => format!("I have {}. {sentence}.", said.join(", ")),
        6 => format!("Please {task}."),
        _ => format!("I need to {task}{with}, how do I do that?"),
    }
}

/// A question that no function on offer need fit.
fn question(dice: &mut Dice) -> String {
    let (a, b) = (dice.number(2, 900), dice.number(2, 90));
    let place = dice.pick(&PLACES);
    match dice.number(0, 7) {
        0 => format!("What is the sum of {a} and {b}?"),
        1 => format!("What's the weather like in {place}?"),
        2 => format!("Calculate {a} times {b}"),
        3 => format!(
            "Can you find me a restaurant in {place} for {} people?",
            b % 9 + 1
        ),
        4 => format!("How far is {place} from {}?", dice.pick(&PLACES)),
        5 => format!("Book a flight to {place} on 2024-0{}-1{}", a % 9 + 1, b % 9),
        6 => format!("what is {a} divided by {b}"),
        _ => format!("Tell me about {place}."),
    }
}

const PLACES: [&str; 16] = [
    "Berlin",
    "Boston, MA",
    "Tokyo",
    "Chicago",
    "Paris, France",
    "Seattle",
    "Nairobi",
    "Lima",
    "Toronto",
    "San Jose",
    "Mumbai",
    "Oslo",
    "Las Vegas",
    "Hanoi",
    "Portland, OR",
    "Madrid",
];

fn value(property: &Value, dice: &mut Dice) -> String {
    const WORDS: [&str; 12] = [
        "report.txt",
        "anna",
        "project-x",
        "2024-05-17",
        "sales",
        "blue",
        "/home/user/data",
        "main",
        "New York",
        "summer",
        "user_42",
        "draft",
    ];
    if let Some(list) = property["enum"].as_array().filter(|l| !l.is_empty()) {
        let place = dice.number(0, list.len() as u64 - 1) as usize;
        return list[place].as_str().unwrap_or("").to_owned();
    }
    match property["type"].as_str() {
        Some("integer") => dice.number(0, 120).to_string(),
        Some("float") => format!("{}.{}", dice.number(0, 50), dice.number(0, 99)),
        Some("boolean") => dice.pick(&["true", "false"]).to_owned(),
        Some("array") => format!("[{}, {}]", dice.number(0, 20), dice.number(0, 20)),
        _ if dice.number(0, 1) == 0 => dice.pick(&PLACES).to_owned(),
        _ => dice.pick(&WORDS).to_owned(),
    }
}

/// Values seen for each parameter of each method.
type Seen = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// Calls of the dialogues: what was said before, the method as the only function.
fn from_dialogues(dialogues: &[Value]) -> Vec<String> {
    let mut seen = Seen::new();
    for dialogue in dialogues {
        for (_, service, call) in tools::each_call(dialogue) {
            let known = seen.entry(method(service, call)).or_default();
            for (name, value) in call["parameters"].as_object().into_iter().flatten() {
                let text = value.as_str().unwrap_or("").to_owned();
                known.entry(name.clone()).or_default().insert(text);
            }
        }
    }
    let mut out = Vec::new();
    for (i, dialogue) in dialogues.iter().enumerate() {
        let turns = dialogue["turns"].as_array().map_or(&[][..], Vec::as_slice);
        for (at, service, call) in tools::each_call(dialogue).into_iter().take(2) {
            let mut dice = Dice(mix((i as u64) << 8 | at as u64));
            let said: Vec<&str> = turns[..at]
                .iter()
                .filter(|t| t["speaker"] == "USER")
                .filter_map(|t| t["utterance"].as_str())
                .collect();
            let from = said.len().saturating_sub(dice.number(1, 3) as usize);
            let first = dice.number(0, 1) == 0;
            let words = if first {
                &said[..said.len().min(1)]
            } else {
                &said[from..]
            };
            let name = method(service, call);
            out.push(prompt(
                &service_offer(&name, call, &seen[&name], &mut dice),
                &words.join(" "),
            ));
        }
    }
    out
}

fn method(service: &str, call: &Value) -> String {
    format!("{service}_{}", call["method"].as_str().unwrap_or(""))
}

fn service_offer(
    name: &str,
    call: &Value,
    seen: &BTreeMap<String, BTreeSet<String>>,
    dice: &mut Dice,
) -> Offer {
    let task = tools::spaced(call["method"].as_str().unwrap_or(""));
    let service = name.split('_').next().unwrap_or("").to_lowercase();
    let mut properties = Map::new();
    let mut required = Vec::new();
    for (parameter, values) in seen {
        let words = parameter.replace('_', " ");
        let mut property = json!({"type": "string", "description": match dice.number(0, 3) {
            0 => format!("The {words} of the {service}."),
            1 => format!("The {words} for the request, such as '{}'.", values.first().map_or("", String::as_str)),
            2 => format!("{words} to use."),
            _ => format!("The {words} that the user asks for. Use 'dontcare' if it is not specified."),
        }});
        if values.len() <= 12 {
            property["enum"] = json!(values);
        }
        if call["parameters"][parameter].is_null() || dice.number(0, 3) == 0 {
            property["default"] = json!("dontcare");
        } else {
            required.push(parameter.clone());
        }
        properties.insert(parameter.clone(), property);
    }
    let about = match dice.number(0, 3) {
        0 => format!("This function is used to {task} with the {service} service."),
        1 => format!(
            "{task} based on the user's wishes.",
            task = sentence_case(&task)
        ),
        2 => format!("{} by the given parameters.", sentence_case(&task)),
        _ => format!("{} in the {service} service.", sentence_case(&task)),
    };
    Offer {
        name: name.to_owned(),
        about,
        properties,
        required,
    }
}

fn sentence_case(text: &str) -> String {
    let mut chars = text.chars();
    let first: String = chars
        .next()
        .map_or(String::new(), |c| c.to_uppercase().collect());
    first + chars.as_str()
}

/// Python functions whose docstring lists parameters in NumPy's form.
fn documented(root: &Path) -> Result<Vec<Offer>> {
    let mut out = Vec::new();
    for (path, text) in wheel_files(root, &[".py"])? {
        let module = path
            .rsplit('/')
            .next()
            .unwrap_or("")
            .trim_end_matches(".py");
        let mut rest = text.as_str();
        while let Some(start) = rest.find("def ") {
            rest = &rest[start + 4..];
            out.extend(offer(rest, module));
        }
    }
    out.sort_by_cached_key(|o| mix(super::fingerprint(&format!("{} {}", o.name, o.about))));
    out.truncate(DOCUMENTED_MAX);
    Ok(out)
}

/// The function whose text begins after `def `.
fn offer(text: &str, module: &str) -> Option<Offer> {
    let name: &str = text
        .split('(')
        .next()
        .filter(|n| n.len() < 50 && !n.starts_with('_'))?;
    let open = text.find("\"\"\"").filter(|&at| at < 900)?;
    let body = &text[open + 3..];
    let doc = &body[..body.find("\"\"\"")?];
    let listed = doc.find("Parameters\n")?;
    let first = doc.trim().split("\n\n").next()?;
    let first = first.split_whitespace().collect::<Vec<_>>().join(" ");
    let about = tools::first_sentence(&first).filter(|a| a.is_ascii())?;
    let lines: Vec<&str> = doc[listed..].lines().skip(2).collect();
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for pair in lines.windows(2) {
        if pair[0].trim().is_empty() && pair[1].trim_start().starts_with("Returns") {
            break;
        }
        let Some((parameter, kind)) = pair[0].trim().split_once(" : ") else {
            continue;
        };
        if !parameter
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_')
        {
            continue;
        }
        if !(kind.contains("optional") || kind.contains("default")) {
            required.push(parameter.to_owned());
        }
        properties.insert(parameter.to_owned(), property(kind, pair[1].trim()));
        if properties.len() == 5 {
            break;
        }
    }
    let dotted = super::fingerprint(name).is_multiple_of(3);
    let name = if dotted {
        format!("{module}.{name}")
    } else {
        name.to_owned()
    };
    (!properties.is_empty()).then_some(Offer {
        name,
        about,
        properties,
        required,
    })
}

/// The schema of a parameter from its NumPy line and the line below.
fn property(kind: &str, below: &str) -> Value {
    let list: Vec<&str> = kind
        .split('}')
        .next()
        .unwrap_or(kind)
        .split(['\'', '"'])
        .skip(1)
        .step_by(2)
        .filter(|w| w.len() < 20)
        .take(6)
        .collect();
    let named = [
        ("int", "integer"),
        ("float", "float"),
        ("bool", "boolean"),
        ("arr", "array"),
        ("list", "array"),
        ("seq", "array"),
        ("dict", "dict"),
    ];
    let found = named.iter().find(|n| kind.to_lowercase().contains(n.0));
    let name = if list.len() > 1 {
        "string"
    } else {
        found.map_or("string", |n| n.1)
    };
    let mut out = json!({"type": name, "description": below});
    if list.len() > 1 {
        out["enum"] = json!(list);
    }
    if let Some((_, default)) = kind.split_once("default") {
        let value = default.trim_matches([':', '=', ' ', '\'', '"', '.', ')']);
        out["default"] = json!(value.split([',', ';']).next().unwrap_or(value));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_documented_function_becomes_an_offer() {
        let text = "scale(x, mode='a'):\n    \"\"\"Scale all values of a table.\n\n    Parameters\n    ----------\n    x : int\n        How far.\n    mode : {'a', 'b'}, default 'a'\n        Which way.\n\n    Returns\n    -------\n    int\n    \"\"\"\n";
        let offer = offer(text, "tables").expect("it has parameters");
        assert_eq!(offer.about, "Scale all values of a table.");
        assert_eq!(offer.required, ["x"]);
        assert_eq!(offer.properties["x"]["type"], "integer");
        assert_eq!(offer.properties["mode"]["enum"], json!(["a", "b"]));
        assert_eq!(offer.properties["mode"]["default"], "a");
    }
}
