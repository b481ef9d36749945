//! The resident kernel on this GPU over many tokens: same text as the CPU, no fault in long runs.
//!
//! `parity DIR..`: steps of checkpoints against the reference with the device's roundings. `greedy MODEL FILE COUNT [DRAFT]`: FILE has a line `prompt ids;token ids` a prompt, the second as the CPU
//! backend chose them, greedily; decodes as many, plain and with drafts of which some are wrong, and
//! names every difference with the gap of logits at the first one; with DRAFT its drafts, in runs of one launch. `soak MODEL SEEDS STEPS SECONDS [DRAFT]`:
//! chained steps from random rows and positions, as many as fit in the time. `--fp8`, `--wide`: activations in e4m3, or two f16 each;
//! `--kv-fp8`, `--kv-wide`: keys and values in e4m3, or two bf16 each.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use cuda::decoder::{CudaDecoder, RunPlan};
use cuda::images::Numbers;
use cuda::layout::StepState;
use cuda::program::Settings;
use cuda::replay::{Replay, largest_difference};
use cuda::resident::Resident;
use cuda::schedule::{Buffer, Schedule, Shard};
use model::decoder::{Decoder, SequenceStep, StepOutput, StepPlan, Tap, TokenId};
use model::draft::{Draft, DraftOptions, DraftSource};
use model::{Checkpoint, Config, Weights};

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let numbers = Numbers::take(&mut args);
    let done = match args.first().map(String::as_str) {
        Some("parity") => args[1..].iter().try_for_each(|dir| parity(Path::new(dir), numbers)),
        Some("greedy") if matches!(args.len(), 4 | 5) => greedy(&args[1..], numbers),
        Some("soak") if matches!(args.len(), 5 | 6) => soak(&args[1..], numbers),
        _ => Err(format!(
            "usage: {} parity DIR.. | greedy MODEL FILE COUNT [DRAFT] | soak MODEL SEEDS STEPS SECONDS [DRAFT]",
            Numbers::SWITCHES
        )
        .into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn state(tokens: &[u32], position: usize) -> StepState {
    let mut state = StepState {
        rows: tokens.len() as i32,
        position: position as i32,
        ..StepState::default()
    };
    for (to, token) in state.tokens.iter_mut().zip(tokens) {
        *to = *token as i32;
    }
    state
}

fn parity(dir: &Path, numbers: Numbers) -> Result<(), Failure> {
    let config = Config::load(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let weights = Weights::new(&config, &checkpoint)?;
    let context = 64;
    let mut resident = Resident::whole(&config, &weights, None, Settings { context, numbers })?;
    let shard = Shard {
        rank: 0,
        ranks: 1,
        ctas: resident.ctas(),
    };
    let schedule = Schedule::new(&config, shard)?;
    let mut replay = Replay::new(&config, &weights, &schedule).as_device(numbers);
    let mut position = 0;
    let mut found = Vec::new();
    for (step, rows) in [3u32, 1, 8, 5].into_iter().enumerate() {
        let vocab = config.vocab_size as u32;
        let tokens: Vec<u32> = (0..rows)
            .map(|r| (step as u32 * 31 + r * 17 + 5) % vocab)
            .collect();
        resident.set_state(&state(&tokens, position))?;
        resident.run(1, false)?;
        replay.run(&tokens, position, usize::MAX);
        let mut logits = vec![vec![0.0; config.vocab_size]; tokens.len()];
        for (row, logits) in logits.iter_mut().enumerate() {
            resident.logits(row, logits)?;
        }
        found.push(largest_difference(
            &logits,
            replay.buffer(0, Buffer::Logits),
        ));
        position += tokens.len();
    }
    let found: Vec<String> = found.iter().map(|d| format!("{d:.1e}")).collect();
    println!("parity {}: {}", dir.display(), found.join(" "));
    Ok(())
}

struct Case {
    prompt: Vec<TokenId>,
    expected: Vec<TokenId>,
}

fn cases(path: &str, count: usize) -> Result<Vec<Case>, Failure> {
    let text = std::fs::read_to_string(path)?;
    let ids = |s: &str| -> Result<Vec<TokenId>, Failure> {
        s.split(',').map(|t| Ok(t.parse()?)).collect()
    };
    let case = |line: &str| {
        let (prompt, expected) = line.split_once(';').ok_or("a line without `;`")?;
        Ok(Case {
            prompt: ids(prompt)?,
            expected: ids(expected)?,
        })
    };
    text.lines().take(count).map(case).collect()
}

/// The texts themselves as drafts, every third token wrong.
struct Drafts(Vec<Vec<TokenId>>);

impl DraftSource for Drafts {
    fn propose(&mut self, tokens: &[TokenId], count: usize, drafts: &mut Vec<TokenId>) {
        let known = self.0.iter().find(|t| t.starts_with(tokens));
        let from = tokens.len();
        for at in from..from + count {
            let right = known.and_then(|t| t.get(at)).copied().unwrap_or(0);
            drafts.push(if at % 3 == 0 { right ^ 1 } else { right });
        }
    }
}

/// `count` tokens after `prompt` in one launch, and the steps that it took.
fn run(
    decoder: &mut CudaDecoder,
    prompt: &[TokenId],
    count: usize,
    width: usize,
) -> Result<(Vec<TokenId>, usize), Failure> {
    let sequence = decoder.open()?;
    decoder.prefill(sequence, prompt)?;
    let plan = RunPlan {
        width,
        count,
        stops: &[],
        simulate_accepted: None,
    };
    let mut tokens = Vec::new();
    let done = decoder.generate(sequence, &plan, |given| {
        tokens.push(given.token);
        true
    })?;
    decoder.close(sequence);
    Ok((tokens, done.steps as usize))
}

/// `count` tokens after `prompt`, and the steps that it took.
fn answer(
    decoder: &mut CudaDecoder,
    prompt: &[TokenId],
    count: usize,
    width: u32,
) -> Result<(Vec<TokenId>, usize), Failure> {
    let sequence = decoder.open()?;
    decoder.prefill(sequence, prompt)?;
    let step = SequenceStep {
        sequence,
        width,
        chance_min: 0.0,
        simulate_accepted: None,
    };
    let plan = StepPlan {
        sequences: vec![step],
    };
    let (mut out, mut tokens, mut steps) = (StepOutput::default(), Vec::new(), 0);
    while tokens.len() < count {
        decoder.step(&plan, &mut out)?;
        tokens.extend_from_slice(&out.sequences[0].tokens);
        steps += 1;
    }
    decoder.close(sequence);
    tokens.truncate(count);
    Ok((tokens, steps))
}

/// Logit of `chosen` minus that of `other` after `tokens`.
fn gap(
    decoder: &mut CudaDecoder,
    tokens: &[TokenId],
    chosen: TokenId,
    other: TokenId,
) -> Result<f32, Failure> {
    let sequence = decoder.open()?;
    let mut found = f32::NAN;
    let last = tokens.len() as u32 - 1;
    let mut see = |position: u32, logits: &[f32]| {
        if position == last {
            found = logits[chosen as usize] - logits[other as usize];
        }
    };
    decoder.tap(sequence, tokens, Tap::Logits(&mut see))?;
    decoder.close(sequence);
    Ok(found)
}

/// What has been found so far.
#[derive(Default)]
struct Tally {
    /// Whether drafts are a drafter's, in runs of one launch.
    runs: bool,
    tokens: usize,
    steps: [usize; 2],
    differ: usize,
    drafted_differ: usize,
}

impl Tally {
    fn case(&mut self, n: usize, case: &Case, decoder: &mut CudaDecoder) -> Result<(), Failure> {
        let count = case.expected.len();
        let (plain, one) = answer(decoder, &case.prompt, count, 1)?;
        let (drafted, eight) = match self.runs {
            true => run(decoder, &case.prompt, count, 8)?,
            false => answer(decoder, &case.prompt, count, 8)?,
        };
        self.tokens += count;
        self.steps = [self.steps[0] + one, self.steps[1] + eight];
        self.drafted_differ += usize::from(plain != drafted);
        if let Some(at) = (0..count).find(|&k| plain[k] != case.expected[k]) {
            self.differ += 1;
            let text = [&case.prompt[..], &plain[..at]].concat();
            let gap = gap(decoder, &text, plain[at], case.expected[at])?;
            println!("prompt {n}: token {at}: gap of the logits {gap:.4}");
        }
        Ok(())
    }
}

fn greedy(args: &[String], numbers: Numbers) -> Result<(), Failure> {
    let dir = Path::new(&args[0]);
    let cases = cases(&args[1], args[2].parse()?)?;
    let config = Config::load(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let weights = Weights::new(&config, &checkpoint)?;
    let whole = |c: &Case| [&c.prompt[..], &c.expected[..]].concat();
    let open = |dir: &String| Draft::open(Path::new(dir), &config, DraftOptions::default());
    let draft = args.get(3).map(open).transpose()?;
    let mut decoder = CudaDecoder::new(&config, &weights, draft.as_ref(), Some(2048), numbers)?;
    if draft.is_none() {
        let drafts = Box::new(Drafts(cases.iter().map(whole).collect()));
        decoder = decoder.with_drafts(drafts, 8);
    }
    let mut tally = Tally {
        runs: draft.is_some(),
        ..Tally::default()
    };
    let began = Instant::now();
    for (n, case) in cases.iter().enumerate() {
        tally.case(n, case, &mut decoder)?;
    }
    let (prompts, took) = (cases.len(), began.elapsed().as_secs_f64());
    let Tally {
        tokens,
        steps: [plain, drafted],
        differ,
        drafted_differ,
        ..
    } = tally;
    println!("{prompts} prompts, {tokens} tokens, {took:.1} s: {differ} differ from the CPU's");
    println!("{drafted_differ} differ between plain ({plain} steps) and drafted ({drafted} steps)");
    Ok(())
}

/// Steps of a launch.
const CHAINED: u32 = 250;

/// A state with random rows, tokens and position.
fn random_state(random: &mut u64, context: usize, vocab_size: usize, block: usize) -> StepState {
    let mut next = |below: usize| {
        *random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((*random >> 33) as usize % below) as i32
    };
    StepState {
        block: block as i32,
        rows: 1 + next(if block > 0 { block } else { 8 }),
        position: next(context - 8),
        chain: 1,
        tokens: std::array::from_fn(|_| next(vocab_size)),
        ..StepState::default()
    }
}

fn soak(args: &[String], numbers: Numbers) -> Result<(), Failure> {
    let dir = Path::new(&args[0]);
    let (seeds, steps): (u64, u32) = (args[1].parse()?, args[2].parse()?);
    let seconds: f64 = args[3].parse()?;
    let config = Config::load(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let weights = Weights::new(&config, &checkpoint)?;
    let context = 256;
    let open = |dir: &String| Draft::open(Path::new(dir), &config, DraftOptions::default());
    let draft = args.get(4).map(open).transpose()?;
    let mut resident = Resident::whole(
        &config,
        &weights,
        draft.as_ref(),
        Settings { context, numbers },
    )?;
    let block = resident.program().block;
    let began = Instant::now();
    let (mut done, mut launches) = (0u64, 0u64);
    'seeds: for seed in 0..seeds {
        let mut random = seed * 0x9E37_79B9 + 1;
        for _ in 0..steps / CHAINED {
            if began.elapsed().as_secs_f64() > seconds {
                println!("time is up in seed {seed}");
                break 'seeds;
            }
            resident.set_state(&random_state(
                &mut random,
                context,
                config.vocab_size,
                block,
            ))?;
            resident.run(CHAINED, false)?;
            (done, launches) = (done + u64::from(CHAINED), launches + 1);
        }
    }
    let took = began.elapsed().as_secs_f64();
    println!(
        "{}: {done} steps in {launches} launches without a fault, {took:.1} s",
        dir.display()
    );
    Ok(())
}
