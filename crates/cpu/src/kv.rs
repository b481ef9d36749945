//! Keys and values of every open sequence, in f32: pages for layers that see everything, a ring a
//! sequence for layers that slide. (BF16 moved the log-probabilities of the goldens by up to 5e-2.)
//!
//! ```text
//! page (64 positions of all full layers):  layer -> K [kv_head][group of 16][qk_dim][16]
//!                                                   V [kv_head][64][v_dim]
//! ring (one sequence, all sliding layers): layer -> K [kv_head][group of 16][qk_dim][16]
//!                                                   V [kv_head][slots][v_dim]
//! ```
//! Keys are transposed in groups of 16 positions, so that a register lane is a position and a score
//! needs no sum across lanes. Groups are aligned to absolute positions, so that the order of sums
//! does not depend on where a sequence was forked. Pages are shared by reference count and copied
//! when a sequence writes to a shared one. A ring keeps its window and some rows
//! more, so that a verify block can be cut; snapshots taken while a prompt is read let a fork go
//! back further.

use std::ops::Range;

use model::decoder::DecodeError;

use crate::buffer::Buffer;

/// Positions of a page.
pub const PAGE: usize = 64;
/// Positions of a key group: lanes.
pub const GROUP: usize = 16;
/// Rows that a ring keeps beyond its window: the widest verify block, the group at either end, and
/// what a rewind of a few steps needs.
const RING_SPARE: usize = 64 + 3 * GROUP;
/// Positions between two snapshots of the rings, and how many are kept.
const SNAPSHOT_EVERY: usize = 256;
const SNAPSHOTS_MAX: usize = 8;

/// Keys and values of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Key and value heads.
    pub kv_heads: usize,
    /// Columns of a key head.
    pub qk_dim: usize,
    /// Columns of a value head.
    pub v_dim: usize,
    /// Previous positions that are seen; `None` sees all.
    pub window: Option<usize>,
}

impl LayerShape {
    /// Elements of keys and values for `positions` positions.
    fn elements(&self, positions: usize) -> usize {
        self.kv_heads * (self.qk_dim + self.v_dim) * positions
    }
}

/// Where a layer's keys and values lie in its page or ring.
#[derive(Clone, Copy, Debug)]
struct Place {
    shape: LayerShape,
    offset: usize,
    /// Positions of the page or ring.
    slots: usize,
}

/// The cache of a decoder.
pub struct KvCache {
    places: Vec<Place>,
    page_elements: usize,
    ring_elements: usize,
    pool: Buffer<f32>,
    references: Vec<u32>,
    free: Vec<u32>,
}

/// Keys and values of one sequence.
pub struct KvSequence {
    pages: Vec<u32>,
    ring: Buffer<f32>,
    /// Positions written so far at the most; the ring holds the last of them.
    written: usize,
    snapshots: Vec<Snapshot>,
}

struct Snapshot {
    positions: usize,
    ring: Buffer<f32>,
}

/// A run of positions whose keys and values lie together: at most a group.
#[derive(Clone, Copy, Debug)]
pub struct GroupView<'a> {
    /// `[qk_dim, 16]`.
    pub keys: &'a [f32],
    /// `[16, v_dim]`.
    pub values: &'a [f32],
}

impl KvCache {
    /// A cache of `pages` pages for `layers`.
    #[must_use]
    pub fn new(layers: &[LayerShape], pages: usize) -> Self {
        let (mut page_elements, mut ring_elements) = (0, 0);
        let places = layers
            .iter()
            .map(|&shape| {
                let (total, slots) = match shape.window {
                    None => (&mut page_elements, PAGE),
                    Some(window) => (
                        &mut ring_elements,
                        (window + 1 + RING_SPARE).next_multiple_of(GROUP),
                    ),
                };
                let offset = *total;
                *total += shape.elements(slots);
                Place {
                    shape,
                    offset,
                    slots,
                }
            })
            .collect();
        Self {
            places,
            page_elements,
            ring_elements,
            pool: Buffer::new(page_elements * pages),
            references: vec![0; pages],
            free: (0..pages as u32).rev().collect(),
        }
    }

