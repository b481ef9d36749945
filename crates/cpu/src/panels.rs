//! Weights packed for decoding: panels of 16 rows, so that a register lane is an output row and no
//! sum crosses lanes. Codes keep their stored format and size; only their order changes.
//!
//! ```text
//! panel p = rows 16 p .. 16 p + 15 (missing ones are zero), then columns in order:
//!   MXFP4  per 32 columns: 256 bytes, 4 groups j of 64: byte 4 r + i of group j holds column
//!          8 j + i of row r in the low nibble and column 8 j + 4 + i in the high one; 16 scale bytes
//!   FP8    per 4 columns: 64 bytes, byte 4 r + i is column i of row r; 16 f32 scales per 128 columns
//!   BF16   per 2 columns: 64 bytes, half 2 r + i is column i of row r
//!   F32    per column: 64 bytes, float r is row r
//! ```
//! Refuses codes and scales that stand for NaN, and infinite scales: a damaged checkpoint.

use formats::{fp8, mxfp4};
use model::weights::{Encoding, Matrix, Row};

use crate::buffer::{Arena, Buffer};
use crate::pool::{Pool, Team};

/// Rows of a panel: f32 lanes of an AVX-512 register.
pub const PANEL: usize = 16;

/// A packed weight `[rows, cols]`.
pub struct Panels {
    rows: usize,
    cols: usize,
    encoding: Encoding,
    for_drafts: bool,
    codes: Buffer<u8>,
    scales: Buffer<u8>,
    /// f32 scales of FP8.
    float_scales: Buffer<f32>,
}

/// A weight that stands for NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "row {row} holds a code or scale that is no finite number (NaN or infinity): the weights are damaged"
)]
pub struct NanWeight {
    /// Row of the matrix.
    pub row: usize,
}

impl Panels {
    /// An all-zero matrix, to be filled by `fill` of its panels.
    fn empty(rows: usize, cols: usize, encoding: Encoding, arena: &Arena) -> Self {
        let panels = rows.div_ceil(PANEL);
        let scales = match encoding {
            Encoding::Mxfp4 => panels * PANEL * (cols / mxfp4::BLOCK),
            _ => 0,
        };
        let float_scales = match encoding {
            Encoding::Fp8 => panels * PANEL * cols.div_ceil(fp8::BLOCK),
            _ => 0,
        };
        Self {
            rows,
            cols,
            encoding,
            for_drafts: false,
            codes: arena.buffer(panels * panel_bytes(encoding, cols)),
            scales: arena.buffer(scales),
            float_scales: arena.buffer(float_scales),
        }
    }

    /// Packs `matrix`, its panels shared among the threads of `pool`.
    ///
    /// # Errors
    /// [`NanWeight`] naming the first such row that a thread found.
    pub fn pack(matrix: &Matrix<'_>, pool: &Pool) -> Result<Self, NanWeight> {
        Self::pack_in(matrix, pool, &Arena::default())
    }

    /// As [`Panels::pack`], next to other matrices in `arena`.
    ///
    /// # Errors
    /// As [`Panels::pack`].
    pub fn pack_in(matrix: &Matrix<'_>, pool: &Pool, arena: &Arena) -> Result<Self, NanWeight> {
        let packed = Self::empty(matrix.rows, matrix.cols, matrix.encoding(), arena);
        let failed = std::sync::Mutex::new(None);
        pool.run(&|team| {
            if let Err(error) = packed.fill(matrix, team) {
                *failed.lock().expect("no thread panics while it holds this") = Some(error);
            }
        });
        match failed.into_inner().expect("as above") {
            Some(error) => Err(error),
            None => Ok(packed),
        }
    }

    /// The same weight, for products that only drafts come from and that may round: see `linear`.
    #[must_use]
    pub fn for_drafts(mut self) -> Self {
        self.for_drafts = true;
        self
    }

    /// Products may round.
    #[must_use]
    pub fn is_for_drafts(&self) -> bool {
        self.for_drafts
    }

    /// Packs this thread's share of the panels.
    fn fill(&self, matrix: &Matrix<'_>, team: Team<'_>) -> Result<(), NanWeight> {
        for panel in team.share(self.panels()) {
            for lane in 0..PANEL.min(self.rows - panel * PANEL) {
                let row = panel * PANEL + lane;
                if !self.fill_row(panel, lane, matrix.row(row)) {
                    return Err(NanWeight { row });
                }
            }
        }
        Ok(())
    }

