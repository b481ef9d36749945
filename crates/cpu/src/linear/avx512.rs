//! The packed products with AVX-512: a zmm lane is an output row, weights come in whole cache lines.
//!
//! ```text
//! MXFP4, a line of 64 codes (16 rows x 8 columns, two nibbles a byte):
//!   low, high nibble -> shuffle table -> 2 E2M1 + 12 as u8     (VNNI wants one side unsigned)
//!   sum_high += dpbusd(weights, broadcast of 4 high parts), sum_low likewise, for each row
//!   after 4 lines: i = 128 sum_high + sum_low - 12 sum(x)       (sum_low starts at the offset)
//!   acc = fma(i, weight scale * activation scale, acc)
//! FP8, a line of 64 codes (16 rows x 4 columns):
//!   16-bit lanes: byte to the top, arithmetic shift right by 4, mask: sign, 4 exponent and 3 mantissa
//!   bits where BF16 has them = weight * 2^-120 with subnormals right; two codes an operation. Then
//!   either half becomes f32; fma with the lifted activation
//! ```
//! Weights stream: every line is prefetched `AHEAD` bytes before it is used (the hardware prefetcher
//! stops at page ends; measured on Zen 4, 2026-11: see bench/).
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use formats::{fp8 as format, mxfp4 as micro};

use super::Outputs;
use crate::activations::{ActivationRow, LIFT};
use crate::panels::{PANEL, Panels};

/// Prefetch distance in bytes.
const AHEAD: usize = 4096;
/// 2 E2M1 + 12 for each code.
const TABLE: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
/// Sign, exponent and mantissa of an E4M3 code in the place of a BF16's.
const CODE_BITS: i16 = 0x87F0u16 as i16;

macro_rules! prefetch {
    ($pointer:expr) => {
        _mm_prefetch::<_MM_HINT_T0>($pointer.wrapping_add(AHEAD).cast())
    };
}

/// MXFP4 panel times `R` rows.
///
/// # Safety
/// The processor has the features; rows have as many columns as the matrix.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn mxfp4<const R: usize>(
    matrix: &Panels,
    panel: usize,
    rows: &[ActivationRow<'_>; R],
) -> Outputs<R> {
    let (codes, scales) = (matrix.panel_codes(panel), matrix.panel_scales(panel));
    let blocks = matrix.cols() / micro::BLOCK;
    assert!(codes.len() == blocks * 256 && scales.len() == blocks * PANEL);
    for row in rows {
        assert!(row.fixed.len() >= blocks * 64 && row.scales.len() >= blocks);
    }
    let nibble = _mm512_set1_epi8(15);
    let mut acc = [_mm512_setzero_ps(); R];
    // SAFETY: all offsets are below the lengths asserted above; prefetches may point anywhere.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(TABLE.as_ptr().cast()));
        for b in 0..blocks {
            let mut high = [_mm512_setzero_si512(); R];
            let mut low: [__m512i; R] =
                std::array::from_fn(|r| _mm512_set1_epi32(*rows[r].offsets.get_unchecked(b)));
            for j in 0..4 {
                let line = codes.as_ptr().add(b * 256 + j * 64);
                prefetch!(line);
                let pair = _mm512_loadu_si512(line.cast());
                let first = _mm512_shuffle_epi8(table, _mm512_and_si512(pair, nibble));
                let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(pair), nibble);
                let second = _mm512_shuffle_epi8(table, upper);
                for r in 0..R {
                    let x = rows[r].fixed.as_ptr().cast::<i32>().add(b * 16 + j * 2);
                    let part = |at: usize| _mm512_set1_epi32(x.add(at).read_unaligned());
                    high[r] = _mm512_dpbusd_epi32(high[r], first, part(0));
                    high[r] = _mm512_dpbusd_epi32(high[r], second, part(1));
                    low[r] = _mm512_dpbusd_epi32(low[r], first, part(8));
                    low[r] = _mm512_dpbusd_epi32(low[r], second, part(9));
                }
            }
            let exponents = _mm_loadu_si128(scales.as_ptr().add(b * PANEL).cast());
            let scale = _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(exponents));
            let scale = _mm512_castsi512_ps(scale);
            for r in 0..R {
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<7>(high[r]), low[r]);
                let x_scale = _mm512_set1_ps(*rows[r].scales.get_unchecked(b));
                let scale = _mm512_mul_ps(scale, x_scale);
                acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[r]);
            }
        }
    }
    store(acc)
}

