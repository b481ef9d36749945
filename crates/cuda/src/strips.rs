//! Weights of the resident kernel: strips of 16 rows in the order in which `kernels/strips.cuh`
//! multiplies, made from the checkpoint's matrices, and back.
//!
//! What row of what matrix a packed row holds and what column a packed column holds are functions, so
//! that shards, padding and the gate/up order need no code here. Refuses packed strips whose rows and
//! columns do not share the stored scale that the format has one place for. Invariant: [`Tiles::value`]
//! gives back every mapped element.

use model::weights::{Encoding, Matrix, Row};

use crate::CudaError;
use crate::layout::{BLOCK_COLUMNS, STRIP_BF16, STRIP_F32, STRIP_FP4, STRIP_FP8};

/// Rows of a strip.
pub const STRIP_ROWS: usize = 16;

/// Weight format of a strip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// MXFP4.
    Fp4,
    /// FP8 E4M3.
    Fp8,
    /// BF16.
    Bf16,
    /// f32 as a BF16 and the BF16 of the rest.
    F32,
}

impl Format {
    /// The format that keeps `encoding`.
    #[must_use]
    pub fn of(encoding: Encoding) -> Self {
        match encoding {
            Encoding::Mxfp4 => Self::Fp4,
            Encoding::Fp8 => Self::Fp8,
            Encoding::Bf16 => Self::Bf16,
            Encoding::F32 => Self::F32,
        }
    }

    /// Bytes of 16 rows x 128 columns.
    #[must_use]
    pub fn strip_bytes(self) -> usize {
        match self {
            Self::Fp4 => 1088,
            Self::Fp8 => 2064,
            Self::Bf16 => 4096,
            Self::F32 => 8192,
        }
    }

    /// Its number in the kernels.
    #[must_use]
    pub fn code(self) -> i32 {
        let code = match self {
            Self::Fp4 => STRIP_FP4,
            Self::Fp8 => STRIP_FP8,
            Self::Bf16 => STRIP_BF16,
            Self::F32 => STRIP_F32,
        };
        code as i32
    }
}

/// Where packed elements come from.
pub struct Map<'a> {
    /// Matrix and row of a packed row, or none.
    pub row: &'a dyn Fn(usize) -> Option<(usize, usize)>,
    /// Source column of a packed column, or none.
    pub column: &'a dyn Fn(usize) -> Option<usize>,
}

/// Adds an E2M1 code to its byte (`strip_codes4` of `kernels/strips.cuh`): of the first eight rows at bits 7 and 3 to 1,
/// of the others (`field` 1) at bits 0 and 6 to 4.
fn put_code4(code: u8, field: usize, byte: &mut u8) {
    *byte |= match field {
        0 => (code & 8) << 4 | (code & 7) << 1,
        _ => code >> 3 | (code & 7) << 4,
    };
}

/// The inverse of [`put_code4`].
fn code4_in(byte: u8, field: usize) -> u8 {
    match field {
        0 => byte >> 4 & 8 | byte >> 1 & 7,
        _ => (byte & 1) << 3 | byte >> 4 & 7,
    }
}

/// Adds an E4M3 code to its half-word (`strip_codes8`): at bits 15 and 13 to 7, or (`field` 1) 14 and 6 to 0.
fn put_code8(code: u8, field: usize, half: &mut [u8]) {
    let code = u16::from(code);
    let put = (code & 0x80) << 8 >> field | (code & 0x7f) << (7 - 7 * field);
    half[0] |= put as u8;
    half[1] |= (put >> 8) as u8;
}

/// The inverse of [`put_code8`].
fn code8_in(half: [u8; 2], field: usize) -> u8 {
    let half = u16::from_le_bytes(half);
    ((half << field >> 8) & 0x80 | half >> (7 - 7 * field) & 0x7f) as u8
}

/// Byte offset in a strip-block of row `r` (0 to 15) and column `c` (0 to 127): of a BF16, or of the byte or half-word that
/// holds two codes, and which of them it is.
#[must_use]
pub fn place(format: Format, r: usize, c: usize) -> (usize, usize) {
    let (low, high) = (r % 8, r / 8);
    let lane = low * 4 + c % 16 / 4;
    match format {
        Format::Fp4 => {
            let word = c / 16;
            let byte = [1, 3, 0, 2][c % 4];
            let at = word / 4 * 512 + lane * 16 + word % 4 * 4 + byte;
            (at, high)
        }
        Format::Fp8 => {
            let register = high + 2 * (c % 32 / 16);
            (
                c / 32 * 512 + lane * 16 + register * 4 + c % 2 * 2,
                c % 4 / 2,
            )
        }
        Format::Bf16 | Format::F32 => {
            let register = high + 2 * (c % 4 / 2);
            (c / 16 * 512 + lane * 16 + register * 4 + c % 2 * 2, 0)
        }
    }
}

/// Byte offset in an MXFP4 strip-block of the scale of row `r` and column `c`.
fn scale_place(r: usize, c: usize) -> usize {
    1024 + c / 64 * 32 + r % 8 * 4 + r / 8 * 2 + c % 64 / 32
}

fn mixed(what: &'static str, found: String) -> CudaError {
    CudaError::Shape {
        what,
        expected: "one stored scale".into(),
        found,
    }
}

/// Puts `scale` at `out`; refuses another one than an element before it put there.
fn put_scale(
    what: &'static str,
    seen: &mut Option<[u8; 4]>,
    scale: [u8; 4],
    out: &mut [u8],
) -> Result<(), CudaError> {
    if seen.is_some_and(|seen| seen != scale) {
        return Err(mixed(what, format!("{seen:?} and {scale:?}")));
    }
    *seen = Some(scale);
    out.copy_from_slice(&scale[..out.len()]);
    Ok(())
}

