//! `/v1/completions`: prompts as they are, texts or token ids, with `echo` and prompt
//! log-probabilities for those who score texts.

use crate::account::{self, Columns, Counts};
use crate::admission::now_s;
use crate::auth::Principal;
use crate::decoding::{self, Report};
use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::generate::{Finish, Generation, Output};
use crate::grammar::Guide;
use crate::launch::{self, blocking};
use crate::limits::Limits;
use crate::parse::{Parser, Part};
use crate::state::Served;
use crate::talk::read_grammar;
use crate::text::Codec;
use crate::wire::{self, Collected, Events, Wire};
use axum::body::Body;
use axum::http::Response;
use model::TokenId;
use model::decoder::TokenLogprobs;
use serde_json::{Value, json};
use std::sync::Arc;

/// Tokens of an answer when the request does not say: OpenAI's.
const DEFAULT_TOKENS: u32 = 16;

/// Serves one request.
pub(crate) async fn serve(
    served: Arc<Served>,
    principal: Principal,
    body: Value,
) -> Result<Response<Body>, ApiError> {
    let limits = &served.settings.limits;
    let mut fields = Fields::of_body(body)?;
    crate::router::require_model(&mut fields, &served)?;
    if fields.has("suffix") {
        return Err(ApiError::invalid(
            "suffix",
            "suffix: filling in is not served",
        ));
    }
    let mut decoding = decoding::read(&mut fields, &served.decoding_defaults(), limits)?;
    let logprobs = fields.integer("logprobs", 0..=i64::from(limits.top_logprobs))?;
    let logprobs = logprobs.map(|n| n as u32);
    let prompt_logprobs = fields.integer("prompt_logprobs", 0..=i64::from(limits.top_logprobs))?;
    let echo = fields.flag("echo")?;
    let grammar = read_grammar(&mut fields, limits)?;
    let prompts = prompts(&served, &mut fields).await?;
    let ignored = fields.unread();
    let request = &mut decoding.request;
    request.stop.max_tokens.get_or_insert(DEFAULT_TOKENS);
    request.logprobs = logprobs;
    request.prompt_logprobs = match (echo, logprobs, prompt_logprobs) {
        (_, _, Some(n)) => Some(n as u32),
        (true, Some(n), None) => Some(n),
        _ => None,
    };
    decoding.report.logprobs = logprobs.is_some();
    let guide = Guide {
        grammar,
        ..Guide::default()
    };
    decoding.request.constraint = launch::constraint(&served, guide).await?;
    let samples_each = decoding.request.samples;
    let started = launch::start(
        &served,
        &principal,
        prompts.clone(),
        decoding,
        Parser::plain,
        "cmpl",
    );
    let launched = started.await?;
    let form = Form {
        id: launched.id,
        created: now_s(),
        model: served.settings.model_name.clone(),
        report: launched.report,
        codec: Arc::clone(served.text.codec()),
        prompts,
        samples_each,
        echo,
    };
    let response = if launched.stream {
        let wire = CompletionWire::new(form, launched.generation.samples());
        let (metrics, ping) = (&served.metrics, served.settings.ping);
        wire::stream(launched.generation, wire, metrics, ping)
    } else {
        let prompt = launched.generation.prompt_tokens();
        let collected = wire::collect(launched.generation).await?;
        crate::router::json_response(&form.whole(&collected, prompt))
    };
    Ok(crate::router::with_ignored(response, &ignored))
}

/// A text, token ids, or a list of either.
async fn prompts(served: &Arc<Served>, fields: &mut Fields) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let value = fields
        .take("prompt")
        .ok_or_else(|| fields.missing("prompt"))?;
    let list = match value {
        Value::Array(list) if list.iter().all(Value::is_number) => vec![Value::Array(list)],
        Value::Array(list) => list,
        one => vec![one],
    };
    if list.is_empty() {
        return Err(ApiError::invalid(
            "prompt",
            "prompt: at least one is needed",
        ));
    }
    Limits::count("prompt", list.len(), served.settings.limits.prompts)?;
    let codec = Arc::clone(served.text.codec());
    blocking(move || {
        list.iter()
            .map(|prompt| tokens(codec.as_ref(), prompt))
            .collect()
    })
    .await?
}

fn tokens(codec: &dyn Codec, prompt: &Value) -> Result<Vec<TokenId>, ApiError> {
    match prompt {
        Value::String(text) => codec
            .encode(text)
            .map_err(|message| ApiError::invalid("prompt", message)),
        Value::Array(ids) => {
            let id = |value: &Value| {
                let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
                id.ok_or_else(|| wrong("prompt", "texts or lists of token ids", value))
            };
            ids.iter().map(id).collect()
        }
        other => Err(wrong("prompt", "texts or lists of token ids", other)),
    }
}

struct Form {
    id: String,
    created: i64,
    model: String,
    report: Report,
    codec: Arc<dyn Codec>,
    prompts: Vec<Vec<TokenId>>,
    samples_each: u32,
    echo: bool,
}

impl Form {
    fn prompt_of(&self, sample: u32) -> &[TokenId] {
        &self.prompts[(sample / self.samples_each) as usize]
    }

