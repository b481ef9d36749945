//! Token streams on disk and the batches drawn from them.
//!
//! A corpus directory holds `NAME.u16` (little-endian token ids, documents ended by the separator)
//! and `NAME.eval.u16` for each domain. The batch of a step is a function of the seed and the step
//! alone, so a resumed run sees what an unbroken one would.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::files;

/// One domain of a recipe.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Domain {
    /// Stem of its files.
    pub name: String,
    /// Part of all sequences.
    pub share: f64,
    /// Weight of the divergence from the teacher.
    pub distill: f64,
    /// Weight of the cross-entropy on the text.
    pub copy: f64,
}

/// Tokens of all domains.
#[derive(Debug)]
pub struct Corpus {
    domains: Vec<(Domain, Vec<u16>)>,
    length: usize,
    seed: u64,
}

/// Sequences of one step.
#[derive(Debug)]
pub struct Batch {
    /// `[rows, length + 1]` int64.
    pub tokens: Tensor,
    /// `[rows]` f32: weight of the divergence.
    pub distill: Tensor,
    /// `[rows]` f32: weight of the cross-entropy.
    pub copy: Tensor,
}

/// Reads a file of little-endian u16 tokens.
pub fn read_tokens(path: &Path) -> Result<Vec<u16>> {
    let bytes = files::read(path)?;
    Ok(bytes
        .chunks_exact(2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]))
        .collect())
}

/// A well-mixed 64-bit hash (SplitMix64's finaliser).
#[must_use]
pub fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A uniform number in [0, 1) for a seed and two counters.
#[must_use]
pub fn uniform(seed: u64, a: u64, b: u64) -> f64 {
    (mix(mix(mix(seed) ^ a) ^ b) >> 11) as f64 / (1u64 << 53) as f64
}

impl Corpus {
    /// Opens the training streams of all domains for sequences of `length` + 1 tokens.
    pub fn open(directory: &Path, domains: &[Domain], length: usize, seed: u64) -> Result<Self> {
        let mut opened = Vec::new();
        for domain in domains {
            let path = directory.join(format!("{}.u16", domain.name));
            let tokens = read_tokens(&path)?;
            if tokens.len() < length + 1 {
                return Err(Error::Invalid(format!(
                    "{}: expected at least {} tokens, found {}",
                    path.display(),
                    length + 1,
                    tokens.len()
                )));
            }
            opened.push((domain.clone(), tokens));
        }
        Ok(Self {
            domains: opened,
            length,
            seed,
        })
    }

    /// Number of training tokens on disk.
    #[must_use]
    pub fn count(&self) -> usize {
        self.domains.iter().map(|d| d.1.len()).sum()
    }

    /// The batch of `step`: `rows` sequences at random places.
    #[must_use]
    pub fn batch(&self, step: u64, rows: usize, device: Device) -> Batch {
        let total: f64 = self.domains.iter().map(|d| d.0.share).sum();
        let (mut tokens, mut distill, mut copy) = (Vec::new(), Vec::new(), Vec::new());
        for row in 0..rows as u64 {
            // Stratified: domains keep their shares in every batch.
            let mut point = (row as f64 + uniform(self.seed, step, 2 * row)) / rows as f64 * total;
            let mut chosen = &self.domains[self.domains.len() - 1];
            for domain in &self.domains {
                if point < domain.0.share {
                    chosen = domain;
                    break;
                }
                point -= domain.0.share;
            }
            let places = chosen.1.len() - self.length;
            let at = (uniform(self.seed, step, 2 * row + 1) * places as f64) as usize;
            tokens.extend(
                chosen.1[at..=at + self.length]
                    .iter()
                    .map(|&t| i64::from(t)),
            );
            distill.push(chosen.0.distill as f32);
            copy.push(chosen.0.copy as f32);
        }
        Batch {
            tokens: Tensor::from_slice(&tokens)
                .reshape([rows as i64, self.length as i64 + 1])
                .to_device(device),
            distill: Tensor::from_slice(&distill).to_device(device),
            copy: Tensor::from_slice(&copy).to_device(device),
        }
    }
}

/// Held-out sequences of a domain, `[rows, length + 1]`, from the start of its file.
pub fn held_out(directory: &Path, name: &str, length: usize, rows: usize) -> Result<Tensor> {
    let path = directory.join(format!("{name}.eval.u16"));
    let tokens = read_tokens(&path)?;
    let rows = rows.min(tokens.len() / (length + 1));
    if rows == 0 {
        return Err(Error::Invalid(format!(
            "{}: expected at least {} tokens, found {}",
            path.display(),
            length + 1,
            tokens.len()
        )));
    }
    let values: Vec<i64> = tokens[..rows * (length + 1)]
        .iter()
        .map(|&t| i64::from(t))
        .collect();
    Ok(Tensor::from_slice(&values)
        .reshape([rows as i64, length as i64 + 1])
        .to_kind(Kind::Int64))
}
