//! Writes a checkpoint: safetensors shards of at most [`SHARD_BYTES_MAX`], then their index.
//!
//! Invariants: a tensor is never split; shards are named once their number is known; names of the
//! files are those of Hugging Face, so that any loader of the family reads them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::Form;

/// Git hosts refuse files far above this, and one shard is one read at load.
pub(crate) const SHARD_BYTES_MAX: usize = 40_000_000;

struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Tensors on their way to disk.
pub(crate) struct Shards {
    out: PathBuf,
    pending: Vec<Stored>,
    pending_bytes: usize,
    total_bytes: usize,
    /// Names of the tensors in each shard written so far.
    written: Vec<Vec<String>>,
}

impl Shards {
    pub(crate) fn new(out: &Path) -> Self {
        Self {
            out: out.to_owned(),
            pending: Vec::new(),
            pending_bytes: 0,
            total_bytes: 0,
            written: Vec::new(),
        }
    }

    /// Adds a tensor; begins a new shard when the current one would grow too large.
    pub(crate) fn add(
        &mut self,
        name: String,
        dtype: Dtype,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> Result<()> {
        if !self.pending.is_empty() && self.pending_bytes + bytes.len() > SHARD_BYTES_MAX {
            self.flush()?;
        }
        self.pending_bytes += bytes.len();
        self.total_bytes += bytes.len();
        self.pending.push(Stored {
            name,
            dtype,
            shape: shape.to_vec(),
            bytes,
        });
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let mut views = Vec::new();
        for stored in &self.pending {
            let view = TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes)
                .with_context(|| format!("tensor `{}`", stored.name))?;
            views.push((stored.name.clone(), view));
        }
        let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
        let path = self.out.join(part(self.written.len()));
        let bytes = safetensors::serialize(views, metadata)?;
        std::fs::write(&path, bytes)
            .with_context(|| format!("{}: cannot write", path.display()))?;
        self.written
            .push(self.pending.drain(..).map(|stored| stored.name).collect());
        self.pending_bytes = 0;
        Ok(())
    }

    /// Writes the last shard, gives all their final names, and writes the index.
    pub(crate) fn finish(mut self, form: Form) -> Result<()> {
        self.flush()?;
        let count = self.written.len();
        let mut weight_map = BTreeMap::new();
        for (index, names) in self.written.iter().enumerate() {
            let file = format!("model-{:05}-of-{count:05}.safetensors", index + 1);
            std::fs::rename(self.out.join(part(index)), self.out.join(&file))?;
            weight_map.extend(names.iter().map(|name| (name.clone(), file.clone())));
        }
        let mut metadata = json!({"total_size": self.total_bytes});
        if form == Form::Mini {
            metadata["save_format"] = "mxfp4".into();
        }
        let index = json!({"metadata": metadata, "weight_map": weight_map});
        write_json(&self.out.join("model.safetensors.index.json"), &index)
    }
}

fn part(index: usize) -> String {
    format!("part-{index}.safetensors")
}

/// Writes JSON, indented, with a closing newline.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(path, text).with_context(|| format!("{}: cannot write", path.display()))
}
