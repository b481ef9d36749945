//! Every instruction of the resident step against its reference op, on the machine's own operands.
//!
//! `tiny DIR..`: checkpoints, steps of 3, 8 and 1 rows. `layer CONFIG LAYER RANKS`: one layer of a config as one of
//! RANKS holds it, synthetic weights, random routing, of which only the experts that are chosen are packed.
//! `--gpus=N` splits the model, or that part of a layer for N ranks together, over N GPUs of this host, op by op on every rank;
//! `--emulated` runs the kernels on the CPU instead; `--fp8` with plain e4m3 activations, `--wide` with two f16 each; `--kv-fp8` with keys and
//! values in e4m3, `--kv-wide` with two bf16 each. Fails when a difference is past its limit. Run: `cargo run --release -p cuda --example resident_ops -- layer bench/configs/mimo-v2.5-pro.json 1 8`.

#[path = "../tests/emulated/group.rs"]
#[allow(dead_code)]
mod group;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use cuda::images::Numbers;
use cuda::layout::RANKS_MAX;
use cuda::load::{Source, formats};
use cuda::parity::{Case, Compared, Machine, step};
use cuda::program::{Bases, Formats, Piece, Program, Settings, What};
use cuda::replay::Replay;
use cuda::resident::{Part, Ranks};
use cuda::schedule::{Schedule, Shard};
use cuda::strips::Format;
use cuda::synthetic::one_layer;
use group::{CONTEXT, CTAS, Model};
use model::config::{FfnConfig, LayerConfig};
use model::{Checkpoint, Config, Weights};

/// Where and with what.
#[derive(Clone, Copy)]
struct How {
    emulated: bool,
    numbers: Numbers,
    /// Ranks, a GPU each.
    gpus: usize,
}

impl How {
    fn settings(self) -> Settings {
        Settings {
            context: CONTEXT,
            numbers: self.numbers,
        }
    }
}

type Failure = Box<dyn std::error::Error>;

/// Rows of the steps.
const ROWS: [u32; 3] = [3, 8, 1];
/// Vocabulary of a layer on its own.
const VOCAB_SIZE: usize = 1024;

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut args: Vec<String>) -> Result<(), Failure> {
    let how = How {
        numbers: Numbers::take(&mut args),
        emulated: args.iter().any(|a| a == "--emulated"),
        gpus: gpus(&args)?,
    };
    args.retain(|a| a != "--emulated" && !a.starts_with("--gpus="));
    match args.first().map(String::as_str) {
        Some("tiny") => args[1..].iter().try_for_each(|dir| tiny(dir, how)),
        Some("layer") if args.len() == 4 => layer(&args[1..], how),
        _ => Err(format!(
            "usage: [--emulated] {} [--gpus=N] tiny DIR.. | layer CONFIG LAYER RANKS",
            Numbers::SWITCHES
        )
        .into()),
    }
}

/// What `--gpus=N` says; 1 without it.
fn gpus(args: &[String]) -> Result<usize, Failure> {
    let Some(given) = args.iter().find_map(|a| a.strip_prefix("--gpus=")) else {
        return Ok(1);
    };
    match given.parse() {
        Ok(n @ 1..=RANKS_MAX) => Ok(n),
        _ => Err(format!("--gpus={given}: expected 1 to {RANKS_MAX}").into()),
    }
}

fn tiny(dir: &str, how: How) -> Result<(), Failure> {
    let path = Path::new(dir);
    let model = Model::of(Config::load(path)?, Checkpoint::open(path)?).with(how.numbers);
    compare(dir, &model, how)
}

fn layer(args: &[String], how: How) -> Result<(), Failure> {
    let config = Config::from_json(&std::fs::read_to_string(&args[0])?)?;
    let (layer, ranks): (usize, usize) = (args[1].parse()?, args[2].parse()?);
    if !ranks.is_multiple_of(how.gpus) || ranks == 0 {
        return Err(format!("RANKS {ranks}: expected a multiple of {} GPUs", how.gpus).into());
    }
    let config = one_layer(&config, layer, ranks / how.gpus, VOCAB_SIZE)?;
    let formats = Formats::release(&config, Format::Fp8);
    let began = Instant::now();
    let model = Model::synthetic(config, &formats).with(how.numbers);
    println!("synthetic weights written in {:.1} s", seconds(began));
    let name = format!(
        "layer {layer} of {}, {} of {ranks} ranks",
        args[0], how.gpus
    );
    compare(&name, &model, how)
}

fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}

fn tokens(step: usize, rows: u32, vocab_size: usize) -> Vec<u32> {
    let token = |r: u32| (step as u32 * 31 + r * 17 + 5) % vocab_size as u32;
    (0..rows).map(token).collect()
}

/// Positions and tokens of the steps.
fn steps(config: &Config) -> Vec<(usize, Vec<u32>)> {
    let mut position = 0;
    let step = |(n, rows): (usize, u32)| {
        let at = position;
        position += rows as usize;
        (at, tokens(n, rows, config.vocab_size))
    };
    ROWS.into_iter().enumerate().map(step).collect()
}

/// The experts that the steps choose by the reference alone, layer by layer.
fn chosen(config: &Config, replay: &mut Replay<'_>) -> BTreeSet<(usize, usize)> {
    let mut out = BTreeSet::new();
    for (position, tokens) in steps(config) {
        replay.run(&tokens, position, usize::MAX);
        for layer in 0..config.layers.len() {
            for row in 0..tokens.len() {
                // The buffer holds the last layer's logits: right for one layer; others keep all experts.
                out.extend(replay.experts(layer, 0, row).iter().map(|e| (layer, e.0)));
            }
        }
    }
    out
}

fn compare(name: &str, model: &Model, how: How) -> Result<(), Failure> {
    let emulated = how.emulated;
    let (config, weights) = (&model.config, model.weights());
    let formats = formats(&weights, None);
    let shard = Shard {
        rank: 0,
        ranks: how.gpus,
        ctas: CTAS,
    };
    let schedule = Schedule::new(config, shard)?;
    let began = Instant::now();
    let mut replay = Replay::new(config, &weights, &schedule).as_device(how.numbers);
    let alone = matches!(
        config.layers[..],
        [LayerConfig {
            ffn: FfnConfig::Moe(_),
            ..
        }]
    );
    let chosen = match alone {
        true => chosen(config, &mut replay),
        false => BTreeSet::new(),
    };
    println!(
        "{name}: {}, {} experts of the reference's routing, {:.1} s",
        how.numbers,
        chosen.len(),
        seconds(began)
    );
    let keep = |piece: &Piece| match piece.what {
        What::GateUp(e) | What::Down(e) => !alone || chosen.contains(&(piece.layer, e)),
        _ => true,
    };
    let mut case = Case {
        config,
        schedule: &schedule,
        formats: &formats,
        replay,
    };
    let mut machine: Box<dyn Machine> = match emulated {
        true => {
            // Refuses shapes that do not fit with a line; the emulator's group takes them for granted.
            Program::new(config, &schedule, &formats, how.settings(), Bases::NOWHERE)?;
            Box::new(model.some_pieces(0..how.gpus, how.gpus, &keep))
        }
        false => Box::new(on_gpu((config, &weights, &formats), &keep, how)?),
    };
    let began = Instant::now();
    let mut past = 0;
    for (position, tokens) in steps(config) {
        for c in step(&mut case, machine.as_mut(), &tokens, position)? {
            past += usize::from(!c.holds());
            print_line(&c, tokens.len());
        }
    }
    println!("{name}: {past} past their limits, {:.1} s", seconds(began));
    match past {
        0 => Ok(()),
        _ => Err(format!("{name}: {past} instructions differ").into()),
    }
}

fn on_gpu(
    (config, weights, formats): (&Config, &Weights<'_>, &Formats),
    keep: &dyn Fn(&Piece) -> bool,
    how: How,
) -> Result<Ranks, Failure> {
    let part = Part {
        rank: 0,
        ranks: how.gpus,
        settings: how.settings(),
    };
    let mut ranks = Ranks::new(config, formats, part)?;
    for (rank, resident) in ranks.each().iter().enumerate() {
        resident.fill()?; // experts that nobody chooses
        let source = Source {
            config,
            weights,
            formats,
            rank,
            ranks: how.gpus,
        };
        resident.load_some(&source, keep, |_| ())?;
    }
    Ok(ranks)
}

fn print_line(c: &Compared, rows: usize) {
    let layer = c.layer.map_or("-".into(), |l| l.to_string());
    let end = if c.holds() { "" } else { "  PAST LIMIT" };
    let (op, largest, l2) = (c.op, c.largest, c.l2);
    println!(
        "  rank {} rows {rows} layer {layer:<2} {op:<10} largest {largest:.1e} l2 {l2:.1e}{end}",
        c.rank
    );
}
