//! The layout generator of the resident kernel's weights: every packed element comes back, in all formats and tile heights.

use cuda::strips::{Format, Map, STRIP_ROWS, Tiles};
use model::weights::{Encoding, Matrix};

use crate::cases::Random;

const ROWS: usize = 40;
const COLUMNS: usize = 384;

/// Random codes and scales of a matrix of `ROWS` x `COLUMNS`; no NaN among them.
fn random(encoding: Encoding, seed: u64) -> (Vec<u8>, Vec<u8>) {
    let mut random = Random(seed * 31 + 7);
    let mut bytes = |count: usize| -> Vec<u8> { (0..count).map(|_| random.bits() as u8).collect() };
    let finite = |high: u8| high & 0xbf; // an exponent below the largest
    match encoding {
        Encoding::Mxfp4 => {
            let scales = bytes(ROWS * COLUMNS / 32);
            (
                bytes(ROWS * COLUMNS / 2),
                scales.iter().map(|s| 100 + s % 50).collect(),
            )
        }
        Encoding::Fp8 => {
            let scales = (0..COLUMNS / 128)
                .flat_map(|i| (0.5 + i as f32).to_le_bytes())
                .collect();
            (
                bytes(ROWS * COLUMNS).into_iter().map(finite).collect(),
                scales,
            )
        }
        Encoding::Bf16 => {
            let mut codes = bytes(ROWS * COLUMNS * 2);
            codes.chunks_exact_mut(2).for_each(|c| c[1] = finite(c[1]));
            (codes, Vec::new())
        }
        Encoding::F32 => {
            // Values that are a BF16 and the BF16 of the rest: what the format keeps.
            let values = bytes(ROWS * COLUMNS);
            (
                values
                    .iter()
                    .flat_map(|&v| (f32::from(v) + f32::from(v) / 1024.0).to_le_bytes())
                    .collect(),
                Vec::new(),
            )
        }
    }
}

fn comes_back(encoding: Encoding, strips: usize, matrices: &[&Matrix<'_>], map: &Map<'_>) {
    let format = Format::of(encoding);
    let rows = ROWS * matrices.len();
    let tiles = Tiles {
        format,
        tiles: rows.div_ceil(STRIP_ROWS).div_ceil(strips),
        strips,
        blocks: COLUMNS / 128,
    };
    let mut bytes = vec![0; tiles.bytes()];
    tiles.pack(matrices, map, &mut bytes).unwrap();
    let mut row = vec![0.0; COLUMNS];
    let mut mapped = 0;
    for r in 0..tiles.tiles * strips * STRIP_ROWS {
        let Some((matrix, from)) = (map.row)(r) else {
            continue;
        };
        matrices[matrix].row(from).decode(&mut row);
        for c in 0..COLUMNS {
            let expected = (map.column)(c).map_or(0.0, |k| row[k]);
            let found = tiles.value(&bytes, r, c);
            assert_eq!(
                found, expected,
                "{encoding:?}, {strips} strips, row {r}, column {c}"
            );
            mapped += usize::from((map.column)(c).is_some());
        }
    }
    assert_eq!(
        mapped,
        rows * (0..COLUMNS).filter(|&c| (map.column)(c).is_some()).count()
    );
}

#[test]
fn every_element_comes_back() {
    for encoding in [
        Encoding::Mxfp4,
        Encoding::Fp8,
        Encoding::Bf16,
        Encoding::F32,
    ] {
        let bytes = [random(encoding, 1), random(encoding, 2)];
        let matrix =
            |i: usize| Matrix::from_bytes(ROWS, COLUMNS, encoding, &bytes[i].0, &bytes[i].1);
        let (gate, up) = (matrix(0), matrix(1));
        for strips in 1..=4 {
            // One matrix whose last strip is ragged, and a shard that begins at its second 128 columns.
            let plain = Map {
                row: &|r| (r < ROWS).then_some((0, r)),
                column: &|c| (c + 128 < COLUMNS).then_some(c + 128),
            };
            comes_back(encoding, strips, &[&gate], &plain);
            // Gate and up by turns of eight rows, as `swiglu_tile` wants them.
            let turns = Map {
                row: &|r| (r < 2 * ROWS).then_some((r / 8 % 2, r / 16 * 8 + r % 8)),
                column: &Some,
            };
            comes_back(encoding, strips, &[&gate, &up], &turns);
        }
    }
}
