//! Trains a DFlash drafter on answers that its target wrote: phase `draft`.
//!
//! Each step draws new anchors for every chunk; the frozen target runs on the same sequences and
//! gives taps, and its distribution at every masked position, for a divergence beside the
//! cross-entropy. Position k of a block weighs exp(-(k - 1) / gamma).

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, no_grad};

use crate::data::{mix, uniform};
use crate::drafter::{Blocks, CHUNK, Drafter, Plan};
use crate::error::{Error, Result};
use crate::loss::{self, Teacher};
use crate::net::Net;
use crate::optim;
use crate::report::Report;
use crate::sample::Answer;
use crate::state;

/// Settings of the phase.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Optimizer steps.
    pub steps: u64,
    /// Target tokens a step, about.
    pub tokens: usize,
    /// Anchors a chunk of 128 positions.
    pub anchors: usize,
    /// Decay of the weight over block positions.
    pub gamma: f64,
    /// Weight of the divergence from the target's distribution.
    pub distill: f64,
    /// Weight of the cross-entropy on the target's tokens.
    pub copy: f64,
    /// Muon for matrices; else AdamW alone.
    pub muon: bool,
    /// Matrices in FP8 from the first step.
    pub fp8: bool,
    /// Seed of weights, batches and anchors.
    pub seed: u64,
    /// Steps between evaluations.
    pub eval_every: u64,
    /// Steps between checkpoints.
    pub save_every: u64,
    /// Answers a domain kept for evaluation.
    pub eval_answers: usize,
    /// The optimizer.
    pub optimizer: optim::Settings,
    /// The drafter.
    pub drafter: Plan,
}

/// A running phase.
#[derive(Debug)]
pub struct Drafting<'a> {
    /// What is trained.
    pub drafter: Drafter,
    /// What it drafts for.
    pub target: &'a Net,
    settings: &'a Settings,
    batches: Vec<Vec<Answer>>,
    held: Vec<Answer>,
    /// Answers to prompts that nothing was trained on; for evaluation alone.
    pub unseen: Vec<Answer>,
    /// Steps done.
    pub step: u64,
}

/// One batch on the device.
struct Batch {
    /// `[rows, length]`.
    tokens: Tensor,
    /// Answer begins, ends: `[rows]`.
    prompt: Tensor,
    end: Tensor,
}

impl<'a> Drafting<'a> {
    /// Starts the phase on `answers`.
    pub fn new(target: &'a Net, settings: &'a Settings, answers: Vec<Answer>) -> Result<Self> {
        let device = target.params.device();
        let plan = settings.drafter.clone();
        let seed = settings.seed as i64;
        let mut drafter = Drafter::new(plan, target.shape.clone(), device, settings.muon, seed);
        drafter.quantize(settings.fp8);
        let (train, held) = split(answers, settings.eval_answers);
        if train.is_empty() {
            return Err(Error::Invalid("no answers to train on".into()));
        }
        Ok(Self {
            drafter,
            target,
            settings,
            batches: batches(train, settings.tokens),
            held,
            unseen: Vec::new(),
            step: 0,
        })
    }

    /// One optimizer step: weighted loss, mean cross-entropy, gradient norm, masks trained on. A batch of
    /// answers so short that no anchor fell into one changes nothing: 0 masks.
    #[must_use]
    pub fn advance(&mut self) -> [f64; 4] {
        let settings = self.settings;
        let device = self.target.params.device();
        let count = self.batches.len() as u64;
        let (epoch, index) = (self.step / count, self.step % count);
        let at = permute(index, count, mix(settings.seed ^ epoch));
        let batch = load(&self.batches[at as usize], device);
        let blocks = self.anchors(&batch, self.step);
        let (rows, signals) = self.signals(&batch, &blocks);
        if signals.labels.numel() == 0 {
            self.step += 1;
            return [0.0; 4];
        }
        let weight = self.weights(&signals);
        let teacher = Teacher {
            rows: &signals.taught,
            head: self.target.embedding(),
        };
        let sums = loss::head_loss(
            &rows.detach(),
            self.target.embedding(),
            Some(teacher),
            &signals.labels,
            &(&weight * settings.distill),
            &(&weight * settings.copy),
        );
        loss::backward(&rows, &sums.grad);
        let rate = settings.optimizer.rate_at(self.step, settings.steps);
        let norm = optim::step(
            &mut self.drafter.params,
            &settings.optimizer,
            rate,
            self.step,
        );
        self.step += 1;
        let ce = sums.cross_entropy.mean(Kind::Float);
        let n = crate::files::tensor_values(&Tensor::stack(&[sums.loss, ce, norm], 0));
        let masks = signals.labels.size()[0] as f64;
        [f64::from(n[0]), f64::from(n[1]), f64::from(n[2]), masks]
    }

