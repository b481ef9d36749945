//! Project scripts, run as `cargo run -p xtask -- COMMAND`: the model that ships (`make-mini`), the
//! house rules (`tidy`), and mutated inputs (`fuzz`).
//!
//! Nothing here is part of the product: no library crate may depend on this one.
#![forbid(unsafe_code)]

mod fuzz;
mod gguf;
mod make_mini;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

/// Project scripts of kilotok.
#[derive(Parser, Debug)]
#[command(name = "xtask", version)]
enum Command {
    /// Make models/kilotok-mini from SmolLM2-135M-Instruct in GGUF form
    MakeMini(make_mini::Options),
    /// Feed mutated files to everything that reads files from outside
    Fuzz(fuzz::Options),
    /// Check the house rules over the whole tree
    Tidy,
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::MakeMini(options) => make_mini::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Tidy => tidy::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the workspace.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .unwrap_or(Path::new("."))
        .to_owned()
}
