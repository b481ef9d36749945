//! `kilotok bench decode`, with what it measures on a GPU alone.

use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};

use super::{Device, DraftArgs, NumberArgs, number};

/// `kilotok bench decode`.
#[derive(Args, Debug)]
pub(crate) struct BenchDecodeArgs {
    /// Rows a step computes, one measurement each
    #[arg(long, env = "KILOTOK_ROWS", value_name = "LIST", value_delimiter = ',', default_value = "1,2,4,8", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub rows: Vec<u32>,
    /// Tokens in each sequence before the first step
    #[arg(long, env = "KILOTOK_CONTEXT", value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub context: u32,
    /// Steps to measure for each row count
    #[arg(long, env = "KILOTOK_STEPS", value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub steps: u32,
    /// Pretend this mean acceptance length, bonus token included; draft and verify are computed in full
    #[arg(long, env = "KILOTOK_SIMULATE_ACCEPTANCE", value_name = "L", value_parser = parse_acceptance)]
    pub simulate_acceptance: Option<f64>,
    /// Draft what plain decoding gives, at no cost: what verification alone can win (cpu, no drafter)
    #[arg(long, env = "KILOTOK_ALWAYS_RIGHT", conflicts_with_all = ["simulate_acceptance", "draft"])]
    pub always_right: bool,
    /// Print one JSON object
    #[arg(long, env = "KILOTOK_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,
    /// Checkpoint directory, or synthetic:NAME (`synthetic:list` names them); with --load dummy also a config.json alone
    #[arg(short, long, env = "KILOTOK_MODEL", value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Where to compute
    #[arg(long, env = "KILOTOK_DEVICE", value_enum, default_value_t = Device::Cpu)]
    pub device: Device,
    #[command(flatten)]
    pub gpu: GpuBenchArgs,
    #[command(flatten)]
    pub numbers: NumberArgs,
    /// Threads that compute [default: one a physical core]
    #[arg(short, long, env = "KILOTOK_THREADS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    #[command(flatten)]
    pub draft: DraftArgs,
}

/// What `kilotok bench decode` measures on a GPU alone.
#[derive(Args, Debug)]
pub(crate) struct GpuBenchArgs {
    /// The checkpoint's weights, or random ones in the release's formats (config.json of --model and --draft is enough)
    #[arg(help_heading = ON_GPU, long, env = "KILOTOK_LOAD", value_enum, default_value_t = Load::Checkpoint)]
    pub load: Load,
    /// Rank R of N, whose peers are looped back
    #[arg(help_heading = ON_GPU, long, env = "KILOTOK_SHARD", value_name = "R/N", default_value = "0/1", value_parser = parse_shard)]
    pub shard: (usize, usize),
    /// All N ranks, each on a GPU of this host: R does not count (random weights)
    #[arg(help_heading = ON_GPU, long, env = "KILOTOK_GPUS", value_parser = BoolishValueParser::new())]
    pub gpus: bool,
    /// Format of o_proj (random weights)
    #[arg(help_heading = ON_GPU, long, env = "KILOTOK_O_PROJ", value_enum, default_value_t = OProj::Fp8)]
    pub o_proj: OProj,
    /// The expert stage alone, with routing: no attention, from QKV to its sum over ranks (random weights)
    #[arg(help_heading = ON_GPU, long, env = "KILOTOK_ONLY_EXPERTS", value_parser = BoolishValueParser::new())]
    pub only_experts: bool,
    /// Draw the middle layer of a step of the last row count over the multiprocessors (SVG)
    #[arg(help_heading = ON_GPU, long, env = "KILOTOK_TIMELINE", value_name = "FILE")]
    pub timeline: Option<PathBuf>,
}

const ON_GPU: &str = "On a GPU";

impl GpuBenchArgs {
    /// Options that ask for random weights, and were given.
    pub(crate) fn of_random_weights(&self) -> Option<&'static str> {
        let given = [
            (self.gpus, "--gpus"),
            (self.o_proj != OProj::Fp8, "--o-proj"),
            (self.only_experts, "--only-experts"),
        ];
        given
            .iter()
            .find(|(given, _)| *given)
            .map(|(_, name)| *name)
    }

    /// The first option that was given.
    pub(crate) fn given(&self) -> Option<&'static str> {
        let given = [
            (self.load != Load::Checkpoint, "--load"),
            (self.shard != (0, 1), "--shard"),
            (self.timeline.is_some(), "--timeline"),
        ];
        let first = given.iter().find(|(given, _)| *given);
        first.map(|(_, name)| *name).or(self.of_random_weights())
    }
}

/// Format of the output projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OProj {
    /// E4M3 with scales of 128 x 128
    Fp8,
    /// As the releases have it
    Bf16,
}

/// Where a GPU's weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Load {
    /// The checkpoint
    Checkpoint,
    /// Random and valid: for speed alone
    Dummy,
}

fn parse_shard(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once('/');
    let parsed = parts.and_then(|(r, n)| Some((r.parse().ok()?, n.parse().ok()?)));
    match parsed {
        Some((rank, ranks)) if rank < ranks && ranks <= 8 => Ok((rank, ranks)),
        _ => Err("expected R/N, a rank below N, N at most 8".into()),
    }
}

fn parse_acceptance(text: &str) -> Result<f64, String> {
    number(text, "a number from 1 to 64", |x| (1.0..=64.0).contains(&x)).map(f64::from)
}
