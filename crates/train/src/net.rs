//! The model on tensors: MiMo-V2's forward pass, dense or sparse, for whole sequences.
//!
//! Experts are column slices of one wide FFN: a token's gate weights scale its 16 slices, and slices
//! of weight zero add nothing. That costs the dense FFN's arithmetic and needs no gathering.
//! Weights of the chosen experts sum to `active`, not 1: the exporter multiplies `down` by `active`
//! (a power of two), which is the family's convention.
//! Rows are `[batch, length, hidden]`; lengths are multiples of the window.

use tch::{Device, Kind, Tensor, no_grad};

use crate::attention;
use crate::params::{Group, Params, Quant, Rule};
use crate::shape::Shape;

/// Index of each group in [`Params::groups`].
pub mod group {
    #![allow(missing_docs)]
    pub const EMBED: usize = 0;
    pub const NORM_IN: usize = 1;
    pub const QKV: usize = 2;
    pub const OUT: usize = 3;
    pub const SINK: usize = 4;
    pub const NORM_POST: usize = 5;
    pub const ROUTER: usize = 6;
    pub const GATE_UP: usize = 7;
    pub const DOWN: usize = 8;
    pub const NORM: usize = 9;
}
use group::{DOWN, EMBED, GATE_UP, NORM, NORM_IN, NORM_POST, OUT, QKV, ROUTER, SINK};

/// A model on a device.
#[derive(Debug)]
pub struct Net {
    /// Its sizes.
    pub shape: Shape,
    /// Its tensors.
    pub params: Params,
    /// Correction bias of the router, `[layers, experts]` f32; chooses, never weighs.
    pub bias: Tensor,
    /// The type that the forward pass computes in.
    pub kind: Kind,
}

/// What a forward pass leaves.
#[derive(Debug)]
pub struct Output {
    /// After the last norm, `[batch, length, hidden]`.
    pub hidden: Tensor,
    /// Residual stream after each layer asked for, before any norm.
    pub taps: Vec<Tensor>,
    /// Tokens that chose each expert, `[layers, experts]` f32; empty for a dense model.
    pub loads: Tensor,
}

/// What one layer of a dense model did on calibration text.
#[derive(Debug)]
pub struct Inside {
    /// Rows into the FFN, `[rows, hidden]`.
    pub input: Tensor,
    /// Activations of its neurons, `[rows, ffn]`.
    pub inner: Tensor,
    /// Mean logit on the first position, `[heads]`.
    pub first_key: Tensor,
}

/// The compute type of a device: BF16 on a GPU, f32 on a CPU.
#[must_use]
pub fn compute_kind(device: Device) -> Kind {
    if device == Device::Cpu {
        Kind::Float
    } else {
        Kind::BFloat16
    }
}

/// Masters of all groups, f32, stacked, in the order of [`group`].
#[derive(Debug)]
pub struct Masters(pub Vec<Tensor>);

impl Net {
    /// A model from masters; `train` gives every group but the embedding an optimizer state.
    #[must_use]
    pub fn new(shape: Shape, masters: Masters, bias: Tensor, train: bool) -> Self {
        const NAMES: [&str; 10] = [
            "embed",
            "norm_in",
            "qkv",
            "out",
            "sink",
            "norm_post",
            "router",
            "gate_up",
            "down",
            "norm",
        ];
        let device = masters.0[0].device();
        let kind = compute_kind(device);
        let groups = masters.0.into_iter().enumerate().map(|(i, master)| {
            let rule = if train && i != EMBED {
                Rule::AdamW
            } else {
                Rule::Frozen
            };
            let quant = if i == ROUTER {
                Quant::Bf16
            } else {
                Quant::None
            };
            let mut group = Group::new(NAMES[i], master, kind, rule, quant);
            if i == SINK {
                // A logit of 5 is 5,000 Adam steps of 1e-3 away.
                group.rate_scale = 10.0;
            }
            group
        });
        Self {
            shape,
            params: Params {
                groups: groups.collect(),
            },
            bias: bias.to_device(device),
            kind,
        }
    }

