//! Random weights in both formats with their pages, and the definition's answer: shared by the
//! emulator's and the GPU's parity tests.

use cuda::pages::{Fp4Rows, Fp8Rows, TileRows, pack_fp4, pack_fp8, plain_tiles};
use cuda_emulator::Format;
use formats::{bf16, fp8, mxfp4};
use model::reference::linear::linear;

/// xorshift64*, for test data.
pub(crate) struct Random(pub u64);

impl Random {
    /// Uniform bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    /// About normal, with one value in a hundred 20 times larger, as activations are.
    pub(crate) fn value(&mut self) -> f32 {
        let sum: f32 = (0..4)
            .map(|_| (self.bits() % 4096) as f32 / 2048.0 - 1.0)
            .sum();
        sum * if self.bits().is_multiple_of(100) {
            20.0
        } else {
            1.0
        }
    }
}

/// A matrix, eight rows of activations, and what a kernel gets.
pub(crate) struct Case {
    weight: Vec<f32>,
    tiles: Vec<TileRows>,
    columns: usize,
    /// `[tiles][page]`.
    pub(crate) pages: Vec<u8>,
    /// `[8, columns]`.
    pub(crate) x: Vec<f32>,
}

impl Case {
    /// Random codes, scales and activations. `columns`: a multiple of the page's.
    pub(crate) fn new(format: Format, rows: usize, columns: usize, seed: u64) -> Self {
        let mut random = Random(seed * 77 + 1);
        let tiles = plain_tiles(rows);
        let (weight, pages) = match format {
            Format::Fp4 => fp4(rows, columns, &tiles, &mut random),
            Format::Fp8 => fp8_case(rows, columns, &tiles, &mut random),
        };
        let x = (0..8 * columns).map(|_| random.value()).collect();
        Self {
            weight,
            tiles,
            columns,
            pages,
            x,
        }
    }

    /// Tiles of 64 rows.
    pub(crate) fn tiles(&self) -> usize {
        self.tiles.len()
    }

    /// A kernel's output in source rows: `[rows, 8]`.
    pub(crate) fn rows(&self, out: &[f32]) -> Vec<f32> {
        let mut rows = vec![f32::NAN; self.weight.len() / self.columns * 8];
        for (slot, out) in self.tiles.iter().flatten().zip(out.chunks_exact(8)) {
            if let Some(row) = slot {
                rows[row * 8..][..8].copy_from_slice(out);
            }
        }
        rows
    }

    /// The definition: `[rows, 8]`.
    pub(crate) fn expected(&self) -> Vec<f32> {
        let count = self.weight.len() / self.columns;
        let mut rows = vec![0.0; count * 8];
        for (token, x) in self.x.chunks_exact(self.columns).enumerate() {
            let x: Vec<f32> = x.iter().map(|&v| bf16::round(v)).collect();
            let mut out = vec![0.0; count];
            linear(&self.weight, &x, &mut out);
            for (row, value) in out.iter().enumerate() {
                rows[row * 8 + token] = *value;
            }
        }
        rows
    }
}

fn fp4(
    rows: usize,
    columns: usize,
    tiles: &[TileRows],
    random: &mut Random,
) -> (Vec<f32>, Vec<u8>) {
    let packed = Fp4Rows {
        columns,
        codes: (0..rows * columns / 2)
            .map(|_| random.bits() as u8)
            .collect(),
        scales: (0..rows * columns / 32)
            .map(|_| 118 + (random.bits() % 8) as u8)
            .collect(),
    };
    let mut weight = vec![0.0; rows * columns];
    for (i, block) in weight.chunks_exact_mut(32).enumerate() {
        let codes: &[u8; 16] = packed.codes[i * 16..][..16].try_into().unwrap();
        mxfp4::decode_block(codes, packed.scales[i], block.try_into().unwrap());
    }
    let pages = tiles
        .iter()
        .flat_map(|t| pack_fp4(&packed, t).unwrap())
        .collect();
    (weight, pages)
}

fn fp8_case(
    rows: usize,
    columns: usize,
    tiles: &[TileRows],
    random: &mut Random,
) -> (Vec<f32>, Vec<u8>) {
    let plain: Vec<f32> = (0..rows * columns).map(|_| random.value() * 0.02).collect();
    let (codes, scales) = fp8::encode_weight(&plain, rows, columns);
    let grid = columns / 128;
    let weight = (0..rows * columns)
        .map(|i| fp8::decode(codes[i]) * scales[i / columns / 128 * grid + i % columns / 128])
        .collect();
    let packed = Fp8Rows {
        columns,
        codes,
        scales,
    };
    let pages = tiles
        .iter()
        .flat_map(|t| pack_fp8(&packed, t).unwrap())
        .collect();
    (weight, pages)
}

/// ||a - b|| / ||b||; NaN where either has one.
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        a.iter()
            .zip(b)
            .map(|(&a, &b)| f(f64::from(a), f64::from(b)))
            .sum()
    };
    (sum(&|a, b| (a - b) * (a - b)) / sum(&|_, b| b * b)).sqrt()
}
