//! Grammars of tool calls: of calls that have to be made, and of those that a model may make of strict tools.
//!
//! A forced answer is calls and nothing else. Beside strict tools (`strict: true`) text is free, and from the mark
//! that opens a call on, a strict function's arguments are bound by its schema; those of others are not. Invariant:
//! what is bound is what the parser of the same format reads.

use crate::error::ApiError;
use crate::grammar::Grammar;
use crate::parse::Format;
use crate::schema::compact;
use serde_json::{Value, json};

/// Calls of one answer when they are forced: without a limit a model that is unsure calls for ever.
const FORCED_CALLS_MAX: usize = 8;

/// Up to the mark that opens a call; text without one.
const AROUND: &str = "lead[suffix=\"<tool_call>\"]: /(?s:.*)/\n\
    REST: /(?s:.+)/ & ~/(?s:.*)<tool_call>(?s:.*)/\n";
/// The rest of a call that is not bound.
const LOOSE: &str = "loose[suffix=\"</tool_call>\"]: /(?s:.*)/\n";
/// A text parameter's value.
const TEXT: &str = "text[suffix=\"</parameter>\"]: /(?s:.*)/\n";

/// One or more calls of `tools` and nothing else; just one when `single`.
///
/// # Errors
/// A format whose calls cannot be forced.
pub(crate) fn forced(format: Format, tools: &[&Value], single: bool) -> Result<Grammar, ApiError> {
    match format {
        Format::Hermes => Ok(json_calls(tools, single)),
        Format::Mimo => Ok(xml_calls(tools, single)),
        Format::Harmony => Err(ApiError::invalid(
            "tool_choice",
            "tool_choice: only `auto` and `none` are served for this model's call format",
        )),
    }
}

/// Text and calls as the model likes, those of strict tools as their schemas say; `None` without a strict tool, and
/// where the format cannot be bound.
pub(crate) fn strict(format: Format, tools: &[Value], single: bool) -> Option<Grammar> {
    let is_strict = |tool: &&Value| tool["function"]["strict"] == true;
    if !tools.iter().any(|tool| is_strict(&tool)) {
        return None;
    }
    let (call, rules) = match format {
        Format::Hermes => json_strict(tools, is_strict),
        Format::Mimo => xml_strict(tools, is_strict),
        Format::Harmony => return None,
    };
    // A model of its own accord may also call one function after another, or say more afterwards.
    let start = match single {
        true => "REST? | lead call",
        false => "(lead call)* REST?",
    };
    Some(Grammar::Lark(format!(
        "start: {start}\ncall: \"\\n\"? ({call})\n{rules}{AROUND}"
    )))
}

/// A call after its mark, and its rules; arguments of tools that are not strict are any object.
fn json_strict(tools: &[Value], is_strict: impl Fn(&&Value) -> bool) -> (String, String) {
    let relaxed = tools.iter().map(|tool| {
        let mut tool = tool.clone();
        if !is_strict(&&tool) {
            tool["function"]["parameters"] = json!({"type": "object"});
        }
        tool
    });
    let relaxed: Vec<Value> = relaxed.collect();
    let rules = json_body(&relaxed.iter().collect::<Vec<_>>());
    (format!("{JSON_BODY} \"</tool_call>\""), rules)
}

/// As [`json_strict`]; what follows the name of a function that is not strict is free up to the call's end.
fn xml_strict(tools: &[Value], is_strict: impl Fn(&&Value) -> bool) -> (String, String) {
    let (bound, free): (Vec<&Value>, Vec<&Value>) = tools.iter().partition(is_strict);
    let (functions, rules) = xml_functions(&bound);
    let mut call = format!("({functions}) \"</tool_call>\"");
    for tool in &free {
        let name = tool["function"]["name"].as_str().unwrap_or("");
        let open = Value::from(format!("<function={name}>"));
        call.push_str(&format!(" | {open} loose"));
    }
    let loose = if free.is_empty() { "" } else { LOOSE };
    (call, format!("{rules}{TEXT}{loose}"))
}

