//! Trains the sparse student on its dense teacher and the text: phases `sparsify` and `qat`.
//!
//! Invariants: a step's batch depends on the seed and the step alone; a checkpoint is complete or
//! absent; a loss that is not a number stops the run and leaves the last checkpoint.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, no_grad};

use crate::data::{self, Corpus, Domain};
use crate::error::{Error, Result};
use crate::loss::{self, Teacher};
use crate::net::Net;
use crate::optim;
use crate::report::Report;
use crate::state;

/// Settings of a distillation phase.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences a step.
    pub rows: usize,
    /// Tokens a sequence.
    pub length: usize,
    /// Seed of the batches.
    pub seed: u64,
    /// Movement of a correction bias a step.
    pub balance: f64,
    /// Experts in MXFP4 from the first step.
    pub mxfp4: bool,
    /// Attention and embedding in FP8 from the first step.
    pub fp8: bool,
    /// Steps between evaluations.
    pub eval_every: u64,
    /// Held-out sequences a domain.
    pub eval_rows: usize,
    /// Steps between checkpoints.
    pub save_every: u64,
    /// The optimizer.
    pub optimizer: optim::Settings,
    /// The text.
    pub domains: Vec<Domain>,
}

/// A running phase.
#[derive(Debug)]
pub struct Distillation<'a> {
    /// What is trained.
    pub student: Net,
    /// What it is taught by.
    pub teacher: &'a Net,
    /// How.
    pub settings: &'a Settings,
    /// On what.
    pub corpus: Corpus,
    /// Steps done.
    pub step: u64,
}

/// Numbers of one step.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// The weighted loss.
    pub loss: f64,
    /// Mean cross-entropy on the text.
    pub cross_entropy: f64,
    /// Mean divergence from the teacher.
    pub divergence: f64,
    /// Norm of the gradient.
    pub norm: f64,
    /// Largest load of an expert over the mean, mean over layers.
    pub imbalance: f64,
}

impl<'a> Distillation<'a> {
    /// Starts a phase from a student's weights.
    pub fn new(
        mut student: Net,
        teacher: &'a Net,
        settings: &'a Settings,
        corpus: &Path,
    ) -> Result<Self> {
        student.quantize(settings.mxfp4, settings.fp8);
        let corpus = Corpus::open(corpus, &settings.domains, settings.length, settings.seed)?;
        Ok(Self {
            student,
            teacher,
            settings,
            corpus,
            step: 0,
        })
    }

    /// One optimizer step.
    #[must_use]
    pub fn advance(&mut self) -> StepReport {
        let settings = self.settings;
        let device = self.student.params.device();
        let batch = self.corpus.batch(self.step, settings.rows, device);
        let length = settings.length as i64;
        let input = batch.tokens.narrow(1, 0, length);
        let next = batch.tokens.narrow(1, 1, length).reshape([-1]);
        let taught = no_grad(|| self.teacher.forward(&input, &[]).hidden);
        let output = self.student.forward(&input, &[]);
        let rows = settings.rows as i64 * length;
        let each = |t: &Tensor| {
            (t / rows as f64)
                .unsqueeze(1)
                .expand([settings.rows as i64, length], false)
                .reshape([rows, 1])
        };
        let hidden = self.student.shape.hidden;
        let flat = output.hidden.detach().reshape([rows, hidden]);
        let taught = taught.reshape([rows, hidden]);
        let teacher = Teacher {
            rows: &taught,
            head: self.teacher.embedding(),
        };
        let sums = loss::head_loss(
            &flat,
            self.student.embedding(),
            Some(teacher),
            &next,
            &each(&batch.distill),
            &each(&batch.copy),
        );
        loss::backward(&output.hidden, &sums.grad);
        let rate = settings.optimizer.rate_at(self.step, settings.steps);
        let norm = optim::step(
            &mut self.student.params,
            &settings.optimizer,
            rate,
            self.step,
        );
        let imbalance = self.balance(&output.loads, rate / settings.optimizer.rate);
        self.step += 1;
        let numbers = Tensor::stack(
            &[
                sums.loss,
                sums.cross_entropy.mean(Kind::Float),
                sums.divergence.mean(Kind::Float),
                norm,
                imbalance,
            ],
            0,
        );
        let n: Vec<f32> = crate::files::tensor_values(&numbers);
        StepReport {
            loss: f64::from(n[0]),
            cross_entropy: f64::from(n[1]),
            divergence: f64::from(n[2]),
            norm: f64::from(n[3]),
            imbalance: f64::from(n[4]),
        }
    }

    fn balance(&mut self, loads: &Tensor, part: f64) -> Tensor {
        if self.student.shape.experts == 0 {
            return Tensor::from(1.0f32).to_device(loads.device());
        }
        self.student.balance(loads, self.settings.balance * part);
        let largest = loads.amax([-1i64].as_slice(), false);
        (largest / loads.mean_dim([-1i64].as_slice(), false, Kind::Float)).mean(Kind::Float)
    }

