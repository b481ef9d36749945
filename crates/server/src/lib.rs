//! The service: OpenAI's and Anthropic's APIs, an admission desk and a chat page over an engine.
//!
//! Only this crate knows HTTP and wire types. Refuses: devices and models; it gets an
//! [`engine::EngineHandle`] and a [`text::ModelText`]. Invariants: a thread that serves never blocks;
//! dropping a request cancels it; nothing from prompts or keys is logged; everything a client can
//! send has a limit.
#![forbid(unsafe_code)]

mod account;
pub mod admission;
mod auth;
mod calls;
mod chat;
mod completions;
mod cors;
mod decoding;
mod desk_api;
pub mod error;
mod fields;
mod generate;
mod grammar;
mod launch;
pub mod limits;
pub mod load;
pub mod loading;
mod markdown;
mod messages;
mod meter;
mod metrics;
mod names;
mod one_of;
mod openapi;
mod page;
pub mod parse;
mod plain;
mod response_stream;
mod responses;
mod router;
mod schema;
pub mod serve;
mod state;
mod talk;
pub mod text;
mod traces;
mod wire;

pub use error::ServerError;
pub use router::router;
pub use state::{Served, Settings};
