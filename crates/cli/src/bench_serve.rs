//! `kilotok bench serve`: load against a server, as a table, JSON and a plot.
//!
//! Works against any server with OpenAI's chat API, ours or not. A server that says that its
//! acceptance is simulated is reported as such.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::BoolishValueParser;
use serde_json::{Value, json};
use server::load::{self, Arrival, Level, LoadError, Plan, Spread};

use crate::failure::bad_input;
use crate::output;
use crate::report::round;

/// Load against a running server.
#[derive(Args, Debug)]
pub(crate) struct BenchServeArgs {
    /// Address of the server, http only, with or without /v1
    #[arg(
        long,
        env = "KILOTOK_URL",
        visible_alias = "base-url",
        default_value = "http://127.0.0.1:8000"
    )]
    pub url: String,
    /// Key to send
    #[arg(
        long,
        env = "KILOTOK_API_KEY",
        hide_env_values = true,
        value_name = "KEY"
    )]
    pub api_key: Option<String>,
    /// Model to name [default: the first that the server names]
    #[arg(long, env = "KILOTOK_SERVED_MODEL_NAME", value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Closed loop: users at once, one measurement each
    #[arg(long, env = "KILOTOK_CONCURRENCY", value_name = "LIST", value_delimiter = ',', default_value = "1,2,4,8", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub concurrency: Vec<u32>,
    /// Open loop instead: requests a second, one measurement each
    #[arg(long, env = "KILOTOK_REQUEST_RATE", value_name = "LIST", value_delimiter = ',', value_parser = parse_rate)]
    pub request_rate: Vec<f64>,
    /// Requests of each measurement
    #[arg(long, env = "KILOTOK_NUM_PROMPTS", value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub num_prompts: u32,
    /// File with one prompt a line, asked round and round [default: random words]
    #[arg(long, env = "KILOTOK_PROMPTS", value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Random words in a prompt
    #[arg(long, env = "KILOTOK_PROMPT_WORDS", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt_words: u32,
    /// Tokens of an answer
    #[arg(short = 'n', long, env = "KILOTOK_MAX_TOKENS", value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// 0 is greedy
    #[arg(
        long,
        env = "KILOTOK_TEMPERATURE",
        value_name = "F",
        default_value_t = 0.0
    )]
    pub temperature: f64,
    /// Go on after the model's own end token
    #[arg(long, env = "KILOTOK_IGNORE_EOS", value_parser = BoolishValueParser::new())]
    pub ignore_eos: bool,
    /// Of random words and gaps
    #[arg(long, env = "KILOTOK_SEED", value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Write a plot
    #[arg(long, env = "KILOTOK_SVG", value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long, env = "KILOTOK_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("expected a number above 0".to_owned()),
    }
}

/// Runs the command.
pub(crate) fn run(args: &BenchServeArgs) -> Result<()> {
    let plan = plan(args)?;
    let (model, levels) = match load::run(&plan, |level| report(args, level)) {
        Err(error @ LoadError::Url { .. }) => return bad_input(format!("--url {error}")),
        other => other?,
    };
    let simulated = levels.iter().any(|level| level.summary.simulated);
    if let Some(path) = &args.svg {
        let mut title = format!("{model}, answers of {} tokens", args.max_tokens);
        if simulated {
            title += ", acceptance simulated";
        }
        let svg = load::plot(&title, &levels);
        std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.json {
        return output::json(&to_json(args, &model, &levels));
    }
    output::write(table(args, &model, &levels).as_bytes())
}

fn plan(args: &BenchServeArgs) -> Result<Plan> {
    let rates = args.request_rate.iter();
    let mut arrivals: Vec<Arrival> = rates.map(|rate| Arrival::PerSecond(*rate)).collect();
    if arrivals.is_empty() {
        let users = args.concurrency.iter();
        arrivals = users.map(|users| Arrival::Users(*users)).collect();
    }
    let prompts = args.prompts.as_deref().map(lines).transpose()?;
    Ok(Plan {
        url: args.url.clone(),
        api_key: args.api_key.clone(),
        model: args.served_model_name.clone(),
        arrivals,
        requests: args.num_prompts as usize,
        prompts: prompts.unwrap_or_default(),
        prompt_words: args.prompt_words as usize,
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        ignore_eos: args.ignore_eos,
        seed: args.seed,
    })
}

fn lines(path: &Path) -> Result<Vec<String>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => return bad_input(format!("--prompts {}: {error}", path.display())),
    };
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let lines: Vec<String> = lines.map(str::to_owned).collect();
    if lines.is_empty() {
        return bad_input(format!(
            "--prompts {}: expected a prompt a line, found none",
            path.display()
        ));
    }
    Ok(lines)
}

