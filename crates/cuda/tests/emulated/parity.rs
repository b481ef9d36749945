//! Every instruction of the resident step against its reference op on the same operands: the comparison
//! that `resident_check ops` runs on a GPU, here on the emulator.

use cuda::images::Activations;
use cuda::load::formats;
use cuda::parity::{Case, Compared, step};
use cuda::program::Formats;
use cuda::replay::Replay;
use cuda::schedule::{Schedule, Shard};
use cuda::strips::Format;
use cuda::synthetic;
use cuda_emulator::Bug;

use crate::group::{CTAS, Group, Model};
use crate::resident::{deep, wide};

/// Steps of `rows` rows each.
fn compare(model: &Model, ranks: usize, rows: &[u32]) -> Vec<Compared> {
    compare_split(model, ranks, rows, None)
}

/// The same; full attention in so many parts of so many positions where it says so.
pub(crate) fn compare_split(
    model: &Model,
    ranks: usize,
    rows: &[u32],
    split: Option<(i32, i32)>,
) -> Vec<Compared> {
    let mut group = model.group(ranks);
    for rank in &mut group.ranks {
        split.into_iter().for_each(|s| rank.split_attention(s));
    }
    compare_group(model, group, rows)
}

pub(crate) fn compare_group(model: &Model, group: Group, rows: &[u32]) -> Vec<Compared> {
    compare_after(model, group, (0, rows))
}

/// The same, where whole steps come first: `whole` positions, 8 a step, of a model whose keys and values are those of the
/// replay without the machine's operands (one layer).
pub(crate) fn compare_after(
    model: &Model,
    mut group: Group,
    (whole, rows): (usize, &[u32]),
) -> Vec<Compared> {
    let ranks = group.ranks.len();
    let (config, weights) = (&model.config, model.weights());
    let shard = Shard {
        rank: 0,
        ranks,
        ctas: CTAS,
    };
    let schedule = Schedule::new(config, shard).unwrap();
    let formats = formats(&weights, None);
    let replay = Replay::new(config, &weights, &schedule).as_device(model.numbers);
    let mut case = Case {
        config,
        schedule: &schedule,
        formats: &formats,
        replay,
    };
    for position in (0..whole).step_by(8) {
        let tokens: Vec<u32> = (0..8)
            .map(|r| (position as u32 * 5 + r * 13) % 97)
            .collect();
        group.set(&tokens, position, 0);
        group.run(1, position as u64 + 1, Bug::None).unwrap();
        case.replay.run(&tokens, position, usize::MAX);
    }
    let (mut position, mut out) = (whole, Vec::new());
    for (n, &rows) in rows.iter().enumerate() {
        let token = |r: u32| (n as u32 * 31 + r * 17 + 5) % 97;
        let tokens: Vec<u32> = (0..rows).map(token).collect();
        out.extend(step(&mut case, &mut group, &tokens, position).unwrap());
        position += tokens.len();
    }
    out
}

pub(crate) fn assert_holds(name: &str, compared: &[Compared]) {
    assert!(compared.len() > 10, "{name}");
    for c in compared {
        assert!(c.holds(), "{name}: {c:?}");
    }
}

#[test]
fn every_instruction_of_tiny_checkpoints_matches_its_reference_op() {
    for (name, rows) in [
        ("fallbacks-bf16-s1", &[3, 1, 8][..]),
        ("fused-mxfp4-bf16-router-s1", &[3, 8]),
        ("flash-fp8-split-s1", &[3]),
    ] {
        assert_holds(name, &compare(&Model::golden(name), 1, rows));
    }
}

#[test]
fn every_instruction_matches_on_two_ranks() {
    let config = synthetic::eight_ranks();
    let formats = Formats::release(&config, Format::Fp8);
    let model = Model::synthetic(config, &formats);
    assert_holds("synthetic", &compare(&model, 2, &[3]));
}

#[test]
fn every_instruction_matches_with_plain_e4m3_activations() {
    let model = Model::golden("fused-mxfp4-bf16-router-s1").with(Activations::E4m3);
    assert_holds("one term", &compare(&model, 1, &[3]));
    // The test can tell: against exact activations products are off by what e4m3 loses.
    let group = model.group(1);
    let off = compare_group(&model.with(Activations::Exact), group, &[3]);
    let qkv = off.iter().find(|c| c.op == "QKV").unwrap();
    assert!((5e-3..0.2).contains(&qkv.l2), "{qkv:?}");
    let router = off.iter().find(|c| c.op == "ROUTER").unwrap();
    assert!(router.holds(), "{router:?}");
}

#[test]
fn every_instruction_of_wide_layers_matches_its_reference_op() {
    let compared = compare(&wide(1024), 1, &[5]);
    assert_holds("1024 columns", &compared);
}

#[test]
fn every_instruction_of_deep_layers_matches_its_reference_op() {
    let compared = compare(&deep(), 1, &[5, 1]);
    assert_holds("512 and 2048 inner columns", &compared);
}
