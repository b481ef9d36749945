//! FP8 E4M3 against the OCP text (OFP8 v1.0): every code by an independent formula, rounding against
//! a search over all codes, and grids with ragged edges.

use formats::{bf16, fp8};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// Sign, four exponent bits with bias 7, three mantissa bits; S.1111.111 is NaN, no infinities.
fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa / 8.0 * 2f64.powi(-6),
        (e, _) => (1.0 + mantissa / 8.0) * 2f64.powi(e - 7),
    };
    if code & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

/// The nearest code by search, 448 for all beyond; among two equally near ones the even one.
fn nearest(value: f32) -> u8 {
    let far = |code: u8| (e4m3(code) - f64::from(value.abs()).min(448.0)).abs();
    let code = (0..0x7F)
        .min_by(|&a, &b| far(a).total_cmp(&far(b)).then((a & 1).cmp(&(b & 1))))
        .unwrap();
    code | u8::from(value.is_sign_negative()) << 7
}

#[test]
fn every_code_by_the_formula_and_back() {
    for code in 0..=u8::MAX {
        let value = fp8::decode(code);
        if code & 0x7F == 0x7F {
            assert!(value.is_nan());
            assert!(fp8::decode(fp8::encode(value)).is_nan());
        } else {
            assert_eq!(
                f64::from(value).to_bits(),
                e4m3(code).to_bits(),
                "{code:#x}"
            );
            assert_eq!(fp8::encode(value), code, "{code:#x} comes back");
        }
    }
    assert_eq!(fp8::decode(0x7E), fp8::MAX);
}

#[test]
fn midpoints_and_their_neighbours() {
    for code in 0..0x7E {
        let middle = ((e4m3(code) + e4m3(code + 1)) / 2.0) as f32;
        for value in [middle.next_down(), middle, middle.next_up()] {
            assert_eq!(fp8::encode(value), nearest(value), "{value}");
            assert_eq!(fp8::encode(-value), nearest(-value), "-{value}");
        }
    }
}

#[test]
fn large_values_saturate_and_nan_stays() {
    for huge in [449.0, 464.0, 465.0, 1e30, f32::MAX, f32::INFINITY] {
        assert_eq!((fp8::encode(huge), fp8::encode(-huge)), (0x7E, 0xFE));
    }
    assert_eq!(fp8::encode(f32::NAN) & 0x7F, 0x7F);
    assert_eq!(fp8::encode(f32::from_bits(1)), 0);
    assert_eq!(fp8::encode(-0.0), 0x80);
}

/// Whatever the shape, scale `[r / 128, c / 128]` belongs to element `[r, c]`.
#[test]
fn ragged_grids() {
    for (rows, columns) in [
        (1, 1),
        (127, 129),
        (128, 128),
        (129, 1),
        (300, 200),
        (257, 384),
    ] {
        // Each block has its own magnitude, so that a wrong scale shows.
        let block = |i: usize| (i / columns / 128) * columns.div_ceil(128) + i % columns / 128;
        let value = |i: usize| ((i % 17) as f32 - 8.0) * 2f32.powi(block(i) as i32);
        let weight: Vec<f32> = (0..rows * columns).map(value).collect();
        let (codes, scales) = fp8::encode_weight(&weight, rows, columns);
        assert_eq!(scales.len(), rows.div_ceil(128) * columns.div_ceil(128));
        for (i, (code, wanted)) in codes.iter().zip(&weight).enumerate() {
            let found = fp8::decode(*code) * scales[block(i)];
            let allowed = wanted.abs() / 15.0;
            assert!(
                (found - wanted).abs() <= allowed,
                "[{rows}, {columns}] at {i}"
            );
        }
    }
    let (codes, scales) = fp8::encode_weight(&[0.0; 6], 2, 3);
    assert_eq!((codes, scales), (vec![0; 6], vec![1.0]));
}

proptest! {
    // The same cases in every run.
    #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn rounds_to_the_nearest(bits in any::<u32>()) {
        let value = f32::from_bits(bits);
        prop_assume!(!value.is_nan());
        prop_assert_eq!(fp8::encode(value), nearest(value));
    }

    #[test]
    fn rounds_to_the_nearest_in_range(value in -500.0f32..500.0) {
        prop_assert_eq!(fp8::encode(value), nearest(value));
    }

    /// The error of a row is half a step: 1/16 of the value, or of the group's subnormal step.
    #[test]
    fn rows_round_trip(row in proptest::collection::vec(-1e4f32..1e4, 1..400)) {
        let (codes, scales) = fp8::encode_row(&row);
        prop_assert_eq!(scales.len(), row.len().div_ceil(fp8::BLOCK));
        for (i, (code, wanted)) in codes.iter().zip(&row).enumerate() {
            let scale = scales[i / fp8::BLOCK];
            let allowed = (wanted.abs() / 16.0).max(scale / 1024.0) * 1.000_01;
            prop_assert!((fp8::decode(*code) * scale - wanted).abs() <= allowed);
        }
    }

    #[test]
    fn bf16_rounds_to_the_nearest_even(bits in any::<u32>()) {
        let value = f32::from_bits(bits);
        let coded = bf16::encode(value);
        if value.is_nan() {
            prop_assert!(bf16::decode(coded).is_nan());
        } else {
            let (low, rest) = (bits >> 16, bits & 0xFFFF);
            let up = rest > 0x8000 || (rest == 0x8000 && low & 1 == 1);
            prop_assert_eq!(u32::from(coded), low + u32::from(up));
        }
    }
}

#[test]
fn every_bf16_comes_back() {
    for bits in 0..=u16::MAX {
        let value = bf16::decode(bits);
        assert!(value.is_nan() || bf16::encode(value) == bits, "{bits:#x}");
        assert!(value.is_nan() || bf16::round(value) == value);
    }
}