    /// `anchors` random positions in every chunk of every row.
    fn anchors(&self, batch: &Batch, step: u64) -> Blocks {
        let (rows, length) = batch.tokens.size2().expect("tokens are [rows, length]");
        let chunks = length / CHUNK;
        let each = self.settings.anchors as i64;
        let total = (rows * chunks * each) as u64;
        let stream = mix(self.settings.seed ^ 0x616e_6368) ^ step;
        let inside: Vec<i64> = (0..total)
            .map(|i| (uniform(stream, i, 0) * CHUNK as f64) as i64)
            .collect();
        let inside = Tensor::from_slice(&inside).reshape([rows, chunks, each]);
        let start =
            Tensor::arange(chunks, (Kind::Int64, Device::Cpu)).reshape([1, chunks, 1]) * CHUNK;
        Blocks {
            anchors: (inside + start).to_device(batch.tokens.device()),
        }
    }

    /// Drafter rows of all masks that stand inside an answer, and what they should say.
    fn signals(&self, batch: &Batch, blocks: &Blocks) -> (Tensor, Signals) {
        let output = no_grad(|| {
            self.target
                .forward(&batch.tokens, &self.settings.drafter.taps)
        });
        let taps = Tensor::cat(&output.taps, -1);
        let embedding = self.target.embedding();
        let out = self
            .drafter
            .forward(&taps, &batch.tokens, embedding, blocks);
        let (hidden, block) = (self.target.shape.hidden, self.settings.drafter.block);
        let (rows, chunks, each) = blocks
            .anchors
            .size3()
            .expect("anchors are [rows, chunks, blocks]");
        let length = batch.tokens.size()[1];
        let offset = Tensor::arange_start(1, block, (Kind::Int64, blocks.anchors.device()));
        let place =
            (blocks.anchors.unsqueeze(-1) + &offset).reshape([rows, chunks * each * (block - 1)]);
        let anchor = (place.shallow_clone() - offset.repeat([chunks * each])).reshape_as(&place);
        let inside = place
            .lt_tensor(&batch.end.unsqueeze(1))
            .logical_and(&anchor.ge_tensor(&batch.prompt.unsqueeze(1)));
        let clamped = place.clamp_max(length - 1);
        let base = Tensor::arange(rows, (Kind::Int64, place.device())).unsqueeze(1) * length;
        let flat = (clamped + base).reshape([-1]);
        let keep = inside.reshape([-1]).nonzero().squeeze_dim(1);
        let masks = out
            .narrow(2, 1, block - 1)
            .reshape([-1, hidden])
            .index_select(0, &keep);
        let flat = flat.index_select(0, &keep);
        let depth = offset.repeat([rows * chunks * each]).index_select(0, &keep);
        let taught = output
            .hidden
            .reshape([-1, hidden])
            .index_select(0, &(&flat - 1));
        let labels = batch.tokens.reshape([-1]).index_select(0, &flat);
        (
            masks,
            Signals {
                labels,
                taught,
                depth,
                keep,
            },
        )
    }

    /// exp(-(k - 1) / gamma), summing to 1: `[masks, 1]` f32.
    fn weights(&self, signals: &Signals) -> Tensor {
        let depth = signals.depth.to_kind(Kind::Float);
        let weight = ((depth - 1.0) * (-1.0 / self.settings.gamma)).exp();
        let sum = weight.sum(Kind::Float) + 1e-9;
        (weight / sum).unsqueeze(1)
    }

