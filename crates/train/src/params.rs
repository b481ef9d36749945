//! Trainable tensors, grouped by shape: f32 masters, the copies that the forward pass sees, optimizer state.
//!
//! A group holds the same tensor of every layer, stacked as `[layers, ...]`, so that the optimizer and
//! the fake quantisation run once a group. The forward pass reads `leaves`: views of `shadow`, which is
//! the master rounded to what inference will see (BF16, MXFP4, FP8). Gradients land on the leaves and
//! are applied to the masters unchanged: the straight-through estimator is this file's layout.
//! Invariant: `shadow` is stale only between an optimizer step and [`Group::refresh`].

use tch::{Device, Kind, Tensor, no_grad};

use crate::quant;

/// What the forward pass sees of a master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quant {
    /// The master in the compute type.
    None,
    /// The nearest BF16, held in f32 (the router computes in f32).
    Bf16,
    /// Blocks of 32 along the last axis.
    Mxfp4,
    /// Blocks of 128 x 128; the grid starts anew at each of these row counts (fused projections).
    Fp8(Vec<i64>),
}

/// How a group is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Never changes, has no gradient.
    Frozen,
    /// Adam with decoupled weight decay.
    AdamW,
    /// Orthogonalised momentum; a leaf is this many matrices one above the other.
    Muon(i64),
}

/// One kind of tensor in every layer.
#[derive(Debug)]
pub struct Group {
    /// Name in checkpoints of the trainer.
    pub name: &'static str,
    /// `[n, ...]` f32.
    pub master: Tensor,
    /// `[n, ...]` in the compute type.
    pub shadow: Tensor,
    /// `n` views of `shadow` that collect gradients.
    pub leaves: Vec<Tensor>,
    /// First moment, `[n, ...]` f32; empty when frozen.
    pub first: Tensor,
    /// Second moment, `[n, ...]` f32; empty unless AdamW.
    pub second: Tensor,
    /// How it is trained.
    pub rule: Rule,
    /// What the forward pass sees.
    pub quant: Quant,
    /// Weight decay applies (matrices, not norms).
    pub decay: bool,
    /// Multiplies the learning rate.
    pub rate_scale: f64,
}

impl Group {
    /// Wraps a stacked master; leaves are ready to use.
    #[must_use]
    pub fn new(name: &'static str, master: Tensor, kind: Kind, rule: Rule, quant: Quant) -> Self {
        let master = no_grad(|| master.to_kind(Kind::Float).contiguous());
        let decay = master.dim() > 2;
        let empty = || Tensor::zeros([0], (Kind::Float, master.device()));
        let first = if rule == Rule::Frozen {
            empty()
        } else {
            master.zeros_like()
        };
        let second = if rule == Rule::AdamW {
            master.zeros_like()
        } else {
            empty()
        };
        let kind = if quant == Quant::Bf16 {
            Kind::Float
        } else {
            kind
        };
        let shadow = no_grad(|| Tensor::zeros(master.size(), (kind, master.device())));
        let mut group = Self {
            name,
            master,
            shadow,
            leaves: Vec::new(),
            first,
            second,
            rule,
            quant,
            decay,
            rate_scale: 1.0,
        };
        group.refresh();
        group.leaves = (0..group.master.size()[0])
            .map(|i| {
                let leaf = group.shadow.get(i).detach();
                leaf.set_requires_grad(rule != Rule::Frozen)
            })
            .collect();
        group
    }

    /// The master as the forward pass would see it under `quant`, f32.
    pub fn seen(&self, quant: &Quant) -> Tensor {
        no_grad(|| match quant {
            Quant::None => self.master.shallow_clone(),
            Quant::Bf16 => self.master.to_kind(Kind::BFloat16).to_kind(Kind::Float),
            Quant::Mxfp4 => quant::mxfp4(&self.master),
            Quant::Fp8(rows) => quant::fp8(&self.master, rows),
        })
    }

    /// Copies the master, rounded, into what the forward pass reads.
    pub fn refresh(&mut self) {
        let seen = self.seen(&self.quant);
        no_grad(|| self.shadow.copy_(&seen));
    }

    /// Changes the rounding and refreshes.
    pub fn set_quant(&mut self, quant: Quant) {
        self.quant = quant;
        self.refresh();
    }

    /// Gradients of all leaves, `[n, ...]` f32; `None` before the first backward pass.
    #[must_use]
    pub fn grad(&self) -> Option<Tensor> {
        if self.rule == Rule::Frozen {
            return None;
        }
        let grads: Vec<Tensor> = self.leaves.iter().map(Tensor::grad).collect();
        if grads.iter().any(|g| !g.defined()) {
            return None;
        }
        Some(no_grad(|| Tensor::stack(&grads, 0).to_kind(Kind::Float)))
    }

    /// Zeroes the gradients of all leaves.
    pub fn zero_grad(&mut self) {
        for leaf in &mut self.leaves {
            leaf.zero_grad();
        }
    }
}

/// All tensors of a model.
#[derive(Debug)]
pub struct Params {
    /// The groups, in the order that the model indexes them by.
    pub groups: Vec<Group>,
}

impl Params {
    /// Leaf `index` of group `group`.
    pub fn at(&self, group: usize, index: usize) -> &Tensor {
        &self.groups[group].leaves[index]
    }

    /// The device that all tensors live on.
    #[must_use]
    pub fn device(&self) -> Device {
        self.groups[0].master.device()
    }

    /// Number of elements.
    #[must_use]
    pub fn count(&self) -> usize {
        self.groups.iter().map(|g| g.master.numel()).sum()
    }
}
