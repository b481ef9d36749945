//! Any decoder against transformers and the dflash package (`goldens/README.md`). Included by the
//! golden tests of every backend.

use std::path::{Path, PathBuf};

use model::decoder::{Decoder, SequenceStep, StepOutput, StepPlan, Tap};
use model::draft::{Draft, DraftOptions};
use model::{Checkpoint, Config, TokenId, Weights};
use serde_json::Value;

/// Makes the decoder under test.
pub(crate) type Make<'m> = &'m dyn Fn(&Config, &Weights<'_>, Option<&Draft>) -> Box<dyn Decoder>;

/// An argmax is compared where the oracle's two best logits are further apart than this.
const GAP_MIN: f64 = 0.1;

pub(crate) fn root(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../goldens")
        .join(kind)
}

fn folders(kind: &str) -> Vec<PathBuf> {
    let root = root(kind);
    let mut dirs: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    dirs.sort();
    assert!(!dirs.is_empty());
    dirs
}

pub(crate) fn expected(dir: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(dir.join("expected.json")).unwrap()).unwrap()
}

pub(crate) fn tokens(value: &Value) -> Vec<TokenId> {
    let list = value.as_array().unwrap().iter();
    list.map(|v| v.as_u64().unwrap() as TokenId).collect()
}

pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    let list = value.as_array().unwrap().iter();
    list.map(|v| v.as_f64().unwrap()).collect()
}

fn open(dir: &Path) -> (Config, Checkpoint) {
    (Config::load(dir).unwrap(), Checkpoint::open(dir).unwrap())
}

/// Log-probabilities of each next token and the argmax after each token.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Scores {
    logprobs: Vec<f64>,
    argmax: Vec<TokenId>,
}

/// How far scores are from a golden's: mean difference of log-probabilities, and the positions with another argmax where the oracle's
/// two best are further apart than [`GAP_MIN`].
pub(crate) struct Apart {
    pub(crate) mean: f64,
    pub(crate) wrong: Vec<usize>,
}

impl Scores {
    /// A row of logits, and the token that follows it.
    pub(crate) fn add(&mut self, row: &[f32], next: Option<TokenId>) {
        let largest = row.iter().fold(f64::MIN, |m, &x| m.max(f64::from(x)));
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
        if let Some(next) = next {
            let logprob = f64::from(row[next as usize]) - largest - sum.ln();
            self.logprobs.push(logprob);
        }
        let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)));
        self.argmax.push(best.unwrap() as TokenId);
    }

    /// Without `gaps` no argmax is compared.
    pub(crate) fn apart(&self, golden: &Value, gaps: Option<&[f64]>) -> Apart {
        let wanted = numbers(&golden["next_token_logprobs"]);
        assert_eq!(self.logprobs.len(), wanted.len());
        let differences = self.logprobs.iter().zip(&wanted);
        let sum: f64 = differences.map(|(a, b)| (a - b).abs()).sum();
        let best = tokens(&golden["argmax"]);
        let clear = |i: &usize| gaps.is_some_and(|gaps| gaps[*i] > GAP_MIN);
        let wrong = (0..best.len()).filter(clear);
        Apart {
            mean: sum / wanted.len() as f64,
            wrong: wrong.filter(|&i| self.argmax[i] != best[i]).collect(),
        }
    }
}

fn score(decoder: &mut dyn Decoder, ids: &[TokenId]) -> Scores {
    let mut scores = Scores::default();
    let sequence = decoder.open().unwrap();
    let mut sink = |position: u32, row: &[f32]| {
        scores.add(row, ids.get(position as usize + 1).copied());
    };
    decoder.tap(sequence, ids, Tap::Logits(&mut sink)).unwrap();
    decoder.close(sequence);
    scores
}

fn check(name: &str, bound: f64, found: &Scores, golden: &Value, gaps: Option<&[f64]>) {
    let Apart { mean, wrong } = found.apart(golden, gaps);
    assert!(mean < bound, "{name}: mean difference {mean}");
    println!("{name}: mean difference of log-probabilities {mean:.1e}");
    assert!(wrong.is_empty(), "{name}: argmax after tokens {wrong:?}");
}

