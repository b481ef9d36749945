//! A tiny model and its text, made from a fixed seed: synthetic, never evaluated.

#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};
use train::net::{Masters, Net};
use train::optim;
use train::shape::Shape;

/// libtorch has one random state: tests that draw from it take turns.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sizes with everything that the real model has: experts of one MXFP4 block, sinks, both layer kinds.
pub fn shape() -> Shape {
    Shape {
        vocab: 96,
        hidden: 32,
        layers: 3,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        ffn: 128,
        experts: 4,
        active: 2,
        sliding: vec![false, true, true],
        window: 128,
        sinks: true,
        theta: 10_000.0,
        eps: 1e-5,
        context: 1024,
    }
}

/// Ten steps of these lower the loss of a tiny model.
pub fn optimizer() -> optim::Settings {
    optim::Settings {
        rate: 3e-3,
        floor: 0.1,
        warmup: 2,
        beta1: 0.9,
        beta2: 0.95,
        momentum: 0.95,
        decay: 0.01,
        clip: 1.0,
    }
}

/// A model with random weights.
pub fn net(shape: Shape, train: bool) -> Net {
    tch::manual_seed(7);
    let (l, h, f) = (shape.layers, shape.hidden, shape.ffn);
    let rows: i64 = shape.qkv_rows().iter().sum();
    let normal = |size: &[i64]| {
        let scale = 1.0 / (size[size.len() - 1] as f64).sqrt();
        Tensor::randn(size, (Kind::Float, Device::Cpu)) * scale
    };
    let ones = |size: &[i64]| Tensor::ones(size, (Kind::Float, Device::Cpu));
    let masters = vec![
        normal(&[1, shape.vocab, h]) * 3.0,
        ones(&[l, h]),
        normal(&[l, rows, h]),
        normal(&[l, h, shape.heads * shape.head_dim]),
        ones(&[l, shape.heads]) * 0.3,
        ones(&[l, h]),
        normal(&[l, shape.experts.max(1), h]),
        normal(&[l, 2 * f, h]),
        normal(&[l, h, f]),
        ones(&[1, h]),
    ];
    let bias = Tensor::zeros([l, shape.experts.max(1)], (Kind::Float, Device::Cpu));
    Net::new(shape, Masters(masters), bias, train)
}

/// Token streams of one domain, `text`, with a pattern to learn.
pub fn corpus(directory: &Path) {
    let mut x = 3u16;
    let tokens: Vec<u8> = (0..20_000u16)
        .flat_map(|i| {
            x = (x * 5 + 7 + i % 3) % 95 + 1;
            x.to_le_bytes()
        })
        .collect();
    std::fs::write(directory.join("text.u16"), &tokens).expect("writes the stream");
    std::fs::write(directory.join("text.eval.u16"), &tokens[..4000]).expect("writes the stream");
}
