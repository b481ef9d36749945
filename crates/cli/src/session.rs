//! A loaded model behind a running engine: what `generate`, `chat` and `doctor` start from.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use engine::{DraftWidth, Engine, EngineHandle, EngineOptions, FinishReason, Request};
use model::detokenizer::Detokenizer;
use model::generation::GenerationDefaults;
use model::tokenizer::Tokenizer;
use model::{Config, Decoder, TokenId};

use crate::args::{DraftArgs, ModelArgs, SamplingArgs};
use crate::backend;
use crate::failure::bad_input;
use crate::model_dir;

/// Answers are cut here when neither the user nor the model says otherwise.
const MAX_TOKENS: u32 = 1024;

/// One that answers and some that are kept for their prefix.
const SEQUENCES: u32 = 4;

/// A model, ready to answer.
pub(crate) struct Session {
    pub dir: PathBuf,
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub defaults: GenerationDefaults,
    pub engine: EngineHandle,
    /// A drafter is loaded and in use.
    pub drafting: bool,
    pub load_ms: f64,
}

/// Stands in for a tokenizer that is not there: tokens have no text.
struct NoText;

impl Detokenizer for NoText {
    fn append(&self, _: TokenId, _: &mut Vec<u8>) {}
}

impl Session {
    /// Loads the model. The tokenizer is read while the weights are.
    pub(crate) fn open(model: &ModelArgs, draft: &DraftArgs, needs_text: bool) -> Result<Self> {
        let began = Instant::now();
        let dir = model_dir::resolve(model.model.as_deref())?;
        let config = Config::load(&dir)?;
        let draft_dir = drafter(draft, &dir)?;
        let options = backend::Options {
            device: model.device,
            threads: model.threads,
            context_tokens: model.max_model_len,
            sequences: SEQUENCES,
            // The answer's sequence, and what earlier turns left for reuse.
            kv_tokens: None,
            numbers: model.numbers,
            draft: draft_dir.clone(),
            replay: None,
        };
        let (decoder, tokenizer) = std::thread::scope(|scope| {
            let tokenizer = scope.spawn(|| tokenizer(&dir, &config, needs_text));
            let decoder = backend::open(&dir, &config, &options);
            let tokenizer = tokenizer
                .join()
                .unwrap_or_else(|_| anyhow::bail!("the tokenizer failed to load"));
            anyhow::Ok((decoder?, tokenizer?))
        })?;
        let defaults = GenerationDefaults::open(&dir, config.vocab_size as u32)?;
        let drafting = draft_dir.is_some() && draft.draft_width != DraftWidth::Off;
        let engine = start(
            decoder,
            tokenizer.clone(),
            drafting && draft.draft_width == DraftWidth::Auto,
        )?;
        let load_ms = began.elapsed().as_secs_f64() * 1e3;
        Ok(Self {
            dir,
            tokenizer,
            defaults,
            engine,
            drafting,
            load_ms,
        })
    }

    /// Tokens of a text.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<TokenId>> {
        match &self.tokenizer {
            Some(tokenizer) => Ok(tokenizer.encode(text)?),
            None => bad_input(format!(
                "{}: has no tokenizer.json; give --token-ids",
                self.dir.display()
            )),
        }
    }

    /// A request for these tokens with the user's settings over the model's defaults.
    pub(crate) fn request(
        &self,
        prompt: Vec<TokenId>,
        args: &SamplingArgs,
        draft: &DraftArgs,
    ) -> Request {
        let mut request = Request::new(prompt);
        let sampling = &mut request.sampling;
        *sampling = self.defaults.sampling.clone();
        let set = |to: &mut f32, given: Option<f32>| *to = given.unwrap_or(*to);
        set(&mut sampling.temperature, args.temperature);
        set(&mut sampling.top_p, args.top_p);
        set(&mut sampling.min_p, args.min_p);
        set(&mut sampling.repetition_penalty, args.repetition_penalty);
        set(&mut sampling.presence_penalty, args.presence_penalty);
        set(&mut sampling.frequency_penalty, args.frequency_penalty);
        sampling.top_k = args.top_k.unwrap_or(sampling.top_k);
        sampling.logit_bias = args.logit_bias.clone();
        sampling.seed = args.seed;
        let stop = &mut request.stop;
        stop.eos_ids = self.defaults.eos_ids.clone();
        stop.stop_ids = args.stop_token_ids.clone();
        stop.stop_strings = args.stop.clone();
        stop.min_tokens = args.min_tokens;
        stop.ignore_eos = args.ignore_eos;
        stop.max_tokens = args
            .max_tokens
            .or(self.defaults.max_new_tokens)
            .or(Some(MAX_TOKENS));
        request.draft = if self.drafting {
            draft.draft_width
        } else {
            DraftWidth::Off
        };
        request
    }
}

fn start(
    decoder: Box<dyn Decoder>,
    tokenizer: Option<Arc<Tokenizer>>,
    calibrate: bool,
) -> Result<EngineHandle> {
    let detokenizer: Arc<dyn Detokenizer> = match tokenizer {
        Some(tokenizer) => tokenizer,
        None => Arc::new(NoText),
    };
    let options = EngineOptions {
        calibrate,
        ..EngineOptions::default()
    };
    Ok(Engine::start(decoder, detokenizer, options)?)
}

/// The checkpoint's tokenizer. Where no text is needed, there may be none; one that is there has to
/// be sound.
fn tokenizer(dir: &Path, config: &Config, needs_text: bool) -> Result<Option<Arc<Tokenizer>>> {
    if !needs_text && !dir.join("tokenizer.json").exists() {
        return Ok(None);
    }
    Ok(Some(Arc::new(Tokenizer::open(
        dir,
        config.vocab_size as u32,
    )?)))
}

/// The drafter to load: the one given, else `dflash/` in the checkpoint.
pub(crate) fn drafter(args: &DraftArgs, dir: &Path) -> Result<Option<PathBuf>> {
    if args.no_draft {
        return Ok(None);
    }
    match &args.draft {
        Some(given) if given.is_dir() => Ok(Some(given.clone())),
        Some(given) => bad_input(format!("--draft {}: expected a directory", given.display())),
        None => Ok(Some(dir.join("dflash")).filter(|beside| beside.join("config.json").is_file())),
    }
}

/// An answer that did not end well, as an error.
pub(crate) fn check_end(reason: &FinishReason) -> Result<()> {
    match reason {
        FinishReason::Error(message) if message.contains("not finite") => {
            bad_input(message.clone())
        }
        FinishReason::Error(message) => anyhow::bail!("{message}"),
        _ => Ok(()),
    }
}
