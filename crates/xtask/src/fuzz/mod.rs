//! `fuzz`: mutated inputs against everything that reads files or requests from outside, for a given
//! time.
//!
//! Inputs are mutations of the golden files and of requests (bits, ranges, numbers, words of a dictionary), without
//! coverage feedback, from a seeded generator, so that a run can be repeated. A panic, or an input
//! that takes longer than [`SLOW`], is a finding: the input is kept and the command fails.

mod mutator;
mod service;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use model::chat_template::{ChatTemplate, Conversation};
use model::draft::{Draft, DraftOptions};
use model::generation::GenerationDefaults;
use model::tokenizer::Tokenizer;
use model::weights::FfnWeights;
use model::{Checkpoint, Config, Weights};
use mutator::Mutator;
use serde_json::{Value, json};
use service::Service;

/// An input may take so long; the slowest legitimate ones take milliseconds.
const SLOW: Duration = Duration::from_secs(5);

/// What reads the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Target {
    /// Header of a safetensors shard, and the weight table over it
    Header,
    /// model.safetensors.index.json
    Index,
    /// config.json, and the weight table for what it describes
    Config,
    /// Chat template, compiled and rendered
    Template,
    /// generation_config.json
    Generation,
    /// tokenizer.json
    Tokenizer,
    /// config.json of a drafter
    Drafter,
    /// mask_embedding.pt of a drafter
    Mask,
    /// GGUF file of make-mini
    Gguf,
    /// Body of /v1/chat/completions; the model's text is hostile too, here and below
    Chat,
    /// Body of /v1/completions
    Completions,
    /// Body of /v1/responses
    Responses,
    /// Body of /v1/messages
    Messages,
    /// Grammars and schemas of a chat request
    Grammar,
    /// A model's text, through the parsers of tool calls and reasoning
    Parsers,
    /// A model's text, through the Markdown of the page
    Markdown,
    /// Name of a model, through the labels of /metrics
    Labels,
}

/// Arguments of `fuzz`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// What to feed
    #[arg(value_enum)]
    target: Target,
    /// For how long
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Same seed, same inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where an input that fails is kept
    #[arg(long, default_value = "target/fuzz")]
    keep: PathBuf,
    /// Feed this kept input once instead, and say what it does
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
}

/// Counts of a run.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    runs: u64,
    accepted: u64,
}

/// Runs `fuzz`.
pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(input) = &options.input {
        let (outcome, time) = Subject::of(options.target)?.attempt(&fs::read(input)?);
        let outcome = outcome.map_or_else(|_| "panicked".to_owned(), |done| format!("{done:?}"));
        println!("fuzz {:?}: {outcome} in {time:?}", options.target);
        return Ok(());
    }
    std::panic::set_hook(Box::new(|_| {}));
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let tally = attack(options.target, options.seed, &options.keep, |_| {
        Instant::now() < end
    })?;
    println!(
        "fuzz {:?}: {} inputs in {} s, {} accepted, {} refused, no panic",
        options.target,
        tally.runs,
        options.seconds,
        tally.accepted,
        tally.runs - tally.accepted
    );
    Ok(())
}

/// Feeds inputs as long as `go_on` says so.
fn attack(target: Target, seed: u64, keep: &Path, go_on: impl Fn(u64) -> bool) -> Result<Tally> {
    let subject = Subject::of(target)?;
    let mut mutator = Mutator::new(seed);
    let mut tally = Tally::default();
    while go_on(tally.runs) {
        let input = match target {
            // Half of the headers keep a length that fits, or few would be read at all.
            Target::Header if mutator.next(2) == 0 => mutator.mutate_header(&subject.seeds()[0]),
            // Most requests stay JSON, or few would get further than its parser.
            _ if subject.is_json() && mutator.next(4) > 0 => mutator.mutate_json(subject.seeds()),
            _ => mutator.mutate(subject.seeds()),
        };
        let (mut outcome, mut time) = subject.attempt(&input);
        if outcome.is_ok() && time >= SLOW {
            // The machine may have stood still; an input that is slow is slow again.
            (outcome, time) = subject.attempt(&input);
        }
        tally.runs += 1;
        match outcome {
            Ok(accepted) if time < SLOW => tally.accepted += u64::from(accepted?),
            Ok(_) => return keep_input(keep, target, &input, "took too long"),
            Err(_) => return keep_input(keep, target, &input, "panicked"),
        }
    }
    Ok(tally)
}

