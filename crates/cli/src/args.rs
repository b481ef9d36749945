//! The command line: every command and flag, their `KILOTOK_` variables and their ranges.
//!
//! Invariant (a test): every flag that takes part in a command has the variable
//! `KILOTOK_` + its name. Names follow vLLM and llama.cpp where those agree; aliases cover the rest.

use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

mod bench;

pub(crate) use bench::{BenchDecodeArgs, Load, OProj};

/// A fast engine for the MiMo-V2 model family.
#[derive(Parser, Debug)]
#[command(
    name = "kilotok",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Answer one prompt
    Generate(Box<GenerateArgs>),
    /// Talk; /help inside lists the commands
    Chat(Box<ChatArgs>),
    /// Log-probabilities of given tokens
    Score(ScoreArgs),
    /// What a checkpoint holds: modules, formats, bytes, bytes a token
    Inspect(InspectArgs),
    /// Measure
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Serve OpenAI's and Anthropic's APIs and the chat page
    Serve(Box<crate::serve::ServeArgs>),
    /// Accounts of the admission desk: apply, approve, revoke, list
    Admin(crate::serve::AdminArgs),
    /// Check this machine and, with a model, that drafting changes nothing
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// Things to measure.
#[derive(Subcommand, Debug)]
pub(crate) enum BenchCommand {
    /// Time and bandwidth of decode steps
    Decode(BenchDecodeArgs),
    /// Load against a server: first token, tokens/s a user, acceptance
    Serve(crate::bench_serve::BenchServeArgs),
}

/// Where the forward pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    /// SIMD and threads
    Cpu,
    /// Plain f32: slow, the definition
    Reference,
    /// One NVIDIA H100 or H200
    Cuda,
}

/// Which model, where.
#[derive(Args, Debug, Clone)]
pub(crate) struct ModelArgs {
    /// Checkpoint directory [default: models/kilotok-mini, looked for upwards from here and from the program]
    #[arg(short, long, env = "KILOTOK_MODEL", value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Where to compute
    #[arg(long, env = "KILOTOK_DEVICE", value_enum, default_value_t = Device::Cpu)]
    pub device: Device,
    /// Threads that compute [default: one a physical core]
    #[arg(short, long, env = "KILOTOK_THREADS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Longest sequence in tokens [default: the model's, or as much as fits a quarter of memory]
    #[arg(
        short = 'c', long, env = "KILOTOK_MAX_MODEL_LEN", value_name = "N",
        visible_alias = "ctx-size", alias = "context-length", value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub max_model_len: Option<u32>,
    #[command(flatten)]
    pub numbers: NumberArgs,
}

/// How a GPU keeps numbers.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct NumberArgs {
    /// On a GPU: what products take of their activations
    #[arg(long, env = "KILOTOK_ACTIVATIONS", value_enum, default_value_t = Activations::Exact)]
    pub activations: Activations,
    /// On a GPU: what the caches of keys and values hold
    #[arg(long, env = "KILOTOK_KV", value_enum, default_value_t = Kv::Bf16)]
    pub kv: Kv,
}

/// Activations on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Activations {
    /// bf16 values
    Exact,
    /// e4m3 where weights have 4 or 8 bits: less exact, no faster yet
    Fp8,
    /// 22 bits of f32, for models of which twice the activations fit in shared memory; with `--kv wide` as exact as a CPU
    Wide,
}

/// Keys and values on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kv {
    /// bf16
    Bf16,
    /// e4m3 without scales: half the bytes, less exact; a drafter's stay bf16
    Fp8,
    /// 16 bits of f32 in twice the bytes; a drafter's stay bf16
    Wide,
}

impl NumberArgs {
    /// The kernel's.
    pub(crate) fn of_cuda(self) -> cuda::images::Numbers {
        use cuda::images as of;
        of::Numbers {
            activations: match self.activations {
                Activations::Exact => of::Activations::Exact,
                Activations::Fp8 => of::Activations::E4m3,
                Activations::Wide => of::Activations::Wide,
            },
            kv: match self.kv {
                Kv::Bf16 => of::Kv::Bf16,
                Kv::Fp8 => of::Kv::Fp8,
                Kv::Wide => of::Kv::Wide,
            },
        }
    }

