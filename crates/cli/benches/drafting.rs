//! Drafting on a real checkpoint: is the text the same, and what does it cost or win?
//! `cargo bench -p cli --bench drafting -- MODEL [PROMPTS.jsonl [COUNT [DRAFTER [TOKENS]]]]`
//!
//! Prompts are the first user messages of the file, through the model's chat template; texts end at the
//! model's own end tokens or after TOKENS (48). Plain greedy text comes first; then
//! drafters that are always right and always wrong, and DRAFTER when given, at widths 2, 4, 8 and
//! auto in batches of 1, 2 and 8: differing texts are counted. Times are of batch 1, a drafted run of a
//! prompt between two plain ones, so that a busy machine hits both.
//!
//! With `--texts-only` nothing is timed and DRAFTER alone is compared, with the prefix cache on: for a thousand
//! prompts (`bench/cut_prompts.py`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use cpu::{CpuDecoder, CpuOptions};
use engine::{
    DraftWidth, Engine, EngineHandle, EngineOptions, Event, Request, Stats, StopRules, Stream,
};
use model::chat_template::{ChatTemplate, Conversation};
use model::detokenizer::ByteTokens;
use model::draft::{Draft, DraftOptions, Replay};
use model::generation::GenerationDefaults;
use model::tokenizer::Tokenizer;
use model::{Checkpoint, Config, Decoder, TokenId, Weights};

const TOKENS: u32 = 48;

/// What all runs have in common.
static RULES: std::sync::OnceLock<StopRules> = std::sync::OnceLock::new();
const WIDTHS: [DraftWidth; 4] = [
    DraftWidth::Auto,
    DraftWidth::Fixed(2),
    DraftWidth::Fixed(4),
    DraftWidth::Fixed(8),
];

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench" && a != "--texts-only")
        .collect();
    let texts_only = std::env::args().any(|a| a == "--texts-only");
    let dir = PathBuf::from(args.first().map_or("models/kilotok-mini", String::as_str));
    let count = args.get(2).map_or(Ok(16), |n| n.parse())?;
    let vocab = Config::load(&dir)?.vocab_size as u32;
    let rules = StopRules {
        max_tokens: Some(args.get(4).map_or(Ok(TOKENS), |n| n.parse())?),
        eos_ids: GenerationDefaults::open(&dir, vocab)?.eos_ids,
        ..StopRules::default()
    };
    let rules = RULES.get_or_init(|| rules);
    let prompts = prompts(&dir, args.get(1).map(Path::new), count)?;
    let plain = start(open(&dir, None, None)?, texts_only)?;
    let expected: Vec<_> = prompts
        .iter()
        .map(|p| ask(&plain, p, DraftWidth::Off).0)
        .collect();
    let texts = prompts.iter().zip(&expected);
    let texts: Vec<_> = texts
        .map(|(p, t)| (p.len(), [p.clone(), t.clone()].concat()))
        .collect();
    let vocab_size = Config::load(&dir)?.vocab_size as u32;
    let replay = |shift| Replay {
        texts: texts.clone(),
        shift,
        vocab_size,
    };
    let mut engines = Vec::new();
    if !texts_only {
        let right = start(open(&dir, None, Some(replay(0)))?, false)?;
        let wrong = start(open(&dir, None, Some(replay(1)))?, false)?;
        engines.extend([("always right", right), ("always wrong", wrong)]);
    }
    if let Some(draft) = args.get(3) {
        let decoder = open(&dir, Some(Path::new(draft)), None)?;
        engines.push(("drafter", start(decoder, texts_only)?));
    }
    println!(
        "{} prompts, at most {} tokens each, greedy, {}",
        prompts.len(),
        rules.max_tokens.unwrap_or(0),
        dir.display()
    );
    for (name, engine) in &engines {
        for width in WIDTHS {
            let differ =
                [1, 2, 8].map(|batch| differing(engine, &prompts, &expected, width, batch));
            if texts_only {
                println!("{name}, {width:?}: {differ:?} texts differ at batch 1, 2, 8");
                continue;
            }
            let (speed, length, share) = speed(engine, &plain, &prompts, width);
            println!(
                "{name}, {width:?}: {differ:?} texts differ at batch 1, 2, 8; {speed:.3} x plain, \
                 acceptance length {length:.2}, {:.0} % of steps drafted",
                100.0 * share
            );
        }
    }
    Ok(())
}

