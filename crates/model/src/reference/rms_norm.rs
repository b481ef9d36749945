//! RMSNorm (Zhang and Sennrich, 2019): `x * rsqrt(mean(x^2) + eps) * weight`, statistics in f32.

/// Normalises one row. `x`, `weight`, `out`: `[hidden]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}
