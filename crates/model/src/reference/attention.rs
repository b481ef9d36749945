//! Softmax attention of one query row over the keys and values it may see, grouped-query, with an
//! optional sink logit a head (mimo-v2.md A.2: the sink joins the softmax and is dropped after it).

use std::ops::Range;

use crate::config::AttentionConfig;

/// Keys and values of one layer: `[positions, kv_heads * dim]`, row-major, keys rotated, values
/// scaled.
#[derive(Clone, Copy, Debug)]
pub struct KeysValues<'a> {
    /// `[positions, kv_heads * qk_dim]`.
    pub keys: &'a [f32],
    /// `[positions, kv_heads * v_dim]`.
    pub values: &'a [f32],
}

/// Positions that the query at `position` sees in a causal layer, its own included.
#[must_use]
pub fn visible(position: usize, window: Option<usize>) -> Range<usize> {
    let first = window.map_or(0, |w| position.saturating_sub(w));
    first..position + 1
}

/// One query row. `q`: `[heads, qk_dim]`, rotated; `visible`: positions it sees; `sinks`:
/// `[heads]`, not scaled; `out`: `[heads, v_dim]`. Scores are divided by sqrt(qk_dim).
pub fn attention(
    config: &AttentionConfig,
    q: &[f32],
    cache: KeysValues<'_>,
    visible: impl Iterator<Item = usize> + Clone,
    sinks: Option<&[f32]>,
    out: &mut [f32],
) {
    let group = config.heads / config.kv_heads;
    let scale = 1.0 / (config.qk_dim as f32).sqrt();
    for (head, out) in out.chunks_exact_mut(config.v_dim).enumerate() {
        let query = &q[head * config.qk_dim..][..config.qk_dim];
        let kv_head = head / group;
        let score = |position: usize| {
            let at = (position * config.kv_heads + kv_head) * config.qk_dim;
            let key = &cache.keys[at..at + config.qk_dim];
            scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>()
        };
        let mut scores: Vec<f32> = visible.clone().map(score).collect();
        softmax(&mut scores, sinks.map(|sinks| sinks[head]));
        out.fill(0.0);
        for (weight, position) in scores.iter().zip(visible.clone()) {
            let at = (position * config.kv_heads + kv_head) * config.v_dim;
            let value = &cache.values[at..at + config.v_dim];
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight * value;
            }
        }
    }
}

/// Softmax in place; a sink takes its share of the sum and is gone.
pub fn softmax(scores: &mut [f32], sink: Option<f32>) {
    let start = sink.unwrap_or(f32::NEG_INFINITY);
    let largest = scores.iter().fold(start, |m, s| m.max(*s));
    let mut sum = sink.map_or(0.0, |sink| (sink - largest).exp());
    for score in scores.iter_mut() {
        *score = (*score - largest).exp();
        sum += *score;
    }
    for score in scores {
        *score /= sum;
    }
}