/// Log-probabilities within `bound` in the mean, argmax equal where the oracle is clear.
pub(crate) fn target_equals_transformers(bound: f64, make: Make<'_>) {
    for dir in folders("mimo") {
        let (config, checkpoint) = open(&dir);
        let weights = Weights::new(&config, &checkpoint).unwrap();
        let golden = expected(&dir);
        let name = dir.file_name().unwrap().to_str().unwrap();
        let mut decoder = make(&config, &weights, None);
        let sequences = golden["sequences"].as_array().unwrap();
        for sequence in sequences {
            let found = score(&mut *decoder, &tokens(&sequence["token_ids"]));
            let gaps = numbers(&sequence["top2_gap"]);
            check(name, bound, &found, sequence, Some(&gaps));
        }
        // The other reading of the window: sliding_window_size keys, the query's own included.
        let other = &golden["window_128_reading"];
        let config = config.with_window_keys(other["window_keys"].as_u64().unwrap() as usize);
        let mut decoder = make(&config, &weights, None);
        let ids = tokens(&sequences[other["sequence"].as_u64().unwrap() as usize]["token_ids"]);
        check(name, bound, &score(&mut *decoder, &ids), other, None);
    }
}

/// Draft logits within `bound` of the package's, of blocks of up to `width_max` rows.
pub(crate) fn drafter_equals_dflash(bound: f32, width_max: u32, make: Make<'_>) {
    let mut compared = 0;
    for dir in folders("dflash") {
        let golden = expected(&dir);
        let path = |key: &str| dir.join(golden[key].as_str().unwrap());
        let (config, checkpoint) = open(&path("target"));
        let weights = Weights::new(&config, &checkpoint).unwrap();
        let draft = Draft::open(&path("draft"), &config, DraftOptions::default()).unwrap();
        let mut decoder = make(&config, &weights, Some(&draft));
        let ids = tokens(&golden["token_ids"]);
        let alone = score(&mut *make(&config, &weights, None), &ids);
        let beside = score(&mut *decoder, &ids);
        assert_eq!(beside, alone, "{dir:?}: a drafter changes the target");
        let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (n, step) in golden["steps"].as_array().unwrap().iter().enumerate() {
            let anchor = step["anchor_position"].as_u64().unwrap() as usize;
            let width = step["width"].as_u64().unwrap() as u32;
            if width > width_max {
                continue;
            }
            compared += 1;
            let wanted: Vec<f32> = tensors
                .tensor(&format!("step.{n}.logits"))
                .unwrap()
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            let mut found = Vec::new();
            let mut sink = |_slot: u32, row: &[f32]| found.extend_from_slice(row);
            let sequence = decoder.open().unwrap();
            let tap = Tap::Draft {
                width,
                sink: &mut sink,
            };
            decoder.tap(sequence, &ids[..=anchor], tap).unwrap();
            decoder.close(sequence);
            assert_eq!(found.len(), wanted.len());
            let worst = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs());
            let worst = worst.fold(0.0, f32::max);
            assert!(
                worst < bound,
                "{dir:?} step {n}: largest difference {worst}"
            );
        }
    }
    assert!(compared > 0, "no block of up to {width_max} rows");
}

/// The fitted pair: greedy text and acceptance lengths as dflash's own loop gives them.
pub(crate) fn greedy_steps_equal_dflash_generate(make: Make<'_>) {
    let dir = &folders("dflash")
        .into_iter()
        .find(|d| d.ends_with("pair-s1"));
    let dir = dir.as_ref().unwrap();
    let golden = expected(dir);
    let (config, checkpoint) = open(dir);
    let weights = Weights::new(&config, &checkpoint).unwrap();
    let draft = Draft::open(&dir.join("dflash"), &config, DraftOptions::default()).unwrap();
    let mut decoder = make(&config, &weights, Some(&draft));
    for run in golden["greedy"].as_array().unwrap() {
        let wanted = tokens(&run["generated"]);
        for width in [1, 2, 4, 8] {
            let sequence = decoder.open().unwrap();
            decoder.prefill(sequence, &tokens(&run["prompt"])).unwrap();
            let plan = StepPlan {
                sequences: vec![SequenceStep {
                    sequence,
                    width,
                    chance_min: 0.0,
                    simulate_accepted: None,
                }],
            };
            let (mut found, mut out) = (Vec::new(), StepOutput::default());
            while found.len() < wanted.len() {
                decoder.step(&plan, &mut out).unwrap();
                found.extend_from_slice(&out.sequences[0].tokens);
            }
            found.truncate(wanted.len());
            assert_eq!(found, wanted, "width {width}");
            decoder.close(sequence);
        }
    }
}
