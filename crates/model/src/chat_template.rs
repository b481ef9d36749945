//! Renders the conversation template that a checkpoint ships, byte for byte as Hugging Face's
//! `apply_chat_template` does: Jinja with trimmed blocks, Python's methods, Python's way of printing
//! values, and JSON as `json.dumps` writes it (minijinja's own `tojson` escapes HTML).
//!
//! Refuses: files above [`TEMPLATE_BYTES_MAX`], and templates that run longer than [`FUEL`]
//! instructions. Invariant: rendering reads nothing but its inputs and, through `strftime_now`, the
//! clock.
//!
//! Known difference: `~` and `join` print fractional numbers as Rust does (1e16, not 1e+16).

mod python;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde_json::Value as Json;

use crate::error::{self, ModelError};

/// Released templates are under 20 KB.
pub const TEMPLATE_BYTES_MAX: u64 = 1 << 20;
/// Instructions a rendering may take; a conversation of 10,000 turns takes about a tenth.
const FUEL: u64 = 50_000_000;

const NAME: &str = "chat_template";

/// What is rendered.
#[derive(Clone, Debug, Default)]
pub struct Conversation<'a> {
    /// Objects with `role`, `content` and whatever else the template knows.
    pub messages: &'a [Json],
    /// Function definitions in OpenAI's form; empty is the same as none.
    pub tools: &'a [Json],
    /// Ends with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Further variables, such as `enable_thinking`. They win over the ones above.
    pub variables: &'a [(String, Json)],
}

/// A compiled template with its special tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`, from a
    /// checkpoint's directory. `None` when it has neither: a base model.
    ///
    /// # Errors
    /// [`ModelError`] when a file cannot be read, or the template does not compile.
    pub fn open(dir: &Path) -> Result<Option<Self>, ModelError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = match error::read_text_if_there(&config_path, error::TEXT_JSON_BYTES_MAX)? {
            Some(text) => error::parse_object(&config_path, &text)?,
            None => serde_json::Map::new(),
        };
        let path = dir.join("chat_template.jinja");
        let (path, source) = match error::read_text_if_there(&path, TEMPLATE_BYTES_MAX)? {
            Some(source) => (path, Some(source)),
            None => (config_path, template_of(&config)),
        };
        let Some(source) = source else {
            return Ok(None);
        };
        let mut template = Self::new(&source).map_err(|error| match error {
            ModelError::Template { message } => ModelError::File {
                path: path.clone(),
                message: format!("chat template: {message}"),
            },
            other => other,
        })?;
        template.special_tokens = special_tokens(&config);
        Ok(Some(template))
    }

    /// Compiles a template.
    ///
    /// # Errors
    /// [`ModelError::Template`].
    pub fn new(source: &str) -> Result<Self, ModelError> {
        if source.len() as u64 > TEMPLATE_BYTES_MAX {
            let message = format!("{} bytes, at most {TEMPLATE_BYTES_MAX}", source.len());
            return Err(ModelError::Template { message });
        }
        let mut environment = environment().map_err(|e| failed(&e))?;
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|e| failed(&e))?;
        Ok(Self {
            environment,
            special_tokens: Vec::new(),
        })
    }

    /// Sets variables such as `bos_token`, which templates print.
    pub fn set_special_tokens(&mut self, tokens: Vec<(String, String)>) {
        self.special_tokens = tokens;
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// [`ModelError::Template`]: the template raised an exception (its own message is in the error),
    /// used what is not there, or ran too long.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, ModelError> {
        let variables = Value::from_pairs(self.variables(conversation));
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|e| failed(&e))?;
        // The library panics on some expressions, `[][::-1]` among them (minijinja 3.0.5).
        match catch_unwind(AssertUnwindSafe(|| template.render(variables))) {
            Ok(rendered) => rendered.map_err(|e| failed(&e)),
            Err(_) => Err(ModelError::Template {
                message: "an expression that cannot be evaluated, such as a slice of an empty list"
                    .to_owned(),
            }),
        }
    }

    fn variables(&self, conversation: &Conversation<'_>) -> Vec<(String, Value)> {
        let special = self.special_tokens.iter();
        let mut variables: Vec<(String, Value)> = special
            .map(|(name, token)| (name.clone(), Value::from(token.as_str())))
            .collect();
        let tools = match conversation.tools {
            [] => Value::from(()),
            tools => list(tools),
        };
        variables.push(("messages".to_owned(), list(conversation.messages)));
        variables.push(("tools".to_owned(), tools));
        variables.push(("documents".to_owned(), Value::from(())));
        let add = conversation.add_generation_prompt.into();
        variables.push(("add_generation_prompt".to_owned(), add));
        for (name, value) in conversation.variables {
            variables.push((name.clone(), from_json(value)));
        }
        variables
    }
}

