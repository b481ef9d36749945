//! What a model is: configuration, weights, tokenizer, chat template, the [`Decoder`] trait, and
//! `reference`, the plain f32 definition of every op.
//!
//! Refuses: threads, SIMD, HTTP. `unsafe` only in the file that maps checkpoints into memory.

pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod detokenizer;
pub mod draft;
pub mod error;
mod fields;
pub mod generation;
mod header;
pub mod heartbeat;
mod mapped;
mod matrix;
pub mod random;
pub mod reference;
pub mod sampler;
pub mod sampling;
pub mod tokenizer;
pub mod weights;

pub use checkpoint::Checkpoint;
pub use config::Config;
pub use decoder::{Decoder, SequenceId, TokenId};
pub use draft::Draft;
pub use error::ModelError;
pub use weights::Weights;
