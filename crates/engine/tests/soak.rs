//! Everything at once, with too little of everything: few pages, few sequences, short windows, a
//! small queue, parallel samples, grammars, cancellations, shared prefixes. Whatever is answered in
//! full has the text that the request has alone, and nothing is left behind.

mod harness;

use engine::scripted::{Drafter, Script, ScriptedOptions};
use engine::{Admission, DraftWidth, EngineHandle, EngineOptions, Rejected, Request, Stream};
use harness::{Answer, read_all, request, settle, start};
use model::TokenId;
use model::decoder::Constraint;
use model::random::{Purpose, bits};
use model::sampling::SamplingParams;
use std::collections::BTreeMap;
use std::sync::Arc;

const KINDS: u32 = 60;

/// Every third token has to be even.
struct Rhythm {
    said: usize,
}

impl Constraint for Rhythm {
    fn masks(&mut self, drafted: &[TokenId], masks: &mut [u32]) -> usize {
        let words = masks.len() / (drafted.len() + 1);
        let strict = |at: usize| (self.said + at) % 3 == 2;
        for (at, row) in masks.chunks_mut(words).enumerate() {
            row.fill(if strict(at) { 0x5555_5555 } else { u32::MAX });
        }
        let fits = |(at, token): &(usize, &TokenId)| !strict(*at) || **token % 2 == 0;
        1 + drafted.iter().enumerate().take_while(fits).count()
    }

    fn commit(&mut self, tokens: &[TokenId]) {
        for token in tokens {
            assert!(
                self.said % 3 != 2 || token % 2 == 0,
                "the grammar was ignored"
            );
            self.said += 1;
        }
    }
}

fn kind(i: u32) -> Request {
    let dice = |n: u32, sides: u64| bits(31, i * 16 + n, Purpose::Sample) % sides;
    // Prompts of a family begin alike.
    let family = dice(0, 4) as u32;
    let length = 10 + dice(1, 150) as u32;
    let token = |j: u32| {
        let key = if j < 60 { 1000 + family } else { i };
        bits(u64::from(key), j, Purpose::Target) as u32 % 512
    };
    let mut request = request(
        &(0..length).map(token).collect::<Vec<_>>(),
        1 + dice(2, 90) as u32,
    );
    request.sampling = SamplingParams {
        temperature: [0.0, 0.9][dice(3, 2) as usize],
        frequency_penalty: [0.0, 0.4][dice(4, 2) as usize],
        seed: dice(5, 100),
        ..Default::default()
    };
    request.draft = [DraftWidth::Off, DraftWidth::Fixed(5), DraftWidth::Auto][dice(6, 3) as usize];
    request.samples = 1 + dice(7, 3) as u32;
    request.priority = dice(8, 2) as i32;
    request.isolation_key = ["", "other"][dice(9, 2) as usize].to_owned();
    if dice(10, 3) == 0 {
        request.constraint = Some(Arc::new(|| Box::new(Rhythm { said: 0 })));
    }
    request
}

fn engine(pages: u32, sequences_max: u32, admission: Admission) -> EngineHandle {
    let mut decoder = ScriptedOptions {
        drafter: Drafter::Sometimes(0.7),
        window: Some(40),
        ..Default::default()
    };
    decoder.limits.pages = pages;
    decoder.limits.context_tokens = 300;
    decoder.limits.sequences_max = sequences_max;
    let options = EngineOptions {
        admission,
        queue_requests_max: 16,
        ..Default::default()
    };
    start(decoder, Script::random(12, 7.0), options)
}

fn texts(answers: &[Answer]) -> Vec<Vec<TokenId>> {
    answers.iter().map(|answer| answer.tokens.clone()).collect()
}

#[test]
fn whatever_is_answered_is_what_the_request_says_alone() {
    let roomy = engine(10_000, 64, Admission::WorstCase);
    let alone: BTreeMap<u32, Vec<Vec<TokenId>>> = (0..KINDS)
        .map(|i| {
            let request = kind(i);
            let samples = request.samples as usize;
            (i, texts(&read_all(roomy.submit(request).unwrap(), samples)))
        })
        .collect();
    for admission in [
        Admission::WorstCase,
        Admission::Preempt { headroom_tokens: 8 },
    ] {
        let tight = engine(30, 6, admission);
        let mut open: Vec<(u32, Stream)> = Vec::new();
        for n in 0..1500u32 {
            let dice = |m: u32, sides: u64| bits(77, n * 4 + m, Purpose::Sample) % sides;
            let i = dice(0, u64::from(KINDS)) as u32;
            match tight.submit(kind(i)) {
                Ok(stream) => open.push((i, stream)),
                Err(Rejected::Full { .. }) => finish(open.remove(0), &alone),
                Err(other) => panic!("{other}"),
            }
            if dice(1, 6) == 0 && !open.is_empty() {
                drop(open.swap_remove(dice(2, open.len() as u64) as usize)); // cancels
            }
        }
        open.into_iter().for_each(|entry| finish(entry, &alone));
        settle(&tight);
        let metrics = tight.metrics();
        assert_eq!(metrics.finished_total[4], 0, "errors: {metrics:?}");
        assert_eq!(metrics.kv_reserved_share, 0.0);
        assert!(metrics.prefixes_kept <= 6 && metrics.kv.pages_used <= 30);
        assert!(metrics.prefix_hits_total > 0);
        assert_eq!(
            metrics.preemptions_total > 0,
            admission != Admission::WorstCase
        );
    }
}

fn finish((i, stream): (u32, Stream), alone: &BTreeMap<u32, Vec<Vec<TokenId>>>) {
    let expected = &alone[&i];
    let answers = read_all(stream, expected.len());
    assert!(
        answers
            .iter()
            .all(|a| a.reason.as_ref().is_some_and(|r| r.name() == "length"))
    );
    assert_eq!(&texts(&answers), expected, "request {i}");
}
