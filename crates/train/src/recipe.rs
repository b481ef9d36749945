//! A recipe: one TOML file with the settings of every phase.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::{distill, draft, sparsify};

/// All phases.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// `cpu` or `cuda`.
    pub device: String,
    /// How the dense model is cut.
    pub slices: sparsify::Plan,
    /// Calibration sequences.
    pub calibration_rows: usize,
    /// First distillation, everything in the compute type.
    pub sparsify: distill::Settings,
    /// Second distillation, rounded to what ships.
    pub qat: distill::Settings,
    /// The target's own answers.
    pub generate: Generate,
    /// The drafter.
    pub draft: draft::Settings,
}

/// Settings of sampling.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Generate {
    /// Names of the domains, in the order of their index.
    pub domains: Vec<String>,
    /// Answers of each.
    pub answers: Vec<usize>,
    /// Rows sampled together.
    pub batch: usize,
    /// Positions a row.
    pub length: usize,
    /// Tokens an answer at most.
    #[serde(default = "unlimited")]
    pub answer_max: usize,
    /// Longest prompt taken.
    pub prompt_max: usize,
    /// Temperatures in turn; 0 is greedy.
    pub temperatures: Vec<f64>,
    /// Nucleus.
    pub top_p: f64,
    /// Stop token.
    pub stop: u16,
    /// Seed of the order of prompts and of sampling.
    pub seed: u64,
    /// Chat prompts that the model writes itself, from nothing but the start of a user's turn.
    #[serde(default)]
    pub invented: usize,
}

const fn unlimited() -> usize {
    usize::MAX >> 1
}

impl Recipe {
    /// Reads and checks a recipe; `changes` are `section.key=value` in TOML.
    pub fn read(path: &Path, changes: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(crate::error::io(path))?;
        let wrong = |what: String| Error::Config {
            path: path.to_owned(),
            what,
        };
        let mut table: toml::Table = toml::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        for change in changes {
            let part: toml::Table =
                toml::from_str(change).map_err(|e| wrong(format!("`{change}`: {e}")))?;
            merge(&mut table, part);
        }
        let recipe: Self = table
            .try_into()
            .map_err(|e: toml::de::Error| wrong(e.to_string()))?;
        for (name, length) in [
            ("sparsify", recipe.sparsify.length),
            ("qat", recipe.qat.length),
        ] {
            if length as i64 % recipe.slices.window != 0 {
                return Err(wrong(format!(
                    "`{name}.length`: expected a multiple of the window {}, found {length}",
                    recipe.slices.window
                )));
            }
        }
        if recipe.generate.answers.len() != recipe.generate.domains.len() {
            return Err(wrong(
                "`generate.answers`: expected one number a domain".into(),
            ));
        }
        Ok(recipe)
    }
}

/// Puts `part` into `table`, table by table.
fn merge(table: &mut toml::Table, part: toml::Table) {
    for (key, value) in part {
        match (table.get_mut(&key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(value)) => merge(inner, value),
            (_, value) => {
                table.insert(key, value);
            }
        }
    }
}
