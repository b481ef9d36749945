//! One row of logits to the distribution a token is drawn from: the definition for every backend.
//!
//! Owns argmax, softmax with temperature and truncation, the draw, and log-probabilities. Penalties,
//! bias and masks come before, in [`crate::sampler`]. Invariants: nothing here allocates once its
//! buffers have seen their largest size; no full sort of a vocabulary; results do not depend on the
//! platform's `exp` (see [`exp`]).
//!
//! Order among tokens, wherever one is needed: larger logit first, lower id among equals.

use crate::TokenId;
use crate::decoder::TokenLogprobs;
use std::cmp::Ordering;

/// Temperature and truncation, in their order of application.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Truncation {
    /// Above 0.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
}

/// Tokens that can be drawn, ascending by id, with weights that sum to `total`.
#[derive(Clone, Debug, Default)]
pub struct Distribution {
    entries: Vec<(TokenId, f32)>,
    total: f64,
}

impl Distribution {
    /// `(token, weight)`, ascending by token; weights above 0, 1 for the most probable.
    #[must_use]
    pub fn entries(&self) -> &[(TokenId, f32)] {
        &self.entries
    }

    /// Sum of the weights.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.total
    }

    /// Probability of `token`.
    #[must_use]
    pub fn probability(&self, token: TokenId) -> f64 {
        match self.entries.binary_search_by_key(&token, |entry| entry.0) {
            Ok(i) => f64::from(self.entries[i].1) / self.total,
            Err(_) => 0.0,
        }
    }

    /// The token at `u` in `[0, 1)` of the cumulative distribution, ascending by id.
    ///
    /// # Panics
    /// When the distribution is empty.
    #[must_use]
    pub fn draw(&self, u: f64) -> TokenId {
        let mut left = u * self.total;
        for &(token, weight) in &self.entries {
            left -= f64::from(weight);
            if left < 0.0 {
                return token;
            }
        }
        // Rounding may leave a rest beyond the last entry.
        self.entries.last().expect("a distribution has entries").0
    }

    /// Draws from `max(self - q, 0)`, normalised; from `self` where that is 0 everywhere, which
    /// rounding alone can cause.
    #[must_use]
    pub fn draw_residual(&self, q: &Distribution, u: f64) -> TokenId {
        let mut sum = 0.0;
        self.for_residual(q, |_, rest| {
            sum += rest;
            false
        });
        if sum <= 0.0 {
            return self.draw(u);
        }
        let (mut left, mut last) = (u * sum, None);
        self.for_residual(q, |token, rest| {
            left -= rest;
            last = Some(token);
            left < 0.0
        });
        last.unwrap_or_else(|| self.draw(u))
    }

    /// Calls `visit` with every token whose residual is positive, until it returns true.
    fn for_residual(&self, q: &Distribution, mut visit: impl FnMut(TokenId, f64) -> bool) {
        let mut rest = q.entries.as_slice();
        for &(token, weight) in &self.entries {
            while let Some((first, tail)) = rest.split_first()
                && first.0 < token
            {
                rest = tail;
            }
            let drafted = match rest.first() {
                Some(entry) if entry.0 == token => f64::from(entry.1) / q.total,
                _ => 0.0,
            };
            let residual = f64::from(weight) / self.total - drafted;
            if residual > 0.0 && visit(token, residual) {
                return;
            }
        }
    }

    /// Becomes the softmax of `logits` (`[vocab]`, finite or minus infinity) under `truncation`.
    /// False, and empty, when every logit is minus infinity.
    pub fn fill(&mut self, logits: &[f32], truncation: &Truncation) -> bool {
        self.entries.clear();
        self.total = 0.0;
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if best == f32::NEG_INFINITY {
            return false;
        }
        self.gather(logits, best, truncation);
        let inverse = 1.0 / truncation.temperature;
        for entry in &mut self.entries {
            entry.1 = exp((entry.1 - best) * inverse);
        }
        let mut sorted = truncation.top_k == 0;
        if truncation.top_p < 1.0 {
            keep_nucleus(&mut self.entries, truncation.top_p);
            sorted = false;
        }
        // The most probable token has weight 1, so this is the share of the largest probability.
        let floor = truncation.min_p.clamp(f32::MIN_POSITIVE, 1.0);
        self.entries.retain(|entry| entry.1 >= floor);
        if !sorted {
            self.entries.sort_unstable_by_key(|entry| entry.0);
        }
        self.total = self.entries.iter().map(|entry| f64::from(entry.1)).sum();
        true
    }

    /// Collects `(token, logit)` of the `top_k` largest logits, of all when it is 0.
    fn gather(&mut self, logits: &[f32], best: f32, truncation: &Truncation) {
        // Below this the weight underflows, whatever else is kept. With a nucleus the small
        // weights count towards the mass, so min-p cannot cut early there.
        let min_p = if truncation.top_p < 1.0 {
            0.0
        } else {
            truncation.min_p
        };
        let reach = if min_p > 0.0 {
            0.01 - min_p.min(1.0).ln()
        } else {
            88.0
        };
        let floor = best - reach * truncation.temperature;
        let k = truncation.top_k as usize;
        if k == 0 || k >= logits.len() {
            let kept = (0..).zip(logits).filter(|(_, logit)| **logit >= floor);
            self.entries
                .extend(kept.map(|(token, logit)| (token, *logit)));
        } else {
            largest(logits, k, floor, &mut self.entries);
        }
    }
}

