//! Statistics of an answer, as one line of text and as JSON.

use engine::Stats;
use serde_json::{Value, json};

/// The `stats` object of the machine contract; `drafting` adds what issue trackers of speculative
/// decoding ask for.
pub(crate) fn stats_json(stats: &Stats, drafting: bool) -> Value {
    let mut out = json!({
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "ttft_ms": round(stats.ttft_ms),
        "decode_ms": round(stats.decode_ms),
        "tokens_per_second": round(stats.tokens_per_second()),
        "acceptance_length": round(stats.draft.acceptance_length()),
        "cached_tokens": stats.cached_tokens,
    });
    if drafting {
        let shares = shares(stats);
        out["draft"] = json!({
            "steps": stats.draft.steps,
            "drafting_steps": stats.draft.drafting_steps,
            "drafted": stats.draft.drafted,
            "accepted": stats.draft.accepted,
            "acceptance_histogram": stats.draft.histogram,
            "acceptance_rate_per_position": stats.draft.rate_per_position().iter().map(|&x| round(x)).collect::<Vec<_>>(),
            "time_share": {"draft": shares[0], "verify": shares[1], "sample": shares[2], "host": shares[3]},
        });
    }
    if stats.simulated {
        out["simulated"] = true.into();
    }
    out
}

/// One line for a person.
pub(crate) fn stats_line(stats: &Stats, drafting: bool) -> String {
    let mut line = format!(
        "{} prompt tokens, first token after {:.0} ms; {} tokens at {:.1} tokens/s",
        stats.prompt_tokens,
        stats.ttft_ms,
        stats.generated_tokens,
        stats.tokens_per_second()
    );
    if stats.cached_tokens > 0 {
        line += &format!("; {} from cache", stats.cached_tokens);
    }
    if drafting {
        let [draft, verify, sample, host] = shares(stats).map(|share| share * 100.0);
        line += &format!(
            "; acceptance length {:.2} over {} steps ({} of {} drafts accepted); time: draft {draft:.0} %, \
             verify {verify:.0} %, sample {sample:.0} %, host {host:.0} %",
            stats.draft.acceptance_length(),
            stats.draft.steps,
            stats.draft.accepted,
            stats.draft.drafted,
        );
    }
    if stats.simulated {
        line += "; acceptance simulated";
    }
    line
}

/// Shares of the decoding time: draft, verify, sample, host.
fn shares(stats: &Stats) -> [f64; 4] {
    let parts = [
        stats.draft_us,
        stats.verify_us,
        stats.sample_us,
        stats.host_us,
    ];
    let whole: f64 = parts.iter().sum();
    parts.map(|part| {
        if whole > 0.0 {
            round(part / whole)
        } else {
            0.0
        }
    })
}

/// Four decimals: more are noise.
pub(crate) fn round(x: f64) -> f64 {
    (x * 1e4).round() / 1e4
}

/// Bytes with a unit, powers of 1000.
pub(crate) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" {
                format!("{n} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1000.0;
    }
    format!("{value:.2} TB")
}
