//! Every arm against f64 over the decoded weights, arms against each other bit for bit, and rows
//! against the same rows computed alone.

use model::random::{Purpose, bits};
use model::weights::Matrix;
use proptest::prelude::*;

use super::*;
use crate::pool::Pool;

const ENCODINGS: [Encoding; 4] = [
    Encoding::Mxfp4,
    Encoding::Fp8,
    Encoding::Bf16,
    Encoding::F32,
];

/// Valid random codes and scales of `encoding`.
fn random_bytes(encoding: Encoding, rows: usize, cols: usize, seed: u64) -> (Vec<u8>, Vec<u8>) {
    let word = |i: usize| bits(seed, i as u32, Purpose::Sample);
    let byte = |i: usize| word(i) as u8;
    let unit = |i: usize| (word(i) >> 40) as f32 / (1 << 24) as f32 - 0.5;
    match encoding {
        Encoding::Mxfp4 => (
            (0..rows * cols / 2).map(byte).collect(),
            (0..rows * cols / 32).map(|i| 118 + byte(i) % 12).collect(),
        ),
        Encoding::Fp8 => (
            (0..rows * cols)
                .map(|i| byte(i) & if byte(i) & 0x7F == 0x7F { 0xFE } else { 0xFF })
                .collect(),
            (0..rows.div_ceil(128) * cols.div_ceil(128))
                .flat_map(|i| (unit(i) / 100.0).to_le_bytes())
                .collect(),
        ),
        Encoding::Bf16 => (
            (0..rows * cols)
                .flat_map(|i| formats::bf16::encode(unit(i)).to_le_bytes())
                .collect(),
            Vec::new(),
        ),
        Encoding::F32 => (
            (0..rows * cols)
                .flat_map(|i| unit(i).to_le_bytes())
                .collect(),
            Vec::new(),
        ),
    }
}

/// The FP8 products of drafts: arms bit-equal, rows alone as among others, near the exact product.
#[test]
fn products_for_drafts_round_alike_on_every_arm() {
    for (seed, rows, cols, count) in [(1, 40, 576, 8), (2, 17, 300, 5), (3, 16, 1536, 1)] {
        let (codes, scales) = random_bytes(Encoding::Fp8, rows, cols, seed);
        let matrix = Matrix::from_bytes(rows, cols, Encoding::Fp8, &codes, &scales);
        let exact = Panels::pack(&matrix, &Pool::new(1)).unwrap();
        let packed = Panels::pack(&matrix, &Pool::new(1)).unwrap().for_drafts();
        let activations = Activations::new(count, cols);
        for r in 0..count {
            let values = (0..cols).map(|c| {
                let word = bits(seed ^ 9, (r * cols + c) as u32, Purpose::Draft);
                (word >> 40) as f32 / (1 << 22) as f32 - 2.0
            });
            // SAFETY: one thread.
            unsafe { activations.set(Isa::detect(), r, &values.collect::<Vec<_>>()) };
        }
        let all: Vec<u32> = (0..count as u32).collect();
        let found = run(Isa::Portable, &packed, &activations, &all);
        for isa in arms() {
            assert_eq!(run(isa, &packed, &activations, &all), found, "{isa:?}");
            let alone = run(isa, &packed, &activations, &all[..1]);
            assert_eq!(alone, found[..rows], "{isa:?}");
        }
        let wanted = run(Isa::Portable, &exact, &activations, &all);
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        let difference: Vec<f32> = found.iter().zip(&wanted).map(|(a, b)| a - b).collect();
        let error = norm(&difference) / norm(&wanted);
        assert!((1e-5..4e-3).contains(&error), "{error}");
    }
}

fn arms() -> Vec<Isa> {
    [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx]
        .into_iter()
        .filter(|isa| *isa <= Isa::detect())
        .collect()
}