/// A line to standard error as each load ends, where nothing else is printed until all have.
fn report(args: &BenchServeArgs, level: &Level) {
    if args.json {
        return;
    }
    let summary = &level.summary;
    if let Some(why) = &summary.first_failure {
        let (lost, load) = (summary.refused + summary.failed, name(level.arrival));
        eprintln!("kilotok: {load}: {lost} requests did not go through; the first: {why}");
    }
}

fn name(arrival: Arrival) -> String {
    match arrival {
        Arrival::Users(users) => format!("{users} users"),
        Arrival::PerSecond(rate) => format!("{rate}/s"),
    }
}

/// Columns of the table: title and width.
const COLUMNS: [(&str, usize); 14] = [
    ("load", 8),
    ("TTFT p50", 9),
    ("p99 ms", 8),
    ("TPOT p50", 9),
    ("p99 ms", 8),
    ("ITL p50", 8),
    ("p99 ms", 8),
    ("chunks p50 ms", 14),
    ("tok/s/user p50", 15),
    ("slowest", 8),
    ("tok/s all", 10),
    ("acceptance", 11),
    ("ok", 6),
    ("429+failed", 11),
];

fn row(cells: [String; 14]) -> String {
    let cell = |((_, width), text): (&(&str, usize), String)| format!("{text:>width$}");
    let line: String = COLUMNS.iter().zip(cells).map(cell).collect();
    line + "\n"
}

fn table(args: &BenchServeArgs, model: &str, levels: &[Level]) -> String {
    let mut text = format!(
        "{model} at {}: {} requests a load, answers of up to {} tokens, temperature {}\n",
        args.url, args.num_prompts, args.max_tokens, args.temperature
    );
    if levels.iter().any(|level| level.summary.simulated) {
        text += "acceptance simulated\n";
    }
    text += &row(COLUMNS.map(|(title, _)| title.to_owned()));
    for level in levels {
        let s = &level.summary;
        let cell = |value: Option<f64>, digits: usize| {
            value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let p50 = |spread: Option<Spread>| cell(spread.map(|x| x.p50), 2);
        let p99 = |spread: Option<Spread>| cell(spread.map(|x| x.p99), 2);
        text += &row([
            name(level.arrival).trim_end_matches(" users").to_owned(),
            p50(s.ttft_ms),
            p99(s.ttft_ms),
            p50(s.tpot_ms),
            p99(s.tpot_ms),
            p50(s.itl_ms),
            p99(s.itl_ms),
            p50(s.icl_ms),
            cell(s.user_tokens_per_s.map(|x| x.p50), 1),
            cell(s.user_tokens_per_s.map(|x| x.min), 1),
            cell(Some(s.tokens_per_s()), 1),
            cell(s.acceptance_length, 2),
            s.completed.to_string(),
            format!("{}+{}", s.refused, s.failed),
        ]);
    }
    text
}

fn to_json(args: &BenchServeArgs, model: &str, levels: &[Level]) -> Value {
    let spread = |spread: Option<Spread>| {
        spread.map(|x| {
            json!({"mean": round(x.mean), "p50": round(x.p50), "p90": round(x.p90),
                "p99": round(x.p99), "min": round(x.min)})
        })
    };
    let level = |level: &Level| {
        let s = &level.summary;
        let mut value = json!({
            "completed": s.completed, "refused": s.refused, "failed": s.failed,
            "first_failure": s.first_failure,
            "wall_s": round(s.wall_s), "prompt_tokens": s.prompt_tokens, "tokens": s.tokens,
            "tokens_per_second": round(s.tokens_per_s()),
            "ttft_ms": spread(s.ttft_ms), "tpot_ms": spread(s.tpot_ms), "itl_ms": spread(s.itl_ms),
            "inter_chunk_ms": spread(s.icl_ms), "e2e_ms": spread(s.e2e_ms),
            "user_tokens_per_second": spread(s.user_tokens_per_s),
            "acceptance_length": s.acceptance_length.map(round),
        });
        match level.arrival {
            Arrival::Users(users) => value["concurrency"] = users.into(),
            Arrival::PerSecond(rate) => value["request_rate"] = rate.into(),
        }
        value
    };
    let mut out = json!({
        "url": args.url, "model": model, "num_prompts": args.num_prompts,
        "max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed,
        "levels": levels.iter().map(level).collect::<Vec<_>>(),
    });
    if levels.iter().any(|level| level.summary.simulated) {
        out["simulated"] = true.into();
    }
    out
}
