//! Dense to sparse: which neurons form an expert, which experts a token needs, which layers keep full attention.
//!
//! Neurons that fire together go together: balanced k-means on their activations over calibration
//! text. The router starts as the ridge regression of each expert's output size on the FFN's input.
//! The layers that keep full attention are those whose window, taken alone, changes the output most.

use tch::{Device, Kind, Tensor, no_grad};

use crate::loss;
use crate::net::{Inside, Masters, Net, group};
use crate::shape::Shape;

/// How neurons are dealt to experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Slicing {
    /// Balanced clusters of activations.
    Clustered,
    /// Neurons 0..95, 96..191, ...
    Contiguous,
}

/// Sizes of the sparse model.
#[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Experts a layer.
    pub experts: i64,
    /// Experts a token uses.
    pub active: i64,
    /// How neurons are dealt.
    pub slicing: Slicing,
    /// Layers that keep full attention.
    pub full: usize,
    /// Window of the others.
    pub window: i64,
    /// Sink logits in the others.
    pub sinks: bool,
}

/// What every layer did on `tokens`.
fn observe(dense: &Net, tokens: &Tensor) -> Vec<Inside> {
    let (batch, length) = tokens.size2().expect("tokens are [batch, length]");
    let context =
        crate::attention::Context::new(&dense.shape, batch, length, tokens.device(), dense.kind);
    let mut x = Tensor::embedding(dense.embedding(), tokens, -1, false, false);
    let mut seen = Vec::new();
    for layer in 0..dense.shape.layers as usize {
        let (after, inside) = dense.layer_inside(&x, layer, &context);
        seen.push(inside);
        x = after;
    }
    seen
}

/// Makes the sparse model; `tokens`, `[batch, length]`, are calibration text.
#[must_use]
pub fn sparsify(dense: &Net, plan: &Plan, tokens: &Tensor) -> Net {
    no_grad(|| {
        let seen = observe(dense, tokens);
        let groups = &dense.params.groups;
        let mut masters: Vec<Tensor> = groups.iter().map(|g| g.master.copy()).collect();
        let ffn = dense.shape.ffn;
        let mut routers = Vec::new();
        for (layer, Inside { input, inner, .. }) in seen.iter().enumerate() {
            let down = groups[group::DOWN].master.get(layer as i64);
            let size = down
                .square()
                .sum_dim_intlist([0i64].as_slice(), false, Kind::Float)
                .sqrt();
            let effect = inner.to_kind(Kind::Float) * size;
            let order = match plan.slicing {
                Slicing::Contiguous => (0..ffn).collect(),
                Slicing::Clustered => cluster(&effect, plan.experts as usize),
            };
            let order = Tensor::from_slice(&order).to_device(input.device());
            reorder(&mut masters, layer as i64, &order, ffn);
            let experts = effect
                .index_select(1, &order)
                .reshape([-1, plan.experts, ffn / plan.experts])
                .square()
                .sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)
                .sqrt();
            routers.push(regress(&input.to_kind(Kind::Float), &experts));
        }
        masters[group::ROUTER] = Tensor::stack(&routers, 0);
        let shape = Shape {
            experts: plan.experts,
            active: plan.active,
            sliding: sliding_layers(dense, plan, tokens),
            window: plan.window,
            sinks: plan.sinks,
            ..dense.shape.clone()
        };
        if plan.sinks {
            // A window loses the first position, where the dense model puts unwanted attention.
            let logits: Vec<Tensor> = seen.iter().map(|s| s.first_key.shallow_clone()).collect();
            masters[group::SINK] = Tensor::stack(&logits, 0);
        }
        let bias = Tensor::zeros([shape.layers, plan.experts], (Kind::Float, Device::Cpu));
        Net::new(shape, Masters(masters), bias, true)
    })
}

/// Puts the neurons of one layer in `order`.
fn reorder(masters: &mut [Tensor], layer: i64, order: &Tensor, ffn: i64) {
    let gate_up = masters[group::GATE_UP].get(layer);
    let both = Tensor::cat(&[order, &(order + ffn)], 0);
    let sorted = gate_up.index_select(0, &both);
    masters[group::GATE_UP].get(layer).copy_(&sorted);
    let sorted = masters[group::DOWN].get(layer).index_select(1, order);
    masters[group::DOWN].get(layer).copy_(&sorted);
}

