//! The CPU decoder against transformers and the dflash package, at 1, 2 and 3 threads.

#[path = "../../model/tests/golden/mod.rs"]
mod golden;

use cpu::{CpuDecoder, CpuOptions};
use model::draft::Draft;
use model::{Config, Decoder, Weights};

fn make(threads: usize) -> impl Fn(&Config, &Weights<'_>, Option<&Draft>) -> Box<dyn Decoder> {
    move |config, weights, draft| {
        let draft_weights = draft.map(|draft| draft.weights().unwrap());
        let draft = draft.zip(draft_weights.as_ref());
        let options = CpuOptions {
            threads: Some(threads),
            sequences: 4,
            ..CpuOptions::default()
        };
        Box::new(CpuDecoder::new(config, weights, draft, options).unwrap())
    }
}

#[test]
fn target_equals_transformers() {
    for threads in [1, 2, 3] {
        golden::target_equals_transformers(2e-2, &make(threads));
    }
}

#[test]
fn drafter_equals_dflash() {
    golden::drafter_equals_dflash(5e-2, u32::MAX, &make(2));
}

#[test]
fn greedy_steps_equal_dflash_generate() {
    golden::greedy_steps_equal_dflash_generate(&make(2));
}
