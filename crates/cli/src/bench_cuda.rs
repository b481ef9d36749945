//! `kilotok bench decode --device cuda`: milliseconds, bytes and share of the memory's limit of the
//! resident kernel's steps, the limit measured in the same run, and where the time goes.
//!
//! Rows after the first are drafts that mean nothing. Reports of random weights say so.

use anyhow::{Context, Result};
use cuda::bench::{Measured, decode};
use cuda::cubins::kernel_image;
use cuda::load::{Source, formats};
use cuda::program::Formats;
use cuda::resident::{Part, Resident};
use cuda::strips::Format;
use model::{Checkpoint, Config, Weights};
use serde_json::{Value, json};

use crate::args::{BenchDecodeArgs, Load};
use crate::failure::bad_input;
use crate::report::round;
use crate::{model_dir, output};

/// Positions past the context that a step may touch.
const SPARE: usize = 16;

/// Runs the command.
pub(crate) fn run(args: &BenchDecodeArgs) -> Result<()> {
    if args.draft.draft.is_some() {
        return bad_input("--device cuda: no drafter on the GPU yet; leave --draft out");
    }
    if let Some(rows) = args.rows.iter().find(|&&rows| rows > 8) {
        return bad_input(format!("--rows {rows}: --device cuda takes 1 to 8"));
    }
    let dir = model_dir::resolve(args.model.as_deref())?;
    let config = Config::load(&dir)?;
    let mut resident = open(args, &dir, &config)?;
    let limit = resident.read_limit()?;
    let mut results = Vec::new();
    for &rows in &args.rows {
        let context = args.context as usize;
        results.push(decode(
            &mut resident,
            config.vocab_size,
            context,
            args.steps,
            rows as usize,
        )?);
    }
    let limit = limit.max(resident.read_limit()?);
    if args.json {
        return output::json(&to_json(args, &dir.display().to_string(), &results, limit));
    }
    let weights = match args.load {
        Load::Checkpoint => "",
        Load::Dummy => " (synthetic weights)",
    };
    let (rank, ranks) = args.shard;
    let mut text = format!(
        "{}{weights}, rank {rank} of {ranks}, peers looped back, context {}, {} steps, exact activations\n",
        dir.display(),
        args.context,
        args.steps
    );
    text += "rows  median ms    p99 ms   experts   GB read      GB/s  of limit\n";
    for m in &results {
        text += &line(m, limit);
    }
    text += &format!("plain read in the same run: {limit:.0} GB/s\n");
    output::write(text.as_bytes())
}

fn open(args: &BenchDecodeArgs, dir: &std::path::Path, config: &Config) -> Result<Resident> {
    let (rank, ranks) = args.shard;
    let context = args.context as usize + SPARE;
    let part = Part {
        rank,
        ranks,
        context,
    };
    let image = kernel_image("resident.cu")?;
    if args.load == Load::Dummy {
        let formats = Formats::release(config, Format::Fp8);
        let resident = Resident::new(config, &formats, part, &image)?;
        resident.fill()?;
        return Ok(resident);
    }
    let checkpoint = Checkpoint::open(dir).context("--load dummy needs no weights")?;
    let weights = Weights::new(config, &checkpoint)?;
    let formats = formats(&weights);
    let resident = Resident::new(config, &formats, part, &image)?;
    let source = Source {
        config,
        weights: &weights,
        formats: &formats,
        rank,
        ranks,
    };
    resident.load(&source, |_| ())?;
    Ok(resident)
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
            "       {:<10} x{:<4} wait {:>7.2} us, work {:>7.2} us, slowest CTA {:>7.2} us\n",
            p.op, p.count, p.wait_us, p.work_us, p.longest_us
        );
    }
    text
}

fn to_json(args: &BenchDecodeArgs, model: &str, results: &[Measured], limit: f64) -> Value {
    let row = |m: &Measured| {
        let phase = |p: &cuda::bench::Phase| {
            json!({
                "op": p.op, "count": p.count, "wait_us": round(p.wait_us),
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
        "synthetic": args.load == Load::Dummy,
        "device": "cuda",
        "rank": args.shard.0,
        "ranks": args.shard.1,
        "activations": "exact (two e4m3 terms)",
        "drafts": "the tokens chosen a step before",
        "context": args.context,
        "steps": args.steps,
        "plain_read_gb_per_s": round(limit),
        "results": results.iter().map(row).collect::<Vec<_>>(),
    })
}