    /// Mean acceptance length by domain and rule on `answers`, teacher-forced.
    pub fn evaluate(&self, names: &[String], answers: &[Answer]) -> Value {
        let mut out = json!({});
        for (index, name) in names.iter().enumerate() {
            for greedy in [true, false] {
                let rows: Vec<Answer> = answers
                    .iter()
                    .filter(|a| usize::from(a.domain) == index && a.greedy == greedy)
                    .cloned()
                    .collect();
                if rows.is_empty() {
                    continue;
                }
                let (mean, positions) = self.acceptance(rows);
                let key = format!("{name}_{}", if greedy { "greedy" } else { "sampled" });
                out[key] = json!({"length": (mean * 1e3).round() / 1e3, "positions": positions});
            }
        }
        out
    }

    /// 1 + the mean number of leading masks that say what the answer says; and the share by position.
    fn acceptance(&self, answers: Vec<Answer>) -> (f64, Vec<f64>) {
        let block = self.settings.drafter.block as usize;
        let (mut blocks_seen, mut prefix) = (0.0, vec![0.0; block - 1]);
        for batch in batches(answers, self.settings.tokens / 2) {
            let batch = load(&batch, self.target.params.device());
            no_grad(|| {
                let blocks = self.anchors(&batch, u64::MAX);
                let (rows, signals) = self.signals(&batch, &blocks);
                if signals.labels.numel() == 0 {
                    return;
                }
                let right = self
                    .argmax(&rows)
                    .eq_tensor(&signals.labels)
                    .to_kind(Kind::Float);
                let total = blocks.anchors.numel() as i64 * (block as i64 - 1);
                let put = |values: &Tensor| {
                    Tensor::zeros([total], (Kind::Float, values.device()))
                        .index_put(&[Some(&signals.keep)], values, false)
                        .reshape([-1, block as i64 - 1])
                };
                let present = put(&right.ones_like());
                // Whole blocks only: a block cut by the end of the answer says less than it could.
                let whole = present.select(1, block as i64 - 2);
                let chain = put(&right).cumprod(-1, Kind::Float) * whole.unsqueeze(1);
                blocks_seen += whole.sum(Kind::Double).double_value(&[]);
                let sums = chain.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
                for (to, from) in prefix.iter_mut().zip(crate::files::tensor_values(&sums)) {
                    *to += f64::from(from);
                }
            });
        }
        let shares: Vec<f64> = prefix
            .iter()
            .map(|x| x / f64::max(blocks_seen, 1.0))
            .collect();
        let rounded = shares.iter().map(|x| (x * 1e3).round() / 1e3).collect();
        (1.0 + shares.iter().sum::<f64>(), rounded)
    }

    fn argmax(&self, rows: &Tensor) -> Tensor {
        let head = self.target.embedding().tr();
        let count = rows.size()[0];
        let mut out = Vec::new();
        let mut at = 0;
        while at < count {
            let n = 8192.min(count - at);
            out.push(rows.narrow(0, at, n).matmul(&head).argmax(-1, false));
            at += n;
        }
        Tensor::cat(&out, 0)
    }

    /// Trains to the end; checkpoints and metrics go to `out`.
    pub fn run(&mut self, out: &Path, names: &[String], resume: bool) -> Result<()> {
        let saved = out.join("state.safetensors");
        if resume && saved.exists() {
            self.step = state::load(&saved, &mut self.drafter.params, None)?;
        }
        let mut report = Report::open(&out.join("metrics.jsonl"), self.settings.steps, self.step)?;
        let size = self.drafter.params.count();
        report.line(json!({"settings": self.settings, "parameters": size,
            "batches": self.batches.len(), "held_answers": self.held.len()}))?;
        while self.step < self.settings.steps {
            let [loss, ce, norm, masks] = self.advance();
            if !(loss.is_finite() && norm.is_finite()) {
                return Err(Error::NotFinite {
                    step: self.step,
                    what: "the loss or the gradient".into(),
                    checkpoint: saved,
                });
            }
            report.step(self.settings.tokens as u64, loss);
            if self.step.is_multiple_of(20) || self.step == 1 {
                report.line(json!({"step": self.step, "loss": loss, "ce": ce, "norm": norm, "masks": masks}))?;
            }
            if self.step.is_multiple_of(self.settings.eval_every)
                || self.step == self.settings.steps
            {
                let acceptance = self.evaluate(names, &self.held);
                report.line(json!({"step": self.step, "acceptance": acceptance}))?;
                if !self.unseen.is_empty() {
                    let unseen = self.evaluate(names, &self.unseen);
                    report.line(json!({"step": self.step, "unseen": unseen}))?;
                }
            }
            if self.step.is_multiple_of(self.settings.save_every)
                || self.step == self.settings.steps
            {
                state::save(&saved, &self.drafter.params, None, self.step)?;
            }
        }
        report.finish()
    }
}

