//! What the server costs: streams over loopback from a scripted decoder that makes 8 tokens every
//! 4 ms, as one stream and as 64, and memory of idle connections.
//!
//! `cargo bench -p server --bench overhead [-- --idle 10000]`. Figures are of the whole path: engine
//! thread, parser, JSON, HTTP, socket, and a reader in the same process.

use engine::scripted::{Script, Scripted, ScriptedOptions};
use engine::{Engine, EngineOptions};
use server::text::ModelText;
use server::{Served, Settings};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const STEP: Duration = Duration::from_millis(4);
const TOKENS: u64 = 4000;

fn main() {
    let idle = std::env::args().skip_while(|arg| arg != "--idle").nth(1);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads");
    runtime.block_on(async {
        let address = start().await;
        for streams in [1, 64] {
            let share = rate(&address, streams).await;
            println!(
                "{streams} streams: {:.2} % of the decoder's rate",
                share * 100.0
            );
        }
        println!("{}", flush(&get(&address, "/metrics").await));
        if let Some(count) = idle.and_then(|n| n.parse().ok()) {
            hold(&address, count).await;
        }
    });
}

async fn start() -> String {
    let options = ScriptedOptions {
        step_time: STEP,
        ..ScriptedOptions::default()
    };
    let text = ModelText::bytes(options.limits.vocab_size).expect("text");
    let decoder = Scripted::new(options, Script::text("abcdefgh "));
    let options = EngineOptions {
        calibrate: false,
        prefix_cache: false,
        ..EngineOptions::default()
    };
    let engine = Engine::start(Box::new(decoder), text.detokenizer(), options).expect("engine");
    let settings = Settings {
        port: 0,
        ..Settings::default()
    };
    let served = Served::new(settings, engine, text).expect("server");
    let listening = server::serve::bind(Arc::clone(&served))
        .await
        .expect("port");
    let address = listening.address.clone();
    tokio::spawn(listening.serve());
    address
}

/// Tokens that arrived over tokens that the decoder made meanwhile, from the first to the last event
/// of each stream; the mean over streams.
async fn rate(address: &str, streams: usize) -> f64 {
    let one = |_| tokio::spawn(stream(address.to_owned()));
    let tasks: Vec<_> = (0..streams).map(one).collect();
    let mut sum = 0.0;
    for task in tasks {
        let (events, time) = task.await.expect("stream");
        let made = time.as_secs_f64() / STEP.as_secs_f64();
        sum += (events - 1) as f64 / made;
    }
    sum / streams as f64
}

/// Steps that arrived, and the time from the first to the last.
async fn stream(address: String) -> (u64, Duration) {
    let body = format!(
        "{{\"prompt\": [1], \"max_tokens\": {TOKENS}, \"stream\": true, \"draft_tokens\": 7, \"ignore_eos\": true}}"
    );
    let mut socket = TcpStream::connect(&address).await.expect("connection");
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(request.as_bytes()).await.expect("request");
    let (mut first, mut last, mut events) = (None, Instant::now(), 0);
    let (mut buffer, mut tail) = (vec![0; 64 << 10], Vec::new());
    loop {
        let read = socket.read(&mut buffer).await.expect("answer");
        if read == 0 {
            break;
        }
        tail.extend_from_slice(&buffer[..read]);
        let chunks = count(&mut tail);
        if chunks > 0 {
            last = Instant::now();
            first.get_or_insert(last);
            events += chunks;
        }
    }
    assert!(events >= TOKENS / 8, "{events} events");
    (events, last - first.expect("an event"))
}

/// Events with text in `tail`; what is incomplete stays.
fn count(tail: &mut Vec<u8>) -> u64 {
    let mark = b"\"finish_reason\":null";
    let found = tail.windows(mark.len()).filter(|w| *w == mark).count() as u64;
    let keep = tail.len().saturating_sub(mark.len() - 1);
    tail.drain(..keep);
    found
}

async fn get(address: &str, path: &str) -> String {
    let mut socket = TcpStream::connect(address).await.expect("connection");
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.expect("request");
    let mut text = String::new();
    socket.read_to_string(&mut text).await.expect("answer");
    text
}

/// The server's share of a step, from its own histogram: the least edge that holds 99 of 100.
fn flush(metrics: &str) -> String {
    let buckets: Vec<(String, f64)> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("kilotok_sse_flush_seconds_bucket"))
        .filter_map(|line| {
            let edge = line.split("le=\"").nth(1)?.split('"').next()?;
            Some((edge.to_owned(), line.rsplit(' ').next()?.parse().ok()?))
        })
        .collect();
    let total = buckets.last().map_or(0.0, |(_, count)| *count);
    let edge = buckets.iter().find(|(_, count)| *count >= 0.99 * total);
    let edge = edge.map_or("none", |(edge, _)| edge.as_str());
    format!("server's share of a step: 99 of 100 within {edge} s ({total} steps)")
}

async fn hold(address: &str, count: usize) {
    let before = rss_bytes();
    let mut sockets = Vec::with_capacity(count);
    for _ in 0..count {
        match TcpStream::connect(address).await {
            Ok(socket) => sockets.push(socket),
            Err(error) => {
                println!("after {} connections: {error}", sockets.len());
                break;
            }
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let both = (rss_bytes() - before) as f64 / 1e6;
    println!(
        "{} idle connections: {both:.0} MB more, both ends together",
        sockets.len()
    );
}

fn rss_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm
        .split(' ')
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    pages * 4096
}
