//! When readers are woken: while the next step is under way, or at once when none follows.

mod harness;

use engine::scripted::{Script, Scripted, ScriptedOptions};
use engine::{Engine, EngineHandle, EngineOptions, Request};
use harness::{read, request, settle};
use model::TokenId;
use model::decoder::{
    DecodeError, Decoder, Fork, KvUsage, Limits, SequenceConfig, SequenceId, StepOutput, StepPlan,
    Tap,
};
use model::detokenizer::ByteTokens;
use std::sync::{Arc, Mutex};

/// What happened on the engine thread, in order.
type Log = Arc<Mutex<Vec<String>>>;

/// A scripted decoder that notes when a step begins and ends.
struct Noted {
    inner: Scripted,
    log: Log,
    steps: u32,
    /// Leaves `step_while` to the trait.
    on_host: bool,
}

impl Noted {
    fn note(&self, what: &str) {
        let line = format!("{what} {}", self.steps);
        self.log.lock().unwrap().push(line);
    }
}

impl Decoder for Noted {
    fn step(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Result<(), DecodeError> {
        self.steps += 1;
        self.note("begin");
        let stepped = self.inner.step(plan, out);
        self.note("end");
        stepped
    }

    fn step_while(
        &mut self,
        plan: &StepPlan,
        out: &mut StepOutput,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), DecodeError> {
        if self.on_host {
            meanwhile();
            return self.step(plan, out);
        }
        self.steps += 1;
        self.note("begin");
        let stepped = self.inner.step_while(plan, out, meanwhile);
        self.note("end");
        stepped
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }
    fn kv_usage(&self) -> KvUsage {
        self.inner.kv_usage()
    }
    fn open(&mut self) -> Result<SequenceId, DecodeError> {
        self.inner.open()
    }
    fn configure(&mut self, id: SequenceId, config: SequenceConfig) -> Result<(), DecodeError> {
        self.inner.configure(id, config)
    }
    fn fork(&mut self, of: SequenceId, position: u32) -> Result<Fork, DecodeError> {
        self.inner.fork(of, position)
    }
    fn prefill(&mut self, id: SequenceId, tokens: &[TokenId]) -> Result<(), DecodeError> {
        self.note("prefill");
        self.inner.prefill(id, tokens)
    }
    fn rewind(&mut self, id: SequenceId, position: u32) -> Result<(), DecodeError> {
        self.inner.rewind(id, position)
    }
    fn close(&mut self, id: SequenceId) {
        self.inner.close(id);
    }
    fn tap(&mut self, id: SequenceId, tokens: &[TokenId], tap: Tap<'_>) -> Result<(), DecodeError> {
        self.inner.tap(id, tokens, tap)
    }
}

fn start(script: Script, on_host: bool) -> (EngineHandle, Log) {
    let log = Log::default();
    let decoder = Noted {
        inner: Scripted::new(ScriptedOptions::default(), script),
        log: Arc::clone(&log),
        steps: 0,
        on_host,
    };
    let options = EngineOptions {
        calibrate: false,
        prefix_cache: false,
        ..EngineOptions::default()
    };
    let handle = Engine::start(Box::new(decoder), Arc::new(ByteTokens), options).unwrap();
    (handle, log)
}

/// A request whose reader notes that it was woken.
fn noted(mut request: Request, name: &'static str, log: &Log) -> Request {
    let log = Arc::clone(log);
    request.draft = engine::DraftWidth::Off;
    request.notify = Some(Arc::new(move || log.lock().unwrap().push(name.to_owned())));
    request
}

/// The log of one request of three tokens.
fn three_tokens(on_host: bool) -> Vec<String> {
    let (handle, log) = start(Script::text("abcdef"), on_host);
    let stream = handle.submit(noted(request(&[1], 3), "woken", &log));
    let answer = read(stream.unwrap());
    assert_eq!(answer.text, "abc");
    settle(&handle);
    let log = log.lock().unwrap();
    // The pipe's end wakes once more.
    let lines = log.iter().filter(|line| !line.starts_with("prefill"));
    let mut lines: Vec<String> = lines.cloned().collect();
    lines.dedup();
    lines
}

#[test]
fn readers_are_woken_while_the_next_step_is_under_way() {
    let expected = [
        "begin 1", "end 1", "begin 2", "woken", "end 2", "begin 3", "woken", "end 3", "woken",
    ];
    assert_eq!(three_tokens(false), expected);
}

#[test]
fn on_the_host_they_are_woken_before_it() {
    let expected = [
        "begin 1", "end 1", "woken", "begin 2", "end 2", "woken", "begin 3", "end 3", "woken",
    ];
    assert_eq!(three_tokens(true), expected);
}

#[test]
fn the_last_piece_of_one_does_not_wait_for_the_step_of_another() {
    let (handle, log) = start(Script::text("abcdef"), false);
    let mut long = request(&[1], 400);
    long.draft = engine::DraftWidth::Off;
    let long = handle.submit(long).unwrap();
    let short = handle.submit(noted(request(&[1], 2), "woken", &log));
    assert_eq!(read(short.unwrap()).text, "ab");
    assert_eq!(read(long).tokens.len(), 400);
    settle(&handle);
    let log = log.lock().unwrap();
    let woken: Vec<usize> = (0..log.len()).filter(|i| log[*i] == "woken").collect();
    // First while a step was under way, then between two.
    assert!(log[woken[0] - 1].starts_with("begin"), "{log:?}");
    assert!(log[woken[1] - 1].starts_with("end"), "{log:?}");
}

#[test]
fn nobody_sleeps_over_a_piece_of_a_prompt() {
    let (handle, log) = start(Script::text("abcdef"), false);
    let mut first = noted(request(&[1], 4000), "woken", &log);
    first.stop.ignore_eos = true;
    let first = handle.submit(first).unwrap();
    let _ = first.next_blocking();
    let second = handle.submit(request(&[2; 200], 1)).unwrap();
    assert_eq!(read(second).text, "a");
    drop(first);
    settle(&handle);
    let log = log.lock().unwrap();
    let mut untold = false;
    for line in log.iter() {
        match line.split(' ').next() {
            Some("end") => untold = true,
            Some("woken") => untold = false,
            Some("prefill") => assert!(!untold, "a reader slept over a prompt: {log:?}"),
            _ => {}
        }
    }
}
