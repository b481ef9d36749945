//! Fake quantisation on tensors: the values that decoding an encoded tensor would give.
//!
//! Bit-equal to `formats` (tests/quant.rs): scales come from exponent bits, never from a logarithm.
//! Gradients do not pass through here; `params` applies them straight to the masters.

use tch::{Kind, Tensor};

const BLOCK: i64 = 32;
const FP8_BLOCK: i64 = 128;
const FP8_MAX: f64 = 448.0;

/// Rounds f32 `[..., k]` to MXFP4, blocks of 32 along the last axis (k a multiple of 32).
pub fn mxfp4(x: &Tensor) -> Tensor {
    let blocks = x.reshape([-1, BLOCK]);
    let magnitude = blocks.abs();
    let amax = magnitude.amax([1i64].as_slice(), true);
    let scale = mxfp4_scale(&amax);
    let a = (&magnitude / &scale).clamp_max(6.0);
    let step = (a.ge(2.0).to_kind(Kind::Float) + 1.0 + a.ge(4.0).to_kind(Kind::Float) * 2.0) * 0.5;
    let rounded = (a / &step).round() * step;
    (rounded * scale).copysign(&blocks).reshape_as(x)
}

/// 2^(floor(log2 amax) - 2), from exponent bits; 1 for a block of zeros.
fn mxfp4_scale(amax: &Tensor) -> Tensor {
    let bits = amax.view_dtype(Kind::Int);
    let exponent = bits.bitwise_right_shift_tensor_scalar(23) - 2;
    let scale = (exponent.clamp_min(1) * (1 << 23)).view_dtype(Kind::Float);
    scale.where_self(&amax.gt(0.0), &amax.ones_like())
}

/// Rounds f32 `[n, rows, columns]` to FP8 E4M3 with one f32 scale a 128 x 128 block.
///
/// `parts` are the row counts of the matrices fused into `rows`; each has its own grid.
pub fn fp8(x: &Tensor, parts: &[i64]) -> Tensor {
    let mut start = 0;
    let mut out = Vec::new();
    for &rows in parts {
        out.push(fp8_matrix(&x.narrow(1, start, rows)));
        start += rows;
    }
    Tensor::cat(&out, 1)
}

fn fp8_matrix(x: &Tensor) -> Tensor {
    let (n, rows, columns) = x.size3().expect("fp8 takes [n, rows, columns]");
    let pad = |size: i64| (size + FP8_BLOCK - 1) / FP8_BLOCK * FP8_BLOCK - size;
    let padded = x.constant_pad_nd([0, pad(columns), 0, pad(rows)]);
    let (r, c) = (
        (rows + pad(rows)) / FP8_BLOCK,
        (columns + pad(columns)) / FP8_BLOCK,
    );
    let blocks = padded.reshape([n, r, FP8_BLOCK, c, FP8_BLOCK]);
    let amax = blocks.abs().amax([2i64, 4].as_slice(), true);
    let scale = (&amax / FP8_MAX).where_self(&amax.gt(0.0), &amax.ones_like());
    let codes = (blocks / &scale).to_kind(Kind::Float8e4m3fn);
    (codes.to_kind(Kind::Float) * scale)
        .reshape([n, rows + pad(rows), columns + pad(columns)])
        .narrow(1, 0, rows)
        .narrow(2, 0, columns)
        .contiguous()
}
