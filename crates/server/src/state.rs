//! What every handler shares, and how a server is set up.

use crate::admission::{Desk, SeatRules, now_s};
use crate::auth::Keys;
use crate::decoding;
use crate::error::ServerError;
use crate::grammar::Grammars;
use crate::limits::Limits;
use crate::loading::Loaded;
use crate::metrics::Metrics;
use crate::names::Tokens;
use crate::parse::Format;
use crate::text::ModelText;
use crate::traces::Traces;
use engine::{DraftWidth, EngineHandle};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How a server behaves; every field is a flag of `kilotok serve`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address to listen on.
    pub host: String,
    /// Port; 0 takes a free one.
    pub port: u16,
    /// Name of the model in requests and answers.
    pub model_name: String,
    /// Keys that let requests in.
    pub api_keys: Vec<String>,
    /// File with one key a line, mode 600.
    pub api_key_file: Option<PathBuf>,
    /// Admission database; `None` is off.
    pub admission: Option<PathBuf>,
    /// Seats, with `admission`.
    pub seats: SeatRules,
    /// `reasoning_content` or `reasoning`.
    pub reasoning_field: String,
    /// Parser of tool calls and reasoning instead of the one the template suggests.
    pub format: Option<Format>,
    /// Times and acceptance in every answer, not only when asked for.
    pub always_metrics: bool,
    /// What open requests get after SIGTERM.
    pub shutdown_timeout: Duration,
    /// An engine silent for longer is not ready. Under a second by default: gate 4 of docs/reliability.md.
    pub stall_limit: Duration,
    /// A stream without events sends a comment this often.
    pub ping: Duration,
    /// Origins other than the page's own that browsers may call from.
    pub cors_origins: Vec<String>,
    /// Serve the chat page.
    pub page: bool,
    /// Longest a request may take; `None` is no limit.
    pub request_timeout: Option<Duration>,
    /// Longest answer of a conversation that names no length, tokens; `None` is a quarter of the context.
    pub answer_tokens: Option<u32>,
    /// Rows a step verifies where a request does not say.
    pub draft_width: DraftWidth,
    /// OpenTelemetry collector, `http://HOST:PORT`; `None` sends nothing anywhere.
    pub otlp_endpoint: Option<String>,
    /// Largest inputs.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: 8000,
            model_name: "kilotok".to_owned(),
            api_keys: Vec::new(),
            api_key_file: None,
            admission: None,
            seats: SeatRules::default(),
            reasoning_field: "reasoning_content".to_owned(),
            format: None,
            always_metrics: false,
            shutdown_timeout: Duration::from_secs(30),
            stall_limit: Duration::from_millis(900),
            ping: Duration::from_secs(15),
            cors_origins: Vec::new(),
            page: true,
            request_timeout: None,
            answer_tokens: None,
            draft_width: DraftWidth::Auto,
            otlp_endpoint: None,
            limits: Limits::default(),
        }
    }
}

/// A server's parts.
pub struct Served {
    pub(crate) settings: Settings,
    pub(crate) engine: EngineHandle,
    pub(crate) text: ModelText,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) keys: Keys,
    pub(crate) desk: Option<Arc<Desk>>,
    pub(crate) grammars: Arc<Grammars>,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) traces: Option<Arc<Traces>>,
    pub(crate) started_at: i64,
    draining: AtomicBool,
}

impl Served {
    /// Puts a server together.
    ///
    /// # Errors
    /// [`ServerError`]: key file, admission database or collector's address that cannot be used.
    pub fn new(
        settings: Settings,
        engine: EngineHandle,
        mut text: ModelText,
    ) -> Result<Arc<Self>, ServerError> {
        let started_at = now_s();
        let open = |path: &PathBuf| Desk::open_serving(path, settings.seats.clone(), started_at);
        let desk = settings
            .admission
            .as_ref()
            .map(open)
            .transpose()?
            .map(Arc::new);
        let file = settings.api_key_file.as_deref();
        let keys = Keys::new(&settings.api_keys, file, desk.clone())?;
        text.format = settings.format.unwrap_or(text.format);
        let endpoint = settings.otlp_endpoint.as_deref();
        let traces = endpoint.map(|to| Traces::new(to, &settings.model_name));
        let traces = traces.transpose()?;
        let grammars = Grammars::new(Arc::clone(text.codec()), &text.defaults.eos_ids);
        Ok(Arc::new(Self {
            settings,
            engine,
            text,
            metrics: Arc::default(),
            keys,
            desk,
            grammars: Arc::new(grammars),
            tokens: Arc::default(),
            traces,
            started_at,
            draining: AtomicBool::new(false),
        }))
    }

    /// Reports what loading came to in the metrics, from now on.
    pub fn loaded(&self, loaded: Loaded) {
        // A second load is none.
        let _ = self.metrics.loaded.set(loaded);
    }

    /// What a request that says nothing gets.
    pub(crate) fn decoding_defaults(&self) -> decoding::Defaults<'_> {
        decoding::Defaults {
            generation: &self.text.defaults,
            draft: self.settings.draft_width,
        }
    }

    /// Sends the spans that were not sent yet; no more are taken. Blocks for up to 5 s.
    pub fn end_traces(&self) {
        if let Some(traces) = &self.traces {
            traces.shutdown();
        }
    }

    /// Takes no new requests from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// True from [`Served::drain`] on.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire) || self.engine.is_draining()
    }

    /// Why the server cannot take requests; `None` when it can.
    #[must_use]
    pub fn unready(&self) -> Option<String> {
        if let Some(failure) = self.engine.failure() {
            return Some(format!("the engine has failed: {failure}"));
        }
        if self.is_draining() {
            return Some("shutting down".to_owned());
        }
        let age = self.engine.heartbeat_age();
        let silent = age > self.settings.stall_limit;
        silent.then(|| format!("the engine has been silent for {:.1} s", age.as_secs_f64()))
    }
}
