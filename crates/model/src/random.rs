//! The counter-based generator behind sampling: Philox4x32-10 (Salmon et al., "Parallel random
//! numbers: as easy as 1, 2, 3", SC 2011).
//!
//! Owns the map from (seed, token index, purpose) to a uniform number. There is no state, so a
//! number depends neither on what was drawn before nor on what else runs: same seed and request,
//! same tokens. Refuses to be cryptographic.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: u32 = 10;

/// What a number is for. Numbers of different purposes are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Draws a token from the target's distribution.
    Target = 0,
    /// Decides whether a sampled draft is accepted.
    Accept = 1,
    /// Draws from the residual distribution after a rejection.
    Residual = 2,
    /// Draws a draft from the drafter's distribution.
    Draft = 3,
    /// Derives the seed of a parallel sample of one request.
    Sample = 4,
}

/// Philox4x32-10: a bijection of `counter` chosen by `key`.
#[must_use]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// 64 random bits for the token at `index` of a sequence.
#[must_use]
pub fn bits(seed: u64, index: u32, purpose: Purpose) -> u64 {
    let key = [seed as u32, (seed >> 32) as u32];
    let words = philox([index, purpose as u32, 0, 0], key);
    u64::from(words[0]) | u64::from(words[1]) << 32
}

/// A uniform number in `[0, 1)`, a multiple of 2^-53, for the token at `index` of a sequence.
#[must_use]
pub fn uniform(seed: u64, index: u32, purpose: Purpose) -> f64 {
    const STEP: f64 = 1.0 / (1u64 << 53) as f64;
    (bits(seed, index, purpose) >> 11) as f64 * STEP
}

/// Seed of parallel sample `sample` of a request: sample 0 keeps the request's own seed, so that it
/// gives the text of the request alone.
#[must_use]
pub fn sample_seed(seed: u64, sample: u32) -> u64 {
    match sample {
        0 => seed,
        _ => bits(seed, sample, Purpose::Sample),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn known_answers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_has_the_moments_of_a_uniform() {
        let n = 100_000u32;
        let (mut sum, mut squares) = (0.0, 0.0);
        for index in 0..n {
            let u = uniform(7, index, Purpose::Target);
            assert!((0.0..1.0).contains(&u));
            sum += u;
            squares += u * u;
        }
        assert!((sum / f64::from(n) - 0.5).abs() < 0.004);
        assert!((squares / f64::from(n) - 1.0 / 3.0).abs() < 0.004);
    }

    #[test]
    fn purposes_seeds_and_samples_differ() {
        assert_ne!(bits(1, 2, Purpose::Target), bits(1, 2, Purpose::Accept));
        assert_ne!(bits(1, 2, Purpose::Target), bits(2, 2, Purpose::Target));
        assert_ne!(
            bits(1, 2, Purpose::Target),
            bits(1 << 32, 2, Purpose::Target)
        );
        assert_eq!(sample_seed(9, 0), 9);
        assert_ne!(sample_seed(9, 1), sample_seed(9, 2));
    }
}
