//! Expert choice: `model::reference::router` without allocation.

use model::config::MoeConfig;

use crate::swiglu::sigmoid;

/// Chooses the experts of one row. `logits`: `[experts]`, replaced by the scores;
/// `correction_bias`: `[experts]`; `chosen`: `[active]`, filled with `(expert, weight)` ascending by
/// expert. Among equals the lower expert wins.
pub fn route(
    config: &MoeConfig,
    logits: &mut [f32],
    correction_bias: &[f32],
    chosen: &mut [(u32, f32)],
) {
    for logit in logits.iter_mut() {
        *logit = sigmoid(*logit);
    }
    // Insertion into a short list sorted by biased score: `active` is small.
    let mut filled = 0;
    for (expert, (score, bias)) in logits.iter().zip(correction_bias).enumerate() {
        let key = score + bias;
        if filled == chosen.len() {
            if key.total_cmp(&chosen[filled - 1].1).is_le() {
                continue;
            }
            filled -= 1;
        }
        let mut at = filled;
        while at > 0 && chosen[at - 1].1.total_cmp(&key).is_lt() {
            chosen[at] = chosen[at - 1];
            at -= 1;
        }
        chosen[at] = (expert as u32, key);
        filled += 1;
    }
    chosen.sort_unstable_by_key(|entry| entry.0);
    let sum: f32 = chosen.iter().map(|entry| logits[entry.0 as usize]).sum();
    let divisor = if config.norm_topk { sum + 1e-20 } else { 1.0 };
    for (expert, weight) in chosen {
        *weight = logits[*expert as usize] / divisor * config.scaling;
    }
}
