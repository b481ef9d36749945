//! `/metrics`: vLLM's names with sub-millisecond buckets, and our own under `kilotok_`.
//!
//! Counts here are the server's; those of the engine are copied from its snapshot when scraped.
//! Invariant: histograms hold no locks; buckets are vLLM's edges with finer ones added below, so that
//! queries written for vLLM stay right.

use crate::loading::Loaded;
use engine::{EngineHandle, Finished};
use std::fmt::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Edges of times of single tokens, seconds.
const TOKEN_EDGES: &[f64] = &[
    0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05,
    0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Edges of the time to the first token, seconds.
const FIRST_EDGES: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Edges of whole requests, seconds.
const REQUEST_EDGES: &[f64] = &[
    0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
];
/// Edges of what the server itself adds, seconds.
const HOST_EDGES: &[f64] = &[
    0.000_005, 0.000_01, 0.000_02, 0.000_05, 0.0001, 0.0002, 0.0005, 0.001, 0.01, 0.1, 1.0,
];

/// Counts of durations by size.
pub(crate) struct Histogram {
    edges: &'static [f64],
    counts: Vec<AtomicU64>,
    sum_ns: AtomicU64,
}

impl Histogram {
    fn new(edges: &'static [f64]) -> Self {
        Self {
            edges,
            counts: (0..=edges.len()).map(|_| AtomicU64::new(0)).collect(),
            sum_ns: AtomicU64::new(0),
        }
    }

    pub(crate) fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let at = self.edges.partition_point(|edge| *edge < seconds);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        let ns = time.as_nanos().min(u128::from(u64::MAX)) as u64;
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    fn write(&self, page: &mut Page, name: &str, help: &str) {
        page.head(name, help, "histogram");
        let mut total = 0;
        for (i, count) in self.counts.iter().enumerate() {
            total += count.load(Ordering::Relaxed);
            let edge = match self.edges.get(i) {
                Some(edge) => edge.to_string(),
                None => "+Inf".to_owned(),
            };
            page.line(&format!("{name}_bucket"), &[("le", &edge)], total as f64);
        }
        let sum = self.sum_ns.load(Ordering::Relaxed) as f64 / 1e9;
        page.line(&format!("{name}_sum"), &[], sum);
        page.line(&format!("{name}_count"), &[], total as f64);
    }
}

/// Reasons of [`Metrics::reject`].
pub(crate) const REJECTIONS: [&str; 7] = [
    "invalid",
    "auth",
    "queue_full",
    "quota",
    "seat",
    "draining",
    "failed",
];

/// See the module.
pub(crate) struct Metrics {
    pub(crate) first_token: Histogram,
    pub(crate) inter_token: Histogram,
    per_output_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    /// Time from an event to its bytes handed to the connection.
    pub(crate) flush: Histogram,
    /// Compiling a grammar.
    pub(crate) grammar_compile: Histogram,
    rejected: [AtomicU64; REJECTIONS.len()],
    /// Streams open now.
    pub(crate) streams: AtomicU64,
    /// What loading the model came to, where that was watched.
    pub(crate) loaded: OnceLock<Loaded>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            first_token: Histogram::new(FIRST_EDGES),
            inter_token: Histogram::new(TOKEN_EDGES),
            per_output_token: Histogram::new(TOKEN_EDGES),
            end_to_end: Histogram::new(REQUEST_EDGES),
            queue: Histogram::new(REQUEST_EDGES),
            prefill: Histogram::new(REQUEST_EDGES),
            decode: Histogram::new(REQUEST_EDGES),
            flush: Histogram::new(HOST_EDGES),
            grammar_compile: Histogram::new(HOST_EDGES),
            rejected: std::array::from_fn(|_| AtomicU64::new(0)),
            streams: AtomicU64::new(0),
            loaded: OnceLock::new(),
        }
    }
}

