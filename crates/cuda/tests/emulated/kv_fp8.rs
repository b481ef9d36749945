//! Keys and values in e4m3: the emulator against the replay with the same roundings, bytes of the caches, and what a
//! value past e4m3's largest does.
//!
//! Operands of [`compare_split`] are the machine's own: a row that lands on the other side of an e4m3 rounding (6e-2)
//! stays in the caches, so steps of their own part from the replay further than with bf16.

use cuda::images::Kv;
use cuda::layout::OPS;
use cuda::parity::{Compared, Machine};
use cuda::program::{Formats, Program};
use cuda::strips::Format;
use cuda::synthetic;
use cuda_emulator::Bug;

use crate::group::{CONTEXT, Model, differences};
use crate::parity::{assert_holds, compare_after, compare_group, compare_split};
use crate::resident::assert_same_bits;

#[test]
fn steps_match_the_definition() {
    for (name, ranks) in [
        ("fused-mxfp4-bf16-router-s1", 2),
        ("flash-fp8-split-s1", 2),
        ("flash-bf16-s1", 1),
    ] {
        let model = Model::golden(name).with(Kv::Fp8);
        let found = differences(&model, ranks, &[3, 1, 8], None);
        let same = found.iter().any(|d| *d < 1e-5);
        assert!(
            same && found.iter().all(|d| *d < 8e-3),
            "{name}, {ranks} ranks: {found:?}"
        );
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    assert_same_bits(&Model::golden("flash-fp8-split-s1").with(Kv::Fp8));
}

/// In one part and one tile, or in two of either; windows of 5 and 8 positions among up to 40.
#[test]
fn every_instruction_matches_its_reference_op() {
    for (name, ranks, rows, split) in [
        ("fused-mxfp4-bf16-router-s1", 2, &[8, 3][..], None),
        ("flash-fp8-split-s1", 1, &[8, 2], None),
        ("fallbacks-bf16-s1", 1, &[3, 8], None),
        ("fused-mxfp4-bf16-router-s1", 1, &[8; 5], Some((2, 32))),
    ] {
        let model = Model::golden(name).with(Kv::Fp8);
        let found = compare_split(&model, ranks, rows, split);
        println!("{name}: {:.1e}", largest(&found));
        assert_holds(name, &found);
    }
}

/// One layer of full attention after 184 and 264 positions: all scores that a tile has, and a second tile.
#[test]
fn full_tiles_match_the_reference_op() {
    let mut config = synthetic::eight_ranks();
    config.layers.truncate(1);
    let attention = &mut config.layers[0].attention;
    (attention.heads, attention.kv_heads) = (4, 1);
    (attention.qk_dim, attention.v_dim) = (32, 16);
    let formats = Formats::release(&config, Format::Fp8);
    let mut model = Model::synthetic(config, &formats);
    model.context = 288;
    for (kv, whole) in [
        (Kv::Bf16, 264),
        (Kv::Fp8, 184),
        (Kv::Fp8, 264),
        (Kv::Wide, 264),
    ] {
        model.numbers = kv.into();
        let group = model.group(1);
        let found = compare_after(&model, group, (whole, &[8]));
        println!("{kv:?} {whole}: {:.1e}", largest(&found));
        assert!(
            found.iter().all(Compared::holds),
            "{kv:?} {whole}: {found:?}"
        );
    }
}

/// Values of more columns than a unit of attention takes: two units a row, with and without a window.
#[test]
fn values_wider_than_a_unit_match_the_reference_op() {
    for (kv, window) in [
        (Kv::Bf16, None),
        (Kv::Bf16, Some(12)),
        (Kv::Fp8, None),
        (Kv::Wide, None),
        (Kv::Wide, Some(12)),
    ] {
        let mut config = synthetic::eight_ranks();
        config.layers.truncate(1);
        let attention = &mut config.layers[0].attention;
        (attention.heads, attention.kv_heads) = (4, 1);
        (attention.qk_dim, attention.v_dim) = (176, 168);
        attention.window = window;
        let formats = Formats::release(&config, Format::Bf16);
        let mut model = Model::synthetic(config, &formats);
        (model.numbers, model.context) = (kv.into(), 64);
        let group = model.group(1);
        let found = compare_after(&model, group, (24, &[8, 3]));
        println!("{kv:?} {window:?}: {:.1e}", largest(&found));
        assert!(
            found.iter().all(Compared::holds),
            "{kv:?} {window:?}: {found:?}"
        );
    }
}

/// The largest difference of attention's.
fn largest(found: &[Compared]) -> f32 {
    let of = found.iter().filter(|c| c.op == "ATTENTION");
    of.fold(0.0, |most, c| most.max(c.largest))
}

#[test]
fn the_comparison_can_tell() {
    let model = Model::golden("fused-mxfp4-bf16-router-s1").with(Kv::Fp8);
    let group = model.group(1);
    let found = compare_group(&model.with(Kv::Bf16), group, &[8]);
    assert!(largest(&found) > 5e-3, "{:.1e}", largest(&found));
}

#[test]
fn caches_take_half_the_bytes_and_a_drafters_stay_as_they_are() {
    let bytes = |kv| {
        let group = Model::synthetic_drafted().with(kv).group(1);
        let Program {
            kv_bytes,
            draft_kv_bytes,
            ..
        } = group.ranks[0].program;
        (kv_bytes, draft_kv_bytes)
    };
    let (bf16, fp8) = (bytes(Kv::Bf16), bytes(Kv::Fp8));
    assert!(fp8.0 > 0 && fp8.1 > 0);
    // Half, and what keeps rows on different banks.
    let half = bf16.0 / 2..bf16.0 * 3 / 5 + 1;
    assert!(half.contains(&fp8.0), "{} of {}", fp8.0, bf16.0);
    assert_eq!(bf16.1, fp8.1);
}

/// Codes of the values that layer 0 keeps after a step of 8 rows.
fn values(model: &Model) -> Vec<u8> {
    let mut group = model.group(1);
    group.set(&[4, 5, 6, 7, 8, 9, 10, 11], 0, 0);
    group.run(1, 2, Bug::None).unwrap();
    let program = &group.ranks[0].program;
    let mut of = program.instructions.iter();
    let i = of.find(|i| OPS[i.op as usize] == "ATTENTION").unwrap();
    let (offset, width) = (i.values - group.ranks[0].base(), i.v_dim as usize);
    let stride = i.value_stride as usize;
    let mut out = vec![0; i.kv_heads as usize * CONTEXT * stride];
    group.read(0, offset as usize, &mut out).unwrap();
    let heads = out.chunks_exact(CONTEXT * stride);
    let rows = heads.flat_map(|head| head.chunks_exact(stride).take(8));
    rows.flat_map(|row| row[..width].to_vec()).collect()
}

#[test]
fn values_past_the_largest_become_the_largest() {
    let mut model = Model::golden("fused-mxfp4-bf16-router-s1").with(Kv::Fp8);
    let largest_codes = |codes: &[u8]| codes.iter().filter(|c| **c & 0x7F == 0x7E).count();
    assert_eq!(largest_codes(&values(&model)), 0);
    for layer in &mut model.config.layers {
        layer.attention.value_scale = 3e4;
    }
    let codes = values(&model);
    assert!(largest_codes(&codes) > codes.len() / 8);
    assert!(codes.iter().all(|c| c & 0x7F != 0x7F), "none is NaN");
    let found = compare_split(&model, 1, &[8, 2], None);
    assert_holds("saturated", &found);
}
