//! The admission desk over HTTP, for the page: applying, and seats.

use crate::admission::{Desk, Seat, now_s};
use crate::auth::Principal;
use crate::error::{ApiError, ServerError};
use crate::fields::Fields;
use crate::launch::blocking;
use crate::router::json_response;
use crate::state::Served;
use axum::body::Body;
use axum::http::{Response, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;

fn desk(served: &Served) -> Result<Arc<Desk>, ApiError> {
    let none = || ApiError::new(StatusCode::NOT_FOUND, "this server keeps no accounts");
    served.desk.clone().ok_or_else(none)
}

fn refused(error: ServerError) -> ApiError {
    match error {
        ServerError::Admission(message) => ApiError {
            code: Some("admission_refused"),
            ..ApiError::new(StatusCode::FORBIDDEN, message)
        },
        other => {
            tracing::error!(error = %other, "admission desk");
            ApiError::internal("the admission database cannot be used")
        }
    }
}

pub(crate) fn describe(seat: &Seat) -> Value {
    match seat {
        Seat::Open => json!({"state": "open"}),
        Seat::None {
            entries_left,
            last_end,
        } => {
            json!({"state": "none", "entries_left": entries_left, "last_end": last_end})
        }
        Seat::Waiting { position, waiting } => {
            json!({"state": "waiting", "position": position, "waiting": waiting})
        }
        Seat::Seated {
            left_s,
            idle_left_s,
        } => {
            json!({"state": "seated", "left_s": left_s, "idle_left_s": idle_left_s})
        }
    }
}

async fn order(
    served: &Served,
    principal: &Principal,
    order: impl FnOnce(&Desk, i64, i64) -> Result<Seat, ServerError> + Send + 'static,
) -> Result<Response<Body>, ApiError> {
    let Some(owner) = principal.owner else {
        return Ok(json_response(&describe(&Seat::Open)));
    };
    let desk = desk(served)?;
    let seat = blocking(move || order(&desk, owner.account, now_s())).await?;
    Ok(json_response(&describe(&seat.map_err(refused)?)))
}

pub(crate) async fn seat(served: &Served, who: &Principal) -> Result<Response<Body>, ApiError> {
    order(served, who, Desk::seat).await
}

pub(crate) async fn enter(served: &Served, who: &Principal) -> Result<Response<Body>, ApiError> {
    order(served, who, Desk::enter).await
}

pub(crate) async fn leave(served: &Served, who: &Principal) -> Result<Response<Body>, ApiError> {
    order(served, who, Desk::leave).await
}

/// An application from the page; a person approves it with `kilotok admin approve`.
pub(crate) async fn apply(served: &Served, body: Value) -> Result<Response<Body>, ApiError> {
    let desk = desk(served)?;
    let mut fields = Fields::of_body(body)?;
    let name = fields.required_string("name")?;
    let contact = fields.required_string("contact")?;
    let purpose = fields.required_string("purpose")?;
    let applied = blocking(move || desk.apply(&name, &contact, &purpose, now_s())).await?;
    applied.map_err(refused)?;
    Ok(json_response(&json!({"state": "applied"})))
}
