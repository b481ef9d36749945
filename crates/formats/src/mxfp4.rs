//! MXFP4 (OCP Microscaling Formats v1.0): blocks of 32 E2M1 codes that share one E8M0 scale.
//!
//! A block of 32 consecutive columns of a row is 16 bytes, the even column in the low nibble, and
//! one scale byte `s` that stands for 2^(s - 127). Decoding is exact in f32. Scale byte 0xFF (NaN
//! in E8M0) is never written; a reader refuses it.

/// Elements in a block.
pub const BLOCK: usize = 32;
/// Bytes of a block's codes.
pub const BLOCK_BYTES: usize = BLOCK / 2;
/// The scale byte that OCP reserves for NaN.
pub const SCALE_NAN: u8 = 0xFF;
/// Value of each code; bit 3 is the sign.
pub const E2M1: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// 2^(scale - 127), exactly (scale 0 is the subnormal 2^-127).
#[must_use]
pub fn decode_scale(scale: u8) -> f32 {
    match scale {
        0 => f32::from_bits(1 << 22),
        SCALE_NAN => f32::NAN,
        s => f32::from_bits(u32::from(s) << 23),
    }
}

/// Nearest E2M1 code of `value`, ties to the even code, saturating at 6; NaN becomes 6.
#[must_use]
pub fn encode_code(value: f32) -> u8 {
    // Midpoints between neighbours; a tie goes to the code whose mantissa bit is 0.
    let magnitude = value.abs();
    let code = if magnitude <= 0.25 {
        0
    } else if magnitude < 0.75 {
        1
    } else if magnitude <= 1.25 {
        2
    } else if magnitude < 1.75 {
        3
    } else if magnitude <= 2.5 {
        4
    } else if magnitude < 3.5 {
        5
    } else if magnitude <= 5.0 {
        6
    } else {
        7
    };
    code | (u8::from(value.is_sign_negative()) << 3)
}

/// How [`encode_block`] picks the shared exponent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleRule {
    /// OCP MX v1.0, section 6.3: floor(log2(amax)) - 2, from the exponent bits.
    Ocp,
    /// The exponent near the OCP one with the least squared error; the smaller among equals.
    LeastSquares,
}

/// Encodes 32 values: codes, two a byte with the even column low, and the scale byte. Rounds to
/// nearest, ties to even, and saturates. NaN counts as the largest magnitude.
#[must_use]
pub fn encode_block(values: &[f32; BLOCK], rule: ScaleRule) -> ([u8; BLOCK_BYTES], u8) {
    let largest = values
        .iter()
        .fold(0u32, |m, x| m.max(x.to_bits() << 1 >> 1));
    let exponent = (largest >> 23) as i32; // biased; 0 for zeros and subnormals
    let ocp = (exponent - 2).clamp(0, 254);
    let scale = match rule {
        ScaleRule::Ocp => ocp,
        ScaleRule::LeastSquares => ((ocp - 2).max(0)..=(ocp + 1).min(254))
            .map(|scale| (squared_error(values, scale as u8), scale))
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .map_or(ocp, |(_, scale)| scale),
    } as u8;
    let inverse = 1.0 / f64::from(decode_scale(scale));
    let code = |x: f32| encode_code((f64::from(x) * inverse) as f32);
    let mut codes = [0; BLOCK_BYTES];
    for (byte, pair) in codes.iter_mut().zip(values.chunks_exact(2)) {
        *byte = code(pair[0]) | code(pair[1]) << 4;
    }
    (codes, scale)
}

/// Decodes a block of 32 values, exactly.
pub fn decode_block(codes: &[u8; BLOCK_BYTES], scale: u8, values: &mut [f32; BLOCK]) {
    let scale = decode_scale(scale);
    for (pair, byte) in values.chunks_exact_mut(2).zip(codes) {
        pair[0] = E2M1[usize::from(byte & 15)] * scale;
        pair[1] = E2M1[usize::from(byte >> 4)] * scale;
    }
}

/// Infinite where a code would decode beyond f32.
fn squared_error(values: &[f32; BLOCK], scale: u8) -> f64 {
    let scale = decode_scale(scale);
    values
        .iter()
        .map(|&x| {
            let code = encode_code((f64::from(x) / f64::from(scale)) as f32);
            let error = f64::from(E2M1[usize::from(code)] * scale) - f64::from(x);
            error * error
        })
        .sum()
}
