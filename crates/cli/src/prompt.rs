//! From what the user gave to tokens: text, a file or standard input, through the chat template.

use std::io::{IsTerminal, Read};
use std::path::Path;

use anyhow::{Context, Result};
use model::chat_template::{ChatTemplate, Conversation};
use serde_json::{Value, json};

use crate::args::TemplateArgs;
use crate::failure::bad_input;

/// Prompts above this are refused before they are read: a million tokens take a few megabytes.
const PROMPT_BYTES_MAX: u64 = 64 << 20;

/// The text of a prompt.
///
/// # Errors
/// [`crate::failure::BadInput`]: no prompt, an empty one, a file that is not text.
pub(crate) fn text(prompt: Option<&str>, file: Option<&Path>) -> Result<String> {
    let text = match (prompt, file) {
        (Some("-"), _) => read("standard input", std::io::stdin())?,
        (Some(prompt), _) => prompt.to_owned(),
        (None, Some(path)) if path == Path::new("-") => read("standard input", std::io::stdin())?,
        (None, Some(path)) => open(path)?,
        (None, None) if std::io::stdin().is_terminal() => {
            return bad_input("no prompt: give one, or --file, or --token-ids, or standard input");
        }
        (None, None) => read("standard input", std::io::stdin())?,
    };
    if text.trim().is_empty() {
        return bad_input("empty prompt: expected text");
    }
    Ok(text)
}

fn open(path: &Path) -> Result<String> {
    match std::fs::File::open(path) {
        Ok(file) => read(&path.display().to_string(), file),
        Err(error) => bad_input(format!("{}: cannot open: {error}", path.display())),
    }
}

fn read(name: &str, from: impl Read) -> Result<String> {
    let mut bytes = Vec::new();
    if let Err(error) = from.take(PROMPT_BYTES_MAX + 1).read_to_end(&mut bytes) {
        return bad_input(format!("{name}: cannot read: {error}"));
    }
    if bytes.len() as u64 > PROMPT_BYTES_MAX {
        return bad_input(format!("{name}: expected at most {PROMPT_BYTES_MAX} bytes"));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            let byte = error.as_bytes()[at];
            bad_input(format!(
                "{name}: expected UTF-8 text, found byte 0x{byte:02x} at {at}"
            ))
        }
    }
}

/// The template to use: the file given, else the checkpoint's.
pub(crate) fn template(args: &TemplateArgs, dir: &Path) -> Result<Option<ChatTemplate>> {
    let Some(path) = &args.chat_template else {
        return Ok(ChatTemplate::open(dir)?);
    };
    let source = open(path)?;
    let template = ChatTemplate::new(&source).with_context(|| path.display().to_string())?;
    Ok(Some(template))
}

/// Renders a conversation up to the point where the assistant answers.
pub(crate) fn render(
    template: &ChatTemplate,
    args: &TemplateArgs,
    messages: &[Value],
) -> Result<String> {
    let variables: Vec<(String, Value)> = match &args.chat_template_kwargs {
        Some(map) => map
            .iter()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
        None => Vec::new(),
    };
    let conversation = Conversation {
        messages,
        tools: &[],
        add_generation_prompt: true,
        variables: &variables,
    };
    Ok(template.render(&conversation)?)
}

/// A message of a conversation.
pub(crate) fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// The messages before the first turn: the system message, where there is one.
pub(crate) fn opening(args: &TemplateArgs) -> Vec<Value> {
    args.system
        .iter()
        .map(|text| message("system", text))
        .collect()
}
