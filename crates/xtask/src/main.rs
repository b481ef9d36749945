//! Project scripts, run as `cargo run -p xtask -- COMMAND`: the model that ships (`make-mini`), the
//! house rules (`tidy`), mutated inputs (`fuzz`), and the GPU kernels' compile check (`cubins`).
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
    /// Compile every GPU kernel for sm_90a without a GPU; fails on spills
    Cubins,
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::MakeMini(options) => make_mini::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Tidy => tidy::run(),
        Command::Cubins => cubins(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the example that compiles them: this crate does not build the GPU crate for every other command.
fn cubins() -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let args = "run --locked --release -q -p cuda --example cubins";
    let status = std::process::Command::new(cargo)
        .args(args.split(' '))
        .current_dir(root())
        .status()?;
    anyhow::ensure!(
        status.success(),
        "a kernel does not compile or spills: {status}"
    );
    Ok(())
}

/// The root of the workspace.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .unwrap_or(Path::new("."))
        .to_owned()
}
