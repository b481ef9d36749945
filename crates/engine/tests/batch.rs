//! Continuous batching: a request's text depends on nothing but the request, and nothing leaks.

mod harness;

use engine::scripted::{Drafter, Script, ScriptedOptions};
use engine::{DraftWidth, EngineHandle, EngineOptions, Received, Request, Stream};
use harness::{ask, read, request, settle, start};
use model::random::{Purpose, bits};
use model::sampling::{DraftSampling, SamplingParams};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

fn options(drafter: Drafter) -> ScriptedOptions {
    ScriptedOptions {
        drafter,
        ..Default::default()
    }
}

/// Request `i` of a mix: prompts of 1 to 200 tokens, greedy and sampled, with and without penalties.
fn mixed(i: u32, draft: DraftWidth) -> Request {
    let dice = |n: u32, sides: u64| bits(99, i * 16 + n, Purpose::Sample) % sides;
    let length = 1 + dice(0, 200) as u32;
    let prompt: Vec<u32> = (0..length)
        .map(|j| bits(u64::from(i), j, Purpose::Target) as u32 % 512)
        .collect();
    let mut request = request(&prompt, 5 + dice(1, 60) as u32);
    request.draft = draft;
    request.sampling = SamplingParams {
        temperature: [0.0, 0.7, 1.1][dice(2, 3) as usize],
        top_p: [1.0, 0.9][dice(3, 2) as usize],
        top_k: [0, 20][dice(4, 2) as usize],
        repetition_penalty: [1.0, 1.2][dice(5, 2) as usize],
        seed: dice(6, 1000),
        ..Default::default()
    };
    request
}

fn texts(handle: &EngineHandle, count: u32, batch: usize, draft: DraftWidth) -> Vec<Vec<u32>> {
    let mut texts = Vec::new();
    let mut open: Vec<Stream> = Vec::new();
    for i in 0..count {
        open.push(handle.submit(mixed(i, draft)).unwrap());
        if open.len() == batch {
            texts.push(read(open.remove(0)).tokens);
        }
    }
    texts.extend(open.into_iter().map(|stream| read(stream).tokens));
    texts
}

/// Greedy requests, and sampled ones with greedy drafts, have the same text at any width, in any
/// batch, with any drafter, and after a restart.
#[test]
fn drafting_and_batching_change_no_text() {
    const COUNT: u32 = 120;
    let script = || Script::random(8, 7.0);
    let plain = start(options(Drafter::Right), script(), EngineOptions::default());
    let expected = texts(&plain, COUNT, 1, DraftWidth::Off);
    for drafter in [
        Drafter::Right,
        Drafter::Wrong,
        Drafter::Sometimes(0.6),
        Drafter::Near,
    ] {
        let handle = start(options(drafter), script(), EngineOptions::default());
        for draft in [
            DraftWidth::Fixed(2),
            DraftWidth::Fixed(4),
            DraftWidth::Fixed(8),
            DraftWidth::Auto,
        ] {
            for batch in [1, 2, 8] {
                let got = texts(&handle, COUNT, batch, draft);
                assert_eq!(got, expected, "{drafter:?} {draft:?} batch {batch}");
            }
        }
    }
}

/// With sampled drafts the text depends on the width, but on nothing else.
#[test]
fn the_same_seed_gives_the_same_bytes_alone_in_a_batch_and_after_a_restart() {
    let sampled = |i: u32| {
        let mut request = request(&[i % 5; 20], 60);
        request.draft = DraftWidth::Fixed(6);
        request.sampling = SamplingParams {
            temperature: 1.0,
            seed: 17,
            draft_sampling: DraftSampling::Sampled,
            ..Default::default()
        };
        request
    };
    let engine = || {
        start(
            options(Drafter::Near),
            Script::random(8, 7.0),
            EngineOptions::default(),
        )
    };
    let first = engine();
    let alone: Vec<_> = (0..8).map(|i| ask(&first, sampled(i)).tokens).collect();
    let second = engine();
    let streams: Vec<_> = (0..8).map(|i| second.submit(sampled(i)).unwrap()).collect();
    let together: Vec<_> = streams
        .into_iter()
        .map(|stream| read(stream).tokens)
        .collect();
    assert_eq!(alone, together);
}

#[test]
fn ten_thousand_joins_and_leaves_leave_nothing_behind() {
    let engine = EngineOptions {
        prefix_cache: false,
        queue_requests_max: 64,
        ..Default::default()
    };
    let mut decoder = options(Drafter::Sometimes(0.7));
    decoder.limits.pages = 400;
    decoder.limits.context_tokens = 2000;
    let handle = start(decoder, Script::text("abc"), engine);
    let mut open: Vec<Stream> = Vec::new();
    for i in 0..10_000u32 {
        let dice = |n: u32, sides: u64| bits(5, i * 4 + n, Purpose::Sample) % sides;
        let mut request = Request::new(vec![1; 1 + dice(0, 40) as usize]);
        request.stop.max_tokens = Some(dice(1, 120) as u32);
        match handle.submit(request) {
            Ok(stream) => open.push(stream),
            Err(_) => drop(read(open.swap_remove(0))),
        }
        if dice(2, 3) > 0 && !open.is_empty() {
            let stream = open.swap_remove(dice(3, open.len() as u64) as usize);
            let _ = stream.try_next();
        }
    }
    drop(open);
    settle(&handle);
    let metrics = handle.metrics();
    assert_eq!((metrics.kv.pages_used, metrics.kv_reserved_share), (0, 0.0));
    assert_eq!(metrics.finished_total[4], 0);
}

#[test]
fn a_long_prompt_does_not_stop_running_streams() {
    let decoder = ScriptedOptions {
        step_time: Duration::from_millis(1),
        prefill_time: Duration::from_micros(100),
        ..Default::default()
    };
    let engine = EngineOptions {
        prefill_stall: Duration::from_millis(10),
        ..Default::default()
    };
    let handle = start(decoder, Script::text("abcdefgh"), engine);
    let mut plain = request(&[1], 4000);
    plain.draft = DraftWidth::Off;
    let running = handle.submit(plain).unwrap();
    assert!(running.next_blocking().is_some());
    // 0.6 s of prefill, and a short prompt behind it.
    let long = handle.submit(request(&[2; 6000], 1)).unwrap();
    let short = read(handle.submit(request(&[3; 50], 1)).unwrap()).stats;
    assert!(
        matches!(long.try_next(), Received::Nothing),
        "the short prompt has to finish first"
    );
    let mut pieces = 0;
    while matches!(long.try_next(), Received::Nothing) {
        match running.next_timeout(Duration::from_millis(500)) {
            Received::Event(_) => pieces += 1,
            other => panic!("{other:?} after {pieces} pieces, ttft of the short one {short:?}"),
        }
    }
    assert!(pieces > 20, "{pieces} steps during the long prompt");
}

#[test]
fn readers_are_woken() {
    let handle = start(
        options(Drafter::Right),
        Script::text("abc"),
        EngineOptions::default(),
    );
    let woken = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&woken);
    let mut request = request(&[1], 64);
    request.draft = DraftWidth::Fixed(8);
    request.notify = Some(Arc::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    let answer = ask(&handle, request);
    settle(&handle);
    assert_eq!(answer.pieces.len(), 8);
    assert!(woken.load(Ordering::Relaxed) >= 8);
}
