//! FP8 E4M3 (the OCP "fn" variant: no infinities, 0x7F and 0xFF are NaN, largest value 448), with
//! one f32 scale for each 128 x 128 block of a weight, or each 128 columns of an activation row.
//!
//! A value is `decode(code) * scale`. Weight grids may be ragged at the right and lower edges.
//! Encoding rounds to nearest, ties to even, and saturates at 448.

/// Rows and columns of a weight block; columns of an activation group.
pub const BLOCK: usize = 128;
/// Largest finite value.
pub const MAX: f32 = 448.0;

/// The value of a code, exactly; NaN for 0x7F and 0xFF.
#[must_use]
pub fn decode(code: u8) -> f32 {
    let sign = u32::from(code >> 7) << 31;
    let exponent = u32::from(code >> 3) & 15;
    let mantissa = u32::from(code & 7);
    match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        // Subnormal: mantissa * 2^-9.
        (0, m) => f32::from_bits((m as f32 / 512.0).to_bits() | sign),
        (e, m) => f32::from_bits(sign | (e + 120) << 23 | m << 20),
    }
}

/// The nearest code: ties to even, saturating; NaN becomes NaN.
#[must_use]
pub fn encode(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    if value.is_nan() {
        return sign | 0x7F;
    }
    let magnitude = value.abs().min(MAX);
    // The spacing of codes around `magnitude`: 2^(exponent - 3), at least the subnormal 2^-9.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let spacing = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    let steps = (magnitude / spacing).round_ties_even() as u32; // 0..=16
    // 16 steps carry into the next exponent by themselves: codes are consecutive integers.
    let code = match steps {
        0..8 => steps,
        _ => ((exponent + 6) as u32) * 8 + steps,
    };
    sign | (code as u8).min(0x7E)
}

/// Encodes a weight `[rows, columns]`, row-major: codes, and scales
/// `[rows.div_ceil(128), columns.div_ceil(128)]` that map the largest magnitude of a block to 448.
///
/// # Panics
/// When `weight` has not `rows * columns` elements.
#[must_use]
pub fn encode_weight(weight: &[f32], rows: usize, columns: usize) -> (Vec<u8>, Vec<f32>) {
    assert_eq!(weight.len(), rows * columns, "weight is [rows, columns]");
    let grid_columns = columns.div_ceil(BLOCK);
    let mut scales = vec![0.0f32; rows.div_ceil(BLOCK) * grid_columns];
    let block = |i: usize| (i / columns / BLOCK) * grid_columns + i % columns / BLOCK;
    for (i, x) in weight.iter().enumerate() {
        scales[block(i)] = scales[block(i)].max(x.abs());
    }
    for scale in &mut scales {
        *scale = scale_of(*scale);
    }
    let codes = weight
        .iter()
        .enumerate()
        .map(|(i, x)| encode(x / scales[block(i)]))
        .collect();
    (codes, scales)
}

/// Encodes one activation row: codes, and a scale for each 128 columns.
#[must_use]
pub fn encode_row(row: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let largest = |group: &[f32]| group.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scales: Vec<f32> = row.chunks(BLOCK).map(|g| scale_of(largest(g))).collect();
    let codes = row
        .chunks(BLOCK)
        .zip(&scales)
        .flat_map(|(group, scale)| group.iter().map(move |x| encode(x / scale)))
        .collect();
    (codes, scales)
}

/// The scale that maps `largest` to 448; 1 for a block of zeros.
fn scale_of(largest: f32) -> f32 {
    match largest / MAX {
        scale if scale >= f32::MIN_POSITIVE => scale,
        _ => 1.0,
    }
}
