//! The text has the target's distribution, whatever is drafted: chi-squared tests of pairs of
//! tokens against the exact distribution, a million samples for every combination of temperature,
//! top-k, top-p, min-p, penalties and bias, without drafts, with greedy and with sampled drafts.
//!
//! A pair and not a token, so that the second one is drawn inside a block, after an accepted draft
//! that the penalties have to count. The exact distribution is computed here, in f64, straight from
//! the documentation of `SamplingParams`. Seeds are fixed: the outcome is always the same.

use model::TokenId;
use model::decoder::{SequenceConfig, SequenceOutput};
use model::random::{Purpose, uniform};
use model::sampler::{Block, Proposals, Sampler, SamplerScratch};
use model::sampling::{DraftSampling, SamplingParams};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Optimised builds (`cargo test --release`) take the full million.
const SAMPLES: u32 = if cfg!(debug_assertions) {
    100_000
} else {
    1_000_000
};
const PROMPT: [TokenId; 3] = [1, 0, 1];
/// Chance of a false alarm, all tests together.
const FALSE_ALARM: f64 = 0.01;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Drafts {
    None,
    Greedy,
    Sampled,
}

/// Target and drafter as tables: logits `[vocab]` after each token.
struct Model {
    vocab: usize,
    target: Vec<Vec<f32>>,
    drafter: Vec<Vec<f32>>,
}

impl Model {
    fn new(vocab: usize, seed: u64) -> Self {
        let noise = |key: u64, i: usize| uniform(seed * 8 + key, i as u32, Purpose::Sample) as f32;
        let row = |after: usize, key, spread| -> Vec<f32> {
            (0..vocab)
                .map(|i| (noise(key, after * vocab + i) - 0.5) * spread)
                .collect()
        };
        let target: Vec<Vec<f32>> = (0..vocab).map(|after| row(after, 0, 5.0)).collect();
        let near = |after: usize| {
            let other = row(after, 1, 2.5);
            target[after]
                .iter()
                .zip(other)
                .map(|(a, b)| a + b)
                .collect()
        };
        let drafter = (0..vocab).map(near).collect();
        Self {
            vocab,
            target,
            drafter,
        }
    }

    /// Exact distribution after `PROMPT` and `said`.
    fn exact(&self, params: &SamplingParams, said: &[TokenId]) -> Vec<f64> {
        let last = said.last().unwrap_or(&PROMPT[2]);
        let mut logits: Vec<f64> = self.target[*last as usize]
            .iter()
            .map(|l| f64::from(*l))
            .collect();
        for (token, bias) in &params.logit_bias {
            logits[*token as usize] += f64::from(*bias);
        }
        for (logit, token) in logits.iter_mut().zip(0..) {
            let count = said.iter().filter(|t| **t == token).count() as f64;
            if count > 0.0 || PROMPT.contains(&token) {
                let penalty = f64::from(params.repetition_penalty);
                *logit = if *logit > 0.0 {
                    *logit / penalty
                } else {
                    *logit * penalty
                };
            }
            if count > 0.0 {
                *logit -= f64::from(params.presence_penalty)
                    + count * f64::from(params.frequency_penalty);
            }
        }
        truncate(&logits, params)
    }

    /// Exact distribution of pairs, `[vocab, vocab]`.
    fn pairs(&self, params: &SamplingParams) -> Vec<f64> {
        let first = self.exact(params, &[]);
        let rows = first
            .iter()
            .zip(0..)
            .flat_map(|(p, token)| self.exact(params, &[token]).into_iter().map(move |q| p * q));
        rows.collect()
    }
}

fn truncate(logits: &[f64], params: &SamplingParams) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let weight = |i: usize| ((logits[i] - logits[order[0]]) / f64::from(params.temperature)).exp();
    let total: f64 = order.iter().map(|i| weight(*i)).sum();
    let mut mass = 0.0;
    let nucleus = order.iter().position(|i| {
        mass += weight(*i);
        mass >= f64::from(params.top_p) * total
    });
    let kept = match params.top_p < 1.0 {
        true => &order[..nucleus.map_or(order.len(), |n| n + 1)],
        false => &order[..],
    };
    let kept: Vec<usize> = kept
        .iter()
        .copied()
        .filter(|i| weight(*i) >= f64::from(params.min_p))
        .collect();
    let total: f64 = kept.iter().map(|i| weight(*i)).sum();
    let mut p = vec![0.0; logits.len()];
    for i in kept {
        p[i] = weight(i) / total;
    }
    p
}

