//! `kilotok doctor`: this machine, what a GPU build would find, and a self-test of the model: the
//! same text with and without drafting, alone and beside another request.

use std::process::ExitCode;

use anyhow::Result;
use engine::{DraftStats, DraftWidth, Event, Request, Stats};
use model::TokenId;
use serde_json::{Value, json};

use crate::args::DoctorArgs;
use crate::machine::{self, ReadBandwidth};
use crate::report::{bytes, round};
use crate::session::{self, Session};
use crate::{model_dir, output};

/// Tokens of the self-test.
const TOKENS: u32 = 48;
/// Acceptance of the first draft below this means that something is wired wrongly: released
/// drafters accept it more than half the time, on any text.
const FIRST_RATE_FLOOR: f64 = 0.15;
const READ_BYTES: u64 = 512 << 20;

/// Runs the command; exit code 1 when the self-test fails.
pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let machine = look();
    let model = match (
        &args.model.model,
        model_dir::resolve(args.model.model.as_deref()),
    ) {
        (_, Ok(_)) => Some(self_test(args)?),
        (Some(_), Err(error)) => return Err(error),
        (None, Err(_)) => None,
    };
    let healthy = model.as_ref().is_none_or(|test| test.problems.is_empty());
    if args.json {
        let mut out = machine;
        out["self_test"] = model.map_or(Value::Null, |test| test.json());
        output::json(&out)?;
    } else {
        print(&machine, model.as_ref())?;
    }
    Ok(if healthy {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn look() -> Value {
    let processor = machine::processor();
    let (total, available) = machine::memory_bytes();
    let reader = |threads| ReadBandwidth::new(READ_BYTES, threads).measure(3) / 1e9;
    let features: serde_json::Map<String, Value> = processor
        .features
        .iter()
        .map(|(name, has)| ((*name).to_owned(), (*has).into()))
        .collect();
    let gpu: serde_json::Map<String, Value> = machine::gpu()
        .into_iter()
        .map(|(name, found)| (name.to_owned(), found.into()))
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "processor": processor.name,
        "threads": processor.threads,
        "features": features,
        "memory_bytes": total,
        "memory_available_bytes": available,
        "read_gb_per_s": {"one_thread": round(reader(1)), "all_threads": round(reader(processor.threads))},
        "gpu": gpu,
    })
}

/// Result of the self-test.
struct SelfTest {
    model: String,
    load_ms: f64,
    tokens_per_second: f64,
    drafting: Option<DraftStats>,
    problems: Vec<String>,
}

/// What one run gave.
struct Answer {
    tokens: Vec<TokenId>,
    stats: Stats,
}

fn self_test(args: &DoctorArgs) -> Result<SelfTest> {
    let session = Session::open(&args.model, &args.draft, false)?;
    let prompt = match &session.tokenizer {
        Some(_) => session.encode("The first ten prime numbers are 2, 3, 5,")?,
        None => vec![1, 2, 3, 4],
    };
    let mut problems = Vec::new();
    let plain = wait(&session, request(&prompt, DraftWidth::Off))?;
    let other = session
        .engine
        .submit(request(&[prompt[0]], DraftWidth::Off))?;
    if wait(&session, request(&prompt, DraftWidth::Off))?.tokens != plain.tokens {
        problems.push("the answer changes when another request runs beside it".to_owned());
    }
    drop(other);
    let mut drafting = None;
    if session.drafting {
        for width in [
            DraftWidth::Fixed(2),
            DraftWidth::Fixed(64),
            DraftWidth::Auto,
        ] {
            let drafted = wait(&session, request(&prompt, width))?;
            if drafted.tokens != plain.tokens {
                problems.push(format!("the answer changes with drafting ({width:?}): verification differs from plain decoding; compare its logits"));
            }
            if width == DraftWidth::Fixed(64) {
                problems.extend(likely_cause(&drafted.stats.draft));
                drafting = Some(drafted.stats.draft);
            }
        }
    }
    Ok(SelfTest {
        model: session.dir.display().to_string(),
        load_ms: session.load_ms,
        tokens_per_second: plain.stats.tokens_per_second(),
        drafting,
        problems,
    })
}

