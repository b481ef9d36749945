//! Weights to bytes, block by block (stop-gap until `formats` lands its encoders).

use super::config::FP8_BLOCK;

const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

fn code(x: f32) -> u8 {
    let a = x.abs();
    let mut best = 0;
    for i in 1..8 {
        let (d, e) = ((E2M1[i] - a).abs(), (E2M1[best] - a).abs());
        if d < e || (d == e && i % 2 == 0) {
            best = i;
        }
    }
    best as u8 | if x.is_sign_negative() { 8 } else { 0 }
}

fn block(values: &[f32]) -> (u8, [u8; 32]) {
    let amax = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    if amax == 0.0 {
        return (127, [0; 32]);
    }
    let floor = ((amax.to_bits() >> 23) as i32) - 2;
    let mut best = (f64::MAX, 0u8, [0u8; 32]);
    for s in (floor - 2)..=(floor + 1) {
        let s = s.clamp(0, 254);
        let scale = 2f32.powi(s - 127);
        let mut codes = [0u8; 32];
        let mut error = 0.0f64;
        for (c, &x) in codes.iter_mut().zip(values) {
            *c = code(x / scale);
            let v = E2M1[(*c & 7) as usize] * scale;
            error += f64::from((v - x.abs()) * (v - x.abs()));
        }
        if error < best.0 {
            best = (error, s as u8, codes);
        }
    }
    (best.1, best.2)
}

/// Codes, two a byte (low nibble first), and one scale byte a block.
pub(super) fn encode_mxfp4(values: &[f32]) -> (Vec<u8>, Vec<u8>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for values in values.chunks_exact(32) {
        let (scale, block) = block(values);
        scales.push(scale);
        codes.extend(block.chunks_exact(2).map(|c| c[0] | c[1] << 4));
    }
    (codes, scales)
}

fn e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let a = x.abs();
    let exponent = ((a.to_bits() >> 23) as i32 - 127).max(-6);
    let step = 2f32.powi(exponent - 3);
    let q = (a / step).round_ties_even() as i32;
    let bits = if q >= 16 {
        ((exponent + 8) << 3) + (q - 16) / 2
    } else {
        ((exponent + 7) << 3) + q - 8
    };
    let bits = if exponent == -6 && q < 8 { q } else { bits };
    sign | bits.clamp(0, 0x7e) as u8
}

/// FP8 codes and one scale for each 128 x 128 block.
pub(super) fn encode_fp8(values: &[f32], rows: usize, columns: usize) -> (Vec<u8>, Vec<f32>) {
    let (grid_rows, grid_columns) = (rows.div_ceil(FP8_BLOCK), columns.div_ceil(FP8_BLOCK));
    let mut amax = vec![0.0f32; grid_rows * grid_columns];
    let at = |i: usize| (i / columns / FP8_BLOCK) * grid_columns + i % columns / FP8_BLOCK;
    for (i, x) in values.iter().enumerate() {
        amax[at(i)] = amax[at(i)].max(x.abs());
    }
    let scales: Vec<f32> = amax
        .iter()
        .map(|&m| if m == 0.0 { 1.0 } else { m / 448.0 })
        .collect();
    let codes = values
        .iter()
        .enumerate()
        .map(|(i, x)| e4m3(x / scales[at(i)]))
        .collect();
    (codes, scales)
}