    /// False when the row stands for NaN somewhere.
    fn fill_row(&self, panel: usize, lane: usize, row: Row<'_>) -> bool {
        let bytes = panel_bytes(self.encoding, self.cols);
        // SAFETY: a panel is filled by the one thread that has it in its share.
        let out = unsafe { self.codes.write(panel * bytes..(panel + 1) * bytes) };
        match row {
            Row::Mxfp4 { codes, scales } => {
                let per_panel = PANEL * scales.len();
                // SAFETY: as above.
                let out_scales = unsafe {
                    self.scales
                        .write(panel * per_panel..(panel + 1) * per_panel)
                };
                for (b, &scale) in scales.iter().enumerate() {
                    out_scales[b * PANEL + lane] = scale;
                }
                pack_mxfp4(codes, lane, out);
                !scales.contains(&mxfp4::SCALE_NAN)
            }
            Row::Fp8 { codes, scales } => {
                let blocks = scales.as_chunks::<4>().0;
                let per_panel = PANEL * blocks.len();
                // SAFETY: as above.
                let out_scales = unsafe {
                    self.float_scales
                        .write(panel * per_panel..(panel + 1) * per_panel)
                };
                let mut finite = true;
                for (b, scale) in blocks.iter().enumerate() {
                    let scale = f32::from_le_bytes(*scale);
                    out_scales[b * PANEL + lane] = scale;
                    finite &= scale.is_finite();
                }
                interleave::<1, 4>(codes, lane, out);
                finite && codes.iter().all(|code| code & 0x7F != 0x7F)
            }
            Row::Bf16(bytes) => {
                interleave::<2, 2>(bytes, lane, out);
                true
            }
            Row::F32(bytes) => {
                interleave::<4, 1>(bytes, lane, out);
                true
            }
        }
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number format.
    #[must_use]
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Number of panels.
    #[must_use]
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Bytes that a product with all rows reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.len() + self.float_scales.len() * 4
    }

    /// Codes of a panel.
    #[must_use]
    pub(crate) fn panel_codes(&self, panel: usize) -> &[u8] {
        let bytes = panel_bytes(self.encoding, self.cols);
        // SAFETY: nothing writes a packed matrix after `pack` or `random`.
        unsafe { self.codes.read(panel * bytes..(panel + 1) * bytes) }
    }

    /// E8M0 scales of a panel, `[cols / 32, 16]`.
    #[must_use]
    pub(crate) fn panel_scales(&self, panel: usize) -> &[u8] {
        let count = PANEL * (self.cols / mxfp4::BLOCK);
        // SAFETY: as in `panel_codes`.
        unsafe { self.scales.read(panel * count..(panel + 1) * count) }
    }

    /// f32 scales of a panel, `[cols.div_ceil(128), 16]`.
    #[must_use]
    pub(crate) fn panel_float_scales(&self, panel: usize) -> &[f32] {
        let count = PANEL * self.cols.div_ceil(fp8::BLOCK);
        // SAFETY: as in `panel_codes`.
        unsafe { self.float_scales.read(panel * count..(panel + 1) * count) }
    }

    /// Row `row` decoded, exactly: the embedding look-up.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / PANEL, row % PANEL);
        let codes = self.panel_codes(panel);
        match self.encoding {
            Encoding::Mxfp4 => {
                let scales = self.panel_scales(panel);
                for (c, x) in out.iter_mut().enumerate() {
                    let (block, at) = (c / mxfp4::BLOCK, c % mxfp4::BLOCK);
                    let byte = codes[block * 256 + at / 8 * 64 + lane * 4 + at % 4];
                    let code = if at % 8 < 4 { byte & 15 } else { byte >> 4 };
                    let scale = mxfp4::decode_scale(scales[block * PANEL + lane]);
                    *x = mxfp4::E2M1[usize::from(code)] * scale;
                }
            }
            Encoding::Fp8 => {
                let scales = self.panel_float_scales(panel);
                for (c, x) in out.iter_mut().enumerate() {
                    let code = codes[c / 4 * 64 + lane * 4 + c % 4];
                    *x = fp8::decode(code) * scales[c / fp8::BLOCK * PANEL + lane];
                }
            }
            Encoding::Bf16 => {
                for (c, x) in out.iter_mut().enumerate() {
                    let at = c / 2 * 64 + lane * 4 + c % 2 * 2;
                    let bits = u16::from_le_bytes([codes[at], codes[at + 1]]);
                    *x = formats::bf16::decode(bits);
                }
            }
            Encoding::F32 => {
                for (c, x) in out.iter_mut().enumerate() {
                    let at = c * 64 + lane * 4;
                    *x = f32::from_le_bytes(codes[at..at + 4].try_into().expect("four bytes"));
                }
            }
        }
    }
}

/// Bytes of codes in a panel.
fn panel_bytes(encoding: Encoding, cols: usize) -> usize {
    match encoding {
        Encoding::Mxfp4 => cols / mxfp4::BLOCK * 256,
        Encoding::Fp8 => cols.div_ceil(4) * 64,
        Encoding::Bf16 => cols.div_ceil(2) * 64,
        Encoding::F32 => cols * 64,
    }
}

/// Elements of `BYTES` bytes, `PER` of them side by side in each 64-byte line.
fn interleave<const BYTES: usize, const PER: usize>(row: &[u8], lane: usize, out: &mut [u8]) {
    for (line, piece) in out.chunks_exact_mut(64).zip(row.chunks(BYTES * PER)) {
        line[lane * BYTES * PER..][..piece.len()].copy_from_slice(piece);
    }
}

/// Stored codes have the even column in the low nibble; a panel byte pairs columns 4 apart.
fn pack_mxfp4(codes: &[u8], lane: usize, out: &mut [u8]) {
    for (eight, line) in codes
        .as_chunks::<4>()
        .0
        .iter()
        .zip(out.chunks_exact_mut(64))
    {
        let [a, b, c, d] = *eight;
        line[lane * 4..lane * 4 + 4].copy_from_slice(&[
            a & 15 | c << 4,
            a >> 4 | c & 0xF0,
            b & 15 | d << 4,
            b >> 4 | d & 0xF0,
        ]);
    }
}
