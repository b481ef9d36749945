//! Activation rows in the forms that the products read.
//!
//! - `plain`: f32, for BF16 and F32 weights.
//! - `lifted`: f32 times 2^60, for FP8 weights: their codes are used as f32 bit patterns, which is
//!   the weight times 2^-120 (subnormals included), and both factors leave with the block's scale.
//! - `rounded`: `lifted` as BF16, for the drafter's products with FP8 weights: twice the speed, and a
//!   draft may be approximate, because the target judges it.
//! - `fixed`: for MXFP4 weights, 15-bit fixed point a block of 32: `x = scale (128 high + low)` with
//!   both parts in an i8. E2M1 times 2 is a small integer, so products and sums inside a block are
//!   exact in i32 and in f32, in any order; what is rounded is x, to 1/16256 of the block's largest
//!   (bf16 rounds to 1/256).

use formats::mxfp4::BLOCK;

use crate::buffer::Buffer;
use crate::isa::{Isa, per_isa};

/// 2^60: see the top of the file.
pub const LIFT: f32 = (1u64 << 60) as f32;
/// Largest fixed-point magnitude: both parts stay within i8.
const FIXED_MAX: f32 = 127.0 * 128.0;
/// Rows are padded to this many columns, so that kernels read whole groups.
const PAD: usize = BLOCK;

/// Rows in all forms. The number of columns is that of the rows at hand: a buffer serves
/// layers of different widths one after another.
pub struct Activations {
    plain: Buffer<f32>,
    lifted: Buffer<f32>,
    /// Per 4 columns: 0, 2, 1, 3.
    rounded: Buffer<u16>,
    /// Per block: 32 high parts, then 32 low parts.
    fixed: Buffer<i8>,
    /// Per block: half the scale (weights are 2 E2M1).
    scales: Buffer<f32>,
    /// Per block: -12 times the sum (weights are stored as 2 E2M1 + 12).
    offsets: Buffer<i32>,
}

/// One row.
#[derive(Clone, Copy)]
pub struct ActivationRow<'a> {
    /// `[cols]`, zeros up to a multiple of 32.
    pub plain: &'a [f32],
    /// `plain` times 2^60.
    pub lifted: &'a [f32],
    /// `lifted` to nearest even BF16; of every 4 columns 0, 2, 1, 3.
    pub rounded: &'a [u16],
    /// `[blocks, 64]`.
    pub fixed: &'a [i8],
    /// `[blocks]`.
    pub scales: &'a [f32],
    /// `[blocks]`.
    pub offsets: &'a [i32],
}

impl Activations {
    /// Room for `rows` rows of `cols` columns, or as much in other shapes.
    #[must_use]
    pub fn new(rows: usize, cols: usize) -> Self {
        let elements = rows * cols.next_multiple_of(PAD);
        let blocks = elements / BLOCK;
        Self {
            plain: Buffer::new(elements),
            lifted: Buffer::new(elements),
            rounded: Buffer::new(elements),
            fixed: Buffer::new(blocks * 2 * BLOCK),
            scales: Buffer::new(blocks),
            offsets: Buffer::new(blocks),
        }
    }

    /// Writes row `row` from its f32 values.
    ///
    /// # Safety
    /// No other thread touches this row until the next barrier; `isa` is one that [`Isa::detect`]
    /// allows here.
    pub unsafe fn set(&self, isa: Isa, row: usize, values: &[f32]) {
        let stride = values.len().next_multiple_of(PAD);
        let columns = row * stride..(row + 1) * stride;
        let blocks = columns.start / BLOCK..columns.end / BLOCK;
        // SAFETY: this thread has the row to itself, by contract.
        let (plain, lifted, rounded, fixed, scales, offsets) = unsafe {
            (
                self.plain.write(columns.clone()),
                self.lifted.write(columns.clone()),
                self.rounded.write(columns),
                self.fixed
                    .write(blocks.start * 2 * BLOCK..blocks.end * 2 * BLOCK),
                self.scales.write(blocks.clone()),
                self.offsets.write(blocks),
            )
        };
        // SAFETY: by contract.
        unsafe { fill(isa, values, plain, lifted, rounded, fixed, scales, offsets) };
    }

