//! The drafter's context: keys and values that its layers make of the target's taps.
//!
//! A step without drafts keeps its taps instead, up to `DEFERRED_ROWS` of them: the drafter's
//! weights are then read once for many tokens, and plain decoding hardly pays for a drafter that
//! waits. Invariant: before a sequence drafts, is forked, cut or extended, its context is complete.

use super::{BatchRow, CpuDecoder, gather};
use crate::network::Batch;

/// Rows whose taps are kept at most; rings keep more than these beyond their window.
pub(super) const DEFERRED_ROWS: usize = 16;

impl CpuDecoder {
    /// Floats that a row's taps are.
    pub(super) fn tap_columns(&self) -> usize {
        let drafter = self.drafter.as_ref();
        drafter.map_or(0, |d| d.config.taps.len() * d.config.hidden)
    }

    /// After a step: the context of `work.rows[taken]`, now, or later when nobody drafted.
    pub(super) fn keep_context(&mut self) {
        let drafted = self.work.group.iter().any(|&(_, width)| width > 1);
        if drafted || self.drafter.is_none() {
            return self.append_context();
        }
        let columns = self.tap_columns();
        for i in 0..self.work.taken.len() {
            let row = self.work.taken[i] as usize;
            let index = self.work.group[self.work.rows[row].sequence].0;
            let taps = &self.scratch.taps.as_mut_slice()[row * columns..(row + 1) * columns];
            self.sequences[index].pending.extend_from_slice(taps);
        }
        for i in 0..self.work.group.len() {
            let held = &self.sequences[self.work.group[i].0];
            if held.pending.len() >= DEFERRED_ROWS * columns {
                self.catch_up_member(i);
            }
        }
    }

    /// Completes the context of the group.
    pub(super) fn catch_up(&mut self) {
        for i in 0..self.work.group.len() {
            self.catch_up_member(i);
        }
    }

    /// Completes the context of one sequence, outside a step.
    pub(super) fn catch_up_one(&mut self, index: usize) {
        self.work.group.clear();
        self.work.group.push((index, 1));
        self.catch_up_member(0);
    }

    fn catch_up_member(&mut self, member: usize) {
        let columns = self.tap_columns().max(1);
        let held = &mut self.sequences[self.work.group[member].0];
        let count = held.pending.len() / columns;
        if count == 0 {
            return;
        }
        let taps = &mut self.scratch.taps.as_mut_slice()[..count * columns];
        taps.copy_from_slice(&held.pending);
        held.pending.clear();
        let first = held.computed - count;
        self.work.rows.clear();
        self.work.rows.extend((0..count).map(|k| BatchRow {
            sequence: member,
            position: first + k,
            token: 0,
        }));
        self.work.taken.clear();
        self.work.taken.extend(0..count as u32);
        self.append_context();
    }

    /// Writes the drafter's context of `work.rows[taken]`, which replace `work.rows`.
    pub(super) fn append_context(&mut self) {
        let Some(drafter) = &self.drafter else {
            return;
        };
        if self.work.taken.is_empty() {
            return;
        }
        for (i, &row) in self.work.taken.iter().enumerate() {
            self.work.rows[i] = self.work.rows[row as usize];
        }
        self.work.rows.truncate(self.work.taken.len());
        let sequences = gather(&self.sequences, &self.work.group);
        let batch = Batch {
            rows: &self.work.rows,
            sequences: &sequences,
            cache: &self.cache,
            scratch: &self.scratch,
            taps: &[],
        };
        let taken = &self.work.taken;
        self.pool
            .run(&|team| drafter.append_context(&self.network, team, &batch, taken));
    }
}