fn keep_input(dir: &Path, target: Target, input: &[u8], what: &str) -> Result<Tally> {
    fs::create_dir_all(dir)?;
    let path = dir.join(format!("{target:?}").to_lowercase());
    fs::write(&path, input)?;
    bail!("{target:?} {what}; the input is kept in {}", path.display())
}

/// What is fed.
enum Subject {
    File(Feed),
    Service(Service),
}

impl Subject {
    fn of(target: Target) -> Result<Self> {
        Ok(match Service::of(target)? {
            Some(service) => Self::Service(service),
            None => Self::File(Feed::new(target)?),
        })
    }

    fn seeds(&self) -> &[Vec<u8>] {
        match self {
            Self::File(feed) => &feed.seeds,
            Self::Service(service) => &service.seeds,
        }
    }

    fn is_json(&self) -> bool {
        let json = |seed: &Vec<u8>| serde_json::from_slice::<Value>(seed).is_ok();
        matches!(self, Self::Service(service) if service.seeds.first().is_some_and(json))
    }

    /// Whether the input was accepted, unless it panicked, and how long it took.
    fn attempt(&self, input: &[u8]) -> (std::thread::Result<Result<bool>>, Duration) {
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| match self {
            Self::File(feed) => feed.try_input(input),
            Self::Service(service) => service.try_input(input),
        }));
        (outcome, began.elapsed())
    }
}

/// A target with its seeds, and a directory in which the rest of a checkpoint lies.
struct Feed {
    target: Target,
    seeds: Vec<Vec<u8>>,
    dir: tempfile::TempDir,
    config: Config,
    name: String,
}

impl Feed {
    fn new(target: Target) -> Result<Self> {
        let goldens = crate::root().join("goldens");
        let (base, from) = match target {
            Target::Mask | Target::Drafter => {
                let base = goldens.join("dflash/xiaomi-s1");
                (base.clone(), base.join("dflash"))
            }
            _ => {
                let base = goldens.join("mimo/fused-mxfp4-bf16-router-s2");
                (base.clone(), base)
            }
        };
        let dir = tempfile::tempdir()?;
        for entry in fs::read_dir(&from).with_context(|| from.display().to_string())? {
            let path = entry?.path();
            if path.is_file() {
                fs::copy(&path, dir.path().join(path.file_name().unwrap_or_default()))?;
            }
        }
        let config = Config::load(&base)?;
        let name = file_of(target).to_owned();
        let seeds = seeds(target, &goldens, dir.path().join(&name))?;
        Ok(Self {
            target,
            seeds,
            dir,
            config,
            name,
        })
    }

    /// Whether the input was accepted; an error is one of the fuzzer itself.
    fn try_input(&self, input: &[u8]) -> Result<bool> {
        if self.target == Target::Template {
            return Ok(render(input));
        }
        let dir = self.dir.path();
        fs::write(dir.join(&self.name), input)?;
        let vocab_size = self.config.vocab_size as u32;
        Ok(match self.target {
            Target::Header | Target::Index => reads(dir, &self.config),
            Target::Config => Config::load(dir).is_ok_and(|config| reads(dir, &config)),
            Target::Generation => GenerationDefaults::open(dir, vocab_size).is_ok(),
            Target::Tokenizer => {
                Tokenizer::open(dir, 152_576).is_ok_and(|t| t.encode("Hello 12").is_ok())
            }
            Target::Mask | Target::Drafter => {
                Draft::open(dir, &self.config, DraftOptions::default())
                    .is_ok_and(|draft| draft.weights().is_ok())
            }
            Target::Gguf => crate::make_mini::opens(&dir.join(&self.name)),
            _ => unreachable!("no file"),
        })
    }
}

