//! A checkpoint's weights into the places of a [`Program`]: which matrix, row and column every packed
//! element has.
//!
//! Owns no bytes: `piece` makes one piece at a time, for whoever copies it to the device. Invariant:
//! padding is zeros, so that it adds nothing.

mod draft;

pub use draft::{DraftSource, draft_formats};

use model::Config;
use model::config::{AttentionConfig, FfnConfig};
use model::draft::{Draft, DraftWeights};
use model::reference::rope::angle;
use model::weights::{FfnWeights, LayerWeights, Matrix, SwigluWeights, Weights};

use crate::CudaError;
use crate::program::{
    Formats, HEAD_COLUMNS, LayerFormats, Piece, Program, Turns, What, inner_part, part, qkv_rows,
};
use crate::strips::{Format, Map, Tiles};

/// Formats of a checkpoint, and of its drafter's, if it has one.
#[must_use]
pub fn formats(weights: &Weights<'_>, drafter: Option<(&Draft, &DraftWeights<'_>)>) -> Formats {
    let of = |m: &Matrix<'_>| Format::of(m.encoding());
    Formats {
        layers: weights.layers.iter().map(layer_formats).collect(),
        embed_bf16: of(&weights.embed) == Format::Bf16,
        lm_head: of(&weights.lm_head),
        draft: drafter.map(|(draft, weights)| draft_formats(draft, weights)),
    }
}

/// Formats of one layer.
pub(crate) fn layer_formats(l: &LayerWeights<'_>) -> LayerFormats {
    let of = |m: &Matrix<'_>| Format::of(m.encoding());
    let (router, unit) = match &l.ffn {
        FfnWeights::Dense(unit) => (Format::Bf16, unit),
        FfnWeights::Moe {
            router, experts, ..
        } => (of(router), &experts[0]),
    };
    LayerFormats {
        qkv: of(&l.q),
        o: of(&l.o),
        router,
        gate_up: of(&unit.gate),
        down: of(&unit.down),
    }
}

/// This rank's rows of q, k and v.
fn qkv_row(a: &AttentionConfig, rank: usize, ranks: usize, row: usize) -> Option<(usize, usize)> {
    let (k, v, end) = qkv_rows(a, ranks);
    let place = |matrix: usize, first: usize, rows: usize| {
        let of = part(rows, rank, ranks);
        Some((matrix, of.start + row - first)).filter(|&(_, r)| r < of.end)
    };
    match row {
        _ if row < k => place(0, 0, a.heads * a.qk_dim),
        _ if row < v => place(1, k, a.kv_heads * a.qk_dim),
        _ if row < end => place(2, v, a.kv_heads * a.v_dim),
        _ => None,
    }
}

fn unit<'a>(layer: &'a LayerWeights<'a>, expert: usize) -> &'a SwigluWeights<'a> {
    match &layer.ffn {
        FfnWeights::Dense(unit) => unit,
        FfnWeights::Moe { experts, .. } => &experts[expert],
    }
}

fn inner_width(ffn: &FfnConfig) -> usize {
    match ffn {
        FfnConfig::Dense { intermediate } => *intermediate,
        FfnConfig::Moe(moe) => moe.intermediate,
    }
}

/// What the pieces of a model are made from.
pub struct Source<'a> {
    /// Its config.
    pub config: &'a Config,
    /// Its weights.
    pub weights: &'a Weights<'a>,
    /// Its formats.
    pub formats: &'a Formats,
    /// This rank.
    pub rank: usize,
    /// Ranks.
    pub ranks: usize,
}

