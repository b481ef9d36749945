//! The gated unit: `model::reference::swiglu` with an exponential that vectorises.

use model::reference::sample::exp;

use crate::isa::per_isa;

per_isa! {
    /// `silu(gate) * up` into `out`; all `[intermediate]`.
    ///
    /// # Safety
    /// `isa` is one that [`Isa::detect`](crate::isa::Isa::detect) allows here.
    pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) = gated
}

#[inline(always)]
fn gated(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate * sigmoid(*gate) * up;
    }
}

/// 1 / (1 + e^-x), without overflow; 0 for NaN (the product above stays NaN).
#[must_use]
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    let e = exp(-x.abs());
    let share = 1.0 / (1.0 + e);
    if x >= 0.0 { share } else { e * share }
}
