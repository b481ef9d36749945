//! The resident kernel on this GPU.
//!
//! `parity DIR..`: steps of checkpoints against the reference with the device's roundings.
//! `text DIR COUNT [DRAFT]`: tokens a second of COUNT tokens in one launch, plain and with the drafter in DRAFT.
//! `dummy CONFIG RANK RANKS CONTEXT STEPS ROWS..`: milliseconds of a step with random weights (synthetic), the other
//! ranks looped back, or, with `--gpus`, on GPUs of this host, all RANKS of them (RANK does not count); the memory's limit from the same run; where the time goes. `--o-bf16` keeps
//! the output projection in BF16; `--draft=CONFIG` adds a drafter of that shape (random weights in BF16, `--draft-fp8`: in
//! FP8) to every step; `--only-experts` leaves attention out, from QKV to its sum;
//! `--timeline=FILE` draws a layer of the last row count over the multiprocessors. With all three: `--fp8` multiplies with plain e4m3
//! activations, `--wide` with two f16 each; `--kv-fp8` keeps the target's keys and values in e4m3, `--kv-wide` as two bf16 each. Run: `cargo run --release -p cuda --example resident_bench -- ..`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use cuda::bench::{Measured, Phase, Text, decode, picture, text};
use cuda::images::Numbers;
use cuda::layout::{Instr, OPS, StepState};
use cuda::program::{DraftFormats, Formats, Settings};
use cuda::replay::{Replay, largest_difference};
use cuda::resident::{Part, Ranks, Resident};
use cuda::schedule::{Buffer, Schedule, Shard};
use cuda::strips::Format;
use model::draft::{Draft, DraftConfig, DraftOptions};
use model::{Checkpoint, Config, Weights};

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let numbers = Numbers::take(&mut args);
    let done = match args.first().map(String::as_str) {
        Some("parity") => args[1..].iter().try_for_each(|dir| parity(Path::new(dir), numbers)),
        Some("dummy") if args.len() >= 7 => dummy(&args[1..], numbers),
        Some("text") if args.len() >= 3 => texts(&args[1..], numbers),
        _ => Err(format!("usage: {} parity DIR.. | text DIR COUNT [DRAFT] | dummy CONFIG RANK RANKS CONTEXT STEPS ROWS..", Numbers::SWITCHES).into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn state(tokens: &[u32], position: usize, chain: i32) -> StepState {
    let mut state = StepState {
        rows: tokens.len() as i32,
        position: position as i32,
        chain,
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
        resident.set_state(&state(&tokens, position, 0))?;
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

/// What routes and computes the experts: without attention, its projections and their sum over ranks.
fn expert_stage(i: &Instr) -> bool {
    let out = ["QKV", "ATTENTION", "O_PROJ"];
    // The verify pass begins with an even sum, with a drafter too.
    let after_attention = OPS[i.op as usize] == "ALL_REDUCE" && i.index % 2 == 0;
    !out.contains(&OPS[i.op as usize]) && !after_attention
}

/// Tokens after the arbitrary prompt.
const PROMPT: usize = 128;

fn texts(args: &[String], numbers: Numbers) -> Result<(), Failure> {
    let (dir, count) = (Path::new(&args[0]), args[1].parse::<usize>()?);
    let config = Config::load(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let weights = Weights::new(&config, &checkpoint)?;
    let open = |dir: &String| Draft::open(Path::new(dir), &config, DraftOptions::default());
    let draft = args.get(2).map(open).transpose()?;
    let settings = Settings {
        context: PROMPT + count + 64,
        numbers,
    };
    let mut resident = Resident::whole(&config, &weights, draft.as_ref(), settings)?;
    for rows in [1, 2, 4, 8] {
        if rows == 1 || draft.is_some() {
            let m = text(&mut resident, config.vocab_size, PROMPT, count, rows, None)?;
            print_text(&m);
        }
    }
    Ok(())
}

fn print_text(m: &Text) {
    println!(
        "{} rows: {} tokens in {} steps, {:.3} s: {:.1} tokens/s, {:.2} tokens a step",
        m.rows,
        m.tokens,
        m.steps,
        m.seconds,
        m.tokens_per_s(),
        m.tokens_per_step()
    );
}

/// The drafter that the switches ask for.
fn drafter(switches: &[&String], config: &Config) -> Result<Option<DraftFormats>, Failure> {
    let Some(path) = switches.iter().find_map(|s| s.strip_prefix("--draft=")) else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(path)?;
    let draft = DraftConfig::from_json(&text, config, DraftOptions::default())?;
    let format = match switches.iter().any(|s| *s == "--draft-fp8") {
        true => Format::Fp8,
        false => Format::Bf16,
    };
    Ok(Some(DraftFormats::uniform(&draft, format)))
}

fn dummy(args: &[String], numbers: Numbers) -> Result<(), Failure> {
    let (switches, args): (Vec<&String>, Vec<&String>) =
        args.iter().partition(|a| a.starts_with("--"));
    let given = |name: &str| switches.iter().any(|s| *s == name);
    let o = if given("--o-bf16") {
        Format::Bf16
    } else {
        Format::Fp8
    };
    let config = Config::from_json(&std::fs::read_to_string(args[0])?)?;
    let number = |i: usize| args[i].parse::<usize>();
    let (rank, ranks, context, steps) = (number(1)?, number(2)?, number(3)?, number(4)?);
    let part = Part {
        rank,
        ranks,
        settings: Settings {
            context: context + 64,
            numbers,
        },
    };
    let began = Instant::now();
    let formats = Formats::release(&config, o).with_draft(drafter(&switches, &config)?);
    let mut all = match given("--gpus") {
        true => Ranks::new(&config, &formats, part)?,
        false => Resident::new(&config, &formats, part)?.into(),
    };
    for resident in all.each() {
        resident.fill()?;
        if given("--only-experts") {
            resident.keep(expert_stage)?;
        }
    }
    let resident = all.first();
    let program = resident.program();
    println!(
        "synthetic weights {:.1} GB, state {:.2} GB, {} instructions, x {} B, filled in {:.1} s",
        program.weight_bytes as f64 * 1e-9,
        program.state_bytes as f64 * 1e-9,
        program.instructions.len(),
        program.x_bytes,
        began.elapsed().as_secs_f64()
    );
    let limit = resident.read_limit()?;
    println!(
        "memory limit {limit:.0} GB/s, {numbers} ({:.3} GB)",
        program.kv_bytes as f64 * 1e-9
    );
    println!("rows,ms_median,ms_p99,experts,GB,GB_s,share");
    for rows in args[5..].iter().map(|a| a.parse::<usize>()) {
        let m = decode(&mut all, config.vocab_size, context, steps as u32, rows?)?;
        print_row(&m, limit);
        print_phases(&m.phases);
    }
    println!("memory limit {:.0} GB/s", all.first().read_limit()?);
    if let Some(path) = switches.iter().find_map(|s| s.strip_prefix("--timeline=")) {
        std::fs::write(path, picture(all.first(), "synthetic weights")?)?;
    }
    Ok(())
}

fn print_row(m: &Measured, limit: f64) {
    println!(
        "{},{:.4},{:.4},{:.1},{:.3},{:.0},{:.3}",
        m.rows,
        m.ms_median,
        m.ms_p99,
        m.experts,
        m.bytes * 1e-9,
        m.gb_per_s(),
        m.gb_per_s() / limit
    );
}

fn print_phases(phases: &[Phase]) {
    for p in phases {
        println!(
            "  {:<8}{:<16} x{:<4} wait {:7.2} us  work {:7.2} us  longest {:7.2} us",
            p.pass, p.op, p.count, p.wait_us, p.work_us, p.longest_us
        );
    }
}
