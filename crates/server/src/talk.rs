//! A conversation in one form, whatever protocol it came in: messages for the template, tools,
//! what is forced on the answer.
//!
//! Text only: images, audio and files are refused by name.

use crate::calls;
use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::grammar::Grammar;
use crate::limits::Limits;
use crate::parse::Format;
use serde_json::{Map, Value, json};

/// Which tools an answer may or must call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// As the model likes.
    #[default]
    Auto,
    /// None.
    None,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Talk {
    /// As the template expects them.
    pub(crate) messages: Vec<Value>,
    /// In OpenAI's form.
    pub(crate) tools: Vec<Value>,
    pub(crate) choice: ToolChoice,
    /// One call at most.
    pub(crate) single_call: bool,
    /// For the template, such as `enable_thinking`.
    pub(crate) variables: Vec<(String, Value)>,
    /// Most tokens of thinking.
    pub(crate) thinking_budget: Option<u32>,
    /// What the answer must look like.
    pub(crate) grammar: Option<Grammar>,
}

impl Talk {
    /// Reads `messages`, `tools`, `tool_choice` and what steers thinking and form, in OpenAI's form.
    pub(crate) fn read(fields: &mut Fields, limits: &Limits) -> Result<Self, ApiError> {
        let messages = fields.list("messages")?;
        let messages = messages.ok_or_else(|| fields.missing("messages"))?;
        if messages.is_empty() {
            return Err(ApiError::invalid(
                "messages",
                "messages: at least one is needed",
            ));
        }
        Limits::count("messages", messages.len(), limits.messages)?;
        let mut talk = Self::default();
        for (i, message) in messages.into_iter().enumerate() {
            talk.messages
                .push(read_message(message, &format!("messages[{i}]"))?);
        }
        talk.tools = read_tools(fields, limits)?;
        talk.choice = read_choice(fields, &talk.tools)?;
        talk.single_call = fields.bool("parallel_tool_calls")? == Some(false);
        talk.read_thinking(fields)?;
        talk.grammar = read_grammar(fields, limits)?;
        Ok(talk)
    }

    /// Four spellings of the same wish: `chat_template_kwargs`, `enable_thinking`, `thinking`,
    /// `reasoning_effort`; and the budget.
    pub(crate) fn read_thinking(&mut self, fields: &mut Fields) -> Result<(), ApiError> {
        let mut enable = fields.bool("enable_thinking")?;
        if let Some(effort) = fields.string("reasoning_effort")? {
            enable = enable.or(Some(effort != "none" && effort != "minimal"));
            self.set("reasoning_effort", effort.into());
        }
        if let Some(mut thinking) = fields.object("thinking")? {
            let kind = thinking.string("type")?;
            enable = enable.or(kind.map(|kind| kind != "disabled"));
            self.thinking_budget = thinking.count("budget_tokens", 0)?;
        }
        let budget = fields.count("thinking_token_budget", 0)?;
        self.thinking_budget = budget.or(self.thinking_budget);
        if let Some(enable) = enable {
            self.set("enable_thinking", enable.into());
        }
        self.read_kwargs(fields)
    }

    /// Variables of the template, as the client names them.
    fn read_kwargs(&mut self, fields: &mut Fields) -> Result<(), ApiError> {
        match fields.take("chat_template_kwargs") {
            None => {}
            Some(Value::Object(map)) => {
                for (name, value) in map {
                    // What the server itself decides is not for clients to change.
                    if !matches!(
                        name.as_str(),
                        "messages" | "tools" | "add_generation_prompt"
                    ) {
                        self.set(&name, value);
                    }
                }
            }
            Some(other) => return Err(wrong("chat_template_kwargs", "an object", &other)),
        }
        Ok(())
    }

