//! tokenizer.json, tokenizer_config.json and generation_config.json, rebuilt from GGUF metadata.
//!
//! SmolLM2 is a byte-level BPE that splits digits one at a time (`smollm` pre-tokenizer): the
//! vocabulary, the merges and the chat template are in the file, the rest is written out here.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::files::write_json;
use super::llama::Dense;
use crate::gguf::{self, Gguf};

/// GGUF's token type of control tokens.
const CONTROL: i128 = 3;

/// Writes the three files.
pub(crate) fn write(gguf: &Gguf, dense: &Dense, out: &Path) -> Result<()> {
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    ensure!(
        tokens.len() == dense.vocab,
        "GGUF has {} tokens for a vocabulary of {}",
        tokens.len(),
        dense.vocab
    );
    for (key, wanted) in [
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ] {
        let found = gguf.text(key)?;
        ensure!(
            found == wanted,
            "GGUF `{key}`: expected `{wanted}`, found `{found}`"
        );
    }
    let special = special_tokens(gguf, tokens.len())?;
    let text = serde_json::to_string(&tokenizer(gguf, &tokens, &special)?)?;
    std::fs::write(out.join("tokenizer.json"), text)?;
    let id = |key: &str| -> Result<usize> {
        let id = gguf.integer(key)?;
        ensure!(
            id < tokens.len(),
            "GGUF `{key}`: {id} is outside the vocabulary"
        );
        Ok(id)
    };
    let bos = id("tokenizer.ggml.bos_token_id")?;
    let eos = id("tokenizer.ggml.eos_token_id")?;
    let pad = id("tokenizer.ggml.padding_token_id")?;
    write_json(
        &out.join("tokenizer_config.json"),
        &json!({
            "add_prefix_space": false,
            "bos_token": tokens[bos],
            "chat_template": gguf.text("tokenizer.chat_template")?,
            "clean_up_tokenization_spaces": false,
            "eos_token": tokens[eos],
            "model_max_length": dense.context,
            "pad_token": tokens[pad],
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": tokens[id("tokenizer.ggml.unknown_token_id")?],
        }),
    )?;
    // Temperature and top-p as the base model's card recommends.
    let generation = json!({
        "bos_token_id": bos,
        "eos_token_id": [eos, 0],
        "pad_token_id": pad,
        "do_sample": true,
        "temperature": 0.2,
        "top_p": 0.9,
    });
    write_json(&out.join("generation_config.json"), &generation)
}

fn special_tokens(gguf: &Gguf, count: usize) -> Result<Vec<usize>> {
    let gguf::Value::List(types) = gguf.value("tokenizer.ggml.token_type")? else {
        anyhow::bail!("GGUF `tokenizer.ggml.token_type`: expected a list");
    };
    ensure!(
        types.len() == count,
        "GGUF has {} token types for {count} tokens",
        types.len()
    );
    let control = gguf::Value::Integer(CONTROL);
    Ok((0..count).filter(|&i| types[i] == control).collect())
}

fn tokenizer(gguf: &Gguf, tokens: &[&str], special: &[usize]) -> Result<Value> {
    let mut vocab = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        let earlier = vocab.insert((*token).to_owned(), id.into());
        ensure!(earlier.is_none(), "GGUF token {id} `{token}` occurs twice");
    }
    let merges = gguf.texts("tokenizer.ggml.merges")?;
    for merge in &merges {
        let (left, right) = merge
            .split_once(' ')
            .with_context(|| format!("GGUF merge `{merge}` has no space"))?;
        for part in [left, right] {
            ensure!(
                vocab.contains_key(part),
                "GGUF merge `{merge}`: `{part}` is not a token"
            );
        }
    }
    let added: Vec<Value> = special
        .iter()
        .map(|&id| {
            json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": false, "vocab": vocab, "merges": merges},
    }))
}
