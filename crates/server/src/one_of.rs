//! `oneOf` as `anyOf`, where the two are the same: no value can hold by two branches at once.
//!
//! Owns the proof that two schemas exclude each other: by type, by constants and enumerations, by ranges of numbers,
//! lengths and counts, and by a property that has to be there and cannot suit both. References within the document
//! are followed. Refuses to guess: a `oneOf` that is not shown to be exclusive stays, and the compiler refuses it.
//! Invariant: what is rewritten accepts exactly the same values.

use serde_json::{Map, Value, json};

/// Comparisons of two schemas in one document; beyond them nothing more is shown.
const COMPARISONS_MAX: u32 = 20_000;
/// Properties and references below a branch that are looked at.
const DEPTH_MAX: u32 = 8;
const FALSE: &Value = &Value::Bool(false);

/// Types of JSON, integers among the numbers.
const KINDS: [&str; 6] = ["null", "boolean", "number", "string", "array", "object"];
/// One bit for each of [`KINDS`].
type Kinds = u8;
const ALL: Kinds = 0b11_1111;

/// Rewrites every `oneOf` of `schema` whose branches exclude each other.
pub(crate) fn rewrite(schema: &mut Value) {
    let root = schema.clone();
    let mut proof = Proof {
        root: &root,
        left: COMPARISONS_MAX,
    };
    proof.walk(schema);
}

struct Proof<'r> {
    root: &'r Value,
    left: u32,
}

/// What holds for both of two schemas besides themselves.
#[derive(Clone, Copy)]
struct Around<'s> {
    kinds: Kinds,
    required: Option<&'s Value>,
    depth: u32,
}

impl<'r> Proof<'r> {
    fn walk(&mut self, schema: &mut Value) {
        match schema {
            Value::Array(all) => all.iter_mut().for_each(|one| self.walk(one)),
            Value::Object(object) => {
                if self.exclusive(object)
                    && let Some(branches) = object.remove("oneOf")
                {
                    any_of(object, branches);
                }
                for (name, value) in object {
                    if !matches!(name.as_str(), "const" | "enum" | "default" | "examples") {
                        self.walk(value);
                    }
                }
            }
            _ => {}
        }
    }

    fn exclusive(&mut self, object: &Map<String, Value>) -> bool {
        let Some(branches) = object.get("oneOf").and_then(Value::as_array) else {
            return false;
        };
        let around = Around {
            kinds: own_kinds(object),
            required: object.get("required"),
            depth: 0,
        };
        let mut pairs = (0..branches.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
        pairs.all(|(i, j)| self.exclude(&branches[i], &branches[j], around))
    }

    /// True when no value holds by both, given what is around them.
    fn exclude<'s>(&mut self, a: &'s Value, b: &'s Value, around: Around<'s>) -> bool
    where
        'r: 's,
    {
        if self.left == 0 || around.depth > DEPTH_MAX {
            return false;
        }
        self.left -= 1;
        let (a, b) = (self.follow(a), self.follow(b));
        if a == FALSE || b == FALSE || self.parts_exclude(a, b, around) {
            return true;
        }
        let shared = around.kinds & self.kinds(a, 0) & self.kinds(b, 0);
        let mut kinds = (0..KINDS.len()).filter(|k| shared & 1 << k != 0);
        kinds.all(|kind| self.exclude_as(KINDS[kind], a, b, around))
    }