    fn set(&mut self, name: &str, value: Value) {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value));
    }

    /// Tools the model is told of.
    pub(crate) fn visible_tools(&self) -> &[Value] {
        match self.choice {
            ToolChoice::None => &[],
            _ => &self.tools,
        }
    }

    /// What binds the answer: the format asked for, the call that has to be made, or strict tools.
    pub(crate) fn bound(&self, format: Format) -> Result<Option<Grammar>, ApiError> {
        let tools: Vec<&Value> = match &self.choice {
            ToolChoice::None => return Ok(self.grammar.clone()),
            ToolChoice::Auto => {
                let strict = || calls::strict(format, &self.tools, self.single_call);
                return Ok(self.grammar.clone().or_else(strict));
            }
            ToolChoice::Required => self.tools.iter().collect(),
            ToolChoice::Named(name) => {
                let named = |tool: &&Value| tool["function"]["name"] == name.as_str();
                self.tools.iter().filter(named).collect()
            }
        };
        calls::forced(format, &tools, self.single_call).map(Some)
    }
}

fn read_message(message: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(message, path)?;
    let role = fields.required_string("role")?;
    let mut out = Map::new();
    let content = fields.take("content");
    let text = match content {
        None => None,
        Some(value) => Some(flatten(value, &fields.path("content"))?),
    };
    let known = match role.as_str() {
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => role.as_str(),
        "function" => "tool",
        _ => {
            let path = fields.path("role");
            let message = format!("{path}: expected system, developer, user, assistant or tool");
            return Err(ApiError::invalid(path, message));
        }
    };
    out.insert("role".to_owned(), known.into());
    if text.is_none() && known != "assistant" {
        return Err(fields.missing("content"));
    }
    out.insert("content".to_owned(), text.unwrap_or_default().into());
    let thought = fields.string("reasoning_content")?;
    if let Some(thought) = thought.or(fields.string("reasoning")?) {
        out.insert("reasoning_content".to_owned(), thought.into());
    }
    for name in ["name", "tool_call_id"] {
        if let Some(text) = fields.string(name)? {
            out.insert(name.to_owned(), text.into());
        }
    }
    if let Some(calls) = fields.list("tool_calls")? {
        let path = fields.path("tool_calls");
        let read = |(i, call)| read_call(call, &format!("{path}[{i}]"));
        let calls: Vec<Value> = calls
            .into_iter()
            .enumerate()
            .map(read)
            .collect::<Result<_, _>>()?;
        if !calls.is_empty() {
            out.insert("tool_calls".to_owned(), calls.into());
        }
    }
    Ok(out.into())
}

/// A call of an earlier turn; templates want the arguments as an object.
fn read_call(call: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(call, path)?;
    let id = fields.string("id")?;
    let mut function = fields
        .object("function")?
        .ok_or_else(|| fields.missing("function"))?;
    let name = function.required_string("name")?;
    let arguments = match function.take("arguments") {
        Some(Value::String(text)) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        Some(other) => other,
        None => json!({}),
    };
    Ok(json!({"id": id, "type": "function",
        "function": {"name": name, "arguments": arguments}}))
}

/// A text, or a list of text parts.
pub(crate) fn flatten(content: Value, path: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong(path, "a string or a list of parts", &other)),
    };
    let mut text = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{i}]");
        let mut fields = Fields::of(part, &path)?;
        let kind = fields.required_string("type")?;
        match kind.as_str() {
            "text" | "input_text" | "output_text" => {
                text.push_str(&fields.required_string("text")?);
            }
            "refusal" => text.push_str(&fields.required_string("refusal")?),
            "reasoning" | "thinking" => {}
            other => {
                let message =
                    format!("{path}: `{other}` is not served; this server takes text only");
                return Err(ApiError::invalid(path, message));
            }
        }
    }
    Ok(text)
}

fn read_tools(fields: &mut Fields, limits: &Limits) -> Result<Vec<Value>, ApiError> {
    let list = fields.list("tools")?.unwrap_or_default();
    Limits::count("tools", list.len(), limits.tools)?;
    let mut tools = Vec::with_capacity(list.len());
    for (i, tool) in list.into_iter().enumerate() {
        tools.push(check_tool(tool, &format!("tools[{i}]"), limits)?);
    }
    Ok(tools)
}

