//! Microseconds to choose a token from one row, at the vocabulary sizes of the models served:
//! `cargo bench -p model --bench sampler`. Median of 101 rows of pseudo-random logits.

use model::decoder::{SequenceConfig, SequenceOutput};
use model::random::{Purpose, uniform};
use model::sampler::{Block, Proposals, Sampler, SamplerScratch};
use model::sampling::SamplingParams;
use std::time::Instant;

fn main() {
    for vocab in [49_152u32, 152_576] {
        // Roughly the shape of a language model's logits: a bulk like a bell, and a few tokens that
        // stand out.
        let logit = |i: u32| {
            let u = |key| uniform(key, i, Purpose::Sample) as f32;
            let bell = (1..7).map(u).sum::<f32>() - 3.0;
            bell * 3.0
                + if i.is_multiple_of(1009) {
                    6.0 + 8.0 * u(9)
                } else {
                    0.0
                }
        };
        let row: Vec<f32> = (0..vocab).map(logit).collect();
        let base = SamplingParams {
            temperature: 0.8,
            seed: 1,
            ..Default::default()
        };
        let cases = [
            ("greedy", SamplingParams::default(), None),
            ("greedy, logprobs 5", SamplingParams::default(), Some(5)),
            ("temperature", base.clone(), None),
            (
                "top-k 40",
                SamplingParams {
                    top_k: 40,
                    ..base.clone()
                },
                None,
            ),
            (
                "top-p 0.95",
                SamplingParams {
                    top_p: 0.95,
                    ..base.clone()
                },
                None,
            ),
            (
                "top-k 20, top-p 0.95",
                SamplingParams {
                    top_k: 20,
                    top_p: 0.95,
                    ..base.clone()
                },
                None,
            ),
            (
                "min-p 0.05",
                SamplingParams {
                    min_p: 0.05,
                    ..base.clone()
                },
                None,
            ),
            (
                "repetition 1.1",
                SamplingParams {
                    repetition_penalty: 1.1,
                    ..base
                },
                None,
            ),
        ];
        for (name, sampling, logprobs) in cases {
            println!(
                "vocab {vocab:6}  {name:22} {:8.1} us",
                median(&row, sampling, logprobs)
            );
        }
    }
}

fn median(row: &[f32], sampling: SamplingParams, logprobs: Option<u32>) -> f64 {
    let config = SequenceConfig {
        sampling,
        prompt_tokens: 1,
        logprobs,
        constraint: None,
    };
    let mut sampler = Sampler::new(config, row.len() as u32, &[1]);
    let (proposals, mut scratch) = (Proposals::default(), SamplerScratch::default());
    let mut out = SequenceOutput::default();
    let mut logits = row.to_vec();
    let time = |position| {
        logits.copy_from_slice(row);
        let block = Block {
            position,
            logits: &mut logits,
            proposals: &proposals,
            simulate_accepted: None,
        };
        let start = Instant::now();
        sampler
            .accept(block, &mut scratch, &mut out)
            .expect("finite logits");
        start.elapsed().as_secs_f64() * 1e6
    };
    let mut times: Vec<f64> = (0..101).map(time).collect();
    times.sort_by(f64::total_cmp);
    times[50]
}
