//! `make-mini`: turns SmolLM2-135M-Instruct (GGUF) into `models/kilotok-mini`, a MiMo-V2 checkpoint.
//!
//! MiMo-V2's forward pass contains Llama's: partial rotary 1, value scale 1, no sinks, every layer
//! full attention. Every FFN is cut into [`EXPERTS`] experts, all of them active, with a router of
//! zeros: each weight is then exactly 1/8, and `down_proj` times 8 (a power of two, exact in every
//! format) undoes it. So before quantisation the result computes the dense model's function, which
//! [`Form::Dense`] and [`Form::Sliced`] let a test check.

mod config;
mod files;
mod llama;
mod mimo;
mod text;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::gguf::Gguf;
use llama::Dense;

/// Experts a layer, all of them chosen for every token.
pub(crate) const EXPERTS: usize = 8;

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Form {
    /// The dense model, every weight in f32: the oracle.
    Dense,
    /// Cut into experts, every weight in f32: must compute what `Dense` computes.
    Sliced,
    /// Cut into experts, MXFP4 experts, FP8 attention and embedding: what ships.
    Mini,
}

/// Arguments of `make-mini`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// The base model: SmolLM2-135M-Instruct, F32, F16, Q4_1 and Q8_0 tensors
    pub file: PathBuf,
    /// Directory to write; must not exist or must hold an earlier result
    #[arg(long, default_value = "models/kilotok-mini")]
    pub out: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value_t = Form::Mini)]
    pub form: Form,
}

/// Runs `make-mini`: everything is written beside the target and moved there when complete.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut gguf = Gguf::open(&options.file)?;
    let dense = Dense::from_gguf(&gguf)?;
    let name = options
        .out
        .file_name()
        .context("--out has no directory name")?;
    let parent = match options.out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent)
        .with_context(|| format!("{}: cannot create", parent.display()))?;
    let staged = parent.join(format!(".{}.new", name.to_string_lossy()));
    if staged.exists() {
        std::fs::remove_dir_all(&staged)?;
    }
    std::fs::create_dir(&staged)?;
    write(&mut gguf, &dense, options.form, &staged)?;
    replace(&staged, &options.out)?;
    println!("wrote {}", options.out.display());
    Ok(())
}

fn write(gguf: &mut Gguf, dense: &Dense, form: Form, out: &Path) -> Result<()> {
    let mut shards = files::Shards::new(out);
    mimo::write_weights(gguf, dense, form, &mut shards)?;
    shards.finish(form)?;
    files::write_json(&out.join("config.json"), &config::config(dense, form))?;
    text::write(gguf, dense, out)?;
    if form == Form::Mini {
        std::fs::write(out.join("README.md"), include_str!("card.md"))?;
    }
    Ok(())
}

/// Whether a file's header opens: for the fuzzer.
pub(crate) fn opens(file: &Path) -> bool {
    Gguf::open(file).is_ok_and(|gguf| Dense::from_gguf(&gguf).is_ok())
}

/// Moves `staged` to `out`, taking an earlier checkpoint of ours away but nothing else.
fn replace(staged: &Path, out: &Path) -> Result<()> {
    if out.exists() {
        ensure!(
            out.join("config.json").exists() || std::fs::read_dir(out)?.next().is_none(),
            "{}: exists and is not a checkpoint; not replaced",
            out.display()
        );
        std::fs::remove_dir_all(out)?;
    }
    std::fs::rename(staged, out)
        .with_context(|| format!("{}: cannot move into place", out.display()))
}

#[cfg(test)]
mod tests;