/// A function definition in OpenAI's form, unchanged when it is well formed.
pub(crate) fn check_tool(tool: Value, path: &str, limits: &Limits) -> Result<Value, ApiError> {
    let mut fields = Fields::of(tool.clone(), path)?;
    if fields
        .string("type")?
        .is_some_and(|kind| kind != "function")
    {
        let path = fields.path("type");
        let message = format!("{path}: only `function` is served");
        return Err(ApiError::invalid(path, message));
    }
    let mut function = fields
        .object("function")?
        .ok_or_else(|| fields.missing("function"))?;
    let name = function.required_string("name")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.len() > 128 || !name.chars().all(plain) {
        let path = function.path("name");
        let message = format!("{path}: 1 to 128 letters, digits, `_`, `-` and `.` are expected");
        return Err(ApiError::invalid(path, message));
    }
    if let Some(parameters) = function.take("parameters") {
        let path = function.path("parameters");
        if !parameters.is_object() {
            return Err(wrong(&path, "an object", &parameters));
        }
        limits.schema(&path, parameters.to_string().len())?;
    }
    Ok(tool)
}

fn read_choice(fields: &mut Fields, tools: &[Value]) -> Result<ToolChoice, ApiError> {
    let choice = match fields.take("tool_choice") {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" | "any" => ToolChoice::Required,
            _ => {
                let message = "tool_choice: expected auto, none, required or a function";
                return Err(ApiError::invalid("tool_choice", message));
            }
        },
        Some(named) => {
            let name = named["function"]["name"]
                .as_str()
                .or(named["name"].as_str());
            let name = name.ok_or_else(|| wrong("tool_choice", "a function's name", &named))?;
            ToolChoice::Named(name.to_owned())
        }
    };
    check_choice(choice, tools)
}

/// Refuses a choice that the tools cannot meet.
pub(crate) fn check_choice(choice: ToolChoice, tools: &[Value]) -> Result<ToolChoice, ApiError> {
    let met = match &choice {
        ToolChoice::Auto | ToolChoice::None => true,
        ToolChoice::Required => !tools.is_empty(),
        ToolChoice::Named(name) => tools.iter().any(|t| t["function"]["name"] == name.as_str()),
    };
    match met {
        true => Ok(choice),
        false => Err(ApiError::invalid(
            "tool_choice",
            "tool_choice: no such tool is defined",
        )),
    }
}

/// `response_format`, or vLLM's `structured_outputs` and older `guided_*`.
pub(crate) fn read_grammar(
    fields: &mut Fields,
    limits: &Limits,
) -> Result<Option<Grammar>, ApiError> {
    let mut found = Vec::new();
    if let Some(mut format) = fields.object("response_format")? {
        found.extend(response_format(&mut format)?);
    }
    if let Some(mut outputs) = fields.object("structured_outputs")? {
        found.extend(forms(&mut outputs, ["json", "regex", "choice", "grammar"])?);
    }
    let older = [
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
    ];
    found.extend(forms(fields, older)?);
    if found.len() > 1 {
        let message = "only one form can be asked for";
        return Err(ApiError::invalid("response_format", message));
    }
    let grammar = found.pop();
    if let Some(grammar) = &grammar {
        limits.schema("response_format", grammar.bytes())?;
    }
    Ok(grammar)
}

fn response_format(format: &mut Fields) -> Result<Option<Grammar>, ApiError> {
    Ok(match format.required_string("type")?.as_str() {
        "text" => None,
        "json_object" => Some(Grammar::any_object()),
        "json_schema" => {
            let mut inner = match format.has("json_schema") {
                true => format.object("json_schema")?,
                false => None,
            };
            let source = inner.as_mut().unwrap_or(format);
            let schema = source.take("schema");
            Some(Grammar::Schema(
                schema.ok_or_else(|| source.missing("schema"))?,
            ))
        }
        "regex" => Some(Grammar::Regex(format.required_string("pattern")?)),
        "lark" | "grammar" => Some(Grammar::Lark(format.required_string("grammar")?)),
        other => {
            let path = format.path("type");
            let message =
                format!("{path}: `{other}` is not text, json_object, json_schema, regex or lark");
            return Err(ApiError::invalid(path, message));
        }
    })
}

