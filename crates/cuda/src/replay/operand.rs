//! What a product of the replay takes of its operands: as they are, or with the resident kernel's roundings.
//!
//! Owns the definition of those roundings: bf16 values, and of them, with plain e4m3 activations, the nearest e4m3
//! (`Operand::get` of `kernels/strips.cuh`) where weights have 4 or 8 bits.

use formats::{bf16, fp8};
use model::reference::rms_norm::rms_norm;

use super::Replay;
use crate::images::{Activations, Kv, Numbers};
use crate::strips::Format;

/// The nearest e4m3 times the group's power of two (`Operand::get` of `kernels/strips.cuh`), as values.
fn to_e4m3(group: &mut [f32]) {
    let largest = group.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    if largest > 0.0 {
        let exponent = ((448.0 / largest).to_bits() >> 23).clamp(67, 187);
        let scale = f32::from_bits(exponent << 23);
        for v in group {
            *v = fp8::decode(fp8::encode(*v * scale)) / scale;
        }
    }
}

impl Replay<'_> {
    /// Rounds activations, keys and values where the resident kernel does that keeps numbers like that: what is left of a
    /// difference is order of sums and the device's arithmetic. Two terms of an activation are not told from an f32.
    #[must_use]
    pub fn as_device(mut self, numbers: Numbers) -> Self {
        self.device = Some(numbers);
        self
    }

    fn activations(&self) -> Activations {
        // Without a device there is no rounding.
        self.device.map_or(Activations::Wide, |d| d.activations)
    }

    /// What a product of `format` takes of `x`: `group` columns share a power of two.
    pub(super) fn operand(&self, format: Format, x: &[f32], group: usize) -> Vec<f32> {
        let mut out = x.to_vec();
        let few_bits = matches!(format, Format::Fp4 | Format::Fp8);
        if self.activations() == Activations::E4m3 && few_bits {
            out.chunks_mut(group).for_each(to_e4m3);
        }
        out
    }

    pub(super) fn keep(&self, mut row: Vec<f32>) -> Vec<f32> {
        if self.activations() != Activations::Wide {
            row.iter_mut().for_each(|v| *v = bf16::round(*v));
        }
        row
    }

    /// A key or a value of the target as its caches hold it.
    pub(super) fn cached(&self, v: f32) -> f32 {
        match self.device.map(|d| d.kv) {
            None => v,
            Some(Kv::Bf16) => bf16::round(v),
            Some(Kv::Fp8) => fp8::decode(fp8::encode(v)),
            Some(Kv::Wide) => bf16::round(v) + bf16::round(v - bf16::round(v)),
        }
    }

    pub(super) fn normed(&self, weight: &[f32], x: &[f32], eps: f32) -> Vec<f32> {
        self.normed_as(Format::F32, weight, x, eps)
    }

    /// As a product of `format` takes it.
    pub(super) fn normed_for(&self, format: Format, weight: &[f32], x: &[f32]) -> Vec<f32> {
        self.normed_as(format, weight, x, self.config.eps)
    }

    fn normed_as(&self, format: Format, weight: &[f32], x: &[f32], eps: f32) -> Vec<f32> {
        let mut h = vec![0.0; x.len()];
        if self.device.is_none() {
            rms_norm(x, weight, eps, &mut h);
            return h;
        }
        // The device multiplies by 1 / rms after the product.
        rms_norm(x, &vec![1.0; x.len()], eps, &mut h);
        let largest = (0..x.len()).max_by(|&a, &b| x[a].abs().total_cmp(&x[b].abs()));
        let scale = largest.map_or(1.0, |i| if x[i] == 0.0 { 1.0 } else { h[i] / x[i] });
        for ((h, x), w) in h.iter_mut().zip(x).zip(weight) {
            *h = x * w;
        }
        let mut h = self.operand(format, &self.keep(h), 64);
        h.iter_mut().for_each(|h| *h *= scale);
        h
    }
}
