//! Gate 10 over a folder of real schemas: `cargo bench -p server --bench schemas -- DIR [EVERY]`.
//!
//! Every `EVERY`th file of DIR (in order of names) is `{"schema": ...}` or a schema, as the folder
//! `maskbench/data` of <https://github.com/guidance-ai/jsonschemabench> has them; they are not in this
//! repository. The model says random letters that only the masks make JSON of, its drafter is near it.
//! Counted: complete and valid by the crate `jsonschema`, complete and wrong, ended by length, refused
//! with a reason. Wrong ones are named.

#[allow(dead_code)] // Each user takes a part of it.
#[path = "../tests/harness/mod.rs"]
mod harness;

use harness::Server;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const TOKENS: u32 = 2000;
const LANES: usize = 4;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let Some(dir) = arguments.first() else {
        eprintln!("usage: cargo bench -p server --bench schemas -- DIR [EVERY]");
        return;
    };
    let every = arguments.get(1).and_then(|n| n.parse().ok()).unwrap_or(1);
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .expect("folder of schemas")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .collect();
    files.sort();
    let files: Arc<Vec<PathBuf>> = Arc::new(files.into_iter().step_by(every).collect());
    // Likely to end what may end, so that large schemas are completed too.
    let server = Arc::new(Server::scribbling(4.0));
    let lane = |lane: usize| {
        let (server, files) = (Arc::clone(&server), Arc::clone(&files));
        tokio::spawn(async move {
            let mut counts: BTreeMap<String, u32> = BTreeMap::new();
            for path in files.iter().skip(lane).step_by(LANES) {
                *counts.entry(answer(&server, path).await).or_default() += 1;
            }
            counts
        })
    };
    let mut all: BTreeMap<String, u32> = BTreeMap::new();
    for lane in (0..LANES).map(lane).collect::<Vec<_>>() {
        for (kind, count) in lane.await.expect("lane") {
            *all.entry(kind).or_default() += count;
        }
    }
    println!("gate 10: {} schemas", files.len());
    for (kind, count) in all {
        println!("{count:>6}  {kind}");
    }
}

/// What became of one schema.
async fn answer(server: &Server, path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let Ok(file) = serde_json::from_str::<Value>(&text) else {
        return "not read".to_owned();
    };
    let schema = file.get("schema").cloned().unwrap_or(file);
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": TOKENS,
        "temperature": 1, "top_p": 1, "seed": 1, "draft_tokens": 7,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}});
    let reply = server.post("/v1/chat/completions", &body).await;
    if reply.status != 200 {
        let message = reply.json()["error"]["message"].to_string();
        let cut: String = message.chars().take(70).collect();
        return format!("refused with {}: {cut}", reply.status);
    }
    let choice = &reply.json()["choices"][0];
    if choice["finish_reason"] != "stop" {
        return format!("ended by {}", choice["finish_reason"]);
    }
    let said = choice["message"]["content"].as_str().unwrap_or_default();
    let valid = match serde_json::from_str::<Value>(said) {
        Err(error) if error.to_string().starts_with("number out of range") => {
            return "complete, with a number beyond 64-bit floats: not checked".to_owned();
        }
        Err(error) => Err(error.to_string()),
        Ok(value) => match jsonschema::options()
            .should_validate_formats(true)
            .build(&schema)
        {
            Err(_) => return "complete; the validator does not take the schema".to_owned(),
            Ok(validator) => validator.validate(&value).map_err(|e| e.to_string()),
        },
    };
    match valid {
        Ok(()) => "complete and valid".to_owned(),
        Err(error) => {
            let cut: String = error.chars().take(160).collect();
            println!("WRONG {}: {cut}", path.display());
            "complete and not valid".to_owned()
        }
    }
}
