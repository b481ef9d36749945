//! A packed weight times activation rows: the one dispatch point over instruction sets.
//!
//! Every arm computes the same sums in the same order (`portable` is the definition), so that
//! results are bit-equal on every machine:
//! - MXFP4: per block of 32 columns an exact integer `i`, then `acc = fma(i, scale, acc)`;
//! - FP8: per 128 columns two chains of fma, even and odd columns, then
//!   `acc = fma(even + odd, scale, acc)`;
//! - BF16, F32: two chains of fma over all columns, even and odd, added at the end.

mod amx;
mod avx512;
mod portable;

use model::weights::Encoding;

use crate::activations::{ActivationRow, Activations};
use crate::panels::{PANEL, Panels};

/// Rows that one pass over a panel serves: what fits in 32 registers with two sums a row.
pub const GROUP: usize = 8;

/// Outputs of one panel for a group of rows.
pub type Outputs<const R: usize> = [[f32; PANEL]; R];

/// Instruction sets, best last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust; a fused multiply-add is a library call where the processor has none.
    Portable,
    /// The portable code compiled for AVX2 and FMA.
    Avx2,
    /// Hand-written, with VNNI.
    Avx512,
    /// AVX-512, and AMX tiles for MXFP4 products of many rows.
    Amx,
}

impl Isa {
    /// The best of this machine.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if avx512 && amx::is_here() {
                return Self::Amx;
            }
            if avx512 {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

/// `matrix` times the rows `rows` of `x`, for the panels `panels`: `sink(i, panel, values)` gets the
/// 16 outputs of `rows[i]`.
///
/// # Safety
/// No thread writes these rows of `x` until the next barrier.
pub unsafe fn linear(
    isa: Isa,
    matrix: &Panels,
    panels: std::ops::Range<usize>,
    x: &Activations,
    rows: &[u32],
    mut sink: impl FnMut(usize, usize, &[f32; PANEL]),
) {
    for panel in panels {
        for (g, group) in rows.chunks(GROUP).enumerate() {
            // SAFETY: by contract of this function.
            let row = |i: usize| unsafe { x.row(group[i] as usize, matrix.cols()) };
            macro_rules! run {
                ($($r:literal),*) => {
                    match group.len() {
                        $($r => {
                            let rows: [ActivationRow<'_>; $r] = std::array::from_fn(row);
                            let out = panel_times::<$r>(isa, matrix, panel, &rows);
                            for (i, values) in out.iter().enumerate() {
                                sink(g * GROUP + i, panel, values);
                            }
                        })*
                        _ => unreachable!("chunks of at most GROUP"),
                    }
                };
            }
            run!(1, 2, 3, 4, 5, 6, 7, 8);
        }
    }
}

/// One panel times `R` rows.
fn panel_times<const R: usize>(
    isa: Isa,
    matrix: &Panels,
    panel: usize,
    rows: &[ActivationRow<'_>; R],
) -> Outputs<R> {
    #[cfg(target_arch = "x86_64")]
    match (isa, matrix.encoding()) {
        // SAFETY: `Isa::detect` found the features; panels and rows have their types' lengths.
        (Isa::Amx, Encoding::Mxfp4) if R >= amx::ROWS_MIN => unsafe {
            return amx::mxfp4(matrix, panel, rows);
        },
        (Isa::Avx512 | Isa::Amx, encoding) => {
            // SAFETY: as above.
            return unsafe {
                match encoding {
                    Encoding::Mxfp4 => avx512::mxfp4(matrix, panel, rows),
                    Encoding::Fp8 => avx512::fp8(matrix, panel, rows),
                    Encoding::Bf16 => avx512::bf16(matrix, panel, rows),
                    Encoding::F32 => avx512::float(matrix, panel, rows),
                }
            };
        }
        // SAFETY: as above.
        (Isa::Avx2, _) => unsafe { return portable::with_avx2(matrix, panel, rows) },
        (Isa::Portable, _) => {}
    }
    let _ = isa;
    portable::panel(matrix, panel, rows)
}

#[cfg(test)]
mod tests;
