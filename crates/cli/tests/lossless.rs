//! Greedy output with drafting equals greedy output without, token for token: 1,000 prompts of mixed
//! length, batches of 1, 2 and 8 with sequences joining and leaving, widths 2, 4, 8 and auto, on
//! every backend, with a drafter of random weights, a trained one, one that is always right and one that
//! is always wrong. Also: same seed, same bytes, at a temperature above 0.
//!
//! The models are tiny checkpoints of `goldens/`, so that the whole matrix runs in a test: `pair-s1` is of random
//! weights, `trained` was made by the trainer (`goldens/trained/README.md`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cpu::{CpuDecoder, CpuOptions};
use engine::{DraftWidth, Engine, EngineHandle, EngineOptions, Event, Request, Stats, Stream};
use model::detokenizer::ByteTokens;
use model::draft::{Draft, DraftOptions, Replay};
use model::random::{Purpose, bits};
use model::reference::{DraftNetwork, ReferenceDecoder};
use model::sampling::{DraftSampling, SamplingParams};
use model::{Checkpoint, Config, Decoder, TokenId, Weights};

/// Optimised builds (`cargo test --release`) take the full number.
const PROMPTS: usize = if cfg!(debug_assertions) { 100 } else { 1000 };
const WIDTHS: [DraftWidth; 4] = [
    DraftWidth::Fixed(2),
    DraftWidth::Fixed(4),
    DraftWidth::Fixed(8),
    DraftWidth::Auto,
];

/// Where drafts come from.
enum Drafts {
    None,
    /// The drafter beside the checkpoint.
    Own,
    Replay(Replay),
}

/// A checkpoint with its drafter: a folder of `goldens`.
type Pair = &'static str;
const RANDOM: Pair = "dflash/pair-s1";
const TRAINED: Pair = "trained";

fn folder(pair: Pair) -> PathBuf {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens");
    goldens.join(pair)
}

fn vocab_size(pair: Pair) -> u32 {
    Config::load(&folder(pair)).unwrap().vocab_size as u32
}

