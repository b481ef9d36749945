//! `Sampler`: order of operations, the accept rule in a block, and what it reports.

use model::TokenId;
use model::decoder::{Constraint, DecodeError, SequenceConfig, SequenceOutput};
use model::random::{Purpose, uniform};
use model::sampler::{Block, Proposals, Sampler, SamplerScratch};
use model::sampling::{DraftSampling, SamplingParams};

const VOCAB: u32 = 16;

fn config(sampling: SamplingParams) -> SequenceConfig {
    SequenceConfig {
        sampling,
        prompt_tokens: 1,
        logprobs: None,
        constraint: None,
    }
}

/// Logits that depend on the last token only.
fn logits(seed: u64, after: TokenId) -> Vec<f32> {
    let at = |i| uniform(seed, after * VOCAB + i, Purpose::Sample) as f32;
    (0..VOCAB).map(|i| at(i) * 6.0 - 3.0).collect()
}

/// Decodes `count` tokens with blocks of `width`; the drafter sees other logits than the target.
fn decode(seed: u64, width: usize, count: usize, config: SequenceConfig) -> Vec<TokenId> {
    let mut sampler = Sampler::new(config, VOCAB, &[0]);
    let mut text = vec![0];
    let (mut proposals, mut scratch) = (Proposals::default(), SamplerScratch::default());
    let mut out = SequenceOutput::default();
    while text.len() <= count {
        let position = text.len() as u32 - 1;
        proposals.clear();
        let mut rows = logits(seed, *text.last().unwrap());
        for slot in 1..width as u32 {
            let last = *proposals.tokens().last().unwrap_or(text.last().unwrap());
            let mut draft = logits(seed, last);
            draft[(slot + position) as usize % 16] += 2.0;
            sampler
                .propose(position + slot, &draft, &mut proposals)
                .unwrap();
            rows.extend(logits(seed, proposals.tokens()[slot as usize - 1]));
        }
        let block = Block {
            position,
            logits: &mut rows,
            proposals: &proposals,
            simulate_accepted: None,
        };
        sampler.accept(block, &mut scratch, &mut out).unwrap();
        assert_eq!(out.tokens.len(), out.accepted as usize + 1);
        assert_eq!(
            out.tokens[..out.accepted as usize],
            out.drafted[..out.accepted as usize]
        );
        text.extend(&out.tokens);
    }
    text.truncate(count + 1);
    text
}

#[test]
fn one_hot_drafts_do_not_change_the_text_at_any_width() {
    for seed in 0..20 {
        for temperature in [0.0, 0.8] {
            let params = SamplingParams {
                temperature,
                repetition_penalty: 1.3,
                presence_penalty: 0.2,
                frequency_penalty: 0.1,
                logit_bias: vec![(3, 0.5)],
                forbidden_until_min: vec![2, 5],
                min_tokens: 7,
                seed,
                ..SamplingParams::default()
            };
            let plain = decode(seed, 1, 60, config(params.clone()));
            assert!(plain[1..8].iter().all(|t| *t != 2 && *t != 5));
            for width in [2, 3, 8] {
                assert_eq!(plain, decode(seed, width, 60, config(params.clone())));
            }
        }
    }
}

#[test]
fn top_k_one_and_tiny_top_p_are_greedy() {
    for draft_sampling in [DraftSampling::Greedy, DraftSampling::Sampled] {
        for (top_k, top_p, min_p) in [(1, 1.0, 0.0), (0, 1e-4, 0.0), (0, 1.0, 1.0)] {
            let params = SamplingParams {
                temperature: 1.5,
                top_k,
                top_p,
                min_p,
                draft_sampling,
                ..Default::default()
            };
            let greedy = decode(4, 1, 50, config(SamplingParams::default()));
            assert_eq!(greedy, decode(4, 6, 50, config(params)));
        }
    }
}

#[test]
fn the_fast_path_is_the_slow_one() {
    let mut rows: Vec<f32> = (0..4).flat_map(|i| logits(9, i)).collect();
    let best: Vec<TokenId> = rows
        .chunks(16)
        .map(|r| model::reference::sample::argmax(r).unwrap().0)
        .collect();
    for wrong in 0..4 {
        let mut proposals = Proposals::default();
        for (i, token) in best[..3].iter().enumerate() {
            proposals.push(if i == wrong {
                (token + 1) % VOCAB
            } else {
                *token
            });
        }
        let (mut a, mut b) = (SequenceOutput::default(), SequenceOutput::default());
        let mut sampler = Sampler::greedy(VOCAB);
        sampler.accept_best(6, &best, &proposals, None, &mut a);
        let block = Block {
            position: 6,
            logits: &mut rows,
            proposals: &proposals,
            simulate_accepted: None,
        };
        sampler
            .accept(block, &mut SamplerScratch::default(), &mut b)
            .unwrap();
        assert_eq!(a.tokens, b.tokens);
        assert_eq!((a.accepted, a.position, a.width), (wrong as u32, 6, 4));
        assert_eq!((b.accepted, b.position, b.width), (wrong as u32, 6, 4));
    }
}

