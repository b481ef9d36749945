//! A weight matrix as stored: codes and scales where they lie in the mapped file, read row by row.
//!
//! Owns number formats and the row map of fused and sharded tensors. Invariant: every row has its
//! codes and its scales; [`crate::weights`] checks shapes before it makes a matrix.

use formats::{bf16, fp8, mxfp4};

/// A weight `[rows, cols]`; output = matrix times column.
#[derive(Clone, Debug)]
pub struct Matrix<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    pub(crate) encoding: Encoding,
    pub(crate) codes: &'a [u8],
    pub(crate) scales: &'a [u8],
    pub(crate) map: RowMap,
}

/// Number format of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// f32.
    F32,
    /// BF16.
    Bf16,
    /// FP8 E4M3, one f32 scale for each 128 x 128 block.
    Fp8,
    /// E2M1 codes, one E8M0 scale for each 32 columns.
    Mxfp4,
}

/// One row of a matrix, as stored.
#[derive(Clone, Copy, Debug)]
pub enum Row<'a> {
    /// Little-endian f32, `cols * 4` bytes of any alignment.
    F32(&'a [u8]),
    /// Little-endian BF16, `cols * 2` bytes of any alignment.
    Bf16(&'a [u8]),
    /// E4M3 codes and little-endian f32 scales.
    Fp8 {
        /// `cols` bytes.
        codes: &'a [u8],
        /// `cols.div_ceil(128) * 4` bytes.
        scales: &'a [u8],
    },
    /// E2M1 codes, the even column in the low nibble, and E8M0 scales.
    Mxfp4 {
        /// `cols / 2` bytes.
        codes: &'a [u8],
        /// `cols / 32` bytes.
        scales: &'a [u8],
    },
}

/// Where logical row `i` lies: every shard of `shard_rows` stored rows gives `taken` logical ones,
/// beginning at its row `first`; the FP8 scale grid restarts every `grid_rows` stored rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowMap {
    pub(crate) taken: usize,
    pub(crate) first: usize,
    pub(crate) shard_rows: usize,
    pub(crate) grid_rows: usize,
}

impl RowMap {
    pub(crate) fn plain(rows: usize) -> Self {
        Self {
            taken: rows,
            first: 0,
            shard_rows: rows,
            grid_rows: rows,
        }
    }

    fn stored_row(&self, row: usize) -> usize {
        row / self.taken * self.shard_rows + self.first + row % self.taken
    }

    fn scale_row(&self, stored: usize) -> usize {
        let per_grid = self.grid_rows.div_ceil(fp8::BLOCK);
        stored / self.grid_rows * per_grid + stored % self.grid_rows / fp8::BLOCK
    }
}

impl<'a> Matrix<'a> {
    /// A matrix over bytes in memory, for tests and synthetic weights. `codes`: rows as in [`Row`];
    /// `scales`: for FP8 `[rows.div_ceil(128), cols.div_ceil(128)]` f32, for MXFP4
    /// `[rows, cols / 32]`, else nothing.
    ///
    /// # Panics
    /// When the lengths do not fit.
    #[must_use]
    pub fn from_bytes(
        rows: usize,
        cols: usize,
        encoding: Encoding,
        codes: &'a [u8],
        scales: &'a [u8],
    ) -> Self {
        let matrix = Self {
            rows,
            cols,
            encoding,
            codes,
            scales,
            map: RowMap::plain(rows),
        };
        let (row, scale_row) = matrix.row_bytes();
        let scale_rows = match encoding {
            Encoding::Fp8 => rows.div_ceil(fp8::BLOCK),
            _ => rows,
        };
        assert_eq!(codes.len(), rows * row, "codes of {rows} rows");
        assert_eq!(
            scales.len(),
            scale_rows * scale_row,
            "scales of {rows} rows"
        );
        matrix
    }

    /// Number format.
    #[must_use]
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Bytes of codes and scales that a product with all rows reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let (row, scales) = self.row_bytes();
        match self.encoding {
            Encoding::Fp8 => self.rows * row + self.rows.div_ceil(fp8::BLOCK) * scales,
            _ => self.rows * (row + scales),
        }
    }

    /// Row `row` as stored.
    ///
    /// # Panics
    /// When `row >= rows`.
    #[must_use]
    pub fn row(&self, row: usize) -> Row<'a> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let (bytes, scale_bytes) = self.row_bytes();
        let stored = self.map.stored_row(row);
        let codes = &self.codes[stored * bytes..(stored + 1) * bytes];
        let scale_row = match self.encoding {
            Encoding::Fp8 => self.map.scale_row(stored),
            _ => stored,
        };
        let scales = &self.scales[scale_row * scale_bytes..(scale_row + 1) * scale_bytes];
        match self.encoding {
            Encoding::F32 => Row::F32(codes),
            Encoding::Bf16 => Row::Bf16(codes),
            Encoding::Fp8 => Row::Fp8 { codes, scales },
            Encoding::Mxfp4 => Row::Mxfp4 { codes, scales },
        }
    }

    /// Bytes of one row's codes and of one row of scales.
    fn row_bytes(&self) -> (usize, usize) {
        match self.encoding {
            Encoding::F32 => (self.cols * 4, 0),
            Encoding::Bf16 => (self.cols * 2, 0),
            Encoding::Fp8 => (self.cols, self.cols.div_ceil(fp8::BLOCK) * 4),
            Encoding::Mxfp4 => (self.cols / 2, self.cols / mxfp4::BLOCK),
        }
    }
}

impl Row<'_> {
    /// Writes the row's values, exactly as stored, to `out` of `cols` elements.
    pub fn decode(&self, out: &mut [f32]) {
        match *self {
            Row::F32(bytes) => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*b);
                }
            }
            Row::Bf16(bytes) => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = bf16::decode(u16::from_le_bytes(*b));
                }
            }
            Row::Fp8 { codes, scales } => {
                let scales = scales.as_chunks::<4>().0;
                for (i, (x, &code)) in out.iter_mut().zip(codes).enumerate() {
                    *x = fp8::decode(code) * f32::from_le_bytes(scales[i / fp8::BLOCK]);
                }
            }
            Row::Mxfp4 { codes, scales } => {
                let blocks = codes.as_chunks::<{ mxfp4::BLOCK_BYTES }>().0;
                let outs = out.as_chunks_mut::<{ mxfp4::BLOCK }>().0;
                for ((block, &scale), out) in blocks.iter().zip(scales).zip(outs) {
                    mxfp4::decode_block(block, scale, out);
                }
            }
        }
    }
}
