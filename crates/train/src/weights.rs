//! Masters from a checkpoint of the engine's form, in any number format it knows.
//!
//! Fuses query, key, value and gate, up; puts experts side by side; divides `down` by the number of
//! active experts (see `net`). Invariant: exporting what was loaded gives the same model.

use std::path::Path;

use model::checkpoint::Checkpoint;
use model::config::Config;
use model::weights::{FfnWeights, LayerWeights, Matrix, SwigluWeights, Weights};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::net::{Masters, Net};
use crate::shape::Shape;

/// Loads the checkpoint in `directory` as a model that trains or stands still.
pub fn load(directory: &Path, device: Device, train: bool) -> Result<Net> {
    let shape = Shape::read(directory)?;
    let wrong = |e: model::error::ModelError| Error::Invalid(e.to_string());
    let config = Config::load(directory).map_err(wrong)?;
    let checkpoint = Checkpoint::open(directory).map_err(wrong)?;
    let weights = Weights::new(&config, &checkpoint).map_err(wrong)?;
    let mut stacks: [Vec<Tensor>; 8] = Default::default();
    let mut bias = Vec::new();
    for layer in &weights.layers {
        for (stack, tensor) in stacks.iter_mut().zip(layer_tensors(layer, &shape)) {
            stack.push(tensor);
        }
        bias.extend(layer_bias(layer));
    }
    let mut masters = vec![tensor(&weights.embed).unsqueeze(0)];
    masters.extend(stacks.iter().map(|stack| Tensor::stack(stack, 0)));
    masters.push(Tensor::from_slice(&weights.norm).unsqueeze(0));
    let masters = masters.into_iter().map(|t| t.to_device(device)).collect();
    let bias = Tensor::from_slice(&bias).reshape([shape.layers, -1]);
    Ok(Net::new(shape, Masters(masters), bias, train))
}

/// The eight per-layer tensors, in the order of `net::group`.
fn layer_tensors(layer: &LayerWeights<'_>, shape: &Shape) -> [Tensor; 8] {
    let (router, gate_up, down) = match &layer.ffn {
        FfnWeights::Dense(swiglu) => {
            let (gate_up, down) = swiglu_tensors(std::slice::from_ref(swiglu));
            (
                Tensor::zeros([1, shape.hidden], (Kind::Float, Device::Cpu)),
                gate_up,
                down,
            )
        }
        FfnWeights::Moe {
            router, experts, ..
        } => {
            let (gate_up, down) = swiglu_tensors(experts);
            (tensor(router), gate_up, down / shape.active as f64)
        }
    };
    let sinks = layer
        .sinks
        .clone()
        .unwrap_or_else(|| vec![0.0; shape.heads as usize]);
    [
        Tensor::from_slice(&layer.input_norm),
        Tensor::cat(&[tensor(&layer.q), tensor(&layer.k), tensor(&layer.v)], 0),
        tensor(&layer.o),
        Tensor::from_slice(&sinks),
        Tensor::from_slice(&layer.post_norm),
        router,
        gate_up,
        down,
    ]
}

/// `[2 * ffn, hidden]`, all gates above all ups, and `[hidden, ffn]`.
fn swiglu_tensors(experts: &[SwigluWeights<'_>]) -> (Tensor, Tensor) {
    let gates = experts.iter().map(|e| tensor(&e.gate));
    let ups = experts.iter().map(|e| tensor(&e.up));
    let rows: Vec<Tensor> = gates.chain(ups).collect();
    let downs: Vec<Tensor> = experts.iter().map(|e| tensor(&e.down)).collect();
    (Tensor::cat(&rows, 0), Tensor::cat(&downs, 1))
}

fn layer_bias(layer: &LayerWeights<'_>) -> Vec<f32> {
    match &layer.ffn {
        FfnWeights::Dense(_) => vec![0.0],
        FfnWeights::Moe {
            correction_bias, ..
        } => correction_bias.clone(),
    }
}

fn tensor(matrix: &Matrix<'_>) -> Tensor {
    let mut values = vec![0.0f32; matrix.rows * matrix.cols];
    for (row, values) in values.chunks_exact_mut(matrix.cols).enumerate() {
        matrix.row(row).decode(values);
    }
    Tensor::from_slice(&values).reshape([matrix.rows as i64, matrix.cols as i64])
}
