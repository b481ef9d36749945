//! Requests through an engine with a scripted decoder: what comes out, and when it ends.

mod harness;

use engine::scripted::{Drafter, Script, ScriptedOptions};
use engine::{Admission, DraftWidth, EngineOptions, FinishReason, Rejected, Request};
use harness::{ask, read, read_all, request, settle, start};
use model::sampling::SamplingParams;
use std::time::{Duration, Instant};

const TEXT: &str = "The quick brown fox jumps over the lazy dog. ";

#[test]
fn text_tokens_and_account_agree_at_every_width() {
    let handle = start(
        ScriptedOptions::default(),
        Script::text(TEXT),
        EngineOptions::default(),
    );
    for draft in [
        DraftWidth::Off,
        DraftWidth::Fixed(2),
        DraftWidth::Fixed(8),
        DraftWidth::Auto,
    ] {
        let mut request = request(&[1, 2, 3], 100);
        request.draft = draft;
        request.trace = true;
        let answer = ask(&handle, request);
        assert_eq!(answer.text, TEXT.repeat(3)[..100]);
        assert_eq!(answer.reason, Some(FinishReason::Length));
        let stats = &answer.stats;
        assert_eq!((stats.prompt_tokens, stats.generated_tokens), (3, 100));
        let counts = &stats.draft;
        assert_eq!(counts.histogram.iter().sum::<u64>(), counts.steps);
        let weighted = counts
            .histogram
            .iter()
            .zip(0..)
            .map(|(n, j)| n * j)
            .sum::<u64>();
        assert_eq!(weighted, counts.accepted);
        assert_eq!(counts.steps + counts.accepted, 100);
        assert_eq!(answer.pieces.len() as u64, counts.steps);
        let mut position = 2;
        for (n, piece) in answer.pieces.iter().enumerate() {
            let step = piece.step.as_ref().unwrap();
            assert_eq!((step.step, step.position), (n as u32, position));
            assert_eq!(step.drafted.len() as u32 + 1, step.width);
            assert_eq!(Some(&step.bonus), piece.tokens.last());
            position += step.accepted + 1;
        }
        if let DraftWidth::Fixed(width) = draft {
            assert_eq!(counts.steps, 100u64.div_ceil(u64::from(width)));
        }
    }
}

#[test]
fn a_drafter_that_is_always_wrong_changes_nothing() {
    let options = ScriptedOptions {
        drafter: Drafter::Wrong,
        ..Default::default()
    };
    let handle = start(options, Script::text(TEXT), EngineOptions::default());
    let mut request = request(&[1], 60);
    request.draft = DraftWidth::Fixed(8);
    let answer = ask(&handle, request);
    assert_eq!(answer.text, TEXT.repeat(2)[..60]);
    assert_eq!(answer.stats.draft.acceptance_length(), 1.0);
}

#[test]
fn stop_rules_end_a_text_inside_a_block() {
    let handle = start(
        ScriptedOptions::default(),
        Script::text(TEXT),
        EngineOptions::default(),
    );
    let with = |change: &dyn Fn(&mut Request)| {
        let mut request = request(&[1], 100);
        request.draft = DraftWidth::Fixed(8);
        change(&mut request);
        ask(&handle, request)
    };
    let answer = with(&|r| r.stop.stop_strings = vec!["fox jumps".into(), "lazy".into()]);
    assert_eq!(answer.text, "The quick brown ");
    assert_eq!(
        answer.reason,
        Some(FinishReason::StopString("fox jumps".into()))
    );
    let answer = with(&|r| {
        r.stop.stop_strings = vec!["fox".into()];
        r.stop.include_stop_string = true;
    });
    assert_eq!(answer.text, "The quick brown fox");
    let answer = with(&|r| r.stop.eos_ids = vec![u32::from(b'x')]);
    assert_eq!(answer.text, "The quick brown fo");
    assert_eq!(answer.reason, Some(FinishReason::Eos(u32::from(b'x'))));
    assert_eq!(answer.stats.generated_tokens, 19);
    let answer = with(&|r| {
        r.stop.eos_ids = vec![u32::from(b'x')];
        r.stop.ignore_eos = true;
    });
    assert_eq!(answer.text.len(), 100);
    let answer = with(&|r| {
        r.stop.stop_strings = vec!["o".into()];
        r.stop.min_tokens = 18;
    });
    assert_eq!(answer.text, "The quick brown fox jumps ");
    let answer = with(&|r| r.stop.max_tokens = Some(0));
    assert_eq!(
        (answer.text.as_str(), answer.reason),
        ("", Some(FinishReason::Length))
    );
}

