//! The reference decoder against transformers and the dflash package.

mod golden;

use model::draft::Draft;
use model::reference::{DraftNetwork, ReferenceDecoder};
use model::{Config, Decoder, Weights};

fn reference(config: &Config, weights: &Weights<'_>, draft: Option<&Draft>) -> Box<dyn Decoder> {
    let network = draft.map(|draft| {
        let weights = draft.weights().unwrap();
        DraftNetwork::new(&draft.config, &weights, draft.mask_embedding.clone())
    });
    Box::new(ReferenceDecoder::new(config, weights, network))
}

#[test]
fn target_equals_transformers() {
    golden::target_equals_transformers(1e-3, &reference);
}

#[test]
fn drafter_equals_dflash() {
    golden::drafter_equals_dflash(1e-3, u32::MAX, &reference);
}

#[test]
fn greedy_steps_equal_dflash_generate() {
    golden::greedy_steps_equal_dflash_generate(&reference);
}
