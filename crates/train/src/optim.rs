//! AdamW and Muon over groups, gradient clipping, and the learning-rate schedule.
//!
//! Muon: momentum, then five Newton-Schulz steps in BF16 (f32 on a CPU), all matrices of a group at
//! once, scaled by 0.2 sqrt(max(rows, columns)) so that one learning rate serves both rules.
//! Everything stays on the device; the caller reads one number a step.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use crate::net::compute_kind;
use crate::params::{Group, Params, Rule};

/// Settings of the optimizer.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Highest learning rate.
    pub rate: f64,
    /// Learning rate at the end, as a part of the highest.
    #[serde(default = "default_floor")]
    pub floor: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Decay of the first moment.
    #[serde(default = "default_beta1")]
    pub beta1: f64,
    /// Decay of the second moment.
    #[serde(default = "default_beta2")]
    pub beta2: f64,
    /// Momentum of Muon.
    #[serde(default = "default_momentum")]
    pub momentum: f64,
    /// Weight decay of matrices.
    #[serde(default)]
    pub decay: f64,
    /// Highest norm of the whole gradient.
    #[serde(default = "default_clip")]
    pub clip: f64,
}

fn default_floor() -> f64 {
    0.05
}
fn default_beta1() -> f64 {
    0.9
}
fn default_beta2() -> f64 {
    0.95
}
fn default_momentum() -> f64 {
    0.95
}
fn default_clip() -> f64 {
    1.0
}

impl Settings {
    /// Learning rate of step `step` (from 0) of `steps`: warm-up, then a cosine to the floor.
    #[must_use]
    pub fn rate_at(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return self.rate * (step + 1) as f64 / self.warmup as f64;
        }
        let past = (step - self.warmup) as f64 / steps.saturating_sub(self.warmup).max(1) as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * past.min(1.0)).cos());
        self.rate * (self.floor + (1.0 - self.floor) * cosine)
    }
}

/// One step over all groups; returns the norm of the gradient before clipping (a device scalar).
pub fn step(params: &mut Params, settings: &Settings, rate: f64, step: u64) -> Tensor {
    no_grad(|| {
        let grads: Vec<Option<Tensor>> = params.groups.iter().map(Group::grad).collect();
        let mut sum = Tensor::zeros([], (Kind::Float, params.device()));
        for grad in grads.iter().flatten() {
            let _ = sum.g_add_(&grad.square().sum(Kind::Float));
        }
        let norm = sum.sqrt();
        let factor = (settings.clip / (&norm + 1e-6)).clamp_max(1.0);
        for (group, grad) in params.groups.iter_mut().zip(grads) {
            let Some(mut grad) = grad else { continue };
            let _ = grad.g_mul_(&factor);
            if settings.decay > 0.0 && group.decay {
                let _ = group.master.g_mul_scalar_(1.0 - rate * settings.decay);
            }
            let rate = rate * group.rate_scale;
            match group.rule {
                Rule::AdamW => adam(group, &grad, settings, rate, step),
                Rule::Muon(matrices) => muon(group, &grad, settings, rate, matrices),
                Rule::Frozen => {}
            }
            group.refresh();
            group.zero_grad();
        }
        norm
    })
}

fn adam(group: &mut Group, grad: &Tensor, settings: &Settings, rate: f64, step: u64) {
    let (b1, b2) = (settings.beta1, settings.beta2);
    let t = (step + 1) as f64;
    let _ = group.first.g_mul_scalar_(b1).g_add_(&(grad * (1.0 - b1)));
    let _ = group
        .second
        .g_mul_scalar_(b2)
        .g_add_(&(grad.square() * (1.0 - b2)));
    let mean = &group.first * (rate / (1.0 - b1.powf(t)));
    let scale = (&group.second / (1.0 - b2.powf(t))).sqrt() + 1e-8;
    let _ = group.master.g_sub_(&(mean / scale));
}

fn muon(group: &mut Group, grad: &Tensor, settings: &Settings, rate: f64, matrices: i64) {
    let _ = group.first.g_mul_scalar_(settings.momentum).g_add_(grad);
    let nesterov = grad + &group.first * settings.momentum;
    let (n, rows, columns) = nesterov.size3().expect("Muon takes [n, rows, columns]");
    let rows = rows / matrices;
    let kind = compute_kind(grad.device());
    let direction = newton_schulz(
        &nesterov
            .reshape([n * matrices, rows, columns])
            .to_kind(kind),
    );
    let scale = 0.2 * (rows.max(columns) as f64).sqrt() * rate;
    let update = direction.to_kind(Kind::Float).reshape_as(&group.master) * scale;
    let _ = group.master.g_sub_(&update);
}

/// Five quintic Newton-Schulz steps towards the orthogonal factor of `[n, rows, columns]`.
pub fn newton_schulz(x: &Tensor) -> Tensor {
    let (_, rows, columns) = x.size3().expect("Newton-Schulz takes [n, rows, columns]");
    let tall = rows > columns;
    let x = if tall {
        x.transpose(-2, -1)
    } else {
        x.shallow_clone()
    };
    let norm = x
        .square()
        .sum_dim_intlist(
            [-2i64, -1].as_slice(),
            true,
            if x.kind() == Kind::Double {
                Kind::Double
            } else {
                Kind::Float
            },
        )
        .sqrt()
        + 1e-7;
    let mut x = (&x / norm).to_kind(x.kind());
    for _ in 0..5 {
        let a = x.matmul(&x.transpose(-2, -1));
        let b = &a * -4.775 + a.matmul(&a) * 2.0315;
        x = &x * 3.4445 + b.matmul(&x);
    }
    if tall { x.transpose(-2, -1) } else { x }
}