#[test]
fn simulated_acceptance_overrides_the_count_only() {
    for count in 0..=5u32 {
        let mut rows: Vec<f32> = (0..4).flat_map(|i| logits(9, i)).collect();
        let mut proposals = Proposals::default();
        for token in [1, 2, 3] {
            proposals.push(token);
        }
        let mut out = SequenceOutput::default();
        let block = Block {
            position: 0,
            logits: &mut rows,
            proposals: &proposals,
            simulate_accepted: Some(count),
        };
        Sampler::greedy(VOCAB)
            .accept(block, &mut SamplerScratch::default(), &mut out)
            .unwrap();
        assert_eq!(out.accepted, count.min(3));
        assert_eq!(out.tokens.len() as u32, out.accepted + 1);
    }
}

/// Allows even tokens only.
struct Even {
    committed: Vec<TokenId>,
}

impl Constraint for Even {
    fn masks(&mut self, drafted: &[TokenId], masks: &mut [u32]) -> usize {
        masks.fill(0x5555_5555);
        1 + drafted.iter().take_while(|token| **token % 2 == 0).count()
    }
    fn commit(&mut self, tokens: &[TokenId]) {
        self.committed.extend(tokens);
    }
}

#[test]
fn a_grammar_masks_the_target_whatever_is_drafted() {
    for draft_sampling in [DraftSampling::Greedy, DraftSampling::Sampled] {
        for temperature in [0.0, 1.2] {
            let params = SamplingParams {
                temperature,
                draft_sampling,
                ..Default::default()
            };
            let with = |width| {
                let mut config = config(params.clone());
                config.constraint = Some(Box::new(Even {
                    committed: Vec::new(),
                }));
                decode(2, width, 80, config)
            };
            assert!(with(5).iter().all(|token| token % 2 == 0));
            if draft_sampling == DraftSampling::Greedy {
                assert_eq!(with(1), with(5));
            }
        }
    }
}

#[test]
fn what_cannot_be_chosen_is_an_error() {
    let mut out = SequenceOutput::default();
    let mut scratch = SamplerScratch::default();
    let proposals = Proposals::default();
    let mut run = |sampler: &mut Sampler, mut row: Vec<f32>| {
        let block = Block {
            position: 4,
            logits: &mut row,
            proposals: &proposals,
            simulate_accepted: None,
        };
        sampler.accept(block, &mut scratch, &mut out)
    };
    for temperature in [0.0, 1.0] {
        let mut sampler = Sampler::new(
            config(SamplingParams {
                temperature,
                ..Default::default()
            }),
            VOCAB,
            &[],
        );
        let mut row = logits(0, 0);
        row[11] = f32::NAN;
        let error = run(&mut sampler, row).unwrap_err();
        assert!(
            matches!(error, DecodeError::NotFinite { position: 4, .. }),
            "{error}"
        );
        let params = SamplingParams {
            temperature,
            forbidden_until_min: (0..VOCAB).collect(),
            min_tokens: 9,
            ..Default::default()
        };
        let error = run(&mut Sampler::new(config(params), VOCAB, &[]), logits(0, 0)).unwrap_err();
        assert!(
            matches!(error, DecodeError::NothingAllowed { position: 5 }),
            "{error}"
        );
    }
}

#[test]
fn rewinding_forgets_penalised_tokens() {
    let params = SamplingParams {
        presence_penalty: 50.0,
        ..Default::default()
    };
    let mut sampler = Sampler::new(config(params), VOCAB, &[7]);
    let run = |sampler: &mut Sampler, position| {
        let mut out = SequenceOutput::default();
        let block = Block {
            position,
            logits: &mut logits(1, 1),
            proposals: &Proposals::default(),
            simulate_accepted: None,
        };
        sampler
            .accept(block, &mut SamplerScratch::default(), &mut out)
            .unwrap();
        out.tokens[0]
    };
    let first = run(&mut sampler, 0);
    let second = run(&mut sampler, 1);
    assert_ne!(first, second);
    sampler.rewind(&[7]);
    assert_eq!(run(&mut sampler, 0), first);
    sampler.rewind(&[7, first]);
    assert_eq!(run(&mut sampler, 1), second);
}

#[test]
fn logprobs_are_of_the_row_before_temperature_and_truncation() {
    let params = SamplingParams {
        temperature: 0.5,
        top_k: 1,
        logit_bias: vec![(4, 9.0)],
        ..Default::default()
    };
    let mut config = config(params);
    config.logprobs = Some(2);
    let mut out = SequenceOutput::default();
    let mut row = logits(1, 1);
    let mut biased = row.clone();
    biased[4] += 9.0;
    let block = Block {
        position: 0,
        logits: &mut row,
        proposals: &Proposals::default(),
        simulate_accepted: None,
    };
    Sampler::new(config, VOCAB, &[0])
        .accept(block, &mut SamplerScratch::default(), &mut out)
        .unwrap();
    let z: f64 = biased.iter().map(|l| f64::from(*l).exp()).sum();
    let expected = f64::from(biased[4]) - z.ln();
    assert_eq!(out.tokens, [4]);
    assert!((f64::from(out.logprobs[0].chosen) - expected).abs() < 1e-6);
    assert_eq!(out.logprobs[0].top.len(), 2);
    assert_eq!(out.logprobs[0].top[0].0, 4);
}
