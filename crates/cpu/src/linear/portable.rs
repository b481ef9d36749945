//! The definition of the packed products, in plain Rust over arrays of 16 lanes.

use formats::{fp8, mxfp4};
use model::weights::Encoding;

use super::Outputs;
use crate::activations::{ActivationRow, LIFT};
use crate::panels::{PANEL, Panels};

/// 2 E2M1 as an integer.
const TWICE: [i32; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// As [`panel`], compiled for AVX2 and FMA.
///
/// # Safety
/// The processor has both.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(super) fn with_avx2<const R: usize>(
    matrix: &Panels,
    for_drafts: bool,
    panel: usize,
    rows: &[ActivationRow<'_>; R],
) -> Outputs<R> {
    self::panel(matrix, for_drafts, panel, rows)
}

/// One panel times `R` rows.
#[inline(always)]
pub(super) fn panel<const R: usize>(
    matrix: &Panels,
    for_drafts: bool,
    panel: usize,
    rows: &[ActivationRow<'_>; R],
) -> Outputs<R> {
    let codes = matrix.panel_codes(panel);
    let mut out = [[0.0; PANEL]; R];
    for (out, row) in out.iter_mut().zip(rows) {
        *out = match matrix.encoding() {
            Encoding::Mxfp4 => mxfp4(codes, matrix.panel_scales(panel), row),
            Encoding::Fp8 if for_drafts => {
                fp8_rounded(codes, matrix.panel_float_scales(panel), matrix.cols(), row)
            }
            Encoding::Fp8 => fp8(codes, matrix.panel_float_scales(panel), matrix.cols(), row),
            Encoding::Bf16 => bf16(codes, row.plain),
            Encoding::F32 => float(codes, row.plain),
        };
    }
    out
}

#[inline(always)]
fn mxfp4(codes: &[u8], scales: &[u8], row: &ActivationRow<'_>) -> [f32; PANEL] {
    let mut acc = [0.0f32; PANEL];
    let blocks = codes.as_chunks::<256>().0.iter();
    let scales = scales.as_chunks::<PANEL>().0;
    let fixed = row.fixed.as_chunks::<{ 2 * mxfp4::BLOCK }>().0;
    for (b, block) in blocks.enumerate() {
        let mut sums = [0i32; PANEL];
        for (at, byte) in block.iter().enumerate() {
            let (lane, low) = (at % 64 / 4, at / 64 * 8 + at % 4);
            let x = |c: usize| i32::from(fixed[b][c]) * 128 + i32::from(fixed[b][32 + c]);
            sums[lane] += TWICE[usize::from(byte & 15)] * x(low);
            sums[lane] += TWICE[usize::from(byte >> 4)] * x(low + 4);
        }
        for lane in 0..PANEL {
            let scale = f32::from_bits(u32::from(scales[b][lane]) << 23) * row.scales[b];
            acc[lane] = (sums[lane] as f32).mul_add(scale, acc[lane]);
        }
    }
    acc
}

#[inline(always)]
fn fp8(codes: &[u8], scales: &[f32], cols: usize, row: &ActivationRow<'_>) -> [f32; PANEL] {
    let mut acc = [0.0f32; PANEL];
    let per_block = fp8::BLOCK / 4;
    let lines = codes.as_chunks::<64>().0;
    for (b, scales) in scales.as_chunks::<PANEL>().0.iter().enumerate() {
        let (mut even, mut odd) = ([0.0f32; PANEL], [0.0f32; PANEL]);
        let last = ((b + 1) * per_block).min(cols.div_ceil(4));
        for (l, line) in lines.iter().enumerate().take(last).skip(b * per_block) {
            let x = &row.lifted[l * 4..l * 4 + 4];
            for lane in 0..PANEL {
                let w = |i: usize| {
                    let code = u32::from(line[lane * 4 + i]);
                    f32::from_bits((code & 0x7F) << 20 | (code & 0x80) << 24)
                };
                even[lane] = w(0).mul_add(x[0], even[lane]);
                odd[lane] = w(1).mul_add(x[1], odd[lane]);
                even[lane] = w(2).mul_add(x[2], even[lane]);
                odd[lane] = w(3).mul_add(x[3], odd[lane]);
            }
        }
        for lane in 0..PANEL {
            let scale = scales[lane] * LIFT;
            acc[lane] = (even[lane] + odd[lane]).mul_add(scale, acc[lane]);
        }
    }
    acc
}

/// As [`fp8()`] with the drafts' rounding, in the order of VDPBF16PS (measured on Zen 4: the second of
/// a pair first, each product fused into the sum; inputs below the normals are 0).
#[inline(always)]
fn fp8_rounded(codes: &[u8], scales: &[f32], cols: usize, row: &ActivationRow<'_>) -> [f32; PANEL] {
    let mut acc = [0.0f32; PANEL];
    let per_block = fp8::BLOCK / 4;
    let lines = codes.as_chunks::<64>().0;
    for (b, scales) in scales.as_chunks::<PANEL>().0.iter().enumerate() {
        let (mut even, mut odd) = ([0.0f32; PANEL], [0.0f32; PANEL]);
        let last = ((b + 1) * per_block).min(cols.div_ceil(4));
        for (l, line) in lines.iter().enumerate().take(last).skip(b * per_block) {
            let x = |i: usize| f32::from_bits(u32::from(row.rounded[l * 4 + i]) << 16);
            for lane in 0..PANEL {
                let w = |i: usize| {
                    let code = u32::from(line[lane * 4 + i]);
                    let normal = if code & 0x78 == 0 { 0 } else { code & 0x7F };
                    f32::from_bits(normal << 20 | (code & 0x80) << 24)
                };
                even[lane] = w(2).mul_add(x(1), even[lane]);
                even[lane] = w(0).mul_add(x(0), even[lane]);
                odd[lane] = w(3).mul_add(x(3), odd[lane]);
                odd[lane] = w(1).mul_add(x(2), odd[lane]);
            }
        }
        for lane in 0..PANEL {
            let scale = scales[lane] * LIFT;
            acc[lane] = (even[lane] + odd[lane]).mul_add(scale, acc[lane]);
        }
    }
    acc
}

#[inline(always)]
fn bf16(codes: &[u8], x: &[f32]) -> [f32; PANEL] {
    let (mut even, mut odd) = ([0.0f32; PANEL], [0.0f32; PANEL]);
    for (line, x) in codes.as_chunks::<64>().0.iter().zip(x.as_chunks::<2>().0) {
        for lane in 0..PANEL {
            let pair = u32::from_le_bytes(line[lane * 4..lane * 4 + 4].try_into().expect("four"));
            even[lane] = f32::from_bits(pair << 16).mul_add(x[0], even[lane]);
            odd[lane] = f32::from_bits(pair & 0xFFFF_0000).mul_add(x[1], odd[lane]);
        }
    }
    std::array::from_fn(|lane| even[lane] + odd[lane])
}

#[inline(always)]
fn float(codes: &[u8], x: &[f32]) -> [f32; PANEL] {
    let mut chains = [[0.0f32; PANEL]; 2];
    for (c, (line, x)) in codes.as_chunks::<64>().0.iter().zip(x).enumerate() {
        let chain = &mut chains[c % 2];
        for lane in 0..PANEL {
            let w = f32::from_le_bytes(line[lane * 4..lane * 4 + 4].try_into().expect("four"));
            chain[lane] = w.mul_add(*x, chain[lane]);
        }
    }
    std::array::from_fn(|lane| chains[0][lane] + chains[1][lane])
}