    /// What is not as a rule: option and value.
    pub(crate) fn given(self) -> Vec<(&'static str, String)> {
        let name = |value: Option<clap::builder::PossibleValue>| {
            value.map_or_else(String::new, |v| v.get_name().to_owned())
        };
        let activations = (self.activations != Activations::Exact)
            .then(|| ("activations", name(self.activations.to_possible_value())));
        let kv = (self.kv != Kv::Bf16).then(|| ("kv", name(self.kv.to_possible_value())));
        activations.into_iter().chain(kv).collect()
    }

    /// The same for a line of text, each after `between`.
    pub(crate) fn note(self, between: &str) -> String {
        let given = self.given().into_iter();
        given
            .map(|(what, value)| format!("{between}{what} {value}"))
            .collect()
    }
}

/// Speculative decoding.
#[derive(Args, Debug, Clone)]
pub(crate) struct DraftArgs {
    /// Drafter directory [default: dflash/ in the checkpoint, where there is one]
    #[arg(
        long,
        env = "KILOTOK_DRAFT",
        value_name = "DIR",
        visible_alias = "model-draft"
    )]
    pub draft: Option<PathBuf>,
    /// Decode without a drafter
    #[arg(long, env = "KILOTOK_NO_DRAFT", value_parser = BoolishValueParser::new())]
    pub no_draft: bool,
    /// Rows a step verifies, the anchor included: a number, or `auto` for what is fastest
    #[arg(long, env = "KILOTOK_DRAFT_WIDTH", value_name = "auto|N", default_value = "auto", value_parser = parse_width)]
    pub draft_width: engine::DraftWidth,
}

/// How tokens are chosen. What is not given comes from the model's generation_config.json.
#[derive(Args, Debug, Clone)]
pub(crate) struct SamplingArgs {
    /// 0 is greedy
    #[arg(long, env = "KILOTOK_TEMPERATURE", value_name = "F", visible_alias = "temp", value_parser = parse_temperature)]
    pub temperature: Option<f32>,
    /// Keep the smallest set of tokens with this probability
    #[arg(long, env = "KILOTOK_TOP_P", value_name = "F", value_parser = parse_share)]
    pub top_p: Option<f32>,
    /// Keep the N most probable tokens; 0 keeps all
    #[arg(long, env = "KILOTOK_TOP_K", value_name = "N")]
    pub top_k: Option<u32>,
    /// Drop tokens below this share of the most probable one
    #[arg(long, env = "KILOTOK_MIN_P", value_name = "F", value_parser = parse_share)]
    pub min_p: Option<f32>,
    /// Divides logits of tokens in prompt or answer; 1 is off
    #[arg(long, env = "KILOTOK_REPETITION_PENALTY", value_name = "F", visible_alias = "repeat-penalty", value_parser = parse_positive)]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from logits of tokens in the answer
    #[arg(long, env = "KILOTOK_PRESENCE_PENALTY", value_name = "F", allow_hyphen_values = true, value_parser = parse_finite)]
    pub presence_penalty: Option<f32>,
    /// Subtracted once for each time a token is in the answer
    #[arg(long, env = "KILOTOK_FREQUENCY_PENALTY", value_name = "F", allow_hyphen_values = true, value_parser = parse_finite)]
    pub frequency_penalty: Option<f32>,
    /// Added to the logit of a token; several with commas
    #[arg(long, env = "KILOTOK_LOGIT_BIAS", value_name = "ID:F", value_delimiter = ',', allow_hyphen_values = true, value_parser = parse_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed and request, same text
    #[arg(
        short,
        long,
        env = "KILOTOK_SEED",
        value_name = "N",
        default_value_t = 0
    )]
    pub seed: u64,
    /// Most tokens to generate [default: the model's suggestion, else 1024]
    #[arg(
        short = 'n',
        long,
        env = "KILOTOK_MAX_TOKENS",
        value_name = "N",
        visible_alias = "n-predict",
        alias = "max-new-tokens"
    )]
    pub max_tokens: Option<u32>,
    /// Do not stop before this many tokens
    #[arg(
        long,
        env = "KILOTOK_MIN_TOKENS",
        value_name = "N",
        default_value_t = 0
    )]
    pub min_tokens: u32,
    /// Text that ends the answer; may be given several times
    #[arg(long, env = "KILOTOK_STOP", value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Token ids that end the answer
    #[arg(
        long,
        env = "KILOTOK_STOP_TOKEN_IDS",
        value_name = "IDS",
        value_delimiter = ','
    )]
    pub stop_token_ids: Vec<u32>,
    /// Go on after the model's own end token
    #[arg(long, env = "KILOTOK_IGNORE_EOS", value_parser = BoolishValueParser::new())]
    pub ignore_eos: bool,
}

