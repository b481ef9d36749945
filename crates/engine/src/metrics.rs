//! Counters and gauges of an engine, copied out whole; the server gives them their public names.

use crate::event::DraftStats;
use model::decoder::KvUsage;

/// A snapshot. Counters only grow.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Samples being computed now.
    pub running: u32,
    /// Requests waiting now.
    pub waiting: u32,
    /// KV in use, kept prefixes included.
    pub kv: KvUsage,
    /// KV pages in all.
    pub kv_pages: u32,
    /// Tokens in a page.
    pub page_tokens: u32,
    /// Share of the pages that running requests hold or may claim, 0 to 1.
    pub kv_reserved_share: f64,
    /// Sequences kept for their prefix now.
    pub prefixes_kept: u32,
    /// Prompt tokens of admitted requests.
    pub prompt_tokens_total: u64,
    /// Of these, looked up in the prefix cache.
    pub prefix_queries_total: u64,
    /// Of these, found.
    pub prefix_hits_total: u64,
    /// Tokens generated.
    pub generated_tokens_total: u64,
    /// Samples finished: stop, length, cancelled, deadline, error (see [`Metrics::REASONS`]).
    pub finished_total: [u64; 5],
    /// Requests refused because the queue was full.
    pub rejected_total: u64,
    /// Requests preempted for want of KV pages.
    pub preemptions_total: u64,
    /// Steps of the decoder.
    pub steps_total: u64,
    /// Time in steps.
    pub step_us_total: f64,
    /// Of it, in the drafter.
    pub draft_us_total: f64,
    /// Of it, in the target's forward pass.
    pub verify_us_total: f64,
    /// Of it, in penalties, masks and accept rule.
    pub sample_us_total: f64,
    /// Time of the engine thread between steps while there was work.
    pub host_us_total: f64,
    /// Time in prefill.
    pub prefill_us_total: f64,
    /// Drafting, over all requests.
    pub draft: DraftStats,
}

impl Metrics {
    /// Names of the entries of `finished_total`.
    pub const REASONS: [&'static str; 5] = ["stop", "length", "cancelled", "deadline", "error"];
}
