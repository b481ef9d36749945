//! Function calls: the schema-guided dialogues (a request, the service's methods, the call), and the
//! typed methods of Google's discovery documents with made-up argument values (synthetic).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Document, conversation, wheel_files};
use crate::data::mix;
use crate::error::{Result, io};

/// Dialogues as calls, whole dialogues, and generated requests.
pub(super) fn documents(root: &Path) -> Result<Vec<Document>> {
    let dialogues = dialogues(root)?;
    let methods = methods(&dialogues);
    let mut out = Vec::new();
    for dialogue in &dialogues {
        out.extend(calls(dialogue, &methods));
        out.push(transcript(dialogue));
    }
    out.extend(discovered(root)?);
    Ok(out)
}

pub(super) fn dialogues(root: &Path) -> Result<Vec<Value>> {
    let directory = root.join("dstc8");
    let mut paths: Vec<_> = std::fs::read_dir(&directory)
        .map_err(io(&directory))?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .collect();
    paths.sort();
    let mut out = Vec::new();
    for path in paths {
        if let Ok(Value::Array(list)) = serde_json::from_slice(&crate::files::read(&path)?) {
            out.extend(list);
        }
    }
    Ok(out)
}

/// Parameters seen with each (service, method).
type Methods = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

pub(super) fn each_call(dialogue: &Value) -> Vec<(usize, &str, &Value)> {
    let mut out = Vec::new();
    for (i, turn) in dialogue["turns"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        for frame in turn["frames"].as_array().into_iter().flatten() {
            if frame["service_call"].is_object() {
                out.push((
                    i,
                    frame["service"].as_str().unwrap_or(""),
                    &frame["service_call"],
                ));
            }
        }
    }
    out
}

fn methods(dialogues: &[Value]) -> Methods {
    let mut out = Methods::new();
    for dialogue in dialogues {
        for (_, service, call) in each_call(dialogue) {
            let method = call["method"].as_str().unwrap_or("").to_owned();
            let known = out
                .entry(service.to_owned())
                .or_default()
                .entry(method)
                .or_default();
            if let Some(parameters) = call["parameters"].as_object() {
                known.extend(parameters.keys().cloned());
            }
        }
    }
    out
}

/// The first call of a dialogue, asked for in one message.
fn calls(dialogue: &Value, methods: &Methods) -> Option<Document> {
    let (turn, service, call) = each_call(dialogue).into_iter().next()?;
    let turns = dialogue["turns"].as_array()?;
    let said: Vec<&str> = turns[..turn]
        .iter()
        .filter(|t| t["speaker"] == "USER")
        .filter_map(|t| t["utterance"].as_str())
        .collect();
    let tools: Vec<Value> = methods[service]
        .iter()
        .map(|(name, parameters)| {
            let properties: Map<String, Value> = parameters
                .iter()
                .map(|p| {
                    (
                        p.clone(),
                        json!({"type": "string", "description": p.replace('_', " ")}),
                    )
                })
                .collect();
            tool(
                name,
                &format!("{} of the service {service}", spaced(name)),
                properties,
                parameters,
            )
        })
        .collect();
    let arguments = call["parameters"].as_object()?;
    let answer = tool_call(call["method"].as_str()?, arguments);
    Some(conversation(
        "tools",
        Some(&system(&tools)),
        &said.join(" "),
        &answer,
    ))
}

pub(super) fn spaced(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push(' ');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

fn tool<'a>(
    name: &str,
    description: &str,
    properties: Map<String, Value>,
    required: impl IntoIterator<Item = &'a String>,
) -> Value {
    let required: Vec<&String> = required.into_iter().collect();
    json!({"type": "function", "function": {"name": name, "description": description,
        "parameters": {"type": "object", "properties": properties, "required": required}}})
}

/// The system turn that offers tools; the chat template writes the same text.
pub(super) fn system(tools: &[Value]) -> String {
    let list: Vec<String> = tools.iter().map(python_json).collect();
    format!(
        "{}\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou have access to the following functions:\n\n<tools>\n{}\n</tools>\n\nTo call a function, write:\n<tool_call>\n<function=NAME>\n<parameter=ARGUMENT>VALUE</parameter>\n</function>\n</tool_call>",
        super::SYSTEM,
        list.join("\n")
    )
}

