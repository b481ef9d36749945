//! A server that loads for as long as the test wants: what it answers meanwhile and afterwards.

use engine::scripted::{Script, Scripted, ScriptedOptions};
use engine::{Engine, EngineOptions};
use server::loading::Loading;
use server::text::ModelText;
use server::{Served, ServerError, Settings};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

fn settings() -> Settings {
    Settings {
        port: 0,
        ..Settings::default()
    }
}

fn served() -> Result<Arc<Served>, ServerError> {
    let options = ScriptedOptions::default();
    let text = ModelText::bytes(options.limits.vocab_size)?;
    let decoder = Scripted::new(options, Script::text("abc "));
    let options = EngineOptions {
        calibrate: false,
        ..EngineOptions::default()
    };
    let engine = Engine::start(Box::new(decoder), text.detokenizer(), options).unwrap();
    Served::new(settings(), engine, text)
}

fn get(address: &str, path: &str) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(head.as_bytes()).unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text
}

/// A server whose loading ends when something is sent; gives its address, and again when it is ready.
fn start() -> (Arc<Loading>, mpsc::Sender<bool>, mpsc::Receiver<String>) {
    let (go, wait) = mpsc::channel();
    let (say, hear) = mpsc::channel();
    let loading = Arc::new(Loading::new(4_000_000_000));
    let shared = Arc::clone(&loading);
    std::thread::spawn(move || {
        let watched = Arc::clone(&shared);
        let load = move || {
            if !wait.recv().unwrap_or(false) {
                return Err(ServerError::Admission("the file is damaged".to_owned()));
            }
            let served = served()?;
            served.loaded(watched.done());
            Ok(served)
        };
        let tell = |address: &str| say.send(address.to_owned()).unwrap();
        let ended = server::serve::run_loading(&settings(), &shared, load, tell, tell);
        let text = ended.err().map_or(String::new(), |error| error.to_string());
        say.send(text).unwrap();
    });
    (loading, go, hear)
}

#[test]
fn a_server_that_loads_says_how_far_it_is_and_serves_afterwards() {
    let (loading, go, hear) = start();
    let address = hear.recv().unwrap();
    loading.taken().store(1_000_000_000, Ordering::Relaxed);
    let health = get(&address, "/health");
    assert!(health.starts_with("HTTP/1.1 503"), "{health}");
    assert!(health.contains("retry-after: "), "{health}");
    assert!(health.contains("\"percent\":25"), "{health}");
    assert!(health.contains("25 %, 1.00 of 4.00 GB"), "{health}");
    assert!(get(&address, "/health/live").starts_with("HTTP/1.1 200"));
    let metrics = get(&address, "/metrics");
    assert!(
        metrics.contains("kilotok_weights_loaded_bytes 1000000000"),
        "{metrics}"
    );
    let models = get(&address, "/v1/models");
    assert!(
        models.starts_with("HTTP/1.1 503") && models.contains("\"loading\""),
        "{models}"
    );
    // A connection of this time meets the real routes after it was closed. It has had an answer: one that waits to be
    // accepted is the real server's, which closes it when nothing comes for 30 s.
    let mut early = TcpStream::connect(&address).unwrap();
    let asked = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n";
    early.write_all(asked).unwrap();
    assert!(early.read(&mut [0; 1]).unwrap() > 0);
    go.send(true).unwrap();
    assert_eq!(hear.recv().unwrap(), address);
    let _ = early.read_to_end(&mut Vec::new()).unwrap();
    assert!(get(&address, "/health").starts_with("HTTP/1.1 200"));
    assert!(get(&address, "/metrics").contains("kilotok_weights_load_seconds"));
}

#[test]
fn what_cannot_be_loaded_ends_the_server_with_its_reason() {
    let (_, go, hear) = start();
    let address = hear.recv().unwrap();
    assert!(get(&address, "/health").starts_with("HTTP/1.1 503"));
    go.send(false).unwrap();
    assert_eq!(hear.recv().unwrap(), "the file is damaged");
}
