//! Weight pages: the order of bytes in which `kernels/weights.cuh` multiplies, and back.
//!
//! A tile is 64 fragment rows over all columns; what source row each fragment row holds is the
//! caller's ([`TileRows`]). A page is 2 (FP8) or 4 (MXFP4) blocks of 64 x 128, one bulk copy each.
//! Refuses columns that do not fill pages. Invariant: [`unpack_fp4`] and [`unpack_fp8`] give back
//! every byte, so no weight is lost or moved unseen.

use crate::CudaError;
use crate::layout::{
    BLOCK_COLUMNS, BLOCK_ROWS, FP4_BLOCK_BYTES, FP4_BLOCKS_PER_PAGE, FP8_BLOCK_BYTES,
    FP8_BLOCKS_PER_PAGE,
};

/// Source row of each fragment row of a tile; `None` is a row of zeros.
pub type TileRows = [Option<usize>; BLOCK_ROWS];

/// MXFP4 rows: codes `[rows, columns / 2]`, even column in the low nibble; E8M0 scales
/// `[rows, columns / 32]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fp4Rows {
    /// Columns of the matrix.
    pub columns: usize,
    /// Two codes a byte.
    pub codes: Vec<u8>,
    /// One byte for 32 columns.
    pub scales: Vec<u8>,
}

/// FP8 rows: codes `[rows, columns]`; f32 scales of 128 columns `[row groups, columns / 128]`,
/// row group of a row = `row / 128`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8Rows {
    /// Columns of the matrix.
    pub columns: usize,
    /// One code a byte.
    pub codes: Vec<u8>,
    /// One f32 for 128 rows x 128 columns.
    pub scales: Vec<f32>,
}

/// Tiles of rows in order: fragment row `r` of tile `t` is row `64 t + r`; short at the end.
#[must_use]
pub fn plain_tiles(rows: usize) -> Vec<TileRows> {
    let row = |tile: usize, r: usize| Some(tile * BLOCK_ROWS + r).filter(|&row| row < rows);
    (0..rows.div_ceil(BLOCK_ROWS))
        .map(|tile| std::array::from_fn(|r| row(tile, r)))
        .collect()
}

/// Tiles of gate and up rows for SwiGLU: of each 16 fragment rows, the lower 8 are gate rows and
/// the upper 8 the up rows of the same inner columns, so that one thread holds both. Source rows:
/// gate `0..inner`, up `inner..2 * inner`.
#[must_use]
pub fn gate_up_tiles(inner: usize) -> Vec<TileRows> {
    let column = |tile: usize, r: usize| tile * 32 + r / 16 * 8 + r % 8;
    let row = |tile: usize, r: usize| {
        let up = if r % 16 < 8 { 0 } else { inner };
        Some(column(tile, r)).filter(|&c| c < inner).map(|c| c + up)
    };
    (0..inner.div_ceil(32))
        .map(|tile| std::array::from_fn(|r| row(tile, r)))
        .collect()
}

/// Fragment row and first column of the 4-byte piece `half` (0: columns 0..16 of a step) of thread
/// `thread`: the low one of its two rows.
fn fragment(thread: usize, step: usize, half: usize) -> (usize, usize) {
    let lane = thread % 32;
    let row = thread / 32 * 16 + lane / 4;
    (row, step * 32 + half * 16 + lane % 4 * 4)
}

fn check_columns(columns: usize, blocks: usize) -> Result<(), CudaError> {
    let page = blocks * BLOCK_COLUMNS;
    if columns == 0 || !columns.is_multiple_of(page) {
        return Err(CudaError::Shape {
            what: "columns of a paged weight",
            expected: format!("a multiple of {page}"),
            found: columns.to_string(),
        });
    }
    Ok(())
}

/// Offset of the byte that holds fragment row `r` (its low or high nibble) and column `c` of an
/// MXFP4 block, for the low row of a pair.
fn fp4_offset(thread: usize, step: usize, half: usize) -> usize {
    let word = 2 * step + half;
    word / 4 * 2048 + thread * 16 + word % 4 * 4
}

/// Calls `each(row, column, byte_offset, high_nibble)` for every code of a tile.
fn for_each_fp4(columns: usize, mut each: impl FnMut(usize, usize, usize, bool)) {
    for block in 0..columns / BLOCK_COLUMNS {
        for piece in 0..128 * 8 {
            let (thread, step, half) = (piece / 8, piece / 2 % 4, piece % 2);
            let (row, column) = fragment(thread, step, half);
            let at = block * FP4_BLOCK_BYTES + fp4_offset(thread, step, half);
            for b in 0..4 {
                let column = block * BLOCK_COLUMNS + column + b;
                each(row, column, at + b, false);
                each(row + 8, column, at + b, true);
            }
        }
    }
}

