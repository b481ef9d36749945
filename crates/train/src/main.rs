//! `kilotok-train`: one subcommand a phase.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use train::corpus;

mod phases;

#[derive(Debug, Parser)]
#[command(name = "kilotok-train", version, about = "Makes models for kilotok")]
struct Arguments {
    #[command(subcommand)]
    phase: Phase,
}

#[derive(Debug, Subcommand)]
enum Phase {
    /// Build the training text from unpacked sources
    Corpus {
        /// Directory of sources (see docs/training.md)
        sources: PathBuf,
        /// Directory to write
        #[arg(long)]
        out: PathBuf,
        /// tokenizer.json of the model
        #[arg(long)]
        tokenizer: PathBuf,
        /// JSON-lines files whose text must not occur
        #[arg(long)]
        exclude: Vec<PathBuf>,
        /// Training tokens a domain at most
        #[arg(long, default_value_t = 30_000_000)]
        tokens_max: usize,
    },
    /// Write prompts for self-distillation from the same sources: `prompts.json`
    Prompts {
        /// Directory of sources
        sources: PathBuf,
        /// Directory to write
        #[arg(long)]
        out: PathBuf,
        /// tokenizer.json of the model
        #[arg(long)]
        tokenizer: PathBuf,
        /// JSON-lines files whose text must not occur
        #[arg(long)]
        exclude: Vec<PathBuf>,
    },
    /// Take the corpus's conversations as answers: text the target did not write
    Conversations {
        /// The corpus directory
        corpus: PathBuf,
        /// File to write, as `answers.bin` of `generate`
        #[arg(long)]
        out: PathBuf,
        /// Domains, in the recipe's order
        #[arg(long, value_delimiter = ',', default_value = "code,math,tools,chat")]
        domains: Vec<String>,
        /// Answers a domain at most
        #[arg(long, default_value_t = 12_000)]
        answers_max: usize,
        /// Tokens of prompt and answer at most
        #[arg(long, default_value_t = 640)]
        length_max: usize,
    },
    /// Make a random dense model and synthetic text for the tiny recipe
    Synthetic {
        /// Directory to write
        #[arg(long)]
        out: PathBuf,
    },
    /// Cut files into compressed, hashed pieces
    Pack {
        /// Directory of the files
        directory: PathBuf,
        /// Names of the files
        names: Vec<String>,
        /// Directory to write
        #[arg(long)]
        out: PathBuf,
        /// Bytes a piece at most
        #[arg(long, default_value_t = 15_000_000)]
        bytes_max: usize,
    },
    /// Cut a dense model into experts and distil it
    Sparsify {
        #[command(flatten)]
        paths: Paths,
        /// The dense checkpoint
        #[arg(long)]
        teacher: PathBuf,
    },
    /// Distil the sparse model with its weights rounded to what ships
    Qat {
        #[command(flatten)]
        paths: Paths,
        /// The dense checkpoint
        #[arg(long)]
        teacher: PathBuf,
        /// The sparse checkpoint of `sparsify`
        #[arg(long)]
        student: PathBuf,
    },
    /// Write the model's own answers to the corpus's prompts
    Generate {
        #[command(flatten)]
        paths: Paths,
        /// The checkpoint that answers
        #[arg(long)]
        model: PathBuf,
    },
    /// Train a DFlash drafter on the target's answers
    Draft {
        #[command(flatten)]
        paths: Paths,
        /// The target checkpoint
        #[arg(long)]
        model: PathBuf,
        /// `answers.bin` of `generate`
        #[arg(long)]
        answers: PathBuf,
        /// More answers, for evaluation alone: acceptance on them is reported as `unseen`
        #[arg(long)]
        unseen: Option<PathBuf>,
    },
    /// Perplexity by domain
    Eval {
        #[command(flatten)]
        paths: Paths,
        /// The checkpoint
        #[arg(long)]
        model: PathBuf,
        /// Round as the exporter would: quantisation after training
        #[arg(long)]
        rounded: bool,
    },
    /// Task scores through a running `kilotok serve`: MBPP tests, GSM8K numbers, BFCL calls
    Tasks {
        /// HOST:PORT of the server
        #[arg(long, default_value = "127.0.0.1:8000")]
        server: String,
        /// Name under which it serves the model
        #[arg(long, default_value = "kilotok-mini")]
        model: String,
        /// Directory of coding.jsonl, math.jsonl and agent.jsonl
        #[arg(long)]
        prompts: PathBuf,
        /// Prompts a domain, from the start of its file
        #[arg(long, default_value_t = 50)]
        count: usize,
        /// Tokens an answer at most
        #[arg(long, default_value_t = 256)]
        tokens_max: usize,
        /// Python that runs the tests
        #[arg(long, default_value = "python3")]
        python: String,
        /// Directory to write
        #[arg(long)]
        out: PathBuf,
    },
    /// Acceptance length by domain through a running `kilotok serve` with a drafter
    Acceptance {
        /// HOST:PORT of the server
        #[arg(long, default_value = "127.0.0.1:8000")]
        server: String,
        /// Name under which it serves the model
        #[arg(long, default_value = "kilotok-mini")]
        model: String,
        /// JSON-lines files of prompts; a file's name is its domain's
        #[arg(long, required = true)]
        prompts: Vec<PathBuf>,
        /// Prompts a file
        #[arg(long, default_value_t = 16)]
        count: usize,
        /// Every n-th prompt of a file
        #[arg(long, default_value_t = 1)]
        every: usize,
        /// Tokens an answer at most
        #[arg(long, default_value_t = 160)]
        tokens_max: usize,
        /// 0: greedy
        #[arg(long, default_value_t = 0.0)]
        temperature: f64,
        /// Probability mass that sampling draws from
        #[arg(long, default_value_t = 1.0)]
        top_p: f64,
        /// Directory to write
        #[arg(long)]
        out: PathBuf,
    },
    /// Draw the curves of a run's log beside it, as SVG
    Plot {
        /// JSON lines, one a step
        log: PathBuf,
    },
    /// Put pieces together again
    Unpack {
        /// Directory of the pieces
        pieces: PathBuf,
        /// Directory to write
        #[arg(long)]
        out: PathBuf,
    },
}