    /// A schema excludes what all of its alternatives exclude, or one of the schemas that hold together.
    fn parts_exclude<'s>(&mut self, a: &'s Value, b: &'s Value, around: Around<'s>) -> bool
    where
        'r: 's,
    {
        let around = Around {
            depth: around.depth + 1,
            ..around
        };
        for (one, other) in [(a, b), (b, a)] {
            let list = |name: &str| one.get(name).and_then(Value::as_array);
            for options in [list("anyOf"), list("oneOf")].into_iter().flatten() {
                if options.iter().all(|x| self.exclude(x, other, around)) {
                    return true;
                }
            }
            if list("allOf").is_some_and(|all| all.iter().any(|x| self.exclude(x, other, around))) {
                return true;
            }
        }
        false
    }

    fn exclude_as<'s>(&mut self, kind: &str, a: &'s Value, b: &'s Value, around: Around<'s>) -> bool
    where
        'r: 's,
    {
        if let (Some(a), Some(b)) = (values(a), values(b)) {
            let of_kind = |v: &&&Value| kind_of(v) == kind;
            return !a
                .iter()
                .filter(of_kind)
                .any(|x| b.iter().any(|y| same(x, y)));
        }
        match kind {
            "number" => apart(number_range(a), number_range(b)),
            "string" => apart(
                range(a, "minLength", "maxLength"),
                range(b, "minLength", "maxLength"),
            ),
            "array" => apart(
                range(a, "minItems", "maxItems"),
                range(b, "minItems", "maxItems"),
            ),
            "object" => self.properties_exclude(a, b, around),
            _ => false,
        }
    }

    /// A property that has to be there and cannot suit both.
    fn properties_exclude<'s>(&mut self, a: &'s Value, b: &'s Value, around: Around<'s>) -> bool
    where
        'r: 's,
    {
        let lists = [a.get("required"), b.get("required"), around.required];
        let lists = lists.into_iter().flatten().filter_map(Value::as_array);
        let inside = Around {
            kinds: ALL,
            required: None,
            depth: around.depth + 1,
        };
        let mut keys = lists.flatten().filter_map(Value::as_str);
        keys.any(|key| match (property(a, key), property(b, key)) {
            (Some(a), Some(b)) => self.exclude(a, b, inside),
            (Some(one), None) | (None, Some(one)) => one == FALSE,
            (None, None) => false,
        })
    }

    /// Where references within the document lead; they narrow a schema, so that nothing beside them is needed.
    fn follow<'s>(&self, schema: &'s Value) -> &'s Value
    where
        'r: 's,
    {
        let mut schema = schema;
        for _ in 0..DEPTH_MAX {
            let path = schema.get("$ref").and_then(Value::as_str);
            let Some(path) = path.and_then(|path| path.strip_prefix('#')) else {
                break;
            };
            match self.root.pointer(path) {
                Some(found) => schema = found,
                None => break,
            }
        }
        schema
    }

    /// Types that a value of `schema` may have.
    fn kinds(&self, schema: &Value, depth: u32) -> Kinds {
        let schema = self.follow(schema);
        let Some(object) = schema.as_object() else {
            return if schema == FALSE { 0 } else { ALL };
        };
        let mut kinds = own_kinds(object);
        if depth < DEPTH_MAX {
            let list = |name: &str| object.get(name).and_then(Value::as_array);
            for options in [list("anyOf"), list("oneOf")].into_iter().flatten() {
                kinds &= options
                    .iter()
                    .fold(0, |all, x| all | self.kinds(x, depth + 1));
            }
            for part in list("allOf").into_iter().flatten() {
                kinds &= self.kinds(part, depth + 1);
            }
        }
        kinds
    }
}

/// Puts alternatives in place of `oneOf`, beside others that may be there.
fn any_of(object: &mut Map<String, Value>, branches: Value) {
    if !object.contains_key("anyOf") {
        object.insert("anyOf".to_owned(), branches);
        return;
    }
    let all = object.entry("allOf").or_insert_with(|| json!([]));
    if let Some(all) = all.as_array_mut() {
        all.push(json!({"anyOf": branches}));
    }
}

fn own_kinds(object: &Map<String, Value>) -> Kinds {
    let bit = |name: &str| match name {
        "integer" => 1 << 2,
        name => KINDS.iter().position(|k| *k == name).map_or(0, |k| 1 << k),
    };
    let mut kinds = match object.get("type") {
        Some(Value::String(name)) => bit(name),
        Some(Value::Array(names)) => names
            .iter()
            .filter_map(Value::as_str)
            .fold(0, |all, name| all | bit(name)),
        _ => ALL,
    };
    if let Some(value) = object.get("const") {
        kinds &= bit(kind_of(value));
    }
    if let Some(Value::Array(values)) = object.get("enum") {
        kinds &= values
            .iter()
            .fold(0, |all, value| all | bit(kind_of(value)));
    }
    kinds
}

fn kind_of(value: &Value) -> &'static str {
    KINDS[match value {
        Value::Null => 0,
        Value::Bool(_) => 1,
        Value::Number(_) => 2,
        Value::String(_) => 3,
        Value::Array(_) => 4,
        Value::Object(_) => 5,
    }]
}

/// All values that a schema may have, where it counts them.
fn values(schema: &Value) -> Option<Vec<&Value>> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => Some(vec![value]),
        (None, Some(Value::Array(values))) => Some(values.iter().collect()),
        _ => None,
    }
}

/// Equal as JSON: 1 is 1.0.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        // Numbers inside may be written in two ways: not looked into.
        (Value::Array(_), Value::Array(_)) | (Value::Object(_), Value::Object(_)) => true,
        (a, b) => a == b,
    }
}

/// The schema of property `key`; `None` where any value may be there.
fn property<'s>(schema: &'s Value, key: &str) -> Option<&'s Value> {
    if let Some(found) = schema.get("properties").and_then(|p| p.get(key)) {
        return Some(found);
    }
    match (
        schema.get("patternProperties"),
        schema.get("additionalProperties"),
    ) {
        (None, Some(rest)) => Some(rest),
        _ => None,
    }
}

