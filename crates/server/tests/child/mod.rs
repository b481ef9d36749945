//! A server in a process of its own, and a client for it that only knows sockets.
//!
//! The process is this test program again, told by `KILOTOK_TEST_CHILD` to run `child_server` alone.

use engine::scripted::{Script, Scripted, ScriptedOptions};
use engine::{Engine, EngineOptions};
use serde_json::{Value, json};
use server::admission::SeatRules;
use server::text::ModelText;
use server::{Served, Settings};
use std::io::{BufRead, BufReader, Error, Lines, Read, Result, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How the process is set up: a JSON object.
const VARIABLE: &str = "KILOTOK_TEST_CHILD";
const MARK: &str = "LISTENS ";

/// Runs the server when this process was started for that.
pub(crate) fn serve_if_asked() {
    let Ok(setup) = std::env::var(VARIABLE) else {
        return;
    };
    let setup: Value = serde_json::from_str(&setup).unwrap();
    let time = |name: &str, or: u64| Duration::from_micros(setup[name].as_u64().unwrap_or(or));
    let options = ScriptedOptions {
        step_time: time("step_us", 500),
        fault_at: setup["fault_at"].as_u64(),
        ..ScriptedOptions::default()
    };
    let text = ModelText::bytes(options.limits.vocab_size).unwrap();
    let decoder = Scripted::new(options, Script::text("abcdefgh "));
    let options = EngineOptions {
        calibrate: false,
        prefix_cache: false,
        reader_timeout: time("reader_timeout_us", 30_000_000),
        ..EngineOptions::default()
    };
    let engine = Engine::start(Box::new(decoder), text.detokenizer(), options).unwrap();
    let settings = Settings {
        port: 0,
        model_name: "scripted".to_owned(),
        admission: setup["admission"].as_str().map(Into::into),
        seats: SeatRules {
            seats: 1,
            entries_per_day: 1_000_000,
            ..SeatRules::default()
        },
        ..Settings::default()
    };
    let served = Served::new(settings, engine, text).unwrap();
    // The test harness has begun a line already.
    let ended = server::serve::run(served, |address| println!("\n{MARK}{address}"));
    if let Err(e) = ended {
        eprintln!("child server: {e}");
        std::process::exit(1);
    }
}

/// A server process; killed when dropped.
pub(crate) struct Process {
    child: Child,
    pub(crate) address: String,
    /// Kept open: the test harness of the process writes to it at its end.
    _output: Lines<BufReader<ChildStdout>>,
}

impl Process {
    pub(crate) fn start(setup: &Value) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_server", "--nocapture"])
            .env(VARIABLE, setup.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = output.find_map(|line| Some(line.unwrap().strip_prefix(MARK)?.to_owned()));
        Self {
            child,
            address: address.expect("a server that starts"),
            _output: output,
        }
    }

    /// With accounts in `admission`.
    pub(crate) fn with_desk(admission: &Path) -> Self {
        Self::start(&json!({"admission": admission}))
    }

    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args([name, &id]).status().unwrap();
        assert!(sent.success());
    }

    /// Ends it at once, as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < limit, "the server did not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A value of `/metrics`.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let (_, page) = self.ask("GET", "/metrics", None, &Value::Null).unwrap();
        let line = page.lines().find(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with([' ', '{']))
        });
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {page}"))
    }

    /// Waits until a metric has this value.
    pub(crate) fn metric_becomes(&self, name: &str, value: f64) {
        let start = Instant::now();
        while self.metric(name) != value {
            assert!(start.elapsed() < Duration::from_secs(20), "{name}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// One request on a connection of its own: status and body.
    pub(crate) fn ask(
        &self,
        method: &str,
        path: &str,
        key: Option<&str>,
        body: &Value,
    ) -> Result<(u16, String)> {
        ask(&self.address, method, path, key, body)
    }

    /// A stream that was asked for.
    pub(crate) fn stream(&self, tokens: u32) -> Result<TcpStream> {
        self.open("/v1/completions", &completion(tokens, true))
    }

    /// An answer that is there to be read.
    pub(crate) fn open(&self, path: &str, body: &Value) -> Result<TcpStream> {
        send(&self.address, "POST", path, None, body)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks for so many tokens, one a step.
pub(crate) fn completion(tokens: u32, stream: bool) -> Value {
    json!({"model": "scripted", "prompt": [1, 2, 3], "max_tokens": tokens, "draft_tokens": 0,
        "stream": stream})
}

pub(crate) fn ask(
    address: &str,
    method: &str,
    path: &str,
    key: Option<&str>,
    body: &Value,
) -> Result<(u16, String)> {
    let mut text = String::new();
    send(address, method, path, key, body)?.read_to_string(&mut text)?;
    let cut = || Error::other("an answer that is cut off");
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(cut)?;
    let status = head.get(9..12).and_then(|code| code.parse().ok());
    // A body ends with its length or its last chunk; without either it was cut off.
    let whole = match head
        .lines()
        .find_map(|l| l.strip_prefix("content-length: "))
    {
        Some(length) => length.parse() == Ok(body.len()),
        None => body.ends_with("0\r\n\r\n"),
    };
    match status {
        Some(status) if whole => Ok((status, body.to_owned())),
        _ => Err(cut()),
    }
}

fn send(
    address: &str,
    method: &str,
    path: &str,
    key: Option<&str>,
    body: &Value,
) -> Result<TcpStream> {
    let mut socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(Duration::from_secs(30)))?;
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let key = key.map_or(String::new(), |key| {
        format!("authorization: Bearer {key}\r\n")
    });
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{key}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(request.as_bytes())?;
    Ok(socket)
}