/// FP8 panel times `R` rows.
///
/// # Safety
/// The processor has the features; rows have as many columns as the matrix.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn fp8<const R: usize>(
    matrix: &Panels,
    panel: usize,
    rows: &[ActivationRow<'_>; R],
) -> Outputs<R> {
    let (codes, scales) = (matrix.panel_codes(panel), matrix.panel_float_scales(panel));
    let lines = matrix.cols().div_ceil(4);
    let blocks = matrix.cols().div_ceil(format::BLOCK);
    assert!(codes.len() == lines * 64 && scales.len() == blocks * PANEL);
    for row in rows {
        assert!(row.lifted.len() >= lines * 4);
    }
    let fields = _mm512_set1_epi16(CODE_BITS);
    let upper = _mm512_set1_epi32(0xFFFF_0000u32 as i32);
    let mut acc = [_mm512_setzero_ps(); R];
    // SAFETY: all offsets are below the lengths asserted above; prefetches may point anywhere.
    unsafe {
        for b in 0..blocks {
            let (mut even, mut odd) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
            let last = ((b + 1) * (format::BLOCK / 4)).min(lines);
            for l in b * (format::BLOCK / 4)..last {
                let line = codes.as_ptr().add(l * 64);
                prefetch!(line);
                let four = _mm512_loadu_si512(line.cast());
                let a = _mm512_and_si512(_mm512_srai_epi16::<4>(four), fields);
                let b = _mm512_srai_epi16::<4>(_mm512_slli_epi16::<8>(four));
                let b = _mm512_and_si512(b, fields);
                let w = [
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b)),
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)),
                    _mm512_castsi512_ps(_mm512_and_si512(b, upper)),
                    _mm512_castsi512_ps(_mm512_and_si512(a, upper)),
                ];
                for r in 0..R {
                    let x = rows[r].lifted.as_ptr().add(l * 4);
                    let x = |i: usize| _mm512_set1_ps(*x.add(i));
                    even[r] = _mm512_fmadd_ps(w[0], x(0), even[r]);
                    odd[r] = _mm512_fmadd_ps(w[1], x(1), odd[r]);
                    even[r] = _mm512_fmadd_ps(w[2], x(2), even[r]);
                    odd[r] = _mm512_fmadd_ps(w[3], x(3), odd[r]);
                }
            }
            let scale = _mm512_loadu_ps(scales.as_ptr().add(b * PANEL));
            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(LIFT));
            for r in 0..R {
                acc[r] = _mm512_fmadd_ps(_mm512_add_ps(even[r], odd[r]), scale, acc[r]);
            }
        }
    }
    store(acc)
}

/// True when the processor has VDPBF16PS.
pub(super) fn bf16_is_here() -> bool {
    is_x86_feature_detected!("avx512bf16")
}

