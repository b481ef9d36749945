//! Activations as two f16, keys and values as two bf16: what the CPU backend's f32 gives, up to the bits that are left.
//!
//! Against transformers with the CPU backend's bounds, op by op against the replay, and what a kernel of one term each
//! does to the same comparison.

use cuda::images::{Activations, Kv, Numbers};
use cuda::parity::Compared;
use cuda_emulator::Bug;

use crate::draft::{PROMPT, RUN, Run, pair, tokens};
use crate::golden;
use crate::group::{Model, differences};
use crate::parity::{assert_holds, compare_group, compare_split};
use crate::resident::{assert_same_bits, wide};

/// Bound of the mean difference of log-probabilities: the CPU backend's.
const BOUND: f64 = 2e-2;

/// The largest mean difference of a sequence's log-probabilities from transformers', and positions with another argmax though the
/// oracle is clear.
fn against_transformers(name: &str, numbers: Numbers) -> (f64, usize) {
    let model = Model::golden(name).with(numbers);
    let (mut worst, mut wrong) = (0.0f64, 0);
    let golden = golden::expected(&golden::root("mimo").join(name));
    let sequences = golden["sequences"].as_array().unwrap();
    assert!(!sequences.is_empty(), "{name}");
    for sequence in sequences {
        let ids = golden::tokens(&sequence["token_ids"]);
        assert!(ids.len() <= model.context, "{name}: {} tokens", ids.len());
        let mut scores = golden::Scores::default();
        for (position, row) in logits(&model, &ids).iter().enumerate() {
            scores.add(row, ids.get(position + 1).copied());
        }
        let gaps = golden::numbers(&sequence["top2_gap"]);
        let apart = scores.apart(sequence, Some(&gaps));
        worst = worst.max(apart.mean);
        wrong += apart.wrong.len();
    }
    (worst, wrong)
}

/// Logits after every token, steps of 8 rows.
fn logits(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut group = model.group(1);
    let mut out = Vec::new();
    for (step, rows) in tokens.chunks(8).enumerate() {
        group.set(rows, step * 8, 0);
        group.run(1, step as u64 + 1, Bug::None).unwrap();
        out.extend((0..rows.len()).map(|row| group.logits(row, model.config.vocab_size)));
    }
    out
}

#[test]
fn tiny_checkpoints_equal_transformers_within_the_cpus_bounds() {
    for name in [
        "fallbacks-bf16-s1",
        "flash-fp8-split-s1",
        "fused-fp8-s1",
        "fused-mxfp4-bf16-router-s2",
    ] {
        let (apart, wrong) = against_transformers(name, Numbers::wide());
        println!("{name}: {apart:.1e}, {wrong}");
        assert!(apart < BOUND && wrong == 0, "{name}: {apart:.1e}, {wrong}");
    }
}

/// The test above can tell.
#[test]
fn one_term_is_past_the_cpus_bounds() {
    let (apart, _) = against_transformers("fused-mxfp4-bf16-router-s2", Numbers::default());
    assert!(apart > BOUND, "{apart:.1e}");
}

#[test]
fn steps_match_the_definition() {
    for (name, ranks) in [
        ("fused-mxfp4-bf16-router-s1", 2),
        ("flash-fp8-split-s1", 1),
        ("fallbacks-bf16-s1", 1),
    ] {
        let model = Model::golden(name).with(Numbers::wide());
        let found = differences(&model, ranks, &[3, 1, 8], None);
        println!("{name}: {found:?}");
        // Nothing is rounded so coarsely that the other side of it shows.
        assert!(found.iter().all(|d| *d < 1e-4), "{name}: {found:?}");
    }
}

/// In one part and one tile, or in two of either; with either of the two alone.
#[test]
fn every_instruction_matches_its_reference_op() {
    for (name, ranks, rows, split, numbers) in [
        (
            "fused-mxfp4-bf16-router-s1",
            2,
            &[8, 3][..],
            None,
            Numbers::wide(),
        ),
        ("flash-fp8-split-s1", 1, &[8, 2], None, Numbers::wide()),
        (
            "fallbacks-bf16-s1",
            1,
            &[3, 8],
            None,
            Activations::Wide.into(),
        ),
        (
            "fused-mxfp4-bf16-router-s1",
            1,
            &[8; 5],
            Some((2, 32)),
            Kv::Wide.into(),
        ),
    ] {
        let model = Model::golden(name).with(numbers);
        assert_holds(name, &compare_split(&model, ranks, rows, split));
    }
    let model = wide(1024).with(Numbers::wide());
    assert_holds("1024 columns", &compare_split(&model, 1, &[5], None));
}

#[test]
fn the_comparison_can_tell() {
    let model = Model::golden("fused-mxfp4-bf16-router-s1");
    let group = model.group(1);
    let found = compare_group(&model.with(Activations::Wide), group, &[8]);
    let off = |op: &str| {
        let of = found.iter().filter(|c: &&Compared| c.op == op);
        of.fold(0.0f32, |most, c| most.max(c.l2))
    };
    assert!(off("QKV") > 1e-4 && off("GATE_UP") > 1e-4, "{found:?}");
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    assert_same_bits(&Model::golden("fused-mxfp4-s1").with(Numbers::wide()));
}

#[test]
fn a_run_gives_the_text_of_plain_decoding() {
    let model = pair().with(Numbers::wide());
    let text = |width| {
        let run = Run {
            count: 24,
            width,
            ..RUN
        };
        tokens(&model.group(1).generate(&PROMPT, 40, &run))
    };
    let plain = text(1);
    assert_eq!(plain.len(), 24);
    assert_eq!(plain, text(8));
}
