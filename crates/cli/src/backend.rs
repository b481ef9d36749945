//! The one place that knows which decoders exist: a device name and a checkpoint become a
//! [`Decoder`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::Result;
use cpu::{CpuDecoder, CpuOptions};
use cuda::CudaDecoder;
use model::draft::Replay;
use model::draft::{Draft, DraftOptions};
use model::reference::{DraftNetwork, ReferenceDecoder};
use model::{Checkpoint, Config, Decoder, Weights};

use crate::args::{Device, NumberArgs};
use crate::failure::bad_input;
use crate::load_plan::LoadPlan;

/// How to open a decoder.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Where to compute.
    pub device: Device,
    /// Threads; `None` is one a physical core.
    pub threads: Option<u32>,
    /// Longest sequence; `None` is up to the backend.
    pub context_tokens: Option<u32>,
    /// Sequences open at once.
    pub sequences: u32,
    /// Tokens that the KV cache holds, all sequences together; `None` is one whole context.
    pub kv_tokens: Option<usize>,
    /// How a GPU keeps numbers.
    pub numbers: NumberArgs,
    /// Drafter directory.
    pub draft: Option<PathBuf>,
    /// Known texts to draft from, in steps of so many rows, in a drafter's place (cpu).
    pub replay: Option<(Replay, u32)>,
}

/// Opens the checkpoint in `dir`.
///
/// # Errors
/// As [`Source::open`] and [`Source::load`].
pub(crate) fn open(dir: &Path, config: &Config, options: &Options) -> Result<Box<dyn Decoder>> {
    let source = Source::open(dir, config, options)?;
    source.load(options, Arc::default())
}

/// Refuses an option that `device` has not.
///
/// # Errors
/// Bad input, always.
pub(crate) fn cuda_alone<T>(option: &str, device: Device) -> Result<T> {
    let device = format!("{device:?}").to_lowercase();
    bad_input(format!(
        "{option}: --device cuda has it, --device {device} has not"
    ))
}

/// A checkpoint whose headers were read, and nothing else.
pub(crate) struct Source {
    pub config: Config,
    pub checkpoint: Checkpoint,
    pub draft: Option<Draft>,
}

impl Source {
    /// Reads headers and refuses what cannot be loaded: at once, however large it is.
    ///
    /// # Errors
    /// `model::ModelError` for files that cannot be used; a model that this machine's memory cannot hold.
    pub(crate) fn open(dir: &Path, config: &Config, options: &Options) -> Result<Self> {
        if let Some((option, value)) = options.numbers.given().first()
            && options.device != Device::Cuda
        {
            return cuda_alone(&format!("--{option} {value}"), options.device);
        }
        let config = with_context(config, options.context_tokens)?;
        let checkpoint = Checkpoint::open(dir)?;
        Weights::new(&config, &checkpoint)?;
        let open = |dir: &PathBuf| Draft::open(dir, &config, DraftOptions::default());
        let draft = options.draft.as_ref().map(open).transpose()?;
        let source = Self {
            draft,
            checkpoint,
            config,
        };
        LoadPlan::new(&source, options).check()?;
        Ok(source)
    }

    /// Reads the weights; `taken` counts their bytes on the way.
    ///
    /// # Errors
    /// `model::ModelError` for damaged weights; the backend's own errors.
    pub(crate) fn load(
        &self,
        options: &Options,
        taken: Arc<AtomicU64>,
    ) -> Result<Box<dyn Decoder>> {
        let (config, checkpoint, draft) = (&self.config, &self.checkpoint, self.draft.as_ref());
        // The CPU's packing looks at every scale itself: reading them all first would read the files twice.
        if options.device != Device::Cpu {
            checkpoint.check_scales()?;
        }
        let weights = Weights::new(config, checkpoint)?.counted_in(taken);
        match options.device {
            Device::Cuda => {
                let tokens = options.context_tokens.map(|tokens| tokens as usize);
                let numbers = options.numbers.of_cuda();
                let decoder = CudaDecoder::new(config, &weights, draft, tokens, numbers)?;
                checkpoint.release();
                Ok(Box::new(decoder))
            }
            Device::Reference => reference(config, &weights, draft),
            Device::Cpu => cpu(config, &weights, draft, options, checkpoint),
        }
    }

    /// How the CPU's decoder is set up.
    pub(crate) fn cpu_options(&self, options: &Options) -> CpuOptions {
        cpu_options(&self.config, options)
    }
}

fn cpu_options(config: &Config, options: &Options) -> CpuOptions {
    CpuOptions {
        threads: options.threads.map(|n| n as usize),
        sequences: options.sequences,
        kv_tokens: Some(options.kv_tokens.unwrap_or(config.context_tokens)),
    }
}

/// The configuration with a context of `tokens`, where that is given.
fn with_context(config: &Config, tokens: Option<u32>) -> Result<Config> {
    let mut config = config.clone();
    if let Some(tokens) = tokens {
        let most = config.context_tokens;
        if tokens as usize > most {
            return bad_input(format!(
                "--max-model-len {tokens}: the model's context is {most} tokens"
            ));
        }
        config.context_tokens = tokens as usize;
    }
    Ok(config)
}

fn cpu(
    config: &Config,
    weights: &Weights<'_>,
    draft: Option<&Draft>,
    options: &Options,
    checkpoint: &Checkpoint,
) -> Result<Box<dyn Decoder>> {
    let draft_weights = draft.map(Draft::weights).transpose()?;
    let cpu_options = cpu_options(config, options);
    let decoder = CpuDecoder::new(
        config,
        weights,
        draft.zip(draft_weights.as_ref()),
        cpu_options,
    )?;
    // The decoder has its own copy, packed for its kernels.
    checkpoint.release();
    Ok(match &options.replay {
        Some((replay, width)) => Box::new(decoder.with_drafts(Box::new(replay.clone()), *width)),
        None => Box::new(decoder),
    })
}

fn reference(
    config: &Config,
    weights: &Weights<'_>,
    draft: Option<&Draft>,
) -> Result<Box<dyn Decoder>> {
    let network = match draft {
        Some(draft) => {
            let weights = draft.weights()?;
            Some(DraftNetwork::new(
                &draft.config,
                &weights,
                draft.mask_embedding.clone(),
            ))
        }
        None => None,
    };
    Ok(Box::new(ReferenceDecoder::new(config, weights, network)))
}
