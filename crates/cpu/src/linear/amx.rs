//! MXFP4 products of many rows with AMX tiles of signed bytes: the same integers as the other arms,
//! so the same bits.
//!
//! For each 32-column block the nibbles of 16 output rows become a tile B `[8][16 lanes][4]` of
//! 2 E2M1 (the order in which a panel has them); high and low activation parts are tiles A
//! `[rows][32]`; `tdpbssd` gives both sums of every row and lane at once. Scales are applied in f32
//! as everywhere. Written with `asm!` because the intrinsics are not stable.
//!
//! Not run on hardware by its authors (2026-11): [`panel_times`] is tested with an emulation of the
//! instruction, and the tests of `linear` run the real one where the processor has it.
#![cfg(target_arch = "x86_64")]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use formats::mxfp4::BLOCK;

use super::Outputs;
use crate::activations::ActivationRow;
use crate::panels::{PANEL, Panels};

/// Fewer rows than this are faster without tiles: a tile has to be unpacked first.
pub(super) const ROWS_MIN: usize = 5;
/// Rows of a tile.
const TILE_ROWS: usize = 16;
/// Bytes of a tile's row.
const LINE: usize = 64;
/// 2 E2M1.
const TWICE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// High and low parts of the rows of a block: two tiles A.
#[repr(C, align(64))]
pub(super) struct Parts {
    high: [[i8; BLOCK]; TILE_ROWS],
    low: [[i8; BLOCK]; TILE_ROWS],
}

/// Weights of a block: tile B; row `k` holds columns `4 k..4 k + 4` of each lane.
#[repr(C, align(64))]
pub(super) struct Weights([[i8; LINE]; BLOCK / 4]);

/// Sums of high and of low parts: two tiles C.
#[repr(C, align(64))]
pub(super) struct Sums {
    high: [[i32; PANEL]; TILE_ROWS],
    low: [[i32; PANEL]; TILE_ROWS],
}

/// True when processor and kernel let this process use tiles of bytes.
pub(super) fn is_here() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| {
        let features = __cpuid_count(7, 0).edx;
        let (tile, int8) = (features >> 24 & 1 == 1, features >> 25 & 1 == 1);
        tile && int8 && allowed()
    })
}