/// Opens a checkpoint and decodes the first and last row of every matrix; whether it has all of them.
fn reads(dir: &Path, config: &Config) -> bool {
    let Ok(checkpoint) = Checkpoint::open(dir) else {
        return false;
    };
    let Ok(weights) = Weights::new(config, &checkpoint) else {
        return false;
    };
    let mut matrices = vec![&weights.embed, &weights.lm_head];
    for layer in &weights.layers {
        matrices.extend([&layer.q, &layer.k, &layer.v, &layer.o]);
        match &layer.ffn {
            FfnWeights::Dense(ffn) => matrices.extend([&ffn.gate, &ffn.up, &ffn.down]),
            FfnWeights::Moe {
                router, experts, ..
            } => {
                matrices.push(router);
                matrices.extend(experts.iter().flat_map(|e| [&e.gate, &e.up, &e.down]));
            }
        }
    }
    for matrix in matrices {
        let mut row = vec![0.0; matrix.cols];
        matrix.row(0).decode(&mut row);
        matrix.row(matrix.rows - 1).decode(&mut row);
    }
    checkpoint.check_scales().is_ok()
}

/// The file of a checkpoint that a target replaces.
fn file_of(target: Target) -> &'static str {
    match target {
        Target::Header => "model_pp0_ep0_shard0.safetensors",
        Target::Index => "model.safetensors.index.json",
        Target::Config | Target::Drafter => "config.json",
        Target::Generation => "generation_config.json",
        Target::Tokenizer => "tokenizer.json",
        Target::Mask => "mask_embedding.pt",
        Target::Gguf => "model.gguf",
        _ => "chat_template.jinja",
    }
}

fn seeds(target: Target, goldens: &Path, file: PathBuf) -> Result<Vec<Vec<u8>>> {
    let generation = json!({"eos_token_id": [1, 2], "temperature": 0.7, "top_p": 0.9, "top_k": 5, "do_sample": true});
    Ok(match target {
        Target::Template => ["mimo", "smollm2", "json"]
            .iter()
            .map(|name| fs::read(goldens.join(format!("tokenizer/{name}_chat_template.jinja"))))
            .collect::<Result<_, _>>()?,
        Target::Tokenizer => vec![fs::read(
            goldens.join("tokenizer/mimo_subset_tokenizer.json"),
        )?],
        Target::Generation => vec![generation.to_string().into_bytes()],
        Target::Gguf => vec![gguf_seed()],
        _ => vec![fs::read(&file).with_context(|| file.display().to_string())?],
    })
}

/// The smallest GGUF header with a value of each kind that matters and one tensor.
fn gguf_seed() -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0".to_vec();
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    text(&mut out, "general.architecture");
    out.extend(8u32.to_le_bytes());
    text(&mut out, "llama");
    text(&mut out, "tokenizer.ggml.merges");
    out.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
    out.extend(2u64.to_le_bytes());
    text(&mut out, "h e");
    text(&mut out, "t h");
    text(&mut out, "token_embd.weight");
    out.extend(2u32.to_le_bytes());
    out.extend([32u64.to_le_bytes(), 2u64.to_le_bytes()].concat());
    out.extend(3u32.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.resize(out.len().next_multiple_of(32) + 64, 0x11);
    out
}

fn render(input: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(input) else {
        return false;
    };
    let Ok(template) = ChatTemplate::new(source) else {
        return false;
    };
    let messages = [
        json!({"role": "system", "content": "s"}),
        json!({"role": "user", "content": "u \u{e9}"}),
        json!({"role": "assistant", "content": "a", "reasoning_content": "r",
               "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5, null, true]}}}]}),
        json!({"role": "tool", "content": "t"}),
    ];
    let tools = [
        json!({"type": "function", "function": {"name": "f", "description": "d",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}}}),
    ];
    let variables = [("enable_thinking".to_owned(), Value::Bool(false))];
    let conversation = Conversation {
        messages: &messages,
        tools: &tools,
        add_generation_prompt: true,
        variables: &variables,
    };
    template.render(&conversation).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    /// A short, fixed run of every target; the long ones are in the notes.
    #[test]
    fn a_few_hundred_inputs_each() {
        for target in Target::value_variants() {
            let keep = tempfile::tempdir().unwrap();
            let tally = attack(*target, 1, keep.path(), |runs| runs < 300).unwrap();
            assert_eq!(tally.runs, 300);
        }
    }
}
