//! The load generator against the server itself.

#[allow(dead_code)] // Each test binary uses a part of it.
mod harness;

use engine::scripted::ScriptedOptions;
use harness::Server;
use server::load::{self, Arrival, LoadError, Plan};
use std::sync::Arc;
use std::time::Duration;

fn plan(url: String) -> Plan {
    Plan {
        url,
        api_key: None,
        model: None,
        arrivals: vec![
            Arrival::Users(1),
            Arrival::Users(3),
            Arrival::PerSecond(500.0),
        ],
        requests: 6,
        prompts: Vec::new(),
        prompt_words: 8,
        max_tokens: 20,
        temperature: 0.0,
        ignore_eos: true,
        seed: 1,
    }
}

async fn listening(server: &Server) -> String {
    let listening = server::serve::bind(Arc::clone(&server.served))
        .await
        .unwrap();
    let address = listening.address.clone();
    tokio::spawn(listening.serve());
    format!("http://{address}/v1")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_load_is_counted_whole() {
    let options = ScriptedOptions {
        step_time: Duration::from_millis(1),
        ..ScriptedOptions::default()
    };
    let server = Server::with("abcdefgh", options, |settings| settings.port = 0);
    let plan = plan(listening(&server).await);
    let run = move || load::run(&plan, |_| {});
    let (model, levels) = tokio::task::spawn_blocking(run).await.unwrap().unwrap();
    assert_eq!((model.as_str(), levels.len()), ("test", 3));
    for level in &levels {
        let s = &level.summary;
        assert_eq!((s.completed, s.refused, s.failed), (6, 0, 0), "{level:?}");
        assert_eq!(s.tokens, 6 * 20);
        assert!(s.prompt_tokens > 6 * 8);
        // The script's drafter is always right.
        assert!(s.acceptance_length.unwrap() > 2.0, "{level:?}");
        assert!(s.ttft_ms.unwrap().min > 0.0 && s.itl_ms.is_some());
        assert!(s.user_tokens_per_s.unwrap().min > 0.0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_refuses_is_an_error() {
    let server = Server::build("a", |settings| {
        settings.port = 0;
        settings.api_keys = vec!["secret-key-of-the-test".to_owned()];
    });
    let plan = plan(listening(&server).await);
    let run = move || load::run(&plan, |_| {});
    let error = tokio::task::spawn_blocking(run).await.unwrap().unwrap_err();
    assert!(matches!(&error, LoadError::Server { .. }), "{error}");
    assert!(error.to_string().contains("401"), "{error}");
}
