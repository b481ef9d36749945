//! Random numbers and errors that parity tests share, the emulator's and the GPU's.

/// xorshift64*, for test data.
pub(crate) struct Random(pub u64);

impl Random {
    /// Uniform bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    /// About normal, with one value in a hundred 20 times larger, as activations are.
    pub(crate) fn value(&mut self) -> f32 {
        let sum: f32 = (0..4)
            .map(|_| (self.bits() % 4096) as f32 / 2048.0 - 1.0)
            .sum();
        sum * if self.bits().is_multiple_of(100) {
            20.0
        } else {
            1.0
        }
    }
}

/// ||a - b|| / ||b||; NaN where either has one.
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        a.iter()
            .zip(b)
            .map(|(&a, &b)| f(f64::from(a), f64::from(b)))
            .sum()
    };
    (sum(&|a, b| (a - b) * (a - b)) / sum(&|_, b| b * b)).sqrt()
}
