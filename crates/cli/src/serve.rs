//! `kilotok serve` and `kilotok admin`: flags to the server crate's settings, a model behind its
//! engine, and orders to the admission desk.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use clap::builder::BoolishValueParser;
use clap::{Args, Subcommand};
use engine::{Engine, EngineOptions};
use model::Config;
use model::decoder::Limits;
use server::admission::{Access, Desk, SeatRules, Terms, now_s};
use server::loading::Loading;
use server::parse::Format;
use server::text::ModelText;
use server::{Served, Settings};

use crate::args::{DraftArgs, ModelArgs};
use crate::failure::bad_input;
use crate::load_plan::LoadPlan;
use crate::{backend, free_memory, model_dir, output, session};

const SERVE_EXAMPLES: &str = "\
Examples:
  kilotok serve                        # this machine only: open http://127.0.0.1:8000 in a browser
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
       -d '{\"model\": \"kilotok-mini\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'
  kilotok serve --host 0.0.0.0 --api-key-file keys       # for others, who need a key of that file
  kilotok serve --host 0.0.0.0 --admission desk.db       # for others, who need an account:
  kilotok admin --admission desk.db apply NAME CONTACT PURPOSE   # or the form on the page; then
  kilotok admin --admission desk.db approve NAME --api           # prints the new account's key

SIGTERM or Ctrl-C lets open requests finish; a second one ends them. /metrics is for Prometheus.";