fn request(prompt: &[TokenId], draft: DraftWidth) -> Request {
    let mut request = Request::new(prompt.to_vec());
    request.stop.max_tokens = Some(TOKENS);
    request.stop.ignore_eos = true;
    request.draft = draft;
    request
}

fn wait(session: &Session, request: Request) -> Result<Answer> {
    let mut answer = Answer {
        tokens: Vec::new(),
        stats: Stats::default(),
    };
    for event in session.engine.submit(request)? {
        match event {
            Event::Prompt(_) => {}
            Event::Piece(piece) => answer.tokens.extend(piece.tokens),
            Event::Finished(end) => {
                session::check_end(&end.reason)?;
                answer.stats = end.stats;
            }
        }
    }
    Ok(answer)
}

/// Reads the pattern of acceptance: low rates are nearly always an integration bug.
fn likely_cause(draft: &DraftStats) -> Option<String> {
    let rates = draft.rate_per_position();
    let first = *rates.first()?;
    if first >= FIRST_RATE_FLOOR {
        return None;
    }
    let later = rates.get(1).copied().unwrap_or(0.0);
    let cause = if first == 0.0 {
        "nothing is ever accepted: the mask embedding is missing, the drafter's KV layout is wrong, or the \
         drafter belongs to another target"
    } else if later < first / 4.0 {
        "only the first draft is ever right: a causal mask where the block should see all of itself, or taps \
         one layer off"
    } else {
        "evenly low: taps one layer off, attention sinks or value scale left out, or another rotary base"
    };
    Some(format!(
        "acceptance of the first draft is {:.0} %: {cause}",
        first * 100.0
    ))
}

impl SelfTest {
    fn json(&self) -> Value {
        let rates = self.drafting.as_ref().map(DraftStats::rate_per_position);
        json!({
            "model": self.model,
            "load_ms": round(self.load_ms),
            "tokens_per_second": round(self.tokens_per_second),
            "drafting": self.drafting.is_some(),
            "acceptance_length": self.drafting.as_ref().map(|draft| round(draft.acceptance_length())),
            "acceptance_rate_per_position": rates,
            "problems": self.problems,
        })
    }
}

fn print(machine: &Value, model: Option<&SelfTest>) -> Result<()> {
    let text = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    let size = |key: &str| bytes(machine[key].as_u64().unwrap_or(0));
    let has = |(name, has): (&String, &Value)| has.as_bool().unwrap_or(false).then(|| name.clone());
    let features: Vec<String> = machine["features"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(has)
        .collect();
    let mut out = format!("kilotok {}\n", text(&machine["version"]));
    out += &format!(
        "processor    {}, {} threads\n",
        text(&machine["processor"]),
        machine["threads"]
    );
    out += &format!("features     {}\n", features.join(" "));
    out += &format!(
        "memory       {}, {} available\n",
        size("memory_bytes"),
        size("memory_available_bytes")
    );
    let read = &machine["read_gb_per_s"];
    out += &format!(
        "plain read   {} GB/s on one thread, {} GB/s on all\n",
        read["one_thread"], read["all_threads"]
    );
    for (name, found) in machine["gpu"].as_object().into_iter().flatten() {
        out += &format!(
            "GPU build    {name}: {}\n",
            found.as_str().unwrap_or("not found")
        );
    }
    match model {
        None => out += "self-test    no model found; give --model DIR\n",
        Some(test) => out += &test.text(),
    }
    output::write(out.as_bytes())
}

impl SelfTest {
    fn text(&self) -> String {
        let mut out = format!(
            "self-test    {}: loaded in {:.0} ms, {:.1} tokens/s\n",
            self.model, self.load_ms, self.tokens_per_second
        );
        match &self.drafting {
            Some(draft) => {
                let rates: Vec<String> = draft
                    .rate_per_position()
                    .iter()
                    .map(|rate| format!("{:.0} %", rate * 100.0))
                    .collect();
                out += &format!(
                    "drafting     acceptance length {:.2}; by position {}\n",
                    draft.acceptance_length(),
                    rates.join(", ")
                );
            }
            None => out += "drafting     no drafter; checked alone and beside another request\n",
        }
        for problem in &self.problems {
            out += &format!("PROBLEM      {problem}\n");
        }
        if self.problems.is_empty() {
            out += "result       the same text every way\n";
        }
        out
    }
}