/// One strip-block: packed rows `first_row..+16`, packed columns `first_column..+128`, into `out`.
fn pack_block(
    matrices: &[&Matrix<'_>],
    map: &Map<'_>,
    format: Format,
    (first_row, first_column): (usize, usize),
    out: &mut [u8],
) -> Result<(), CudaError> {
    let mut halves = [None; 2];
    for r in 0..STRIP_ROWS {
        let Some((matrix, row)) = (map.row)(first_row + r) else {
            continue;
        };
        let row = matrices[matrix].row(row);
        let mut groups = [None; 4];
        for c in 0..BLOCK_COLUMNS {
            let Some(k) = (map.column)(first_column + c) else {
                continue;
            };
            let (at, field) = place(format, r, c);
            match row {
                Row::Mxfp4 { codes, scales } => {
                    let code = codes[k / 2] >> (k % 2 * 4) & 15;
                    put_code4(code, field, &mut out[at]);
                    let to = scale_place(r, c);
                    put_scale(
                        "32 columns of an MXFP4 strip",
                        &mut groups[c / 32],
                        [scales[k / 32]; 4],
                        &mut out[to..=to],
                    )?;
                }
                Row::Fp8 { codes, scales } => {
                    put_code8(codes[k], field, &mut out[at..at + 2]);
                    let scale = scales.as_chunks::<4>().0[k / 128];
                    let to = 2048 + r / 8 * 4;
                    put_scale(
                        "8 rows x 128 columns of an FP8 strip",
                        &mut halves[r / 8],
                        scale,
                        &mut out[to..to + 4],
                    )?;
                }
                Row::Bf16(bytes) => out[at..at + 2].copy_from_slice(&bytes[2 * k..2 * k + 2]),
                Row::F32(bytes) => {
                    let value = f32::from_le_bytes(bytes.as_chunks::<4>().0[k]);
                    let high = formats::bf16::encode(value);
                    let rest = formats::bf16::encode(value - formats::bf16::decode(high));
                    out[at..at + 2].copy_from_slice(&high.to_le_bytes());
                    out[4096 + at..4096 + at + 2].copy_from_slice(&rest.to_le_bytes());
                }
            }
        }
    }
    Ok(())
}

/// Shape of packed pages: `[tile][block][strip]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Format.
    pub format: Format,
    /// Tiles.
    pub tiles: usize,
    /// Strips of a tile.
    pub strips: usize,
    /// Blocks of 128 columns.
    pub blocks: usize,
}

impl Tiles {
    /// Bytes of all of it.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.tiles * self.strips * self.blocks * self.format.strip_bytes()
    }

    /// Packs `matrices` (all in the tiles' format) into `out` of [`Tiles::bytes`], zeros before.
    ///
    /// # Errors
    /// When a matrix has another encoding, or stored scales do not fit the strips.
    pub fn pack(
        &self,
        matrices: &[&Matrix<'_>],
        map: &Map<'_>,
        out: &mut [u8],
    ) -> Result<(), CudaError> {
        for matrix in matrices {
            if Format::of(matrix.encoding()) != self.format {
                return Err(CudaError::Shape {
                    what: "encoding of matrices that are packed together",
                    expected: format!("{:?}", self.format),
                    found: format!("{:?}", matrix.encoding()),
                });
            }
        }
        let mut pieces = out.chunks_exact_mut(self.format.strip_bytes());
        for tile in 0..self.tiles {
            for block in 0..self.blocks {
                for strip in 0..self.strips {
                    let first = (
                        (tile * self.strips + strip) * STRIP_ROWS,
                        block * BLOCK_COLUMNS,
                    );
                    let Some(piece) = pieces.next() else {
                        return Err(mixed("packed bytes", "a buffer that is too short".into()));
                    };
                    pack_block(matrices, map, self.format, first, piece)?;
                }
            }
        }
        Ok(())
    }

    /// The value that packed row `row` and packed column `column` stand for in `bytes`.
    #[must_use]
    pub fn value(&self, bytes: &[u8], row: usize, column: usize) -> f32 {
        let (tile, strip, r) = (
            row / STRIP_ROWS / self.strips,
            row / STRIP_ROWS % self.strips,
            row % STRIP_ROWS,
        );
        let (block, c) = (column / BLOCK_COLUMNS, column % BLOCK_COLUMNS);
        let size = self.format.strip_bytes();
        let piece = &bytes[((tile * self.blocks + block) * self.strips + strip) * size..][..size];
        let (at, field) = place(self.format, r, c);
        let word =
            |at: usize| formats::bf16::decode(u16::from_le_bytes([piece[at], piece[at + 1]]));
        match self.format {
            Format::Fp4 => {
                let code = code4_in(piece[at], field);
                let mut out = [0.0; 32];
                let scale = piece[scale_place(r, c)];
                formats::mxfp4::decode_block(&[code; 16], scale, &mut out);
                out[0]
            }
            Format::Fp8 => {
                let to = 2048 + r / 8 * 4;
                let scale = [piece[to], piece[to + 1], piece[to + 2], piece[to + 3]];
                formats::fp8::decode(code8_in([piece[at], piece[at + 1]], field))
                    * f32::from_le_bytes(scale)
            }
            Format::Bf16 => word(at),
            Format::F32 => word(at) + word(4096 + at),
        }
    }
}
