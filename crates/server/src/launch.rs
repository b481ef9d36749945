//! From a conversation or a prompt to a running generation: template, tokens, grammar, admission.

use crate::admission::{Refusal, now_s};
use crate::auth::Principal;
use crate::decoding::{Decoding, Report};
use crate::error::{ApiError, ServerError};
use crate::generate::Generation;
use crate::grammar::{COMPILE_LIMIT, Guide, Thinking};
use crate::meter::Meter;
use crate::names;
use crate::parse::{Expect, Format, Parser};
use crate::state::Served;
use crate::talk::{Talk, ToolChoice};
use crate::traces::Traced;
use axum::http::StatusCode;
use engine::ConstraintFactory;
use model::TokenId;
use std::sync::Arc;
use std::time::Instant;

/// A larger text is tokenised on a thread of its own: it takes more than a millisecond.
const INLINE_BYTES: usize = 16 << 10;

/// A generation and what its protocol needs to report it.
pub(crate) struct Launched {
    pub(crate) generation: Generation,
    pub(crate) report: Report,
    pub(crate) stream: bool,
    pub(crate) id: String,
}

/// The tokens of a conversation, and how its answer begins.
pub(crate) async fn render(
    served: &Arc<Served>,
    talk: &Talk,
) -> Result<(Vec<TokenId>, Thinking), ApiError> {
    let bytes: usize = talk
        .messages
        .iter()
        .map(|m| m["content"].as_str().map_or(0, str::len))
        .sum();
    let (served, talk) = (Arc::clone(served), talk.clone());
    let work = move || {
        let text = &served.text;
        let tools = talk.visible_tools();
        let prompt = text
            .render(&talk.messages, tools, &talk.variables)
            .map_err(|message| ApiError::invalid("messages", message))?;
        let end = prompt.trim_end();
        let thinking = if end.ends_with("<think>") {
            Thinking::Open
        } else if end.ends_with("</think>") || !text.thinks() {
            Thinking::No
        } else {
            Thinking::Expected
        };
        let tokens = text.codec().encode(&prompt);
        let tokens = tokens.map_err(|message| ApiError::invalid("messages", message))?;
        Ok((tokens, thinking))
    };
    match bytes > INLINE_BYTES {
        true => blocking(work).await?,
        false => work(),
    }
}

/// Runs work that takes long on a thread for that.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(|error| ApiError::internal(format!("a task failed: {error}")))
}

/// Starts the answer of a conversation.
pub(crate) async fn talk(
    served: &Arc<Served>,
    principal: &Principal,
    talk: Talk,
    mut decoding: Decoding,
) -> Result<Launched, ApiError> {
    let (prompt, thinking) = render(served, &talk).await?;
    let format = served.text.format;
    let guide = Guide {
        grammar: talk.bound(format)?,
        thinking,
        budget: talk.thinking_budget.filter(|_| thinking != Thinking::No),
    };
    let mut bound = constraint(served, guide).await;
    if let (Err(error), None) = (&mut bound, &talk.grammar) {
        // What could not be compiled came out of a tool.
        error.param = error.param.take().map(|_| "tools".to_owned());
    }
    let bound = bound?;
    decoding.request.constraint = match &talk.choice {
        ToolChoice::Auto if talk.grammar.is_none() => named(served, &talk, bound),
        _ => bound,
    };
    // A model that repeats itself would otherwise go on to the end of the context.
    let usual = served.settings.answer_tokens;
    let usual = usual.unwrap_or(served.engine.limits().context_tokens / 4);
    decoding.request.stop.max_tokens.get_or_insert(usual.max(1));
    let expect = Expect {
        thinking: thinking == Thinking::Open,
        tools: !talk.visible_tools().is_empty(),
        reasoning: thinking != Thinking::No || served.text.thinks(),
        schemas: talk.tools,
    };
    let plain = format != Format::Harmony && !expect.tools && !expect.reasoning;
    let parser = move || match plain {
        true => Parser::plain(),
        false => Parser::new(format, expect.clone()),
    };
    start(
        served,
        principal,
        vec![prompt],
        decoding,
        parser,
        "chatcmpl",
    )
    .await
}

/// Binds the names of calls that the model may make by itself, beside what binds the answer already.
fn named(
    served: &Served,
    talk: &Talk,
    bound: Option<ConstraintFactory>,
) -> Option<ConstraintFactory> {
    let (codec, tokens) = (served.text.codec(), &served.tokens);
    let (format, tools) = (served.text.format, talk.visible_tools());
    names::bind(codec, tokens, format, tools, bound.clone()).or(bound)
}

