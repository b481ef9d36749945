//! The all-reduce on 1, 2, 4 and 8 emulated ranks, and what its planted bugs do.

use cuda_emulator::{Bug, all_reduce};

use crate::cases::Random;

fn input(ranks: usize) -> Vec<f32> {
    let mut random = Random(ranks as u64 + 40);
    (0..ranks * 60).map(|_| random.value()).collect()
}

/// Sum in rank order, as every rank must have it, bit for bit.
fn expected(ranks: usize, epochs: usize, input: &[f32]) -> Vec<f32> {
    (0..input.len() / ranks)
        .map(|i| {
            input
                .chunks(input.len() / ranks)
                .fold(0.0, |sum, rank| sum + rank[i] * epochs as f32)
        })
        .collect()
}

#[test]
fn every_rank_gets_the_same_bits_in_any_order() {
    for ranks in [1, 2, 4, 8] {
        let input = input(ranks);
        let expected = expected(ranks, 5, &input);
        for seed in 1..4 {
            let out = all_reduce(ranks, 5, seed, Bug::None, &input).unwrap();
            for (rank, out) in out.chunks(expected.len()).enumerate() {
                let same = out
                    .iter()
                    .zip(&expected)
                    .all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{ranks} ranks, rank {rank}, seed {seed}");
            }
        }
    }
}

#[test]
fn a_wrong_epoch_is_reported_as_a_deadlock_that_names_the_wait() {
    let report = all_reduce(4, 3, 1, Bug::WrongEpoch, &input(4)).unwrap_err();
    assert!(
        report.contains("deadlock") && report.contains("waits in word"),
        "{report}"
    );
}

#[test]
fn a_stale_word_is_caught_by_its_sum() {
    let input = input(4);
    let expected = expected(4, 3, &input);
    let wrong = (1..4).any(
        |seed| match all_reduce(4, 3, seed, Bug::StaleWord, &input) {
            Err(_) => true,
            Ok(out) => out.chunks(expected.len()).any(|out| out != expected),
        },
    );
    assert!(wrong, "reading without looking at the tag went unnoticed");
}