/// What may follow the first call.
fn more_calls(single: bool) -> String {
    let more = if single { 0 } else { FORCED_CALLS_MAX - 1 };
    " (\"\\n\" call".repeat(more) + &")?".repeat(more)
}

/// `<tool_call>\n{"name": …, "arguments": …}\n</tool_call>`, one or more.
fn json_calls(tools: &[&Value], single: bool) -> Grammar {
    let (more, body) = (more_calls(single), json_body(tools));
    Grammar::Lark(format!(
        "start: call{more}\ncall: \"<tool_call>\\n\" {JSON_BODY} \"</tool_call>\"\n{body}"
    ))
}

const JSON_BODY: &str = "body \"\\n\"";

/// The rule `body`: name and arguments of one of `tools`.
fn json_body(tools: &[&Value]) -> String {
    let one = |tool: &&Value| {
        let function = &tool["function"];
        let parameters = function.get("parameters").cloned();
        json!({"type": "object", "additionalProperties": false,
            "properties": {
                "name": {"const": function["name"]},
                "arguments": parameters.unwrap_or_else(|| json!({"type": "object"}))},
            "required": ["name", "arguments"]})
    };
    let schemas: Vec<Value> = tools.iter().map(one).collect();
    let schema = compact(match schemas.as_slice() {
        [one] => one.clone(),
        _ => json!({"anyOf": schemas}),
    });
    format!("body: %json {schema}\n")
}

/// MiMo's form: names, order, required parameters and the types of values are bound; strings are free text.
fn xml_calls(tools: &[&Value], single: bool) -> Grammar {
    let more = more_calls(single);
    let (functions, rules) = xml_functions(tools);
    Grammar::Lark(format!(
        "start: call{more}\ncall: \"<tool_call>\\n\" ({functions}) \"</tool_call>\"\n{rules}{TEXT}"
    ))
}

/// One of `tools`, from `<function=` to the line after `</function>`, and the rules that it needs beside [`TEXT`].
fn xml_functions(tools: &[&Value]) -> (String, String) {
    let mut rules = String::new();
    let mut names = Vec::new();
    for (i, tool) in tools.iter().enumerate() {
        let function = &tool["function"];
        let name = format!("<function={}>\n", function["name"].as_str().unwrap_or(""));
        let mut body = Value::from(name).to_string();
        let parameters = &function["parameters"];
        let properties = parameters["properties"].as_object();
        for (j, (key, schema)) in properties.into_iter().flatten().enumerate() {
            let required = parameters["required"].as_array();
            let required = required.is_some_and(|keys| keys.iter().any(|k| k == key));
            let open = Value::from(format!("<parameter={key}>"));
            let optional = if required { "" } else { "?" };
            body.push_str(&format!(" ({open} v{i}_{j} \"\\n\"){optional}"));
            rules.push_str(&format!("v{i}_{j}: {}\n", xml_value(schema)));
        }
        names.push(format!("f{i}"));
        rules.push_str(&format!("f{i}: {body} \"</function>\\n\"\n"));
    }
    (names.join(" | "), rules)
}