/// Draws pairs of tokens with blocks of three rows.
struct Machine<'a> {
    model: &'a Model,
    sampler: Sampler,
    drafts: Drafts,
    rows: Vec<f32>,
    proposals: Proposals,
    scratch: SamplerScratch,
    out: SequenceOutput,
}

impl<'a> Machine<'a> {
    fn new(model: &'a Model, mut params: SamplingParams, drafts: Drafts) -> Self {
        if drafts == Drafts::Sampled {
            params.draft_sampling = DraftSampling::Sampled;
        }
        let config = SequenceConfig {
            sampling: params,
            prompt_tokens: PROMPT.len() as u32,
            logprobs: None,
            constraint: None,
        };
        Self {
            model,
            sampler: Sampler::new(config, model.vocab as u32, &PROMPT),
            drafts,
            rows: Vec::new(),
            proposals: Proposals::default(),
            scratch: SamplerScratch::default(),
            out: SequenceOutput::default(),
        }
    }

    /// One block after `last`, whose index is `position`.
    fn block(&mut self, position: u32, mut last: TokenId) {
        self.proposals.clear();
        self.rows.clear();
        self.rows
            .extend_from_slice(&self.model.target[last as usize]);
        let slots = if self.drafts == Drafts::None { 0 } else { 2 };
        for slot in 1..=slots {
            let logits = &self.model.drafter[last as usize];
            self.sampler
                .propose(position + slot, logits, &mut self.proposals)
                .unwrap();
            last = *self.proposals.tokens().last().unwrap();
            self.rows
                .extend_from_slice(&self.model.target[last as usize]);
        }
        let block = Block {
            position,
            logits: &mut self.rows,
            proposals: &self.proposals,
            simulate_accepted: None,
        };
        self.sampler
            .accept(block, &mut self.scratch, &mut self.out)
            .unwrap();
    }

    fn pair(&mut self, sample: u32) -> (TokenId, TokenId) {
        self.sampler.rewind(&PROMPT);
        // Each sample has indices of its own, and with them random numbers of its own.
        let position = PROMPT.len() as u32 + sample * 4;
        self.block(position, PROMPT[2]);
        let first = self.out.tokens[0];
        if let Some(second) = self.out.tokens.get(1) {
            return (first, *second);
        }
        self.block(position + 1, first);
        (first, self.out.tokens[0])
    }
}

/// Upper tail of the chi-squared distribution (Numerical Recipes, 6.2).
fn tail(chi_squared: f64, freedom: f64) -> f64 {
    let (a, x) = (freedom / 2.0, chi_squared / 2.0);
    let front = (a * x.ln() - x - ln_gamma(a)).exp();
    if x < a + 1.0 {
        let (mut term, mut sum, mut n) = (1.0 / a, 1.0 / a, a);
        while term > sum * 1e-14 {
            n += 1.0;
            term *= x / n;
            sum += term;
        }
        return 1.0 - front * sum;
    }
    let mut b = x + 1.0 - a;
    let (mut c, mut d) = (1e300, 1.0 / b);
    let mut h = d;
    for i in 1..10_000 {
        let i = f64::from(i);
        b += 2.0;
        d = 1.0 / (-i * (i - a) * d + b);
        c = b - i * (i - a) / c;
        h *= d * c;
        if (d * c - 1.0).abs() < 1e-14 {
            break;
        }
    }
    front * h
}

/// Stirling's series, after shifting the argument up.
fn ln_gamma(mut x: f64) -> f64 {
    let mut shift = 0.0;
    while x < 10.0 {
        shift -= x.ln();
        x += 1.0;
    }
    let series = 1.0 / (12.0 * x) - 1.0 / (360.0 * x.powi(3)) + 1.0 / (1260.0 * x.powi(5));
    shift + (x - 0.5) * x.ln() - x + 0.5 * std::f64::consts::TAU.ln() + series
}