    /// Trains to the end; checkpoints and metrics go to `out`; `resume` continues the last checkpoint.
    pub fn run(&mut self, out: &Path, eval: &Path, resume: bool) -> Result<()> {
        let saved = out.join("state.safetensors");
        if resume && saved.exists() {
            let (params, bias) = (&mut self.student.params, &mut self.student.bias);
            self.step = state::load(&saved, params, Some(bias))?;
        }
        let mut report = Report::open(&out.join("metrics.jsonl"), self.settings.steps, self.step)?;
        report.line(json!({"settings": self.settings, "corpus_tokens": self.corpus.count()}))?;
        while self.step < self.settings.steps {
            let n = self.advance();
            self.check(&n, &saved)?;
            let tokens = (self.settings.rows * self.settings.length) as u64;
            report.step(tokens, n.loss);
            if self.step.is_multiple_of(10) || self.step == 1 {
                report.line(json!({"step": self.step, "loss": round(n.loss), "ce": round(n.cross_entropy),
                    "kl": round(n.divergence), "norm": round(n.norm), "imbalance": round(n.imbalance)}))?;
            }
            if self.step.is_multiple_of(self.settings.eval_every)
                || self.step == self.settings.steps
            {
                let perplexity = self.evaluate(eval)?;
                report.line(json!({"step": self.step, "perplexity": perplexity}))?;
            }
            if self.step.is_multiple_of(self.settings.save_every)
                || self.step == self.settings.steps
            {
                state::save(
                    &saved,
                    &self.student.params,
                    Some(&self.student.bias),
                    self.step,
                )?;
            }
        }
        report.finish()
    }

    fn check(&self, n: &StepReport, saved: &Path) -> Result<()> {
        for (what, value) in [("the loss", n.loss), ("the gradient", n.norm)] {
            if !value.is_finite() {
                return Err(Error::NotFinite {
                    step: self.step,
                    what: what.into(),
                    checkpoint: PathBuf::from(saved),
                });
            }
        }
        Ok(())
    }

    /// Perplexity of the student by domain.
    pub fn evaluate(&self, eval: &Path) -> Result<Value> {
        let names: Vec<&str> = self
            .settings
            .domains
            .iter()
            .map(|d| d.name.as_str())
            .collect();
        perplexity(
            &self.student,
            eval,
            &names,
            self.settings.length,
            self.settings.eval_rows,
        )
    }
}

fn round(x: f64) -> f64 {
    (x * 1e5).round() / 1e5
}

/// Perplexity of `net` on held-out sequences of each domain that has them.
pub fn perplexity(
    net: &Net,
    eval: &Path,
    names: &[&str],
    length: usize,
    rows: usize,
) -> Result<Value> {
    let mut out = json!({});
    for name in names {
        if !eval.join(format!("{name}.eval.u16")).exists() {
            continue;
        }
        let tokens = data::held_out(eval, name, length, rows)?.to_device(net.params.device());
        out[*name] = round(mean_loss(net, &tokens, length as i64).exp()).into();
    }
    Ok(out)
}

/// Mean cross-entropy on `tokens`, `[rows, length + 1]`.
fn mean_loss(net: &Net, tokens: &Tensor, length: i64) -> f64 {
    no_grad(|| {
        let rows = tokens.size()[0];
        let (mut sum, mut start) = (0.0, 0);
        while start < rows {
            let n = 8.min(rows - start);
            let part = tokens.narrow(0, start, n);
            let hidden = net.forward(&part.narrow(1, 0, length), &[]).hidden;
            let flat = hidden.reshape([n * length, net.shape.hidden]);
            let next = part.narrow(1, 1, length).reshape([-1]);
            let mut at = 0;
            while at < n * length {
                let m = 4096.min(n * length - at);
                let logits = flat.narrow(0, at, m).matmul(&net.embedding().tr());
                let log_q = logits.log_softmax(-1, Kind::Float);
                let picked = log_q.gather(-1, &next.narrow(0, at, m).unsqueeze(-1), false);
                sum -= picked.sum(Kind::Double).double_value(&[]);
                at += m;
            }
            start += n;
        }
        sum / (rows * length) as f64
    })
}

/// The device of a name: `cpu` or `cuda`.
pub fn device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "cuda" if tch::Cuda::is_available() => Ok(Device::Cuda(0)),
        "cuda" => Err(Error::Invalid(
            "device `cuda`: libtorch sees no GPU (is libtorch_cuda.so preloaded?)".into(),
        )),
        other => Err(Error::Invalid(format!(
            "device: expected `cpu` or `cuda`, found `{other}`"
        ))),
    }
}
