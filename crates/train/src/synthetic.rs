//! A random dense model and synthetic text, for the tiny recipe and for nothing else.

use std::path::Path;

use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::export::{self, Form};
use crate::files;
use crate::net::{Masters, Net};
use crate::shape::Shape;

fn shape() -> Shape {
    Shape {
        vocab: 512,
        hidden: 64,
        layers: 6,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        ffn: 512,
        experts: 0,
        active: 0,
        sliding: vec![false; 6],
        window: 128,
        sinks: false,
        theta: 10_000.0,
        eps: 1e-5,
        context: 1024,
    }
}

/// A dense model with random weights.
fn dense() -> Net {
    tch::manual_seed(11);
    let shape = shape();
    let (l, h, f) = (shape.layers, shape.hidden, shape.ffn);
    let rows: i64 = shape.qkv_rows().iter().sum();
    let cpu = (Kind::Float, Device::Cpu);
    let normal = |size: [i64; 3]| Tensor::randn(size, cpu) / (size[2] as f64).sqrt();
    let masters = vec![
        normal([1, shape.vocab, h]) * 3.0,
        Tensor::ones([l, h], cpu),
        normal([l, rows, h]),
        normal([l, h, h]),
        Tensor::zeros([l, shape.heads], cpu),
        Tensor::ones([l, h], cpu),
        Tensor::zeros([l, 1, h], cpu),
        normal([l, 2 * f, h]),
        normal([l, h, f]),
        Tensor::ones([1, h], cpu),
    ];
    Net::new(shape, Masters(masters), Tensor::zeros([l, 1], cpu), false)
}

/// Writes `out/dense` and `out/corpus`.
pub fn write(out: &Path) -> Result<()> {
    export::write(&dense(), &out.join("dense"), Form::Master, out)?;
    let mut x = 3u32;
    let tokens: Vec<u16> = (0..40_000u32)
        .map(|i| {
            x = (x * 5 + 7 + i % 3 * 11) % 509 + 3;
            x as u16
        })
        .collect();
    let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    let corpus = out.join("corpus");
    files::write(&corpus.join("text.u16"), &bytes)?;
    files::write(&corpus.join("text.eval.u16"), &bytes[..16_000])?;
    let prompts: Vec<_> = (0..40)
        .map(|i| json!({"domain": "text", "tokens": tokens[i * 30..i * 30 + 8 + i % 9]}))
        .collect();
    files::write_json(&corpus.join("prompts.json"), &json!(prompts))
}
