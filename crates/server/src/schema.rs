//! A client's JSON schema as the mask compiler is to see it: whitespace fixed, `format` made exact, `oneOf`
//! as `anyOf` where that is the same.
//!
//! `format` is an annotation that a validator may check. Names that the compiler does not know are
//! taken out, as the specification lets a reader do; dates and times get patterns of our own, because
//! the compiler's let February have 29 days each year and every minute a leap second; e-mail addresses
//! get one that keeps to the lengths of RFC 5321. Everything else that is not understood is refused by
//! the compiler by name, never left out.

use serde_json::{Value, json};

/// Formats that the compiler (llguidance 1.9.1) binds.
const BOUND: [&str; 7] = [
    "duration", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown",
];
const DATE: &str = "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|\
    [12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|\
    (?:[02468][048]|[13579][26])00)-02-29)";
const TIME: &str = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";
const EMAIL: &str = "[a-zA-Z0-9_%+-]{1,20}(?:\\.[a-zA-Z0-9_%+-]{1,20}){0,2}@[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,30}\
    [a-zA-Z0-9])?(?:\\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,30}[a-zA-Z0-9])?){1,3}";

/// A schema whose texts have the whitespace `json.dumps` writes and no other: with whitespace free, a
/// model that is unsure writes blanks until its tokens run out.
pub(crate) fn compact(mut schema: Value) -> Value {
    crate::one_of::rewrite(&mut schema);
    formats(&mut schema);
    if let Some(object) = schema.as_object_mut() {
        object.entry("x-guidance").or_insert_with(
            || json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "}),
        );
    }
    schema
}

/// Goes through all schemas of a schema; values given as data are left alone.
fn formats(schema: &mut Value) {
    match schema {
        Value::Array(all) => all.iter_mut().for_each(formats),
        Value::Object(object) => {
            if let Some(name) = object.get("format").and_then(Value::as_str) {
                let pattern = pattern(name);
                if pattern.is_some() || !BOUND.contains(&name) {
                    object.remove("format");
                }
                if let Some(pattern) = pattern {
                    bind(object, pattern);
                }
            }
            for (name, value) in object {
                if !matches!(name.as_str(), "const" | "enum" | "default" | "examples") {
                    formats(value);
                }
            }
        }
        _ => {}
    }
}

/// Adds a pattern beside one that is there already; only strings are bound by it.
fn bind(object: &mut serde_json::Map<String, Value>, pattern: String) {
    if object.contains_key("pattern") {
        let all = object.entry("allOf").or_insert_with(|| json!([]));
        if let Some(all) = all.as_array_mut() {
            all.push(json!({"pattern": pattern}));
        }
    } else {
        object.insert("pattern".to_owned(), pattern.into());
    }
}

fn pattern(format: &str) -> Option<String> {
    match format {
        "date" => Some(format!("^{DATE}$")),
        "time" => Some(format!("^{TIME}$")),
        "date-time" => Some(format!("^{DATE}[tT]{TIME}$")),
        "email" => Some(format!("^{EMAIL}$")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_become_patterns_or_go() {
        let found = compact(
            json!({"properties": {"a": {"type": "string", "format": "time"},
            "b": {"type": "string", "format": "colour"}, "c": {"format": "uuid"},
            "format": {"const": {"format": "date"}}}}),
        );
        let all = &found["properties"];
        assert_eq!(all["a"]["pattern"], format!("^{TIME}$"));
        assert!(all["a"]["format"].is_null() && all["b"]["format"].is_null());
        assert_eq!(all["c"]["format"], "uuid");
        assert_eq!(all["format"]["const"]["format"], "date");
    }

    #[test]
    fn patterns_agree_with_the_validators_formats() {
        for (format, text) in [
            ("date", "2024-02-29"),
            ("date", "2023-02-29"),
            ("date", "2000-02-29"),
            ("date", "1900-02-29"),
            ("date", "2023-04-31"),
            ("date", "2023-12-31"),
            ("time", "23:59:59Z"),
            ("time", "24:00:00Z"),
            ("time", "10:20:60+01:00"),
            ("date-time", "2023-12-31T10:20:30.5+01:00"),
            ("email", "a.b@example.org"),
            ("email", "a@"),
        ] {
            let valid = |schema: Value| {
                let validator = jsonschema::options()
                    .should_validate_formats(true)
                    .build(&schema);
                validator.unwrap().is_valid(&text.into())
            };
            let ours = valid(json!({"pattern": pattern(format).unwrap()}));
            assert_eq!(ours, valid(json!({"format": format})), "{format} {text}");
        }
    }
}
