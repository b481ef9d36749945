//! `/openapi.json`, made from the table of routes.

use crate::router::{Access, Endpoint, Route, routes};
use serde_json::{Map, Value, json};

fn summary(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::Chat => "Chat completion, OpenAI's form",
        Endpoint::Completions => "Completion of a prompt, OpenAI's form",
        Endpoint::Responses => "Response, OpenAI's form (stateless)",
        Endpoint::Messages => "Message, Anthropic's form",
        Endpoint::CountTokens => "Tokens of a message, Anthropic's form",
        Endpoint::Models | Endpoint::Model => "What is served",
        Endpoint::Tokenize => "Text or messages to token ids",
        Endpoint::Detokenize => "Token ids to text",
        Endpoint::TokenizerInfo => "The tokenizer",
        Endpoint::Health => "200 when requests are taken, else 503",
        Endpoint::Live => "200 while the process serves",
        Endpoint::Metrics => "Prometheus metrics",
        Endpoint::Version => "Version",
        Endpoint::Load => "What goes on now",
        Endpoint::OpenApi => "This document",
        Endpoint::Page | Endpoint::Asset => "The chat page",
        Endpoint::Render => "Markdown to HTML, for the page",
        Endpoint::Seat => "Where the account stands",
        Endpoint::EnterSeat => "Enter the queue for a seat",
        Endpoint::LeaveSeat => "Give the seat back",
        Endpoint::Apply => "Apply for access",
        Endpoint::Absent => "Known, but not served: 501",
    }
}

fn operation(route: &Route) -> Value {
    let mut operation = json!({
        "summary": summary(route.endpoint),
        "responses": {"200": {"description": "as the API named in the summary"}},
    });
    if route.method != axum::http::Method::GET {
        operation["requestBody"] = json!({"content": {"application/json":
            {"schema": {"type": "object"}}}});
    }
    if route.access == Access::Keyed {
        operation["security"] = json!([{"bearer": []}, {"header": []}]);
    }
    if let Some(name) = route
        .path
        .split_once('{')
        .and_then(|(_, n)| n.strip_suffix('}'))
    {
        operation["parameters"] = json!([{"name": name, "in": "path", "required": true,
            "schema": {"type": "string"}}]);
    }
    operation
}

/// The document.
pub(crate) fn document() -> Value {
    let mut paths = Map::new();
    for route in routes() {
        let operation = operation(&route);
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.as_str().to_ascii_lowercase()] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "kilotok", "version": env!("CARGO_PKG_VERSION"),
            "description": "Text generation. Unknown fields are ignored and named in x-ignored-params."},
        "paths": paths,
        "components": {"securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"}}},
    })
}