/// Asks the kernel for the tile registers (arch_prctl ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
fn allowed() -> bool {
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XTILEDATA: usize = 18;
    // SAFETY: the call only changes what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

/// MXFP4 panel times `R` rows, at most 16.
///
/// # Safety
/// [`is_here`], and the processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn mxfp4<const R: usize>(
    matrix: &Panels,
    panel: usize,
    rows: &[ActivationRow<'_>; R],
) -> Outputs<R> {
    let shapes = Shapes::new(R);
    // SAFETY: the instructions exist and are allowed, by contract; `shapes` outlives the call.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) };
    // SAFETY: the tiles have just been configured for this many rows.
    let out = panel_times(matrix, panel, rows, |a, b, c| unsafe { dot(a, b, c) });
    // SAFETY: ends the use of tiles begun above.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
    out
}

/// The work around the tile instruction: `dot(parts, weights, sums)`.
#[inline(always)]
pub(super) fn panel_times<const R: usize>(
    matrix: &Panels,
    panel: usize,
    rows: &[ActivationRow<'_>; R],
    dot: impl Fn(&Parts, &Weights, &mut Sums),
) -> Outputs<R> {
    assert!(R <= TILE_ROWS, "rows of a tile");
    let (codes, scales) = (matrix.panel_codes(panel), matrix.panel_scales(panel));
    let mut parts = Parts {
        high: [[0; BLOCK]; TILE_ROWS],
        low: [[0; BLOCK]; TILE_ROWS],
    };
    let mut weights = Weights([[0; LINE]; BLOCK / 4]);
    let mut sums = Sums {
        high: [[0; PANEL]; TILE_ROWS],
        low: [[0; PANEL]; TILE_ROWS],
    };
    let mut out = [[0.0f32; PANEL]; R];
    let blocks = codes.as_chunks::<{ 4 * LINE }>().0.iter();
    for (b, (codes, scales)) in blocks.zip(scales.as_chunks::<PANEL>().0).enumerate() {
        unpack(codes, &mut weights);
        for (r, row) in rows.iter().enumerate() {
            let (high, low) = row.fixed[b * 2 * BLOCK..][..2 * BLOCK].split_at(BLOCK);
            parts.high[r].copy_from_slice(high);
            parts.low[r].copy_from_slice(low);
        }
        dot(&parts, &weights, &mut sums);
        for (r, (row, out)) in rows.iter().zip(&mut out).enumerate() {
            for lane in 0..PANEL {
                let sum = (sums.high[r][lane] << 7) + sums.low[r][lane];
                let scale = f32::from_bits(u32::from(scales[lane]) << 23) * row.scales[b];
                out[lane] = (sum as f32).mul_add(scale, out[lane]);
            }
        }
    }
    out
}

#[inline(always)]
fn unpack(codes: &[u8; 4 * LINE], weights: &mut Weights) {
    for (j, line) in codes.as_chunks::<LINE>().0.iter().enumerate() {
        for (i, byte) in line.iter().enumerate() {
            weights.0[2 * j][i] = TWICE[usize::from(byte & 15)];
            weights.0[2 * j + 1][i] = TWICE[usize::from(byte >> 4)];
        }
    }
}

/// Shapes of the tiles: 0 and 1 sums, 2 and 3 parts, 4 weights (Intel SDM, LDTILECFG).
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    fn new(rows: usize) -> Self {
        let mut shapes = Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        let (sums, parts, weights) = ((LINE, rows), (BLOCK, rows), (LINE, BLOCK / 4));
        for (tile, (row_bytes, rows)) in [sums, sums, parts, parts, weights].into_iter().enumerate()
        {
            shapes.row_bytes[tile] = row_bytes as u16;
            shapes.rows[tile] = rows as u8;
        }
        shapes
    }
}

/// `sums.high = parts.high * weights`, `sums.low = parts.low * weights`.
///
/// # Safety
/// The tiles are configured by [`Shapes::new`].
#[inline(always)]
unsafe fn dot(parts: &Parts, weights: &Weights, sums: &mut Sums) {
    // SAFETY: a tile is at most 16 rows of 64 bytes (parts: 32), which is what the types hold.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tileloadd tmm2, [{high} + {half}*1]",
            "tileloadd tmm3, [{low} + {half}*1]",
            "tileloadd tmm4, [{weights} + {line}*1]",
            "tdpbssd tmm0, tmm2, tmm4",
            "tdpbssd tmm1, tmm3, tmm4",
            "tilestored [{sum_high} + {line}*1], tmm0",
            "tilestored [{sum_low} + {line}*1], tmm1",
            high = in(reg) parts.high.as_ptr(),
            low = in(reg) parts.low.as_ptr(),
            weights = in(reg) weights.0.as_ptr(),
            sum_high = in(reg) sums.high.as_mut_ptr(),
            sum_low = in(reg) sums.low.as_mut_ptr(),
            half = in(reg) BLOCK,
            line = in(reg) LINE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
            options(nostack),
        );
    }
}

/// What two `tdpbssd` do (Intel SDM), for tests without the hardware: `tdpbssd` adds, for each row
/// and lane, the products of signed bytes in groups of 4.
#[cfg(test)]
pub(super) fn emulated(rows: usize) -> impl Fn(&Parts, &Weights, &mut Sums) {
    type Sum = [[i32; PANEL]; TILE_ROWS];
    let tile = move |a: &[[i8; BLOCK]; TILE_ROWS], b: &Weights, c: &mut Sum| {
        for (a, c) in a.iter().zip(c).take(rows) {
            for (n, sum) in c.iter_mut().enumerate() {
                let product = |k: usize| i32::from(a[k]) * i32::from(b.0[k / 4][4 * n + k % 4]);
                *sum = (0..BLOCK).map(product).sum();
            }
        }
    };
    move |parts, weights, sums| {
        tile(&parts.high, weights, &mut sums.high);
        tile(&parts.low, weights, &mut sums.low);
    }
}
