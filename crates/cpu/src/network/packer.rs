//! Packing of named matrices, with the source's pages given back as it goes.

use std::cell::Cell;

use model::weights::{Matrix, SwigluWeights};

use super::{DamagedWeight, PackedSwiglu};
use crate::buffer::Arena;
use crate::panels::Panels;
use crate::pool::Pool;

/// Packs named matrices.
pub(crate) struct Packer<'p> {
    pool: &'p Pool,
    took: &'p dyn Fn(u64),
    arena: Arena,
    /// Bytes packed since the last call of `took`.
    packed: Cell<usize>,
}

/// Bytes packed between two calls of `took`: what is in memory twice.
const RELEASE_BYTES: usize = 4 << 20;

impl<'p> Packer<'p> {
    /// `took` is called now and then with the source bytes that are done with.
    pub(crate) fn new(pool: &'p Pool, took: &'p dyn Fn(u64)) -> Self {
        Self {
            pool,
            took,
            arena: Arena::default(),
            packed: Cell::new(0),
        }
    }

    /// As [`Packer::matrix`], for products that only drafts come from.
    pub(crate) fn draft_matrix(
        &self,
        name: impl FnOnce() -> String,
        matrix: &Matrix<'_>,
    ) -> Result<Panels, DamagedWeight> {
        self.matrix(name, matrix).map(Panels::for_drafts)
    }

    pub(crate) fn matrix(
        &self,
        name: impl FnOnce() -> String,
        matrix: &Matrix<'_>,
    ) -> Result<Panels, DamagedWeight> {
        let packed = Panels::pack_in(matrix, self.pool, &self.arena);
        self.packed.set(self.packed.get() + matrix.bytes());
        if self.packed.get() >= RELEASE_BYTES {
            (self.took)(self.packed.replace(0) as u64);
        }
        packed.map_err(|source| DamagedWeight {
            tensor: name(),
            source,
        })
    }

    pub(crate) fn swiglu(
        &self,
        prefix: &str,
        weights: &SwigluWeights<'_>,
    ) -> Result<PackedSwiglu, DamagedWeight> {
        Ok(PackedSwiglu {
            gate: self.matrix(|| format!("{prefix}.gate_proj.weight"), &weights.gate)?,
            up: self.matrix(|| format!("{prefix}.up_proj.weight"), &weights.up)?,
            down: self.matrix(|| format!("{prefix}.down_proj.weight"), &weights.down)?,
        })
    }
}