/// Compiles what binds an answer, if anything does.
pub(crate) async fn constraint(
    served: &Arc<Served>,
    guide: Guide,
) -> Result<Option<ConstraintFactory>, ApiError> {
    if guide.grammar.is_none() && guide.budget.is_none() {
        return Ok(None);
    }
    let grammars = Arc::clone(&served.grammars);
    let start = Instant::now();
    let work = blocking(move || grammars.compile(&guide));
    let compiled = tokio::time::timeout(COMPILE_LIMIT, work).await;
    served.metrics.grammar_compile.observe(start.elapsed());
    let too_long = || ApiError::invalid("response_format", "the grammar takes too long to compile");
    compiled.map_err(|_| too_long())??.map(Some)
}

/// Counts the request and gives it to the engine.
pub(crate) async fn start(
    served: &Arc<Served>,
    principal: &Principal,
    prompts: Vec<Vec<TokenId>>,
    decoding: Decoding,
    parser: impl Fn() -> Parser,
    prefix: &str,
) -> Result<Launched, ApiError> {
    let Decoding {
        mut request,
        mut report,
        stream,
        request_id,
        cache_salt,
    } = decoding;
    report.metrics |= served.settings.always_metrics;
    request.deadline = served.settings.request_timeout;
    request.isolation_key = isolation_key(principal, cache_salt);
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    let meter = admit(served, principal, tokens as u32).await?;
    let (engine, metrics) = (&served.engine, &served.metrics);
    let trace = served.traces.as_ref().map(|traces| {
        let operation = if prefix == "cmpl" {
            "text_completion"
        } else {
            "chat"
        };
        let parent = principal.trace.clone();
        Traced::new(Arc::clone(traces), parent, operation, tokens as u32)
    });
    let generation = Generation::submit(engine, metrics, request, prompts, parser, meter)?;
    let generation = generation.traced(trace);
    Ok(Launched {
        generation,
        report,
        stream,
        id: request_id.unwrap_or_else(|| random_id(prefix)),
    })
}

/// Prefixes are shared under one key and one salt only.
fn isolation_key(principal: &Principal, salt: Option<String>) -> String {
    match salt {
        Some(salt) => format!("{}/{salt}", principal.isolation_key),
        None => principal.isolation_key.clone(),
    }
}

async fn admit(
    served: &Arc<Served>,
    principal: &Principal,
    tokens: u32,
) -> Result<Option<Meter>, ApiError> {
    let Some((desk, owner)) = served.desk.clone().zip(principal.owner) else {
        return Ok(None);
    };
    // The meter is made on the other thread: it settles even when the client leaves meanwhile.
    let begin = move || {
        let begun = desk.begin(owner, tokens, now_s())?;
        Ok(begun.map(|ticket| Meter::new(desk, ticket)))
    };
    let begun: Result<_, ServerError> = blocking(begin).await?;
    match begun {
        Err(error) => Err(ApiError::internal(error.to_string())),
        Ok(Ok(meter)) => Ok(Some(meter)),
        Ok(Err(refusal)) => {
            let (error, reason) = refused(refusal);
            served.metrics.reject(reason);
            Err(error)
        }
    }
}

fn refused(refusal: Refusal) -> (ApiError, &'static str) {
    let forbidden = |message: String, code| ApiError {
        code: Some(code),
        ..ApiError::new(StatusCode::FORBIDDEN, message)
    };
    match refusal {
        Refusal::Quota {
            limit,
            allowed,
            retry_after_s,
        } => {
            let message =
                format!("{allowed} {limit} a minute are allowed; try again in {retry_after_s} s");
            (
                ApiError::too_many(message, "rate_limit_exceeded", retry_after_s),
                "quota",
            )
        }
        Refusal::NoSeat => {
            let message = "a seat is needed: enter the queue on the chat page or POST /api/seat";
            (forbidden(message.to_owned(), "seat_required"), "seat")
        }
        Refusal::Window { opens_at: Some(at) } => {
            let message = format!("access begins at Unix time {at}");
            (forbidden(message, "access_not_begun"), "auth")
        }
        Refusal::Window { opens_at: None } => (
            forbidden("access has ended".to_owned(), "access_ended"),
            "auth",
        ),
        Refusal::Revoked => (ApiError::unauthorized(), "auth"),
    }
}

/// `prefix-` and 96 random bits.
pub(crate) fn random_id(prefix: &str) -> String {
    let mut bytes = [0_u8; 12];
    // Ids need to differ, not to be secret: without random numbers they are the time.
    if getrandom::fill(&mut bytes).is_err() {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        bytes = now.map_or(bytes, |t| {
            let mut bytes = [0; 12];
            bytes.copy_from_slice(&t.as_nanos().to_le_bytes()[..12]);
            bytes
        });
    }
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{prefix}-{hex}")
}
