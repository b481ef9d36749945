//! The routes as one table, and what happens to every request before its endpoint: key, body limit,
//! JSON; and after it: error bodies in the route's dialect, counts, one log line.
//!
//! Invariant: a route is reachable without a key only if the table says [`Access::Open`]; tests walk
//! the table.

use crate::auth::Principal;
use crate::error::{ApiError, Dialect};
use crate::fields::Fields;
use crate::state::Served;
use crate::traces::parent;
use crate::{chat, completions, cors, desk_api, messages, openapi, page, plain, responses};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use axum::routing::{MethodFilter, on};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most of an unread body that is taken in.
const DRAIN_BYTES: usize = 64 << 10;
/// And how long that may take.
const DRAIN_TIME: Duration = Duration::from_secs(1);

/// Who may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Everyone: the page itself, and what probes need.
    Open,
    /// Whoever has a key, when keys are needed.
    Keyed,
}

/// What a route does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
    Responses,
    Messages,
    CountTokens,
    Models,
    Model,
    Tokenize,
    Detokenize,
    TokenizerInfo,
    Health,
    Live,
    Metrics,
    Version,
    OpenApi,
    Load,
    Page,
    Asset,
    Render,
    Seat,
    EnterSeat,
    LeaveSeat,
    Apply,
    /// Known, but not served here.
    Absent,
}

/// A row of the table.
pub(crate) struct Route {
    pub(crate) method: Method,
    pub(crate) path: &'static str,
    pub(crate) access: Access,
    pub(crate) endpoint: Endpoint,
}

/// Routes of OpenAI's, Anthropic's and vLLM's APIs that this server knows and does not serve.
pub(crate) const ABSENT: [&str; 18] = [
    "/v1/embeddings",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/audio/speech",
    "/v1/files",
    "/v1/batches",
    "/v1/fine_tuning/jobs",
    "/v1/assistants",
    "/v1/threads",
    "/v1/rerank",
    "/v1/score",
    "/v1/messages/batches",
    "/v1/load_lora_adapter",
    "/pooling",
    "/classify",
];

/// All routes.
pub(crate) fn routes() -> Vec<Route> {
    use Access::{Keyed, Open};
    use Endpoint as E;
    let row = |method: Method, path, access, endpoint| Route {
        method,
        path,
        access,
        endpoint,
    };
    let (get, post) = (|| Method::GET, || Method::POST);
    let mut table = vec![
        row(post(), "/v1/chat/completions", Keyed, E::Chat),
        row(post(), "/v1/completions", Keyed, E::Completions),
        row(post(), "/v1/responses", Keyed, E::Responses),
        row(post(), "/v1/messages", Keyed, E::Messages),
        row(post(), "/v1/messages/count_tokens", Keyed, E::CountTokens),
        row(get(), "/v1/models", Keyed, E::Models),
        row(get(), "/v1/models/{model}", Keyed, E::Model),
        row(post(), "/tokenize", Keyed, E::Tokenize),
        row(post(), "/detokenize", Keyed, E::Detokenize),
        row(get(), "/tokenizer_info", Keyed, E::TokenizerInfo),
        row(get(), "/health", Open, E::Health),
        row(get(), "/health/live", Open, E::Live),
        row(get(), "/metrics", Keyed, E::Metrics),
        row(get(), "/version", Keyed, E::Version),
        row(get(), "/load", Keyed, E::Load),
        row(get(), "/openapi.json", Keyed, E::OpenApi),
        row(post(), "/api/render", Keyed, E::Render),
        row(get(), "/api/seat", Keyed, E::Seat),
        row(post(), "/api/seat", Keyed, E::EnterSeat),
        row(Method::DELETE, "/api/seat", Keyed, E::LeaveSeat),
        row(post(), "/api/apply", Open, E::Apply),
        row(get(), "/", Open, E::Page),
        row(get(), "/page/{file}", Open, E::Asset),
    ];
    table.extend(ABSENT.map(|path| row(post(), path, Keyed, E::Absent)));
    table
}