fn forms(fields: &mut Fields, names: [&str; 4]) -> Result<Vec<Grammar>, ApiError> {
    let [json, regex, choice, lark] = names;
    let mut found = Vec::new();
    match fields.take(json) {
        None => {}
        Some(Value::String(text)) => {
            let schema = serde_json::from_str(&text);
            let wrong = |e| ApiError::invalid(json, format!("{json}: not a JSON schema: {e}"));
            found.push(Grammar::Schema(schema.map_err(wrong)?));
        }
        Some(schema) => found.push(Grammar::Schema(schema)),
    }
    found.extend(fields.string(regex)?.map(Grammar::Regex));
    if let Some(options) = fields.list(choice)? {
        let texts: Option<Vec<String>> = options
            .iter()
            .map(|o| Some(o.as_str()?.to_owned()))
            .collect();
        let texts = texts.filter(|texts| !texts.is_empty());
        let wrong = || ApiError::invalid(choice, format!("{choice}: expected a list of strings"));
        found.push(Grammar::choice(&texts.ok_or_else(wrong)?));
    }
    found.extend(fields.string(lark)?.map(Grammar::Lark));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Talk, ApiError> {
        Talk::read(&mut Fields::of_body(body).unwrap(), &Limits::default())
    }

    fn refused(body: Value) -> String {
        read(body).map(|_| ()).unwrap_err().param.unwrap()
    }

    #[test]
    fn parts_are_joined_and_images_refused_by_name() {
        let talk = read(json!({"messages": [{"role": "developer", "content": [
            {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}));
        assert_eq!(
            talk.unwrap().messages,
            [json!({"role": "system", "content": "ab"})]
        );
        let image = json!({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "x"}}]}]});
        assert_eq!(refused(image), "messages[0].content[0]");
    }

    #[test]
    fn arguments_of_earlier_calls_become_objects() {
        let talk = read(
            json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]}]}),
        );
        let arguments = &talk.unwrap().messages[0]["tool_calls"][0]["function"]["arguments"];
        assert_eq!(*arguments, json!({"a": 1}));
    }

    #[test]
    fn four_spellings_of_thinking() {
        for (name, value, expected) in [
            ("enable_thinking", json!(false), false),
            ("reasoning_effort", json!("none"), false),
            ("reasoning_effort", json!("high"), true),
            ("thinking", json!({"type": "disabled"}), false),
            (
                "chat_template_kwargs",
                json!({"enable_thinking": true}),
                true,
            ),
        ] {
            let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
            body[name] = value;
            let talk = read(body).unwrap();
            let found = talk.variables.iter().find(|(n, _)| n == "enable_thinking");
            assert_eq!(found.unwrap().1, json!(expected), "{name}");
        }
    }

    #[test]
    fn limits_of_messages_tools_and_schemas() {
        let message = json!({"role": "user", "content": "x"});
        assert!(read(json!({"messages": vec![message.clone(); 10_000]})).is_ok());
        assert_eq!(
            refused(json!({"messages": vec![message.clone(); 10_001]})),
            "messages"
        );
        let tool = json!({"type": "function", "function": {"name": "f"}});
        let tools = |n| json!({"messages": [message.clone()], "tools": vec![tool.clone(); n]});
        assert!(read(tools(128)).is_ok());
        assert_eq!(refused(tools(129)), "tools");
        let schema = |n: usize| {
            let bytes = json!({"x": ""}).to_string().len();
            json!({"messages": [message.clone()], "response_format":
                {"type": "json_schema", "json_schema": {"schema": {"x": "y".repeat(n - bytes)}}}})
        };
        assert!(read(schema(256 << 10)).is_ok());
        assert_eq!(refused(schema((256 << 10) + 1)), "response_format");
    }

    #[test]
    fn a_choice_needs_its_tool() {
        let body =
            json!({"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"});
        assert_eq!(refused(body), "tool_choice");
    }
}
