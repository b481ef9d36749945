//! `kilotok bench decode`: milliseconds, bytes and bandwidth of decode steps, beside the plain-read
//! bandwidth of the same moments: a pass over a large buffer after every few steps, medians compared,
//! because what memory gives changes from minute to minute on a shared machine.
//!
//! Without a drafter, `r` rows are `r` sequences of one row each; with one, one sequence of width
//! `r`. Reports of a synthetic model or of simulated acceptance say so.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use model::decoder::{DecodeError, SequenceStep, StepOutput, StepPlan};
use model::{Checkpoint, Config, Decoder, SequenceId, TokenId, Weights};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::args::{BenchDecodeArgs, Device};
use crate::inspect::Account;
use crate::machine::{self, ReadBandwidth};
use crate::progress::Progress;
use crate::report::round;
use crate::{backend, model_dir, output, synthetic};
use model::draft::Replay;

/// Steps before the clock starts.
const WARM_UP: u32 = 3;
/// Passes of the plain read among the steps of one row count.
const READ_PASSES: u32 = 8;
/// Size of the buffer that the plain read reads: larger than the caches of most machines.
const READ_BYTES: u64 = 1 << 30;

/// One row count's result.
struct Measured {
    rows: u32,
    median_ms: f64,
    p99_ms: f64,
    /// Target weights a step read.
    bytes: u64,
    tokens_per_step: f64,
    /// Plain reads among its steps, median, GB/s.
    plain_read: f64,
}

/// Runs the command.
pub(crate) fn run(args: &BenchDecodeArgs) -> Result<()> {
    if args.device == Device::Cuda {
        return crate::bench_cuda::run(args);
    }
    if let Some(option) = args.gpu.given() {
        return backend::cuda_alone(option, args.device);
    }
    let model = Model::open(args)?;
    let config = Config::load(&model.dir)?;
    let rows_max = args.rows.iter().copied().max().unwrap_or(1);
    let options = backend::Options {
        device: args.device,
        threads: args.threads,
        context_tokens: None,
        sequences: rows_max,
        kv_tokens: Some(rows_max as usize * args.tokens_max()),
        numbers: args.numbers,
        draft: model.draft.clone(),
        replay: None,
    };
    let options = match args.always_right {
        true => with_known_text(args, &model, &config, options)?,
        false => options,
    };
    let mut reader = ReadBandwidth::new(
        READ_BYTES,
        args.threads.map_or_else(machine::threads, |n| n as usize),
    );
    let mut decoder = backend::open(&model.dir, &config, &options)?;
    let one_row_bytes = active_bytes(&model.dir, &config)?;
    let mut results = Vec::new();
    let mut progress = Progress::new("measuring", args.rows.len() as u64);
    for &rows in &args.rows {
        let mut bench = Bench::new(
            decoder.as_mut(),
            args,
            rows,
            model.draft.is_some() || args.always_right,
        )?;
        let mut measured = bench.measure(args, &mut reader)?;
        bench.close();
        if measured.bytes == 0 && rows == 1 {
            measured.bytes = one_row_bytes;
        }
        results.push(measured);
        progress.set(results.len() as u64);
    }
    drop(progress);
    if args.json {
        output::json(&to_json(args, &model, &results))
    } else {
        print(args, &model, &results)
    }
}

impl BenchDecodeArgs {
    /// Longest that a sequence gets, and a page to spare.
    fn tokens_max(&self) -> usize {
        let width = self.rows.iter().copied().max().unwrap_or(1);
        (self.context + (self.steps + WARM_UP) * width + 128) as usize
    }
}

/// What is measured.
struct Model {
    name: String,
    dir: PathBuf,
    draft: Option<PathBuf>,
    /// Keeps a synthetic checkpoint until the end.
    synthetic: Option<TempDir>,
}

impl Model {
    fn open(args: &BenchDecodeArgs) -> Result<Self> {
        let given = args
            .model
            .as_deref()
            .and_then(Path::to_str)
            .and_then(|name| name.strip_prefix("synthetic:"));
        let draft = args.draft.draft.clone().filter(|_| !args.draft.no_draft);
        if let Some(name) = given {
            let dir = synthetic::write(name)?;
            let (name, path) = (format!("synthetic:{name}"), dir.path().to_owned());
            return Ok(Self {
                name,
                dir: path,
                draft,
                synthetic: Some(dir),
            });
        }
        let dir = model_dir::resolve(args.model.as_deref())?;
        Ok(Self {
            name: dir.display().to_string(),
            dir,
            draft,
            synthetic: None,
        })
    }
}

