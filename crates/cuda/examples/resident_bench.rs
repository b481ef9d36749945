//! The resident kernel on this GPU.
//!
//! `parity DIR..`: steps of checkpoints against the reference with the device's roundings.
//! `dummy CONFIG RANK RANKS CONTEXT STEPS ROWS..`: milliseconds of a step with random weights (synthetic), the other
//! ranks looped back; the memory's limit from the same run; where the time goes. `--o-bf16` keeps
//! the output projection in BF16. Run: `cargo run --release -p cuda --example resident_bench -- ..`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use cuda::cubins::{compile, find_nvcc};
use cuda::layout::{OPS, StepState};
use cuda::load::{Source, formats};
use cuda::program::Formats;
use cuda::replay::{Replay, largest_difference};
use cuda::resident::{Part, Resident};
use cuda::schedule::{Buffer, Schedule, Shard};
use cuda::strips::Format;
use model::{Checkpoint, Config, Weights};

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.first().map(String::as_str) {
        Some("parity") => args[1..].iter().try_for_each(|dir| parity(Path::new(dir))),
        Some("dummy") if args.len() >= 7 => dummy(&args[1..]),
        _ => Err("usage: parity DIR.. | dummy CONFIG RANK RANKS CONTEXT STEPS ROWS..".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn image() -> Result<Vec<u8>, Failure> {
    if let Some(path) = std::env::var_os("KILOTOK_CUBIN") {
        return Ok(std::fs::read(path)?);
    }
    let cache = std::env::temp_dir().join("kilotok-cubins");
    Ok(compile(&find_nvcc()?, "resident.cu", &cache)?.image)
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

fn parity(dir: &Path) -> Result<(), Failure> {
    let config = Config::load(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let weights = Weights::new(&config, &checkpoint)?;
    let formats = formats(&weights);
    let part = Part {
        rank: 0,
        ranks: 1,
        context: 64,
    };
    let mut resident = Resident::new(&config, &formats, part, &image()?)?;
    let source = Source {
        config: &config,
        weights: &weights,
        formats: &formats,
        rank: 0,
        ranks: 1,
    };
    resident.load(&source, |_| ())?;
    let shard = Shard {
        rank: 0,
        ranks: 1,
        ctas: resident.ctas(),
    };
    let schedule = Schedule::new(&config, shard)?;
    let mut replay = Replay::new(&config, &weights, &schedule).rounded();
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

fn dummy(args: &[String]) -> Result<(), Failure> {
    let (o_bf16, args): (Vec<&String>, Vec<&String>) = args.iter().partition(|a| *a == "--o-bf16");
    let o = if o_bf16.is_empty() {
        Format::Fp8
    } else {
        Format::Bf16
    };
    let config = Config::from_json(&std::fs::read_to_string(args[0])?)?;
    let number = |i: usize| args[i].parse::<usize>();
    let (rank, ranks, context, steps) = (number(1)?, number(2)?, number(3)?, number(4)?);
    let part = Part {
        rank,
        ranks,
        context: context + 64,
    };
    let began = Instant::now();
    let mut resident = Resident::new(&config, &Formats::release(&config, o), part, &image()?)?;
    resident.fill()?;
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
    println!("memory limit {limit:.0} GB/s");
    println!("rows,ms_median,ms_p99,experts,GB,GB_s,share");
    for rows in args[5..].iter().map(|a| a.parse::<usize>()) {
        measure(&mut resident, &config, context, steps, rows?, limit)?;
    }
    println!("memory limit {:.0} GB/s", resident.read_limit()?);
    Ok(())
}

/// `steps` launches of 8 chained steps each: the host's part is divided by 8.
fn measure(
    resident: &mut Resident,
    config: &Config,
    context: usize,
    steps: usize,
    rows: usize,
    limit: f64,
) -> Result<(), Failure> {
    const CHAINED: u32 = 8;
    let tokens: Vec<u32> = (0..rows as u32)
        .map(|r| (r * 7919 + 31) % config.vocab_size as u32)
        .collect();
    resident.set_state(&state(&tokens, context, 1))?;
    resident.run(CHAINED, false)?;
    let mut times = Vec::new();
    for _ in 0..steps / CHAINED as usize {
        let start = Instant::now();
        resident.run(CHAINED, false)?;
        times.push(start.elapsed().as_secs_f64() * 1e3 / f64::from(CHAINED));
    }
    times.sort_by(f64::total_cmp);
    let end = resident.state()?;
    let experts = f64::from(end.distinct) / f64::from(end.routed.max(1));
    let (fixed, expert) = resident.program().step_bytes();
    let routed = resident.program().routed_layers();
    let bytes = fixed as f64 + expert * experts * routed as f64;
    let median = times[times.len() / 2];
    let rate = bytes / median * 1e-6;
    println!(
        "{rows},{median:.4},{:.4},{experts:.1},{:.3},{rate:.0},{:.3}",
        times[(times.len() - 1) * 99 / 100],
        bytes * 1e-9,
        rate / limit
    );
    resident.run(1, true)?;
    phases(resident)
}

/// Microseconds of an average instruction of each kind, at 1.98 GHz: until it may start, and its own
/// work, for the slowest and the average CTA.
fn phases(resident: &mut Resident) -> Result<(), Failure> {
    let stamps = resident.stamps()?;
    let instructions = &resident.program().instructions;
    let (count, ctas) = (instructions.len(), resident.ctas());
    let mut sums = vec![[0.0f64; 4]; OPS.len()];
    for (n, i) in instructions.iter().enumerate() {
        let us = |cta: usize, from: usize, to: usize| {
            let at = (cta * count + n) * 3;
            (stamps[at + to] - stamps[at + from]) as f64 / 1980.0
        };
        let all = |from, to| (0..ctas).map(move |c| us(c, from, to));
        let sum = &mut sums[i.op as usize];
        sum[0] += 1.0;
        sum[1] += all(0, 1).sum::<f64>() / ctas as f64;
        sum[2] += all(1, 2).sum::<f64>() / ctas as f64;
        sum[3] += all(1, 2).fold(0.0, f64::max);
    }
    for (op, [n, wait, work, longest]) in OPS.iter().zip(sums) {
        println!(
            "  {op:<10} x{n:<4} wait+stage {:7.2} us  work {:7.2} us  longest {:7.2} us",
            wait / n,
            work / n,
            longest / n
        );
    }
    Ok(())
}
