//! The model's text side as the server needs it: tokens both ways, the chat template, the defaults
//! of a request, and which output format the model writes tool calls and reasoning in.
//!
//! Invariant: nothing here touches the engine; all of it may be used from any thread.

use crate::error::ServerError;
use crate::parse::Format;
use model::ModelError;
use model::TokenId;
use model::chat_template::{ChatTemplate, Conversation};
use model::detokenizer::{ByteTokens, Detokenizer};
use model::generation::GenerationDefaults;
use model::tokenizer::Tokenizer;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// Text to tokens and back. Implemented by the checkpoint's tokenizer, and by [`ByteCodec`].
pub trait Codec: Detokenizer {
    /// Tokens of a text; special tokens written out in it are recognised.
    ///
    /// # Errors
    /// What the tokenizer said.
    fn encode(&self, text: &str) -> Result<Vec<TokenId>, String>;
    /// Bytes of a token, the name of a special one.
    fn token_bytes(&self, token: TokenId) -> Vec<u8>;
    /// A control token, which is no text.
    fn is_special(&self, token: TokenId) -> bool;
    /// Size of the vocabulary.
    fn vocab_size(&self) -> u32;

    /// Text of several tokens, special ones left out.
    fn decode(&self, tokens: &[TokenId]) -> String {
        let mut bytes = Vec::new();
        tokens.iter().for_each(|t| self.append(*t, &mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Codec for Tokenizer {
    fn encode(&self, text: &str) -> Result<Vec<TokenId>, String> {
        Tokenizer::encode(self, text).map_err(|error| error.to_string())
    }

    fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        Tokenizer::token_bytes(self, token).to_vec()
    }

    fn is_special(&self, token: TokenId) -> bool {
        Tokenizer::is_special(self, token)
    }

    fn vocab_size(&self) -> u32 {
        Tokenizer::vocab_size(self)
    }
}

/// Bytes as tokens, for servers over a scripted decoder: token `t` is byte `t`; 256 ends a text.
#[derive(Clone, Copy, Debug)]
pub struct ByteCodec {
    /// Size of the vocabulary, more than [`ByteCodec::END`].
    pub vocab_size: u32,
}

impl ByteCodec {
    /// The end token.
    pub const END: TokenId = 256;
}

impl Detokenizer for ByteCodec {
    fn append(&self, token: TokenId, out: &mut Vec<u8>) {
        ByteTokens.append(token, out);
    }
}

impl Codec for ByteCodec {
    fn encode(&self, text: &str) -> Result<Vec<TokenId>, String> {
        Ok(text.bytes().map(TokenId::from).collect())
    }

    fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        match u8::try_from(token) {
            Ok(byte) => vec![byte],
            Err(_) => format!("<|{token}|>").into_bytes(),
        }
    }

    fn is_special(&self, token: TokenId) -> bool {
        token >= 256
    }

    fn vocab_size(&self) -> u32 {
        self.vocab_size
    }
}

/// A ChatML template for models that ship none.
const PLAIN_TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// See the module.
pub struct ModelText {
    codec: Arc<dyn Codec>,
    template: ChatTemplate,
    has_template: bool,
    template_reads_tools: bool,
    thinks: bool,
    /// What a request gets where it does not say.
    pub defaults: GenerationDefaults,
    /// How the model writes tool calls and reasoning.
    pub format: Format,
}

impl ModelText {
    /// Reads tokenizer, template and defaults from a checkpoint's directory.
    ///
    /// # Errors
    /// [`ServerError::File`].
    pub fn open(dir: &Path, vocab_size: u32) -> Result<Self, ServerError> {
        let refuse = |error: ModelError| ServerError::File {
            path: dir.to_owned(),
            message: error.to_string(),
        };
        let tokenizer = Tokenizer::open(dir, vocab_size).map_err(refuse)?;
        let defaults = GenerationDefaults::open(dir, vocab_size).map_err(refuse)?;
        let template = ChatTemplate::open(dir).map_err(refuse)?;
        let source = template_source(dir);
        Self::new(Arc::new(tokenizer), template, &source, defaults)
    }

    /// Puts parts together. `source` is the template's text, to recognise the model's formats.
    ///
    /// # Errors
    /// Never, as long as the built-in template compiles.
    pub fn new(
        codec: Arc<dyn Codec>,
        template: Option<ChatTemplate>,
        source: &str,
        defaults: GenerationDefaults,
    ) -> Result<Self, ServerError> {
        let has_template = template.is_some();
        let template = match template {
            Some(template) => template,
            None => ChatTemplate::new(PLAIN_TEMPLATE).map_err(|error| ServerError::Setting {
                name: "chat template",
                message: error.to_string(),
            })?,
        };
        Ok(Self {
            codec,
            template,
            has_template,
            template_reads_tools: source.contains("tools"),
            thinks: source.contains("<think>") || source.contains("enable_thinking"),
            defaults,
            format: Format::of_template(source),
        })
    }

    /// A model without files: bytes as tokens, ChatML. For scripted decoders.
    ///
    /// # Errors
    /// As [`ModelText::new`].
    pub fn bytes(vocab_size: u32) -> Result<Self, ServerError> {
        let defaults = GenerationDefaults {
            eos_ids: vec![ByteCodec::END],
            ..GenerationDefaults::default()
        };
        Self::new(Arc::new(ByteCodec { vocab_size }), None, "", defaults)
    }

    /// Tokens both ways.
    #[must_use]
    pub fn codec(&self) -> &Arc<dyn Codec> {
        &self.codec
    }

    /// Whether the checkpoint ships a template.
    #[must_use]
    pub fn has_template(&self) -> bool {
        self.has_template
    }

    /// Whether the template knows of thinking.
    #[must_use]
    pub fn thinks(&self) -> bool {
        self.thinks
    }

    /// What the engine turns tokens into bytes with: for models whose markers are special tokens
    /// (gpt-oss) these come out as text, because the parser needs them.
    #[must_use]
    pub fn detokenizer(&self) -> Arc<dyn Detokenizer> {
        match self.format {
            Format::Harmony => Arc::new(Visible(Arc::clone(&self.codec))),
            _ => Arc::new(Plain(Arc::clone(&self.codec))),
        }
    }

    /// The prompt of a conversation.
    ///
    /// # Errors
    /// The template's own message.
    pub fn render(
        &self,
        messages: &[Value],
        tools: &[Value],
        variables: &[(String, Value)],
    ) -> Result<String, String> {
        let described;
        let (messages, tools) = match tools.is_empty() || self.template_reads_tools {
            true => (messages, tools),
            false => {
                described = with_tools(messages, tools);
                (described.as_slice(), [].as_slice())
            }
        };
        let conversation = Conversation {
            messages,
            tools,
            add_generation_prompt: true,
            variables,
        };
        self.template
            .render(&conversation)
            .map_err(|error| error.to_string())
    }
}

/// For templates that know no tools: describes them in the system message, in Hermes' form.
fn with_tools(messages: &[Value], tools: &[Value]) -> Vec<Value> {
    let list: Vec<String> = tools.iter().map(Value::to_string).collect();
    let text = format!(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\
         <tools>\n{}\n</tools>\n\nFor each function call, return a JSON object within \
         <tool_call></tool_call> tags:\n<tool_call>\n{{\"name\": <function-name>, \"arguments\": \
         <args-json-object>}}\n</tool_call>",
        list.join("\n")
    );
    let mut messages = messages.to_vec();
    for message in &mut messages {
        flatten_tool_turn(message);
    }
    match messages.first_mut() {
        Some(first) if first["role"] == "system" => {
            let own = first["content"].as_str().unwrap_or_default();
            first["content"] = format!("{own}\n\n{text}").into();
        }
        _ => messages.insert(0, json!({"role": "system", "content": text})),
    }
    messages
}

/// Tool calls and results as text, for templates that print only `content`.
fn flatten_tool_turn(message: &mut Value) {
    if message["role"] == "tool" {
        let text = message["content"].as_str().unwrap_or_default();
        *message = json!({"role": "user",
            "content": format!("<tool_response>\n{text}\n</tool_response>")});
    }
    let Some(calls) = message.get("tool_calls").and_then(Value::as_array) else {
        return;
    };
    let mut text = message["content"].as_str().unwrap_or_default().to_owned();
    for call in calls {
        let call = json!({"name": call["function"]["name"],
            "arguments": call["function"]["arguments"]});
        text.push_str(&format!("\n<tool_call>\n{call}\n</tool_call>"));
    }
    message["content"] = text.trim_start().into();
}

/// The template's text, empty when there is none: to look for words in it, nothing else.
fn template_source(dir: &Path) -> String {
    let read = |name| std::fs::read_to_string(dir.join(name)).ok();
    if let Some(source) = read("chat_template.jinja") {
        return source;
    }
    let config = read("tokenizer_config.json").and_then(|t| serde_json::from_str(&t).ok());
    let template = |config: Value| Some(config.get("chat_template")?.to_string());
    config.and_then(template).unwrap_or_default()
}

struct Plain(Arc<dyn Codec>);

impl Detokenizer for Plain {
    fn append(&self, token: TokenId, out: &mut Vec<u8>) {
        self.0.append(token, out);
    }
}

struct Visible(Arc<dyn Codec>);

impl Detokenizer for Visible {
    fn append(&self, token: TokenId, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0.token_bytes(token));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_reach_a_template_that_knows_none() {
        let text = ModelText::bytes(512).unwrap();
        let tools = [json!({"type": "function", "function": {"name": "clock"}})];
        let messages = [json!({"role": "user", "content": "hi"})];
        let prompt = text.render(&messages, &tools, &[]).unwrap();
        assert!(
            prompt.starts_with("<|im_start|>system\n# Tools"),
            "{prompt}"
        );
        assert!(prompt.contains("clock") && prompt.ends_with("<|im_start|>assistant\n"));
    }
}