fn reference(pair: Pair, drafts: Drafts) -> Box<dyn Decoder> {
    let dir = folder(pair);
    let config = Config::load(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let weights = Weights::new(&config, &checkpoint).unwrap();
    Box::new(match drafts {
        Drafts::None => ReferenceDecoder::new(&config, &weights, None),
        Drafts::Replay(replay) => {
            ReferenceDecoder::new(&config, &weights, None).with_drafts(Box::new(replay), 8)
        }
        Drafts::Own => {
            let draft = Draft::open(&dir.join("dflash"), &config, DraftOptions::default()).unwrap();
            let network = DraftNetwork::new(
                &draft.config,
                &draft.weights().unwrap(),
                draft.mask_embedding.clone(),
            );
            ReferenceDecoder::new(&config, &weights, Some(network))
        }
    })
}

/// Two threads on a busy machine wait for each other; that threads change no bit is tested below.
fn cpu(pair: Pair, drafts: Drafts) -> Box<dyn Decoder> {
    cpu_with(1, pair, drafts)
}

fn cpu_with_threads(pair: Pair, drafts: Drafts) -> Box<dyn Decoder> {
    cpu_with(2, pair, drafts)
}

fn cpu_with(threads: usize, pair: Pair, drafts: Drafts) -> Box<dyn Decoder> {
    let dir = folder(pair);
    let config = Config::load(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let weights = Weights::new(&config, &checkpoint).unwrap();
    let options = CpuOptions {
        threads: Some(threads),
        sequences: 24,
        kv_tokens: Some(4096),
    };
    let new = |draft| CpuDecoder::new(&config, &weights, draft, options).unwrap();
    Box::new(match drafts {
        Drafts::None => new(None),
        Drafts::Replay(replay) => new(None).with_drafts(Box::new(replay), 8),
        Drafts::Own => {
            let draft = Draft::open(&dir.join("dflash"), &config, DraftOptions::default()).unwrap();
            let weights = draft.weights().unwrap();
            new(Some((&draft, &weights)))
        }
    })
}

type Backend = fn(Pair, Drafts) -> Box<dyn Decoder>;

/// Every backend there is, by name.
const BACKENDS: [(&str, Backend); 2] = [("reference", reference), ("cpu", cpu)];

fn start(decoder: Box<dyn Decoder>) -> EngineHandle {
    Engine::start(decoder, Arc::new(ByteTokens), EngineOptions::default()).unwrap()
}

/// Prompt `i`: random tokens, or a short pattern repeated, 1 to 60 tokens long.
fn prompt(i: usize, vocab: u32) -> Vec<TokenId> {
    let dice = |n: u32| bits(7, i as u32 * 64 + n, Purpose::Sample);
    let length = 1 + (dice(0) % [6, 20, 60][i % 3]) as u32;
    let period = if i.is_multiple_of(2) {
        length
    } else {
        1 + length / 4
    };
    (0..length)
        .map(|j| (dice(1 + j % period) % u64::from(vocab)) as TokenId)
        .collect()
}

fn request(i: usize, vocab: u32, draft: DraftWidth) -> Request {
    let mut request = Request::new(prompt(i, vocab));
    request.stop.max_tokens = Some(4 + (i % 21) as u32);
    request.draft = draft;
    request
}

fn read(stream: Stream) -> (Vec<TokenId>, Stats) {
    let (mut tokens, mut stats) = (Vec::new(), Stats::default());
    for event in stream {
        match event {
            Event::Piece(piece) => tokens.extend(piece.tokens),
            Event::Finished(end) => {
                assert_eq!(end.reason.name(), "length", "{:?}", end.reason);
                stats = end.stats;
            }
            Event::Prompt(_) => {}
        }
    }
    (tokens, stats)
}

/// Answers to all prompts, `batch` of them at a time: as one leaves the next one joins.
fn answers(
    engine: &EngineHandle,
    (prompts, batch): (usize, usize),
    make: impl Fn(usize) -> Request,
) -> Vec<(Vec<TokenId>, Stats)> {
    let (mut done, mut open) = (Vec::new(), Vec::new());
    for i in 0..prompts {
        open.push(engine.submit(make(i)).unwrap());
        if open.len() == batch {
            done.push(read(open.remove(0)));
        }
    }
    done.extend(open.into_iter().map(read));
    done
}

fn texts(answers: Vec<(Vec<TokenId>, Stats)>) -> Vec<Vec<TokenId>> {
    answers.into_iter().map(|(tokens, _)| tokens).collect()
}

#[test]
fn greedy_text_is_the_same_with_any_drafter_width_and_batch() {
    for backend in BACKENDS {
        let (expected, whole) = plain_texts(backend, RANDOM, PROMPTS);
        let vocab_size = vocab_size(RANDOM);
        let replay = |shift| {
            let texts = whole.clone();
            Drafts::Replay(Replay {
                texts,
                shift,
                vocab_size,
            })
        };
        let drafters = [
            ("random", Drafts::Own),
            ("right", replay(0)),
            ("wrong", replay(1)),
        ];
        for (drafter, drafts) in drafters {
            compare(backend, RANDOM, drafter, drafts, &expected);
        }
    }
}

#[test]
fn greedy_text_is_the_same_with_a_trained_drafter() {
    for backend in BACKENDS {
        // All of them take the reference minutes: KILOTOK_TEST_ALL=1.
        let all = backend.0 != "reference" || std::env::var_os("KILOTOK_TEST_ALL").is_some();
        let prompts = if all { PROMPTS } else { PROMPTS / 10 };
        let (expected, _) = plain_texts(backend, TRAINED, prompts);
        compare(backend, TRAINED, "trained", Drafts::Own, &expected);
    }
}

/// A prompt's length, and the prompt with its answer.
type Whole = (usize, Vec<TokenId>);

/// Answers without drafts, alone and with their prompts.
fn plain_texts(
    (_, backend): (&str, Backend),
    pair: Pair,
    prompts: usize,
) -> (Vec<Vec<TokenId>>, Vec<Whole>) {
    let vocab = vocab_size(pair);
    let plain = start(backend(pair, Drafts::None));
    let expected = texts(answers(&plain, (prompts, 1), |i| {
        request(i, vocab, DraftWidth::Off)
    }));
    let whole = (0..prompts).map(|i| {
        let prompt = prompt(i, vocab);
        (prompt.len(), [prompt, expected[i].clone()].concat())
    });
    let whole = whole.collect();
    (expected, whole)
}

/// Every width and batch gives the `expected` texts.
fn compare(
    (name, backend): (&str, Backend),
    pair: Pair,
    drafter: &str,
    drafts: Drafts,
    expected: &[Vec<TokenId>],
) {
    let vocab = vocab_size(pair);
    let engine = start(backend(pair, drafts));
    for width in WIDTHS {
        for batch in [1, 2, 8] {
            let what = format!("{name}, {drafter} drafter, {width:?}, batch {batch}");
            let found = answers(&engine, (expected.len(), batch), |i| {
                request(i, vocab, width)
            });
            check_acceptance(&found, drafter, width, &what);
            let found = texts(found);
            let wrong = found.iter().zip(expected).filter(|(f, e)| f != e).count();
            assert_eq!(wrong, 0, "{what}: {wrong} of {} differ", expected.len());
        }
    }
}

/// Acceptance length exactly 1 with the drafter that is always wrong, exactly the width with the
/// one that is always right (but for the last step, which the end of the text cuts).
/// A trained drafter has some drafts kept and some refused, so both ways are walked.
fn check_acceptance(found: &[(Vec<TokenId>, Stats)], drafter: &str, width: DraftWidth, what: &str) {
    let sum = |of: fn(&Stats) -> u64| found.iter().map(|(_, stats)| of(stats)).sum::<u64>();
    let (drafted, accepted) = (sum(|s| s.draft.drafted), sum(|s| s.draft.accepted));
    if drafter == "trained" && width != DraftWidth::Auto {
        let kept = accepted as f64 / drafted as f64;
        assert!(
            (0.02..0.95).contains(&kept),
            "{what}: {kept} of drafts kept"
        );
    }
    for (tokens, stats) in found {
        let counts = &stats.draft;
        if drafter == "wrong" {
            assert_eq!(counts.acceptance_length(), 1.0, "{what}");
        }
        if let (DraftWidth::Fixed(width), "right") = (width, drafter) {
            let (whole, rest) = (
                tokens.len() as u64 / u64::from(width),
                tokens.len() as u64 % u64::from(width),
            );
            assert_eq!(counts.steps, whole + u64::from(rest > 0), "{what}");
            assert_eq!(
                counts
                    .histogram
                    .get(width as usize - 1)
                    .copied()
                    .unwrap_or(0),
                whole,
                "{what}"
            );
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_alone_in_a_batch_and_after_a_restart() {
    let vocab = vocab_size(RANDOM);
    let backends: [(&str, Backend); 3] = [
        ("reference", reference),
        ("cpu", cpu),
        ("cpu, 2 threads", cpu_with_threads),
    ];
    let mut of_cpu: BTreeMap<u8, Vec<Vec<TokenId>>> = BTreeMap::new();
    for (name, backend) in backends {
        for draft_sampling in [DraftSampling::Greedy, DraftSampling::Sampled] {
            let make = |i: usize| {
                let mut request = request(i, vocab, DraftWidth::Fixed(5));
                request.sampling = SamplingParams {
                    temperature: 0.9,
                    top_p: 0.95,
                    frequency_penalty: 0.2,
                    seed: i as u64,
                    draft_sampling,
                    ..Default::default()
                };
                request
            };
            let first = start(backend(RANDOM, Drafts::Own));
            let alone = texts(answers(&first, (PROMPTS, 1), make));
            let again = start(backend(RANDOM, Drafts::Own));
            assert!(
                alone == texts(answers(&again, (PROMPTS, 8), make)),
                "{name} {draft_sampling:?}"
            );
            if draft_sampling == DraftSampling::Greedy {
                // Drawn as without a drafter: the width does not show either.
                let plain = |i| Request {
                    draft: DraftWidth::Off,
                    ..make(i)
                };
                assert!(
                    alone == texts(answers(&first, (PROMPTS, 1), plain)),
                    "{name} without drafts"
                );
            }
            if name.starts_with("cpu") {
                let one = of_cpu.entry(draft_sampling as u8);
                let one = one.or_insert_with(|| alone.clone());
                assert!(*one == alone, "{name}: the number of threads shows");
            }
        }
    }
}

/// A second turn reuses the first one's keys and values, the drafter's context included, and says
/// the same as without the cache.
#[test]
fn a_second_turn_reuses_the_first_one_and_says_the_same() {
    let vocab = vocab_size(RANDOM);
    for (name, backend) in BACKENDS {
        let warm = start(backend(RANDOM, Drafts::Own));
        let options = EngineOptions {
            prefix_cache: false,
            ..EngineOptions::default()
        };
        let cold =
            Engine::start(backend(RANDOM, Drafts::Own), Arc::new(ByteTokens), options).unwrap();
        for i in 0..20 {
            for width in [DraftWidth::Off, DraftWidth::Fixed(8)] {
                let mut text: Vec<TokenId> =
                    (0..4).flat_map(|n| prompt(i + n * 20, vocab)).collect();
                for turn in 0..3 {
                    let mut request = request(i, vocab, width);
                    request.prompt = text.clone();
                    let (found, stats) = read(warm.submit(request.clone()).unwrap());
                    let (expected, _) = read(cold.submit(request).unwrap());
                    assert_eq!(found, expected, "{name} {i} {width:?} turn {turn}");
                    // All but the anchor, and the reference backend can go back anywhere.
                    let known = text.len() as u32 - 1 - 3 * u32::from(turn > 0);
                    if turn > 0 && name == "reference" {
                        assert!(stats.cached_tokens >= known - 1, "{stats:?}, {known} known");
                    }
                    text.extend(found);
                    text.extend([1, 2, 3].map(|token| token % vocab));
                }
            }
        }
    }
}