impl Metrics {
    pub(crate) fn reject(&self, reason: &str) {
        if let Some(at) = REJECTIONS.iter().position(|name| *name == reason) {
            self.rejected[at].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes in the account of a finished sample.
    pub(crate) fn observe_end(&self, end: &Finished, whole: Duration) {
        let ms = |x: f64| Duration::from_secs_f64((x / 1e3).max(0.0));
        let stats = &end.stats;
        self.end_to_end.observe(whole);
        self.queue.observe(ms(stats.queue_ms));
        self.prefill.observe(ms(stats.prefill_ms));
        self.decode.observe(ms(stats.decode_ms));
        if stats.generated_tokens > 1 {
            let each = stats.decode_ms / f64::from(stats.generated_tokens);
            self.per_output_token.observe(ms(each));
        }
    }

    /// The whole page in Prometheus' text format.
    pub(crate) fn page(&self, engine: &EngineHandle, model: &str) -> String {
        let mut page = Page::new(model);
        self.times(&mut page);
        let snapshot = engine.metrics();
        engine_counts(&mut page, &snapshot);
        drafting(&mut page, &snapshot);
        own(&mut page, &snapshot, engine);
        page.head(
            "kilotok_requests_rejected_total",
            "Requests refused.",
            "counter",
        );
        for (reason, count) in REJECTIONS.iter().zip(&self.rejected) {
            let count = count.load(Ordering::Relaxed) as f64;
            page.line(
                "kilotok_requests_rejected_total",
                &[("reason", reason)],
                count,
            );
        }
        let streams = self.streams.load(Ordering::Relaxed) as f64;
        page.gauge("kilotok_streams_open", "Streams open now.", streams);
        if let Some(loaded) = self.loaded.get() {
            let seconds = loaded.time.as_secs_f64();
            page.gauge(
                "kilotok_weights_load_seconds",
                "From the start to ready.",
                seconds,
            );
            page.gauge(
                "kilotok_weights_load_bytes_per_second",
                "Bytes of weights over that time.",
                loaded.bytes as f64 / seconds.max(1e-9),
            );
        }
        page.text
    }

    fn times(&self, page: &mut Page) {
        let rows: [(&Histogram, &str, &str); 9] = [
            (
                &self.first_token,
                "vllm:time_to_first_token_seconds",
                "Submission to first token.",
            ),
            (
                &self.inter_token,
                "vllm:inter_token_latency_seconds",
                "Between tokens.",
            ),
            (
                &self.per_output_token,
                "vllm:request_time_per_output_token_seconds",
                "Mean of a request.",
            ),
            (
                &self.end_to_end,
                "vllm:e2e_request_latency_seconds",
                "Whole request.",
            ),
            (&self.queue, "vllm:request_queue_time_seconds", "Waiting."),
            (
                &self.prefill,
                "vllm:request_prefill_time_seconds",
                "Computing the prompt.",
            ),
            (
                &self.decode,
                "vllm:request_decode_time_seconds",
                "Generating.",
            ),
            (
                &self.flush,
                "kilotok_sse_flush_seconds",
                "Event to bytes for the connection.",
            ),
            (
                &self.grammar_compile,
                "kilotok_grammar_compile_seconds",
                "Compiling a grammar.",
            ),
        ];
        for (histogram, name, help) in rows {
            histogram.write(page, name, help);
        }
    }
}

fn engine_counts(page: &mut Page, m: &engine::Metrics) {
    let share = f64::from(m.kv.pages_used) / f64::from(m.kv_pages.max(1));
    page.gauge(
        "vllm:num_requests_running",
        "Samples computed now.",
        f64::from(m.running),
    );
    page.gauge(
        "vllm:num_requests_waiting",
        "Requests waiting now.",
        f64::from(m.waiting),
    );
    page.gauge(
        "vllm:kv_cache_usage_perc",
        "Share of KV pages in use, 0 to 1.",
        share,
    );
    page.head("vllm:cache_config_info", "KV cache.", "gauge");
    let (block, blocks) = (m.page_tokens.to_string(), m.kv_pages.to_string());
    let labels = [
        ("block_size", block.as_str()),
        ("num_gpu_blocks", blocks.as_str()),
    ];
    page.line("vllm:cache_config_info", &labels, 1.0);
    let rows = [
        (
            "vllm:prompt_tokens_total",
            "Prompt tokens.",
            m.prompt_tokens_total,
        ),
        (
            "vllm:generation_tokens_total",
            "Generated tokens.",
            m.generated_tokens_total,
        ),
        (
            "vllm:prefix_cache_queries_total",
            "Prompt tokens looked up.",
            m.prefix_queries_total,
        ),
        (
            "vllm:prefix_cache_hits_total",
            "Of these, found.",
            m.prefix_hits_total,
        ),
        (
            "vllm:num_preemptions_total",
            "Requests preempted.",
            m.preemptions_total,
        ),
    ];
    for (name, help, value) in rows {
        page.counter(name, help, value as f64);
    }
    let name = "vllm:request_success_total";
    page.head(name, "Samples finished, by reason.", "counter");
    let names = ["stop", "length", "abort", "deadline", "error"];
    for (reason, count) in names.iter().zip(m.finished_total) {
        page.line(name, &[("finished_reason", reason)], count as f64);
    }
}

fn drafting(page: &mut Page, m: &engine::Metrics) {
    let draft = &m.draft;
    let rows = [
        (
            "vllm:spec_decode_num_drafts_total",
            "Steps with drafts.",
            draft.drafting_steps,
        ),
        (
            "vllm:spec_decode_num_draft_tokens_total",
            "Tokens drafted.",
            draft.drafted,
        ),
        (
            "vllm:spec_decode_num_accepted_tokens_total",
            "Drafted tokens accepted.",
            draft.accepted,
        ),
    ];
    for (name, help, value) in rows {
        page.counter(name, help, value as f64);
    }
    let name = "vllm:spec_decode_num_accepted_tokens_per_pos_total";
    page.head(name, "Accepted, by position.", "counter");
    for (position, count) in draft.accepted_per_position.iter().enumerate() {
        page.line(name, &[("position", &position.to_string())], *count as f64);
    }
    let name = "kilotok_accept_len";
    page.head(
        name,
        "Tokens a step, the bonus token included.",
        "histogram",
    );
    let mut total = 0;
    for (accepted, count) in draft.histogram.iter().enumerate() {
        total += count;
        let edge = (accepted + 1).to_string();
        page.line("kilotok_accept_len_bucket", &[("le", &edge)], total as f64);
    }
    page.line("kilotok_accept_len_bucket", &[("le", "+Inf")], total as f64);
    page.line(
        "kilotok_accept_len_sum",
        &[],
        (draft.steps + draft.accepted) as f64,
    );
    page.line("kilotok_accept_len_count", &[], total as f64);
}

fn own(page: &mut Page, m: &engine::Metrics, engine: &EngineHandle) {
    let name = "kilotok_decode_step_seconds_total";
    page.head(name, "Time in steps, by phase.", "counter");
    let phases = [
        ("draft", m.draft_us_total),
        ("verify", m.verify_us_total),
        ("sample", m.sample_us_total),
        ("host", m.host_us_total),
        ("prefill", m.prefill_us_total),
    ];
    for (phase, us) in phases {
        page.line(name, &[("phase", phase)], us / 1e6);
    }
    page.counter(
        "kilotok_decode_steps_total",
        "Steps of the decoder.",
        m.steps_total as f64,
    );
    page.gauge(
        "kilotok_kv_bytes",
        "Bytes of keys and values held.",
        m.kv.kv_bytes as f64,
    );
    page.gauge(
        "kilotok_kv_pages_used",
        "KV pages in use.",
        f64::from(m.kv.pages_used),
    );
    page.gauge(
        "kilotok_kv_reserved_share",
        "Share of pages claimed.",
        m.kv_reserved_share,
    );
    page.gauge(
        "kilotok_prefixes_kept",
        "Sequences kept.",
        f64::from(m.prefixes_kept),
    );
    let age = engine.heartbeat_age().as_secs_f64();
    page.gauge(
        "kilotok_engine_heartbeat_age_seconds",
        "Since the engine's last sign.",
        age,
    );
}

struct Page {
    text: String,
    model: String,
}

impl Page {
    fn new(model: &str) -> Self {
        Self {
            text: String::with_capacity(16 << 10),
            model: escape(model),
        }
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let _ = write!(
            self.text,
            "{name}{{model_name=\"{}\",engine=\"0\"",
            self.model
        );
        for (label, text) in labels {
            let _ = write!(self.text, ",{label}=\"{}\"", escape(text));
        }
        let _ = writeln!(self.text, "}} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, help, "gauge");
        self.line(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, help, "counter");
        self.line(name, &[], value);
    }
}

/// A label's value: backslash, quote and line break escaped.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_end_with_all() {
        let histogram = Histogram::new(TOKEN_EDGES);
        for us in [50, 100, 150, 900, 2_000_000, 200_000_000] {
            histogram.observe(Duration::from_micros(us));
        }
        let mut page = Page::new("m\"x");
        histogram.write(&mut page, "t", "h");
        let value = |le: &str| {
            let start = format!("t_bucket{{model_name=\"m\\\"x\",engine=\"0\",le=\"{le}\"}} ");
            let line = page.text.lines().find(|line| line.starts_with(&start));
            line.unwrap()[start.len()..].parse::<u64>().unwrap()
        };
        assert_eq!(
            (value("0.0001"), value("0.0002"), value("0.001")),
            (2, 3, 4)
        );
        assert_eq!((value("2.5"), value("80"), value("+Inf")), (5, 5, 6));
    }
}
