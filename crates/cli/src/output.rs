//! Standard output, where a reader that goes away is no error and never a panic.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use crate::failure::bad_input;

/// Writes and flushes.
pub(crate) fn write(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// Writes one line.
pub(crate) fn line(text: &str) -> Result<()> {
    write(format!("{text}\n").as_bytes())
}

/// Writes one JSON value on one line.
pub(crate) fn json(value: &Value) -> Result<()> {
    line(&value.to_string())
}

/// The file that `option` names, made before there is anything to write, so that nothing is lost for want of it.
///
/// # Errors
/// Bad input, when it cannot be created.
pub(crate) fn create(option: &str, path: &Path) -> Result<File> {
    match File::create(path) {
        Ok(file) => Ok(file),
        Err(error) => bad_input(format!(
            "{option} {}: cannot create: {error}",
            path.display()
        )),
    }
}

/// The reader of our output has gone, as with `kilotok ... | head`.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = |cause: &(dyn std::error::Error + 'static)| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
    };
    error.chain().any(io)
}