/// Least and largest, each with whether it is left out.
type Range = [(f64, bool); 2];

fn range(schema: &Value, low: &str, high: &str) -> Range {
    let number = |name: &str| schema.get(name).and_then(Value::as_f64);
    [
        (number(low).unwrap_or(f64::NEG_INFINITY), false),
        (number(high).unwrap_or(f64::INFINITY), false),
    ]
}

fn number_range(schema: &Value) -> Range {
    let number = |name: &str| schema.get(name).and_then(Value::as_f64);
    let [mut low, mut high] = range(schema, "minimum", "maximum");
    if let Some(limit) = number("exclusiveMinimum").filter(|limit| *limit >= low.0) {
        low = (limit, true);
    }
    if let Some(limit) = number("exclusiveMaximum").filter(|limit| *limit <= high.0) {
        high = (limit, true);
    }
    [low, high]
}

fn apart(a: Range, b: Range) -> bool {
    let above = |low: (f64, bool), high: (f64, bool)| {
        low.0 > high.0 || (low.0 == high.0 && (low.1 || high.1))
    };
    above(a[0], b[1]) || above(b[0], a[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_rewritten(mut schema: Value) -> bool {
        rewrite(&mut schema);
        !schema.to_string().contains("oneOf")
    }

    #[test]
    fn branches_that_exclude_each_other_become_alternatives() {
        let kind = |name: &str| json!({"type": "object", "properties": {"kind": {"const": name}}, "required": ["kind"]});
        for branches in [
            json!([{"type": "string"}, {"type": "integer"}, {"type": "null"}]),
            json!([{"const": 1}, {"const": "1"}, {"enum": [2, "a"]}]),
            json!([kind("a"), kind("b"), {"type": "array"}]),
            json!([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]),
            json!([{"type": "number", "maximum": 3}, {"type": "number", "exclusiveMinimum": 3}]),
            json!([{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 4}]),
            json!([{"type": "array", "minItems": 2}, {"type": "array", "maxItems": 1}]),
            json!([{"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": false},
                {"type": "object", "properties": {"b": {}}, "required": ["b"], "additionalProperties": false}]),
            json!([{"allOf": [kind("a")]}, {"anyOf": [kind("b"), kind("c")]}]),
            json!([{"type": "object", "properties": {"x": kind("a")}, "required": ["x"]},
                {"type": "object", "properties": {"x": kind("b")}}]),
        ] {
            let schema = json!({"oneOf": branches, "$defs": {"a": kind("a"), "b": kind("b")}});
            assert!(is_rewritten(schema.clone()), "{schema}");
        }
        // The properties that are demanded may stand around the branches.
        assert!(is_rewritten(json!({"type": "object", "required": ["k"],
            "oneOf": [{"properties": {"k": {"const": 1}}}, {"properties": {"k": {"const": 2}}}]})));
    }

    #[test]
    fn branches_that_may_hold_together_stay() {
        for branches in [
            json!([{"type": "number"}, {"type": "integer"}]),
            json!([{"const": 1}, {"const": 1.0}]),
            json!([{"required": ["a"]}, {"required": ["b"]}]),
            json!([{"properties": {"k": {"const": 1}}, "required": ["k"]},
                {"properties": {"k": {"const": 2}}, "required": ["k"]}]),
            json!([{"type": "object", "properties": {"k": {"const": 1}}},
                {"type": "object", "properties": {"k": {"const": 2}}}]),
            json!([{"type": "string", "pattern": "a"}, {"type": "string", "pattern": "b"}]),
            json!([{"type": "number", "maximum": 3}, {"type": "number", "minimum": 3}]),
            json!([{"$ref": "#/$defs/loop"}, {"type": "string"}]),
            json!([{"enum": [[1]]}, {"enum": [[1.0]]}]),
            json!([{}, {"type": "string"}]),
        ] {
            let schema = json!({"oneOf": branches, "$defs": {"loop": {"$ref": "#/$defs/loop"}}});
            assert!(!is_rewritten(schema.clone()), "{schema}");
        }
        assert!(!is_rewritten(
            json!({"oneOf": [{"const": 1}, {"oneOf": [{"const": 2}, {"const": 1}]}]})
        ));
    }

    #[test]
    fn alternatives_beside_others_hold_together_with_them() {
        let mut schema = json!({"anyOf": [{"minimum": 0}], "oneOf": [{"const": 1}, {"const": 2}]});
        rewrite(&mut schema);
        assert_eq!(
            schema["allOf"],
            json!([{"anyOf": [{"const": 1}, {"const": 2}]}])
        );
        assert_eq!(schema["anyOf"], json!([{"minimum": 0}]));
    }
}
