//! The kernel compiled for a model's shapes computes what the one for every model does, bit by bit.

use cuda::shapes::header;
use cuda_emulator::{Switch, with};

use crate::draft::{PROMPT, RUN, tokens};
use crate::group::Model;

/// FP8 and MXFP4, routed experts, a drafter: most kinds of instructions.
fn model() -> Model {
    Model::drafted("dflash/xiaomi-s1", "dflash/xiaomi-s1/dflash")
}

#[test]
fn checked_in_shapes_are_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/emu/shapes_known.h");
    let made = header(&model().group(1).ranks[0].program);
    if std::env::var_os("KILOTOK_BLESS").is_some() {
        std::fs::write(path, &made).unwrap();
    }
    assert_eq!(
        std::fs::read_to_string(path).unwrap(),
        made,
        "KILOTOK_BLESS=1 writes it anew"
    );
}

#[test]
fn known_shapes_change_no_bit() {
    let model = model();
    let run = || {
        let mut group = model.group(1);
        let text = tokens(&group.generate(&PROMPT, 10, &RUN));
        let logits: Vec<Vec<u32>> = (0..8)
            .map(|row| {
                group
                    .logits(row, model.config.vocab_size)
                    .iter()
                    .map(|v| v.to_bits())
                    .collect()
            })
            .collect();
        (text, logits)
    };
    let (any, known) = (run(), with(&[Switch::KnownShapes], run));
    assert_eq!(any.0.len(), 10);
    assert!(any == known, "{:?} and {:?}", any.0, known.0);
}
