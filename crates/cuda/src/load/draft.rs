//! A drafter's weights into the places of a [`Program`](crate::program::Program).
//!
//! Owns which matrix, row and column a packed element of the drafter has; embedding and lm_head are
//! the target's and not made here. Invariant: padding is zeros.

use model::draft::{Draft, DraftWeights};
use model::weights::Matrix;

use super::{head_column, put, qkv_row};
use crate::CudaError;
use crate::program::{
    DraftFormats, DraftWhat, LayerFormats, Piece, What, context_rows, inner_part, of_eight_rows,
    part, tap_columns, tap_stride,
};
use crate::strips::{Format, Map, Tiles};

/// Formats of a drafter's checkpoint.
#[must_use]
pub fn draft_formats(draft: &Draft, weights: &DraftWeights<'_>) -> DraftFormats {
    let of = |m: &Matrix<'_>| Format::of(m.encoding());
    let layers = weights.layers.iter().map(|l| LayerFormats {
        qkv: of(&l.q.matrix),
        o: of(&l.o.matrix),
        router: Format::Bf16,
        gate_up: of(&l.ffn.gate),
        down: of(&l.ffn.down),
    });
    DraftFormats {
        fc: of(&weights.fc),
        layers: layers.collect(),
        mask_embedding: draft.mask_embedding.is_some(),
        config: of_eight_rows(&draft.config),
    }
}

/// What the pieces of a drafter are made from.
pub struct DraftSource<'a> {
    /// Its formats and shape.
    pub formats: &'a DraftFormats,
    /// Its weights.
    pub weights: &'a DraftWeights<'a>,
    /// Stands for tokens that are not known yet.
    pub mask_embedding: Option<&'a [f32]>,
    /// This rank.
    pub rank: usize,
    /// Ranks.
    pub ranks: usize,
}

/// Rows below `rows` of the only matrix.
fn whole(rows: usize) -> impl Fn(usize) -> Option<(usize, usize)> {
    move |row| Some((0, row)).filter(|_| row < rows)
}