/// What the masks should say.
struct Signals {
    /// `[masks]` int64.
    labels: Tensor,
    /// Target rows that predict them, `[masks, hidden]`.
    taught: Tensor,
    /// Position in the block, from 1, `[masks]`.
    depth: Tensor,
    /// Index of each among all masks of the batch.
    keep: Tensor,
}

/// Holds `each` answers of every domain and rule back.
fn split(answers: Vec<Answer>, each: usize) -> (Vec<Answer>, Vec<Answer>) {
    let mut count = std::collections::HashMap::new();
    let mut held = Vec::new();
    let mut train = Vec::new();
    for answer in answers {
        if answer.tokens.len() < answer.prompt + 8 {
            continue;
        }
        let n = count.entry((answer.domain, answer.greedy)).or_insert(0);
        *n += 1;
        if *n <= each {
            held.push(answer)
        } else {
            train.push(answer)
        }
    }
    (train, held)
}

/// Answers of like length together, about `tokens` a batch after padding to whole chunks.
fn batches(mut answers: Vec<Answer>, tokens: usize) -> Vec<Vec<Answer>> {
    let chunk = CHUNK as usize;
    answers.sort_by_key(|a| {
        (
            a.tokens.len().div_ceil(chunk),
            mix(a.tokens.len() as u64 ^ u64::from(a.tokens[a.prompt])),
        )
    });
    let mut out: Vec<Vec<Answer>> = Vec::new();
    let mut width = 0;
    for answer in answers {
        let length = answer.tokens.len().div_ceil(chunk) * chunk;
        match out.last_mut() {
            Some(last) if width == length && (last.len() + 1) * length <= tokens => {
                last.push(answer)
            }
            _ => {
                width = length;
                out.push(vec![answer]);
            }
        }
    }
    out
}

fn load(answers: &[Answer], device: Device) -> Batch {
    let chunk = CHUNK as usize;
    let longest = answers
        .iter()
        .map(|a| a.tokens.len())
        .max()
        .unwrap_or(chunk);
    let length = longest.div_ceil(chunk) * chunk;
    let mut tokens = vec![0i64; answers.len() * length];
    for (row, answer) in tokens.chunks_exact_mut(length).zip(answers) {
        for (to, &from) in row.iter_mut().zip(&answer.tokens) {
            *to = i64::from(from);
        }
    }
    let list = |f: fn(&Answer) -> usize| {
        let values: Vec<i64> = answers.iter().map(|a| f(a) as i64).collect();
        Tensor::from_slice(&values).to_device(device)
    };
    Batch {
        tokens: Tensor::from_slice(&tokens)
            .reshape([answers.len() as i64, length as i64])
            .to_device(device),
        prompt: list(|a| a.prompt),
        end: list(|a| a.tokens.len()),
    }
}

/// A permutation of 0..count by seed: the place of `index` in it.
fn permute(index: u64, count: u64, seed: u64) -> u64 {
    // A Feistel walk over the next power of four, repeated until it falls inside.
    let bits = (64 - (count.max(2) - 1).leading_zeros()).div_ceil(2);
    let half = (1u64 << bits) - 1;
    let mut x = index;
    loop {
        let (mut left, mut right) = (x >> bits, x & half);
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(seed ^ round ^ (right << 8)) & half));
        }
        x = left << bits | right;
        if x < count {
            return x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permute_visits_everything_once() {
        for count in [1, 2, 7, 100] {
            let mut seen: Vec<u64> = (0..count).map(|i| permute(i, count, 9)).collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..count));
        }
    }
}
