//! Calls that a model makes by itself name a function that there is, and in MiMo's form parameters that it has,
//! each once: a mask over the names alone.
//!
//! Small models copy the placeholders of their template (`<function=NAME>`, `<parameter=ARGUMENT>`) or make names up;
//! no client can use such a call. Everything else about the answer stays free, whether to call, the order of
//! parameters, which of them, and their values included. Invariants: bytes decide, not tokens; a place where no token fits is left free, so that a mask never leaves nothing to say; masks depend on the
//! answer so far only, so that output with drafting is that without.

use crate::parse::Format;
use crate::text::Codec;
use engine::ConstraintFactory;
use model::TokenId;
use model::decoder::Constraint;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

type ByFirst = BTreeMap<u8, Vec<(TokenId, Box<[u8]>)>>;

/// Tokens of the vocabulary by their first byte; special ones are no part of a name.
#[derive(Default)]
pub(crate) struct Tokens(OnceLock<ByFirst>);

impl Tokens {
    fn by_first(&self, codec: &dyn Codec) -> &ByFirst {
        self.0.get_or_init(|| {
            let mut all = ByFirst::new();
            for token in (0..codec.vocab_size()).filter(|token| !codec.is_special(*token)) {
                let bytes = codec.token_bytes(token);
                if let Some(first) = bytes.first() {
                    all.entry(*first).or_default().push((token, bytes.into()));
                }
            }
            all
        })
    }
}

/// A function that may be called.
struct Function {
    /// Its name and what ends it.
    name: Vec<u8>,
    /// Its properties, each with what ends it; empty where they are not bound.
    properties: Vec<Vec<u8>>,
}

/// What names may come where.
struct Rule {
    codec: Arc<dyn Codec>,
    tokens: Arc<Tokens>,
    /// What stands before a function's name: as templates show it, and without the new line.
    openings: [&'static [u8]; 2],
    functions: Vec<Function>,
    /// Bytes of the longest mark or name.
    longest: usize,
}

const PARAMETER: &[u8] = b"<parameter=";
const PARAMETER_END: &[u8] = b"</parameter>";
const CALL_ENDS: [&[u8]; 2] = [b"</function>", b"</tool_call>"];
const ENDS_OF_GIVEN: [&[u8]; 2] = [b"</function>", b"\n</function>"];

/// Binds the names in calls of `tools`, function definitions in OpenAI's form, as `format` writes them; `None`
/// where the format or a name does not allow it.
pub(crate) fn bind(
    codec: &Arc<dyn Codec>,
    tokens: &Arc<Tokens>,
    format: Format,
    tools: &[Value],
    inner: Option<ConstraintFactory>,
) -> Option<ConstraintFactory> {
    let (openings, end): ([&'static [u8]; 2], u8) = match format {
        Format::Mimo => ([b"<tool_call>\n<function=", b"<tool_call><function="], b'>'),
        Format::Hermes => (
            [b"<tool_call>\n{\"name\": \"", b"<tool_call>{\"name\": \""],
            b'"',
        ),
        Format::Harmony => return None,
    };
    let function = |tool: &Value| {
        let function = &tool["function"];
        let properties = match format {
            Format::Mimo => properties(&function["parameters"]),
            _ => Vec::new(),
        };
        let name = ended(function["name"].as_str()?, end)?;
        Some(Function { name, properties })
    };
    let functions: Option<Vec<Function>> = tools.iter().map(function).collect();
    let functions = functions.filter(|all| !all.is_empty())?;
    let names = functions
        .iter()
        .flat_map(|f| f.properties.iter().chain([&f.name]));
    let longest = names.map(Vec::len).max().unwrap_or(0);
    let rule = Arc::new(Rule {
        codec: Arc::clone(codec),
        tokens: Arc::clone(tokens),
        openings,
        functions,
        longest: longest.max(openings[0].len()).max(PARAMETER_END.len()),
    });
    Some(Arc::new(move || {
        Box::new(Named {
            rule: Arc::clone(&rule),
            place: Place::default(),
            inner: inner.as_ref().map(|make| make()),
        })
    }))
}

/// A name and what ends it; `None` for one that would have to be escaped.
fn ended(name: &str, end: u8) -> Option<Vec<u8>> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
    let bytes = name.bytes();
    bytes
        .clone()
        .all(plain)
        .then(|| bytes.chain([end]).collect())
}

/// What parameters may be named; none where a schema lets them have other names too.
fn properties(parameters: &Value) -> Vec<Vec<u8>> {
    let open = |key: &str| parameters.get(key).is_some_and(|value| value != false);
    let names = parameters["properties"].as_object();
    let Some(names) = names.filter(|_| !open("additionalProperties") && !open("patternProperties"))
    else {
        return Vec::new();
    };
    let all: Option<_> = names.keys().map(|name| ended(name, b'>')).collect();
    all.unwrap_or_default()
}

/// Where in an answer its last byte stands.
#[derive(Clone, Default)]
struct Place {
    within: Within,
    /// The last bytes there, as many as tell what comes next.
    part: Vec<u8>,
    /// The function that is called.
    function: usize,
    /// Its properties that were given, by index.
    given: Vec<usize>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Within {
    /// No call.
    #[default]
    Text,
    /// A function's name.
    Name,
    /// A call, outside of its parameters.
    Call,
    /// A parameter's name.
    Parameter,
    /// A parameter's value.
    Value,
}

impl Place {
    fn enter(&mut self, within: Within) {
        self.within = within;
        self.part.clear();
    }

