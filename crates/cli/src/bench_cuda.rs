//! `kilotok bench decode --device cuda`: milliseconds, bytes and share of the memory's limit of the
//! resident kernel's steps, the limit measured in the same run, and where the time goes.
//!
//! Rows after the first are the drafter's, or drafts that mean nothing; reports of random weights and of a simulated
//! acceptance say so. With a checkpoint, a text after an arbitrary prompt gives tokens a second.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cuda::bench::{Measured, Text, decode, expert_stage, picture, text};
use cuda::program::{DraftFormats, Formats, Settings};
use cuda::resident::{Part, Ranks, Resident};
use cuda::strips::Format;
use model::draft::{Draft, DraftConfig, DraftOptions};
use model::{Checkpoint, Config, Weights};
use serde_json::{Value, json};

use crate::args::{BenchDecodeArgs, Load, OProj};
use crate::failure::bad_input;
use crate::report::round;
use crate::{model_dir, output};

/// Positions past the context that a step may touch.
const SPARE: usize = 16;

/// Runs the command.
pub(crate) fn run(args: &BenchDecodeArgs) -> Result<()> {
    if let Some(rows) = args.rows.iter().find(|&&rows| rows > 8) {
        return bad_input(format!("--rows {rows}: --device cuda takes 1 to 8"));
    }
    if let Some(option) = args.gpu.of_random_weights()
        && args.gpu.load != Load::Dummy
    {
        return bad_input(format!(
            "{option}: expected --load dummy, found a checkpoint's weights"
        ));
    }
    let (dir, config) = model(args)?;
    let timeline = args.gpu.timeline.as_deref();
    let timeline = timeline.map(|path| output::create("--timeline", path));
    let timeline = timeline.transpose()?;
    let mut ranks = open(args, &dir, &config)?;
    let limit = ranks.first().read_limit()?;
    let mut results = Vec::new();
    for &rows in &args.rows {
        let context = args.context as usize;
        results.push(decode(
            &mut ranks,
            config.vocab_size,
            context,
            args.steps,
            rows as usize,
        )?);
    }
    if let Some(file) = timeline {
        draw(args, file, ranks.first())?;
    }
    let texts = texts(args, &config, ranks.first())?;
    let limit = limit.max(ranks.first().read_limit()?);
    if args.json {
        let model = dir.display().to_string();
        return output::json(&to_json(args, &model, &results, &texts, limit));
    }
    let mut text = heading(args, &dir);
    text += "rows  median ms    p99 ms   experts   GB read      GB/s  of limit\n";
    for m in &results {
        text += &line(m, limit);
    }
    for t in &texts {
        text += &format!(
            "{} rows: {:.1} tokens/s, {:.2} tokens a step{}\n",
            t.rows,
            t.tokens_per_s(),
            t.tokens_per_step(),
            if args.simulate_acceptance.is_some() {
                " (simulated)"
            } else {
                ""
            }
        );
    }
    text += &format!("plain read in the same run: {limit:.0} GB/s\n");
    output::write(text.as_bytes())
}

fn heading(args: &BenchDecodeArgs, dir: &Path) -> String {
    let weights = match (args.gpu.load, args.gpu.o_proj) {
        (Load::Checkpoint, _) => "",
        (Load::Dummy, OProj::Fp8) => " (synthetic weights)",
        (Load::Dummy, OProj::Bf16) => " (synthetic weights, o_proj in BF16)",
    };
    let stage = match args.gpu.only_experts {
        true => ", the expert stage alone",
        false => "",
    };
    let drafter = match drafter(args) {
        Some(_) => "drafter in every step",
        None => "no drafter",
    };
    let (rank, ranks) = args.gpu.shard;
    let peers = match args.gpu.gpus {
        true => format!("{ranks} ranks on as many GPUs"),
        false => format!("rank {rank} of {ranks}, peers looped back"),
    };
    format!(
        "{}{weights}{stage}, {drafter}, {peers}, context {}, {} steps, {}\n",
        dir.display(),
        args.context,
        args.steps,
        args.numbers.of_cuda()
    )
}

fn draw(args: &BenchDecodeArgs, mut file: File, resident: &mut Resident) -> Result<()> {
    let weights = match args.gpu.load {
        Load::Checkpoint => "the checkpoint's weights",
        Load::Dummy => "synthetic weights",
    };
    let svg = picture(resident, weights)?;
    file.write_all(svg.as_bytes()).context("--timeline")
}

/// The model's directory, or its config.json alone, and what that says.
fn model(args: &BenchDecodeArgs) -> Result<(PathBuf, Config)> {
    if let Some(file) = args.model.as_deref().filter(|path| alone(args, path)) {
        let text = model_dir::read_config(file)?;
        let config = Config::from_json(&text).with_context(|| file.display().to_string())?;
        return Ok((file.to_owned(), config));
    }
    let dir = model_dir::resolve(args.model.as_deref())?;
    let config = Config::load(&dir)?;
    Ok((dir, config))
}

/// Whether `path` is a config.json, which random weights need alone.
fn alone(args: &BenchDecodeArgs, path: &Path) -> bool {
    args.gpu.load == Load::Dummy && path.is_file()
}

/// Directory of the drafter that every step has, or its config.json.
fn drafter(args: &BenchDecodeArgs) -> Option<&Path> {
    let given = args.draft.draft.as_deref();
    given.filter(|_| !args.draft.no_draft)
}