#[test]
fn min_tokens_forbids_the_end_tokens() {
    let handle = start(
        ScriptedOptions::default(),
        Script::random(3, 4.0),
        EngineOptions::default(),
    );
    let mut request = request(&[1], 50);
    request.sampling = SamplingParams {
        temperature: 1.0,
        seed: 5,
        ..Default::default()
    };
    request.stop.eos_ids = (0..500).collect();
    request.stop.min_tokens = 20;
    let answer = ask(&handle, request);
    assert!(answer.tokens[..20].iter().all(|token| *token >= 500));
    assert!(answer.tokens.len() > 20 && answer.tokens.len() < 50);
}

#[test]
fn the_context_ends_a_text() {
    let mut options = ScriptedOptions::default();
    options.limits.context_tokens = 50;
    let handle = start(options, Script::text(TEXT), EngineOptions::default());
    let answer = ask(&handle, Request::new(vec![1; 10]));
    assert_eq!(
        (answer.tokens.len(), answer.reason),
        (40, Some(FinishReason::Length))
    );
}

#[test]
fn what_cannot_be_served_is_refused_with_the_field() {
    let mut options = ScriptedOptions::default();
    options.limits.context_tokens = 50;
    let handle = start(options, Script::text(TEXT), EngineOptions::default());
    let field = |request: Request| match handle.submit(request) {
        Err(Rejected::Invalid { field, .. }) => field,
        other => panic!("{:?}", other.map(|stream| stream.request())),
    };
    assert_eq!(field(Request::new(vec![])), "prompt");
    assert_eq!(field(Request::new(vec![1; 50])), "prompt");
    assert_eq!(field(Request::new(vec![512])), "prompt");
    let mut bad = request(&[1], 4);
    bad.samples = 9;
    assert_eq!(field(bad), "samples");
    let mut bad = request(&[1], 4);
    bad.sampling.top_p = 1.5;
    assert_eq!(field(bad), "top_p");
    let mut bad = request(&[1], 4);
    bad.sampling.temperature = f32::NAN;
    assert_eq!(field(bad), "temperature");
    let mut bad = request(&[1], 4);
    bad.sampling.logit_bias = vec![(3, f32::INFINITY)];
    assert_eq!(field(bad), "logit_bias");
}

#[test]
fn parallel_samples_differ_and_the_first_is_the_request_alone() {
    let handle = start(
        ScriptedOptions::default(),
        Script::random(3, 6.0),
        EngineOptions::default(),
    );
    let mut request = request(&[7; 40], 30);
    request.sampling = SamplingParams {
        temperature: 1.0,
        seed: 11,
        ..Default::default()
    };
    let alone = ask(&handle, request.clone());
    request.samples = 4;
    let answers = read_all(handle.submit(request).unwrap(), 4);
    assert_eq!(answers[0].tokens, alone.tokens);
    for (i, a) in answers.iter().enumerate() {
        assert_eq!(a.tokens.len(), 30);
        assert!(answers[..i].iter().all(|b| b.tokens != a.tokens));
    }
}

#[test]
fn logprobs_come_with_each_token_and_with_the_prompt() {
    let handle = start(
        ScriptedOptions::default(),
        Script::random(3, 6.0),
        EngineOptions::default(),
    );
    let mut request = request(&[7, 9, 11, 200, 3], 21);
    request.logprobs = Some(3);
    request.prompt_logprobs = Some(2);
    request.stop.stop_ids = vec![9999];
    let answer = ask(&handle, request);
    assert_eq!(answer.logprobs.len(), 21);
    assert!(
        answer
            .logprobs
            .iter()
            .zip(&answer.tokens)
            .all(|(l, t)| l.top[0].0 == *t)
    );
    assert_eq!(answer.prompt.len(), 5);
    assert!(answer.prompt[0].is_none());
    assert!(
        answer.prompt[1..]
            .iter()
            .all(|l| l.as_ref().is_some_and(|l| l.top.len() == 2))
    );
}

