//! A DFlash drafter (arXiv 2602.06036) in its released layouts: `config.json`, tensors without
//! embedding or lm_head (those are the target's), and for MiMo `mask_embedding.pt`.
//!
//! Owns reading and the check that a drafter fits its target. Refuses, with the reason, what it
//! would have to guess. The arithmetic is in `reference::draft_network`. Source: dflash.md C.

pub mod config;
mod mask;
mod source;
pub mod weights;

use std::path::Path;

pub use config::{DraftConfig, DraftOptions, DraftWindow};
pub use source::{DraftSource, Replay};
pub use weights::DraftWeights;

use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::ModelError;

/// An opened drafter directory that fits its target.
#[derive(Debug)]
pub struct Draft {
    /// Its shape.
    pub config: DraftConfig,
    /// Its tensors.
    pub checkpoint: Checkpoint,
    /// `[hidden]`, in place of the target's embedding row of the mask token.
    pub mask_embedding: Option<Vec<f32>>,
}

impl Draft {
    /// Opens `dir` for `target`.
    ///
    /// # Errors
    /// [`ModelError`] naming file and field or tensor: broken files, and a drafter of another target
    /// (hidden size, tap layers, vocabulary, mask token).
    pub fn open(dir: &Path, target: &Config, options: DraftOptions) -> Result<Self, ModelError> {
        let config = DraftConfig::load(dir, target, options)?;
        Ok(Self {
            checkpoint: Checkpoint::open(dir)?,
            mask_embedding: mask::load(&dir.join(mask::FILE), &config)?,
            config,
        })
    }

    /// The typed table of its weights.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] naming the first tensor that is missing or has another shape.
    pub fn weights(&self) -> Result<DraftWeights<'_>, ModelError> {
        DraftWeights::new(&self.config, &self.checkpoint)
    }
}