    /// Rounds experts to MXFP4, attention and the embedding to FP8, as the exporter will.
    pub fn quantize(&mut self, experts: bool, rest: bool) {
        let rows = self.shape.qkv_rows().to_vec();
        let (hidden, vocab) = (self.shape.hidden, self.shape.vocab);
        let mut set = |group: usize, quant: Quant| self.params.groups[group].set_quant(quant);
        let choose = |on: bool, quant: Quant| if on { quant } else { Quant::None };
        set(GATE_UP, choose(experts, Quant::Mxfp4));
        set(DOWN, choose(experts, Quant::Mxfp4));
        set(QKV, choose(rest, Quant::Fp8(rows)));
        set(OUT, choose(rest, Quant::Fp8(vec![hidden])));
        set(EMBED, choose(rest, Quant::Fp8(vec![vocab])));
    }

    /// The embedding and output matrix, `[vocab, hidden]`.
    pub fn embedding(&self) -> &Tensor {
        self.params.at(EMBED, 0)
    }

    /// RMS norm of rows with the weight of group `group`, layer `layer`.
    pub(crate) fn norm(&self, x: &Tensor, group: usize, layer: usize) -> Tensor {
        rms_norm(x, self.params.at(group, layer), self.shape.eps)
    }

    /// Runs `tokens`, `[batch, length]` int64; `taps` are layer indices.
    #[must_use]
    pub fn forward(&self, tokens: &Tensor, taps: &[usize]) -> Output {
        let (batch, length) = tokens.size2().expect("tokens are [batch, length]");
        let context =
            attention::Context::new(&self.shape, batch, length, tokens.device(), self.kind);
        let mut x = Tensor::embedding(self.embedding(), tokens, -1, false, false);
        let (mut kept, mut loads) = (Vec::new(), Vec::new());
        for layer in 0..self.shape.layers as usize {
            let h = self.norm(&x, NORM_IN, layer);
            x = x + self.attend(&h, layer, &context);
            let h = self.norm(&x, NORM_POST, layer);
            let (y, load) = self.feed_forward(&h, layer);
            x = x + y;
            loads.extend(load);
            if taps.contains(&layer) {
                kept.push(x.shallow_clone());
            }
        }
        let empty = || Tensor::zeros([0], (Kind::Float, tokens.device()));
        Output {
            hidden: self.norm(&x, NORM, 0),
            taps: kept,
            loads: if loads.is_empty() {
                empty()
            } else {
                Tensor::stack(&loads, 0)
            },
        }
    }

    /// One layer of a dense model: the rows after it, and what went on inside.
    pub fn layer_inside(
        &self,
        x: &Tensor,
        layer: usize,
        context: &attention::Context,
    ) -> (Tensor, Inside) {
        let ffn = self.shape.ffn;
        let h = self.norm(x, NORM_IN, layer);
        let first_key = context.first_key(&h.linear(self.params.at(QKV, layer), None::<&Tensor>));
        let x = x + self.attend(&h, layer, context);
        let h = self.norm(&x, NORM_POST, layer);
        let gate_up = h.linear(self.params.at(GATE_UP, layer), None::<&Tensor>);
        let inner = gate_up.narrow(-1, 0, ffn).silu() * gate_up.narrow(-1, ffn, ffn);
        let after = x + inner.linear(self.params.at(DOWN, layer), None::<&Tensor>);
        let rows = |t: &Tensor, width: i64| t.reshape([-1, width]);
        let inside = Inside {
            input: rows(&h, self.shape.hidden),
            inner: rows(&inner, ffn),
            first_key,
        };
        (after, inside)
    }