/// JSON as Python's `json.dumps` writes it: a space after every comma and colon.
fn python_json(value: &Value) -> String {
    match value {
        Value::Array(list) => {
            let items: Vec<String> = list.iter().map(python_json).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(map) => {
            let items: Vec<String> = map
                .iter()
                .map(|(k, v)| format!("{}: {}", Value::String(k.clone()), python_json(v)))
                .collect();
            format!("{{{}}}", items.join(", "))
        }
        other => other.to_string(),
    }
}

fn tool_call(name: &str, arguments: &Map<String, Value>) -> String {
    let mut out = format!("<tool_call>\n<function={name}>\n");
    for (key, value) in arguments {
        let text = value
            .as_str()
            .map_or_else(|| python_json(value), str::to_owned);
        out += &format!("<parameter={key}>{text}</parameter>\n");
    }
    out + "</function>\n</tool_call>"
}

/// The whole dialogue in chat form.
fn transcript(dialogue: &Value) -> Document {
    let mut text = format!("<|im_start|>system\n{}<|im_end|>\n", super::SYSTEM);
    for turn in dialogue["turns"].as_array().into_iter().flatten() {
        let role = if turn["speaker"] == "USER" {
            "user"
        } else {
            "assistant"
        };
        let said = turn["utterance"].as_str().unwrap_or("");
        text += &format!("<|im_start|>{role}\n{said}<|im_end|>\n");
    }
    Document {
        domain: "tools",
        text,
        prompt: None,
    }
}

/// Requests for methods of discovery documents.
fn discovered(root: &Path) -> Result<Vec<Document>> {
    let mut found = Vec::new();
    for (name, text) in wheel_files(root, &[".json"])? {
        if !name.contains("discovery_cache/documents/") {
            continue;
        }
        if let Ok(document) = serde_json::from_str::<Value>(&text) {
            let mut list = Vec::new();
            collect(&document, &mut list);
            found.extend(list.into_iter().take(150));
        }
    }
    Ok((0..found.len() as u64)
        .filter_map(|i| request(&found, i))
        .collect())
}

fn collect(resource: &Value, out: &mut Vec<Value>) {
    for method in resource["methods"]
        .as_object()
        .into_iter()
        .flat_map(Map::values)
    {
        if method["parameters"]
            .as_object()
            .is_some_and(|p| (1..=5).contains(&p.len()))
        {
            out.push(method.clone());
        }
    }
    for child in resource["resources"]
        .as_object()
        .into_iter()
        .flat_map(Map::values)
    {
        collect(child, out);
    }
}

fn request(methods: &[Value], index: u64) -> Option<Document> {
    let seed = mix(index ^ 0x746f_6f6c);
    let method = &methods[index as usize];
    let mut tools = vec![schema(method)?];
    for extra in 0..seed % 3 {
        tools.extend(schema(
            &methods[(mix(seed ^ extra) % methods.len() as u64) as usize],
        ));
    }
    let place = (seed >> 8) as usize % tools.len();
    tools.swap(0, place);
    let mut arguments = Map::new();
    let mut said = Vec::new();
    for (i, (name, parameter)) in method["parameters"].as_object()?.iter().enumerate() {
        let draw = mix(seed ^ (i as u64 + 99));
        if parameter["required"] != true && draw.is_multiple_of(3) {
            continue;
        }
        let value = value(parameter, draw);
        let shown = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        said.push(format!("{} {shown}", spaced(name)));
        arguments.insert(name.clone(), value);
    }
    if arguments.is_empty() {
        return None;
    }
    let wish = first_sentence(method["description"].as_str()?)?;
    let openings = [
        "Please do this: ",
        "I need you to help: ",
        "",
        "Can you do the following? ",
    ];
    let user = format!(
        "{}{wish} Use {}.",
        openings[(seed >> 20) as usize % 4],
        said.join(" and ")
    );
    let name = method["id"].as_str()?.replace('.', "_");
    Some(conversation(
        "tools",
        Some(&system(&tools)),
        &user,
        &tool_call(&name, &arguments),
    ))
}

pub(super) fn first_sentence(text: &str) -> Option<String> {
    let sentence = text.split(". ").next()?.trim_end_matches('.');
    (15..160)
        .contains(&sentence.len())
        .then(|| format!("{sentence}."))
}

fn schema(method: &Value) -> Option<Value> {
    let parameters = method["parameters"].as_object()?;
    let properties: Map<String, Value> = parameters
        .iter()
        .map(|(name, p)| {
            let about = p["description"]
                .as_str()
                .and_then(first_sentence)
                .unwrap_or_else(|| spaced(name));
            let mut property = json!({"type": p["type"], "description": about});
            if let Some(list) = p["enum"].as_array() {
                property["enum"] = json!(list[..list.len().min(4)]);
            }
            (name.clone(), property)
        })
        .collect();
    let required: Vec<String> = parameters
        .iter()
        .filter(|(_, p)| p["required"] == true)
        .map(|(name, _)| name.clone())
        .collect();
    let name = method["id"].as_str()?.replace('.', "_");
    Some(tool(
        &name,
        &first_sentence(method["description"].as_str()?)?,
        properties,
        &required,
    ))
}

fn value(parameter: &Value, draw: u64) -> Value {
    const WORDS: [&str; 24] = [
        "alpha",
        "blue-sky",
        "customer-42",
        "report",
        "Berlin",
        "summer sale",
        "invoice-2024",
        "weekly",
        "main",
        "draft",
        "anna.smith",
        "north",
        "Tokyo",
        "project-x",
        "billing",
        "photos",
        "2024-05-17",
        "support",
        "demo",
        "Paris",
        "green tea",
        "sales",
        "v2",
        "archive",
    ];
    if let Some(list) = parameter["enum"].as_array() {
        return list[(draw % list.len().min(4) as u64) as usize].clone();
    }
    match parameter["type"].as_str() {
        Some("integer") => json!(1 + draw % 100),
        Some("number") => json!((draw % 1000) as f64 / 10.0),
        Some("boolean") => json!(draw.is_multiple_of(2)),
        _ => json!(WORDS[(draw % WORDS.len() as u64) as usize]),
    }
}
