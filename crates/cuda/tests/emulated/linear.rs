//! Parity of `kernels/linear.cuh` with `model::reference::linear` on dequantised weights and bf16
//! activations, on the emulator and (in `gpu.rs`) on a GPU; the planted bugs of the ring.

use crate::cases::{Case, relative_error};
use cuda_emulator::{Bug, Format, Grid, linear};

const NONE: Grid = Grid {
    ctas: 2,
    seed: 1,
    bug: Bug::None,
};

#[test]
fn product_matches_the_definition_in_both_formats() {
    // A single tile leaves one warpgroup with no work.
    for (format, rows, seed) in [
        (Format::Fp4, 200, 3),
        (Format::Fp8, 200, 4),
        (Format::Fp8, 60, 5),
    ] {
        let case = Case::new(format, rows, 2048, seed);
        let mut out = vec![f32::NAN; case.tiles() * 512];
        let grid = Grid { seed, ..NONE };
        linear(grid, format, &case.pages, &case.x, &mut out).unwrap();
        let error = relative_error(&case.rows(&out), &case.expected());
        assert!(error < 2e-4, "{format:?}: relative L2 error {error:.2e}");
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_or_on_the_grid() {
    let case = Case::new(Format::Fp4, 128, 512, 9);
    let mut all = vec![0.0; case.tiles() * 512];
    linear(NONE, Format::Fp4, &case.pages, &case.x, &mut all).unwrap();
    let mut alone = vec![0.0; case.tiles() * 512];
    let mut x = case.x.clone();
    x[512..].fill(7.25); // other tokens change: token 0 must not
    let grid = Grid {
        ctas: 1,
        seed: 5,
        ..NONE
    };
    linear(grid, Format::Fp4, &case.pages, &x, &mut alone).unwrap();
    for (all, alone) in all.chunks_exact(8).zip(alone.chunks_exact(8)) {
        assert_eq!(all[0].to_bits(), alone[0].to_bits());
    }
}

#[test]
fn any_order_of_threads_and_copies_gives_the_same_bits() {
    let case = Case::new(Format::Fp8, 64, 1024, 2);
    let mut first = vec![0.0; case.tiles() * 512];
    linear(NONE, Format::Fp8, &case.pages, &case.x, &mut first).unwrap();
    for seed in 2..6 {
        let mut out = vec![f32::NAN; first.len()];
        let grid = Grid { seed, ..NONE };
        linear(grid, Format::Fp8, &case.pages, &case.x, &mut out).unwrap();
        assert!(
            first
                .iter()
                .zip(&out)
                .all(|(a, b)| a.to_bits() == b.to_bits()),
            "seed {seed}"
        );
    }
}

/// A planted bug must end in a report or in wrong numbers, for some seed at once.
#[test]
fn planted_bugs_of_the_ring_are_caught() {
    let case = Case::new(Format::Fp8, 64, 2048, 6);
    for bug in [Bug::NoSlotWait, Bug::NoArrive] {
        let caught = (1..4).any(|seed| {
            let mut out = vec![f32::NAN; case.tiles() * 512];
            let grid = Grid { ctas: 1, seed, bug };
            match linear(grid, Format::Fp8, &case.pages, &case.x, &mut out) {
                Err(report) => {
                    assert!(!report.is_empty());
                    true
                }
                Ok(()) => {
                    let error = relative_error(&case.rows(&out), &case.expected());
                    error.is_nan() || error > 2e-4
                }
            }
        });
        assert!(caught, "{bug:?} went unnoticed");
    }
}
