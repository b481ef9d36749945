//! How sure a row of logits is: `model::reference::sample::confidence`, in wide registers.

use crate::isa::{Isa, per_isa};

per_isa! {
    fn largest_probability(logits: &[f32], out: &mut f32) = body
}

#[inline(always)]
fn body(logits: &[f32], out: &mut f32) {
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut largest = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (largest, x) in largest.iter_mut().zip(chunk) {
            *largest = if *x > *largest { *x } else { *largest };
        }
    }
    let all = largest.iter().chain(rest);
    let largest = all.fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    *out = model::reference::sample::confidence(logits, largest);
}

/// The largest probability of softmax(`logits`); NaN or 0 when they are not finite.
///
/// # Safety
/// `isa` is one that [`Isa::detect`] allows here.
pub(crate) unsafe fn confidence(isa: Isa, logits: &[f32]) -> f32 {
    let mut out = 0.0;
    // SAFETY: by contract.
    unsafe { largest_probability(isa, logits, &mut out) };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confidence_is_the_largest_probability() {
        let logits: Vec<f32> = (0..1003)
            .map(|i| ((i * 37) % 101) as f32 / 9.0 - 4.0)
            .collect();
        let largest = logits.iter().fold(f32::MIN, |a, b| a.max(*b));
        let sum: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
        // SAFETY: what was detected.
        let found = unsafe { confidence(Isa::detect(), &logits) };
        assert!((f64::from(found) * sum - 1.0).abs() < 1e-5);
    }
}