    /// Pages in all.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.references.len()
    }

    /// Pages held.
    #[must_use]
    pub fn pages_used(&self) -> usize {
        self.references.len() - self.free.len()
    }

    /// Bytes of a page, and of the rings of a sequence.
    #[must_use]
    pub fn bytes(&self) -> (usize, usize) {
        (self.page_elements * 4, self.ring_elements * 4)
    }

    /// An empty sequence.
    #[must_use]
    pub fn open(&self) -> KvSequence {
        KvSequence {
            pages: Vec::new(),
            ring: Buffer::new(self.ring_elements),
            written: 0,
            snapshots: Vec::new(),
        }
    }

    /// Pages that have to be taken before rows `from..to` of `sequence` are written: new ones, and
    /// copies of shared ones.
    #[must_use]
    pub fn missing(&self, sequence: &KvSequence, from: usize, to: usize) -> usize {
        match self.page_elements {
            0 => 0,
            _ => {
                let new = to.div_ceil(PAGE).saturating_sub(sequence.pages.len());
                new + self.shared(sequence, from).count()
            }
        }
    }

    /// Indices of shared pages that rows from `from` on would be written to.
    fn shared(&self, sequence: &KvSequence, from: usize) -> impl Iterator<Item = usize> {
        (from / PAGE..sequence.pages.len())
            .filter(|&i| self.references[sequence.pages[i] as usize] > 1)
    }

    /// Makes rows `from..to` writable.
    ///
    /// # Errors
    /// [`DecodeError::KvFull`]; nothing changes.
    pub fn reserve(
        &mut self,
        sequence: &mut KvSequence,
        from: usize,
        to: usize,
    ) -> Result<(), DecodeError> {
        let needed = self.missing(sequence, from, to);
        if needed > self.free.len() {
            return Err(DecodeError::KvFull {
                needed: needed as u32,
                free: self.free.len() as u32,
                total: self.pages() as u32,
            });
        }
        loop {
            let next = self.shared(sequence, from).next();
            let Some(index) = next else { break };
            let (old, new) = (sequence.pages[index] as usize, self.take());
            let size = self.page_elements;
            let pool = self.pool.as_mut_slice();
            pool.copy_within(old * size..(old + 1) * size, new as usize * size);
            self.references[old] -= 1;
            sequence.pages[index] = new;
        }
        while self.missing(sequence, from, to) > 0 {
            let page = self.take();
            sequence.pages.push(page);
        }
        Ok(())
    }

    fn take(&mut self) -> u32 {
        let page = self.free.pop().expect("counted before");
        self.references[page as usize] = 1;
        page
    }

    /// Says that rows up to `positions` are written; keeps a snapshot of the rings now and then.
    pub fn advance(&self, sequence: &mut KvSequence, positions: usize, prompt: bool) {
        let due = positions / SNAPSHOT_EVERY > sequence.written / SNAPSHOT_EVERY;
        sequence.written = sequence.written.max(positions);
        if prompt && due && self.ring_elements > 0 {
            if sequence.snapshots.len() == SNAPSHOTS_MAX {
                sequence.snapshots.remove(0);
            }
            sequence.snapshots.push(Snapshot {
                positions,
                ring: copy(&mut sequence.ring),
            });
        }
    }

    /// The most positions, at most `wanted`, that a sequence can be cut to with whole windows.
    #[must_use]
    pub fn restorable(&self, sequence: &KvSequence, wanted: usize) -> usize {
        if self.in_ring(sequence, wanted) {
            return wanted;
        }
        let snapshots = sequence.snapshots.iter().map(|s| s.positions);
        snapshots.filter(|&p| p <= wanted).max().unwrap_or(0)
    }

    /// True when the rings still hold the windows of a sequence of `positions` positions.
    #[must_use]
    pub fn in_ring(&self, sequence: &KvSequence, positions: usize) -> bool {
        let rings = self.places.iter().filter_map(|place| {
            let window = place.shape.window?;
            Some((window, place.slots))
        });
        // The next row looks back `window` positions; slots of rows up to `written` are taken, and
        // the group of the first visible position has to be whole.
        rings.into_iter().all(|(window, slots)| {
            let first = positions.saturating_sub(window) / GROUP * GROUP;
            positions <= sequence.written && sequence.written <= first + slots
        })
    }

    /// A sequence that shares the first `positions` positions, which [`KvCache::restorable`] gave.
    /// The last page is shared too, even when partly filled: whoever writes first copies it.
    #[must_use]
    pub fn fork(&mut self, parent: &mut KvSequence, positions: usize) -> KvSequence {
        let mut child = self.open();
        if self.page_elements > 0 {
            child.pages = parent.pages[..positions.div_ceil(PAGE)].to_vec();
        }
        for &page in &child.pages {
            self.references[page as usize] += 1;
        }
        if self.in_ring(parent, positions) {
            child.ring = copy(&mut parent.ring);
            child.written = parent.written;
        } else if let Some(snapshot) = parent
            .snapshots
            .iter_mut()
            .find(|s| s.positions == positions)
        {
            child.ring = copy(&mut snapshot.ring);
            child.written = positions;
        }
        for snapshot in &mut parent.snapshots {
            if snapshot.positions <= positions {
                child.snapshots.push(Snapshot {
                    positions: snapshot.positions,
                    ring: copy(&mut snapshot.ring),
                });
            }
        }
        child
    }

    /// Gives back the pages beyond `positions` positions.
    pub fn truncate(&mut self, sequence: &mut KvSequence, positions: usize) {
        let keep = positions.div_ceil(PAGE);
        while sequence.pages.len() > keep {
            let page = sequence.pages.pop().expect("longer than keep");
            self.references[page as usize] -= 1;
            if self.references[page as usize] == 0 {
                self.free.push(page);
            }
        }
        sequence.snapshots.retain(|s| s.positions <= positions);
    }

    /// Writes the row at `position` of layer `layer`. `key`: `[kv_heads, qk_dim]`; `value`:
    /// `[kv_heads, v_dim]`.
    ///
    /// # Safety
    /// No other thread touches this position of this layer until the next barrier; the position was
    /// reserved.
    pub unsafe fn write(
        &self,
        sequence: &KvSequence,
        layer: usize,
        position: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let place = &self.places[layer];
        let LayerShape {
            kv_heads,
            qk_dim,
            v_dim,
            ..
        } = place.shape;
        let (buffer, base, slot) = self.locate(sequence, place, position);
        for head in 0..kv_heads {
            let keys = base + (head * place.slots + slot / GROUP * GROUP) * qk_dim;
            let range = keys..keys + GROUP * qk_dim;
            // SAFETY: other rows of the group are written by other threads, but other elements of
            // it: this goes through single elements only, by contract exclusively ours.
            let group = unsafe { buffer.cells(range) };
            for (column, x) in group[slot % GROUP..]
                .iter()
                .step_by(GROUP)
                .zip(&key[head * qk_dim..])
            {
                column.set(*x);
            }
            let values =
                base + kv_heads * place.slots * qk_dim + (head * place.slots + slot) * v_dim;
            // SAFETY: by contract.
            let row = unsafe { buffer.write(values..values + v_dim) };
            for (x, value) in row.iter_mut().zip(&value[head * v_dim..]) {
                *x = *value;
            }
        }
    }

    /// The group of 16 positions from `first` (a multiple of 16) of one head.
    ///
    /// # Safety
    /// No thread writes positions that the caller reads until the next barrier.
    #[must_use]
    pub unsafe fn group<'a>(
        &'a self,
        sequence: &'a KvSequence,
        layer: usize,
        head: usize,
        first: usize,
    ) -> GroupView<'a> {
        let place = &self.places[layer];
        let LayerShape {
            kv_heads,
            qk_dim,
            v_dim,
            ..
        } = place.shape;
        let (buffer, base, slot) = self.locate(sequence, place, first);
        let keys = base + (head * place.slots + slot) * qk_dim;
        let values = base + kv_heads * place.slots * qk_dim + (head * place.slots + slot) * v_dim;
        // SAFETY: by contract.
        unsafe {
            GroupView {
                keys: buffer.read(keys..keys + GROUP * qk_dim),
                values: buffer.read(values..values + GROUP * v_dim),
            }
        }
    }

    /// Buffer, start of the layer in it, and slot of a position.
    fn locate<'a>(
        &'a self,
        sequence: &'a KvSequence,
        place: &Place,
        position: usize,
    ) -> (&'a Buffer<f32>, usize, usize) {
        match place.shape.window {
            None => {
                let page = sequence.pages[position / PAGE] as usize;
                let base = page * self.page_elements + place.offset;
                (&self.pool, base, position % PAGE)
            }
            Some(_) => (&sequence.ring, place.offset, position % place.slots),
        }
    }

    /// Positions that a query at `position` sees in layer `layer`.
    #[must_use]
    pub fn visible(&self, layer: usize, position: usize) -> Range<usize> {
        model::reference::attention::visible(position, self.places[layer].shape.window)
    }
}

fn copy(from: &mut Buffer<f32>) -> Buffer<f32> {
    let mut to = Buffer::new(from.len());
    to.as_mut_slice().copy_from_slice(from.as_mut_slice());
    to
}