    fn push(&mut self, byte: u8, rule: &Rule) {
        self.part.push(byte);
        match self.within {
            Within::Text if rule.openings.iter().any(|open| self.part.ends_with(open)) => {
                self.enter(Within::Name);
            }
            Within::Name => self.name(rule),
            Within::Call if self.part.ends_with(PARAMETER) => self.enter(Within::Parameter),
            Within::Call if CALL_ENDS.iter().any(|end| self.part.ends_with(end)) => {
                self.enter(Within::Text);
            }
            Within::Parameter if byte == b'>' => {
                let properties = &rule.functions[self.function].properties;
                let given = properties.iter().position(|name| *name == self.part);
                self.given.extend(given);
                self.enter(Within::Value);
            }
            Within::Value if self.part.ends_with(PARAMETER_END) => self.enter(Within::Call),
            _ => {}
        }
        // No more than the longest mark that is looked for, or a name.
        let keep = self.part.len().min(rule.longest);
        self.part.drain(..self.part.len() - keep);
    }

    fn name(&mut self, rule: &Rule) {
        let ends = |function: &Function| function.name == self.part;
        if let Some(function) = rule.functions.iter().position(ends) {
            self.function = function;
            self.given.clear();
            let bound = !rule.functions[function].properties.is_empty();
            self.enter(if bound { Within::Call } else { Within::Text });
        } else if self.allowed(rule).is_empty() {
            self.enter(Within::Text);
        }
    }

    /// What may stand here, one of it as a whole; empty where anything may.
    fn allowed<'r>(&self, rule: &'r Rule) -> Vec<&'r [u8]> {
        let begins = |name: &&[u8]| name.starts_with(&self.part);
        match self.within {
            Within::Name => {
                let names = rule.functions.iter().map(|f| f.name.as_slice());
                names.filter(begins).collect()
            }
            Within::Parameter => {
                let properties = rule.functions[self.function].properties.iter();
                let left = properties
                    .enumerate()
                    .filter(|(i, _)| !self.given.contains(i));
                let names = left.map(|(_, name)| name.as_slice());
                names.filter(begins).collect()
            }
            // With all of them given, the call ends.
            Within::Call if self.given.len() == rule.functions[self.function].properties.len() => {
                ENDS_OF_GIVEN.into_iter().filter(begins).collect()
            }
            Within::Text | Within::Call | Within::Value => Vec::new(),
        }
    }
}

struct Named {
    rule: Arc<Rule>,
    place: Place,
    inner: Option<Box<dyn Constraint>>,
}

impl Rule {
    fn push(&self, place: &mut Place, token: TokenId) {
        for byte in self.codec.token_bytes(token) {
            place.push(byte, self);
        }
    }

    /// Leaves the tokens that go on with one of `names`, of which `begun` bytes are there, if there are any.
    fn narrow(&self, names: &[&[u8]], begun: usize, row: &mut [u32]) {
        let mut narrow = vec![0; row.len()];
        let tokens = self.tokens.by_first(&*self.codec);
        for name in names {
            let rest = &name[begun..];
            let fitting = rest.first().and_then(|first| tokens.get(first));
            for (token, bytes) in fitting.into_iter().flatten() {
                // A token may end the name and say more.
                let fits = rest.starts_with(bytes) || bytes.starts_with(rest);
                let word = *token as usize / 32;
                if fits && word < row.len() {
                    narrow[word] |= row[word] & 1 << (token % 32);
                }
            }
        }
        if narrow.iter().any(|word| *word != 0) {
            row.copy_from_slice(&narrow);
        }
    }
}

impl Constraint for Named {
    fn masks(&mut self, drafted: &[TokenId], masks: &mut [u32]) -> usize {
        let words = masks.len() / (drafted.len() + 1);
        let usable = match &mut self.inner {
            Some(inner) => inner.masks(drafted, masks),
            None => {
                masks.fill(u32::MAX);
                drafted.len() + 1
            }
        };
        let mut place = self.place.clone();
        for i in 0..usable {
            let row = &mut masks[i * words..(i + 1) * words];
            let names = place.allowed(&self.rule);
            if !names.is_empty() {
                self.rule.narrow(&names, place.part.len(), row);
            }
            let Some(token) = drafted.get(i) else {
                break;
            };
            let word = row.get(*token as usize / 32);
            if word.is_none_or(|word| word >> (token % 32) & 1 == 0) {
                return i + 1;
            }
            self.rule.push(&mut place, *token);
        }
        usable
    }

