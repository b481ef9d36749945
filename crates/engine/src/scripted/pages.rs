//! KV pages that hold nothing: counted, shared and freed as a real decoder would.

use model::decoder::DecodeError;

/// All pages of a decoder.
pub(super) struct Pages {
    /// Sequences that hold each page.
    holders: Vec<u32>,
    free: Vec<u32>,
}

impl Pages {
    pub(super) fn new(count: u32) -> Self {
        Self {
            holders: vec![0; count as usize],
            free: (0..count).rev().collect(),
        }
    }

    pub(super) fn used(&self) -> u32 {
        (self.holders.len() - self.free.len()) as u32
    }

    pub(super) fn room(&self, needed: usize) -> Result<(), DecodeError> {
        if needed <= self.free.len() {
            return Ok(());
        }
        Err(DecodeError::KvFull {
            needed: needed as u32,
            free: self.free.len() as u32,
            total: self.holders.len() as u32,
        })
    }

    /// Moves up to `count` free pages into `to`; [`Pages::room`] said that there are so many.
    pub(super) fn take(&mut self, count: usize, to: &mut Vec<u32>) {
        for _ in 0..count.min(self.free.len()) {
            if let Some(page) = self.free.pop() {
                self.holders[page as usize] = 1;
                to.push(page);
            }
        }
    }

    pub(super) fn share(&mut self, pages: &[u32]) {
        pages
            .iter()
            .for_each(|page| self.holders[*page as usize] += 1);
    }

    pub(super) fn release(&mut self, pages: impl IntoIterator<Item = u32>) {
        for page in pages {
            self.holders[page as usize] -= 1;
            if self.holders[page as usize] == 0 {
                self.free.push(page);
            }
        }
    }
}