/// Tokens a second of a text, for one rank that holds all of a model.
fn texts(args: &BenchDecodeArgs, config: &Config, resident: &mut Resident) -> Result<Vec<Text>> {
    if args.gpu.shard.1 > 1 || args.gpu.only_experts {
        return Ok(Vec::new());
    }
    let (context, tokens) = (args.context as usize, args.steps as usize);
    let simulate = args.simulate_acceptance.map(|l| (l - 1.0).round() as u32);
    let mut out = Vec::new();
    for &rows in &args.rows {
        if rows > 1 && resident.program().block == 0 {
            continue;
        }
        let simulate = simulate.filter(|_| rows > 1);
        let vocab = config.vocab_size;
        out.push(text(
            resident,
            vocab,
            context,
            tokens,
            rows as usize,
            simulate,
        )?);
    }
    Ok(out)
}

fn open(args: &BenchDecodeArgs, dir: &Path, config: &Config) -> Result<Ranks> {
    let (rank, ranks) = args.gpu.shard;
    let context = (args.context + args.steps) as usize + SPARE;
    let part = Part {
        rank,
        ranks,
        settings: Settings {
            context,
            numbers: args.numbers.of_cuda(),
        },
    };
    if args.gpu.load == Load::Dummy {
        return random(args, config, part);
    }
    let checkpoint = Checkpoint::open(dir).context("--load dummy needs no weights")?;
    let weights = Weights::new(config, &checkpoint)?;
    let draft = drafter(args).map(|dir| Draft::open(dir, config, DraftOptions::default()));
    let draft = draft.transpose()?;
    Ok(Resident::of(config, &weights, draft.as_ref(), part)?.into())
}

/// Random weights: of one rank, or of all, on a GPU each.
fn random(args: &BenchDecodeArgs, config: &Config, part: Part) -> Result<Ranks> {
    let draft = drafter(args).map(|path| -> Result<DraftFormats> {
        let options = DraftOptions::default();
        let draft = match alone(args, path) {
            true => DraftConfig::from_json(&model_dir::read_config(path)?, config, options)
                .with_context(|| path.display().to_string())?,
            false => DraftConfig::load(path, config, options)?,
        };
        Ok(DraftFormats::uniform(&draft, Format::Bf16))
    });
    let o_proj = match args.gpu.o_proj {
        OProj::Fp8 => Format::Fp8,
        OProj::Bf16 => Format::Bf16,
    };
    let formats = Formats::release(config, o_proj).with_draft(draft.transpose()?);
    let mut ranks = match args.gpu.gpus {
        true => Ranks::new(config, &formats, part)?,
        false => Resident::new(config, &formats, part)?.into(),
    };
    for resident in ranks.each() {
        resident.fill()?;
        if args.gpu.only_experts {
            resident.keep(expert_stage)?;
        }
    }
    Ok(ranks)
}

fn line(m: &Measured, limit: f64) -> String {
    let mut text = format!(
        "{:>4} {:>10.4} {:>9.4} {:>9.1} {:>9.3} {:>9.0} {:>7.1} %\n",
        m.rows,
        m.ms_median,
        m.ms_p99,
        m.experts,
        m.bytes * 1e-9,
        m.gb_per_s(),
        m.gb_per_s() / limit * 100.0
    );
    for p in &m.phases {
        text += &format!(
            "       {:<8}{:<16} x{:<4} wait {:>7.2} us, work {:>7.2} us, slowest CTA {:>7.2} us\n",
            p.pass, p.op, p.count, p.wait_us, p.work_us, p.longest_us
        );
    }
    text
}

fn to_json(
    args: &BenchDecodeArgs,
    model: &str,
    results: &[Measured],
    texts: &[Text],
    limit: f64,
) -> Value {
    let text = |t: &Text| {
        json!({
            "rows": t.rows, "tokens": t.tokens, "steps": t.steps,
            "tokens_per_s": round(t.tokens_per_s()),
            "tokens_per_step": round(t.tokens_per_step()),
            "acceptance_simulated": args.simulate_acceptance.is_some(),
        })
    };
    let row = |m: &Measured| {
        let phase = |p: &cuda::bench::Phase| {
            json!({
                "pass": p.pass, "op": p.op, "count": p.count, "wait_us": round(p.wait_us),
                "work_us": round(p.work_us), "slowest_cta_us": round(p.longest_us),
            })
        };
        json!({
            "rows": m.rows,
            "step_ms_median": m.ms_median,
            "step_ms_p99": m.ms_p99,
            "distinct_experts": round(m.experts),
            "bytes_read": m.bytes,
            "gb_per_s": round(m.gb_per_s()),
            "share_of_plain_read": round(m.gb_per_s() / limit),
            "phases": m.phases.iter().map(phase).collect::<Vec<_>>(),
        })
    };
    json!({
        "model": model,
        "synthetic": args.gpu.load == Load::Dummy,
        "device": "cuda",
        "rank": args.gpu.shard.0,
        "ranks": args.gpu.shard.1,
        "peers": if args.gpu.gpus { "a GPU each" } else { "looped back" },
        "o_proj": match (args.gpu.load, args.gpu.o_proj) {
            (Load::Checkpoint, _) => "the checkpoint's",
            (Load::Dummy, OProj::Fp8) => "fp8",
            (Load::Dummy, OProj::Bf16) => "bf16",
        },
        "only_experts": args.gpu.only_experts,
        "activations": args.numbers.of_cuda().activations.name(),
        "kv": args.numbers.of_cuda().kv.name(),
        "drafts": match drafter(args) {
            Some(_) => "the drafter's",
            None => "the tokens chosen a step before",
        },
        "context": args.context,
        "steps": args.steps,
        "plain_read_gb_per_s": round(limit),
        "results": results.iter().map(row).collect::<Vec<_>>(),
        "texts": texts.iter().map(text).collect::<Vec<_>>(),
    })
}