impl Source<'_> {
    /// Bytes of `piece`.
    ///
    /// # Errors
    /// When stored scales do not fit the packed order.
    pub fn piece(&self, piece: &Piece) -> Result<Vec<u8>, CudaError> {
        let mut out = vec![0u8; piece.bytes];
        not_the_drafters(piece)?;
        let layer = &self.weights.layers[piece.layer];
        match piece.what {
            What::Embed => self.embed(&mut out),
            What::InputNorm => put(&mut out, &layer.input_norm),
            What::PostNorm => put(&mut out, &layer.post_norm),
            What::FinalNorm => put(&mut out, &self.weights.norm),
            What::Sinks => {
                let sinks = layer.sinks.as_deref().unwrap_or(&[]);
                put(&mut out, &sinks[part(sinks.len(), self.rank, self.ranks)]);
            }
            What::Bias => {
                if let FfnWeights::Moe {
                    correction_bias, ..
                } = &layer.ffn
                {
                    put(&mut out, correction_bias);
                }
            }
            _ => self.pages(piece, layer, &mut out)?,
        }
        Ok(out)
    }

    fn embed(&self, out: &mut [u8]) {
        let embed = &self.weights.embed;
        let mut row = vec![0.0; embed.cols];
        let size = out.len() / embed.rows;
        for (r, out) in out.chunks_exact_mut(size).enumerate() {
            embed.row(r).decode(&mut row);
            if self.formats.embed_bf16 {
                for (out, v) in out.chunks_exact_mut(2).zip(&row) {
                    out.copy_from_slice(&formats::bf16::encode(*v).to_le_bytes());
                }
            } else {
                put(out, &row);
            }
        }
    }

    fn pages(
        &self,
        piece: &Piece,
        layer: &LayerWeights<'_>,
        out: &mut [u8],
    ) -> Result<(), CudaError> {
        let Some(tiles) = piece.tiles else {
            return Ok(());
        };
        let c = &self.config.layers[piece.layer];
        let (rank, ranks) = (self.rank, self.ranks);
        let whole = |rows: usize| move |row: usize| Some((0, row)).filter(|_| row < rows);
        let hidden = self.config.hidden;
        let columns = |k: usize| Some(k).filter(|_| k < hidden);
        let inner = inner_width(&c.ffn);
        let of = part(inner, rank, ranks);
        let first = inner_part(&self.formats.layers[piece.layer], inner, rank, ranks).start;
        let inner_column = |k: usize| Some(first + k).filter(|k| of.contains(k));
        match piece.what {
            What::Qkv => {
                let row = |row: usize| qkv_row(&c.attention, rank, ranks, row);
                let map = Map {
                    row: &row,
                    column: &columns,
                };
                tiles.pack(&[&layer.q, &layer.k, &layer.v], &map, out)
            }
            What::O => {
                let column = |k: usize| head_column(&c.attention, rank, ranks, k);
                let map = Map {
                    row: &whole(hidden),
                    column: &column,
                };
                tiles.pack(&[&layer.o], &map, out)
            }
            What::GateUp(expert) => {
                let unit = unit(layer, expert);
                // Of each 16 rows 8 are gate rows and 8 the up rows of the same inner columns.
                let row =
                    |r: usize| inner_column(r / 16 * 8 + r % 8).map(|column| (r % 16 / 8, column));
                let map = Map {
                    row: &row,
                    column: &columns,
                };
                tiles.pack(&[&unit.gate, &unit.up], &map, out)
            }
            What::Down(expert) => {
                let map = Map {
                    row: &whole(hidden),
                    column: &inner_column,
                };
                tiles.pack(&[&unit(layer, expert).down], &map, out)
            }
            What::Router => {
                let FfnWeights::Moe { router, .. } = &layer.ffn else {
                    return Ok(());
                };
                let map = Map {
                    row: &whole(router.rows),
                    column: &columns,
                };
                tiles.pack(&[router], &map, out)
            }
            _ => self.lm_head(tiles, &columns, out),
        }
    }

    fn lm_head(
        &self,
        tiles: Tiles,
        column: &dyn Fn(usize) -> Option<usize>,
        out: &mut [u8],
    ) -> Result<(), CudaError> {
        let of = part(self.config.vocab_size, self.rank, self.ranks);
        let row = |row: usize| Some((0, of.start + row)).filter(|r| r.1 < of.end);
        tiles.pack(&[&self.weights.lm_head], &Map { row: &row, column }, out)
    }
}

/// Refuses what only a [`DraftSource`] has.
fn not_the_drafters(piece: &Piece) -> Result<(), CudaError> {
    match piece.what {
        What::Draft(_) => Err(CudaError::Shape {
            what: "weights",
            expected: "a drafter's, which the program has".into(),
            found: "none".into(),
        }),
        _ => Ok(()),
    }
}

/// o_proj column of packed column `k`: heads are padded to multiples of 32.
fn head_column(a: &AttentionConfig, rank: usize, ranks: usize, k: usize) -> Option<usize> {
    let padded = a.v_dim.next_multiple_of(HEAD_COLUMNS);
    let heads = part(a.heads, rank, ranks);
    let (head, d) = (heads.start + k / padded, k % padded);
    (head < heads.end && d < a.v_dim).then_some(head * a.v_dim + d)
}

fn put(out: &mut [u8], values: &[f32]) {
    for (out, v) in out.chunks_exact_mut(4).zip(values) {
        out.copy_from_slice(&v.to_le_bytes());
    }
}

/// A rope table's bytes, with the definition's angles.
#[must_use]
pub fn turns(turns: &Turns, context: usize) -> Vec<u8> {
    let pair = |position: usize, i: usize| {
        let (sin, cos) = angle(position as u32, i, turns.dims, turns.theta).sin_cos();
        [cos, sin]
    };
    (0..context)
        .flat_map(|p| (0..turns.dims / 2).flat_map(move |i| pair(p, i)))
        .flat_map(f32::to_le_bytes)
        .collect()
}

/// The program's instructions as bytes.
#[must_use]
pub fn program_bytes(program: &Program) -> &[u8] {
    let size = size_of_val(program.instructions.as_slice());
    // SAFETY: repr(C) integers and floats without padding (layout.rs tests the size).
    unsafe { std::slice::from_raw_parts(program.instructions.as_ptr().cast(), size) }
}