/// Serve the APIs and the chat page.
#[derive(Args, Debug)]
#[command(after_help = SERVE_EXAMPLES)]
pub(crate) struct ServeArgs {
    /// TOML file with values of these flags; flags and variables win over it
    #[arg(long, env = "KILOTOK_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
    /// Address to listen on
    #[arg(
        help_heading = "Address and answers",
        long,
        env = "KILOTOK_HOST",
        default_value = "127.0.0.1"
    )]
    pub host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(
        help_heading = "Address and answers",
        long,
        env = "KILOTOK_PORT",
        default_value_t = 8000
    )]
    pub port: u16,
    /// Name of the model in requests and answers [default: the directory's]
    #[arg(
        help_heading = "Address and answers",
        long,
        env = "KILOTOK_SERVED_MODEL_NAME",
        visible_alias = "alias",
        value_name = "NAME"
    )]
    pub served_model_name: Option<String>,
    /// A key that lets requests in; several with commas
    #[arg(
        help_heading = "Who may ask",
        long,
        env = "KILOTOK_API_KEY",
        value_delimiter = ',',
        hide_env_values = true,
        value_name = "KEY"
    )]
    pub api_key: Vec<String>,
    /// File with one key a line, mode 600, read again when it changes
    #[arg(
        help_heading = "Who may ask",
        long,
        env = "KILOTOK_API_KEY_FILE",
        value_name = "FILE"
    )]
    pub api_key_file: Option<PathBuf>,
    /// Sequences computed at once
    #[arg(help_heading = "Limits", long, env = "KILOTOK_MAX_NUM_SEQS", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_num_seqs: u32,
    /// Tokens that the KV cache holds, all sequences together [default: one whole context]
    #[arg(
        help_heading = "Limits",
        long,
        env = "KILOTOK_KV_CACHE_TOKENS",
        value_name = "N"
    )]
    pub kv_cache_tokens: Option<usize>,
    /// Requests that may wait; one more is refused with 429
    #[arg(
        help_heading = "Limits",
        long,
        env = "KILOTOK_MAX_NUM_QUEUED_REQS",
        value_name = "N",
        default_value_t = 256
    )]
    pub max_num_queued_reqs: usize,
    /// Prompt tokens that may wait
    #[arg(help_heading = "Limits", long, env = "KILOTOK_MAX_NUM_QUEUED_TOKENS", value_name = "N", default_value_t = 4 << 20)]
    pub max_num_queued_tokens: usize,
    /// Seconds that open requests get after SIGTERM
    #[arg(
        help_heading = "Limits",
        long,
        env = "KILOTOK_SHUTDOWN_TIMEOUT",
        value_name = "SECONDS",
        default_value_t = 30
    )]
    pub shutdown_timeout: u64,
    /// Seconds of silence after which the engine is not ready
    #[arg(
        help_heading = "Limits",
        long,
        env = "KILOTOK_STALL_LIMIT",
        value_name = "SECONDS",
        default_value_t = 0.9,
        value_parser = seconds
    )]
    pub stall_limit: f64,
    /// Seconds a request may take; 0 is no limit
    #[arg(
        help_heading = "Limits",
        long,
        env = "KILOTOK_REQUEST_TIMEOUT",
        value_name = "SECONDS",
        default_value_t = 0
    )]
    pub request_timeout: u64,
    /// Longest answer, in tokens, of a conversation that names none [default: a quarter of the context]
    #[arg(help_heading = "Limits", long, env = "KILOTOK_DEFAULT_MAX_TOKENS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub default_max_tokens: Option<u32>,
    /// Times and acceptance in every answer, not only when asked for
    #[arg(help_heading = "Address and answers", long, env = "KILOTOK_ENABLE_PER_REQUEST_METRICS", value_parser = BoolishValueParser::new())]
    pub enable_per_request_metrics: bool,
    /// Format of tool calls and reasoning: mimo, hermes, harmony [default: by the chat template]
    #[arg(
        help_heading = "Address and answers",
        long,
        env = "KILOTOK_TOOL_CALL_PARSER",
        alias = "reasoning-parser",
        value_name = "NAME"
    )]
    pub tool_call_parser: Option<String>,
    /// Field that carries reasoning
    #[arg(
        help_heading = "Address and answers",
        long,
        env = "KILOTOK_REASONING_FIELD_NAME",
        value_name = "NAME",
        default_value = "reasoning_content"
    )]
    pub reasoning_field_name: String,
    /// Origins whose pages may call this server; several with commas
    #[arg(
        help_heading = "Address and answers",
        long,
        env = "KILOTOK_ALLOWED_ORIGINS",
        value_delimiter = ',',
        value_name = "ORIGIN"
    )]
    pub allowed_origins: Vec<String>,
    /// Serve no chat page
    #[arg(help_heading = "Address and answers", long, env = "KILOTOK_NO_PAGE", value_parser = BoolishValueParser::new())]
    pub no_page: bool,
    /// Admission database: accounts, keys, limits, seats [default: none, everyone may ask]
    #[arg(
        help_heading = "Who may ask",
        long,
        env = "KILOTOK_ADMISSION",
        value_name = "FILE"
    )]
    pub admission: Option<PathBuf>,
    #[command(flatten)]
    pub seats: SeatArgs,
    /// OpenTelemetry collector (OTLP over HTTP) that gets a span a request [default: none]
    #[arg(
        help_heading = "Watching it",
        long,
        env = "KILOTOK_OTLP_ENDPOINT",
        value_name = "http://HOST:4318"
    )]
    pub otlp_endpoint: Option<String>,
    /// Refuse every setting that would have the server connect to anything
    #[arg(help_heading = "Watching it", long, env = "KILOTOK_OFFLINE", value_parser = BoolishValueParser::new())]
    pub offline: bool,
    /// Log lines as JSON
    #[arg(help_heading = "Watching it", long, env = "KILOTOK_LOG_JSON", value_parser = BoolishValueParser::new())]
    pub log_json: bool,
}

/// How seats are shared, with --admission.
#[derive(Args, Debug)]
pub(crate) struct SeatArgs {
    /// Seats for chat; 0 lets every approved account chat at any time
    #[arg(
        help_heading = "Seats for chat, with --admission",
        long,
        env = "KILOTOK_SEATS",
        value_name = "N",
        default_value_t = 0
    )]
    pub seats: u32,
    /// Times an account may enter the queue in a day
    #[arg(
        help_heading = "Seats for chat, with --admission",
        long,
        env = "KILOTOK_SEAT_ENTRIES",
        value_name = "N",
        default_value_t = 10
    )]
    pub seat_entries: u32,
    /// Minutes of a session
    #[arg(help_heading = "Seats for chat, with --admission", long, env = "KILOTOK_SEAT_MINUTES", value_name = "MINUTES", default_value_t = 30, value_parser = clap::value_parser!(i64).range(1..))]
    pub seat_minutes: i64,
    /// Minutes without use after which a seat is released
    #[arg(help_heading = "Seats for chat, with --admission", long, env = "KILOTOK_SEAT_IDLE_MINUTES", value_name = "MINUTES", default_value_t = 5, value_parser = clap::value_parser!(i64).range(1..))]
    pub seat_idle_minutes: i64,
}