/// Packs one tile: `columns / 512` pages.
///
/// # Errors
/// When the columns do not fill pages.
pub fn pack_fp4(weight: &Fp4Rows, rows: &TileRows) -> Result<Vec<u8>, CudaError> {
    check_columns(weight.columns, FP4_BLOCKS_PER_PAGE)?;
    let columns = weight.columns;
    let mut out = vec![0u8; columns / BLOCK_COLUMNS * FP4_BLOCK_BYTES];
    for_each_fp4(columns, |row, column, at, high| {
        let Some(source) = rows[row] else { return };
        let byte = weight.codes[(source * columns + column) / 2];
        let code = if column % 2 == 0 {
            byte & 15
        } else {
            byte >> 4
        };
        out[at] |= if high { code << 4 } else { code };
    });
    for (row, source) in rows.iter().enumerate() {
        let Some(source) = source else { continue };
        for (i, scale) in weight.scales[source * columns / 32..][..columns / 32]
            .iter()
            .enumerate()
        {
            out[i / 4 * FP4_BLOCK_BYTES + 4096 + row * 4 + i % 4] = *scale;
        }
    }
    Ok(out)
}

/// The inverse of [`pack_fp4`]: writes the tile's rows back into `weight`.
///
/// # Errors
/// When the columns do not fill pages.
pub fn unpack_fp4(tile: &[u8], rows: &TileRows, weight: &mut Fp4Rows) -> Result<(), CudaError> {
    check_columns(weight.columns, FP4_BLOCKS_PER_PAGE)?;
    let columns = weight.columns;
    for_each_fp4(columns, |row, column, at, high| {
        let Some(source) = rows[row] else { return };
        let code = if high { tile[at] >> 4 } else { tile[at] & 15 };
        let byte = &mut weight.codes[(source * columns + column) / 2];
        *byte = if column % 2 == 0 {
            *byte & 0xF0 | code
        } else {
            *byte & 0x0F | code << 4
        };
    });
    for (row, source) in rows.iter().enumerate() {
        let Some(source) = source else { continue };
        for i in 0..columns / 32 {
            weight.scales[source * columns / 32 + i] =
                tile[i / 4 * FP4_BLOCK_BYTES + 4096 + row * 4 + i % 4];
        }
    }
    Ok(())
}

/// Calls `each(row, column, byte_offset)` for every code of an FP8 tile.
fn for_each_fp8(columns: usize, mut each: impl FnMut(usize, usize, usize)) {
    for block in 0..columns / BLOCK_COLUMNS {
        for piece in 0..128 * 16 {
            let (thread, step, register) = (piece / 16, piece / 4 % 4, piece % 4);
            let (row, column) = fragment(thread, step, register / 2);
            let at = block * FP8_BLOCK_BYTES + step * 2048 + thread * 16 + register * 4;
            for b in 0..4 {
                let column = block * BLOCK_COLUMNS + column + b;
                each(row + register % 2 * 8, column, at + b);
            }
        }
    }
}

/// The 128-row group of each half of a tile: fragment rows `r % 16 < 8`, and the others.
fn fp8_groups(rows: &TileRows) -> Result<[Option<usize>; 2], CudaError> {
    let mut groups = [None; 2];
    for (r, source) in rows.iter().enumerate() {
        let Some(source) = source else { continue };
        let group = &mut groups[r % 16 / 8];
        let found = source / BLOCK_COLUMNS;
        if *group.get_or_insert(found) != found {
            return Err(CudaError::Shape {
                what: "rows of an FP8 tile half",
                expected: "one 128-row scale group".into(),
                found: format!("groups {} and {found}", group.unwrap_or(0)),
            });
        }
    }
    Ok(groups)
}

/// Packs one tile: `columns / 256` pages.
///
/// # Errors
/// When the columns do not fill pages, or a half of the tile spans two scale groups.
pub fn pack_fp8(weight: &Fp8Rows, rows: &TileRows) -> Result<Vec<u8>, CudaError> {
    check_columns(weight.columns, FP8_BLOCKS_PER_PAGE)?;
    let (columns, groups) = (weight.columns, fp8_groups(rows)?);
    let blocks = columns / BLOCK_COLUMNS;
    let mut out = vec![0u8; blocks * FP8_BLOCK_BYTES];
    for_each_fp8(columns, |row, column, at| {
        if let Some(source) = rows[row] {
            out[at] = weight.codes[source * columns + column];
        }
    });
    for (half, group) in groups.iter().enumerate() {
        let Some(group) = group else { continue };
        for block in 0..blocks {
            let at = block * FP8_BLOCK_BYTES + 8192 + half * 4;
            out[at..at + 4].copy_from_slice(&weight.scales[group * blocks + block].to_le_bytes());
        }
    }
    Ok(out)
}

/// The inverse of [`pack_fp8`]: writes the tile's rows and scale groups back into `weight`.
///
/// # Errors
/// As [`pack_fp8`].
pub fn unpack_fp8(tile: &[u8], rows: &TileRows, weight: &mut Fp8Rows) -> Result<(), CudaError> {
    check_columns(weight.columns, FP8_BLOCKS_PER_PAGE)?;
    let (columns, groups) = (weight.columns, fp8_groups(rows)?);
    let blocks = columns / BLOCK_COLUMNS;
    for_each_fp8(columns, |row, column, at| {
        if let Some(source) = rows[row] {
            weight.codes[source * columns + column] = tile[at];
        }
    });
    for (half, group) in groups.iter().enumerate() {
        let Some(group) = group else { continue };
        for block in 0..blocks {
            let at = block * FP8_BLOCK_BYTES + 8192 + half * 4;
            weight.scales[group * blocks + block] =
                f32::from_le_bytes([tile[at], tile[at + 1], tile[at + 2], tile[at + 3]]);
        }
    }
    Ok(())
}
