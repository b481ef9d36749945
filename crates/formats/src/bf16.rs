//! BF16: the upper half of an f32. Decoding is exact; encoding rounds to nearest, ties to even.

use half::bf16;

/// The value of a bit pattern, exactly.
#[must_use]
pub fn decode(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest BF16, ties to even; NaN stays NaN.
#[must_use]
pub fn encode(value: f32) -> u16 {
    bf16::from_f32(value).to_bits()
}

/// `value` as BF16 holds it.
#[must_use]
pub fn round(value: f32) -> f32 {
    decode(encode(value))
}