/// Twice the time between an idle engine's heartbeats, to a day.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.2..=86400.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected 0.2 to 86400".to_owned()),
    }
}

impl SeatArgs {
    fn rules(&self) -> SeatRules {
        SeatRules {
            seats: self.seats,
            entries_per_day: self.seat_entries,
            session_s: self.seat_minutes * 60,
            idle_s: self.seat_idle_minutes * 60,
            ..SeatRules::default()
        }
    }
}

/// Runs `kilotok serve`.
pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    cpu::heap::share_one_arena();
    server::serve::start_logging(args.log_json);
    let began = Instant::now();
    let dir = model_dir::resolve(args.model.model.as_deref())?;
    let settings = settings(args, &dir)?;
    let config = Config::load(&dir)?;
    let draft_dir = session::drafter(&args.draft, &dir)?;
    let engine_options = EngineOptions {
        sequences_max: args.max_num_seqs,
        queue_requests_max: args.max_num_queued_reqs,
        queue_tokens_max: args.max_num_queued_tokens,
        calibrate: draft_dir.is_some(),
        ..EngineOptions::default()
    };
    let options = backend::Options {
        device: args.model.device,
        threads: args.model.threads,
        context_tokens: args.model.max_model_len,
        sequences: args.max_num_seqs,
        kv_tokens: args.kv_cache_tokens,
        numbers: args.model.numbers,
        draft: draft_dir,
        replay: None,
    };
    let source = backend::Source::open(&dir, &config, &options)?;
    let plan = LoadPlan::new(&source, &options);
    eprintln!("kilotok: {plan}");
    let loading = Arc::new(Loading::new(plan.read_bytes()));
    let (watched, listen) = (Arc::clone(&loading), settings.clone());
    let numbers = args.model.numbers.note(" · ");
    let limits = Arc::new(OnceLock::new());
    let found = Arc::clone(&limits);
    let load = move || {
        let text = ModelText::open(&dir, config.vocab_size as u32)?;
        let decoder = source.load(&options, watched.taken())?;
        drop(source);
        let engine = Engine::start(decoder, text.detokenizer(), engine_options)?;
        let _ = found.set(engine.limits());
        free_memory::give_back(engine.clone())?;
        let served = Served::new(settings, engine, text)?;
        served.loaded(watched.done());
        anyhow::Ok(served)
    };
    let opened = |address: &str| eprintln!("kilotok: listening at http://{address}, loading");
    server::serve::run_loading(&listen, &loading, load, opened, |address| {
        let loaded = loading.done();
        let load_s = began.elapsed().as_secs_f64();
        let rate = loaded.bytes as f64 / 1e9 / loaded.time.as_secs_f64();
        let held = limits.get().map(|l: &Limits| {
            format!(
                "{} tokens of context · {} KV pages of {} tokens{numbers}",
                l.context_tokens, l.pages, l.page_tokens
            )
        });
        eprintln!(
            "kilotok: ready at http://{address} · {} · {} · loaded in {load_s:.1} s, {rate:.2} GB/s",
            listen.model_name,
            held.unwrap_or_default()
        );
    })
}

fn settings(args: &ServeArgs, dir: &Path) -> Result<Settings> {
    let format = match &args.tool_call_parser {
        None => None,
        Some(name) => match Format::of_name(name) {
            Some(format) => Some(format),
            None => {
                return bad_input(format!(
                    "--tool-call-parser {name}: expected one of {}",
                    Format::NAMES.join(", ")
                ));
            }
        },
    };
    if args.offline && args.otlp_endpoint.is_some() {
        return bad_input("--offline: --otlp-endpoint would connect to a collector");
    }
    let own = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let own = own
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    Ok(Settings {
        host: args.host.clone(),
        port: args.port,
        model_name: args
            .served_model_name
            .clone()
            .or(own)
            .unwrap_or_else(|| "kilotok".to_owned()),
        api_keys: args.api_key.clone(),
        api_key_file: args.api_key_file.clone(),
        admission: args.admission.clone(),
        seats: args.seats.rules(),
        reasoning_field: args.reasoning_field_name.clone(),
        format,
        always_metrics: args.enable_per_request_metrics,
        shutdown_timeout: Duration::from_secs(args.shutdown_timeout),
        stall_limit: Duration::from_secs_f64(args.stall_limit),
        cors_origins: args.allowed_origins.clone(),
        page: !args.no_page,
        request_timeout: Some(args.request_timeout)
            .filter(|s| *s > 0)
            .map(Duration::from_secs),
        answer_tokens: args.default_max_tokens,
        draft_width: args.draft.draft_width,
        otlp_endpoint: args.otlp_endpoint.clone(),
        ..Settings::default()
    })
}