    fn commit(&mut self, tokens: &[TokenId]) {
        for token in tokens {
            self.rule.push(&mut self.place, *token);
        }
        if let Some(inner) = &mut self.inner {
            inner.commit(tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::ByteCodec;
    use serde_json::json;

    const VOCAB: u32 = 512;
    const WORDS: usize = VOCAB as usize / 32;

    fn tool(name: &str, properties: &[&str]) -> Value {
        let properties: serde_json::Map<String, Value> = properties
            .iter()
            .map(|p| ((*p).to_owned(), json!({})))
            .collect();
        json!({"function": {"name": name, "parameters": {"properties": properties}}})
    }

    fn start() -> Box<dyn Constraint> {
        let codec: Arc<dyn Codec> = Arc::new(ByteCodec { vocab_size: VOCAB });
        let made = bind(
            &codec,
            &Arc::default(),
            Format::Mimo,
            &[tool("get", &["place", "plan"]), tool("go.up", &[])],
            None,
        );
        made.unwrap()()
    }

    fn next(named: &mut dyn Constraint) -> Vec<u8> {
        let mut row = vec![0; WORDS];
        assert_eq!(named.masks(&[], &mut row), 1);
        let is = |byte: &u8| row[usize::from(*byte) / 32] >> (byte % 32) & 1 == 1;
        (0..=255).filter(is).collect()
    }

    fn tokens(text: &str) -> Vec<TokenId> {
        text.bytes().map(TokenId::from).collect()
    }

    #[test]
    fn a_call_names_a_function_that_there_is_and_the_rest_is_free() {
        let mut named = start();
        for (said, allowed) in [
            ("I call <tool_call>\n<function", 256),
            ("=", 1),
            ("g", 2),
            ("o", 1),
            (".up", 1),
            (">\n<parameter=NAME>", 256),
            ("<function=", 256),
        ] {
            named.commit(&tokens(said));
            assert_eq!(next(&mut *named).len(), allowed, "after {said}");
        }
        let mut named = start();
        named.commit(&tokens("<tool_call>\n<function="));
        assert_eq!(next(&mut *named), b"g");
    }

    #[test]
    fn parameters_are_those_of_the_function_each_once() {
        let mut named = start();
        for (said, allowed) in [
            ("<tool_call>\n<function=get>\n<parameter", 256),
            ("=", 1),
            ("pla", 2),
            ("ce", 1),
            (">", 256),
            ("x <parameter=", 256),
            ("</parameter>\n<parameter=", 1),
            ("plan>1</parameter>", 2),
            ("\n", 1),
            ("</", 1),
            ("function>\n</tool_call>", 256),
            ("<tool_call>\n<function=go.up>\n<parameter=", 256),
            ("</function>\n</tool_call>\n<tool_call><function=", 1),
            ("get><parameter=pl", 1),
        ] {
            named.commit(&tokens(said));
            assert_eq!(next(&mut *named).len(), allowed, "after {said}");
        }
    }

    #[test]
    fn schemas_that_let_other_names_in_leave_them_free() {
        let of = |more: Value| {
            let mut parameters = json!({"properties": {"a": {}}});
            parameters["additionalProperties"] = more;
            properties(&parameters).len()
        };
        assert_eq!(of(json!(false)), 1);
        assert_eq!((of(json!(true)), of(json!({"type": "string"}))), (0, 0));
        assert_eq!(properties(&json!({"properties": {"a b": {}}})).len(), 0);
    }

    #[test]
    fn drafts_are_cut_where_a_name_goes_wrong() {
        let mut named = start();
        named.commit(&tokens("<tool_call>\n<func"));
        for (draft, usable) in [("tion=NAME>", 6), ("tion=get>\nx", 12), ("tion=gex", 8)] {
            let draft = tokens(draft);
            let mut masks = vec![0; (draft.len() + 1) * WORDS];
            assert_eq!(named.masks(&draft, &mut masks), usable, "{draft:?}");
        }
    }

    #[test]
    fn names_that_need_escapes_and_other_formats_are_left_free() {
        let codec: Arc<dyn Codec> = Arc::new(ByteCodec { vocab_size: VOCAB });
        let bind = |format, name| {
            bind(&codec, &Arc::default(), format, &[tool(name, &[])], None).is_some()
        };
        assert!(bind(Format::Mimo, "a") && bind(Format::Hermes, "a-b_c.d"));
        assert!(!bind(Format::Hermes, "a\"b") && !bind(Format::Harmony, "a"));
    }
}