/// All outputs `[rows.len(), matrix rows]`.
fn run(isa: Isa, matrix: &Panels, x: &Activations, rows: &[u32]) -> Vec<f32> {
    let mut out = vec![0.0; rows.len() * matrix.rows()];
    // SAFETY: one thread.
    unsafe {
        linear(
            isa,
            matrix,
            0..matrix.panels(),
            x,
            rows,
            |i, panel, values| {
                let start = i * matrix.rows() + panel * PANEL;
                let count = PANEL.min(matrix.rows() - panel * PANEL);
                out[start..start + count].copy_from_slice(&values[..count]);
            },
        );
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn products_are_right_and_bit_equal(
        seed in any::<u64>(),
        rows in 1usize..70,
        blocks in 1usize..7,
        trim in 0usize..32,
        count in 1usize..12,
    ) {
        for encoding in ENCODINGS {
            let cols = match encoding {
                Encoding::Mxfp4 => blocks * 32,
                _ => blocks * 47 + 32 - trim,
            };
            let (codes, scales) = random_bytes(encoding, rows, cols, seed);
            let matrix = Matrix::from_bytes(rows, cols, encoding, &codes, &scales);
            let packed = Panels::pack(&matrix, &Pool::new(2)).unwrap();
            let x: Vec<Vec<f32>> = (0..count)
                .map(|r| (0..cols).map(|c| {
                    let word = bits(seed ^ 77, (r * cols + c) as u32, Purpose::Draft);
                    (word >> 40) as f32 / (1 << 22) as f32 - 2.0
                }).collect())
                .collect();
            let activations = Activations::new(count, cols);
            for (r, values) in x.iter().enumerate() {
                // SAFETY: one thread.
                unsafe { activations.set(Isa::detect(), r, values) };
            }
            let all: Vec<u32> = (0..count as u32).collect();
            let outputs: Vec<_> = arms().iter().map(|&isa| run(isa, &packed, &activations, &all)).collect();
            for other in &outputs[1..] {
                for (a, b) in outputs[0].iter().zip(other) {
                    prop_assert_eq!(a.to_bits(), b.to_bits(), "{:?}", encoding);
                }
            }
            for row in &all {
                let alone = run(Isa::detect(), &packed, &activations, &[*row]);
                let start = *row as usize * rows;
                prop_assert_eq!(&alone[..], &outputs[0][start..start + rows]);
            }
            check_against_f64(&matrix, &packed, &x, &outputs[0])?;
        }
    }
}

fn check_against_f64(
    matrix: &Matrix<'_>,
    packed: &Panels,
    x: &[Vec<f32>],
    found: &[f32],
) -> Result<(), TestCaseError> {
    let (mut row, mut again) = (vec![0.0; matrix.cols], vec![0.0; matrix.cols]);
    for r in 0..matrix.rows {
        matrix.row(r).decode(&mut row);
        packed.decode_row(r, &mut again);
        prop_assert_eq!(&row, &again);
        for (i, x) in x.iter().enumerate() {
            let terms = row
                .iter()
                .zip(x)
                .map(|(w, x)| f64::from(*w) * f64::from(*x));
            let exact: f64 = terms.clone().sum();
            let size: f64 = terms.map(f64::abs).sum();
            let error = (f64::from(found[i * matrix.rows + r]) - exact).abs();
            prop_assert!(
                error <= 1e-4 * size + 1e-12,
                "{:?}: {error} of {size}",
                matrix.encoding()
            );
        }
    }
    Ok(())
}

#[test]
fn nan_codes_are_refused() {
    let pool = Pool::new(1);
    let scale = 1.0f32.to_le_bytes();
    let mut codes = vec![0x38; 64];
    codes[33] = 0xFF;
    let matrix = Matrix::from_bytes(2, 32, Encoding::Fp8, &codes, &scale);
    assert_eq!(Panels::pack(&matrix, &pool).err().map(|e| e.row), Some(1));
    let infinite = f32::INFINITY.to_le_bytes();
    let matrix = Matrix::from_bytes(1, 32, Encoding::Fp8, &[0x38; 32], &infinite);
    assert_eq!(Panels::pack(&matrix, &pool).err().map(|e| e.row), Some(0));
    let matrix = Matrix::from_bytes(1, 32, Encoding::Mxfp4, &[0; 16], &[0xFF]);
    assert_eq!(Panels::pack(&matrix, &pool).err().map(|e| e.row), Some(0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// The AMX arm with its instruction emulated. The instruction itself is among `arms` where the
    /// processor has it.
    #[test]
    fn amx_tiles_are_bit_equal(seed in any::<u64>(), rows in 1usize..40, blocks in 1usize..7) {
        const COUNT: usize = 8;
        let cols = blocks * 32;
        let (codes, scales) = random_bytes(Encoding::Mxfp4, rows, cols, seed);
        let matrix = Matrix::from_bytes(rows, cols, Encoding::Mxfp4, &codes, &scales);
        let packed = Panels::pack(&matrix, &Pool::new(1)).unwrap();
        let activations = Activations::new(COUNT, cols);
        let values = |r: usize| (0..cols).map(move |c| {
            let word = bits(seed ^ 5, (r * cols + c) as u32, Purpose::Draft);
            (word >> 40) as f32 / (1 << 22) as f32 - 2.0
        });
        for r in 0..COUNT {
            // SAFETY: one thread.
            unsafe { activations.set(Isa::detect(), r, &values(r).collect::<Vec<_>>()) };
        }
        // SAFETY: one thread.
        let x: [ActivationRow<'_>; COUNT] =
            std::array::from_fn(|r| unsafe { activations.row(r, cols) });
        for panel in 0..packed.panels() {
            let tiles = amx::panel_times(&packed, panel, &x, amx::emulated(COUNT));
            prop_assert_eq!(tiles, portable::panel(&packed, false, panel, &x));
        }
    }
}
