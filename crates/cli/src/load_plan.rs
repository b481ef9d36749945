//! What loading a checkpoint will read, where it goes and whether it fits, known from its headers alone.
//!
//! Refuses, before a weight is read, what this machine's memory cannot hold. Sizes are those of the stored
//! formats, which the CPU's packing keeps; scratch of a step is not counted. A GPU's memory is its own
//! backend's to judge.

use std::fmt;

use anyhow::Result;

use crate::args::Device;
use crate::backend::{Options, Source};
use crate::failure::bad_input;
use crate::machine;
use crate::report::bytes;

/// A checkpoint's sizes beside the machine's.
#[derive(Clone, Debug)]
pub(crate) struct LoadPlan {
    device: Device,
    files: usize,
    tensors: usize,
    target_bytes: u64,
    draft_bytes: u64,
    /// Keys and values when every page and sequence is in use; 0 where the backend says itself.
    cache_bytes: u64,
    cache_tokens: usize,
    /// Memory that may be used; `None` where the system does not say.
    room_bytes: Option<u64>,
}

impl LoadPlan {
    /// From headers.
    pub(crate) fn new(source: &Source, options: &Options) -> Self {
        let draft = source.draft.as_ref();
        let cpu = source.cpu_options(options);
        let cache_bytes = match options.device {
            Device::Cpu => cpu::cache_bytes(&source.config, draft, cpu),
            Device::Reference | Device::Cuda => 0,
        };
        let checkpoints = [Some(&source.checkpoint), draft.map(|d| &d.checkpoint)];
        Self {
            device: options.device,
            files: checkpoints.iter().flatten().map(|c| c.files()).sum(),
            tensors: checkpoints
                .iter()
                .flatten()
                .map(|c| c.names().count())
                .sum(),
            target_bytes: source.checkpoint.bytes(),
            draft_bytes: draft.map_or(0, |draft| draft.checkpoint.bytes()),
            cache_bytes,
            cache_tokens: cpu.kv_tokens.unwrap_or(source.config.context_tokens),
            room_bytes: machine::room_bytes(),
        }
    }

    /// Bytes that will be read.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.target_bytes + self.draft_bytes
    }

    /// Refuses what does not fit into memory.
    pub(crate) fn check(&self) -> Result<()> {
        let need = self.read_bytes() + self.cache_bytes;
        match self.room_bytes {
            Some(room) if self.device != Device::Cuda && need > room => {
                let rest = room.saturating_sub(self.read_bytes());
                let fits = match (rest, self.cache_bytes) {
                    (0, _) => "the weights alone are too large for it".to_owned(),
                    (rest, cache) => {
                        let tokens = rest as f64 / cache.max(1) as f64 * self.cache_tokens as f64;
                        format!(
                            "about {tokens:.0} tokens of KV cache would fit (--kv-cache-tokens, --max-model-len)"
                        )
                    }
                };
                bad_input(format!(
                    "{self}; {} of memory are available: {fits}",
                    bytes(room)
                ))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for LoadPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, where_to) = (
            bytes(self.read_bytes()),
            match self.device {
                Device::Cuda => "GPU memory",
                Device::Cpu | Device::Reference => "memory",
            },
        );
        write!(
            f,
            "to load: {size} into {where_to} ({} tensors of {} files",
            self.tensors, self.files
        )?;
        if self.draft_bytes > 0 {
            write!(f, "; {} of them the drafter's", bytes(self.draft_bytes))?;
        }
        f.write_str(")")?;
        if self.cache_bytes > 0 {
            let (size, tokens) = (bytes(self.cache_bytes), self.cache_tokens);
            write!(f, ", and {size} for keys and values of {tokens} tokens")?;
        }
        Ok(())
    }
}
