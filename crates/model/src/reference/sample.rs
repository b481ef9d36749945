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

/// Tokens in a piece of a dense distribution; a draw looks into one piece only.
const PIECE: usize = 256;
/// Weights of one bin differ by less than a sixteenth: the exponent and 4 bits of the mantissa.
const BIN_SHIFT: u32 = 19;
/// More candidates than this are parted by bins before the rest is sorted.
const SORTED_MAX: usize = 256;
/// Weights are at most 1.
const BINS: usize = (1f32.to_bits() >> BIN_SHIFT) as usize + 1;

/// The tokens that can be drawn, each with a weight above 0; the most probable token has weight 1.
#[derive(Clone, Debug, Default)]
pub struct Distribution {
    /// All tokens have a weight, in `weights`; else some have, in `entries`.
    dense: bool,
    /// `(token, weight)`, ascending by token.
    entries: Vec<(TokenId, f32)>,
    /// `[vocab]`.
    weights: Vec<f32>,
    /// Sum of each [`PIECE`] of `weights`.
    sums: Vec<f64>,
    total: f64,
    /// Mass of each bin of weights, for top-p.
    bins: Vec<f64>,
}

impl Distribution {
    /// Sum of the weights.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.total
    }

    /// Weight of `token`.
    #[must_use]
    pub fn weight(&self, token: TokenId) -> f32 {
        if self.dense {
            return self.weights.get(token as usize).copied().unwrap_or(0.0);
        }
        let found = self.entries.binary_search_by_key(&token, |entry| entry.0);
        found.map_or(0.0, |i| self.entries[i].1)
    }

    /// Probability of `token`.
    #[must_use]
    pub fn probability(&self, token: TokenId) -> f64 {
        f64::from(self.weight(token)) / self.total
    }

    /// The token at `u` in `[0, 1)` of the cumulative distribution, ascending by id.
    #[must_use]
    pub fn draw(&self, u: f64) -> TokenId {
        let mut left = u * self.total;
        if !self.dense {
            return pick(self.entries.iter().copied(), left);
        }
        let mut piece = 0;
        while piece + 1 < self.sums.len() && left >= self.sums[piece] {
            left -= self.sums[piece];
            piece += 1;
        }
        let first = piece * PIECE;
        let end = (first + PIECE).min(self.weights.len());
        pick(
            (first as TokenId..).zip(self.weights[first..end].iter().copied()),
            left,
        )
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
        let mut one = |token, weight: f32| {
            let residual = f64::from(weight) / self.total - q.probability(token);
            residual > 0.0 && visit(token, residual)
        };
        if self.dense {
            let _ = (0..)
                .zip(&self.weights)
                .any(|(token, weight)| one(token, *weight));
        } else {
            let _ = self
                .entries
                .iter()
                .any(|(token, weight)| one(*token, *weight));
        }
    }

    /// Becomes the softmax of `logits` (`[vocab]`, finite or minus infinity) under `truncation`.
    /// False, and empty, when every logit is minus infinity.
    pub fn fill(&mut self, logits: &[f32], truncation: &Truncation) -> bool {
        self.entries.clear();
        self.total = 0.0;
        self.dense = false;
        let best = max(logits);
        if best == f32::NEG_INFINITY {
            return false;
        }
        let k = truncation.top_k as usize;
        if k > 0 && k < logits.len() {
            self.fill_top_k(logits, best, truncation);
        } else if truncation.top_p < 1.0 {
            self.fill_dense(logits, best, truncation.temperature);
            self.fill_nucleus(truncation);
        } else if truncation.min_p > 0.0 {
            self.fill_min_p(logits, best, truncation);
        } else {
            self.fill_dense(logits, best, truncation.temperature);
            self.dense = true;
            return true;
        }
        self.total = self.entries.iter().map(|entry| f64::from(entry.1)).sum();
        true
    }

    /// Weights of all tokens, and their sums.
    fn fill_dense(&mut self, logits: &[f32], best: f32, temperature: f32) {
        let inverse = 1.0 / temperature;
        self.weights.resize(logits.len(), 0.0);
        self.sums.clear();
        for (from, to) in logits.chunks(PIECE).zip(self.weights.chunks_mut(PIECE)) {
            for (weight, logit) in to.iter_mut().zip(from) {
                *weight = exp((logit - best) * inverse);
            }
            self.sums.push(f64::from(sum(to)));
        }
        self.total = self.sums.iter().sum();
    }

    fn fill_top_k(&mut self, logits: &[f32], best: f32, truncation: &Truncation) {
        largest(
            logits,
            truncation.top_k as usize,
            f32::MIN,
            &mut self.entries,
        );
        let inverse = 1.0 / truncation.temperature;
        for entry in &mut self.entries {
            entry.1 = exp((entry.1 - best) * inverse);
        }
        if truncation.top_p < 1.0 {
            self.entries.sort_unstable_by(better);
            let total: f64 = self.entries.iter().map(|entry| f64::from(entry.1)).sum();
            let mut mass = 0.0;
            let last = self.entries.iter().position(|entry| {
                mass += f64::from(entry.1);
                mass >= f64::from(truncation.top_p) * total
            });
            self.entries
                .truncate(last.map_or(usize::MAX, |last| last + 1));
        }
        let floor = truncation.min_p.clamp(f32::MIN_POSITIVE, 1.0);
        self.entries.retain(|entry| entry.1 >= floor);
        self.entries.sort_unstable_by_key(|entry| entry.0);
    }

    fn fill_min_p(&mut self, logits: &[f32], best: f32, truncation: &Truncation) {
        let min_p = truncation.min_p.min(1.0);
        let inverse = 1.0 / truncation.temperature;
        // A little lower than the exact edge, which is decided by the weight.
        let floor = best + (min_p.ln() - 0.01) * truncation.temperature;
        for (chunk, first) in logits.chunks(64).zip((0..).step_by(64)) {
            if max(chunk) < floor {
                continue;
            }
            for (logit, token) in chunk.iter().zip(first..) {
                let weight = exp((logit - best) * inverse);
                if *logit >= floor && weight >= min_p {
                    self.entries.push((token, weight));
                }
            }
        }
    }

    /// From dense weights, the smallest set of most probable tokens that holds `top_p` of the mass,
    /// at least one, and of it what `min_p` leaves.
    fn fill_nucleus(&mut self, truncation: &Truncation) {
        let mut needed = f64::from(truncation.top_p.max(0.0)) * self.total;
        // All tokens below this together hold less than what may be left out.
        let spare = (1.0 - f64::from(truncation.top_p)) * self.total;
        let floor = (spare / self.weights.len() as f64 * 0.99) as f32;
        let floor = floor.clamp(f32::MIN_POSITIVE, 1.0);
        let kept = (0..)
            .zip(&self.weights)
            .filter(|(_, weight)| **weight >= floor);
        self.entries
            .extend(kept.map(|(token, weight)| (token, *weight)));
        let mut sure = 0;
        if self.entries.len() > SORTED_MAX {
            (sure, needed) = self.part_at_edge(needed);
        }
        self.entries[sure..].sort_unstable_by(better);
        let mut mass = 0.0;
        let last = self.entries[sure..].iter().position(|entry| {
            mass += f64::from(entry.1);
            mass >= needed
        });
        self.entries
            .truncate(last.map_or(usize::MAX, |last| sure + last + 1));
        let min_p = truncation.min_p;
        self.entries.retain(|entry| entry.1 >= min_p);
        self.entries.sort_unstable_by_key(|entry| entry.0);
    }

    /// Finds the bin of weights in which the best tokens reach the mass `needed`, puts the tokens
    /// above it first and drops those below. Returns how many are above, and the mass that the bin
    /// has to give.
    fn part_at_edge(&mut self, needed: f64) -> (usize, f64) {
        self.bins.clear();
        self.bins.resize(BINS, 0.0);
        for (_, weight) in &self.entries {
            self.bins[bin(*weight)] += f64::from(*weight);
        }
        let (mut above, mut edge) = (0.0, BINS - 1);
        while edge > 0 && above + self.bins[edge] < needed {
            above += self.bins[edge];
            edge -= 1;
        }
        self.entries.retain(|entry| bin(entry.1) >= edge);
        let mut sure = 0;
        for i in 0..self.entries.len() {
            if bin(self.entries[i].1) > edge {
                self.entries.swap(sure, i);
                sure += 1;
            }
        }
        (sure, needed - above)
    }
}