/// The router over a server's parts.
pub fn router(served: &Arc<Served>) -> Router {
    let mut router = Router::new();
    for route in routes() {
        let filter = MethodFilter::try_from(route.method.clone()).unwrap_or(MethodFilter::POST);
        let (access, endpoint) = (route.access, route.endpoint);
        let served = Arc::clone(served);
        let handler = move |request: Request| {
            let served = Arc::clone(&served);
            handle(served, access, endpoint, request)
        };
        router = router.route(route.path, on(filter, handler));
    }
    let all = Arc::clone(served);
    let nothing = move |request: Request| {
        let served = Arc::clone(&all);
        async move {
            let response = cors::preflight(&served, &request).unwrap_or_else(|| unknown(&request));
            drain(request.into_body()).await;
            response
        }
    };
    router
        .fallback(nothing.clone())
        .method_not_allowed_fallback(nothing)
}

fn unknown(request: &Request) -> Response<Body> {
    let (method, path) = (request.method(), request.uri().path());
    let known = routes().iter().any(|route| route.path == path);
    let (status, message) = match known {
        true => (
            StatusCode::METHOD_NOT_ALLOWED,
            format!("{path} does not take {method}"),
        ),
        false => (
            StatusCode::NOT_FOUND,
            format!("no such route: {method} {path}"),
        ),
    };
    ApiError::new(status, message).response(Dialect::of_path(path))
}

async fn handle(
    served: Arc<Served>,
    access: Access,
    endpoint: Endpoint,
    request: Request,
) -> Response<Body> {
    let start = Instant::now();
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let origin = request.headers().get(header::ORIGIN).cloned();
    let mut response = match admit(&served, access, endpoint, request).await {
        Ok(response) => response,
        Err(error) => {
            count(&served, &error);
            error.response(Dialect::of_path(&path))
        }
    };
    cors::allow(&served, origin.as_ref(), response.headers_mut());
    let status = response.status().as_u16();
    let ms = start.elapsed().as_secs_f64() * 1e3;
    tracing::info!(target: "http", %method, path, status, ms, "request");
    response
}

fn count(served: &Served, error: &ApiError) {
    let reason = match (error.status.as_u16(), error.code) {
        (429, Some("queue_full")) => "queue_full",
        (401, _) => "auth",
        (503, Some("draining")) => "draining",
        (500..=599, _) => "failed",
        // Quota, seat and window are counted where they are refused.
        (429 | 403, _) => return,
        _ => "invalid",
    };
    served.metrics.reject(reason);
}

async fn admit(
    served: &Arc<Served>,
    access: Access,
    endpoint: Endpoint,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let known = served
        .settings
        .limits
        .head(head_bytes(&request))
        .and_then(|()| principal(served, access, request.headers()));
    let principal = match known {
        Ok(principal) => principal,
        Err(error) => {
            drain(request.into_body()).await;
            return Err(error);
        }
    };
    let uri = request.uri().clone();
    if endpoint == Endpoint::Absent {
        drain(request.into_body()).await;
        let message = format!("{} is not served here: text generation only", uri.path());
        return Err(ApiError::new(StatusCode::NOT_IMPLEMENTED, message));
    }
    match endpoint {
        Endpoint::Health => return Ok(plain::health(served)),
        Endpoint::Live => return Ok(plain::live()),
        Endpoint::Metrics => return Ok(plain::metrics(served)),
        Endpoint::Version => return Ok(plain::version()),
        Endpoint::Load => return Ok(plain::load(served)),
        Endpoint::OpenApi => return Ok(json_response(&openapi::document())),
        Endpoint::Models => return Ok(plain::models(served)),
        Endpoint::Model => return plain::model(served, uri.path()),
        Endpoint::TokenizerInfo => return Ok(plain::tokenizer_info(served)),
        Endpoint::Page => return page::index(served),
        Endpoint::Asset => return page::asset(served, uri.path()),
        Endpoint::Seat => return desk_api::seat(served, &principal).await,
        Endpoint::EnterSeat => return desk_api::enter(served, &principal).await,
        Endpoint::LeaveSeat => return desk_api::leave(served, &principal).await,
        _ => {}
    }
    let body = read(served, request).await?;
    if endpoint == Endpoint::Render {
        return page::render(&body).await;
    }
    let value = served.settings.limits.parse(&body)?;
    drop(body);
    match endpoint {
        Endpoint::Apply => desk_api::apply(served, value).await,
        Endpoint::Tokenize => plain::tokenize(served, value).await,
        Endpoint::Detokenize => plain::detokenize(served, value),
        Endpoint::CountTokens => messages::count_tokens(served, value).await,
        _ => generate(served, endpoint, principal, value).await,
    }
}