    /// The last hidden rows of this model with other layers in a window, without sinks.
    pub fn with_sliding(&self, tokens: &Tensor, sliding: Vec<bool>, window: i64) -> Tensor {
        let (batch, length) = tokens.size2().expect("tokens are [batch, length]");
        let shape = Shape {
            sliding: sliding.clone(),
            window,
            sinks: false,
            ..self.shape.clone()
        };
        let context = attention::Context::new(&shape, batch, length, tokens.device(), self.kind);
        let mut x = Tensor::embedding(self.embedding(), tokens, -1, false, false);
        for (layer, &slides) in sliding.iter().enumerate() {
            let h = self.norm(&x, NORM_IN, layer);
            let qkv = h.linear(self.params.at(QKV, layer), None::<&Tensor>);
            let rows = if slides {
                context.sliding(&qkv, None)
            } else {
                context.full(&qkv)
            };
            x = x + rows.linear(self.params.at(OUT, layer), None::<&Tensor>);
            let h = self.norm(&x, NORM_POST, layer);
            x = x + self.feed_forward(&h, layer).0;
        }
        self.norm(&x, NORM, 0)
    }

    fn attend(&self, h: &Tensor, layer: usize, context: &attention::Context) -> Tensor {
        let qkv = h.linear(self.params.at(QKV, layer), None::<&Tensor>);
        let rows = if self.shape.sliding[layer] {
            let sink = self.shape.sinks.then(|| self.params.at(SINK, layer));
            context.sliding(&qkv, sink)
        } else {
            context.full(&qkv)
        };
        rows.linear(self.params.at(OUT, layer), None::<&Tensor>)
    }

    pub(crate) fn feed_forward(&self, h: &Tensor, layer: usize) -> (Tensor, Option<Tensor>) {
        let ffn = self.shape.ffn;
        let gate_up = h.linear(self.params.at(GATE_UP, layer), None::<&Tensor>);
        let inner = gate_up.narrow(-1, 0, ffn).silu() * gate_up.narrow(-1, ffn, ffn);
        if self.shape.experts == 0 {
            return (
                inner.linear(self.params.at(DOWN, layer), None::<&Tensor>),
                None,
            );
        }
        let (weights, load) = self.route(h, layer);
        let mut sizes = h.size();
        *sizes.last_mut().expect("rows have a width") = ffn;
        let slices = inner.reshape([-1, self.shape.experts, ffn / self.shape.experts]);
        let gated = (slices * weights.unsqueeze(-1)).reshape(&sizes);
        (
            gated.linear(self.params.at(DOWN, layer), None::<&Tensor>),
            Some(load),
        )
    }

    /// Weights of every expert for every row, `[rows, experts]`, zero where not chosen, summing to
    /// `active`; and how many rows chose each expert.
    pub fn route(&self, h: &Tensor, layer: usize) -> (Tensor, Tensor) {
        let rows = h.reshape([-1, self.shape.hidden]).to_kind(Kind::Float);
        let scores = rows
            .linear(self.params.at(ROUTER, layer), None::<&Tensor>)
            .sigmoid();
        let chosen = no_grad(|| {
            let (_, index) =
                (&scores + self.bias.get(layer as i64)).topk(self.shape.active, -1, true, false);
            scores.zeros_like().scatter_value(-1, &index, 1.0)
        });
        let kept = scores * &chosen;
        let sum = kept.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float) + 1e-20;
        let weights = kept / sum * self.shape.active as f64;
        let load = chosen.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        (weights.to_kind(self.kind), load)
    }

    /// Moves each correction bias one `rate` towards balance, given the loads of a step.
    pub fn balance(&mut self, loads: &Tensor, rate: f64) {
        no_grad(|| {
            let mean = loads.mean_dim([-1i64].as_slice(), true, Kind::Float);
            let mut bias = self.bias.shallow_clone();
            let _ = bias.g_add_(&((mean - loads).sign() * rate));
        });
    }
}

/// x / rms(x) * weight over the last axis.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    x.rms_norm([weight.size()[0]], Some(weight), eps)
}