fn bin(weight: f32) -> usize {
    ((weight.to_bits() >> BIN_SHIFT) as usize).min(BINS - 1)
}

/// The entry at `left` of the running sum of the weights; the last that has a weight where rounding
/// leaves a rest.
fn pick(entries: impl Iterator<Item = (TokenId, f32)>, mut left: f64) -> TokenId {
    let mut last = 0;
    for (token, weight) in entries {
        if weight > 0.0 {
            last = token;
            left -= f64::from(weight);
            if left < 0.0 {
                break;
            }
        }
    }
    last
}

/// Sum in lanes: the order is fixed, and the compiler can vectorise it.
fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0; 16];
    let (whole, rest) = values.as_chunks::<16>();
    for piece in whole {
        for (lane, value) in lanes.iter_mut().zip(piece) {
            *lane += value;
        }
    }
    lanes.iter().chain(rest).sum()
}

/// Largest of a row without NaN, in lanes.
fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (whole, rest) = values.as_chunks::<16>();
    for piece in whole {
        for (lane, value) in lanes.iter_mut().zip(piece) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
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
        let best = max(chunk);
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
    let best = max(logits);
    let at = logits.iter().position(|logit| *logit == best)?;
    (best > f32::NEG_INFINITY).then_some(at as TokenId)
}