/// How the conversation is put into the model's template.
#[derive(Args, Debug, Clone)]
pub(crate) struct TemplateArgs {
    /// System message
    #[arg(
        long,
        env = "KILOTOK_SYSTEM",
        value_name = "TEXT",
        visible_alias = "system-prompt"
    )]
    pub system: Option<String>,
    /// Jinja file to use in place of the model's template
    #[arg(long, env = "KILOTOK_CHAT_TEMPLATE", value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Template variables as a JSON object, such as {"enable_thinking": false}
    #[arg(long, env = "KILOTOK_CHAT_TEMPLATE_KWARGS", value_name = "JSON", value_parser = parse_object)]
    pub chat_template_kwargs: Option<JsonObject>,
}

/// A parsed JSON object.
pub(crate) type JsonObject = std::sync::Arc<serde_json::Map<String, serde_json::Value>>;

/// `kilotok generate`.
#[derive(Args, Debug)]
pub(crate) struct GenerateArgs {
    /// The prompt; without one (and without --file or --token-ids) standard input is read
    #[arg(env = "KILOTOK_PROMPT")]
    pub prompt: Option<String>,
    /// Read the prompt from a file; `-` is standard input
    #[arg(
        short,
        long,
        env = "KILOTOK_FILE",
        value_name = "FILE",
        conflicts_with = "prompt"
    )]
    pub file: Option<PathBuf>,
    /// The prompt as token ids: needs no tokenizer
    #[arg(long, env = "KILOTOK_TOKEN_IDS", value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompt", "file"])]
    pub token_ids: Vec<u32>,
    /// Take the prompt as it is, without a chat template
    #[arg(long, env = "KILOTOK_RAW", value_parser = BoolishValueParser::new())]
    pub raw: bool,
    /// Print one JSON object when done
    #[arg(long, env = "KILOTOK_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,
    /// Log-probabilities of the N best tokens at each place (with --json)
    #[arg(long, env = "KILOTOK_LOGPROBS", value_name = "N", requires = "json", value_parser = clap::value_parser!(u32).range(0..=20))]
    pub logprobs: Option<u32>,
    /// Write one JSON line for each step to a file
    #[arg(long, env = "KILOTOK_TRACE", value_name = "FILE")]
    pub trace: Option<PathBuf>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub template: TemplateArgs,
}

/// `kilotok chat`.
#[derive(Args, Debug)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub template: TemplateArgs,
}

/// `kilotok score`.
#[derive(Args, Debug)]
pub(crate) struct ScoreArgs {
    /// Text to score, as it is
    #[arg(env = "KILOTOK_PROMPT")]
    pub prompt: Option<String>,
    /// Text file to score; `-` is standard input
    #[arg(
        short,
        long,
        env = "KILOTOK_FILE",
        value_name = "FILE",
        conflicts_with = "prompt"
    )]
    pub file: Option<PathBuf>,
    /// Tokens to score: needs no tokenizer
    #[arg(long, env = "KILOTOK_TOKEN_IDS", value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompt", "file"])]
    pub token_ids: Vec<u32>,
    /// Print one JSON object
    #[arg(long, env = "KILOTOK_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// `kilotok inspect`.
