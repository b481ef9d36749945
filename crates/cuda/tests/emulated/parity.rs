//! Every instruction of the resident step against its reference op on the same operands: the comparison
//! that `resident_check ops` runs on a GPU, here on the emulator.

use cuda::load::formats;
use cuda::parity::{Case, Compared, step};
use cuda::program::Formats;
use cuda::replay::Replay;
use cuda::schedule::{Schedule, Shard};
use cuda::strips::Format;
use cuda::synthetic;

use crate::group::{CTAS, Model};

/// Steps of `rows` rows each.
fn compare(model: &Model, ranks: usize, rows: &[u32]) -> Vec<Compared> {
    let (config, weights) = (&model.config, model.weights());
    let shard = Shard {
        rank: 0,
        ranks,
        ctas: CTAS,
    };
    let schedule = Schedule::new(config, shard).unwrap();
    let formats = formats(&weights);
    let mut case = Case {
        config,
        schedule: &schedule,
        formats: &formats,
        replay: Replay::new(config, &weights, &schedule).rounded(),
    };
    let mut group = model.group(ranks);
    let (mut position, mut out) = (0, Vec::new());
    for (n, &rows) in rows.iter().enumerate() {
        let token = |r: u32| (n as u32 * 31 + r * 17 + 5) % 97;
        let tokens: Vec<u32> = (0..rows).map(token).collect();
        out.extend(step(&mut case, &mut group, &tokens, position).unwrap());
        position += tokens.len();
    }
    out
}

fn assert_holds(name: &str, compared: &[Compared]) {
    assert!(compared.len() > 10, "{name}");
    for c in compared {
        assert!(c.holds(true), "{name}: {c:?}");
    }
}

#[test]
fn every_instruction_of_tiny_checkpoints_matches_its_reference_op() {
    for (name, rows) in [
        ("fused-mxfp4-bf16-router-s1", &[3, 8][..]),
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
