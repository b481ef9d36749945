//! The endpoints without a generation: health, models, tokens, metrics.

use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::launch::{self, blocking};
use crate::router::{check_model, json_response};
use crate::state::Served;
use crate::talk::Talk;
use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};
use std::sync::Arc;

/// Ready to take requests, or 503 with the reason.
pub(crate) fn health(served: &Served) -> Response<Body> {
    let mut response = match served.unready() {
        None => json_response(&json!({"status": "ok"})),
        Some(reason) => {
            let mut response = json_response(&json!({"status": "unavailable", "reason": reason}));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            response
        }
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The process serves.
pub(crate) fn live() -> Response<Body> {
    json_response(&json!({"status": "live"}))
}

pub(crate) fn metrics(served: &Served) -> Response<Body> {
    let page = served
        .metrics
        .page(&served.engine, &served.settings.model_name);
    let mut response = Response::new(Body::from(page));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

pub(crate) fn version() -> Response<Body> {
    json_response(&json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// For the page and for balancers that ask: what goes on now.
pub(crate) fn load(served: &Served) -> Response<Body> {
    let m = served.engine.metrics();
    let share = |part: u64, whole: u64| match whole {
        0 => 0.0,
        whole => part as f64 / whole as f64,
    };
    json_response(&json!({
        "server_load": m.running + m.waiting,
        "running": m.running,
        "waiting": m.waiting,
        "expected_wait_s": if m.waiting == 0 { 0 } else { served.engine.expected_wait_s() },
        "kv_share": share(u64::from(m.kv.pages_used), u64::from(m.kv_pages)),
        "prefix_hit_rate": share(m.prefix_hits_total, m.prefix_queries_total),
        "generated_tokens_total": m.generated_tokens_total,
        "mean_acceptance_length": m.draft.acceptance_length(),
    }))
}

fn description(served: &Served) -> Value {
    let name = &served.settings.model_name;
    let context = served.engine.tokens_max();
    json!({
        "id": name,
        "object": "model",
        "created": served.started_at,
        "owned_by": "kilotok",
        "root": name,
        "name": name,
        "max_model_len": context,
        "context_length": context,
        "max_output_length": context,
        "input_modalities": ["text"],
        "output_modalities": ["text"],
        "is_ready": served.unready().is_none(),
        "supported_features": ["tools", "json_mode", "structured_outputs", "reasoning"],
        "supported_sampling_parameters": ["temperature", "top_p", "top_k", "min_p",
            "frequency_penalty", "presence_penalty", "repetition_penalty", "stop", "seed",
            "max_tokens", "logit_bias", "logprobs", "top_logprobs"],
    })
}

pub(crate) fn models(served: &Served) -> Response<Body> {
    json_response(&json!({"object": "list", "data": [description(served)]}))
}

pub(crate) fn model(served: &Served, path: &str) -> Result<Response<Body>, ApiError> {
    let wanted = path.strip_prefix("/v1/models/").unwrap_or_default();
    let name = &served.settings.model_name;
    match wanted == name {
        true => Ok(json_response(&description(served))),
        false => Err(ApiError::unknown_model(wanted, name)),
    }
}

fn token_text(served: &Served, token: u32) -> String {
    let bytes = served.text.codec().token_bytes(token);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// vLLM's form: `{prompt}` or `{messages}` to token ids.
pub(crate) async fn tokenize(
    served: &Arc<Served>,
    body: Value,
) -> Result<Response<Body>, ApiError> {
    let mut fields = Fields::of_body(body)?;
    check_model(&mut fields, served)?;
    let tokens = if fields.has("messages") {
        let talk = Talk::read(&mut fields, &served.settings.limits)?;
        launch::render(served, &talk).await?.0
    } else {
        let name = if fields.has("content") {
            "content"
        } else {
            "prompt"
        };
        let text = fields.required_string(name)?;
        let codec = Arc::clone(served.text.codec());
        let encoded = blocking(move || codec.encode(&text)).await?;
        encoded.map_err(|message| ApiError::invalid(name, message))?
    };
    let texts = fields.flag("return_token_strs")?;
    let texts = texts.then(|| {
        tokens
            .iter()
            .map(|t| token_text(served, *t))
            .collect::<Vec<_>>()
    });
    Ok(json_response(&json!({
        "count": tokens.len(),
        "max_model_len": served.engine.tokens_max(),
        "tokens": tokens,
        "token_strs": texts,
    })))
}

pub(crate) fn detokenize(served: &Served, body: Value) -> Result<Response<Body>, ApiError> {
    let mut fields = Fields::of_body(body)?;
    check_model(&mut fields, served)?;
    let list = fields
        .list("tokens")?
        .ok_or_else(|| fields.missing("tokens"))?;
    let vocab = served.text.codec().vocab_size();
    let token = |value: &Value| {
        let id = value.as_u64().filter(|id| *id < u64::from(vocab));
        id.map(|id| id as u32)
            .ok_or_else(|| wrong("tokens", &format!("token ids below {vocab}"), value))
    };
    let tokens: Vec<u32> = list.iter().map(token).collect::<Result<_, _>>()?;
    Ok(json_response(
        &json!({"prompt": served.text.codec().decode(&tokens)}),
    ))
}

pub(crate) fn tokenizer_info(served: &Served) -> Response<Body> {
    let codec = served.text.codec();
    let text = |t: &u32| String::from_utf8_lossy(&codec.token_bytes(*t)).into_owned();
    let eos = &served.text.defaults.eos_ids;
    json_response(&json!({
        "vocab_size": codec.vocab_size(),
        "model_max_length": served.engine.tokens_max(),
        "eos_token": eos.first().map(text),
        "eos_token_ids": eos,
        "bos_token": served.text.defaults.bos_id.as_ref().map(text),
        "has_chat_template": served.text.has_template(),
        "tokenizer_class": "kilotok",
    }))
}