#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    /// Checkpoint directory, or a config.json alone [default: models/kilotok-mini]
    #[arg(short, long, env = "KILOTOK_MODEL", value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long, env = "KILOTOK_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,
}

/// `kilotok doctor`.
#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    /// Print one JSON object
    #[arg(long, env = "KILOTOK_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
}

fn parse_width(text: &str) -> Result<engine::DraftWidth, String> {
    match text.parse::<u32>() {
        _ if text == "auto" => Ok(engine::DraftWidth::Auto),
        Ok(1) => Ok(engine::DraftWidth::Off),
        Ok(width @ 2..=64) => Ok(engine::DraftWidth::Fixed(width)),
        _ => Err("expected `auto` or a number from 1 to 64".to_owned()),
    }
}

fn number(text: &str, expected: &str, allowed: impl Fn(f32) -> bool) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(x) if x.is_finite() && allowed(x) => Ok(x),
        _ => Err(format!("expected {expected}")),
    }
}

fn parse_temperature(text: &str) -> Result<f32, String> {
    number(text, "a number from 0 to 100", |x| {
        (0.0..=100.0).contains(&x)
    })
}

fn parse_share(text: &str) -> Result<f32, String> {
    number(text, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))
}

fn parse_positive(text: &str) -> Result<f32, String> {
    number(text, "a number above 0", |x| x > 0.0)
}

fn parse_finite(text: &str) -> Result<f32, String> {
    number(text, "a number", |_| true)
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text
        .split_once(':')
        .ok_or("expected ID:NUMBER, such as 151645:-5")?;
    let id = id
        .parse()
        .map_err(|_| format!("`{id}` is not a token id"))?;
    Ok((id, parse_finite(bias)?))
}

fn parse_object(text: &str) -> Result<JsonObject, String> {
    match serde_json::from_str(text) {
        Ok(serde_json::Value::Object(map)) => Ok(std::sync::Arc::new(map)),
        Ok(_) => Err("expected a JSON object".to_owned()),
        Err(error) => Err(format!("expected a JSON object: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn check(command: &clap::Command) {
        for argument in command.get_arguments() {
            let id = argument.get_id().as_str();
            if ["help", "version", "shell"].contains(&id) {
                continue;
            }
            // An argument by position (an account's name) is no flag.
            if !argument.is_positional() {
                let wanted = format!("KILOTOK_{}", id.to_uppercase());
                let found = argument.get_env().and_then(|name| name.to_str());
                assert_eq!(
                    found,
                    Some(wanted.as_str()),
                    "{} --{id}",
                    command.get_name()
                );
            }
            assert!(
                argument.get_help().is_some(),
                "{} --{id} has no help",
                command.get_name()
            );
        }
        command.get_subcommands().for_each(check);
    }

    #[test]
    fn every_flag_has_its_variable_and_its_help() {
        let command = Cli::command();
        command.clone().debug_assert();
        check(&command);
    }

    #[test]
    fn values_are_checked_where_they_enter() {
        let parse = |args: &str| Cli::try_parse_from(args.split(' '));
        assert!(parse("kilotok generate hi --temperature 0.5 --top-k 4 -n 3 --json").is_ok());
        assert!(parse("kilotok score --token-ids 1,2,3 --device reference --json").is_ok());
        assert!(
            parse("kilotok bench decode --model synthetic:moe --rows 1,8 --context 16").is_ok()
        );
        for bad in [
            "generate --temperature -1 hi",
            "generate --top-p 1.5 hi",
            "generate --draft-width 0 hi",
            "generate --logit-bias 5 hi",
            "generate --token-ids 1,x",
            "generate --token-ids 1 hi",
            "generate --chat-template-kwargs [] hi",
            "bench decode --rows 0",
        ] {
            let error = parse(&format!("kilotok {bad}")).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bad}");
        }
    }
}
