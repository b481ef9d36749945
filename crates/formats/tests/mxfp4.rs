//! MXFP4 against the text of OCP Microscaling Formats v1.0: every code with every scale, rounding
//! against a search over all codes, and round trips of random blocks.

use formats::mxfp4::{
    BLOCK, BLOCK_BYTES, E2M1, SCALE_NAN, ScaleRule, decode_block, decode_scale, encode_block,
    encode_code,
};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// OCP table 5: sign, two exponent bits with bias 1, one mantissa bit; exponent 0 is subnormal.
fn e2m1(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 1 & 3), f64::from(code & 1));
    let magnitude = match exponent {
        0 => mantissa * 0.5,
        e => (1.0 + mantissa / 2.0) * 2f64.powi(e - 1),
    };
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The nearest code by search; among two equally near ones that with mantissa bit 0.
fn nearest(value: f64) -> u8 {
    let far = |code: u8| (e2m1(code) - value.abs()).abs();
    (0..8u8)
        .min_by(|&a, &b| far(a).total_cmp(&far(b)).then((a & 1).cmp(&(b & 1))))
        .unwrap()
}

fn decoded(values: &[f32; BLOCK], rule: ScaleRule) -> ([f32; BLOCK], u8) {
    let (codes, scale) = encode_block(values, rule);
    let mut out = [0.0; BLOCK];
    decode_block(&codes, scale, &mut out);
    (out, scale)
}

fn squared_error(values: &[f32; BLOCK], rule: ScaleRule) -> f64 {
    let (out, _) = decoded(values, rule);
    let pairs = values.iter().zip(&out);
    pairs
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
        .sum()
}

#[test]
fn every_code_with_every_scale() {
    for scale in 0..=u8::MAX {
        let power = 2f64.powi(i32::from(scale) - 127);
        for code in 0..16u8 {
            let mut out = [0.0; BLOCK];
            decode_block(&[code | code << 4; BLOCK_BYTES], scale, &mut out);
            for value in out {
                if scale == SCALE_NAN {
                    assert!(value.is_nan(), "the reserved scale never gives a number");
                } else {
                    let wanted = (e2m1(code) * power) as f32;
                    assert_eq!(value.to_bits(), wanted.to_bits(), "{code} at {scale}");
                    // f64 holds every product exactly; so does f32, but for 6 * 2^127.
                    assert!(
                        wanted.is_infinite() || f64::from(wanted) == e2m1(code) * power,
                        "{code} at {scale} is exact"
                    );
                }
            }
        }
    }
    assert_eq!(decode_scale(0), 2f32.powi(-126) / 2.0);
    assert_eq!(decode_scale(127), 1.0);
    assert_eq!(decode_scale(254), 2f32.powi(127));
    assert!(decode_scale(SCALE_NAN).is_nan());
}

#[test]
fn nibbles_are_even_column_low() {
    let mut out = [0.0; BLOCK];
    let codes: [u8; BLOCK_BYTES] =
        std::array::from_fn(|j| (j as u8 % 8) | ((j as u8 + 8) % 16) << 4);
    decode_block(&codes, 127, &mut out);
    for (j, byte) in codes.iter().enumerate() {
        assert_eq!(out[2 * j], E2M1[usize::from(byte & 15)]);
        assert_eq!(out[2 * j + 1], E2M1[usize::from(byte >> 4)]);
    }
}

#[test]
fn codes_come_back() {
    for code in 0..16u8 {
        assert_eq!(f64::from(E2M1[usize::from(code)]), e2m1(code));
        assert_eq!(encode_code(E2M1[usize::from(code)]), code);
    }
}

#[test]
fn ties_go_to_even_and_large_values_saturate() {
    for eighths in 0..=80u8 {
        // Every multiple of 1/8 up to 10: all values, all midpoints, and both neighbours of each.
        let middle = f32::from(eighths) / 8.0;
        for value in [middle.next_down().max(0.0), middle, middle.next_up()] {
            assert_eq!(encode_code(value), nearest(f64::from(value)), "{value}");
            assert_eq!(
                encode_code(-value),
                nearest(f64::from(value)) | 8,
                "-{value}"
            );
        }
    }
    for huge in [7.0, 1e30, f32::MAX, f32::INFINITY] {
        assert_eq!((encode_code(huge), encode_code(-huge)), (7, 15));
    }
}

/// OCP section 6.3 at the edges: the shared exponent is floor(log2(amax)) - 2, held to what E8M0 has.
#[test]
fn shared_exponent_of_ocp() {
    for exponent in -126..=127i32 {
        for mantissa in [1.0, 1.25, 1.5, 1.999_999_9] {
            let mut values = [0.0; BLOCK];
            values[17] = -(mantissa as f32) * 2f32.powi(exponent);
            let (_, scale) = encode_block(&values, ScaleRule::Ocp);
            assert_eq!(i32::from(scale), (exponent - 2 + 127).max(0));
        }
    }
    for rule in [ScaleRule::Ocp, ScaleRule::LeastSquares] {
        let (out, _) = decoded(&[0.0; BLOCK], rule);
        assert_eq!(out, [0.0; BLOCK]);
        for odd in [f32::NAN, f32::INFINITY, f32::MAX, f32::from_bits(1)] {
            let (_, scale) = decoded(&[odd; BLOCK], rule);
            assert_ne!(scale, SCALE_NAN, "never written, whatever comes in");
        }
    }
}

/// Numbers of all magnitudes, with runs of equal exponents so that blocks are not all one outlier.
fn block() -> impl Strategy<Value = [f32; BLOCK]> {
    let spread = (-140i32..=127, 0i32..=12);
    (
        spread,
        proptest::array::uniform32((-2.0f32..2.0, 0i32..=12)),
    )
        .prop_map(|((top, spread), values)| {
            values.map(|(m, down)| (f64::from(m) * 2f64.powi(top - down.min(spread))) as f32)
        })
}

proptest! {
    // The same cases in every run.
    #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn least_squares_is_never_worse(values in block()) {
        let (ocp, best) = (ScaleRule::Ocp, ScaleRule::LeastSquares);
        prop_assert!(squared_error(&values, best) <= squared_error(&values, ocp));
    }

    #[test]
    fn every_value_gets_its_nearest_code(values in block()) {
        for rule in [ScaleRule::Ocp, ScaleRule::LeastSquares] {
            let (codes, scale) = encode_block(&values, rule);
            for (i, value) in values.iter().enumerate() {
                let code = codes[i / 2] >> (i % 2 * 4) & 15;
                let scaled = f64::from(*value) / f64::from(decode_scale(scale));
                let sign = u8::from(value.is_sign_negative()) << 3;
                prop_assert_eq!(code, nearest(scaled) | sign);
            }
        }
    }

    /// What decoding gives is representable, so that a second encoding loses nothing.
    #[test]
    fn encoding_again_changes_nothing(codes in proptest::array::uniform16(any::<u8>()), scale in 0u8..=252) {
        let mut values = [0.0; BLOCK];
        decode_block(&codes, scale, &mut values);
        for rule in [ScaleRule::Ocp, ScaleRule::LeastSquares] {
            prop_assert_eq!(values, decoded(&values, rule).0);
        }
    }
}
