//! What a tap copies out: logits, hidden rows, drafter logits.

use model::decoder::{DecodeError, Decoder, TokenId};

use super::{CpuDecoder, PREFILL_ROWS, TAP_ROWS};

impl CpuDecoder {
    pub(super) fn tap_logits(
        &mut self,
        index: usize,
        tokens: &[TokenId],
        sink: &mut dyn FnMut(u32, &[f32]),
    ) -> Result<(), DecodeError> {
        self.append(index, tokens)?;
        let end = self.sequences[index].tokens.len();
        let vocab = self.network.config.vocab_size;
        self.compute(index, end, PREFILL_ROWS, None, |this, first, rows| {
            for part in (0..rows).step_by(TAP_ROWS) {
                let list: Vec<u32> = (part..rows.min(part + TAP_ROWS))
                    .map(|r| r as u32)
                    .collect();
                this.logits(&list);
                let logits = this.scratch.logits.as_mut_slice().chunks_exact(vocab);
                for (&row, logits) in list.iter().zip(logits) {
                    let position = first as u32 + row;
                    sink(position, finite(logits, "logits", position)?);
                }
            }
            Ok(())
        })
    }

    pub(super) fn tap_hidden(
        &mut self,
        index: usize,
        tokens: &[TokenId],
        layers: &[usize],
        sink: &mut dyn FnMut(u32, usize, &[f32]),
    ) -> Result<(), DecodeError> {
        self.append(index, tokens)?;
        let end = self.sequences[index].tokens.len();
        let hidden = self.network.config.hidden;
        self.compute(
            index,
            end,
            PREFILL_ROWS,
            Some(layers),
            |this, first, rows| {
                let taps = this.scratch.taps.as_mut_slice().chunks_exact(hidden);
                for (i, row) in taps.take(rows * layers.len()).enumerate() {
                    let position = first + i / layers.len();
                    sink(position as u32, i % layers.len(), row);
                }
                Ok(())
            },
        )
    }

    pub(super) fn tap_draft(
        &mut self,
        index: usize,
        tokens: &[TokenId],
        width: u32,
        sink: &mut dyn FnMut(u32, &[f32]),
    ) -> Result<(), DecodeError> {
        let id = self.sequences[index].id;
        self.prefill(id, tokens)?;
        let sequence = &mut self.sequences[index];
        if self.drafter.is_none() || sequence.tokens.is_empty() {
            return Ok(());
        }
        let end = sequence.computed + width as usize;
        self.cache
            .reserve(&mut sequence.kv, sequence.computed, end)?;
        let anchor = sequence.computed;
        self.work.group.clear();
        self.work.group.push((index, width as usize));
        self.draft_rows(false);
        self.run_drafter();
        let vocab = self.network.config.vocab_size;
        let logits = self.scratch.logits.as_mut_slice().chunks_exact(vocab);
        for (slot, row) in (1..width).zip(logits) {
            let position = anchor as u32 + slot;
            sink(slot, finite(row, "draft logits", position)?);
        }
        Ok(())
    }
}

fn finite<'a>(row: &'a [f32], what: &'static str, position: u32) -> Result<&'a [f32], DecodeError> {
    match row.iter().all(|x| x.is_finite()) {
        true => Ok(row),
        false => Err(DecodeError::NotFinite { what, position }),
    }
}