/// What every phase takes.
#[derive(Debug, clap::Args)]
struct Paths {
    /// The recipe
    #[arg(long)]
    recipe: PathBuf,
    /// The corpus directory
    #[arg(long)]
    corpus: PathBuf,
    /// Directory to write
    #[arg(long)]
    out: PathBuf,
    /// Continue the last checkpoint in `out`
    #[arg(long)]
    resume: bool,
    /// Change a setting of the recipe: section.key=value, in TOML
    #[arg(long)]
    set: Vec<String>,
}

impl Paths {
    fn recipe(&self) -> anyhow::Result<train::recipe::Recipe> {
        Ok(train::recipe::Recipe::read(&self.recipe, &self.set)?)
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse().phase) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(phase: Phase) -> anyhow::Result<()> {
    match phase {
        #[rustfmt::skip]
        Phase::Corpus { sources: root, out, tokenizer, exclude, tokens_max } => {
            #[rustfmt::skip]
            let sources = corpus::Sources { root, exclude, tokenizer, tokens_max };
            corpus::build(&sources, &out)?;
        }
        #[rustfmt::skip]
        Phase::Prompts { sources: root, out, tokenizer, exclude } => {
            #[rustfmt::skip]
            let sources = corpus::Sources { root, exclude, tokenizer, tokens_max: 0 };
            corpus::prompts::build(&sources, &out)?;
        }
        #[rustfmt::skip]
        Phase::Conversations { corpus, out, domains, answers_max, length_max } => phases::conversations(&corpus, &out, &domains, answers_max, length_max)?,
        #[rustfmt::skip]
        Phase::Pack { directory, names, out, bytes_max } => {
            corpus::pack::pack(&directory, &names, &out, bytes_max)?;
        }
        Phase::Sparsify { paths, teacher } => phases::sparsify(&paths.recipe()?, &paths, &teacher)?,
        Phase::Qat {
            paths,
            teacher,
            student,
        } => phases::qat(&paths.recipe()?, &paths, &teacher, &student)?,
        Phase::Generate { paths, model } => phases::generate(&paths.recipe()?, &paths, &model)?,
        Phase::Draft {
            paths,
            model,
            answers,
            unseen,
        } => phases::draft(
            &paths.recipe()?,
            &paths,
            &model,
            &answers,
            unseen.as_deref(),
        )?,
        Phase::Eval {
            paths,
            model,
            rounded,
        } => phases::eval(&paths.recipe()?, &paths, &model, rounded)?,
        #[rustfmt::skip]
        Phase::Tasks { server, model, prompts, count, tokens_max, python, out } => {
            #[rustfmt::skip]
            let settings = train::tasks::Settings { server, model, prompts, count, tokens_max, python };
            let scores = train::tasks::run(&settings, &out)?;
            println!("{scores}");
        }
        Phase::Synthetic { out } => train::synthetic::write(&out)?,
        #[rustfmt::skip]
        Phase::Acceptance { server, model, prompts, count, every, tokens_max, temperature, top_p, out } => {
            #[rustfmt::skip]
            let settings = train::tasks::acceptance::Settings { server, model, prompts, count, every, tokens_max, temperature, top_p };
            train::tasks::acceptance::run(&settings, &out)?;
        }
        Phase::Plot { log } => train::report::plot(&log)?,
        Phase::Unpack { pieces, out } => corpus::pack::unpack(&pieces, &out)?,
    }
    Ok(())
}
