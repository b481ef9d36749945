//! Rotary embedding: `model::reference::rope` with the angles' sines and cosines kept by position.

use model::reference::rope::angle;

use crate::isa::{Isa, per_isa};

/// Sines and cosines of one rotary base, for all positions of a context.
pub struct RopeTable {
    dims: usize,
    theta: f32,
    /// `[positions, dims / 2, 2]`: sine, cosine.
    entries: Vec<f32>,
}

impl RopeTable {
    /// An empty table for `dims` rotated dimensions.
    #[must_use]
    pub fn new(dims: usize, theta: f32) -> Self {
        Self {
            dims,
            theta,
            entries: Vec::new(),
        }
    }

    /// True when the table is that of `dims` and `theta`.
    #[must_use]
    pub fn is(&self, dims: usize, theta: f32) -> bool {
        self.dims == dims && self.theta.to_bits() == theta.to_bits()
    }

    /// Makes the table reach `positions`; grows by half at least, so that steps rarely do.
    pub fn reach(&mut self, positions: usize) {
        let row = self.dims.max(1);
        let have = self.entries.len() / row;
        if have >= positions {
            return;
        }
        let wanted = positions.max(have + have / 2).next_multiple_of(1024);
        self.entries.reserve_exact((wanted - have) * row);
        for position in have..wanted {
            for i in 0..self.dims / 2 {
                let (sin, cos) = angle(position as u32, i, self.dims, self.theta).sin_cos();
                self.entries.extend([sin, cos]);
            }
        }
    }

    /// Rotates every head of one row in place. `heads`: `[count, head_dim]`.
    ///
    /// # Safety
    /// `isa` is one that [`Isa::detect`] allows here.
    pub unsafe fn rotate(&self, isa: Isa, heads: &mut [f32], head_dim: usize, position: u32) {
        let row = &self.entries[position as usize * self.dims..][..self.dims / 2 * 2];
        // SAFETY: by contract.
        unsafe { rotate_heads(isa, heads, head_dim, row) };
    }
}

per_isa! {
    /// `row`: `[dims / 2, 2]`, sine and cosine.
    fn rotate_heads(heads: &mut [f32], head_dim: usize, row: &[f32]) = rotate
}

#[inline(always)]
fn rotate(heads: &mut [f32], head_dim: usize, row: &[f32]) {
    for head in heads.chunks_exact_mut(head_dim) {
        let (first, second) = head.split_at_mut(row.len() / 2);
        for ((a, b), entry) in first.iter_mut().zip(second).zip(row.as_chunks::<2>().0) {
            let [sin, cos] = *entry;
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
