//! The CUDA decoder against transformers and the dflash package with the CPU backend's bounds: activations as two f16, keys and
//! values as two bf16. Compiles a kernel for each of their shapes: about a minute.

#[path = "../../../model/tests/golden/mod.rs"]
mod golden;

use cuda::CudaDecoder;
use cuda::images::Numbers;
use model::draft::Draft;
use model::{Config, Decoder, Weights};

fn make(config: &Config, weights: &Weights<'_>, draft: Option<&Draft>) -> Box<dyn Decoder> {
    let decoder = CudaDecoder::new(config, weights, draft, None, Numbers::wide());
    Box::new(decoder.unwrap())
}

#[test]
#[ignore = "needs a GPU"]
fn target_equals_transformers() {
    golden::target_equals_transformers(2e-2, &make);
}

#[test]
#[ignore = "needs a GPU"]
fn drafter_equals_dflash() {
    // A block on the device has up to 8 rows.
    golden::drafter_equals_dflash(5e-2, 8, &make);
}

#[test]
#[ignore = "needs a GPU"]
fn greedy_steps_equal_dflash_generate() {
    golden::greedy_steps_equal_dflash_generate(&make);
}
