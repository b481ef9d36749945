//! BFCL: a call against the values that its answer key allows.
//!
//! Rules of the benchmark's AST check for one function: the name is equal, every required parameter is
//! there, every parameter given has an allowed value, `""` among the allowed makes it optional; text is
//! compared without case, spaces and the marks `, . / - _ * ^`.

use serde_json::{Map, Value, json};

/// A tool of the benchmark as JSON Schema: `dict`, `float`, `tuple` and `any` are not types there.
#[must_use]
pub fn tool(tool: &Value) -> Value {
    let mut tool = tool.clone();
    schema(&mut tool["function"]["parameters"]);
    tool
}

fn schema(value: &mut Value) {
    let Some(object) = value.as_object_mut() else {
        return;
    };
    let renamed = match object.get("type").and_then(Value::as_str) {
        Some("dict") => Some("object"),
        Some("float") => Some("number"),
        Some("tuple") => Some("array"),
        _ => None,
    };
    if let Some(name) = renamed {
        object.insert("type".into(), name.into());
    } else if object.get("type").is_some_and(|t| t == "any") {
        object.remove("type");
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = object.get_mut(key) {
            schema(inner);
        }
    }
    let properties = object.get_mut("properties").and_then(Value::as_object_mut);
    properties
        .into_iter()
        .flat_map(Map::values_mut)
        .for_each(schema);
}

/// Right when there is one call and the item's answer allows it.
pub fn check(item: &Value, calls: &[Value]) -> Result<(), String> {
    let [call] = calls else {
        return Err(format!("expected 1 call, found {}", calls.len()));
    };
    let (name, allowed) = item["answer"][0]
        .as_object()
        .and_then(|answer| answer.iter().next())
        .ok_or("item without an answer")?;
    if call["name"] != *name {
        return Err(format!("expected `{name}`, found {}", call["name"]));
    }
    let given = call["arguments"]
        .as_object()
        .ok_or("arguments are no JSON object")?;
    let allowed = allowed.as_object().ok_or("item without parameters")?;
    let required = &item["tools"][0]["function"]["parameters"]["required"];
    for name in required
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        if !given.contains_key(name) {
            return Err(format!("required parameter `{name}` is missing"));
        }
    }
    fits(given, allowed)
}

/// Every key of `given` has a value of `allowed`, whose lists hold what may stand there.
fn fits(given: &Map<String, Value>, allowed: &Map<String, Value>) -> Result<(), String> {
    let empty = Vec::new();
    for (name, value) in given {
        let list = allowed
            .get(name)
            .ok_or_else(|| format!("parameter `{name}` is not expected"))?;
        let list = list.as_array().unwrap_or(&empty);
        if !list.iter().any(|one| same(value, one)) {
            return Err(format!(
                "`{name}`: expected one of {}, found {value}",
                json!(list)
            ));
        }
    }
    for (name, list) in allowed {
        let optional = list
            .as_array()
            .is_some_and(|list| list.contains(&json!("")));
        if !optional && !given.contains_key(name) {
            return Err(format!("parameter `{name}` is missing"));
        }
    }
    Ok(())
}

fn same(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::String(a), Value::String(b)) => plain(a) == plain(b),
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => fits(a, b).is_ok(),
        (a, b) => a == b,
    }
}

fn plain(text: &str) -> String {
    let kept = text.chars().filter(|c| !" ,./-_*^".contains(*c));
    kept.flat_map(char::to_lowercase)
        .map(|c| if c == '\'' { '"' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item() -> Value {
        json!({"tools": [{"function": {"parameters": {"type": "dict", "required": ["city"],
            "properties": {"city": {"type": "string"}, "at": {"type": "dict",
                "properties": {"x": {"type": "float"}}}, "any": {"type": "any"}}}}}],
            "answer": [{"weather": {"city": ["New York, NY"], "days": ["", 3], "at": ["", {"x": [1.0]}]}}]})
    }

    fn call(name: &str, arguments: &Value) -> Vec<Value> {
        vec![json!({"name": name, "arguments": arguments})]
    }

    #[test]
    fn allowed_values_are_right() {
        for arguments in [
            json!({"city": "new york NY"}),
            json!({"city": "New York, NY", "days": 3.0}),
            json!({"city": "New York, NY", "at": {"x": 1}}),
        ] {
            assert_eq!(check(&item(), &call("weather", &arguments)), Ok(()));
        }
    }

    #[test]
    fn anything_else_is_wrong() {
        let city = json!({"city": "New York, NY"});
        assert!(check(&item(), &[]).is_err());
        assert!(check(&item(), &call("rain", &city)).is_err());
        assert!(
            check(
                &item(),
                &[call("weather", &city), call("weather", &city)].concat()
            )
            .is_err()
        );
        for arguments in [
            json!({}),
            json!({"city": "Boston"}),
            json!({"city": "New York, NY", "days": "3"}),
            json!({"city": "New York, NY", "unit": "C"}),
            json!({"city": "New York, NY", "at": {"x": 2}}),
            Value::Null,
        ] {
            assert!(
                check(&item(), &call("weather", &arguments)).is_err(),
                "{arguments}"
            );
        }
    }

    #[test]
    fn types_become_json_schema() {
        let parameters = &tool(&item()["tools"][0])["function"]["parameters"];
        assert_eq!(parameters["type"], "object");
        assert_eq!(
            parameters["properties"]["at"]["properties"]["x"]["type"],
            "number"
        );
        assert!(parameters["properties"]["any"].get("type").is_none());
    }
}
