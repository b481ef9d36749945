//! Crate directions and rooms: `cargo metadata` and the folders against ARCHITECTURE.md.
//!
//! ARCHITECTURE.md holds one block fenced as `text rooms` (a line a room: `name/` and what it is)
//! and one fenced as `text directions` (a line a crate: `name -> what it may depend on`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Findings;

/// Folders of the root that hold no room of the project.
const NOT_ROOMS: [&str; 3] = ["crates", "target", "shared"];

/// Runs the checks.
pub(super) fn check(root: &Path, findings: &mut Findings<'_>) -> Result<()> {
    let path = root.join("ARCHITECTURE.md");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    rooms(root, &text, findings)?;
    directions(root, &text, findings)
}

/// Lines of the block that opens with ```` ```text NAME ````.
pub(super) fn block<'a>(text: &'a str, name: &str) -> Result<Vec<&'a str>> {
    let fence = format!("```text {name}");
    let mut lines = text.lines().skip_while(|line| *line != fence);
    ensure!(
        lines.next().is_some(),
        "ARCHITECTURE.md has no block `{fence}`"
    );
    Ok(lines
        .take_while(|line| *line != "```")
        .filter(|line| !line.trim().is_empty())
        .collect())
}

fn folders(dir: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && !name.starts_with('.') {
            names.insert(name);
        }
    }
    Ok(names)
}

fn rooms(root: &Path, text: &str, findings: &mut Findings<'_>) -> Result<()> {
    let path = root.join("ARCHITECTURE.md");
    let named: BTreeSet<String> = block(text, "rooms")?
        .iter()
        .filter_map(|line| Some(line.trim_start().split_once('/')?.0.to_owned()))
        // A continued description may have a slash too, but not after its first word.
        .filter(|name| !name.contains(' '))
        .collect();
    let crates = folders(&root.join("crates"))?;
    let others = folders(root)?
        .into_iter()
        .filter(|name| !NOT_ROOMS.contains(&name.as_str()));
    let there: BTreeSet<String> = crates.iter().cloned().chain(others).collect();
    for name in there.difference(&named) {
        findings.add(
            &path,
            1,
            format!("room `{name}/` is not in the block `rooms`"),
        );
    }
    for name in named
        .iter()
        .filter(|name| !there.contains(*name) && *name != "crates")
    {
        findings.add(
            &path,
            1,
            format!("the block `rooms` names `{name}/`, which is not there"),
        );
    }
    for name in crates.iter().filter(|name| super::source::is_vague(name)) {
        findings.add(
            &root.join("crates").join(name),
            1,
            "a crate needs a noun, not this name",
        );
    }
    Ok(())
}

fn directions(root: &Path, text: &str, findings: &mut Findings<'_>) -> Result<()> {
    let path = root.join("ARCHITECTURE.md");
    let mut allowed: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in block(text, "directions")? {
        let (name, targets) = line
            .split_once("->")
            .with_context(|| format!("`{line}` has no arrow"))?;
        let targets = targets
            .split([',', ' '])
            .filter(|target| !target.is_empty());
        allowed.insert(name.trim(), targets.collect());
    }
    let found = dependencies(root)?;
    for (name, targets) in &found {
        let Some(allowed) = allowed.get(name.as_str()) else {
            findings.add(
                &path,
                1,
                format!("crate `{name}` is not in the block `directions`"),
            );
            continue;
        };
        for target in targets
            .iter()
            .filter(|target| !allowed.contains(target.as_str()))
        {
            let manifest = root.join("crates").join(name).join("Cargo.toml");
            findings.add(
                &manifest,
                1,
                format!("`{name} -> {target}` is not an allowed direction"),
            );
        }
    }
    for name in allowed.keys().filter(|name| !found.contains_key(**name)) {
        findings.add(
            &path,
            1,
            format!("the block `directions` names `{name}`, which is no crate"),
        );
    }
    Ok(())
}

/// For each crate of the workspace, the others it needs outside its tests.
fn dependencies(root: &Path) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = [
        "metadata",
        "--format-version",
        "1",
        "--no-deps",
        "--offline",
    ];
    let output = Command::new(cargo)
        .args(arguments)
        .current_dir(root)
        .output()
        .context("cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata has no packages")?;
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    let members: BTreeSet<String> = packages.iter().map(name).collect();
    let needs = |package: &Value| {
        let dependencies = package["dependencies"].as_array().into_iter().flatten();
        let normal = dependencies.filter(|dependency| dependency["kind"] != "dev");
        normal
            .map(name)
            .filter(|name| members.contains(name))
            .collect()
    };
    Ok(packages
        .iter()
        .map(|package| (name(package), needs(package)))
        .collect())
}