/// The order of the module's documentation.
fn better(a: &(TokenId, f32), b: &(TokenId, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Collects the `k` largest of `logits` that are at least `floor` into `out`, in no order: one pass
/// with a rising threshold, so that almost every logit costs one comparison.
pub fn largest(logits: &[f32], k: usize, mut floor: f32, out: &mut Vec<(TokenId, f32)>) {
    const CHUNK: usize = 64;
    out.clear();
    if k == 0 {
        return;
    }
    let room = (2 * k).max(k + 256);
    // Ids ascend, so once k candidates are held, a later one has to be strictly larger than the
    // worst of them. Until then `floor` itself still counts.
    let mut full = false;
    for (chunk, first) in logits.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
        let best = chunk.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if best < floor || (full && best <= floor) {
            continue;
        }
        for (&logit, token) in chunk.iter().zip(first..) {
            if logit > floor || (logit == floor && !full) {
                out.push((token, logit));
            }
        }
        if out.len() >= room {
            floor = cut(out, k);
            full = true;
        }
    }
    if out.len() > k {
        cut(out, k);
    }
}

/// Keeps the best `k` of more than `k` and returns the worst logit kept.
fn cut(entries: &mut Vec<(TokenId, f32)>, k: usize) -> f32 {
    let (_, worst, _) = entries.select_nth_unstable_by(k - 1, better);
    let worst = worst.1;
    entries.truncate(k);
    worst
}

/// Keeps the smallest set of most probable tokens that holds `top_p` of the mass, at least one.
fn keep_nucleus(entries: &mut Vec<(TokenId, f32)>, top_p: f32) {
    let total: f64 = entries.iter().map(|entry| f64::from(entry.1)).sum();
    let top_p = f64::from(top_p.max(0.0));
    // All tokens below this share together hold less than what may be left out.
    let floor = ((1.0 - top_p) * total / entries.len() as f64 * 0.999) as f32;
    entries.retain(|entry| entry.1 >= floor);
    let (mut mass, mut sorted, mut piece) = (0.0, 0, 64);
    while sorted < entries.len() {
        let end = (sorted + piece).min(entries.len());
        if end < entries.len() {
            entries[sorted..].select_nth_unstable_by(end - sorted - 1, better);
        }
        entries[sorted..end].sort_unstable_by(better);
        for i in sorted..end {
            mass += f64::from(entries[i].1);
            if mass >= top_p * total {
                entries.truncate(i + 1);
                return;
            }
        }
        (sorted, piece) = (end, piece * 4);
    }
}

/// Largest logit of a `[vocab]` row and the lowest id that has it; `None` when a logit is NaN or
/// infinite. One pass.
#[must_use]
pub fn argmax(logits: &[f32]) -> Option<(TokenId, f32)> {
    const LANES: usize = 16;
    const CHUNK: usize = 16 * LANES;
    let (mut best, mut token) = (f32::NEG_INFINITY, 0);
    let mut poison = 0.0;
    for (index, chunk) in logits.chunks(CHUNK).enumerate() {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        // A product with 0 is 0 unless the logit is NaN or infinite, and NaN survives the sum.
        let mut products = [0.0f32; LANES];
        let (whole, rest) = chunk.as_chunks::<LANES>();
        for piece in whole {
            for lane in 0..LANES {
                lanes[lane] = if piece[lane] > lanes[lane] {
                    piece[lane]
                } else {
                    lanes[lane]
                };
                products[lane] += piece[lane] * 0.0;
            }
        }
        let mut high = rest
            .iter()
            .chain(&lanes)
            .copied()
            .fold(f32::NEG_INFINITY, f32::max);
        poison += products.iter().sum::<f32>() + rest.iter().map(|l| l * 0.0).sum::<f32>();
        if high > best {
            let at = chunk.iter().position(|logit| *logit == high);
            std::mem::swap(&mut best, &mut high);
            token = (index * CHUNK + at.unwrap_or(0)) as TokenId;
        }
    }
    (poison == 0.0 && best > f32::NEG_INFINITY).then_some((token, best))
}

/// Lowest id of the largest logit of a row in which tokens may be forbidden (minus infinity); `None`
/// when all are.
#[must_use]
pub fn first_largest(logits: &[f32]) -> Option<TokenId> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let at = logits.iter().position(|logit| *logit == best)?;
    (best > f32::NEG_INFINITY).then_some(at as TokenId)
}

