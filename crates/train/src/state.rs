//! The state of a run on disk: masters, optimizer moments, router biases, steps done.
//!
//! Invariant: a run resumed from a state continues with the same bytes as an unbroken one (on a CPU;
//! tests/resume.rs).

use std::collections::BTreeMap;
use std::path::Path;

use tch::{Tensor, no_grad};

use crate::error::{Error, Result};
use crate::files;
use crate::params::{Params, Rule};

/// Writes the state; `bias` is the router's correction bias, if the model has one.
pub fn save(path: &Path, params: &Params, bias: Option<&Tensor>, step: u64) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for group in &params.groups {
        if group.rule == Rule::Frozen {
            continue;
        }
        tensors.insert(
            format!("{}.master", group.name),
            group.master.shallow_clone(),
        );
        tensors.insert(format!("{}.first", group.name), group.first.shallow_clone());
        if group.rule == Rule::AdamW {
            tensors.insert(
                format!("{}.second", group.name),
                group.second.shallow_clone(),
            );
        }
    }
    if let Some(bias) = bias {
        tensors.insert("bias".into(), bias.shallow_clone());
    }
    let metadata = BTreeMap::from([("step".to_owned(), step.to_string())]);
    files::write_tensors(path, &tensors, &metadata)
}

/// Reads a state into a model of the same sizes; returns the steps done.
pub fn load(path: &Path, params: &mut Params, bias: Option<&mut Tensor>) -> Result<u64> {
    let (tensors, metadata) = files::read_tensors(path)?;
    let fill = |name: String, to: &mut Tensor| -> Result<()> {
        let from = tensors.get(&name).ok_or_else(|| missing(path, &name))?;
        if from.size() != to.size() {
            return Err(Error::Tensor {
                path: path.to_owned(),
                name,
                what: format!("expected shape {:?}, found {:?}", to.size(), from.size()),
            });
        }
        no_grad(|| to.copy_(from));
        Ok(())
    };
    let trained = params.groups.iter_mut();
    for group in trained.filter(|group| group.rule != Rule::Frozen) {
        fill(format!("{}.master", group.name), &mut group.master)?;
        fill(format!("{}.first", group.name), &mut group.first)?;
        if group.rule == Rule::AdamW {
            fill(format!("{}.second", group.name), &mut group.second)?;
        }
        group.refresh();
    }
    if let Some(bias) = bias {
        fill("bias".into(), bias)?;
    }
    let step = metadata.get("step").and_then(|s| s.parse().ok());
    step.ok_or_else(|| missing(path, "step"))
}

fn missing(path: &Path, name: &str) -> Error {
    Error::Tensor {
        path: path.to_owned(),
        name: name.to_owned(),
        what: "expected in the state, not found".into(),
    }
}
