//! Project scripts, run as `cargo run -p xtask -- COMMAND`: the model that ships (`make-mini`).
//!
//! Nothing here is part of the product: no library crate may depend on this one.
#![forbid(unsafe_code)]

mod gguf;
mod make_mini;

use clap::Parser;

/// Project scripts of kilotok.
#[derive(Parser, Debug)]
#[command(name = "xtask", version)]
enum Command {
    /// Make models/kilotok-mini from SmolLM2-135M-Instruct in GGUF form
    MakeMini(make_mini::Options),
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::MakeMini(options) => make_mini::run(&options),
    }
}