/// Natural logarithm of the sum of exponentials of a row, minus infinity allowed in it.
#[must_use]
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if best == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let mut sum = 0.0;
    for chunk in logits.chunks(256) {
        sum += f64::from(chunk.iter().map(|logit| exp(logit - best)).sum::<f32>());
    }
    f64::from(best) + sum.ln()
}

/// Log-probabilities of `chosen` and of the `count` most probable tokens, best first. `logits` is
/// the row after penalties, bias and masks; `buffer` is scratch.
pub fn logprobs(
    logits: &[f32],
    chosen: TokenId,
    count: u32,
    buffer: &mut Vec<(TokenId, f32)>,
) -> TokenLogprobs {
    let log_z = log_sum_exp(logits);
    largest(logits, count as usize, f32::MIN, buffer);
    buffer.sort_unstable_by(better);
    let of = |logit: f32| (f64::from(logit) - log_z) as f32;
    TokenLogprobs {
        chosen: of(logits[chosen as usize]),
        top: buffer
            .iter()
            .map(|(token, logit)| (*token, of(*logit)))
            .collect(),
    }
}

/// e^x for x <= 0, within 2 units in the last place, 0 below -87.3. Plain arithmetic without fused
/// multiply-adds: every platform gives the same bits, so a seed gives the same text everywhere, and
/// the compiler can vectorise it.
#[must_use]
#[inline]
pub fn exp(x: f32) -> f32 {
    // Cephes' expf: x = n ln 2 + r with ln 2 in two pieces, then a polynomial in r.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let clipped = if x < -87.3 { -87.3 } else { x };
    let n = (clipped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (clipped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 0.166_666_65;
    p = p * r + 0.5;
    let mantissa = p * r * r + r + 1.0;
    let scale = f32::from_bits((((n as i32) + 127) << 23) as u32);
    if x < -87.3 { 0.0 } else { mantissa * scale }
}
