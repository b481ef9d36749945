//! Every op has a definition and, in every crate that implements it, a parity test.
//!
//! One stem an op: `model/src/reference/STEM.rs` is the definition; `cpu/src/STEM.rs` and
//! `cuda/kernels/STEM.cuh` are implementations; the test is `tests/**/STEM.rs`, a test function whose
//! name begins with the stem, or a test module of `src/STEM.rs` itself. What is in those folders and no op is listed in
//! ARCHITECTURE.md, in the block fenced as `text machinery` (`folder: stem, stem`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};

use super::{Findings, files, plan};

/// Folder of implementations, their ending, and the folder of their tests.
const BACKENDS: [(&str, &str, &str); 2] = [
    ("crates/cpu/src", "rs", "crates/cpu/tests"),
    ("crates/cuda/kernels", "cuh", "crates/cuda/tests"),
];
const DEFINITIONS: &str = "crates/model/src/reference";

/// Runs the check.
pub(super) fn check(root: &Path, findings: &mut Findings<'_>) -> Result<()> {
    let architecture = std::fs::read_to_string(root.join("ARCHITECTURE.md"))?;
    let mut machinery: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in plan::block(&architecture, "machinery")? {
        let (folder, stems) = line
            .split_once(':')
            .with_context(|| format!("`{line}` has no colon"))?;
        machinery
            .entry(folder.trim())
            .or_default()
            .extend(stems.split(',').map(str::trim));
    }
    let is_machinery =
        |folder: &str, stem: &str| machinery.get(folder).is_some_and(|set| set.contains(stem));
    let defined = stems(&root.join(DEFINITIONS), "rs")?;
    for (folder, ending, tests) in BACKENDS {
        let tests = Tests::read(&root.join(tests), &root.join(folder))?;
        for stem in stems(&root.join(folder), ending)? {
            let path = root.join(folder).join(format!("{stem}.{ending}"));
            if is_machinery(folder, &stem) {
                continue;
            }
            if !defined.contains(&stem) {
                let message = format!(
                    "no definition {DEFINITIONS}/{stem}.rs, and not listed as machinery of {folder}"
                );
                findings.add(&path, 1, message);
            } else if !tests.cover(&stem) {
                findings.add(
                    &path,
                    1,
                    format!("no parity test: neither tests/{stem}.rs nor a test fn {stem}..."),
                );
            }
        }
    }
    Ok(())
}

/// Stems of the files directly in a folder.
fn stems(dir: &Path, ending: &str) -> Result<BTreeSet<String>> {
    let direct = files(dir, &[ending])?
        .into_iter()
        .filter(|path| path.parent() == Some(dir));
    let ignored = |stem: &String| ["lib", "mod", "main"].contains(&stem.as_str());
    Ok(direct
        .filter_map(|path| stem(&path))
        .filter(|stem| !ignored(stem))
        .collect())
}

/// What of a crate's tests can be told from their names.
struct Tests {
    /// Stems of the files below `tests/`, at any depth.
    stems: BTreeSet<String>,
    /// Lines that follow `#[test]`.
    functions: String,
    /// Sources with a test module of their own.
    own: BTreeSet<String>,
}

impl Tests {
    fn read(dir: &Path, sources: &Path) -> Result<Self> {
        let mut tests = Self {
            stems: BTreeSet::new(),
            functions: String::new(),
            own: BTreeSet::new(),
        };
        for path in files(dir, &["rs"])? {
            tests.stems.extend(stem(&path));
            tests.add_functions(&std::fs::read_to_string(path)?);
        }
        for path in files(sources, &["rs"])? {
            if std::fs::read_to_string(&path)?.contains("#[cfg(test)]") {
                tests.own.extend(stem(&path).filter(|stem| stem != "mod"));
                // `linear/mod.rs` is the module `linear`.
                tests.own.extend(
                    path.parent()
                        .filter(|_| path.ends_with("mod.rs"))
                        .and_then(stem),
                );
            }
        }
        Ok(tests)
    }

    fn add_functions(&mut self, source: &str) {
        let mut lines = source.lines().map(str::trim_start);
        while let Some(line) = lines.next() {
            if line.starts_with("#[test]") {
                self.functions.extend(lines.next());
                self.functions.push('\n');
            }
        }
    }

    fn cover(&self, stem: &str) -> bool {
        let function = format!("fn {stem}");
        self.stems.contains(stem) || self.own.contains(stem) || self.functions.contains(&function)
    }
}

fn stem(path: &Path) -> Option<String> {
    Some(path.file_stem()?.to_str()?.to_owned())
}