/// Orders to the admission desk; they work beside a running server.
#[derive(Args, Debug)]
pub(crate) struct AdminArgs {
    /// Admission database
    #[arg(long, env = "KILOTOK_ADMISSION", value_name = "FILE")]
    pub admission: PathBuf,
    #[command(subcommand)]
    pub order: AdminOrder,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub(crate) enum AdminOrder {
    /// Take an application
    Apply {
        /// Name of the account
        name: String,
        /// How to reach them
        contact: String,
        /// What for
        purpose: String,
    },
    /// Approve an account and print a new key, once
    Approve {
        /// Name of the account
        name: String,
        /// Requests at any time, instead of chat from a seat
        #[arg(long, env = "KILOTOK_API", value_parser = BoolishValueParser::new())]
        api: bool,
        /// First second of access, Unix time [default: now]
        #[arg(long, env = "KILOTOK_FROM", value_name = "UNIX_S")]
        from: Option<i64>,
        /// First second without access, Unix time [default: never]
        #[arg(long, env = "KILOTOK_UNTIL", value_name = "UNIX_S")]
        until: Option<i64>,
        /// Requests a minute; 0 is no limit
        #[arg(long, env = "KILOTOK_RPM", default_value_t = 100)]
        rpm: u32,
        /// Tokens a minute; 0 is no limit
        #[arg(long, env = "KILOTOK_TPM", default_value_t = 10_000_000)]
        tpm: u32,
        /// What a token counts in the bill
        #[arg(long, env = "KILOTOK_PRICE_MULTIPLIER", default_value_t = 1.0)]
        price_multiplier: f64,
    },
    /// End an account's access, its keys and its seat
    Revoke {
        /// Name of the account
        name: String,
    },
    /// Accounts with what they used
    List,
}

/// Runs `kilotok admin`.
pub(crate) fn admin(args: &AdminArgs) -> Result<()> {
    let desk = Desk::open(&args.admission, SeatRules::default())?;
    match &args.order {
        AdminOrder::Apply {
            name,
            contact,
            purpose,
        } => {
            desk.apply(name, contact, purpose, now_s())?;
        }
        AdminOrder::Approve {
            name,
            api,
            from,
            until,
            rpm,
            tpm,
            price_multiplier,
        } => {
            let terms = Terms {
                access: if *api { Access::Api } else { Access::Chat },
                starts_at: *from,
                ends_at: *until,
                requests_per_minute: *rpm,
                tokens_per_minute: *tpm,
                price_multiplier: *price_multiplier,
            };
            let key = desk.approve(name, &terms, now_s())?;
            output::write(format!("{key}\n").as_bytes())?;
        }
        AdminOrder::Revoke { name } => desk.revoke(name, now_s())?,
        AdminOrder::List => output::write(table(&desk)?.as_bytes())?,
    }
    Ok(())
}

fn table(desk: &Desk) -> Result<String> {
    let mut text =
        "name\tstate\taccess\trequests\tprompt\tcached\tgenerated\tbilled\tcontact\n".to_owned();
    for account in desk.accounts()? {
        let usage = desk.usage(account.id, 0).map_err(|error| anyhow!(error))?;
        let row = [
            account.name,
            account.state.name().to_owned(),
            account.terms.access.name().to_owned(),
            usage.requests.to_string(),
            usage.prompt_tokens.to_string(),
            usage.cached_tokens.to_string(),
            usage.generated_tokens.to_string(),
            format!("{:.0}", usage.billed_tokens),
            account.contact,
        ];
        text.push_str(&row.join("\t"));
        text.push('\n');
    }
    Ok(text)
}