fn list(values: &[Json]) -> Value {
    values.iter().map(from_json).collect()
}

fn from_json(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(values) => list(values),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), from_json(v)))),
    }
}

fn failed(error: &Error) -> ModelError {
    let line = error
        .line()
        .map_or_else(String::new, |line| format!(" (line {line})"));
    let text = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    let message = text.replace(['\n', '\r'], " ") + &line;
    ModelError::Template { message }
}

fn environment() -> Result<Environment<'static>, Error> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _, value| {
        out.write_str(&python::text(value))
            .map_err(|_| Error::new(ErrorKind::WriteFailure, "out of room"))
    });
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| python::text(value));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    Ok(environment)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Local time, as `datetime.now().strftime(format)`.
fn strftime_now(format: &str) -> Result<String, Error> {
    use chrono::format::{Item, StrftimeItems};
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if items.iter().any(|item| matches!(item, Item::Error)) {
        let message = format!("strftime_now: `{format}` is not a time format");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(chrono::Local::now()
        .format_with_items(items.iter())
        .to_string())
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)` with Hugging Face's defaults.
fn to_json(value: &Value, arguments: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match arguments.get(index) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let mut layout = python::JsonLayout::default();
    layout.ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    if let Some(indent) = argument(1, "indent")? {
        layout.set_indent(&indent)?;
    }
    if let Some(separators) = argument(2, "separators")? {
        let texts: Vec<Value> = separators.try_iter()?.collect();
        let [item, key] = texts.as_slice() else {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators are two texts",
            ));
        };
        (layout.item_separator, layout.key_separator) = (python::text(item), python::text(key));
    }
    layout.sort_keys = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    Ok(Value::from_safe_string(layout.dumps(value)?))
}

/// Hugging Face marks the assistant's part with `{% generation %}`, which does nothing when
/// rendering: `{% if true %}` handles the whitespace around it in the same way.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let tag = &rest[start..start + length];
        let word = tag.trim_matches(|c: char| "{%-+".contains(c) || c.is_whitespace());
        out.push_str(&rest[..start]);
        match word {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[start + length..];
    }
    out + rest
}

/// The template of tokenizer_config.json: a text, or a list of named ones.
fn template_of(config: &serde_json::Map<String, Json>) -> Option<String> {
    match config.get("chat_template")? {
        Json::String(source) => Some(source.clone()),
        Json::Array(named) => {
            let is_default =
                |entry: &&Json| entry.get("name").and_then(Json::as_str) == Some("default");
            let entry = named.iter().find(is_default).or_else(|| named.first())?;
            entry.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// Every `*_token`: a text, or an object with its `content`.
fn special_tokens(config: &serde_json::Map<String, Json>) -> Vec<(String, String)> {
    let text = |value: &Json| {
        value
            .as_str()
            .or_else(|| value.get("content")?.as_str())
            .map(str::to_owned)
    };
    let named = config.iter().filter(|(name, _)| name.ends_with("_token"));
    named
        .filter_map(|(name, value)| Some((name.clone(), text(value)?)))
        .collect()
}

/// True for values that Python prints with brackets.
fn is_container(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map
    )
}

#[cfg(test)]
mod tests;