/// What one parameter may hold, and its closing tag: text as it is, everything else as JSON.
fn xml_value(schema: &Value) -> String {
    const END: &str = "\"</parameter>\"";
    let options = schema["enum"].as_array();
    if let Some(options) = options.filter(|all| !all.is_empty() && all.iter().all(Value::is_string))
    {
        let quoted: Vec<String> = options.iter().map(Value::to_string).collect();
        return format!("({}) {END}", quoted.join(" | "));
    }
    // A reference leads out of the parameter's own schema.
    let kind = schema["type"].as_str();
    match kind.filter(|_| !schema.to_string().contains("$ref")) {
        Some("integer" | "number" | "boolean" | "object" | "array" | "null") => {
            format!("%json {} {END}", compact(schema.clone()))
        }
        _ => "text".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::{Grammars, Guide};
    use crate::text::ByteCodec;
    use engine::ConstraintFactory;
    use std::sync::Arc;

    fn compile(grammar: Grammar) -> ConstraintFactory {
        let codec = Arc::new(ByteCodec { vocab_size: 512 });
        let grammars = Grammars::new(codec, &[ByteCodec::END]);
        let guide = Guide {
            grammar: Some(grammar),
            ..Guide::default()
        };
        grammars.compile(&guide).unwrap()
    }

    /// True when every byte of `text`, and the end after it, may be said.
    fn holds(start: &ConstraintFactory, text: &str) -> bool {
        let mut constraint = start();
        let tokens = text.bytes().map(u32::from).chain([ByteCodec::END]);
        tokens.into_iter().all(|token| {
            let mut row = [0; 16];
            constraint.masks(&[], &mut row);
            constraint.commit(&[token]);
            row[token as usize / 32] >> (token % 32) & 1 == 1
        })
    }

    fn tool(name: &str) -> Value {
        json!({"function": {"name": name, "parameters": {"type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["place", "unit"]}}})
    }

    const PLACE: &str = "<parameter=place>A <b>\n</parameter>\n";
    const UNIT: &str = "<parameter=unit>F</parameter>\n";

    #[test]
    fn forced_calls_of_mimo_compile_and_bind_names_order_and_types() {
        let start = compile(xml_calls(&[&tool("get \"x\"")], true));
        let call = |body: &str| {
            format!("<tool_call>\n<function=get \"x\">\n{body}</function>\n</tool_call>")
        };
        let holds = |body: &str| holds(&start, &call(body));
        assert!(holds(&format!("{PLACE}{UNIT}")));
        let days = |days: &str| format!("{PLACE}<parameter=days>{days}</parameter>\n{UNIT}");
        assert!(holds(&days("12")) && !holds(&days("x")));
        assert!(!holds(UNIT) && !holds(PLACE));
        assert!(!holds(&format!("{PLACE}<parameter=unit>K</parameter>\n")));
    }

    #[test]
    fn strict_tools_bind_their_calls_and_nothing_else() {
        let mut bound = tool("get");
        bound["function"]["strict"] = true.into();
        let tools = [bound, tool("set")];
        assert_eq!(strict(Format::Mimo, &tools[1..], false), None);
        let start = compile(strict(Format::Mimo, &tools, false).unwrap());
        let single = compile(strict(Format::Mimo, &tools, true).unwrap());
        let call = |name: &str, body: &str| {
            format!("<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>")
        };
        let (right, wrong) = (format!("{PLACE}{UNIT}"), UNIT);
        for (text, more, one) in [
            (String::new(), true, true),
            (
                "No tool_call> needed.\n\n<function=x>".to_owned(),
                true,
                true,
            ),
            (call("get", &right), true, true),
            (format!("I look.\n{}", call("get", &right)), true, true),
            (call("get", wrong), false, false),
            (format!("I look.\n{}", call("get", wrong)), false, false),
            (call("set", wrong), true, true),
            (call("gets", &right), false, false),
            (
                format!("{}\n{}", call("set", wrong), call("get", &right)),
                true,
                false,
            ),
            (format!("{}\nSo.", call("get", &right)), true, false),
            (
                format!("{}\n{}", call("set", ""), call("get", wrong)),
                false,
                false,
            ),
            ("<tool_call>\n".to_owned(), false, false),
            ("<tool_call> no".to_owned(), false, false),
        ] {
            assert_eq!(
                (holds(&start, &text), holds(&single, &text)),
                (more, one),
                "{text}"
            );
        }
    }

    #[test]
    fn strict_tools_bind_json_calls() {
        let mut bound = tool("get");
        bound["function"]["strict"] = true.into();
        let start = compile(strict(Format::Hermes, &[bound, tool("set")], false).unwrap());
        let call = |name: &str, arguments: &str| {
            format!(
                "A: <tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call> B"
            )
        };
        let right = "{\"place\": \"x\", \"unit\": \"C\"}";
        assert!(holds(&start, &call("get", right)) && holds(&start, &call("set", "{\"a\": 1}")));
        let close = |text: &str| text.replace("<tool_call>\n", "<tool_call>");
        assert!(holds(&start, &close(&call("get", right))));
        assert!(!holds(&start, &close(&call("get", "{}"))));
        assert!(!holds(&start, &call("get", "{\"a\": 1}")) && !holds(&start, &call("put", right)));
    }
}
