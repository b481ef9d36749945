//! Which checkpoint a command means.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::failure::bad_input;

/// The model that ships, below the root of a clone.
const SHIPPED: &str = "models/kilotok-mini";

/// The directory given, or the model that ships: looked for from the working directory upwards, then
/// from the program's own place upwards (`target/release/` lies in a clone).
pub(crate) fn resolve(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = given {
        return match std::fs::metadata(dir) {
            Ok(found) if found.is_dir() => Ok(dir.to_owned()),
            Ok(_) => bad_input(format!(
                "--model {}: expected a directory, found a file",
                dir.display()
            )),
            Err(error) => bad_input(format!(
                "--model {}: expected a directory, found {error}",
                dir.display()
            )),
        };
    }
    let starts = [std::env::current_dir().ok(), std::env::current_exe().ok()];
    let places = starts.iter().flatten().flat_map(|start| start.ancestors());
    match places
        .map(|dir| dir.join(SHIPPED))
        .find(|dir| dir.join("config.json").is_file())
    {
        Some(dir) => Ok(dir),
        None => bad_input(format!(
            "no model: {SHIPPED} is neither above the working directory nor above the program; give --model DIR"
        )),
    }
}

/// The text of a config.json that stands for a model.
///
/// # Errors
/// Bad input, when it cannot be read.
pub(crate) fn read_config(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) => bad_input(format!("{}: cannot read: {error}", path.display())),
    }
}
