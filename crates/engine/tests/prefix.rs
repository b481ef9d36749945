//! The prefix cache: what is reused, by whom, and that the text is the same with it.

mod harness;

use engine::scripted::{Script, ScriptedOptions};
use engine::{DraftWidth, EngineOptions, Request};
use harness::{Answer, ask, request, settle, start};
use model::TokenId;
use model::sampling::SamplingParams;

fn prompt(seed: u32, tokens: u32) -> Vec<TokenId> {
    (0..tokens)
        .map(|i| (seed * 7919 + i * i * 31) % 512)
        .collect()
}

fn cached(answer: &Answer) -> u32 {
    answer.stats.cached_tokens
}

#[test]
fn a_second_turn_reuses_the_first_one_drafts_included() {
    for window in [None, Some(24)] {
        for draft in [DraftWidth::Off, DraftWidth::Fixed(8)] {
            let options = ScriptedOptions {
                window,
                ..Default::default()
            };
            let handle = start(
                options.clone(),
                Script::random(5, 6.0),
                EngineOptions::default(),
            );
            let cold = EngineOptions {
                prefix_cache: false,
                ..Default::default()
            };
            let cold = start(options, Script::random(5, 6.0), cold);
            let turn = |prompt: Vec<TokenId>| {
                let mut request = request(&prompt, 60);
                request.draft = draft;
                request.sampling = SamplingParams {
                    temperature: 0.8,
                    seed: 4,
                    ..Default::default()
                };
                let (warm, cold) = (ask(&handle, request.clone()), ask(&cold, request));
                assert_eq!(warm.tokens, cold.tokens);
                assert_eq!(cached(&cold), 0);
                warm
            };
            let mut text = prompt(1, 100);
            let first = turn(text.clone());
            assert_eq!(cached(&first), 0);
            text.extend(&first.tokens);
            text.extend(prompt(2, 30));
            let second = turn(text.clone());
            // The last token of the answer was not computed yet.
            assert_eq!(cached(&second), 159);
            // The same again: the snapshot at the end of the prompt.
            assert_eq!(cached(&turn(text.clone())), 189);
        }
    }
}

#[test]
fn a_shared_start_is_found_by_the_third_request_although_windows_slide() {
    let options = ScriptedOptions {
        window: Some(24),
        ..Default::default()
    };
    let handle = start(options, Script::random(5, 6.0), EngineOptions::default());
    let system = prompt(3, 200);
    let with = |i: u32| [system.clone(), prompt(10 + i, 90)].concat();
    let counts: Vec<u32> = (0..4)
        .map(|i| cached(&ask(&handle, request(&with(i), 10))))
        .collect();
    // The first computes, the second finds out where they part and keeps that place.
    assert_eq!(counts, [0, 0, 199, 199]);
}

#[test]
fn prefixes_are_not_shared_across_keys() {
    let handle = start(
        ScriptedOptions::default(),
        Script::random(5, 6.0),
        EngineOptions::default(),
    );
    let prompt = prompt(1, 300);
    let by = |key: &str| {
        let mut request = request(&prompt, 10);
        request.isolation_key = key.to_owned();
        cached(&ask(&handle, request))
    };
    assert_eq!(by("alice"), 0);
    assert_eq!(by("bob"), 0);
    assert_eq!(by("alice"), 299);
    assert_eq!(by(""), 0);
    assert_eq!(by("bob"), 299);
}

#[test]
fn kept_prefixes_give_way_to_requests() {
    let mut options = ScriptedOptions::default();
    options.limits.pages = 64; // 1,024 tokens
    options.limits.context_tokens = 1024;
    options.limits.sequences_max = 4;
    let handle = start(options, Script::random(5, 6.0), EngineOptions::default());
    for i in 0..20 {
        let answer = ask(&handle, request(&prompt(i, 400), 50));
        assert_eq!(answer.tokens.len(), 50);
    }
    // What was used last is still there.
    assert!(cached(&ask(&handle, request(&prompt(19, 400), 5))) > 0);
    let metrics = handle.metrics();
    assert_eq!(metrics.preemptions_total, 0);
    assert!(metrics.kv.pages_used <= 64 && metrics.prefixes_kept <= 4);
}

#[test]
fn running_requests_share_their_prompt() {
    let options = ScriptedOptions {
        step_time: std::time::Duration::from_millis(1),
        ..Default::default()
    };
    let handle = start(options, Script::random(5, 6.0), EngineOptions::default());
    let running = handle.submit(Request::new(prompt(1, 160))).unwrap();
    assert!(running.next_blocking().is_some());
    assert_eq!(cached(&ask(&handle, request(&prompt(1, 160), 5))), 159);
    drop(running);
    settle(&handle);
}
