//! What the server costs: streams over loopback from a scripted decoder that makes 8 tokens every
//! 4 ms, as one stream and as 64, and memory of idle connections.
//!
//! `cargo bench -p server --bench overhead [-- --idle 10000]`. The server is a process of its own, the
//! bench again with `--serve`. Its rate is compared with that of the same decoder called in a bare
//! loop: sleeps of 4 ms last longer than that on their own. Figures are of the whole path: engine
//! thread, parser, JSON, HTTP, socket, and a reader on the same machine.

use engine::scripted::{Script, Scripted, ScriptedOptions};
use engine::{Engine, EngineOptions};
use model::decoder::{SequenceStep, StepOutput, StepPlan};
use model::{Decoder, SequenceId};
use server::text::ModelText;
use server::{Served, Settings};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const STEP: Duration = Duration::from_millis(4);
const TOKENS: u64 = 4000;
const WIDTH: u32 = 8;
const ROUNDS: f64 = 5.0;

fn main() {
    if std::env::args().any(|arg| arg == "--serve") {
        return serve();
    }
    let idle = std::env::args().skip_while(|arg| arg != "--idle").nth(1);
    let (mut server, address) = start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("threads");
    runtime.block_on(async {
        for streams in [1, 64] {
            // In turns, so that a slow moment of the machine meets both.
            let (mut bare, mut served) = (0.0, 0.0);
            for _ in 0..ROUNDS as u32 {
                bare += self::bare(streams) / ROUNDS;
                served += rate(&address, streams).await / ROUNDS;
            }
            println!(
                "{streams} streams: {:.2} % of the bare decoder's {bare:.1} steps/s",
                served / bare * 100.0
            );
        }
        println!("{}", flush(&get(&address, "/metrics").await));
        if let Some(count) = idle.and_then(|n| n.parse().ok()) {
            hold(&address, &server, count).await;
        }
    });
    let _ = server.kill();
    let _ = server.wait();
}

fn decoder() -> Scripted {
    let options = ScriptedOptions {
        step_time: STEP,
        ..ScriptedOptions::default()
    };
    Scripted::new(options, Script::text("abcdefgh "))
}

/// The server, until it is killed; its first line is its address.
fn serve() {
    let decoder = decoder();
    let text = ModelText::bytes(decoder.limits().vocab_size).expect("text");
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
    server::serve::run(served, |address| println!("{address}")).expect("server");
}

fn start() -> (Child, String) {
    let own = std::env::current_exe().expect("own path");
    let mut child = Command::new(own)
        .arg("--serve")
        .stdout(Stdio::piped())
        .spawn()
        .expect("server");
    let out = child.stdout.take().expect("pipe");
    let mut address = String::new();
    BufReader::new(out)
        .read_line(&mut address)
        .expect("address");
    (child, address.trim().to_owned())
}

/// Steps a second of the decoder in a bare loop with so many sequences.
fn bare(streams: usize) -> f64 {
    let mut decoder = decoder();
    let open = |_| {
        let sequence = decoder.open().expect("sequence");
        decoder.prefill(sequence, &[1]).expect("prompt");
        sequence
    };
    let sequences: Vec<SequenceId> = (0..streams).map(open).collect();
    let entry = |&sequence: &SequenceId| SequenceStep {
        sequence,
        width: WIDTH,
        chance_min: 0.0,
        simulate_accepted: None,
    };
    let plan = StepPlan {
        sequences: sequences.iter().map(entry).collect(),
    };
    let (mut out, steps, start) = (StepOutput::default(), 250, Instant::now());
    for _ in 0..steps {
        decoder.step(&plan, &mut out).expect("step");
    }
    f64::from(steps) / start.elapsed().as_secs_f64()
}

/// Steps a second that arrived, from the first to the last event of each stream; the mean over
/// streams.
async fn rate(address: &str, streams: usize) -> f64 {
    let one = |_| tokio::spawn(stream(address.to_owned()));
    let tasks: Vec<_> = (0..streams).map(one).collect();
    let mut sum = 0.0;
    for task in tasks {
        let (events, time) = task.await.expect("stream");
        sum += (events - 1) as f64 / time.as_secs_f64();
    }
    sum / streams as f64
}

/// Steps that arrived, and the time from the first to the last.
async fn stream(address: String) -> (u64, Duration) {
    let body = format!(
        "{{\"model\": \"kilotok\", \"prompt\": [1], \"max_tokens\": {TOKENS}, \"stream\": true, \"draft_tokens\": 7, \"ignore_eos\": true}}"
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

async fn hold(address: &str, server: &Child, count: usize) {
    let before = rss_bytes(server);
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
    let (more, all) = (rss_bytes(server) - before, rss_bytes(server));
    println!(
        "{} idle connections: {:.0} MB more, {:.0} MB in all",
        sockets.len(),
        more as f64 / 1e6,
        all as f64 / 1e6
    );
}

fn rss_bytes(process: &Child) -> i64 {
    let path = format!("/proc/{}/statm", process.id());
    let statm = std::fs::read_to_string(path).unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|n| n.parse::<i64>().ok());
    pages.unwrap_or(0) * 4096
}
