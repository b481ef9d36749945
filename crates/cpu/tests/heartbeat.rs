//! A decoder that is watched shows life from inside its long calls.

use std::path::Path;
use std::sync::Arc;

use cpu::{CpuDecoder, CpuOptions};
use model::decoder::{Decoder, SequenceStep, StepOutput, StepPlan};
use model::heartbeat::Heartbeat;
use model::{Checkpoint, Config, Weights};

#[test]
fn the_heart_beats_in_every_layer_of_every_pass() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/dflash/pair-s1");
    let (config, checkpoint) = (Config::load(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
    let weights = Weights::new(&config, &checkpoint).unwrap();
    let options = CpuOptions {
        threads: Some(2),
        sequences: 1,
        ..CpuOptions::default()
    };
    let mut decoder = CpuDecoder::new(&config, &weights, None, options).unwrap();
    let heartbeat = Arc::new(Heartbeat::default());
    decoder.watch(&heartbeat);
    let sequence = decoder.open().unwrap();
    let layers = config.layers.len() as u64;
    let tokens = vec![1; 129.min(config.context_tokens - 1)];
    // All but the last token, 64 a pass.
    let passes = (tokens.len() - 1).div_ceil(64) as u64;
    decoder.prefill(sequence, &tokens).unwrap();
    let prefilled = heartbeat.beats();
    assert!(prefilled >= passes * layers, "{prefilled} beats");
    let plan = StepPlan {
        sequences: vec![SequenceStep {
            sequence,
            width: 1,
            chance_min: 0.0,
            simulate_accepted: None,
        }],
    };
    decoder.step(&plan, &mut StepOutput::default()).unwrap();
    assert!(heartbeat.beats() >= prefilled + layers);
}
