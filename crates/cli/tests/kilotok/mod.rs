//! Runs the binary as a user would.
#![allow(dead_code)] // Each test file uses its part.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// Devices, and how far their log-probabilities may be from the oracle's on average.
pub(crate) const DEVICES: [(&str, f64); 2] = [("reference", 1e-3), ("cpu", 2e-2)];

/// What a run gave.
#[derive(Debug)]
pub(crate) struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A path below goldens/.
pub(crate) fn golden(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens");
    root.join(path).to_str().unwrap().to_owned()
}

/// Runs `kilotok` with nothing on standard input.
pub(crate) fn run(args: &[&str]) -> Output {
    run_with(args, b"")
}

/// Runs `kilotok` with bytes on standard input, and none of the caller's settings.
pub(crate) fn run_with(args: &[&str], stdin: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kilotok"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("KILOTOK_")) {
        command.env_remove(name);
    }
    let pipes = command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    // A program that refuses its arguments does not read.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let output = child.wait_with_output().unwrap();
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs `kilotok` and parses what it prints.
pub(crate) fn json(args: &[&str]) -> Value {
    let output = run(args);
    assert_eq!(output.code, 0, "{args:?}: {}", output.stderr);
    serde_json::from_str(&output.stdout)
        .unwrap_or_else(|e| panic!("{args:?}: {e}: {}", output.stdout))
}

/// Ids as `--token-ids` takes them.
pub(crate) fn ids(value: &Value) -> String {
    let ids: Vec<String> = value
        .as_array()
        .unwrap()
        .iter()
        .map(ToString::to_string)
        .collect();
    ids.join(",")
}