#[test]
fn dropping_a_stream_frees_its_slot_and_its_pages() {
    let options = ScriptedOptions {
        step_time: Duration::from_millis(1),
        ..Default::default()
    };
    let engine = EngineOptions {
        prefix_cache: false,
        ..Default::default()
    };
    let handle = start(options, Script::text(TEXT), engine);
    let baseline = handle.metrics().kv.pages_used;
    let stream = handle.submit(Request::new(vec![1; 500])).unwrap();
    for _ in 0..3 {
        assert!(stream.next_blocking().is_some());
    }
    let running = handle.metrics();
    assert!(running.kv.pages_used > baseline && running.running == 1);
    drop(stream);
    settle(&handle);
    let after = handle.metrics();
    assert_eq!(after.kv.pages_used, baseline);
    assert_eq!(after.finished_total, [0, 0, 1, 0, 0]);
}

#[test]
fn a_full_queue_says_how_long_to_wait() {
    let options = ScriptedOptions {
        step_time: Duration::from_millis(2),
        ..Default::default()
    };
    let engine = EngineOptions {
        sequences_max: 1,
        queue_requests_max: 2,
        ..Default::default()
    };
    let handle = start(options, Script::text(TEXT), engine);
    let mut streams = Vec::new();
    let rejected = loop {
        match handle.submit(request(&[1], 200)) {
            Ok(stream) => streams.push(stream),
            Err(rejected) => break rejected,
        }
    };
    assert!(streams.len() <= 3);
    let Rejected::Full {
        waiting: 2,
        retry_after_s,
    } = rejected
    else {
        panic!("{rejected}")
    };
    assert!(retry_after_s >= 1);
    for stream in streams {
        assert_eq!(read(stream).tokens.len(), 200);
    }
    assert_eq!(handle.metrics().rejected_total, 1);
}

#[test]
fn priority_goes_first_and_deadlines_end() {
    let options = ScriptedOptions {
        step_time: Duration::from_millis(1),
        ..Default::default()
    };
    let engine = EngineOptions {
        sequences_max: 1,
        ..Default::default()
    };
    let handle = start(options, Script::text(TEXT), engine);
    let first = handle.submit(request(&[1], 400)).unwrap();
    assert!(first.next_blocking().is_some());
    let low = handle.submit(request(&[1], 10)).unwrap();
    let mut urgent = request(&[1], 10);
    urgent.priority = 1;
    let high = handle.submit(urgent).unwrap();
    let mut late = request(&[1], 10);
    late.deadline = Some(Duration::from_millis(5));
    assert_eq!(ask(&handle, late).reason, Some(FinishReason::Deadline));
    first.cancel();
    let (high, low) = (read(high).stats, read(low).stats);
    assert!(high.queue_ms < low.queue_ms);
}

#[test]
fn draining_finishes_what_runs_and_takes_nothing_new() {
    let options = ScriptedOptions {
        step_time: Duration::from_millis(1),
        ..Default::default()
    };
    let handle = start(options, Script::text(TEXT), EngineOptions::default());
    let stream = handle.submit(request(&[1], 80)).unwrap();
    handle.drain(Duration::from_secs(20));
    assert!(matches!(
        handle.submit(request(&[1], 1)),
        Err(Rejected::Draining)
    ));
    assert_eq!(read(stream).tokens.len(), 80);
    assert!(handle.wait_stopped(Duration::from_secs(20)));

    let handle = start(
        ScriptedOptions {
            step_time: Duration::from_millis(5),
            ..Default::default()
        },
        Script::text(TEXT),
        EngineOptions::default(),
    );
    let stream = handle.submit(request(&[1], 4000)).unwrap();
    handle.drain(Duration::from_millis(30));
    assert_eq!(read(stream).reason, Some(FinishReason::Cancelled));
    assert!(handle.wait_stopped(Duration::from_secs(20)));
}

