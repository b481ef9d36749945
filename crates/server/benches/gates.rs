//! Figures of the gates of `docs/reliability.md` that are times: disconnects (1), refusals under load
//! (2), readers that stand still (5), and whether a wrong key takes longer the more of it is right (15).
//!
//! `cargo bench -p server --bench gates`. A scripted decoder makes 8 tokens every 4 ms; the server and
//! its clients share one process and its cores.

use axum::body::Body;
use axum::http::Request;
use engine::scripted::{Script, Scripted, ScriptedOptions};
use engine::{Engine, EngineHandle, EngineOptions};
use server::text::ModelText;
use server::{Served, Settings, router};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::ServiceExt;

const STEP: Duration = Duration::from_millis(4);
/// Two of them are shorter than the longest answer, 4 s.
const WINDOW: Duration = Duration::from_millis(1500);

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    disconnects().await;
    refusals().await;
    still_reader().await;
    wrong_keys().await;
}

struct Server {
    address: String,
    engine: EngineHandle,
    served: Arc<Served>,
}

async fn start(sequences_max: u32, queue_requests_max: usize, api_keys: &[String]) -> Server {
    let options = ScriptedOptions {
        step_time: STEP,
        ..ScriptedOptions::default()
    };
    let text = ModelText::bytes(options.limits.vocab_size).expect("text");
    let decoder = Scripted::new(options, Script::text("abcdefgh "));
    let options = EngineOptions {
        calibrate: false,
        prefix_cache: false,
        sequences_max,
        queue_requests_max,
        ..EngineOptions::default()
    };
    let engine = Engine::start(Box::new(decoder), text.detokenizer(), options).expect("engine");
    let settings = Settings {
        port: 0,
        api_keys: api_keys.to_vec(),
        ..Settings::default()
    };
    let served = Served::new(settings, engine.clone(), text).expect("server");
    let listening = server::serve::bind(Arc::clone(&served))
        .await
        .expect("port");
    let address = listening.address.clone();
    tokio::spawn(listening.serve());
    Server {
        address,
        engine,
        served,
    }
}