/// FP8 panel times `R` rows, rounded as drafts are: two columns an instruction.
///
/// # Safety
/// The processor has the features; rows have as many columns as the matrix.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn fp8_rounded<const R: usize>(
    matrix: &Panels,
    panel: usize,
    rows: &[ActivationRow<'_>; R],
) -> Outputs<R> {
    let (codes, scales) = (matrix.panel_codes(panel), matrix.panel_float_scales(panel));
    let lines = matrix.cols().div_ceil(4);
    let blocks = matrix.cols().div_ceil(format::BLOCK);
    assert!(codes.len() == lines * 64 && scales.len() == blocks * PANEL);
    for row in rows {
        assert!(row.rounded.len() >= lines * 4);
    }
    let fields = _mm512_set1_epi16(CODE_BITS);
    let mut acc = [_mm512_setzero_ps(); R];
    // SAFETY: all offsets are below the lengths asserted above; prefetches may point anywhere; a
    // register of 32 BF16 is any 64 bytes.
    unsafe {
        let pairs = |x: __m512i| std::mem::transmute::<__m512i, __m512bh>(x);
        for b in 0..blocks {
            let (mut even, mut odd) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
            let last = ((b + 1) * (format::BLOCK / 4)).min(lines);
            for l in b * (format::BLOCK / 4)..last {
                let line = codes.as_ptr().add(l * 64);
                prefetch!(line);
                let four = _mm512_loadu_si512(line.cast());
                let a = pairs(_mm512_and_si512(_mm512_srai_epi16::<4>(four), fields));
                let b = _mm512_srai_epi16::<4>(_mm512_slli_epi16::<8>(four));
                let b = pairs(_mm512_and_si512(b, fields));
                for r in 0..R {
                    let x = rows[r].rounded.as_ptr().add(l * 4).cast::<i32>();
                    let x = |i: usize| pairs(_mm512_set1_epi32(x.add(i).read_unaligned()));
                    even[r] = _mm512_dpbf16_ps(even[r], b, x(0));
                    odd[r] = _mm512_dpbf16_ps(odd[r], a, x(1));
                }
            }
            let scale = _mm512_loadu_ps(scales.as_ptr().add(b * PANEL));
            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(LIFT));
            for r in 0..R {
                acc[r] = _mm512_fmadd_ps(_mm512_add_ps(even[r], odd[r]), scale, acc[r]);
            }
        }
    }
    store(acc)
}

/// BF16 panel times `R` rows.
///
/// # Safety
/// The processor has the features; rows have as many columns as the matrix.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn bf16<const R: usize>(
    matrix: &Panels,
    panel: usize,
    rows: &[ActivationRow<'_>; R],
) -> Outputs<R> {
    let codes = matrix.panel_codes(panel);
    let lines = matrix.cols().div_ceil(2);
    assert!(codes.len() == lines * 64);
    for row in rows {
        assert!(row.plain.len() >= lines * 2);
    }
    let upper = _mm512_set1_epi32(0xFFFF_0000u32 as i32);
    let (mut even, mut odd) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
    // SAFETY: all offsets are below the lengths asserted above; prefetches may point anywhere.
    unsafe {
        for l in 0..lines {
            let line = codes.as_ptr().add(l * 64);
            prefetch!(line);
            let pair = _mm512_loadu_si512(line.cast());
            let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair));
            let second = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
            for r in 0..R {
                let x = rows[r].plain.as_ptr().add(l * 2);
                even[r] = _mm512_fmadd_ps(first, _mm512_set1_ps(*x), even[r]);
                odd[r] = _mm512_fmadd_ps(second, _mm512_set1_ps(*x.add(1)), odd[r]);
            }
        }
    }
    let mut acc = even;
    for r in 0..R {
        acc[r] = _mm512_add_ps(even[r], odd[r]);
    }
    store(acc)
}

/// F32 panel times `R` rows.
///
/// # Safety
/// The processor has the features; rows have as many columns as the matrix.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn float<const R: usize>(
    matrix: &Panels,
    panel: usize,
    rows: &[ActivationRow<'_>; R],
) -> Outputs<R> {
    let codes = matrix.panel_codes(panel);
    assert!(codes.len() == matrix.cols() * 64);
    for row in rows {
        assert!(row.plain.len() >= matrix.cols());
    }
    let mut chains = [[_mm512_setzero_ps(); R]; 2];
    // SAFETY: all offsets are below the lengths asserted above; prefetches may point anywhere.
    unsafe {
        for c in 0..matrix.cols() {
            let line = codes.as_ptr().add(c * 64);
            prefetch!(line);
            let w = _mm512_loadu_ps(line.cast());
            for r in 0..R {
                let x = _mm512_set1_ps(*rows[r].plain.as_ptr().add(c));
                chains[c % 2][r] = _mm512_fmadd_ps(w, x, chains[c % 2][r]);
            }
        }
    }
    let mut acc = chains[0];
    for r in 0..R {
        acc[r] = _mm512_add_ps(chains[0][r], chains[1][r]);
    }
    store(acc)
}

#[target_feature(enable = "avx512f")]
fn store<const R: usize>(acc: [__m512; R]) -> Outputs<R> {
    let mut out = [[0.0; PANEL]; R];
    for (out, acc) in out.iter_mut().zip(acc) {
        // SAFETY: `out` is 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), acc) };
    }
    out
}
