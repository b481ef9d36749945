//! RMSNorm of a row: `model::reference::rms_norm` with the sum in 16 lanes.

use crate::isa::per_isa;

/// Sums of squares are kept in this many lanes, added pairwise at the end.
const LANES: usize = 16;

per_isa! {
    /// Normalises one row. `x`, `weight`, `out`: `[hidden]`.
    ///
    /// # Safety
    /// `isa` is one that [`Isa::detect`](crate::isa::Isa::detect) allows here.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = normalise
}

#[inline(always)]
fn normalise(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut lanes = [0.0f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x * x;
    }
    let scale = 1.0 / (sum(lanes) / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// Adds lanes pairwise.
#[must_use]
#[inline(always)]
pub fn sum(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}
