//! The gated unit of dense layers and experts: `silu(gate) * up`, not clamped (mimo-v2.md 0.6).

use super::router::sigmoid;

/// `gate`, `up`: `[intermediate]`; the result replaces `gate`.
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate * sigmoid(*gate) * up;
    }
}