/// Natural logarithm of the sum of exponentials of a row, minus infinity allowed in it.
#[must_use]
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let best = max(logits);
    if best == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let (mut total, mut weights) = (0.0, [0.0; PIECE]);
    for piece in logits.chunks(PIECE) {
        for (weight, logit) in weights.iter_mut().zip(piece) {
            *weight = exp(logit - best);
        }
        total += f64::from(sum(&weights[..piece.len()]));
    }
    f64::from(best) + total.ln()
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

/// The largest probability of softmax(`logits`), whose largest element is `largest`: 1 / sum e^(x -
/// largest). Sixteen sums side by side, so that the compiler can vectorise it.
#[must_use]
#[inline(always)]
pub fn confidence(logits: &[f32], largest: f32) -> f32 {
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut sums = [0.0f32; 16];
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += exp(x - largest);
        }
    }
    let rest: f32 = rest.iter().map(|x| exp(x - largest)).sum();
    1.0 / (sums.iter().sum::<f32>() + rest)
}

/// e^x for x <= 0: relative error below 2e-7 + |x| 1e-7, 0 below -87. Plain arithmetic without
/// fused multiply-adds: every platform gives the same bits, so a seed gives the same text
/// everywhere, and the compiler can vectorise it.
#[must_use]
#[inline]
pub fn exp(x: f32) -> f32 {
    // 2^t = 2^n 2^f with n an integer and |f| <= 1/2; n is added to the exponent's bits of 2^f, for
    // which the Taylor polynomial of degree 6 is good to 2e-8.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves n in the low bits
    let t = if x > -87.0 {
        x * std::f32::consts::LOG2_E
    } else {
        -126.0
    };
    let shifted = t + ROUND;
    let f = t - (shifted - ROUND);
    let mut p = 1.540_353e-4;
    p = p * f + 1.333_355_8e-3;
    p = p * f + 9.618_129e-3;
    p = p * f + 5.550_411e-2;
    p = p * f + 0.240_226_5;
    p = p * f + std::f32::consts::LN_2;
    p = p * f + 1.0;
    let power = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x > -87.0 { power } else { 0.0 }
}