impl DraftSource<'_> {
    /// Bytes of `piece`; none when it is the target's.
    ///
    /// # Errors
    /// When stored scales do not fit the packed order.
    pub fn piece(&self, piece: &Piece) -> Result<Option<Vec<u8>>, CudaError> {
        let What::Draft(what) = piece.what else {
            return Ok(None);
        };
        let mut out = vec![0u8; piece.bytes];
        match piece.tiles {
            Some(tiles) => self.pages(what, piece.layer, tiles, &mut out)?,
            None => self.vector(what, piece.layer, &mut out),
        }
        Ok(Some(out))
    }

    fn vector(&self, what: DraftWhat, l: usize, out: &mut [u8]) {
        let (layer, w) = (&self.weights.layers[l], self.weights);
        match what {
            DraftWhat::InputNorm => put(out, &layer.input_norm),
            DraftWhat::PostNorm => put(out, &layer.post_norm),
            DraftWhat::FinalNorm => put(out, &w.norm),
            DraftWhat::HiddenNorm => put(out, &w.hidden_norm),
            DraftWhat::QNorm => put(out, &layer.q_norm),
            DraftWhat::KNorms => {
                let all: Vec<f32> = w.layers.iter().flat_map(|l| l.k_norm.clone()).collect();
                put(out, &all);
            }
            DraftWhat::Sinks => {
                let sinks = layer.sinks.as_deref().unwrap_or(&[]);
                put(out, &sinks[part(sinks.len(), self.rank, self.ranks)]);
            }
            DraftWhat::Mask => put(out, self.mask_embedding.unwrap_or(&[])),
            DraftWhat::OBias if self.rank == 0 => {
                put(out, layer.o.bias.as_deref().unwrap_or(&[]));
            }
            DraftWhat::QkvBias => self.biases(out, |row| {
                let (m, r) = qkv_row(&self.formats.config.attention, self.rank, self.ranks, row)?;
                let p = [&layer.q, &layer.k, &layer.v][m];
                p.bias.as_ref().map(|b| b[r])
            }),
            DraftWhat::ContextBias => self.biases(out, |row| {
                let (m, r) = self.context_row(row)?;
                let p = [&w.layers[m / 2].k, &w.layers[m / 2].v][m % 2];
                p.bias.as_ref().map(|b| b[r])
            }),
            _ => {}
        }
    }

    fn biases(&self, out: &mut [u8], of: impl Fn(usize) -> Option<f32>) {
        let rows = out.len() / 4;
        let all: Vec<f32> = (0..rows).map(|row| of(row).unwrap_or(0.0)).collect();
        put(out, &all);
    }

    /// Matrix (k then v, layer by layer) and its row of a packed row of the context.
    fn context_row(&self, row: usize) -> Option<(usize, usize)> {
        let a = &self.formats.config.attention;
        let (v_first, rows) = context_rows(a, self.ranks);
        let (layer, r) = (row / rows, row % rows);
        let (which, r, all) = match r < v_first {
            true => (0, r, a.kv_heads * a.qk_dim),
            false => (1, r - v_first, a.kv_heads * a.v_dim),
        };
        let of = part(all, self.rank, self.ranks);
        let row = of.start + r;
        (layer < self.weights.layers.len() && row < of.end).then_some((2 * layer + which, row))
    }

    fn pages(
        &self,
        what: DraftWhat,
        l: usize,
        tiles: Tiles,
        out: &mut [u8],
    ) -> Result<(), CudaError> {
        let (layer, config) = (&self.weights.layers[l], &self.formats.config);
        let (a, hidden, rank, ranks) = (&config.attention, config.hidden, self.rank, self.ranks);
        let columns = |k: usize| Some(k).filter(|_| k < hidden);
        let of = part(config.intermediate, rank, ranks);
        let first = inner_part(&self.formats.layers[l], config.intermediate, rank, ranks).start;
        let inner = |k: usize| Some(first + k).filter(|k| of.contains(k));
        match what {
            DraftWhat::Qkv => {
                let row = |row: usize| qkv_row(a, rank, ranks, row);
                let from = [&layer.q.matrix, &layer.k.matrix, &layer.v.matrix];
                pack(tiles, &from, &row, &columns, out)
            }
            DraftWhat::O => {
                let column = |k: usize| head_column(a, rank, ranks, k);
                pack(tiles, &[&layer.o.matrix], &whole(hidden), &column, out)
            }
            DraftWhat::GateUp => {
                let row = |r: usize| inner(r / 16 * 8 + r % 8).map(|column| (r % 16 / 8, column));
                let from = [&layer.ffn.gate, &layer.ffn.up];
                pack(tiles, &from, &row, &columns, out)
            }
            DraftWhat::Down => pack(tiles, &[&layer.ffn.down], &whole(hidden), &inner, out),
            DraftWhat::Fc => {
                let column = |k: usize| self.tap_column(k);
                pack(tiles, &[&self.weights.fc], &whole(hidden), &column, out)
            }
            _ => {
                let layers = self.weights.layers.iter();
                let from: Vec<&Matrix<'_>> =
                    layers.flat_map(|l| [&l.k.matrix, &l.v.matrix]).collect();
                let row = |row: usize| self.context_row(row);
                pack(tiles, &from, &row, &columns, out)
            }
        }
    }

    /// Column of `fc` of this rank's packed column `k`.
    fn tap_column(&self, k: usize) -> Option<usize> {
        let config = &self.formats.config;
        let own = tap_columns(config, self.rank, self.ranks);
        let (at, stride) = (own.start + k, tap_stride(config.hidden));
        let (tap, column) = (at / stride, at % stride);
        let inside = own.contains(&at) && tap < config.taps.len() && column < config.hidden;
        inside.then_some(tap * config.hidden + column)
    }
}

fn pack(
    tiles: Tiles,
    from: &[&Matrix<'_>],
    row: &dyn Fn(usize) -> Option<(usize, usize)>,
    column: &dyn Fn(usize) -> Option<usize>,
    out: &mut [u8],
) -> Result<(), CudaError> {
    tiles.pack(from, &Map { row, column }, out)
}