    fn body(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": null,
            "choices": choices,
        })
    }

    fn whole(&self, collected: &Collected, prompt: u32) -> Value {
        let mut counts = Counts {
            prompt,
            ..Counts::default()
        };
        let mut choices = Vec::new();
        for (sample, answer) in (0..).zip(&collected.answers) {
            counts.generated += answer.stats.generated_tokens;
            counts.cached = counts.cached.max(answer.stats.cached_tokens);
            let codec = self.codec.as_ref();
            let prompt = self.prompt_of(sample);
            let rows = collected.prompts.get((sample / self.samples_each) as usize);
            let mut text = if self.echo {
                codec.decode(prompt)
            } else {
                String::new()
            };
            text.push_str(&answer.content());
            let mut choice = json!({"index": sample, "text": text, "logprobs": null,
                "finish_reason": answer.finish.name()});
            if self.report.logprobs {
                let mut columns = Columns::default();
                if self.echo {
                    push_prompt(&mut columns, codec, prompt, rows.map_or(&[], Vec::as_slice));
                }
                for (token, row) in answer.tokens.iter().zip(&answer.logprobs) {
                    columns.push(codec, *token, Some(row));
                }
                choice["logprobs"] = columns.take();
            }
            if self.report.token_ids {
                choice["token_ids"] = answer.tokens.clone().into();
                choice["prompt_token_ids"] = prompt.into();
            }
            choices.push(choice);
        }
        let mut value = self.body(choices.into());
        value["usage"] = counts.openai();
        if let Some(first) = collected.answers.first().filter(|_| self.report.metrics) {
            value["metrics"] = account::metrics(&first.stats, &first.per_step, self.report);
        }
        value
    }
}

fn push_prompt(
    columns: &mut Columns,
    codec: &dyn Codec,
    prompt: &[TokenId],
    rows: &[Option<TokenLogprobs>],
) {
    for (i, token) in prompt.iter().enumerate() {
        columns.push(codec, *token, rows.get(i).and_then(Option::as_ref));
    }
}

struct CompletionWire {
    form: Form,
    counts: Counts,
    /// By sample: offsets go on from chunk to chunk.
    columns: Vec<Columns>,
    metrics: Option<Value>,
}

impl CompletionWire {
    fn new(form: Form, samples: u32) -> Self {
        Self {
            form,
            counts: Counts::default(),
            columns: (0..samples).map(|_| Columns::default()).collect(),
            metrics: None,
        }
    }

    fn chunk(&mut self, sample: u32, text: String, finish: Option<&Finish>) -> Value {
        let logprobs = match self.form.report.logprobs {
            true => self.columns[sample as usize].take(),
            false => Value::Null,
        };
        let choice = json!({"index": sample, "text": text, "logprobs": logprobs,
            "finish_reason": finish.map(Finish::name)});
        let mut chunk = self.form.body(json!([choice]));
        if self.form.report.running_usage {
            chunk["usage"] = self.counts.openai();
        }
        chunk
    }

    /// With `echo` the prompt is the first chunk of each of its samples.
    fn echo(&mut self, prompt: u32, rows: &[Option<TokenLogprobs>], out: &mut Events) {
        let each = self.form.samples_each;
        for sample in prompt * each..(prompt + 1) * each {
            let codec = Arc::clone(&self.form.codec);
            let tokens = self.form.prompt_of(sample).to_vec();
            push_prompt(
                &mut self.columns[sample as usize],
                codec.as_ref(),
                &tokens,
                rows,
            );
            let chunk = self.chunk(sample, codec.decode(&tokens), None);
            out.data(&chunk);
        }
    }
}

fn text(parts: Vec<Part>) -> String {
    let text = |part| match part {
        Part::Content(text) => Some(text),
        _ => None,
    };
    parts.into_iter().filter_map(text).collect()
}

impl Wire for CompletionWire {
    fn open(&mut self, generation: &Generation, out: &mut Events) {
        self.counts.prompt = generation.prompt_tokens();
        let scored = self.form.report.logprobs;
        if self.form.echo && !scored {
            for prompt in 0..self.form.prompts.len() {
                self.echo(prompt as u32, &[], out);
            }
        }
    }

    fn output(&mut self, output: Output, generation: &Generation, out: &mut Events) {
        match output {
            Output::Prompt { prompt, rows } => {
                if self.form.echo && self.form.report.logprobs {
                    self.echo(prompt, &rows, out);
                }
            }
            Output::Delta { parts, piece } => {
                self.counts.generated += piece.tokens.len() as u32;
                let codec = Arc::clone(&self.form.codec);
                let columns = &mut self.columns[piece.sample as usize];
                for (token, row) in piece.tokens.iter().zip(&piece.logprobs) {
                    columns.push(codec.as_ref(), *token, Some(row));
                }
                let mut chunk = self.chunk(piece.sample, text(parts), None);
                if self.form.report.token_ids {
                    chunk["choices"][0]["token_ids"] = piece.tokens.clone().into();
                }
                if let Some(step) = piece.step.as_ref().filter(|_| self.form.report.steps) {
                    chunk["step"] = account::step(step);
                }
                out.data(&chunk);
            }
            Output::End {
                sample,
                parts,
                finish,
                stats,
            } => {
                if let Finish::Failed(error) = finish {
                    return out.failed(&error);
                }
                self.counts.cached = self.counts.cached.max(stats.cached_tokens);
                let per_step = generation.per_step(sample);
                let block = account::metrics(&stats, per_step, self.form.report);
                let mut chunk = self.chunk(sample, text(parts), Some(&finish));
                if self.form.report.metrics && !self.form.report.usage {
                    chunk["metrics"] = block.clone();
                }
                self.metrics.get_or_insert(block);
                out.data(&chunk);
            }
        }
    }

    fn close(&mut self, _: &Generation, out: &mut Events) {
        if self.form.report.usage {
            let mut chunk = self.form.body(json!([]));
            chunk["usage"] = self.counts.openai();
            if let Some(block) = self.metrics.take().filter(|_| self.form.report.metrics) {
                chunk["metrics"] = block;
            }
            out.data(&chunk);
        }
        out.done();
    }
}