#[test]
fn a_fault_ends_every_request_and_the_engine() {
    let options = ScriptedOptions {
        fault_at: Some(6),
        ..Default::default()
    };
    let engine = EngineOptions {
        calibrate: false,
        ..Default::default()
    };
    let handle = start(options, Script::text(TEXT), engine);
    let mut plain = request(&[1], 100);
    plain.draft = DraftWidth::Off;
    let answer = ask(&handle, plain);
    assert_eq!(answer.tokens.len(), 6);
    assert!(matches!(answer.reason, Some(FinishReason::Error(_))));
    assert!(handle.wait_stopped(Duration::from_secs(20)));
    assert!(matches!(
        handle.submit(request(&[1], 1)),
        Err(Rejected::Failed(_))
    ));
    assert!(handle.failure().unwrap().contains("scripted"));
}

#[test]
fn one_request_with_bad_logits_does_not_hurt_the_others() {
    let script = Script::Logits(std::sync::Arc::new(|tokens, row| {
        row.fill(0.0);
        row[usize::from(b'a')] = 9.0;
        if tokens[0] == 66 && tokens.len() > 20 {
            row[3] = f32::NAN;
        }
    }));
    let options = ScriptedOptions {
        step_time: Duration::from_micros(300),
        ..Default::default()
    };
    let handle = start(options, script, EngineOptions::default());
    let good: Vec<_> = (0..3)
        .map(|_| handle.submit(request(&[1; 10], 200)).unwrap())
        .collect();
    let bad = handle.submit(request(&[66; 10], 200)).unwrap();
    let bad = read(bad);
    assert!(matches!(bad.reason, Some(FinishReason::Error(text)) if text.contains("not finite")));
    for stream in good {
        let answer = read(stream);
        assert_eq!(
            (answer.text, answer.reason),
            ("a".repeat(200), Some(FinishReason::Length))
        );
    }
    assert!(handle.failure().is_none());
}

#[test]
fn a_slow_reader_stops_its_own_request_only() {
    let engine = EngineOptions {
        reader_timeout: Duration::from_millis(300),
        ..Default::default()
    };
    let mut options = ScriptedOptions {
        step_time: Duration::from_micros(50),
        ..Default::default()
    };
    options.limits.context_tokens = 200_000;
    options.limits.pages = 30_000;
    let handle = start(options, Script::text(TEXT), engine);
    let slow = handle.submit(Request::new(vec![1])).unwrap();
    let begin = Instant::now();
    while handle.metrics().running > 0 || begin.elapsed() < Duration::from_millis(20) {
        let quick = ask(&handle, request(&[1], 40));
        assert_eq!(quick.tokens.len(), 40);
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
    let answer = read(slow);
    assert_eq!(answer.reason, Some(FinishReason::Cancelled));
    assert!(answer.text.len() < 200_000);
}

#[test]
fn pages_run_out_without_a_change_of_text() {
    for admission in [
        Admission::WorstCase,
        Admission::Preempt {
            headroom_tokens: 16,
        },
    ] {
        let mut options = ScriptedOptions::default();
        options.limits.pages = 40; // 640 tokens
        options.limits.context_tokens = 512;
        let engine = EngineOptions {
            admission,
            ..Default::default()
        };
        let handle = start(options, Script::random(1, 6.0), engine);
        let make = |i: u32| {
            let mut request = request(&[i; 30], 200);
            request.sampling = SamplingParams {
                temperature: 0.9,
                frequency_penalty: 0.3,
                seed: u64::from(i),
                ..Default::default()
            };
            request
        };
        let alone: Vec<_> = (0..8).map(|i| ask(&handle, make(i)).tokens).collect();
        let together: Vec<_> = (0..8).map(|i| handle.submit(make(i)).unwrap()).collect();
        for (stream, alone) in together.into_iter().zip(alone) {
            let answer = read(stream);
            assert_eq!(answer.reason, Some(FinishReason::Length));
            assert_eq!(answer.tokens, alone);
        }
        let preempted = handle.metrics().preemptions_total > 0;
        assert_eq!(preempted, admission != Admission::WorstCase);
    }
}