/// A request for 8,000 tokens.
fn request(more: &str) -> String {
    let body = format!(
        "{{\"model\": \"kilotok\", \"prompt\": [1], \"max_tokens\": 8000, \"stream\": true, \
         \"draft_tokens\": 7{more}}}"
    );
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn open(address: &str, more: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.expect("connection");
    socket
        .write_all(request(more).as_bytes())
        .await
        .expect("request");
    socket
}

/// `(median, p99, most)` in milliseconds.
fn quantiles(mut times: Vec<f64>) -> (f64, f64, f64) {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    (at(0.5), at(0.99), at(1.0))
}

async fn disconnects() {
    let server = start(0, 256, &[]).await;
    let mut times = Vec::new();
    for number in 0..500_u64 {
        let mut socket = open(&server.address, "").await;
        let _ = socket.read(&mut [0; 4096]).await;
        tokio::time::sleep(Duration::from_micros(number * 7919 % 9000)).await;
        drop(socket);
        let start = Instant::now();
        while server.engine.metrics().running > 0 {
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let (median, p99, most) = quantiles(times);
    let pages = server.engine.metrics().kv.pages_used;
    println!(
        "gate 1: slot free after a disconnect: median {median:.1} ms, p99 {p99:.1} ms, most {most:.1} ms \
         (a step is {} ms); {pages} pages left in use",
        STEP.as_millis()
    );
}

/// Events a second on `socket` for a while.
async fn rate(socket: &mut TcpStream) -> f64 {
    let (mut buffer, mut events) = (vec![0; 64 << 10], 0);
    // What came before the window is not of it.
    let _ = socket.read(&mut buffer).await;
    let start = Instant::now();
    while start.elapsed() < WINDOW {
        let read = socket.read(&mut buffer).await.expect("events");
        let mark = b"\"finish_reason\":null";
        events += buffer[..read]
            .windows(mark.len())
            .filter(|w| *w == mark)
            .count();
    }
    events as f64 / start.elapsed().as_secs_f64()
}

async fn refusals() {
    let server = start(1, 1, &[]).await;
    let mut running = open(&server.address, ", \"ignore_eos\": true").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let _waits = open(&server.address, "").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let alone = rate(&mut running).await;
    let lane = |_| {
        let address = server.address.clone();
        tokio::spawn(async move { refused(&address).await })
    };
    // The stream that runs ends before two windows are over: another takes its place.
    let lanes: Vec<_> = (0..10).map(lane).collect();
    let mut running = running;
    let loaded = rate(&mut running).await;
    let mut times = Vec::new();
    for lane in lanes {
        times.extend(lane.await.expect("refusals"));
    }
    let (count, change) = (times.len(), (loaded / alone - 1.0) * 100.0);
    let (median, p99, most) = quantiles(times);
    println!(
        "gate 2: {:.0} refusals a second: median {median:.2} ms, p99 {p99:.2} ms, most {most:.1} ms; the \
         running stream's rate changes by {change:+.2} %",
        count as f64 / WINDOW.as_secs_f64()
    );
}

/// A hundred requests a second on one connection; the times of the refusals.
async fn refused(address: &str) -> Vec<f64> {
    let mut socket = TcpStream::connect(address).await.expect("connection");
    let _ = socket.set_nodelay(true);
    let (mut times, start) = (Vec::new(), Instant::now());
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    let mut buffer = vec![0; 64 << 10];
    while start.elapsed() < WINDOW {
        tick.tick().await;
        let sent = Instant::now();
        socket
            .write_all(request("").as_bytes())
            .await
            .expect("request");
        let read = socket.read(&mut buffer).await.expect("answer");
        times.push(sent.elapsed().as_secs_f64() * 1e3);
        let text = String::from_utf8_lossy(&buffer[..read]).to_lowercase();
        assert!(
            text.starts_with("http/1.1 429") && text.contains("retry-after: "),
            "{text}"
        );
    }
    times
}

async fn still_reader() {
    let server = start(0, 256, &[]).await;
    let mut read = open(&server.address, ", \"ignore_eos\": true").await;
    let mut beside = open(&server.address, ", \"logprobs\": 20").await;
    let drain = tokio::spawn(async move {
        let mut buffer = vec![0; 64 << 10];
        while beside.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
    });
    let both = rate(&mut read).await;
    drop(read);
    drain.abort();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut read = open(&server.address, ", \"ignore_eos\": true").await;
    let _still = open(&server.address, ", \"logprobs\": 20").await;
    let one = rate(&mut read).await;
    println!(
        "gate 5: a stream beside one that nobody reads: {:+.2} % of its rate beside one that is read",
        (one / both - 1.0) * 100.0
    );
}

/// Welch's t between keys that are wrong from the first letter and from the last, the slowest twentieth
/// left out.
async fn wrong_keys() {
    const ATTEMPTS: usize = 100_000;
    let key = "sk-0123456789abcdef0123456789abcdef".to_owned();
    let wrong = [
        key.replacen("sk-0", "xx-x", 1),
        key[..key.len() - 1].to_owned() + "x",
    ];
    let server = start(0, 256, &[key]).await;
    let app = router(&server.served);
    let (mut times, mut random) = ([Vec::new(), Vec::new()], 1_u64);
    for attempt in 0..ATTEMPTS + 2000 {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let kind = (random >> 40) as usize % 2;
        let request =
            Request::get("/v1/models").header("authorization", format!("Bearer {}", wrong[kind]));
        let request = request.body(Body::empty()).expect("request");
        let start = Instant::now();
        let response = app.clone().oneshot(request).await.expect("answer");
        let time = start.elapsed().as_secs_f64() * 1e6;
        assert_eq!(response.status().as_u16(), 401);
        if attempt >= 2000 {
            times[kind].push(time);
        }
    }
    let mut all: Vec<f64> = times.iter().flatten().copied().collect();
    all.sort_by(f64::total_cmp);
    let crop = all[all.len() * 95 / 100];
    let [first, last] = times.map(|times| moments(times.into_iter().filter(|t| *t <= crop)));
    let t = (first.0 - last.0) / (first.1 / first.2 + last.1 / last.2).sqrt();
    println!(
        "gate 15: {ATTEMPTS} wrong keys: {:.3} us wrong at once, {:.3} us wrong at the end, t = {t:.2}",
        first.0, last.0
    );
}

/// Mean, variance, count.
fn moments(times: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let times: Vec<f64> = times.collect();
    let count = times.len() as f64;
    let mean = times.iter().sum::<f64>() / count;
    let variance = times.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (mean, variance, count)
}