/// Balanced k-means of the columns of `effect`, `[rows, neurons]`: neurons in expert order.
fn cluster(effect: &Tensor, experts: usize) -> Vec<i64> {
    const ROWS: i64 = 2048;
    const ROUNDS: usize = 12;
    let rows = effect.size()[0].min(ROWS);
    let columns = effect.narrow(0, 0, rows).abs().tr();
    let norm = columns
        .square()
        .sum_dim_intlist([1i64].as_slice(), true, Kind::Float)
        .sqrt()
        + 1e-9;
    let points = columns / norm;
    let neurons = points.size()[0] as usize;
    let mut assigned: Vec<usize> = (0..neurons).map(|i| i * experts / neurons).collect();
    for _ in 0..ROUNDS {
        let index: Vec<i64> = assigned.iter().map(|&e| e as i64).collect();
        let index = Tensor::from_slice(&index).to_device(points.device());
        let mut centres = Tensor::zeros([experts as i64, rows], (Kind::Float, points.device()));
        let _ = centres.index_add_(0, &index, &points);
        let norm = centres
            .square()
            .sum_dim_intlist([1i64].as_slice(), true, Kind::Float)
            .sqrt()
            + 1e-9;
        let similarity = crate::files::tensor_values(&points.matmul(&(centres / norm).tr()));
        assigned = deal(&similarity, neurons, experts);
    }
    let mut order: Vec<i64> = (0..neurons as i64).collect();
    order.sort_by_key(|&i| (assigned[i as usize], i));
    order
}

/// Deals neurons to experts of equal size, best similarity first.
fn deal(similarity: &[f32], neurons: usize, experts: usize) -> Vec<usize> {
    let mut pairs: Vec<u32> = (0..(neurons * experts) as u32).collect();
    pairs.sort_by(|&a, &b| {
        similarity[b as usize]
            .total_cmp(&similarity[a as usize])
            .then(a.cmp(&b))
    });
    let mut room = vec![neurons / experts; experts];
    let mut assigned = vec![usize::MAX; neurons];
    for pair in pairs {
        let (neuron, expert) = (pair as usize / experts, pair as usize % experts);
        if assigned[neuron] == usize::MAX && room[expert] > 0 {
            assigned[neuron] = expert;
            room[expert] -= 1;
        }
    }
    assigned
}

/// Router rows `[experts, hidden]`: ridge regression of the standardised expert sizes on the input.
fn regress(input: &Tensor, sizes: &Tensor) -> Tensor {
    let mean = sizes.mean_dim([0i64].as_slice(), true, Kind::Float);
    let overall = (sizes - &mean).square().mean(Kind::Float).sqrt() + 1e-9;
    // Relative to the mean over experts: what matters is which expert is larger for this token.
    let wanted = (sizes - sizes.mean_dim([1i64].as_slice(), true, Kind::Float)) / overall;
    let gram = input.tr().matmul(input);
    let ridge = gram.trace() / gram.size()[0] as f64 * 1e-2;
    let eye = Tensor::eye(gram.size()[0], (Kind::Float, input.device()));
    let solution = Tensor::linalg_solve(&(gram + eye * ridge), &input.tr().matmul(&wanted), true);
    solution.tr() * 0.5
}

/// Keeps full attention where a window alone changes the output distribution most.
fn sliding_layers(dense: &Net, plan: &Plan, tokens: &Tensor) -> Vec<bool> {
    let layers = dense.shape.layers as usize;
    if plan.full >= layers {
        return vec![false; layers];
    }
    let few = tokens.narrow(0, 0, tokens.size()[0].min(8));
    let flat = |hidden: Tensor| hidden.reshape([-1, dense.shape.hidden]);
    let whole = flat(dense.forward(&few, &[]).hidden);
    let damage: Vec<f64> = (0..layers)
        .map(|layer| {
            let mut sliding = vec![false; layers];
            sliding[layer] = true;
            let hidden = flat(dense.with_sliding(&few, sliding, plan.window));
            divergence(&hidden, &whole, dense.embedding())
        })
        .collect();
    let mut order: Vec<usize> = (0..layers).collect();
    order.sort_by(|&a, &b| damage[b].total_cmp(&damage[a]));
    eprintln!("divergence with only this layer in a window: {damage:.4?}");
    let mut sliding = vec![true; layers];
    for &layer in &order[..plan.full] {
        sliding[layer] = false;
    }
    sliding
}

fn divergence(rows: &Tensor, whole: &Tensor, head: &Tensor) -> f64 {
    let n = rows.size()[0];
    let ones = Tensor::ones([n, 1], (Kind::Float, rows.device()));
    let next = Tensor::zeros([n], (Kind::Int64, rows.device()));
    let teacher = loss::Teacher { rows: whole, head };
    let sums = loss::head_loss(rows, head, Some(teacher), &next, &ones, &(&ones * 0.0));
    sums.divergence.mean(Kind::Float).double_value(&[])
}
