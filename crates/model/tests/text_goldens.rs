//! Chat templates and tokenizers against what transformers and tokenizers (Python) gave for the same
//! input: see goldens/README.md.

use std::path::{Path, PathBuf};

use model::chat_template::{ChatTemplate, Conversation};
use model::tokenizer::Tokenizer;
use serde_json::Value;

fn workspace(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

fn golden(name: &str) -> String {
    let path = workspace("goldens/tokenizer").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn cases(name: &str) -> Vec<Value> {
    serde_json::from_str(&golden(name)).unwrap()
}

fn check_template(name: &str) {
    let template = ChatTemplate::new(&golden(&format!("{name}_chat_template.jinja"))).unwrap();
    for case in cases(&format!("{name}_chat_cases.json")) {
        let list = |key: &str| case[key].as_array().cloned().unwrap_or_default();
        let (messages, tools) = (list("messages"), list("tools"));
        let kwargs = case["kwargs"].as_object().unwrap();
        let variables: Vec<(String, Value)> = kwargs
            .iter()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        let conversation = Conversation {
            messages: &messages,
            tools: &tools,
            add_generation_prompt: false,
            variables: &variables,
        };
        let rendered = template.render(&conversation);
        match case["expected"].as_str() {
            Some(expected) => assert_eq!(rendered.unwrap(), expected, "{name}: {}", case["name"]),
            None => {
                let wanted = case["expected_error"].as_str().unwrap();
                let message = rendered.unwrap_err().to_string();
                assert!(
                    message.contains(wanted),
                    "{name}: {}: {message}",
                    case["name"]
                );
            }
        }
    }
}

#[test]
fn mimo_template() {
    check_template("mimo");
}

#[test]
fn smollm2_template() {
    check_template("smollm2");
}

#[test]
fn json_and_whitespace_template() {
    check_template("json");
}

fn check_tokens(tokenizer: &Tokenizer, name: &str) {
    for case in cases(name) {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = case["ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as u32)
            .collect();
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| tokenizer.token_bytes(id).to_vec())
            .collect();
        assert_eq!(
            String::from_utf8_lossy(&bytes),
            case["decoded"].as_str().unwrap(),
            "{text:?}"
        );
    }
}

#[test]
fn mimo_tokens() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("tokenizer.json"),
        golden("mimo_subset_tokenizer.json"),
    )
    .unwrap();
    check_tokens(
        &Tokenizer::open(dir.path(), 152_576).unwrap(),
        "mimo_token_cases.json",
    );
}

/// The tokenizer that `xtask make-mini` rebuilt, against the one the oracle rebuilt on its own.
#[test]
fn tokens_of_the_shipped_model() {
    let tokenizer = Tokenizer::open(&workspace("models/kilotok-mini"), 49_152).unwrap();
    check_tokens(&tokenizer, "smollm2_token_cases.json");
}

/// The template library panics on this slice; whoever renders gets an error or the right text.
#[test]
fn a_reversed_empty_list_is_no_panic() {
    let template = ChatTemplate::new("a{% for x in [][::-1] %}{{ x }}{% endfor %}").unwrap();
    let conversation = Conversation {
        messages: &[],
        tools: &[],
        add_generation_prompt: false,
        variables: &[],
    };
    match template.render(&conversation) {
        Ok(text) => assert_eq!(text, "a"),
        Err(error) => assert!(error.to_string().contains("slice of an empty list")),
    }
}
