//! Every op in plain f32 Rust, one row at a time: the definition and the oracle for all backends.
//!
//! Owns clarity, not speed. Weights are decoded to f32, nothing is rounded in between, and a row is
//! computed alone, so that no result can depend on what else is in a step.

pub mod accept;
pub mod attention;
pub mod decoder;
pub mod draft_network;
pub mod linear;
pub mod network;
pub mod rms_norm;
pub mod rope;
pub mod router;
pub mod sample;
pub mod swiglu;

pub use decoder::ReferenceDecoder;
pub use draft_network::DraftNetwork;
