//! `tidy`: the house rules that a machine can check, over the working tree.
//!
//! Owns: crate directions and rooms (`plan`), ops with definition and parity test (`ops`), and the
//! shape of source files (`source`). Reads ARCHITECTURE.md, so that it cannot drift. Reports
//! everything it finds at once, each with file and line.

mod ops;
mod plan;
mod source;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// One broken rule.
#[derive(Debug)]
pub(crate) struct Finding {
    path: PathBuf,
    line: usize,
    message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.message)
    }
}

/// What was found so far, with paths relative to the root.
pub(crate) struct Findings<'a> {
    root: &'a Path,
    list: Vec<Finding>,
}

impl Findings<'_> {
    fn add(&mut self, path: &Path, line: usize, message: impl Into<String>) {
        let path = path.strip_prefix(self.root).unwrap_or(path).to_owned();
        self.list.push(Finding {
            path,
            line,
            message: message.into(),
        });
    }
}

/// Runs `tidy`.
pub(crate) fn run() -> Result<()> {
    let (findings, summary) = check(&crate::root())?;
    findings.iter().for_each(|finding| println!("{finding}"));
    println!("{summary}");
    ensure!(findings.is_empty(), "tidy: {} findings", findings.len());
    println!("tidy: nothing found");
    Ok(())
}

/// All findings in the tree under `root`, and a line of figures.
pub(crate) fn check(root: &Path) -> Result<(Vec<Finding>, String)> {
    let mut findings = Findings {
        root,
        list: Vec::new(),
    };
    plan::check(root, &mut findings)?;
    ops::check(root, &mut findings)?;
    let summary = source::check(root, &mut findings)?;
    Ok((findings.list, summary))
}

/// Files below `dir` with one of these endings, in order. Build outputs are not visited.
fn files(dir: &Path, endings: &[&str]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                if !["target", "node_modules", "dist"]
                    .iter()
                    .any(|name| path.ends_with(name))
                {
                    waiting.push(path);
                }
            } else if endings
                .iter()
                .any(|ending| path.extension().is_some_and(|e| e == *ending))
            {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_tree_is_tidy() {
        let (findings, _) = super::check(&crate::root()).unwrap();
        let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
        assert!(lines.is_empty(), "\n{}", lines.join("\n"));
    }
}
