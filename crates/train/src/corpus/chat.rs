//! Conversation and instructions: the T0 subset, chitchat, and the prose that packages carry.

use std::path::Path;

use serde_json::Value;

use super::{Document, conversation, wheel_files};
use crate::error::{Result, io};

/// All three.
pub(super) fn documents(root: &Path) -> Result<Vec<Document>> {
    let mut out = instructions(root)?;
    for (name, text) in wheel_files(
        root,
        &["chitchat_dataset/dataset.json", ".rst", ".md", "METADATA"],
    )? {
        if name.ends_with("dataset.json") {
            out.extend(chitchat(&text));
        } else if (500..100_000).contains(&text.len()) {
            out.push(Document {
                domain: "chat",
                text,
                prompt: None,
            });
        }
    }
    Ok(out)
}

fn instructions(root: &Path) -> Result<Vec<Document>> {
    let directory = root.join("t0");
    let mut paths: Vec<_> = std::fs::read_dir(&directory)
        .map_err(io(&directory))?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .collect();
    paths.sort();
    let mut out = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).map_err(io(&path))?;
        for line in text.lines() {
            let Ok(item) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            let (Some(prompt), Some(answer)) =
                (item["prompt"].as_str(), item["completion"].as_str())
            else {
                continue;
            };
            let answer = answer.trim_end_matches("<|endoftext|>").trim();
            if prompt.len() < 1500 {
                out.push(conversation("chat", None, prompt.trim(), answer));
            }
        }
    }
    Ok(out)
}

/// Two people; the first to speak is the user.
fn chitchat(text: &str) -> Vec<Document> {
    let Ok(Value::Object(all)) = serde_json::from_str::<Value>(text) else {
        return Vec::new();
    };
    let mut out = Vec::new();
    for talk in all.values() {
        let mut text = format!("<|im_start|>system\n{}<|im_end|>\n", super::SYSTEM);
        for (i, turn) in talk["messages"]
            .as_array()
            .into_iter()
            .flatten()
            .enumerate()
        {
            let role = if i % 2 == 0 { "user" } else { "assistant" };
            let said: Vec<&str> = turn
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|m| m["text"].as_str())
                .collect();
            text += &format!("<|im_start|>{role}\n{}<|im_end|>\n", said.join(" "));
        }
        out.push(Document {
            domain: "chat",
            text,
            prompt: None,
        });
    }
    out
}
