//! Gates 8 and 12 through the API: drafting, company in the batch and a new start change no text.
//! The model says random letters that depend on all before; its drafter is near it.

#[allow(dead_code)] // Each test binary uses a part of it.
mod harness;

use engine::scripted::{Drafter, Script, ScriptedOptions};
use harness::Server;
use serde_json::{Value, json};
use std::sync::Arc;

const PROMPTS: usize = 1000;

fn server() -> Arc<Server> {
    let options = ScriptedOptions {
        drafter: Drafter::Near,
        ..ScriptedOptions::default()
    };
    Arc::new(Server::scripted(Script::random(11, 6.0), options, |_| {}))
}

/// The tokens of an answer to each prompt, `at_once` at a time.
async fn texts(server: &Arc<Server>, at_once: usize, draft: u32, temperature: f32) -> Vec<Value> {
    let ask = |number: usize| {
        let server = Arc::clone(server);
        async move {
            let body = json!({"messages": [{"role": "user", "content": format!("prompt {number}")}],
                "max_tokens": 24, "temperature": temperature, "seed": number, "ignore_eos": true,
                "draft_tokens": draft, "draft_sampling": "greedy", "return_token_ids": true});
            let reply = server.post("/v1/chat/completions", &body).await;
            assert_eq!(reply.status, 200, "{}", reply.text);
            let mut choice = reply.json()["choices"][0].take();
            json!([
                choice["message"]["content"].take(),
                choice["token_ids"].take()
            ])
        }
    };
    let mut texts = vec![Value::Null; PROMPTS];
    for first in (0..PROMPTS).step_by(at_once) {
        let end = PROMPTS.min(first + at_once);
        let tasks: Vec<_> = (first..end).map(|n| tokio::spawn(ask(n))).collect();
        for (number, task) in (first..).zip(tasks) {
            texts[number] = task.await.unwrap();
        }
    }
    texts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn greedy_answers_are_the_same_with_drafts_and_company() {
    let server = server();
    let plain = texts(&server, 1, 0, 0.0).await;
    assert!(plain[0][1].as_array().is_some_and(|ids| ids.len() == 24));
    for at_once in [1, 2, 8] {
        assert!(
            texts(&server, at_once, 7, 0.0).await == plain,
            "{at_once} at once"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seed_gives_the_same_bytes_after_a_new_start_and_in_company() {
    for draft in [0, 7] {
        let first = texts(&server(), 1, draft, 1.0).await;
        for at_once in [1, 8] {
            assert!(
                texts(&server(), at_once, draft, 1.0).await == first,
                "{at_once} at once"
            );
        }
    }
}
