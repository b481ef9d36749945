//! The binary `kilotok`: parses the command line, wires a decoder into an engine, prints.
//!
//! Refuses: model arithmetic (that is the backends') and request scheduling (the engine's).
//! Invariants: exit codes are 0 (done), 1 (it failed), 2 (the input cannot be used); an error is
//! one line on standard error; no panic reaches a user; results go to standard output, everything
//! else to standard error.
#![forbid(unsafe_code)]

mod args;
mod backend;
mod bench;
mod bench_cuda;
mod bench_serve;
mod chat;
mod config_file;
mod doctor;
mod failure;
mod free_memory;
mod generate;
mod inspect;
mod interrupt;
mod load_plan;
mod machine;
mod model_dir;
mod output;
mod progress;
mod prompt;
mod report;
mod score;
mod serve;
mod session;
mod synthetic;

use std::panic::PanicHookInfo;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{BenchCommand, Cli, Command};

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(report_panic));
    let cli = Cli::parse();
    match std::panic::catch_unwind(|| run(cli)) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("kilotok: {}", failure::one_line(&error));
            ExitCode::from(failure::exit_code(&error))
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match &config_file::resolve(cli)?.command {
        Command::Generate(args) => generate::run(args)?,
        Command::Chat(args) => chat::run(args)?,
        Command::Score(args) => score::run(args)?,
        Command::Inspect(args) => inspect::run(args)?,
        Command::Bench(BenchCommand::Decode(args)) => bench::run(args)?,
        Command::Bench(BenchCommand::Serve(args)) => bench_serve::run(args)?,
        Command::Serve(args) => serve::run(args)?,
        Command::Admin(args) => serve::admin(args)?,
        Command::Doctor(args) => return doctor::run(args),
        Command::Completions { shell } => completions(*shell)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kilotok", &mut script);
    output::write(&script)
}

/// A bug: one line with its place, instead of a backtrace.
fn report_panic(info: &PanicHookInfo<'_>) {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    let place = info
        .location()
        .map_or_else(String::new, |at| format!(" at {}:{}", at.file(), at.line()));
    eprintln!(
        "kilotok: internal error{place}: {}",
        text.replace(['\n', '\r'], " ")
    );
}