/// `options` with the text that plain decoding gives as drafts.
fn with_known_text(
    args: &BenchDecodeArgs,
    model: &Model,
    config: &Config,
    options: backend::Options,
) -> Result<backend::Options> {
    let width = args.rows.iter().copied().max().unwrap_or(1);
    let mut decoder = backend::open(&model.dir, config, &options)?;
    let vocab_size = decoder.limits().vocab_size;
    let mut text = tokens(0, args.context, vocab_size);
    let sequence = decoder.open()?;
    decoder.prefill(sequence, &text)?;
    let plan = StepPlan {
        sequences: vec![SequenceStep {
            sequence,
            width: 1,
            chance_min: 0.0,
            simulate_accepted: None,
        }],
    };
    let mut out = StepOutput::default();
    for _ in 0..(args.steps + WARM_UP) * width + width {
        decoder.step(&plan, &mut out)?;
        text.extend_from_slice(&out.sequences[0].tokens);
    }
    let replay = Replay {
        texts: vec![(args.context as usize, text)],
        shift: 0,
        vocab_size,
    };
    Ok(backend::Options {
        replay: Some((replay, width)),
        ..options
    })
}

/// Bytes a token alone reads, for a backend that does not count.
fn active_bytes(dir: &Path, config: &Config) -> Result<u64> {
    let checkpoint = Checkpoint::open(dir)?;
    let weights = Weights::new(config, &checkpoint)?;
    Ok(Account::of_weights(config, &weights).active_bytes())
}

/// Open sequences and the plan of a step.
struct Bench<'a> {
    decoder: &'a mut dyn Decoder,
    sequences: Vec<SequenceId>,
    rows: u32,
    width: u32,
}

impl<'a> Bench<'a> {
    fn new(
        decoder: &'a mut dyn Decoder,
        args: &BenchDecodeArgs,
        rows: u32,
        drafting: bool,
    ) -> Result<Self> {
        let limits = decoder.limits();
        let (count, width) = if drafting { (1, rows) } else { (rows, 1) };
        let last = u64::from(args.context) + u64::from(args.steps + WARM_UP) * u64::from(width) + 1;
        let limit = limits.context_tokens;
        if last > u64::from(limit) {
            return Err(DecodeError::ContextFull {
                wanted: last,
                limit,
            }
            .into());
        }
        let mut sequences = Vec::new();
        for index in 0..count {
            let sequence = decoder.open()?;
            decoder.prefill(sequence, &tokens(index, args.context, limits.vocab_size))?;
            sequences.push(sequence);
        }
        Ok(Self {
            decoder,
            sequences,
            rows,
            width,
        })
    }

    fn measure(&mut self, args: &BenchDecodeArgs, reader: &mut ReadBandwidth) -> Result<Measured> {
        let (mut out, mut reads) = (StepOutput::default(), vec![reader.pass()]);
        let between = args.steps.div_ceil(READ_PASSES).max(1);
        let (mut times, mut bytes, mut tokens) = (Vec::new(), Vec::new(), 0);
        for step in 0..WARM_UP + args.steps {
            let plan = self.plan(step, args.simulate_acceptance);
            let began = Instant::now();
            self.decoder.step(&plan, &mut out)?;
            let elapsed_ms = began.elapsed().as_secs_f64() * 1e3;
            if step >= WARM_UP {
                times.push(elapsed_ms);
                bytes.push(out.weight_bytes);
                tokens += out.sequences.iter().map(|s| s.tokens.len()).sum::<usize>();
                if (step - WARM_UP + 1).is_multiple_of(between) {
                    reads.push(reader.pass());
                }
            }
        }
        times.sort_by(f64::total_cmp);
        reads.sort_by(f64::total_cmp);
        bytes.sort_unstable();
        Ok(Measured {
            rows: self.rows,
            median_ms: quantile(&times, 0.5),
            p99_ms: quantile(&times, 0.99),
            bytes: bytes[bytes.len() / 2],
            tokens_per_step: tokens as f64 / f64::from(args.steps),
            plain_read: reads[reads.len() / 2] / 1e9,
        })
    }