fn prompts(dir: &Path, file: Option<&Path>, count: usize) -> anyhow::Result<Vec<Vec<TokenId>>> {
    let tokenizer = Tokenizer::open(dir, Config::load(dir)?.vocab_size as u32)?;
    let built_in = [
        "Write a Python function that checks whether a number is prime.",
        "What is the capital of France?",
    ];
    let texts: Vec<String> = match file {
        None => built_in.map(String::from).into(),
        Some(file) => std::fs::read_to_string(file)?
            .lines()
            .take(count)
            .map(|line| {
                let value: serde_json::Value = serde_json::from_str(line)?;
                let text = value["messages"][0]["content"].as_str();
                Ok(text.unwrap_or_default().to_owned())
            })
            .collect::<anyhow::Result<_>>()?,
    };
    let template = ChatTemplate::open(dir)?.context("a model with a chat template")?;
    let chat = |text: &String| {
        let messages = [serde_json::json!({"role": "user", "content": text})];
        template.render(&Conversation {
            messages: &messages,
            tools: &[],
            add_generation_prompt: true,
            variables: &[],
        })
    };
    texts
        .iter()
        .map(|text| Ok(tokenizer.encode(&chat(text)?)?))
        .collect()
}

fn open(
    dir: &Path,
    draft: Option<&Path>,
    replay: Option<Replay>,
) -> anyhow::Result<Box<dyn Decoder>> {
    let mut config = Config::load(dir)?;
    config.context_tokens = config.context_tokens.min(4096);
    let checkpoint = Checkpoint::open(dir)?;
    let weights = Weights::new(&config, &checkpoint)?;
    let draft = draft
        .map(|dir| Draft::open(dir, &config, DraftOptions::default()))
        .transpose()?;
    let draft_weights = draft.as_ref().map(Draft::weights).transpose()?;
    let both = draft.as_ref().zip(draft_weights.as_ref());
    let options = CpuOptions {
        sequences: 24,
        ..CpuOptions::default()
    };
    let decoder = CpuDecoder::new(&config, &weights, both, options)?;
    Ok(match replay {
        Some(replay) => Box::new(decoder.with_drafts(Box::new(replay), 8)),
        None => Box::new(decoder),
    })
}

/// Timed runs go without a prefix cache: each computes the same.
fn start(decoder: Box<dyn Decoder>, prefix_cache: bool) -> anyhow::Result<EngineHandle> {
    let options = EngineOptions {
        prefix_cache,
        ..EngineOptions::default()
    };
    Ok(Engine::start(decoder, Arc::new(ByteTokens), options)?)
}

fn submit(engine: &EngineHandle, prompt: &[TokenId], width: DraftWidth) -> Stream {
    let mut request = Request::new(prompt.to_vec());
    request.stop = RULES.get().cloned().unwrap_or_default();
    request.draft = width;
    engine.submit(request).expect("a request that fits")
}

fn read(stream: Stream) -> (Vec<TokenId>, Stats) {
    let (mut tokens, mut stats) = (Vec::new(), Stats::default());
    for event in stream {
        match event {
            Event::Piece(piece) => tokens.extend(piece.tokens),
            Event::Finished(end) => stats = end.stats,
            Event::Prompt(_) => {}
        }
    }
    (tokens, stats)
}

fn ask(engine: &EngineHandle, prompt: &[TokenId], width: DraftWidth) -> (Vec<TokenId>, Stats) {
    read(submit(engine, prompt, width))
}

fn differing(
    engine: &EngineHandle,
    prompts: &[Vec<TokenId>],
    expected: &[Vec<TokenId>],
    width: DraftWidth,
    batch: usize,
) -> usize {
    let (mut found, mut open) = (Vec::new(), Vec::new());
    for prompt in prompts {
        open.push(submit(engine, prompt, width));
        if open.len() == batch {
            found.push(read(open.remove(0)).0);
        }
    }
    found.extend(open.into_iter().map(|stream| read(stream).0));
    found.iter().zip(expected).filter(|(a, b)| a != b).count()
}

/// Decoding speed over that of plain decoding (median of the prompts), the mean acceptance length,
/// and the share of steps that drafted.
fn speed(
    engine: &EngineHandle,
    plain: &EngineHandle,
    prompts: &[Vec<TokenId>],
    width: DraftWidth,
) -> (f64, f64, f64) {
    let (mut ratios, mut tokens, mut steps, mut drafting) = (Vec::new(), 0, 0, 0);
    for prompt in prompts {
        let before = ask(plain, prompt, DraftWidth::Off).1.decode_ms;
        let stats = ask(engine, prompt, width).1;
        let after = ask(plain, prompt, DraftWidth::Off).1.decode_ms;
        ratios.push((before + after) / 2.0 / stats.decode_ms);
        tokens += stats.draft.steps + stats.draft.accepted;
        steps += stats.draft.steps;
        drafting += stats.draft.drafting_steps;
    }
    ratios.sort_by(f64::total_cmp);
    let share = drafting as f64 / steps as f64;
    (
        ratios[ratios.len() / 2],
        tokens as f64 / steps as f64,
        share,
    )
}