async fn generate(
    served: &Arc<Served>,
    endpoint: Endpoint,
    principal: Principal,
    body: Value,
) -> Result<Response<Body>, ApiError> {
    if served.is_draining() {
        return Err(ApiError::unavailable(
            "the server is shutting down",
            "draining",
        ));
    }
    let served = Arc::clone(served);
    match endpoint {
        Endpoint::Chat => chat::serve(served, principal, body).await,
        Endpoint::Completions => completions::serve(served, principal, body).await,
        Endpoint::Responses => responses::serve(served, principal, body).await,
        _ => messages::serve(served, principal, body).await,
    }
}

/// Bytes of the request line and headers as clients write them. The HTTP library refuses a head that fills
/// its buffer before it ends, but takes one that came in a single larger piece.
fn head_bytes(request: &Request) -> usize {
    let line = request.method().as_str().len() + request.uri().to_string().len() + 14;
    let headers = request.headers().iter();
    line + headers
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum::<usize>()
}

fn principal(served: &Served, access: Access, headers: &HeaderMap) -> Result<Principal, ApiError> {
    if access == Access::Open {
        return Ok(Principal {
            isolation_key: String::new(),
            owner: None,
            trace: None,
        });
    }
    match served.keys.principal(headers) {
        Ok(Some(principal)) => Ok(Principal {
            trace: served.traces.as_ref().and_then(|_| parent(headers)),
            ..principal
        }),
        Ok(None) => Err(ApiError::unauthorized()),
        Err(error) => {
            tracing::error!(%error, "key not looked up");
            Err(ApiError::internal("the admission database cannot be read"))
        }
    }
}

/// Takes in a small body that nobody reads, so that the connection can be used again.
async fn drain(body: Body) {
    let body = Limited::new(body, DRAIN_BYTES).collect();
    // Whatever comes of it: the answer does not depend on it.
    let _ = tokio::time::timeout(DRAIN_TIME, body).await;
}

async fn read(served: &Served, request: Request) -> Result<Bytes, ApiError> {
    let limits = &served.settings.limits;
    let length = request.headers().get(header::CONTENT_LENGTH);
    let length = length.and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > limits.body_bytes) {
        return Err(limits.body_too_large());
    }
    let body = Limited::new(request.into_body(), limits.body_bytes);
    match body.collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(limits.body_too_large()),
        Err(_) => Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "the body ended before it was complete",
        )),
    }
}

/// Refuses a request for no model or another one.
pub(crate) fn require_model(fields: &mut Fields, served: &Served) -> Result<(), ApiError> {
    match fields.has("model") {
        true => check_model(fields, served),
        false => Err(fields.missing("model")),
    }
}

/// Refuses a request for another model.
pub(crate) fn check_model(fields: &mut Fields, served: &Served) -> Result<(), ApiError> {
    let name = &served.settings.model_name;
    match fields.string("model")? {
        Some(wanted) if wanted != *name => Err(ApiError::unknown_model(&wanted, name)),
        _ => Ok(()),
    }
}

/// 200 with JSON.
pub(crate) fn json_response(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

/// Names the fields that had no effect.
pub(crate) fn with_ignored(mut response: Response<Body>, ignored: &[String]) -> Response<Body> {
    let printable = |name: &&String| name.len() <= 64 && name.bytes().all(|b| b.is_ascii_graphic());
    let names: Vec<&str> = ignored
        .iter()
        .filter(printable)
        .take(32)
        .map(String::as_str)
        .collect();
    if let Ok(value) = HeaderValue::from_str(&names.join(","))
        && !names.is_empty()
    {
        response.headers_mut().insert("x-ignored-params", value);
    }
    response
}