    fn plan(&self, step: u32, acceptance: Option<f64>) -> StepPlan {
        // Whole drafts whose running sum is the wanted mean times the steps, so the mean is exact.
        let simulate_accepted = acceptance.map(|length| {
            let sum = |steps: u32| (f64::from(steps) * (length - 1.0) + 1e-9).floor() as u32;
            (sum(step + 1) - sum(step)).min(self.width - 1)
        });
        let entry = |&sequence: &SequenceId| SequenceStep {
            sequence,
            width: self.width,
            chance_min: 0.0,
            simulate_accepted,
        };
        StepPlan {
            sequences: self.sequences.iter().map(entry).collect(),
        }
    }

    fn close(self) {
        self.sequences
            .iter()
            .for_each(|&sequence| self.decoder.close(sequence));
    }
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

/// Different text for each sequence, the same in every run.
fn tokens(sequence: u32, count: u32, vocab_size: u32) -> Vec<TokenId> {
    let mut state = u64::from(sequence) + 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % u64::from(vocab_size)) as TokenId
    };
    (0..count).map(|_| next()).collect()
}

impl Measured {
    fn gb_per_s(&self) -> f64 {
        self.bytes as f64 / self.median_ms / 1e6
    }

    fn to_json(&self) -> Value {
        let counted = |value: f64| (self.bytes > 0).then_some(value);
        json!({
            "rows": self.rows,
            "step_ms_median": round(self.median_ms),
            "step_ms_p99": round(self.p99_ms),
            "bytes_read": (self.bytes > 0).then_some(self.bytes),
            "gb_per_s": counted(round(self.gb_per_s())),
            "plain_read_gb_per_s": round(self.plain_read),
            "share_of_plain_read": counted(round(self.gb_per_s() / self.plain_read)),
            "tokens_per_second": round(self.tokens_per_second()),
        })
    }

    /// Four columns; dashes where the backend does not count what it reads.
    fn bandwidth(&self) -> String {
        let read = self.plain_read;
        if self.bytes == 0 {
            return format!("{:>10} {:>9} {read:>11.2} {:>7}  ", "-", "-", "-");
        }
        let (mb, share) = (self.bytes as f64 / 1e6, self.gb_per_s() / read * 100.0);
        format!(
            "{mb:>10.1} {:>9.2} {read:>11.2} {share:>7.0} %",
            self.gb_per_s()
        )
    }

    fn tokens_per_second(&self) -> f64 {
        self.tokens_per_step / self.median_ms * 1e3
    }
}

fn to_json(args: &BenchDecodeArgs, model: &Model, results: &[Measured]) -> Value {
    let rows: Vec<Value> = results.iter().map(Measured::to_json).collect();
    let reads = results.iter().map(|m| m.plain_read);
    let mut out = json!({
        "model": model.name,
        "synthetic": model.synthetic.is_some(),
        "device": format!("{:?}", args.device).to_lowercase(),
        "context": args.context,
        "steps": args.steps,
        "plain_read_gb_per_s": round(reads.fold(0.0, f64::max)),
        "results": rows,
    });
    if args.always_right {
        out["drafts"] = "always right, at no cost".into();
    }
    if let Some(length) = args.simulate_acceptance {
        out["simulated"] = true.into();
        out["simulated_acceptance_length"] = length.into();
    }
    out
}

fn print(args: &BenchDecodeArgs, model: &Model, results: &[Measured]) -> Result<()> {
    let synthetic = if model.synthetic.is_some() {
        " (synthetic weights)"
    } else {
        ""
    };
    let mut text = format!(
        "{}{synthetic}, context {}, {} steps\n",
        model.name, args.context, args.steps
    );
    if args.always_right {
        text += "drafts known beforehand: always right, at no cost\n";
    }
    if let Some(length) = args.simulate_acceptance {
        text += &format!("acceptance simulated: mean length {length}\n");
    }
    text += "rows  median ms    p99 ms    MB read      GB/s  plain read    share  tokens/s\n";
    for m in results {
        text += &format!(
            "{:>4} {:>10.3} {:>9.3} {} {:>9.1}\n",
            m.rows,
            m.median_ms,
            m.p99_ms,
            m.bandwidth(),
            m.tokens_per_second()
        );
    }
    output::write(text.as_bytes())
}