    /// Row `row` of rows of `cols` columns.
    ///
    /// # Safety
    /// No thread writes this row until the next barrier.
    #[must_use]
    pub unsafe fn row(&self, row: usize, cols: usize) -> ActivationRow<'_> {
        let stride = cols.next_multiple_of(PAD);
        let columns = row * stride..(row + 1) * stride;
        let blocks = columns.start / BLOCK..columns.end / BLOCK;
        // SAFETY: by contract.
        unsafe {
            ActivationRow {
                plain: self.plain.read(columns.clone()),
                lifted: self.lifted.read(columns.clone()),
                rounded: self.rounded.read(columns),
                fixed: self
                    .fixed
                    .read(blocks.start * 2 * BLOCK..blocks.end * 2 * BLOCK),
                scales: self.scales.read(blocks.clone()),
                offsets: self.offsets.read(blocks),
            }
        }
    }
}

per_isa! {
    /// All forms of one row.
    fn fill(
        values: &[f32],
        plain: &mut [f32],
        lifted: &mut [f32],
        rounded: &mut [u16],
        fixed: &mut [i8],
        scales: &mut [f32],
        offsets: &mut [i32],
    ) = fill_forms
}

#[inline(always)]
fn fill_forms(
    values: &[f32],
    plain: &mut [f32],
    lifted: &mut [f32],
    rounded: &mut [u16],
    fixed: &mut [i8],
    scales: &mut [f32],
    offsets: &mut [i32],
) {
    let (used, pad) = plain.split_at_mut(values.len());
    used.copy_from_slice(values);
    pad.fill(0.0);
    for (lifted, plain) in lifted.iter_mut().zip(&*plain) {
        *lifted = plain * LIFT;
    }
    let fours = lifted.as_chunks::<4>().0.iter();
    for (x, out) in fours.zip(rounded.as_chunks_mut::<4>().0) {
        *out = [round(x[0]), round(x[2]), round(x[1]), round(x[3])];
    }
    let blocks = plain.as_chunks::<BLOCK>().0.iter();
    let outs = fixed.as_chunks_mut::<{ 2 * BLOCK }>().0.iter_mut();
    for (((block, out), scale), offset) in blocks.zip(outs).zip(scales).zip(offsets) {
        (*scale, *offset) = fix(block, out);
    }
}

/// The upper half of the nearest BF16, ties to even; NaN stays NaN.
#[inline(always)]
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    let quiet = bits | 0x0040_0000;
    (if x.is_nan() { quiet } else { nearest } >> 16) as u16
}

/// One block to fixed point: `out` is 32 high parts, then 32 low ones; returns half the scale and
/// the offset. NaN and infinity make the scale NaN, so that they reach the output.
#[inline(always)]
fn fix(block: &[f32; BLOCK], out: &mut [i8; 2 * BLOCK]) -> (f32, i32) {
    let largest = block
        .iter()
        .fold(0u32, |m, x| m.max(x.to_bits() & 0x7FFF_FFFF));
    let largest = f32::from_bits(largest);
    let inverse = FIXED_MAX / largest;
    if !inverse.is_finite() || !largest.is_finite() {
        // Zeros and subnormals, or not a number at all.
        out.fill(0);
        let scale = if largest.is_finite() { 0.0 } else { f32::NAN };
        return (scale, 0);
    }
    // Adding it rounds to the nearest integer, ties to even, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    let mut sum = 0;
    let (high, low) = out.split_at_mut(BLOCK);
    for ((x, high), low) in block.iter().zip(high).zip(low) {
        let fixed = (x * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
        let upper = (fixed + 64) >> 7;
        *high = upper as i8;
        *low = (fixed - (upper << 7)) as i8;
        sum += fixed;
    }
    (largest / FIXED_MAX * 0.5, -12 * sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn fixed_point_rounds_to_15_bits(values in prop::collection::vec(-1e3f32..1e3, 40)) {
            let activations = Activations::new(1, 40);
            // SAFETY: one thread.
            let row = unsafe { activations.set(Isa::detect(), 0, &values); activations.row(0, values.len()) };
            for (b, block) in values.chunks(BLOCK).enumerate() {
                let largest = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let mut sum = 0;
                for (i, x) in block.iter().enumerate() {
                    let part = |at: usize| i32::from(row.fixed[b * 64 + at]);
                    let fixed = part(i) * 128 + part(32 + i);
                    sum += fixed;
                    let back = fixed as f32 * row.scales[b] * 2.0;
                    prop_assert!((back - x).abs() <= largest / FIXED_MAX * 0.51);
                }
                prop_assert_eq!(row.offsets[b], -12 * sum);
            }
        }
    }

    #[test]
    fn what_is_no_number_reaches_the_output() {
        let activations = Activations::new(1, 32);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = [1.0; 32];
            values[7] = bad;
            // SAFETY: one thread.
            let row = unsafe {
                activations.set(Isa::detect(), 0, &values);
                activations.row(0, values.len())
            };
            assert!(row.scales[0].is_nan());
        }
    }
}
