//! A packed weight times activation rows: the one dispatch point over instruction sets.
//!
//! Every arm computes the same sums in the same order (`portable` is the definition), so that
//! results are bit-equal on every machine:
//! - MXFP4: per block of 32 columns an exact integer `i`, then `acc = fma(i, scale, acc)`;
//! - FP8: per 128 columns two chains of fma, even and odd columns, then
//!   `acc = fma(even + odd, scale, acc)`;
//! - FP8 for drafts ([`Panels::for_drafts`]): activations rounded to BF16, codes below the smallest
//!   normal taken as 0; the same two chains, columns in the order 2, 0 and 3, 1;
//! - BF16, F32: two chains of fma over all columns, even and odd, added at the end.

mod amx;
mod avx512;
mod portable;

use std::ops::Range;

use model::weights::Encoding;

use crate::activations::{ActivationRow, Activations};
use crate::isa::Isa;
use crate::panels::{PANEL, Panels};

/// Rows that one pass over a panel serves: what fits in 32 registers with two sums a row.
pub const GROUP: usize = 8;

/// Outputs of one panel for a group of rows.
pub type Outputs<const R: usize> = [[f32; PANEL]; R];

/// Bytes of weights that stay in a core's L2 while one group of rows after another uses them.
const SPAN_BYTES: usize = 128 << 10;

/// `matrix` times the rows `rows` of `x`, for the panels `panels`: `sink(i, panel, values)` gets the
/// 16 outputs of `rows[i]`.
///
/// # Safety
/// No thread writes these rows of `x` until the next barrier; `isa` is one that [`Isa::detect`]
/// allows here.
pub unsafe fn linear(
    isa: Isa,
    matrix: &Panels,
    panels: Range<usize>,
    x: &Activations,
    rows: &[u32],
    sink: impl FnMut(usize, usize, &[f32; PANEL]),
) {
    let weight = (matrix, matrix.is_for_drafts());
    // SAFETY: the same contract.
    unsafe { linear_as(isa, weight, panels, x, rows, sink) };
}

/// As [`linear`], with the rounding of drafts where `for_drafts`, whatever the matrix says of itself.
///
/// # Safety
/// As [`linear`].
pub unsafe fn linear_as(
    isa: Isa,
    (matrix, for_drafts): (&Panels, bool),
    panels: Range<usize>,
    x: &Activations,
    rows: &[u32],
    mut sink: impl FnMut(usize, usize, &[f32; PANEL]),
) {
    let span = match rows.len() > GROUP {
        true => (SPAN_BYTES * matrix.panels() / matrix.bytes().max(1)).max(1),
        false => panels.len().max(1),
    };
    let mut start = panels.start;
    while start < panels.end {
        let span = start..(start + span).min(panels.end);
        start = span.end;
        for (g, group) in rows.chunks(GROUP).enumerate() {
            let sink = |i, panel, values: &_| sink(g * GROUP + i, panel, values);
            // SAFETY: by contract of this function.
            unsafe { span_times_group(isa, (matrix, for_drafts), span.clone(), x, group, sink) };
        }
    }
}

/// A span of panels times at most [`GROUP`] rows.
///
/// # Safety
/// As [`linear`].
unsafe fn span_times_group(
    isa: Isa,
    (matrix, for_drafts): (&Panels, bool),
    span: Range<usize>,
    x: &Activations,
    group: &[u32],
    mut sink: impl FnMut(usize, usize, &[f32; PANEL]),
) {
    macro_rules! run {
        ($($r:literal),*) => {
            match group.len() {
                $($r => {
                    let rows: [ActivationRow<'_>; $r] = std::array::from_fn(|i| {
                        // SAFETY: by contract of this function.
                        unsafe { x.row(group[i] as usize, matrix.cols()) }
                    });
                    for panel in span {
                        let out = panel_times::<$r>(isa, (matrix, for_drafts), panel, &rows);
                        for (i, values) in out.iter().enumerate() {
                            sink(i, panel, values);
                        }
                    }
                })*
                _ => unreachable!("chunks of at most GROUP"),
            }
        };
    }
    run!(1, 2, 3, 4, 5, 6, 7, 8);
}

/// True when this process may use AMX tiles of bytes.
#[cfg(target_arch = "x86_64")]
pub(crate) fn amx_is_here() -> bool {
    amx::is_here()
}

/// One panel times `R` rows.
fn panel_times<const R: usize>(
    isa: Isa,
    (matrix, for_drafts): (&Panels, bool),
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
                    Encoding::Fp8 if for_drafts => match avx512::bf16_is_here() {
                        true => avx512::fp8_rounded(matrix, panel, rows),
                        false => portable::with_avx2(matrix, for_drafts, panel, rows),
                    },
                    Encoding::Fp8 => avx512::fp8(matrix, panel, rows),
                    Encoding::Bf16 => avx512::bf16(matrix, panel, rows),
                    Encoding::F32 => avx512::float(matrix, panel, rows),
                }
            };
        }
        // SAFETY: as above.
        (Isa::Avx2, _) => unsafe { return portable::with_avx2(matrix, for_drafts, panel, rows) },
        (Isa::Portable, _) => {}
    }
    let _ = isa;
    portable::panel(matrix, for_drafts, panel, rows)
}

#[cfg(test)]
mod tests;