/// P-value of `counts`; 0 when something came that cannot come.
fn p_value(counts: &[u32], exact: &[f64]) -> f64 {
    let total: f64 = counts.iter().map(|n| f64::from(*n)).sum();
    let (mut chi, mut cells, mut rare) = (0.0, 0, (0.0, 0.0));
    for (count, p) in counts.iter().zip(exact) {
        let (count, expected) = (f64::from(*count), p * total);
        if *p == 0.0 && count > 0.0 {
            return 0.0;
        }
        if expected < 10.0 {
            rare = (rare.0 + count, rare.1 + expected);
            continue;
        }
        chi += (count - expected).powi(2) / expected;
        cells += 1;
    }
    if rare.1 >= 10.0 {
        chi += (rare.0 - rare.1).powi(2) / rare.1;
        cells += 1;
    }
    if cells > 1 {
        tail(chi, f64::from(cells - 1))
    } else {
        1.0
    }
}

fn count(model: &Model, params: &SamplingParams, drafts: Drafts, samples: u32) -> Vec<u32> {
    let mut machine = Machine::new(model, params.clone(), drafts);
    let mut counts = vec![0; model.vocab * model.vocab];
    for sample in 0..samples {
        let (first, second) = machine.pair(sample);
        counts[first as usize * model.vocab + second as usize] += 1;
    }
    counts
}

fn combinations() -> Vec<(usize, SamplingParams, Drafts)> {
    let mut all = Vec::new();
    for bits in 0..64u32 {
        let on = |bit: u32| bits >> bit & 1 == 1;
        let params = SamplingParams {
            temperature: if on(0) { 0.6 } else { 1.2 },
            top_k: if on(1) { 3 } else { 0 },
            top_p: if on(2) { 0.85 } else { 1.0 },
            min_p: if on(3) { 0.15 } else { 0.0 },
            repetition_penalty: if on(4) { 1.4 } else { 1.0 },
            presence_penalty: if on(4) { 0.5 } else { 0.0 },
            frequency_penalty: if on(4) { 0.3 } else { 0.0 },
            logit_bias: if on(5) {
                vec![(0, 0.8), (2, -1.1)]
            } else {
                Vec::new()
            },
            seed: u64::from(bits),
            ..SamplingParams::default()
        };
        let vocab = 4 + bits as usize % 13;
        for drafts in [Drafts::None, Drafts::Greedy, Drafts::Sampled] {
            // Without drafts nothing but the row's distribution is at work: fewer tests do.
            if drafts != Drafts::None || bits % 5 == 0 {
                all.push((vocab, params.clone(), drafts));
            }
        }
    }
    all
}

#[test]
fn every_combination_has_the_exact_distribution() {
    let all = combinations();
    let bound = FALSE_ALARM / all.len() as f64;
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let smallest = Mutex::new(1.0f64);
    let work = || {
        while let Some((vocab, params, drafts)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let model = Model::new(*vocab, params.seed);
            let p = p_value(
                &count(&model, params, *drafts, SAMPLES),
                &model.pairs(params),
            );
            let mut least = smallest.lock().unwrap();
            *least = least.min(p);
            if p < bound {
                failures
                    .lock()
                    .unwrap()
                    .push((p, *vocab, *drafts, params.clone()));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    println!(
        "{} tests, smallest p {}",
        all.len(),
        smallest.lock().unwrap()
    );
    assert!(failures.lock().unwrap().is_empty(), "{failures:#?}");
}

#[test]
fn the_test_sees_a_wrong_distribution() {
    let params = SamplingParams {
        temperature: 1.0,
        top_p: 0.9,
        seed: 3,
        ..Default::default()
    };
    let model = Model::new(8, 3);
    let counts = count(&model, &params, Drafts::Sampled, 100_000);
    assert!(p_value(&counts, &model.pairs(&params)) > 1e-4);
    let wrong = SamplingParams {
        temperature: 1.02,
        ..params.clone()
    };
    assert!(p_value(&counts, &model.pairs(&wrong)) < 1e-4);
    let wrong = SamplingParams {
        presence_penalty: 0.05,
        ..params
    };
    assert!(p_value(&counts, &model.pairs(&wrong)) < 1e-4);
}

#[test]
fn sampled_drafts_are_accepted_more_often_than_greedy_ones() {
    let model = Model::new(16, 5);
    let params = SamplingParams {
        temperature: 1.2,
        seed: 1,
        ..Default::default()
    };
    let accepted = |drafts| {
        let mut machine = Machine::new(&model, params.clone(), drafts);
        let mut sum = 0;
        for sample in 0..50_000 {
            machine.block(sample * 4 + 3, 1);
            sum += machine.out.accepted;
        }
        sum
    };
    assert!(accepted(Drafts::Sampled) > accepted(Drafts::Greedy));
}
