//! Expert choice of one row (mimo-v2.md A.2, noaux_tc without groups): sigmoid scores, the top `k`
//! by score plus correction bias, weights from the scores without the bias.

use crate::config::MoeConfig;

/// Chooses experts. `logits`, `correction_bias`: `[experts]`; returns `(expert, weight)` ascending by
/// expert. Among equals the lower expert wins.
#[must_use]
pub fn route(config: &MoeConfig, logits: &[f32], correction_bias: &[f32]) -> Vec<(usize, f32)> {
    let scores: Vec<f32> = logits.iter().map(|&x| sigmoid(x)).collect();
    let biased = |expert: usize| scores[expert] + correction_bias[expert];
    let mut chosen: Vec<usize> = (0..config.experts).collect();
    chosen.sort_by(|&a, &b| biased(b).total_cmp(&biased(a)).then(a.cmp(&b)));
    chosen.truncate(config.active);
    chosen.sort_unstable();
    let sum: f32 = chosen.iter().map(|&e| scores[e]).sum();
    let divisor = if config.norm_topk { sum + 1e-20 } else { 1.0 };
    chosen
        .into_iter()
        .map(|e| (e, scores[e] / divisor * config.scaling))
        .collect()
}

/// 1 / (1 + e^-x).
#[must_use]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
